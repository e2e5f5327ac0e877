"""The C++ attention of the CPU (csrc/attention*.cpp) against its equations, with registers of every width it is built for.

Each gradient comes into one [T, 3, H, d] full of NaNs, as views; its truth is autograd's, of the reference in float64.
"""

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

from mmfast_kernels import attention_cpp, backends
from mmfast_kernels.attention import packed_attention, packed_attention_ref, packed_attention_with_lse_ref
from mmfast_kernels.attention_check import check
from mmfast_kernels.backends import Case, Lengths
from mmfast_kernels.native import _C

WIDTHS = [16, 32, 64]  # bytes of a vector register; a processor without the wider ones repeats the test with less
pytestmark = pytest.mark.usefixtures("poisoned_empty")


def qkv(tokens: int, heads: int, d: int) -> tuple[Tensor, ...]:
    """q, k, v as views of one [T, 3, H, d] product, as a model has them."""
    return torch.randn(tokens, 3, heads, d, generator=torch.Generator().manual_seed(tokens + d)).unbind(1)


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32)


def job(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Lengths, bool, float]:
    names = ("cu_seqlens", "length", "max_length", "cu_seqlens_k", "length_k", "max_length_k")
    at = check(q, k, v, *(options.get(name) for name in names))
    return at, options.get("causal", False), options.get("scale", q.shape[2] ** -0.5)


def cpp(q: Tensor, k: Tensor, v: Tensor, widest: int = 64, **options: Any) -> Tensor:
    return attention_cpp.forward(q, k, v, *job(q, k, v, options), widest=widest)[0]


def cpp_with_gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, widest: int = 64, **options: Any
) -> dict[str, Tensor]:
    out, lse = attention_cpp.forward(q, k, v, *job(q, k, v, options), with_lse=True, widest=widest)
    grads = torch.full((max(q.shape[0], k.shape[0]), 3, *q.shape[1:]), float("nan"))
    dq, dk, dv = (grad[: x.shape[0]] for grad, x in zip(grads.unbind(1), (q, k, v), strict=True))
    attention_cpp.backward(dout, q, k, v, out, lse, *job(q, k, v, options), dq, dk, dv, widest=widest)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def plain_with_gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **options: Any) -> dict[str, Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = packed_attention_with_lse_ref(*leaves, **options)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def assert_like_truth(q: Tensor, k: Tensor, v: Tensor, widest: int = 64, **options: Any) -> None:
    """out and lse of the sequences, and all rows of the gradients."""
    cu = options.get("cu_seqlens")
    used = q.shape[0] if cu is None else int(cu[-1])
    dout = torch.full(q.shape, float("nan"))
    dout[:used] = torch.randn(used, *q.shape[1:], generator=torch.Generator().manual_seed(used))
    got = cpp_with_gradients(q, k, v, dout, widest, **options)
    plain = plain_with_gradients(q, k, v, dout, **options)
    truth = plain_with_gradients(q.double(), k.double(), v.double(), dout.double(), **options)
    blind = truth["lse"].isneginf()
    assert torch.equal(got["lse"].isneginf()[:, :used], blind[:, :used])
    for results in (got, plain, truth):
        results["out"], results["lse"] = results["out"][:used], results["lse"].masked_fill(blind, 0.0)[:, :used]
    for name in got:
        assert_close_to_truth(name, got[name], plain[name], truth[name])


@pytest.fixture(params=WIDTHS, ids=lambda width: f"{8 * width} bits")
def widest(request: pytest.FixtureRequest) -> int:
    """The most bytes a vector register may have."""
    return int(request.param)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("d", [16, 32, 64, 80, 112, 128])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 49, 97])
def test_equal_lengths(widest: int, n: int, d: int, causal: bool) -> None:
    q, k, v = qkv(2 * n, 3, d)
    assert_like_truth(q, k, v, widest, length=n, causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("n", "d"), [(392, 64), (511, 32), (512, 32), (513, 80), (1569, 32)])
def test_lengths_about_and_beyond_a_block_of_keys(widest: int, n: int, d: int, causal: bool) -> None:
    q, k, v = qkv(n, 1, d)
    assert_like_truth(q, k, v, widest, length=n, causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_mixed_lengths_read_no_other_row(widest: int, causal: bool) -> None:
    """Behind the last sequence, and between q, k and v, lie NaNs; the gradients behind the last sequence are 0."""
    lengths = [1, 0, 50, 17, 600, 48]
    used = sum(lengths)
    rows = torch.full((used + 20, 5, 2, 48), float("nan"))
    rows[:used, ::2] = torch.randn(used, 3, 2, 48)
    q, k, v = rows[:, ::2].unbind(1)
    options: dict[str, Any] = dict(cu_seqlens=starts(lengths), max_length=600, causal=causal)
    assert_like_truth(q, k, v, widest, **options)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("n_q", "n_k"), [(17, 150), (150, 17), (100, 1), (3, 1100), (1100, 600), (5, 0)], ids=str)
def test_keys_of_another_length(widest: int, n_q: int, n_k: int, causal: bool) -> None:
    """Where keys are fewer and attention is causal, the first queries see none and get 0."""
    q, (_, k, v) = qkv(2 * n_q, 1, 32)[0], qkv(2 * n_k, 1, 32)
    options: dict[str, Any] = dict(length=n_q, length_k=n_k, causal=causal)
    assert_like_truth(q, k, v, widest, **options)


def test_keys_without_any_query_get_0() -> None:
    q, (_, k, v) = torch.empty(0, 2, 32), qkv(7, 2, 32)
    got = cpp_with_gradients(q, k, v, q, length=0, length_k=7)
    assert torch.equal(got["dk"], torch.zeros(7, 2, 32))
    assert torch.equal(got["dv"], torch.zeros(7, 2, 32))


