"""The two-layer MLP of a transformer block, its memory in training held down.

    h = x W1^T + b1     a = gelu(h)     y = a W2^T + b2
    da = dy W2          dh = da gelu'(h)
    dW2 = dy^T a        db2 = sum dy    dW1 = dh^T x    db1 = sum dh    dx = dh W1

Autograd would keep x, h and a: nine times x at the usual widths. a is one cheap pass over h, so x and h are kept, five times x;
with recompute x alone, and h is one product more. With kernels, linear_gelu's run here, and the other products are cuBLAS's.
On the CPU oneDNN computes all products, and in training blocks of rows go through both layers at a time, so that h, a and da
stay in the cache and, with recompute, h never exists in full.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmfast_kernels.dispatch import needs_grad, use_kernel
from mmfast_kernels.linear import (
    ROWS,
    add_to,
    differentiating_twice,
    grads_by_torch,
    linear,
    onednn,
    onednn_takes,
    transposed_product,
)
from mmfast_kernels.mlp import (
    MODES,
    checked_linear,
    checked_parameters,
    gelu_backward_op,
    linear_gelu,
    linear_gelu_hidden_op,
    linear_gelu_op,
    linear_gelu_ref,
)


class _KernelMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        mode: str,
        recompute: bool,
    ) -> Tensor:
        if recompute:
            a, kept = linear_gelu_op(x, w1, b1, mode), []
        else:
            a, *kept = linear_gelu_hidden_op(x, w1, b1, mode)
        ctx.save_for_backward(x, w1, b1, w2, b2, *kept)
        ctx.mode = mode
        return F.linear(a, w2, b2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2, b2, *kept = ctx.saved_tensors
        if differentiating_twice():
            return *_grads_by_torch(ctx, dy), None, None
        want_x, want_w1, want_b1, want_w2, want_b2, *_ = ctx.needs_input_grad
        h = kept[0] if kept else F.linear(x, w1, b1)
        dh, *rest = gelu_backward_op(dy @ w2, h, ctx.mode, want_w2, want_b1)
        return (
            dh @ w1 if want_x else None,
            dh.t() @ x if want_w1 else None,
            rest[-1].to(dh.dtype) if want_b1 else None,
            dy.t() @ rest[0] if want_w2 else None,
            dy.sum(0) if want_b2 else None,
            None,
            None,
        )


class _BlockedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        mode: str,
        recompute: bool,
    ) -> Tensor:
        kept: list[Tensor] = []
        y = _blocked(x, w1, b1, w2, b2, mode, None if recompute else kept)
        ctx.save_for_backward(x, w1, b1, w2, b2, *kept)
        ctx.mode = mode
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2, b2, *kept = ctx.saved_tensors
        if differentiating_twice():
            return *_grads_by_torch(ctx, dy), None, None
        want_x, want_w1, want_b1, want_w2, want_b2, *_ = ctx.needs_input_grad
        dy = dy.contiguous()
        dx = torch.empty_like(x) if want_x else None
        dw1 = db1 = dw2 = None
        for i, start in enumerate(range(0, x.shape[0], ROWS)):
            rows = slice(start, start + ROWS)
            h = kept[i] if kept else onednn(x[rows], w1, b1)
            if want_w2:
                dw2 = add_to(dw2, transposed_product(dy[rows], _gelu(h, ctx.mode)))
            dh = _gelu_backward(onednn(dy[rows], w2.t()), h, ctx.mode)
            if want_w1:
                dw1 = add_to(dw1, transposed_product(dh, x[rows]))
            if want_b1:
                db1 = add_to(db1, dh.sum(0))
            if dx is not None:
                dx[rows] = onednn(dh, w1.t())
        return (
            dx,
            None if dw1 is None else dw1.contiguous(),
            db1,
            None if dw2 is None else dw2.contiguous(),
            dy.sum(0) if want_b2 else None,
            None,
            None,
        )


def _blocked(
    x: Tensor,  # [T, D]
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    mode: str,
    kept: list[Tensor] | None = None,  # takes the hidden layer, a block of rows at a time
) -> Tensor:
    y = torch.empty((x.shape[0], w2.shape[0]), dtype=x.dtype)
    for rows, out in zip(x.split(ROWS), y.split(ROWS), strict=True):
        if kept is None:
            a = linear_gelu(rows, w1, b1, mode)
        else:
            kept.append(onednn(rows, w1, b1))
            a = _gelu(kept[-1], mode)
        out.copy_(onednn(a, w2, b2))
    return y


def _gelu(h: Tensor, mode: str) -> Tensor:
    return F.silu(h * 1.702).div_(1.702) if mode == "quick" else F.gelu(h)


def _gelu_backward(da: Tensor, h: Tensor, mode: str) -> Tensor:
    """da gelu'(h), in the place of da."""
    if mode == "quick":
        return torch.ops.aten.silu_backward.grad_input(da, h * 1.702, grad_input=da)
    return torch.ops.aten.gelu_backward.grad_input(da, h, grad_input=da)


def _grads_by_torch(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors[:5]
    # The function that the forward computed: only the kernels have the tanh form itself.
    mode = ctx.mode if use_kernel(inputs[0]) or ctx.mode == "quick" else "erf"
    return grads_by_torch(functools.partial(mlp_ref, mode=mode), inputs, dy)


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    mode: str = "erf",
    *,
    recompute: bool = False,
) -> Tensor:
    """gelu(x w1^T + b1) w2^T + b2 with linear_gelu's modes; for its backward it keeps x and the hidden layer, or x alone.

    x: [..., D]. w1: [N, D]. b1: [N] or None. w2: [E, N]. b2: [E] or None. One dtype, or any under autocast. recompute: the
    backward computes the hidden layer again. Returns [..., E] in that dtype. Raises ValueError, TypeError.
    """
    if mode not in MODES:
        raise ValueError(f"mlp: mode takes one of {MODES}, got {mode!r}")
    x, w1, b1 = checked_linear("mlp", x, w1, b1, ("w1", "b1"))
    if w2.dim() != 2 or w2.shape[1] != w1.shape[0]:
        raise ValueError(f"mlp: w2 takes [E, {w1.shape[0]}] for w1 {tuple(w1.shape)}, got {tuple(w2.shape)}")
    w2, b2 = checked_parameters("mlp", x, w2, b2, ("w2", "b2"))
    given = (x, w1, b1, w2, b2)
    if not needs_grad(*given):
        return _layers(*given, mode)
    if use_kernel(*given) or onednn_takes(*given):
        run = _KernelMlp.apply if use_kernel(*given) else _BlockedMlp.apply
        return run(x.reshape(-1, x.shape[-1]), w1, b1, w2, b2, mode, recompute).view(*x.shape[:-1], w2.shape[0])
    if recompute:
        return checkpoint(_layers, *given, mode, use_reentrant=False, preserve_rng_state=False)
    return _layers(*given, mode)


def _layers(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, mode: str) -> Tensor:
    return linear(linear_gelu(x, w1, b1, mode), w2, b2)


def mlp_ref(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, mode: str = "erf") -> Tensor:
    """mlp in plain torch, "tanh" by its own formula."""
    return F.linear(linear_gelu_ref(x, w1, b1, mode), w2, b2)
