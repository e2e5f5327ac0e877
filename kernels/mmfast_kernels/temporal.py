"""EVL's temporal cross-attention (ECCV 2022): what each cell of a frame finds in the frame before and after it.

    a_t(i, j) = mean over heads of softmax_j(q_t,i . k_t-1,j / sqrt(d))         b_t(i, j) the same with k_t+1
    out_t,i = sum_j a_t(i, j) w1[r(i, j)] + sum_j b_t(i, j) w2[r(i, j)]         a_0 = b_(F-1) = 0

    r(i, j) = (y_i - y_j + h - 1) (2 w - 1) + x_i - x_j + w - 1                 a row of the tables, by relative offset

Class tokens take no part: leave them out of q and k, and add nothing to their rows. Of a masked view, the kept cells
of every frame are queries and keys, at their own places in the grid.

The head means [2, V, F-1, n, n] are all that is kept beside the output, never a head's own probabilities and never the
tables' rows by pair, [n, n, C].

Backward: dw1[r] = sum of a_t(i, j) dout_t,i over frames and over i, j with r(i, j) = r, and dw2 with b. With
g_ij = dout_t,i . w1[r(i, j)] / H, head by head dscore_ij = p_ij (g_ij - sum_j p_ij g_ij) gives dq and dk as usual.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfast_kernels import tables, temporal_blocked
from mmfast_kernels.dispatch import HAVE_TRITON, needs_grad, register, tf32_allowed, use_kernel
from mmfast_kernels.temporal_blocked import Grid, query_frames, relative

if HAVE_TRITON:
    from mmfast_kernels import temporal_backward_triton, temporal_triton

_ROW = 16  # the rows of the mean probabilities have a multiple of this many columns, so that they load whole vectors


def _config(kernel: str, t: Tensor, rows: int = 0) -> dict[str, Any]:
    case = {"arch": tables.arch_of(t.device), "dtype": _precise_dtype(t), "kernel": kernel, "rows": rows}
    config = dict(tables.lookup("temporal", **case).config)
    return config | {"PRECISION": "tf32" if case["dtype"] == "tf32" else "ieee"}


def _precise_dtype(t: Tensor) -> str:
    return "tf32" if t.dtype == torch.float32 and tf32_allowed() else tables.dtype_name(t.dtype)


def score_geometry(d: int) -> dict[str, int]:
    """Constants of the kernels over q and k, for heads of d channels."""
    return {"D": d, "WIDTH": _power_of_two(d)}


def dtables_geometry(h: int, w: int) -> dict[str, int]:
    """Constants of the kernel of the tables' gradients, for a grid of h x w cells."""
    return {"H": h, "W": w, "BINS": _power_of_two(2 * w - 1)}


def _power_of_two(size: int) -> int:
    """The next power of two, not below what the matrix units take."""
    return max(16, 1 << (size - 1).bit_length())


def _forward(
    q: Tensor, k: Tensor, w1: Tensor, w2: Tensor, cells: Tensor | None, h: int, w: int
) -> tuple[Tensor, Tensor]:
    if cells is not None and not cells.is_cuda:
        _check_cells(cells, h * w)
    out, probs = _forward_fake(q, k, w1, w2, cells, h, w)
    if out.numel() == 0 or q.shape[1] == 1:
        return out.zero_(), probs
    if use_kernel(q, k, w1, w2):
        _launch_forward(q, k, w1.contiguous(), w2.contiguous(), cells, (h, w), probs, out)
        return out, probs
    return temporal_blocked.forward(q, k, [w1, w2], Grid(h, w, cells), probs).to(out.dtype), probs


def _check_cells(cells: Tensor, count: int) -> None:
    if cells.numel() and (cells.min() < 0 or cells.max() >= count or (cells.diff(dim=1) <= 0).any()):
        raise ValueError(f"temporal_cross_attention: cells takes ascending numbers from 0 to {count - 1} in every view")