def test_mixed_cross_lengths() -> None:
    q, (_, k, v) = qkv(24, 2, 32)[0], qkv(760, 2, 32)
    options: dict[str, Any] = dict(length=6, cu_seqlens_k=starts([5, 600, 0, 155]), max_length_k=600)
    assert_like_truth(q, k, v, **options)


def test_transposed_heads() -> None:
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv(40, 3, 64))
    assert_like_truth(q, k, v, length=20)


@pytest.mark.parametrize("rising", [1, -1], ids=["rising", "falling"])
def test_large_scores(widest: int, rising: int) -> None:
    """Scores of thousands over two blocks of keys: exp overflows, or all vanishes, unless the running maximum is right."""
    q, k, v = qkv(700, 1, 64)
    k = k + rising * torch.linspace(0, 90, 700)[:, None, None] * q.mean(0).sign()
    assert_like_truth(q, k, v, widest, length=700, scale=2.0)


def test_scores_near_the_largest_float(widest: int) -> None:
    q = torch.full((20, 1, 16), 3e18)
    k = torch.linspace(-1, 1, 20)[:, None, None] * torch.full((20, 1, 16), 7e18)
    v = torch.randn(20, 1, 16)
    torch.testing.assert_close(cpp(q, k, v, widest, length=20), v[-1:].expand(20, 1, 16))


def test_equal_scores_weigh_equally(widest: int) -> None:
    q = torch.zeros(64, 1, 16)
    v = torch.arange(64.0)[:, None, None].expand(64, 1, 16).contiguous()
    assert torch.equal(cpp(q, q, v, widest, length=64), torch.full((64, 1, 16), 31.5))


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_shows_where_it_is_seen_and_nowhere_else(widest: int, which: str) -> None:
    q, k, v = (x.clone() for x in qkv(1200, 2, 32))
    {"q": q, "k": k, "v": v}[which][601, 1, 3] = float("nan")
    plain = packed_attention(q, k, v, length=600, causal=True, backend="torch")
    got = cpp(q, k, v, widest, length=600, causal=True)
    assert torch.equal(got.isnan().any(-1), plain.isnan().any(-1))
    assert got.isnan().any()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_values_do_not_depend_on_the_number_of_threads(causal: bool) -> None:
    q, k, v = qkv(700, 2, 32)
    options: dict[str, Any] = dict(cu_seqlens=starts([620, 3, 77]), max_length=620, causal=causal)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3, 8):  # one thread takes whole heads, more of them blocks of keys
            torch.set_num_threads(threads)
            runs.append(cpp_with_gradients(q, k, v, q * v, **options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in runs[0])


def test_callers_on_several_threads() -> None:
    q, k, v = qkv(400, 4, 64)
    expected = cpp_with_gradients(q, k, v, q * v, length=200)
    runs: list[dict[str, Tensor]] = []
    callers = [
        threading.Thread(target=lambda: runs.append(cpp_with_gradients(q, k, v, q * v, length=200))) for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [torch.equal(run[name], expected[name]) for run in runs for name in expected] == [True] * 20


def test_runs_without_torch_and_its_threads() -> None:
    """Queries and keys of zeros, on threads of the routine's own."""
    program = (
        "import sys, array; from mmfast_kernels import _C\n"
        "n = 256; at = lambda a: a.buffer_info()[0]\n"
        "zeros, values, out = (array.array('f', [x] * (n * 32)) for x in (0, 3, 9))\n"
        "given = [part for a in (zeros, zeros, values) for part in (at(a), (n, 32, 16))]\n"
        "_C.attention(*given, 0, n, 0, n, 1, 2, 16, False, 1.0, at(out), 0, 4, 64)\n"
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
    with pytest.raises(ValueError, match=rf"{side} must ascend within 0..12"):
        attention_cpp.backward(q, q, k, v, q, q, *job(q, k, v, options), q, k, v)


def test_the_routine_itself_refuses_a_width() -> None:
    q, k, v = qkv(4, 1, 24)
    with pytest.raises(ValueError, match="d must be 16, 32"):
        cpp(q, k, v, length=4)


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
    assert_like_truth(q, k, v, widest, **options)


# -- when it is taken --


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cuda", 0)}, "CPU"),
        ({"dtype": torch.bfloat16}, "float32"),
        ({"d": 24}, "steps of 16"),
        ({"d": 144}, "up to 128"),
        ({"needs_grad": True, "with_lse": True}, "log-sum-exp"),
    ],
    ids=str,
)
def test_refusal_gives_the_reason(changes: dict[str, Any], reason: str) -> None:
    refused = backends.refusal("cpp", Case(torch.device("cpu"), torch.float32, 64, 392, 392)._replace(**changes))
    assert refused is not None
    assert reason in refused


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call of the forward."""
    seen: list[int] = []
    inner = _C.attention
    monkeypatch.setattr(_C, "attention", lambda *args: (seen.append(1), inner(*args))[1])
    return seen


@pytest.mark.skipif(backends.INTERPRET, reason="under TRITON_INTERPRET=1 the Triton kernel is taken")
@pytest.mark.parametrize(
    "options", [dict(length=6), dict(cu_seqlens=starts([5, 7]), max_length=7)], ids=["dense", "mixed"]
)
def test_taken_for_float32_unless_torch_is_forced(
    options: dict[str, Any], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = qkv(12, 2, 16)
    packed_attention(q, k, v, **options)
    assert len(calls) == 1
    packed_attention(q.clone().requires_grad_(), k, v, **options).sum().backward()
    assert len(calls) == 2
    packed_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options)
    monkeypatch.setenv("MMFAST_ATTENTION", "torch")
    packed_attention(q, k, v, **options)
    assert len(calls) == 2


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
