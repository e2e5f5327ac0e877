"""packed_attention against its equations: Triton kernel (interpreter and GPU lanes), torch paths, compile, checks."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import assert_close_to_truth
from torch import Tensor

from mmfast_kernels import attention, backends
from mmfast_kernels.attention import (
    packed_attention,
    packed_attention_ref,
    packed_attention_with_lse,
    packed_attention_with_lse_ref,
)

LANES = [
    pytest.param("cpu", marks=pytest.mark.interpret, id="interpret"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]


def packed_qkv(tokens: int, heads: int, d: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """q, k, v as views of one [T, 3, H, d] product, as a model has them."""
    torch.manual_seed(tokens * 1000 + d)
    return torch.randn(tokens, 3, heads, d).to(device, dtype).unbind(1)


def starts(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def assert_like_truth(call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    """call(q, k, v, **options) -> out or (out, lse), against the equations in float64."""
    got = call(q, k, v, **options)
    truth = packed_attention_with_lse_ref(q.double(), k.double(), v.double(), **options)
    plain = packed_attention_with_lse_ref(q, k, v, **options, dtype=q.dtype)
    got = got if isinstance(got, tuple) else (got,)
    for name, mine, theirs, exact in zip(("out", "lse"), got, plain, truth, strict=False):
        finite = exact.isfinite()
        assert torch.equal(mine.isfinite(), finite), f"{name}: infinite elsewhere than the truth"
        assert_close_to_truth(name, mine[finite], theirs[finite], exact[finite])


def plain_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence, one head, no helper of the package."""
    return (q @ k.T / math.sqrt(q.shape[1])).softmax(-1) @ v


# -- the specification --


def test_ref_is_softmax_attention_of_each_sequence() -> None:
    q, k, v = packed_qkv(12, 2, 8, torch.float64)
    out = packed_attention_ref(q, k, v, cu_seqlens=starts([5, 7]), max_length=7)
    for rows in (slice(0, 5), slice(5, 12)):
        for head in range(2):
            expected = plain_softmax(q[rows, head], k[rows, head], v[rows, head])
            torch.testing.assert_close(out[rows, head], expected)


def test_ref_causal_is_aligned_to_the_last_key() -> None:
    q, k, v = packed_qkv(5, 1, 8, torch.float64)
    out = packed_attention_ref(q[:2], k, v, length=2, length_k=5, causal=True)
    for i, visible in ((0, 4), (1, 5)):
        torch.testing.assert_close(out[i : i + 1, 0], plain_softmax(q[i : i + 1, 0], k[:visible, 0], v[:visible, 0]))


def test_lse_is_the_natural_log() -> None:
    q, k, v = packed_qkv(6, 1, 8, torch.float64)
    _, lse = packed_attention_with_lse_ref(q, k, v, length=6, scale=0.3)
    torch.testing.assert_close(lse[0], (0.3 * q[:, 0] @ k[:, 0].T).exp().sum(1).log())


# -- the Triton kernel --


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("n", "sequences", "d"),
    [(1, 3, 64), (7, 2, 64), (16, 1, 32), (17, 2, 80), (128, 1, 64), (129, 2, 64), (144, 1, 128), (150, 1, 80)],
    ids=lambda value: str(value),
)
def test_kernel_on_equal_lengths(n: int, sequences: int, d: int, dtype: torch.dtype, device: str) -> None:
    q, k, v = packed_qkv(n * sequences, 2, d, dtype, device)
    assert_like_truth(packed_attention_with_lse, q, k, v, length=n)
    assert_like_truth(lambda *a, **o: packed_attention(*a, **o, backend="triton"), q, k, v, length=n)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("d", [32, 64, 80, 128])
