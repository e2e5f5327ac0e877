"""y = x W^T + b, by the library that is fastest at it.

    dx = dy W       dW = dy^T x       db = sum of dy over rows

On the CPU F.linear goes to MKL, which on processors not Intel's reaches half of what oneDNN does at these shapes; torch carries
both. oneDNN's operator has no derivative of its own: _Linear gives it one, its products by the same operator. Everything on a
GPU goes to F.linear (cuBLAS), and so does what the operator does not take.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F

from mmfast_kernels.dispatch import needs_grad

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ROWS = 512  # of a block: what an MLP makes of it stays in the cache, and a product keeps nine tenths of its rate


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        want_x, want_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if want_weight else None, weight if want_x else None)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        twice = differentiating_twice()
        dy = dy.contiguous()
        dx = dweight = None
        if weight is not None:
            dx = dy @ weight if twice else onednn(dy, weight.t())
        if x is not None:
            dweight = dy.t() @ x if twice else _weight_grad(dy, x)
        return dx, dweight, dy.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear.   x: [..., K].  weight: [N, K].  bias: [N] or None.   Returns [..., N]."""
    if not onednn_takes(x, weight, bias):
        return F.linear(x, weight, bias)
    if needs_grad(x, weight, bias):
        y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], weight.shape[0])
    return onednn(x, weight, bias)


def linear_erf_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.gelu(F.linear(x, weight, bias)), in one pass where oneDNN takes it and no gradient is needed."""
    if onednn_takes(x, weight, bias) and not needs_grad(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")
    return F.gelu(linear(x, weight, bias))


def onednn_takes(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether oneDNN's operator may run on these. Not while tracing: a graph should hold torch's public operators. Not under
    torch.func or forward-mode derivatives: both would pass through it as through a constant."""
    given = [x, *(p for p in parameters if p is not None)]
    return (
        _ONEDNN
        and not torch.compiler.is_compiling()
        and all(t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() > 0 for t in given)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and all(unpack_dual(t).tangent is None for t in given)
    )


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b without a derivative. It copies x where that is not contiguous; of the weight it always makes its own form."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def pack_weight(weight: Tensor) -> Tensor:
    """weight [N, K], fp32 on the CPU, in oneDNN's own form, which linear and linear_gelu take in its place without making it
    anew at every call: a twentieth of a product of some hundred rows. For inference: an opaque copy, with no gradient."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def add_linear_(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """total + x weight^T + bias in total's place, without a gradient; without a bias in the product's own epilogue.

    total: [T, N], contiguous. x: [T, K]. weight: [N, K], perhaps packed. bias: [N] or None. Returns total.
    """
    alike = total.dtype == x.dtype == weight.dtype  # under autocast they may differ
    if bias is None and alike and not onednn_takes(x, weight):
        return total.addmm_(x, weight.t())
    return total.add_(linear(x, weight, bias))


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b [N, K] of a [R, N] and b [R, K], perhaps as a transposed view: the narrower of the two is the one to copy."""
    return onednn(a.t(), b.t()) if a.shape[1] <= b.shape[1] else onednn(b.t(), a.t()).t()


def add_to(total: Tensor | None, part: Tensor) -> Tensor:
    """total + part in total's place; part itself where there is no total yet."""
    return part if total is None else total.add_(part)


def _weight_grad(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x, summed over blocks of rows: transposing a whole activation costs as much as the product."""
    total = None
    for dy_rows, x_rows in zip(dy.split(ROWS), x.split(ROWS), strict=True):
        total = add_to(total, transposed_product(dy_rows, x_rows))
    assert total is not None
    return total.contiguous()


def differentiating_twice() -> bool:
    """True in a backward whose result must itself be differentiable (create_graph=True)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def grads_by_torch(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of function(*inputs), a plain torch one, that carry a graph of their own; None where none is needed."""
    wanted = {i: t for i, t in enumerate(inputs) if t is not None and t.requires_grad}
    found = torch.autograd.grad(function(*inputs), tuple(wanted.values()), dy, create_graph=True)
    by_index = dict(zip(wanted, found, strict=True))
    return tuple(by_index.get(i) for i in range(len(inputs)))
