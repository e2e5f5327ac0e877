"""Which backend takes attention, why the others are refused, and the configuration tables behind it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfast_kernels import attention_wgmma, backends, tables
from mmfast_kernels.attention import packed_attention, packed_attention_ref, packed_self_attention
from mmfast_kernels.backends import Case
from mmfast_kernels.dispatch import INTERPRET

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What choose() asks about the machine, answered as an H200 without flash-attn would."""
    monkeypatch.setattr(tables, "arch_of", lambda device: 90 if device.type == "cuda" else 0)
    monkeypatch.setattr(backends, "HAVE_TRITON", True)
    monkeypatch.setattr(attention_wgmma, "MOST_KEYS", 400)
    monkeypatch.setattr(backends, "_installed", lambda module: False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


def case(**changes: Any) -> Case:
    return Case(CUDA, torch.bfloat16, 64, 392, 392)._replace(**changes)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("changes", "backend"),
    [
        ({}, "triton"),
        ({"d": 80}, "triton"),
        ({"dense": False}, "triton"),
        ({"n_q": 1568, "n_k": 1568}, "cudnn"),
        ({"n_q": 1568, "n_k": 1568, "dense": False}, "triton"),
        ({"n_q": 1568, "n_k": 1568, "with_lse": True}, "triton"),
        ({"d": 88, "dense": False}, "torch"),
        ({"needs_grad": True}, "triton"),
        ({"needs_grad": True, "n_q": 784, "n_k": 784}, "triton"),
        ({"needs_grad": True, "n_q": 1568, "n_k": 1568}, "cudnn"),
        ({"needs_grad": True, "n_q": 1568, "n_k": 1568, "dense": False}, "triton"),
        ({"needs_grad": True, "d": 72}, "cudnn"),
        ({"needs_grad": True, "d": 72, "dense": False}, "torch"),
        ({"dtype": torch.float32}, "torch"),
        ({"dtype": torch.float32, "dense": False}, "triton"),
        ({"dtype": torch.float64}, "torch"),
    ],
    ids=str,
)
def test_choice_on_hopper(changes: dict[str, Any], backend: str) -> None:
    assert backends.choose(case(**changes))[0] == backend


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("backend", "changes", "reason"),
    [
        ("triton", {"d": 72}, "d in"),
        ("triton", {"dtype": torch.float64}, "float64"),
        ("triton", {"row_stride": 2**23}, "apart"),
        ("cudnn", {"dense": False}, "one length"),
        ("cudnn", {"dtype": torch.float32}, "float32"),
        ("cudnn", {"d": 160}, "up to 128"),
        ("cudnn", {"causal": True, "n_k": 400}, "aligned"),
        ("cudnn", {"with_lse": True}, "log-sum-exp"),
        ("cudnn", {"device": CPU}, "CUDA"),
        ("flash_attn", {}, "not installed"),
        ("cpp", {"device": CPU, "dtype": torch.float32, "needs_grad": True, "with_lse": True}, "log-sum-exp"),
        ("wgmma", {"device": CPU}, "CUDA"),
        ("wgmma", {"dtype": torch.float32}, "float32"),
        ("wgmma", {"d": 80}, "d = 64"),
        ("wgmma", {"dense": False}, "one length"),
        ("wgmma", {"causal": True}, "causal"),
        ("wgmma", {"needs_grad": True}, "no backward"),
        ("wgmma", {"n_k": 401}, "1 to 400 keys"),
        ("wgmma", {"n_k": 0}, "1 to 400 keys"),
        ("wgmma", {"aligned": False}, "16 bytes"),
    ],
    ids=str,
)
def test_refusal_gives_the_reason(backend: str, changes: dict[str, Any], reason: str) -> None:
    refused = backends.refusal(backend, case(**changes))
    assert refused is not None
    assert reason in refused


@pytest.mark.usefixtures("hopper")
def test_cudnn_is_left_out_while_torch_has_to_be_deterministic() -> None:
    """As torch does: asked for cuDNN alone, it would raise."""
    long = case(n_q=1568, n_k=1568)
    assert backends.choose(long)[0] == "cudnn"
    torch.use_deterministic_algorithms(True)
    try:
        chosen, refused = backends.choose(long)
    finally:
        torch.use_deterministic_algorithms(False)
    assert chosen == "triton"
    assert "not deterministic" in refused["cudnn"]
    assert backends.choose(long)[0] == "cudnn"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("backend", ["triton", "cudnn", "flash_attn"])
def test_old_devices_are_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "arch_of", lambda device: 75)
    assert "sm_75" in str(backends.refusal(backend, case()))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("arch", [80, 89, 100, 120])
def test_the_wgmma_kernel_is_for_one_architecture(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "arch_of", lambda device: arch)
    assert f"this is sm_{arch}" in str(backends.refusal("wgmma", case()))


@pytest.mark.usefixtures("hopper")
def test_the_wgmma_kernel_may_be_left_out_of_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.refusal("wgmma", case()) is None
    monkeypatch.setattr(attention_wgmma, "MOST_KEYS", 0)
    assert "built without" in str(backends.refusal("wgmma", case()))


def test_what_is_not_shipped_is_in_no_order() -> None:
    orders = [row.config["order"] for row in tables.shipped("attention_backends")]
    assert not {*backends.UNSHIPPED} & {name for order in orders for name in order}
    assert {*backends.UNSHIPPED} <= {*backends.NAMES}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("wanted", [None, "cudnn"])
def test_choice_for_a_gradient(wanted: str | None) -> None:
    assert backends.choose_for_gradient(case(needs_grad=True), wanted) == (wanted or "triton")
    with pytest.raises(ValueError, match="cudnn refused"):
        backends.choose_for_gradient(case(needs_grad=True, dense=False), "cudnn")


