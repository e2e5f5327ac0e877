"""linear on the CPU: oneDNN's products, forward and backward, against float64."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_truth
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from mmfast_kernels.linear import linear, linear_erf_gelu, onednn_takes

SHAPES = [(1, 8, 24), (37, 40, 70), (33, 65, 16), (48, 16, 16)]  # rows, K, N: one row; N over and under K; whole blocks
onednn = pytest.mark.skipif(not onednn_takes(torch.ones(1, 1)), reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfast_kernels.linear.ROWS", 16)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(m: int, k: int, n: int) -> list[Tensor]:
    return [randn(m, k), randn(n, k), randn(n)]


def gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor | None], cotangent: Tensor) -> list[Tensor]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    return list(torch.autograd.grad(function(*leaves), [t for t in leaves if t is not None], cotangent))


def check(tensors: Sequence[Tensor | None], cotangent: Tensor) -> None:
    got, plain = gradients(linear, tensors, cotangent), gradients(F.linear, tensors, cotangent)
    wide = [None if t is None else t.double() for t in tensors]
    truth = gradients(F.linear, wide, cotangent.double())
    for name, g, p, t in zip(("x", "weight", "bias"), got, plain, truth, strict=False):
        assert_close_to_truth(f"d{name}", g, p, t)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients(shape: tuple[int, int, int], with_bias: bool, poisoned_empty: None) -> None:
    x, weight, bias = inputs(*shape)
    check([x, weight, bias if with_bias else None], randn(shape[0], shape[2], seed=1))


@pytest.mark.parametrize(
    "cotangent",
    [torch.ones(()).expand(3, 7, 20), randn(20, 7, 3).permute(2, 1, 0), randn(3, 7, 40)[..., ::2]],
    ids=["expanded", "permuted", "strided"],
)
def test_layouts(cotangent: Tensor) -> None:
    """Strided x [3, 7, K], weight and bias."""
    check([randn(6, 7, 48)[::2, :, 5:21], randn(20, 40)[:, 3:35:2], randn(40)[::2]], cotangent)
    check([randn(7, 16, 3).permute(2, 0, 1), randn(16, 20).t(), None], cotangent)


def test_one_dimension() -> None:
    check([randn(16), randn(20, 16), randn(20)], randn(20, seed=1))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_cost_nothing(frozen: int) -> None:
    tensors, cotangent = inputs(20, 8, 24), randn(20, 24, seed=1)
    want = gradients(linear, tensors, cotangent)
    leaves = [t.requires_grad_(i != frozen) for i, t in enumerate(tensors)]
    linear(*leaves).backward(cotangent)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) if i == frozen else torch.equal(leaf.grad, want[i])


@onednn
@pytest.mark.parametrize("frozen", [0, 1], ids=["x", "weight"])
def test_what_no_gradient_needs_is_not_kept(frozen: int) -> None:
    """Where biases alone are trained, the layers' inputs would be most of the memory."""
    leaves = [t.requires_grad_(i != frozen) for i, t in enumerate(inputs(20, 8, 24))]
    kept: list[int] = []
    with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        linear(*leaves)
    assert kept == [leaves[frozen].data_ptr()]


@pytest.mark.parametrize("shape", [(0, 8, 24), (5, 8, 0)], ids=str)
def test_no_rows_or_columns(shape: tuple[int, int, int]) -> None:
    for grad in gradients(linear, inputs(*shape), randn(shape[0], shape[2])):
        assert not grad.any()


@onednn
def test_a_gradient_stays_with_onednn() -> None:
    leaves = [t.requires_grad_() for t in inputs(20, 8, 24)]
    assert type(linear(*leaves).grad_fn.next_functions[0][0]).__name__ == "_LinearBackward"


def test_again_gives_the_same_bits() -> None:
    leaves = [t.requires_grad_() for t in inputs(37, 40, 70)]
    y, cotangent = linear(*leaves), randn(37, 70, seed=2)
    first = torch.autograd.grad(y, leaves, cotangent, retain_graph=True)
    for again in (y, linear(*leaves)):
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(again, leaves, cotangent), strict=True))


def test_second_derivatives() -> None:
    def penalty(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        grads = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), leaves)

    tensors = inputs(20, 8, 24)
    got, plain = penalty(linear, tensors), penalty(F.linear, tensors)
    for name, g, p, t in zip("xwb", got, plain, penalty(F.linear, [t.double() for t in tensors]), strict=True):
        assert_close_to_truth(f"second derivative {name}", g, p, t)


@pytest.mark.parametrize("op", [linear, linear_erf_gelu])
def test_torch_func(op: Callable[..., Tensor]) -> None:
    """oneDNN's operator would hand torch.func a derivative of zero."""
    x, weight, bias = inputs(5, 8, 4)
    ref = F.linear if op is linear else lambda *a: F.gelu(F.linear(*a))
    grads = [torch.func.grad(lambda w, f=f: f(x, w, bias).square().sum())(weight) for f in (op, ref)]
    torch.testing.assert_close(*grads)
    tangents = [torch.func.jvp(lambda t, f=f: f(t, weight, bias), (x,), (x,))[1] for f in (op, ref)]
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("op", [linear, linear_erf_gelu])
def test_forward_mode(op: Callable[..., Tensor]) -> None:
    x, weight, _ = inputs(5, 8, 4)
    ref = F.linear if op is linear else lambda *a: F.gelu(F.linear(*a))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, weight)
        got, want = (forward_ad.unpack_dual(f(x, dual)).tangent for f in (op, ref))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    leaves = [t.requires_grad_() for t in inputs(20, 8, 24)]
    with torch.autocast("cpu", dtype=dtype):
        y, want = linear(*leaves), F.linear(*leaves)
    assert y.dtype == dtype
    assert torch.equal(y, want)


def test_compiles_as_one_graph() -> None:
    leaves = [t.requires_grad_() for t in inputs(20, 8, 24)]
    compiled, cotangent = torch.compile(linear, fullgraph=True, backend="aot_eager"), randn(20, 24, seed=1)
    got = torch.autograd.grad(compiled(*leaves), leaves, cotangent)
    torch.testing.assert_close(got, torch.autograd.grad(linear(*leaves), leaves, cotangent), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", [{"x": torch.ones(3, 6)}, {"bias": torch.ones(3)}, {"weight": torch.ones(4, 4)}])
def test_wrong_shapes_are_refused(change: dict[str, Any], grad: bool) -> None:
    x, weight, bias = inputs(3, 5, 4)
    given = {"x": x, "weight": weight.requires_grad_(grad), "bias": bias} | change
    with pytest.raises(RuntimeError):
        linear(**given)
