"""Gradients of packed attention: Triton kernels (interpreter and GPU lanes), the C++ routine, torch's autograd."""

from collections.abc import Callable, Sequence
from itertools import accumulate
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
    packed_self_attention,
)
from mmfast_kernels.dispatch import INTERPRET

TRITON = [
    pytest.param("cpu", marks=pytest.mark.interpret, id="interpret"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]
# The same tests where the C++ routine computes, and where Triton does.
OURS = [TRITON[0] if INTERPRET else pytest.param("cpu", id="plain"), *TRITON[1:]]
ODD = [5, 1, 0, 37, 70]


def packed(tokens: int, heads: int, d: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    torch.manual_seed(tokens * 1000 + d)
    return torch.randn(tokens, 3, heads, d).to(device, dtype)


def starts(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


def mixed(lengths: Sequence[int], device: str = "cpu") -> dict[str, Any]:
    return dict(cu_seqlens=starts(lengths, device), max_length=max(lengths))


def gradients(
    call: Callable[..., Any], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], **options: Any
) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    got = call(*leaves, **options)
    return torch.autograd.grad(got if isinstance(got, tuple) else (got,), leaves, cotangents)


def by_equations(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return packed_attention_with_lse_ref(q, k, v, **options, dtype=q.dtype)


def assert_gradients(
    call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, with_lse: bool = False, **options: Any
) -> None:
    """call(q, k, v, **options) -> out or (out, lse), its gradients against autograd of the equations in float64."""
    dout = torch.randn(q.shape, device=q.device).to(q.dtype)
    dlse = torch.randn(q.shape[1], q.shape[0], device=q.device)
    mine = gradients(call, (q, k, v), (dout, dlse) if with_lse else (dout,), **options)

    def reference(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse = by_equations(*leaves, **options)
        seen = lse.isfinite()  # of the others the equations' own gradient is NaN
        loss = (out * dout.to(dtype)).sum()
        loss = loss + (lse[seen] * dlse[seen].to(lse.dtype)).sum() if with_lse else loss
        return torch.autograd.grad(loss, leaves)

    for name, got, plain, truth in zip(
        ("dq", "dk", "dv"), mine, reference(q.dtype), reference(torch.float64), strict=True
    ):
        assert got.dtype == q.dtype
        assert_close_to_truth(name, got, plain, truth)


def by(backend: str) -> Callable[..., Tensor]:
    return lambda *tensors, **options: packed_attention(*tensors, **options, backend=backend)


# -- the Triton kernels --


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("device", TRITON)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("d", [32, 64, 80, 128])
def test_kernels_on_mixed_lengths(d: int, dtype: torch.dtype, causal: bool, device: str) -> None:
    q, k, v = packed(sum(ODD), 2 if d < 128 else 1, d, dtype, device).unbind(1)
    assert_gradients(by("triton"), q, k, v, **mixed(ODD, device), causal=causal)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("device", TRITON)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("n", [1, 8, 64, 72, 129])
def test_kernels_on_equal_lengths(n: int, causal: bool, device: str) -> None:
    q, k, v = packed(2 * n, 1, 64, torch.float32, device).unbind(1)
    assert_gradients(by("triton"), q, k, v, length=n, causal=causal, scale=0.3)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("device", OURS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("n_q", "n_k"), [(17, 80), (80, 17), (70, 64), (3, 0), (1, 70)], ids=str)
def test_keys_of_another_length(n_q: int, n_k: int, causal: bool, device: str) -> None:
    """Queries that see no key have no gradient, and give none."""
    q = packed(2 * n_q, 1, 32, torch.float32, device)[:, 0]
    _, k, v = packed(2 * n_k, 1, 32, torch.float32, device).unbind(1)
    call = by("triton") if INTERPRET or device == "cuda" else by("cpp")
    assert_gradients(call, q, k, v, length=n_q, length_k=n_k, causal=causal)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("device", OURS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_mixed_cross_lengths(causal: bool, device: str) -> None:
    queries, keys = [6, 0, 70, 2], [75, 3, 9, 0]
    q = packed(sum(queries), 2, 32, torch.float32, device)[:, 0]
    _, k, v = packed(sum(keys), 2, 32, torch.float32, device).unbind(1)
    options = dict(cu_seqlens_k=starts(keys, device), max_length_k=max(keys), causal=causal)
    assert_gradients(packed_attention, q, k, v, **mixed(queries, device), **options)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("device", OURS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [ODD, [0, 0], [3]], ids=str)
def test_rows_behind_the_last_sequence_get_zero(lengths: list[int], causal: bool, device: str) -> None:
    """NaNs lie there, in the inputs and in the cotangent, and in the other thirds of every row."""
    used, behind = sum(lengths), 150
    rows = torch.full((used + behind, 5, 2, 80), float("nan"), device=device)
    rows[:used, ::2] = packed(used, 2, 80, torch.float32, device)
    dout = torch.full((used + behind, 2, 80), float("nan"), device=device)
    dout[:used] = torch.randn(used, 2, 80, device=device)
    options = mixed(lengths, device) | dict(causal=causal)
    (mine,) = gradients(packed_self_attention, (rows[:, ::2],), (dout,), **options)
    assert torch.equal(mine[used:], torch.zeros_like(mine[used:]))
    live = rows[:used, ::2].unbind(1)
    truth = gradients(packed_attention_ref, [x.double() for x in live], (dout[:used].double(),), **options)
    plain = gradients(packed_attention_ref, live, (dout[:used],), **options)
    for i, name in enumerate(("dq", "dk", "dv")):
        assert_close_to_truth(name, mine[:used, i], plain[i], truth[i])


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("device", OURS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gradient_of_the_log_sum_exp(causal: bool, device: str) -> None:
    q, k, v = packed(sum(ODD), 2, 64, torch.float32, device).unbind(1)
    assert_gradients(packed_attention_with_lse, q, k, v, with_lse=True, **mixed(ODD, device), causal=causal)


@pytest.mark.parametrize("device", OURS)
def test_gradient_of_the_log_sum_exp_alone(device: str) -> None:
    leaves = [x.detach().requires_grad_() for x in packed(20, 1, 32, torch.float32, device).unbind(1)]
    mine = torch.autograd.grad(packed_attention_with_lse(*leaves, length=10)[1].sum(), leaves, materialize_grads=True)
    theirs = torch.autograd.grad(by_equations(*leaves, length=10)[1].sum(), leaves, materialize_grads=True)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("device", TRITON)
def test_kernels_on_large_scores(device: str) -> None:
    """Scores of a few hundred: a key that is not there would weigh exp(-lse), infinity."""
    q, k, v = packed(70, 1, 64, torch.float32, device).unbind(1)
    k = k - 40 * q.mean(0).sign()
    assert_gradients(by("triton"), q, k, v, length=70, scale=0.5)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("n", "d"), [(77, 64), (160, 64), (392, 64), (392, 80), (784, 64), (784, 128), (1568, 64), (392, 32)], ids=str
)
def test_every_backend_on_the_gpu(n: int, d: int, causal: bool, dtype: torch.dtype) -> None:
    q, k, v = packed(3 * n, 2, d, dtype, "cuda").unbind(1)
    case = backends.Case(q.device, dtype, d, n, n, causal=causal, needs_grad=True)
    for name in backends.NAMES:
        if backends.refusal(name, case) is None:
            assert_gradients(by(name), q, k, v, length=n, causal=causal)
            if backends.refusal(name, case._replace(dense=False)) is None:
                assert_gradients(by(name), q, k, v, **mixed([n, n - 5, n + 5], "cuda"), causal=causal)


@pytest.mark.gpu
def test_gpu_backward_waits_for_no_device() -> None:
    qkv = packed(300, 2, 64, torch.float16, "cuda").requires_grad_()
    out = packed_self_attention(qkv, **mixed([150, 150], "cuda"))
    (expected,) = torch.autograd.grad(out.sum(), qkv, retain_graph=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        (again,) = torch.autograd.grad(out.sum(), qkv)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, expected)


# -- whoever computes --


@pytest.mark.parametrize("device", OURS)
@pytest.mark.parametrize("options", [dict(length=31), mixed([40, 0, 22])], ids=["dense", "mixed"])
def test_packed_product_and_its_parts_are_the_same_bits(options: dict[str, Any], device: str) -> None:
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    qkv = packed(62, 2, 64, torch.float32, device)
    dout = torch.randn(62, 2, 64, device=device)
    assert torch.equal(packed_self_attention(qkv, **options), packed_attention(*qkv.unbind(1), **options))
    (together,) = gradients(packed_self_attention, (qkv,), (dout,), **options)
    assert torch.equal(together, torch.stack(gradients(packed_attention, qkv.unbind(1), (dout,), **options), 1))


@pytest.mark.parametrize("device", OURS)
def test_gradient_of_a_packed_product_is_not_put_together(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    inner = attention._self_backward_op
    monkeypatch.setattr(attention, "_self_backward_op", lambda *a: seen.append(inner(*a)) or seen[-1])
    qkv = packed(62, 2, 64, torch.float32, device).requires_grad_()
    (got,) = torch.autograd.grad(packed_self_attention(qkv, length=31, backend=_ours(device)).sum(), qkv)
    assert got.data_ptr() == seen[0].data_ptr()


def _ours(device: str) -> str:
    return "triton" if INTERPRET or device == "cuda" else "cpp"


@pytest.mark.parametrize("device", OURS)
def test_second_backward_is_the_same_bits(device: str) -> None:
    leaves = [x.detach().clone().requires_grad_() for x in packed(113, 2, 64, torch.float32, device).unbind(1)]
    kept = [x.detach().clone() for x in leaves]
    out = packed_attention(*leaves, **mixed(ODD, device), backend=_ours(device))
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves, dout)
    fresh = packed_attention(*leaves, **mixed(ODD, device), backend=_ours(device))
    for one, two, three in zip(first, second, torch.autograd.grad(fresh, leaves, dout), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert all(torch.equal(x, old) for x, old in zip(leaves, kept, strict=True))


@pytest.mark.parametrize("device", OURS)
@pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced"])
def test_cotangents_of_any_strides(kind: str, device: str) -> None:
    qkv = packed(24, 2, 32, torch.float32, device)
    dout = {
        "expanded": torch.ones(1, 1, 1, device=device).expand(24, 2, 32),
        "transposed": torch.randn(32, 2, 24, device=device).transpose(0, 2),
        "sliced": torch.randn(24, 2, 65, device=device)[..., 1::2],
    }[kind]
    (got,) = gradients(packed_self_attention, (qkv,), (dout,), length=12)
    (expected,) = gradients(packed_self_attention, (qkv,), (dout.contiguous(),), length=12)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("device", OURS)
def test_transposed_heads(device: str) -> None:
    q, k, v = (
        x.transpose(0, 1).contiguous().transpose(0, 1) for x in packed(40, 3, 64, torch.float32, device).unbind(1)
    )
    assert_gradients(by(_ours(device)), q, k, v, length=20)


@pytest.mark.parametrize("device", OURS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_what_is_wanted_has_a_gradient(wanted: tuple[int, ...], device: str) -> None:
    plain = packed(24, 2, 32, torch.float32, device).unbind(1)
    tensors = [x.detach().clone().requires_grad_(i in wanted) for i, x in enumerate(plain)]
    packed_attention(*tensors, length=12).square().sum().backward()
    assert [i for i, x in enumerate(tensors) if x.grad is not None] == list(wanted)
    full = gradients(lambda *a, **o: packed_attention(*a, **o).square().sum(), plain, (None,), length=12)
    assert all(torch.equal(tensors[i].grad, full[i]) for i in wanted)


@pytest.mark.parametrize("device", OURS)
def test_no_tokens(device: str) -> None:
    qkv = packed(0, 2, 64, torch.float32, device)
    for options in (dict(length=4), mixed([0], device), mixed([0, 0], device)):
        (got,) = gradients(packed_self_attention, (qkv,), (torch.zeros(0, 2, 64, device=device),), **options)
        assert got.shape == qkv.shape


def test_gradients_of_gradients_are_refused() -> None:
    qkv = packed(8, 1, 32, torch.float32).requires_grad_()
    (first,) = torch.autograd.grad(packed_self_attention(qkv, length=4).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [24, 64])
def test_the_default_on_the_cpu(d: int, dtype: torch.dtype) -> None:
    """What neither of our routines takes goes to torch."""
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    q, k, v = packed(33, 2, d, dtype).unbind(1)
    assert_gradients(packed_attention, q, k, v, **mixed([20, 0, 13]))
    assert_gradients(packed_attention, q, k, v, length=11, causal=True)


def test_gradcheck_in_double_precision() -> None:
    qkv = packed(7, 1, 3, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: packed_self_attention(x, **mixed([3, 0, 4]), causal=True), (qkv,))


# -- registration and torch.compile --


def test_opcheck() -> None:
    backend = _ours("cpu")
    qkv = packed(18, 1, 32, torch.float32)
    q, k, v = qkv.unbind(1)
    dout = torch.randn(18, 1, 32)
    for cu, n, causal in ((starts([7, 11]), 11, False), (None, 9, True)):
        out, lse = attention._op(q, k, v, cu, cu, n, n, causal, 0.2, True, backend)
        saved = (out, lse)
        torch.library.opcheck(attention._backward_op, (dout, q, k, v, *saved, None, cu, cu, n, n, causal, 0.2, backend))
        torch.library.opcheck(attention._self_backward_op, (dout, qkv, *saved, cu, n, causal, 0.2, backend))


DENSE, MIXED = dict(length=9), mixed([7, 0, 11]) | dict(causal=True)


@pytest.mark.parametrize(
    ("options", "d", "mode"),
    [(DENSE, 32, "aot_eager"), (MIXED, 32, "aot_eager"), (DENSE, 24, "aot_eager"), (DENSE, 32, "inductor")],
    ids=["dense", "mixed", "by torch", "inductor"],
)
def test_compiles_in_one_graph(options: dict[str, Any], d: int, mode: str) -> None:
    qkv = packed(18, 2, d, torch.float32)

    def loss(qkv: Tensor) -> Tensor:
        return packed_self_attention(qkv * 2, **options).square().sum()

    (got,) = gradients(torch.compile(loss, fullgraph=True, backend=mode), (qkv,), (None,))
    torch.testing.assert_close(got, gradients(loss, (qkv,), (None,))[0])


@pytest.mark.parametrize("options", [DENSE, MIXED], ids=["dense", "mixed"])
def test_one_tensor_for_all_three_compiles(options: dict[str, Any]) -> None:
    """torch.compile takes no tensor twice into a Function."""
    (x,) = packed(18, 2, 32, torch.float32).unbind(1)[:1]

    def loss(x: Tensor) -> Tensor:
        return packed_attention(x, x, x, **options).square().sum()

    (got,) = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), (x,), (None,))
    torch.testing.assert_close(got, gradients(loss, (x,), (None,))[0])


def test_log_sum_exp_compiles_in_one_graph() -> None:
    q, k, v = packed(18, 2, 32, torch.float32).unbind(1)

    def loss(*tensors: Tensor) -> Tensor:
        out, lse = packed_attention_with_lse(*tensors, length=9)
        return out.square().sum() + lse.sum()

    got = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), (q, k, v), (None,))
    torch.testing.assert_close(got, gradients(loss, (q, k, v), (None,)))


@pytest.mark.parametrize("shape", [(6, 2, 8), (6, 2, 2, 8)], ids=str)
def test_packed_product_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="qkv must be"):
        packed_self_attention(torch.zeros(shape), length=3)


def test_wrong_backend_of_the_backward_is_refused() -> None:
    x = torch.zeros(4, 1, 32)
    lse = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="backend must be"):
        attention._backward_op(x, x, x, x, x, lse, None, None, None, 4, 4, False, 0.2, "torch")