def test_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(6, 1, 64)
    monkeypatch.setenv("MMFAST_ATTENTION", "cudnn")
    with pytest.raises(ValueError, match="cudnn refused: cuDNN needs a CUDA device"):
        packed_attention(q, q, q, length=3)
    with pytest.raises(ValueError, match="cudnn refused"):
        packed_self_attention(torch.randn(6, 3, 1, 64, requires_grad=True), length=3)
    with pytest.raises(ValueError, match="cudnn refused"):
        packed_attention(q, q, q, cu_seqlens=torch.tensor([0, 6], dtype=torch.int32), max_length=6)
    monkeypatch.setenv("MMFAST_ATTENTION", "torch")
    assert packed_attention(q, q, q, length=3).isfinite().all()


@pytest.mark.usefixtures("hopper")
def test_environment_wins_over_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMFAST_ATTENTION", "cudnn")
    assert backends.choose(case())[0] == "cudnn"


def test_description_of_the_cpu() -> None:
    described = backends.describe("cpu")
    training = described["392 tokens, d 64, bf16, training"]
    assert training["backend"] == ("triton" if INTERPRET else "torch")
    assert "CUDA" in training["refused"]["cudnn"]


@pytest.mark.usefixtures("hopper")
def test_description_survives_a_forced_backend_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMFAST_ATTENTION", "cudnn")
    described = backends.describe(CUDA)["mixed lengths up to 392, d 64, bf16"]
    assert described["backend"] is None
    assert "one length" in described["refused"]["MMFAST_ATTENTION"]


def test_imports_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from mmfast_kernels.attention import packed_attention\n"
        "q = torch.ones(4, 1, 8); print(packed_attention(q, q, q, length=2).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["32.0"]


# -- tables --


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A table of three rows for an op called 'op'."""
    rows = [
        {"when": dict(arch_min=90, n_max=100, dtype=["bf16", "fp16"]), "config": {"B": 1}, "alternatives": [{"B": 9}]},
        {"when": {"arch": 80}, "config": {"B": 2}},
        {"when": {"n_min": 5}, "config": {"B": 3}},
    ]
    (tmp_path / "op.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    yield "op"
    tables.reload()
    tables._tuned.clear()


@pytest.mark.parametrize(
    ("case", "block"),
    [
        (dict(arch=90, n=100, dtype="fp16"), 1),
        (dict(arch=90, n=101, dtype="fp16"), 3),
        (dict(arch=90, n=9, dtype="fp32"), 3),
        (dict(arch=80, n=9, dtype="bf16"), 2),
    ],
    ids=str,
)
def test_first_row_that_holds_wins(table: str, case: dict[str, Any], block: int) -> None:
    assert tables.lookup(table, **case).config == {"B": block}


def test_missing_row_is_named(table: str) -> None:
    with pytest.raises(LookupError, match="op.json has no row"):
        tables.lookup(table, arch=90, n=4, dtype="fp32")


def test_nothing_is_timed_unless_asked(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMFAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(tables, "measure", lambda *_: pytest.fail("timed"))
    assert tables.config(table, print, arch=90, n=4, dtype="bf16") == {"B": 1}


def test_autotune_takes_the_fastest_once(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Any] = []

    def time(run: Any, config: Any) -> tables.Timed:
        timed.append(config)
        return tables.Timed(config, 10 - config["B"])

    monkeypatch.setenv("MMFAST_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tables, "measure", time)
    for _ in range(2):
        assert tables.config(table, print, arch=90, n=4, dtype="bf16") == {"B": 9}
    assert timed == [{"B": 1}, {"B": 9}]


def test_autotune_does_not_time_in_a_graph_capture(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMFAST_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(tables, "measure", lambda *_: pytest.fail("timed"))
    assert tables.config(table, print, arch=90, n=4, dtype="bf16") == {"B": 1}


@pytest.mark.parametrize("arch", [0, 80, 86, 90, 100, 120])
@pytest.mark.parametrize("d", backends.TRITON_WIDTHS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_attention_has_a_configuration_everywhere(arch: int, d: int, dtype: str) -> None:
    for n in (0, 77, 512, 513, 100_000):
        assert tables.lookup("packed_attention", arch=arch, d=d, n=n, dtype=dtype).config["num_warps"] in (4, 8)
        for kernel in ("dq", "dkdv"):
            row = tables.lookup("packed_attention_backward", kernel=kernel, arch=arch, d=d, n=n, dtype=dtype)
            assert row.config["num_warps"] in (4, 8)


def _newer(q, k, v, cu_q, cu_k, n_q, n_k, *, scale=None, window_size=(-1, -1)):
    lengths = dict(cu_seqlens=cu_q, max_length=n_q, cu_seqlens_k=cu_k, max_length_k=n_k)
    return packed_attention_ref(q, k, v, causal=window_size == (-1, 0), scale=scale, **lengths)


def _older(q, k, v, cu_q, cu_k, n_q, n_k, is_causal=False):
    return _newer(q, k, v, cu_q, cu_k, n_q, n_k, window_size=(-1, 0) if is_causal else (-1, -1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("installed", [_newer, _older])
def test_torchs_varlen_attention_is_called_in_either_form(installed, causal, monkeypatch) -> None:
    """torch 2.10 took is_causal and no scale; later ones take window_size and scale."""
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", installed)
    q, k, v = torch.randn(3, 7, 2, 16).unbind(0)
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    got = backends._varlen_attn(q, k, v, backends.Lengths(cu, cu, 4, 4), causal, 0.7)
    expected = packed_attention_ref(q, k, v, cu_seqlens=cu, max_length=4, causal=causal, scale=0.7)
    torch.testing.assert_close(got, expected)
