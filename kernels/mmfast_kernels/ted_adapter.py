"""A whole TED-Adapter on packed tokens: two products and the stencil of ted.py between them.

    h = x [W1; W3]^T        u = stencil(h)        y = x + u [W2 | W4]^T + b2, + b4 on all but class tokens

    du = dy [W2 | W4]       d[W2 | W4] = dy^T u          db2 = sum of dy over rows, db4 = over those that are no class token
    dx = dy + dh [W1; W3]   d[W1; W3] = dh^T x           dh and the rest by the stencil's backward

Rows move 7 times: x, h, h, u, u, x, y. Kept for the backward are x, h and u. On the CPU ted_blocked.py does the same.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmfast_kernels import tables
from mmfast_kernels.dispatch import HAVE_TRITON, needs_grad, register, tf32_allowed, use_kernel
from mmfast_kernels.linear import onednn_takes
from mmfast_kernels.norm import dense_rows
from mmfast_kernels.ted import (
    Sites,
    Taps,
    backend_of,
    check_stencil,
    stencil_backward_op,
    stencil_op,
    ted_stencil_ref,
)
from mmfast_kernels.ted_blocked import BlockedAdapter, bias_gradients
from mmfast_kernels.ted_blocked import run as run_blocked

if HAVE_TRITON:
    from mmfast_kernels import ted_project_triton


class Weights(NamedTuple):
    """Parameters of the two products. first: [A_t + A_s, D], second: [D, A_t + A_s], the branch over time before that
    over space; bias [D] of all tokens; cell_bias [D] of all but class tokens."""

    first: Tensor
    second: Tensor
    bias: Tensor
    cell_bias: Tensor


def _project(
    x: Tensor, u: Tensor, weight: Tensor, bias: Tensor, cell_bias: Tensor, class_rows: Tensor | None
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, u, weight = dense_rows(x), dense_rows(u), dense_rows(weight)
    rows, d = x.shape
    dtype = "tf32" if u.dtype == torch.float32 and tf32_allowed() else tables.dtype_name(u.dtype)
    if rows:
        options = dict(tables.lookup("ted_project", arch=tables.arch_of(x.device), dtype=dtype).config)
        cells = None
        if class_rows is not None:
            cells = torch.ones(rows, dtype=torch.int8, device=x.device).index_fill_(0, class_rows, 0)
        tiles = -(-rows // options["BM"]) * -(-d // options["BN"])
        with torch.cuda.device_of(x):
            ted_project_triton.ted_project_kernel[(tiles,)](
                x, u, weight, bias.contiguous(), cell_bias.contiguous(), cells, y,
                x.stride(0), u.stride(0), weight.stride(0), rows, d, u.shape[1],
                PRECISION="tf32" if dtype == "tf32" else "ieee", EVEN_K=u.shape[1] % options["BK"] == 0, **options,
            )  # fmt: skip
    return y


def _project_fake(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


project_op = register(
    "ted_project(Tensor x, Tensor u, Tensor weight, Tensor bias, Tensor cell_bias, Tensor? class_rows) -> Tensor",
    _project,
    _project_fake,
)


def _forward(x: Tensor, class_rows: Tensor | None, sites: Sites, weights: Weights, taps: Taps) -> tuple[Tensor, ...]:
    """h, u and y, in operators that torch.compile can take."""
    first, second, bias, cell_bias = weights
    h = F.linear(x.to(first.dtype), first)
    u = stencil_op(h, list(taps), *sites)
    if use_kernel(x, *weights):
        return h, u, project_op(x, u, second, bias, cell_bias, class_rows)
    branch = F.linear(u, second, bias + cell_bias)
    if class_rows is not None:
        branch = branch.index_add(0, class_rows, -cell_bias.expand(class_rows.shape[0], -1))
    return h, u, x + branch


class _Adapter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, class_rows: Tensor | None, table: Tensor, frames: int, copies: int, *parameters: Tensor
    ) -> Tensor:
        weights, taps = Weights(*parameters[:4]), Taps(*parameters[4:])
        h, u, y = _forward(x, class_rows, Sites(table, frames, copies), weights, taps)
        ctx.save_for_backward(x, class_rows, table, h, u, weights.first, weights.second, *taps)
        ctx.frames, ctx.copies = frames, copies
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, class_rows, table, h, u, first, second, *taps = ctx.saved_tensors
        for_x, _, _, _, _, for_first, for_second, for_bias, for_cell_bias, *for_taps = ctx.needs_input_grad
        dy = dy.contiguous()
        narrow = dy.to(first.dtype)
        dx = dfirst = dsecond = dbias = dcell_bias = None
        dtaps: list[Tensor | None] = [None] * len(taps)
        if for_second:
            dsecond = narrow.t() @ u
        if for_bias or for_cell_bias:
            dbias, dcell_bias = bias_gradients(dy, class_rows)
        if for_x or for_first or any(for_taps):
            du = narrow @ second
            dh, *made = stencil_backward_op(du, h, taps, table, ctx.frames, ctx.copies, any(for_taps))
            dtaps = [g if want else None for g, want in zip(made or taps, for_taps, strict=True)]
            if for_first:
                dfirst = dh.t() @ x.to(first.dtype)
            if for_x:
                dx = dy + dh @ first
        return (
            dx, None, None, None, None, dfirst, dsecond,
            dbias.to(second.dtype) if dbias is not None and for_bias else None,
            dcell_bias.to(second.dtype) if dcell_bias is not None and for_cell_bias else None,
            *dtaps,
        )  # fmt: skip


def ted_adapter(x: Tensor, class_rows: Tensor | None, sites: Sites, weights: Weights, taps: Taps) -> Tensor:
    """A TED-Adapter on packed tokens, residual included.

    x: [T, D], T = sites.rows. class_rows: int64 ids of the rows that are class tokens, or None where there are none. sites,
    taps: as ted_stencil takes them. Products are in autocast's dtype where that is enabled, else in x's.
    Returns [T, D] in x's dtype. Raises ValueError, TypeError.
    """
    _check(x, class_rows, sites, weights, taps)
    device = x.device.type
    dtype = x.dtype
    if device != "meta" and dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    weights = Weights(*(t.to(dtype) for t in weights))
    with torch.autocast(device, enabled=False):
        if backend_of(weights.first) == "torch":
            return ted_adapter_ref(x, class_rows, sites, weights, taps)
        blocked = backend_of(x) == "cpp" and onednn_takes(x, *weights, *taps)
        if needs_grad(x, *weights, *taps):
            if blocked:
                return BlockedAdapter.apply(x, class_rows, *sites, *weights, *taps)
            return _Adapter.apply(x, class_rows, *sites, *weights, *taps)
        if blocked:
            return run_blocked(x, class_rows, sites, weights, list(taps))
        return _forward(x, class_rows, sites, weights, taps)[2]


def _check(x: Tensor, class_rows: Tensor | None, sites: Sites, weights: Weights, taps: Taps) -> None:
    if not x.is_floating_point():
        raise TypeError(f"ted_adapter: x takes a floating dtype, got {x.dtype}")
    if x.dim() != 2 or x.shape[0] != sites.rows:
        raise ValueError(f"ted_adapter: x takes [{sites.rows}, D], got {tuple(x.shape)}")
    d, width = x.shape[1], taps.time_bias.shape[0] + taps.space_bias.shape[0]
    for name, tensor, shape in zip(Weights._fields, weights, ((width, d), (d, width), (d,), (d,)), strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"ted_adapter: {name} takes {list(shape)}, got {tuple(tensor.shape)}")
    if class_rows is not None and class_rows.dtype != torch.int64:
        raise TypeError(f"ted_adapter: class_rows takes torch.int64, got {class_rows.dtype}")
    check_stencil((x.shape[0], width), taps, sites)


def ted_adapter_ref(x: Tensor, class_rows: Tensor | None, sites: Sites, weights: Weights, taps: Taps) -> Tensor:
    """ted_adapter in plain torch, products in the weights' dtype."""
    first, second, bias, cell_bias = weights
    u = ted_stencil_ref(F.linear(x.to(first.dtype), first), taps, sites)
    cells = x.new_ones((x.shape[0], 1), dtype=first.dtype)
    if class_rows is not None:
        cells = cells.index_fill(0, class_rows, 0.0)
    return (x + F.linear(u, second, bias) + cells * cell_bias).to(x.dtype)
