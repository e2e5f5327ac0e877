"""The C++ attention of the CPU (csrc/attention.cpp) against its equations, with registers of every width it is built for."""

import itertools
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close_to_truth
from torch import Tensor

from mmfast_kernels import backends
from mmfast_kernels.attention import packed_attention, packed_attention_ref
from mmfast_kernels.backends import Case, Lengths
from mmfast_kernels.native import _C

WIDTHS = [16, 32, 64]  # bytes of a vector register; a processor without the wider ones repeats the test with less
pytestmark = pytest.mark.usefixtures("poisoned_empty")


def qkv(tokens: int, heads: int, d: int) -> tuple[Tensor, ...]:
    """q, k, v as views of one [T, 3, H, d] product, as a model has them."""
    return torch.randn(tokens, 3, heads, d, generator=torch.Generator().manual_seed(tokens + d)).unbind(1)


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32)


def cpp(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return packed_attention(q, k, v, backend="cpp", **options)


def assert_like_truth(got: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    truth = packed_attention_ref(q.double(), k.double(), v.double(), **options)
    assert_close_to_truth("out", got, packed_attention(q, k, v, backend="torch", **options), truth)


@pytest.fixture(params=WIDTHS, ids=lambda width: f"{8 * width} bits")
def registers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes vector registers of this width at most."""
    inner = backends._cpp
    monkeypatch.setattr(backends, "_cpp", lambda *args: inner(*args, widest=request.param))


@pytest.mark.usefixtures("registers")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("d", [16, 32, 64, 80, 112, 128])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 49, 97])
def test_equal_lengths(n: int, d: int, causal: bool) -> None:
    q, k, v = qkv(2 * n, 3, d)
    assert_like_truth(cpp(q, k, v, length=n, causal=causal), q, k, v, length=n, causal=causal)


@pytest.mark.usefixtures("registers")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("n", "d"), [(392, 64), (511, 32), (512, 32), (513, 80), (1569, 32)])
def test_lengths_about_and_beyond_a_block_of_keys(n: int, d: int, causal: bool) -> None:
    q, k, v = qkv(n, 1, d)
    assert_like_truth(cpp(q, k, v, length=n, causal=causal), q, k, v, length=n, causal=causal)


@pytest.mark.usefixtures("registers")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_mixed_lengths_read_no_other_row(causal: bool) -> None:
    """Behind the last sequence, and in the other two thirds of every row, lie NaNs."""
    lengths = [1, 0, 50, 17, 600, 48]
    used = sum(lengths)
    rows = torch.full((used + 20, 5, 2, 48), float("nan"))
    rows[:used, ::2] = torch.randn(used, 3, 2, 48)
    q, k, v = rows[:, ::2].unbind(1)
    options: dict[str, Any] = dict(cu_seqlens=starts(lengths), max_length=600, causal=causal)
    got = cpp(q, k, v, **options)[:used]
    assert_like_truth(got, q[:used], k[:used], v[:used], **options)


@pytest.mark.usefixtures("registers")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("n_q", "n_k"), [(17, 150), (150, 17), (100, 1), (3, 1100), (1100, 600), (5, 0)], ids=str)
def test_keys_of_another_length(n_q: int, n_k: int, causal: bool) -> None:
    """Where keys are fewer and attention is causal, the first queries see none and get 0."""
    q, (_, k, v) = qkv(2 * n_q, 1, 32)[0], qkv(2 * n_k, 1, 32)
    options: dict[str, Any] = dict(length=n_q, length_k=n_k, causal=causal)
    assert_like_truth(cpp(q, k, v, **options), q, k, v, **options)


def test_mixed_cross_lengths() -> None:
    q, (_, k, v) = qkv(24, 2, 32)[0], qkv(760, 2, 32)
    options: dict[str, Any] = dict(length=6, cu_seqlens_k=starts([5, 600, 0, 155]), max_length_k=600)
    assert_like_truth(cpp(q, k, v, **options), q, k, v, **options)


def test_transposed_heads() -> None:
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv(40, 3, 64))
    assert_like_truth(cpp(q, k, v, length=20), q, k, v, length=20)


@pytest.mark.usefixtures("registers")
@pytest.mark.parametrize("rising", [1, -1], ids=["rising", "falling"])
def test_large_scores(rising: int) -> None:
    """Scores of thousands over two blocks of keys: exp overflows, or all vanishes, unless the running maximum is right."""
    q, k, v = qkv(700, 1, 64)
    k = k + rising * torch.linspace(0, 90, 700)[:, None, None] * q.mean(0).sign()
    assert_like_truth(cpp(q, k, v, length=700, scale=2.0), q, k, v, length=700, scale=2.0)


@pytest.mark.usefixtures("registers")
def test_scores_near_the_largest_float() -> None:
    q = torch.full((20, 1, 16), 3e18)
    k = torch.linspace(-1, 1, 20)[:, None, None] * torch.full((20, 1, 16), 7e18)
    v = torch.randn(20, 1, 16)
    torch.testing.assert_close(cpp(q, k, v, length=20), v[-1:].expand(20, 1, 16))


@pytest.mark.usefixtures("registers")
def test_equal_scores_weigh_equally() -> None:
    q = torch.zeros(64, 1, 16)
    v = torch.arange(64.0)[:, None, None].expand(64, 1, 16).contiguous()
    assert torch.equal(cpp(q, q, v, length=64), torch.full((64, 1, 16), 31.5))


@pytest.mark.usefixtures("registers")
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_shows_where_it_is_seen_and_nowhere_else(which: str) -> None:
    q, k, v = (x.clone() for x in qkv(1200, 2, 32))
    {"q": q, "k": k, "v": v}[which][601, 1, 3] = float("nan")
    plain = packed_attention(q, k, v, length=600, causal=True, backend="torch")
    got = cpp(q, k, v, length=600, causal=True)
    assert torch.equal(got.isnan().any(-1), plain.isnan().any(-1))
    assert got.isnan().any()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_values_do_not_depend_on_the_number_of_threads(causal: bool) -> None:
    q, k, v = qkv(700, 2, 32)
    options: dict[str, Any] = dict(cu_seqlens=starts([620, 3, 77]), max_length=620, causal=causal)
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            outs.append(cpp(q, k, v, **options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_callers_on_several_threads() -> None:
    q, k, v = qkv(400, 4, 64)
    expected = cpp(q, k, v, length=200)
    outs: list[Tensor] = []
    callers = [threading.Thread(target=lambda: outs.append(cpp(q, k, v, length=200))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [torch.equal(out, expected) for out in outs] == [True] * 4


def test_runs_without_torch_and_its_threads() -> None:
    """Queries and keys of zeros, on threads of the routine's own."""
    program = (
        "import sys, array; from mmfast_kernels import _C\n"
        "n = 256; at = lambda a: a.buffer_info()[0]\n"
        "zeros, values, out = (array.array('f', [x] * (n * 32)) for x in (0, 3, 9))\n"
        "given = [part for a in (zeros, zeros, values) for part in (at(a), (n, 32, 16))]\n"
        "_C.attention(*given, 0, n, 0, n, 1, 2, 16, False, 1.0, at(out), 4, 64)\n"
        "print('torch' in sys.modules, set(out))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False {3.0}", done.stderr


@pytest.mark.parametrize("wrong", [[0, 7, 5, 12], [-1, 5, 12], [0, 5, 13], [2, 1]], ids=str)
@pytest.mark.parametrize("side", ["cu_seqlens", "cu_seqlens_k"])
def test_bounds_that_do_not_ascend_within_the_tokens_are_refused(side: str, wrong: list[int]) -> None:
    q, k, v = qkv(12, 1, 16)
    cu, right = torch.tensor(wrong, dtype=torch.int32), starts([1] * (len(wrong) - 1))
    both = (cu, right) if side == "cu_seqlens" else (right, cu)
    options: dict[str, Any] = dict(cu_seqlens=both[0], max_length=12, cu_seqlens_k=both[1], max_length_k=12)
    with pytest.raises(ValueError, match=rf"{side} must ascend within 0..12"):
        cpp(q, k, v, **options)


def test_the_routine_itself_refuses_a_width() -> None:
    q, k, v = qkv(4, 1, 24)
    with pytest.raises(ValueError, match="d must be 16, 32"):
        backends._cpp(q, k, v, Lengths(None, None, 4, 4), False, 1.0)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    sixteenths=st.integers(1, 8),
    causal=st.booleans(),
    widest=st.sampled_from(WIDTHS),
)
def test_any_shape(lengths: list[tuple[int, int]], heads: int, sixteenths: int, causal: bool, widest: int) -> None:
    n_q, n_k = ([pair[side] for pair in lengths] for side in (0, 1))
    q, (_, k, v) = qkv(sum(n_q), heads, 16 * sixteenths)[0], qkv(sum(n_k), heads, 16 * sixteenths)
    options: dict[str, Any] = dict(
        cu_seqlens=starts(n_q), max_length=70, cu_seqlens_k=starts(n_k), max_length_k=70, causal=causal
    )
    at = Lengths(starts(n_q), starts(n_k), 70, 70)
    assert_like_truth(backends._cpp(q, k, v, at, causal, q.shape[2] ** -0.5, widest), q, k, v, **options)


# -- when it is taken --


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cuda", 0)}, "CPU"),
        ({"dtype": torch.bfloat16}, "float32"),
        ({"d": 24}, "steps of 16"),
        ({"d": 144}, "up to 128"),
        ({"needs_grad": True}, "forward only"),
        ({"with_lse": True}, "log-sum-exp"),
    ],
    ids=str,
)
def test_refusal_gives_the_reason(changes: dict[str, Any], reason: str) -> None:
    refused = backends.refusal("cpp", Case(torch.device("cpu"), torch.float32, 64, 392, 392)._replace(**changes))
    assert refused is not None
    assert reason in refused


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call of the routine."""
    seen: list[int] = []
    inner = _C.attention
    monkeypatch.setattr(backends._C, "attention", lambda *args: (seen.append(1), inner(*args))[1])
    return seen


@pytest.mark.skipif(backends.INTERPRET, reason="under TRITON_INTERPRET=1 the Triton kernel is taken")
@pytest.mark.parametrize(
    "options", [dict(length=6), dict(cu_seqlens=starts([5, 7]), max_length=7)], ids=["dense", "mixed"]
)
def test_taken_unless_torch_is_forced_or_a_gradient_is_wanted(
    options: dict[str, Any], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = qkv(12, 2, 16)
    packed_attention(q, k, v, **options)
    assert len(calls) == 1
    packed_attention(q.clone().requires_grad_(), k, v, **options)
    packed_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options)
    monkeypatch.setenv("MMFAST_ATTENTION", "torch")
    packed_attention(q, k, v, **options)
    assert len(calls) == 1


def test_a_traced_dense_call_holds_torch_s_own_operator(calls: list[int]) -> None:
    q, k, v = qkv(12, 2, 16)
    compiled = torch.compile(packed_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, length=6), packed_attention_ref(q, k, v, length=6))
    assert calls == [] or backends.INTERPRET


def test_a_traced_call_that_names_it_gets_it(calls: list[int]) -> None:
    q, k, v = qkv(12, 2, 16)
    compiled = torch.compile(packed_attention, fullgraph=True, backend="aot_eager")
    got = compiled(q, k, v, length=6, backend="cpp")
    torch.testing.assert_close(got, packed_attention_ref(q, k, v, length=6))
    assert calls == [1]