def _launch_forward(
    q: Tensor,
    k: Tensor,
    w1: Tensor,
    w2: Tensor,
    cells: Tensor | None,
    grid: tuple[int, int],
    probs: Tensor,
    out: Tensor,
) -> None:
    views, frames, n, heads, d = q.shape
    pairs, channels = frames - 1, w1.shape[1]
    q, k = (t if t.stride(4) == 1 else t.contiguous() for t in (q, k))
    cells = None if cells is None else cells.int().contiguous()
    strides = (*q.stride()[:4], *k.stride()[:4])
    scale_log2 = d**-0.5 * math.log2(math.e)
    lse = torch.empty((2, views, pairs, heads, n), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        options: Mapping[str, Any] = score_geometry(d) | _config("lse", q)
        q_tiles = -(-n // options["BM"])
        temporal_triton.temporal_lse_kernel[(2 * views * pairs * heads * q_tiles,)](
            q, k, lse, *strides, views, pairs, heads, n, q_tiles, scale_log2, **options
        )
        options = score_geometry(d) | _config("probs", q)
        q_tiles, k_tiles = -(-n // options["BM"]), -(-probs.shape[4] // options["BN"])
        temporal_triton.temporal_probs_kernel[(2 * views * pairs * q_tiles * k_tiles,)](
            q, k, lse, probs, *strides, views, pairs, heads, n, probs.shape[4], q_tiles, k_tiles, scale_log2, **options
        )
        groups, rows = (1, views * frames) if cells is None else (views, frames)
        options = _config("tables", w1, rows)
        row_tiles, col_tiles = -(-rows // options["BR"]), -(-channels // options["BC"])
        temporal_triton.temporal_tables_kernel[(groups * n * row_tiles * col_tiles,)](
            probs, w1, w2, cells, out, views, frames, n, probs.shape[4], channels, row_tiles, col_tiles,
            H=grid[0], W=grid[1], **options,
        )  # fmt: skip


def _forward_fake(
    q: Tensor, k: Tensor, w1: Tensor, w2: Tensor, cells: Tensor | None, h: int, w: int
) -> tuple[Tensor, Tensor]:
    views, frames, n = q.shape[:3]
    out = torch.empty((views, frames, n, w1.shape[1]), dtype=w1.dtype, device=q.device)
    row = (n + _ROW - 1) // _ROW * _ROW
    return out, torch.empty((2, views, frames - 1, n, row), dtype=w1.dtype, device=q.device)


def _dtables(dout: Tensor, probs: Tensor, cells: Tensor | None, h: int, w: int) -> tuple[Tensor, Tensor]:
    grads = _dtables_fake(dout, probs, cells, h, w)
    views, frames, n, channels = dout.shape
    if dout.numel() == 0 or frames == 1:
        return grads[0].zero_(), grads[1].zero_()
    if not use_kernel(dout, probs):
        made = temporal_blocked.dtables(dout, probs, Grid(h, w, cells))
        return made[0].to(probs.dtype), made[1].to(probs.dtype)
    dout = dout if dout.stride(3) == 1 else dout.contiguous()
    slots = starts = None
    if cells is not None:
        cells = cells.int().contiguous()
        numbers = torch.arange(n, dtype=torch.int32, device=dout.device).expand(views, n)
        slots = torch.full((views, h * w), -1, dtype=torch.int32, device=dout.device)
        slots.scatter_(1, cells.long(), numbers)
        edges = torch.arange(0, (h + 1) * w, w, dtype=torch.int32, device=dout.device).expand(views, -1)
        starts = torch.searchsorted(cells, edges.contiguous(), out_int32=True)
    options = dtables_geometry(h, w) | _config("dtables", probs)
    col_tiles = -(-channels // options["BC"])
    sums = torch.empty((options["SPLITS"], 2, *grads[0].shape), dtype=torch.float32, device=dout.device)
    with torch.cuda.device_of(dout):
        temporal_backward_triton.temporal_dtables_kernel[(options["SPLITS"] * 2 * (2 * h - 1) * col_tiles,)](
            dout, probs, cells, slots, starts, sums, *dout.stride()[:3], views, frames - 1, n, probs.shape[4],
            channels, col_tiles, **options,
        )  # fmt: skip
    for grad, total in zip(grads, sums.sum(0), strict=True):
        grad.copy_(total)
    return grads


def _dtables_fake(dout: Tensor, probs: Tensor, cells: Tensor | None, h: int, w: int) -> tuple[Tensor, Tensor]:
    shape = ((2 * h - 1) * (2 * w - 1), dout.shape[3])
    made = [torch.empty(shape, dtype=probs.dtype, device=dout.device) for _ in range(2)]
    return made[0], made[1]


def _dscores(
    dout: Tensor, q: Tensor, k: Tensor, w1: Tensor, w2: Tensor, cells: Tensor | None, h: int, w: int
) -> tuple[Tensor, Tensor]:
    dq, dk = temporal_blocked.dscores(dout, q, k, [w1, w2], Grid(h, w, cells))
    return dq.to(q.dtype), dk.to(k.dtype)


def _dscores_fake(dout: Tensor, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dq, dk = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    return dq, dk


# Returns out and the mean probabilities, [2, V, F-1, n, n rounded up to 16] in the dtype of the tables.
forward_op = register(
    "temporal_cross_attention(Tensor q, Tensor k, Tensor w1, Tensor w2, Tensor? cells, int h, int w) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
dtables_op = register(
    "temporal_cross_attention_dtables(Tensor dout, Tensor probs, Tensor? cells, int h, int w) -> (Tensor, Tensor)",
    _dtables,
    _dtables_fake,
)
dscores_op = register(
    "temporal_cross_attention_dscores(Tensor dout, Tensor q, Tensor k, Tensor w1, Tensor w2, Tensor? cells, int h, "
    "int w) -> (Tensor, Tensor)",
    _dscores,
    _dscores_fake,
)


class _TemporalCrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, w1: Tensor, w2: Tensor, cells: Tensor | None, h: int, w: int) -> Tensor:
        out, probs = forward_op(q, k, w1, w2, cells, h, w)
        for_scores, for_tables = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[2:4])
        scores = (q, k, w1, w2) if for_scores else (None,) * 4
        ctx.save_for_backward(probs if for_tables else None, cells, *scores)
        ctx.grid = h, w
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        probs, cells, *scores = ctx.saved_tensors
        made: list[Tensor | None] = [None] * 4
        if scores[0] is not None:
            made[:2] = dscores_op(dout, *scores, cells, *ctx.grid)
        if probs is not None:
            made[2:] = dtables_op(dout, probs, cells, *ctx.grid)
        return *(g if want else None for g, want in zip(made, ctx.needs_input_grad, strict=False)), None, None, None


def temporal_cross_attention(
    q: Tensor, k: Tensor, w1: Tensor, w2: Tensor, grid: tuple[int, int], cells: Tensor | None = None
) -> Tensor:
    """What every cell finds in the frame before and the frame after its own, by relative offset.

    q, k: [V, F, n, H, d] without class tokens, float32, float16 or bfloat16 (float64 by autograd), any strides.
    w1, w2: [(2h-1)(2w-1), C] for the frame before and after. grid: (h, w). cells: int32 or int64 [V, n], the kept
    cells y * w + x of each view, ascending; None where all are kept, n = h * w. The tables' products run in autocast's
    dtype where that is enabled, else in theirs. Returns [V, F, n, C] in the dtype of the products; zeros with one frame.
    Raises ValueError, TypeError.
    """
    _check(q, k, w1, w2, grid, cells)
    device = q.device.type
    if device != "meta" and w1.dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        w1, w2 = w1.to(dtype), w2.to(dtype)
    with torch.autocast(device, enabled=False):
        if torch.float64 in (q.dtype, w1.dtype):
            return temporal_cross_attention_ref(q, k, w1, w2, grid, cells)
        if needs_grad(q, k, w1, w2):
            return _TemporalCrossAttention.apply(q, k, w1, w2, cells, *grid)
        return forward_op(q, k, w1, w2, cells, *grid)[0]


def _check(q: Tensor, k: Tensor, w1: Tensor, w2: Tensor, grid: tuple[int, int], cells: Tensor | None) -> None:
    op = "temporal_cross_attention"
    if not q.is_floating_point() or k.dtype != q.dtype:
        raise TypeError(f"{op}: q and k take one floating dtype, got {q.dtype} and {k.dtype}")
    if not w1.is_floating_point() or w2.dtype != w1.dtype:
        raise TypeError(f"{op}: w1 and w2 take one floating dtype, got {w1.dtype} and {w2.dtype}")
    if q.dim() != 5 or k.shape != q.shape or 0 in (q.shape[1], q.shape[3], q.shape[4]):
        raise ValueError(f"{op}: q and k take [V, F, n, H, d], got {tuple(q.shape)} and {tuple(k.shape)}")
    h, w = grid
    if h < 1 or w < 1:
        raise ValueError(f"{op}: grid takes (h, w) from (1, 1), got {grid}")
    rows = (2 * h - 1) * (2 * w - 1)
    for name, table in (("w1", w1), ("w2", w2)):
        if table.dim() != 2 or table.shape[0] != rows or table.shape != w1.shape:
            raise ValueError(f"{op}: {name} takes [{rows}, C] for a grid of {h} x {w}, got {tuple(table.shape)}")
    if cells is None:
        if q.shape[2] != h * w:
            raise ValueError(f"{op}: q takes n = {h * w} cells without cells, got {tuple(q.shape)}")
        return
    if cells.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cells takes torch.int32 or torch.int64, got {cells.dtype}")
    if cells.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"{op}: cells takes [{q.shape[0]}, {q.shape[2]}], got {tuple(cells.shape)}")


def temporal_cross_attention_ref(
    q: Tensor, k: Tensor, w1: Tensor, w2: Tensor, grid: tuple[int, int], cells: Tensor | None = None
) -> Tensor:
    """temporal_cross_attention in plain torch: probabilities scattered to their offsets, then a product."""
    if cells is None:
        cells = torch.arange(grid[0] * grid[1], device=q.device).expand(q.shape[0], -1)
    offsets = relative(cells, cells, Grid(*grid, cells))[:, None].expand(-1, q.shape[1] - 1, -1, -1)
    found = []
    for direction, table in enumerate((w1, w2)):
        scores = torch.einsum("vfihd,vfjhd->vfhij", query_frames(q, direction), query_frames(k, 1 - direction))
        probs = torch.softmax(scores * q.shape[4] ** -0.5, -1).mean(2).to(table.dtype)
        bins = probs.new_zeros(*probs.shape[:3], table.shape[0]).scatter(3, offsets, probs)
        nothing = table.new_zeros(q.shape[0], 1, q.shape[2], table.shape[1])
        found.append(torch.cat((bins @ table, nothing) if direction else (nothing, bins @ table), 1))
    return found[0] + found[1]
