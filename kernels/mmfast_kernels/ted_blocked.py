"""A TED-Adapter (ted_adapter.py) on the CPU: oneDNN's products and the C++ stencil, a few views at a time.

What a block of views has between its two products stays in the cache, forward and backward; the weights are brought into
oneDNN's own order once for all blocks. Without a backward the stencil overwrites its input.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfast_kernels.linear import ROWS, add_to, onednn, transposed_product
from mmfast_kernels.ted import Sites, stencil_backward_in_place_op, stencil_in_place_op, stencil_op

BLOCK_ROWS = 2048  # of a block of views, if a view has no more by itself


def blocks_of(sites: Sites) -> Iterator[tuple[slice, int]]:
    """The rows of each block of copies, and how many copies those are."""
    each = sites.table.shape[0] * sites.frames
    copies = max(1, BLOCK_ROWS // max(each, 1))
    for first in range(0, sites.copies, copies):
        last = min(first + copies, sites.copies)
        yield slice(first * each, last * each), last - first


def _packed(weight: Tensor, sites: Sites) -> Tensor:
    """A weight in the order that oneDNN wants for blocks of these rows."""
    rows = next(blocks_of(sites))[0].stop
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


def run(
    x: Tensor,  # [T, D], T > 0
    class_rows: Tensor | None,
    sites: Sites,
    weights: tuple[Tensor, ...],  # first, second, bias, cell_bias
    taps: list[Tensor],
    kept: list[Tensor] | None = None,  # takes h and u of every block
) -> Tensor:
    first, second, bias, cell_bias = weights
    first, second, bias = _packed(first, sites), _packed(second, sites), bias + cell_bias
    y = torch.empty(x.shape, dtype=x.dtype)
    for rows, copies in blocks_of(sites):
        h = onednn(x[rows], first)
        if kept is None:
            stencil_in_place_op(h, taps, sites.table, sites.frames, copies)
            u = h
        else:
            u = stencil_op(h, taps, sites.table, sites.frames, copies)
            kept += [h, u]
        torch.add(onednn(u, second, bias), x[rows], out=y[rows])
        del h, u  # before the next block takes memory
    if class_rows is not None:  # they are few
        y.index_add_(0, class_rows, -cell_bias.expand(class_rows.shape[0], -1))
    return y


class BlockedAdapter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, class_rows: Tensor | None, table: Tensor, frames: int, copies: int, *parameters: Tensor
    ) -> Tensor:
        kept: list[Tensor] = []
        weights, taps = parameters[:4], list(parameters[4:])
        y = run(x, class_rows, Sites(table, frames, copies), weights, taps, kept)
        ctx.save_for_backward(x, class_rows, table, *weights[:2], *taps, *kept)
        ctx.frames, ctx.copies = frames, copies
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, class_rows, table, first, second, *rest = ctx.saved_tensors
        taps, kept = rest[:6], rest[6:]
        sites = Sites(table, ctx.frames, ctx.copies)
        for_x, _, _, _, _, for_first, for_second, for_bias, for_cell_bias, *for_taps = ctx.needs_input_grad
        further = for_x or for_first or any(for_taps)
        dy = dy.contiguous()
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if for_x else None
        dfirst = dsecond = dbias = dcell_bias = None
        dtaps: list[Tensor | None] = [None] * len(taps)
        first_t = first.t() if for_x else None
        second_t = second.t() if further else None
        for i, (rows, copies) in enumerate(blocks_of(sites)):
            h, u = kept[2 * i : 2 * i + 2]
            if for_second:
                dsecond = _add_transposed(dsecond, dy[rows], u)
            if second_t is None:
                continue
            dh = onednn(dy[rows], second_t)
            sums = stencil_backward_in_place_op(dh, h, taps, table, ctx.frames, copies)
            dtaps = [add_to(total, part) for total, part in zip(dtaps, sums, strict=True)]
            if for_first:
                dfirst = _add_transposed(dfirst, dh, x[rows])
            if dx is not None and first_t is not None:
                torch.add(onednn(dh, first_t), dy[rows], out=dx[rows])
            del dh
        if for_bias or for_cell_bias:
            dbias, dcell_bias = bias_gradients(dy, class_rows)
        return (
            dx, None, None, None, None,
            None if dfirst is None else dfirst.contiguous(),
            None if dsecond is None else dsecond.contiguous(),
            dbias if for_bias else None,
            dcell_bias if for_cell_bias else None,
            *(g if want else None for g, want in zip(dtaps, for_taps, strict=True)),
        )  # fmt: skip


def bias_gradients(dy: Tensor, class_rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of dy [T, D] over all rows and over those that are no class tokens, fp32 or wider where it is narrower.

    The second is no difference of sums: in front of a layer that reads class tokens alone it must be 0, since an
    optimiser would scale up whatever rounding left there.
    """
    if class_rows is None:
        total = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        return total, total
    cells = dy.new_ones(dy.shape[0]).index_fill_(0, class_rows, 0)
    of_cells = dy.t() @ cells
    if dy.dtype.itemsize < 4:
        return dy.sum(0, dtype=torch.float32), of_cells.float()
    return of_cells + dy[class_rows].sum(0), of_cells


def _add_transposed(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a^T b."""
    for a_rows, b_rows in zip(a.split(ROWS), b.split(ROWS), strict=True):
        total = add_to(total, transposed_product(a_rows, b_rows))
    assert total is not None
    return total