def test_kernel_on_mixed_lengths_reads_no_other_row(d: int, causal: bool, device: str) -> None:
    """Behind the last sequence, and in the other two thirds of every row, lie NaNs."""
    lengths = [1, 0, 150, 17, 128]
    used = sum(lengths)
    rows = torch.full((used + 70, 3, 1, d), float("nan"))
    rows[:used] = torch.randn(used, 3, 1, d)
    q, k, v = rows.to(device, torch.float16).unbind(1)
    options: dict[str, Any] = dict(cu_seqlens=starts(lengths, device), max_length=150, causal=causal)
    got, lse = packed_attention_with_lse(q, k, v, **options)
    assert_like_truth(lambda *a, **o: (got[:used], lse[:, :used]), q[:used], k[:used], v[:used], **options)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize(("n_q", "n_k"), [(17, 150), (150, 17), (129, 16), (1, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_kernel_on_keys_of_another_length(n_q: int, n_k: int, causal: bool, device: str) -> None:
    q = packed_qkv(2 * n_q, 1, 64, torch.float32, device)[0]
    _, k, v = packed_qkv(2 * n_k, 1, 64, torch.float32, device)
    assert_like_truth(packed_attention_with_lse, q, k, v, length=n_q, length_k=n_k, causal=causal)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("device", LANES)
def test_kernel_on_mixed_cross_lengths(device: str) -> None:
    q = packed_qkv(24, 2, 32, torch.float32, device)[0]
    _, k, v = packed_qkv(160, 2, 32, torch.float32, device)
    keys = starts([5, 150, 0, 5], device)
    assert_like_truth(packed_attention_with_lse, q, k, v, length=6, cu_seqlens_k=keys, max_length_k=150)


@pytest.mark.parametrize("device", LANES)
def test_kernel_on_large_scores(device: str) -> None:
    """Scores of a few hundred, rising along the keys: exp overflows unless the running maximum is right."""
    q, k, v = packed_qkv(150, 1, 64, torch.float32, device)
    k = k + torch.linspace(0, 40, 150, device=device)[:, None, None] * q.mean(0).sign()
    assert_like_truth(packed_attention_with_lse, q, k, v, length=150, scale=0.5)


@pytest.mark.parametrize("device", LANES)
def test_kernel_on_transposed_heads(device: str) -> None:
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in packed_qkv(40, 3, 64, torch.float32, device))
    assert_like_truth(packed_attention_with_lse, q, k, v, length=20)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("n", "d"), [(77, 64), (160, 64), (392, 64), (392, 80), (784, 128), (1568, 64)], ids=str)
def test_every_backend_on_the_gpu(n: int, d: int, causal: bool, dtype: torch.dtype) -> None:
    q, k, v = packed_qkv(3 * n, 2, d, dtype, "cuda")
    case = backends.Case(q.device, dtype, d, n, n, causal=causal)
    for name in backends.NAMES:
        if backends.refusal(name, case) is None:
            call = lambda *a, _n=name, **o: packed_attention(*a, **o, backend=_n)
            assert_like_truth(call, q, k, v, length=n, causal=causal)
            options: dict[str, Any] = dict(
                cu_seqlens=starts([n, n - 5, n + 5], "cuda"), max_length=n + 5, causal=causal
            )
            if backends.refusal(name, case._replace(dense=False)) is None:
                assert_like_truth(call, q, k, v, **options)


@pytest.mark.gpu
def test_exact_fp32_unless_tf32_is_allowed() -> None:
    q, k, v = packed_qkv(300, 2, 64, torch.float32, "cuda")
    truth = packed_attention_ref(q.double(), k.double(), v.double(), length=150)
    errors = []
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            errors.append((packed_attention(q, k, v, length=150, backend="triton") - truth).abs().max())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert errors[0] < 1e-5 < errors[1] < 1e-2


@pytest.mark.gpu
def test_gpu_launch_waits_for_no_device() -> None:
    q, k, v = packed_qkv(300, 2, 64, torch.float16, "cuda")
    options: dict[str, Any] = dict(cu_seqlens=starts([150, 150], "cuda"), max_length=150)
    expected = packed_attention(q, k, v, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = packed_attention(q, k, v, **options)
        graded = packed_attention(q.clone().requires_grad_(), k, v, **options).detach()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, expected)
    assert_like_truth(lambda *a, **o: graded, q, k, v, **options)


# -- torch paths: the CPU and training --


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(length=30),
        dict(length=30, causal=True),
        dict(cu_seqlens=starts([20, 20, 0, 7, 13]), max_length=20),
        dict(cu_seqlens=starts([20, 20, 0, 7, 13]), max_length=20, causal=True),
    ],
    ids=["dense", "dense causal", "mixed", "mixed causal"],
)
def test_torch_path(options: dict[str, Any], dtype: torch.dtype) -> None:
    q, k, v = packed_qkv(60, 2, 24, dtype)
    assert_like_truth(lambda *a, **o: packed_attention(*a, **o, backend="torch"), q, k, v, **options)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "options",
    [
        dict(length=6, length_k=9),
        dict(length=9, length_k=6),
        dict(length=9, length_k=0),
        dict(cu_seqlens=starts([6, 3, 9]), max_length=9, cu_seqlens_k=starts([2, 7, 0]), max_length_k=7),
        dict(length=6, cu_seqlens_k=starts([2, 7, 0]), max_length_k=7),
    ],
    ids=["more keys", "fewer keys", "no keys", "mixed", "dense queries, mixed keys"],
)
def test_torch_path_on_keys_of_another_length(options: dict[str, Any], causal: bool) -> None:
    q, k, v = packed_qkv(27, 2, 16, torch.float32)
    q = q[:18]
    keys = 18 // options["length"] * options["length_k"] if "length_k" in options else 9
    k, v = k[:keys], v[:keys]
    assert_like_truth(
        lambda *a, **o: packed_attention(*a, **o, backend="torch"), q, k, v, causal=causal, **options
    )  # fmt: skip


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("path", [backends._runs, backends._padded], ids=["runs", "padded"])
def test_gradients_of_mixed_lengths(path: Callable[..., Tensor], causal: bool) -> None:
    q, k, v = (x.detach().clone().requires_grad_() for x in packed_qkv(20, 2, 8, torch.float64))
    at = backends.Lengths(starts([8, 0, 5, 7]), starts([3, 4, 0, 13]), 8, 13)
    expected, _ = attention._by_the_equations(q, k, v, at, causal, 0.4)
    got = path(q, k, v, at, causal, 0.4)
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(got)
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for mine, wanted in zip(torch.autograd.grad((got * weights).sum(), (q, k, v)), theirs, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_dense_cpu_path_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA gets views of the packed product, and its own output is handed out."""
    q, k, v = packed_qkv(60, 2, 16, torch.float32)
    seen: list[Tensor] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(*tensors: Any, **options: Any) -> Tensor:
        seen.extend((*tensors, sdpa(*tensors, **options)))
        return seen[-1]

    monkeypatch.setattr(backends.F, "scaled_dot_product_attention", spy)
    out = packed_attention(q, k, v, length=30, backend="torch")
    seen_storages = [x.untyped_storage().data_ptr() for x in seen]
    assert seen_storages[:3] == [q.untyped_storage().data_ptr()] * 3
    assert out.untyped_storage().data_ptr() == seen_storages[3]
    assert out.is_contiguous()


def test_zero_tokens() -> None:
    q, k, v = packed_qkv(0, 2, 64, torch.float32)
    assert packed_attention(q, k, v, length=0).shape == (0, 2, 64)
    assert packed_attention(q, k, v, cu_seqlens=starts([]), max_length=0).shape == (0, 2, 64)
    assert packed_attention(q.clone().requires_grad_(), k, v, length=4).requires_grad


# -- registration and torch.compile --


@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "with lse"])
@pytest.mark.parametrize("lane", [pytest.param("interpret", marks=pytest.mark.interpret), "plain"])
def test_opcheck(lane: str, with_lse: bool) -> None:
    q, k, v = packed_qkv(18, 1, 32, torch.float32)
    cu = starts([7, 11])
    torch.library.opcheck(attention._op, (q, k, v, cu, cu, 11, 11, False, 0.2, with_lse, ""))
    torch.library.opcheck(attention._op, (q, k, v, None, None, 9, 9, True, 0.2, with_lse, ""))


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize(
    "options",
    [dict(length=9), dict(cu_seqlens=starts([7, 0, 11]), max_length=11, causal=True)],
    ids=["dense", "mixed"],
)
def test_compiles_in_one_graph(options: dict[str, Any], grad: bool) -> None:
    q, k, v = (x.detach().clone().requires_grad_(grad) for x in packed_qkv(18, 2, 16, torch.float32))
    compiled = torch.compile(packed_attention, fullgraph=True, backend="aot_eager")
    got, expected = compiled(q, k, v, **options), packed_attention_ref(q, k, v, **options)
    torch.testing.assert_close(got, expected)
    if grad:
        mine = torch.autograd.grad(got.square().sum(), (q, k, v))
        torch.testing.assert_close(mine, torch.autograd.grad(expected.square().sum(), (q, k, v)))


# -- refusals of wrong input --


def _wrong(name: str) -> tuple[type[Exception], dict[str, Any]]:
    q, k, v = packed_qkv(12, 2, 16, torch.float32)
    cu = starts([5, 7])
    cases: dict[str, tuple[type[Exception], dict[str, Any]]] = {
        "q": (ValueError, dict(q=q[0], length=6)),
        "k": (ValueError, dict(k=k[:, :1], length=6)),
        "v": (TypeError, dict(v=v.half(), length=6)),
        "v must have k's shape": (ValueError, dict(v=v[:6], length=6)),
        "q must be floating": (TypeError, dict(q=q.int(), k=k.int(), v=v.int(), length=6)),
        "contiguous last dim": (ValueError, dict(q=q.transpose(1, 2).contiguous().transpose(1, 2), length=6)),
        "length must": (ValueError, dict(length=5)),
        "length or cu_seqlens": (ValueError, dict()),
        "length_k must divide keys": (ValueError, dict(length=6, length_k=4)),
        "length_k or cu_seqlens_k": (ValueError, dict(k=k[:6], v=v[:6], length=6)),
        "cu_seqlens must be int32": (TypeError, dict(cu_seqlens=cu.long(), max_length=7)),
        "cu_seqlens must be contiguous": (ValueError, dict(cu_seqlens=cu[None], max_length=7)),
        "cu_seqlens_k": (ValueError, dict(length=6, cu_seqlens_k=starts([4, 4, 4]), max_length_k=4)),
        "max_length": (ValueError, dict(cu_seqlens=cu)),
        "scale": (ValueError, dict(length=6, scale=-1.0)),
        "backend": (ValueError, dict(length=6, backend="magic")),
    }
    error, options = cases[name]
    return error, dict(q=q, k=k, v=v) | options


@pytest.mark.parametrize(
    "name",
    [
        "q", "k", "v", "v must have k's shape", "q must be floating", "contiguous last dim", "length must",
        "length or cu_seqlens", "length_k must divide keys", "length_k or cu_seqlens_k", "cu_seqlens must be int32",
        "cu_seqlens must be contiguous", "cu_seqlens_k", "max_length", "scale", "backend",
    ],
)  # fmt: skip
def test_wrong_input_is_named(name: str) -> None:
    error, options = _wrong(name)
    with pytest.raises(error, match=name):
        packed_attention(**options)
