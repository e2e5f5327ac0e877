"""EVL's temporal cross-attention in blocks of plain torch: the path of the CPU, and the gradients of q and k anywhere.

A pair of frames' probabilities are taken for all heads at a time and averaged at once. With all cells kept the offsets
of a row of b queries are a window of the table, h rows of w + b - 1 columns: probabilities go into it along diagonals,
by a strided copy, and a row of queries of many frames meets the window in one product. The table is turned round first,
so that offsets grow with the key. With removed cells a row of queries has its window too, of h whole rows, and the
probabilities go to their offsets by scatter.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

WIDEST_BLOCK = 8  # queries side by side in one window
SCRATCH = 1 << 23  # elements of scratch memory that one step may take
FEW_SCORES = 1 << 14  # of a pair of frames: below, products are so small that calling them takes longer
FEW_CELLS = 64  # of a grid: below, a table is hardly wider than its windows


class Grid(NamedTuple):
    """h x w cells a frame, cells: int [V, n] of those kept, None for all."""

    h: int
    w: int
    cells: Tensor | None

    @property
    def offsets(self) -> tuple[int, int]:
        return 2 * self.h - 1, 2 * self.w - 1


def query_frames(t: Tensor, direction: int) -> Tensor:
    """The frames of [V, F, ...] that have a frame before them (direction 0) or after them (1)."""
    return t[:, : t.shape[1] - 1] if direction else t[:, 1:]


def relative(queries: Tensor, keys: Tensor, grid: Grid) -> Tensor:
    """Rows of the tables: int64 [..., queries, keys] of cells [..., queries] and [..., keys]."""
    queries, keys = queries.long().unsqueeze(-1), keys.long().unsqueeze(-2)
    down = queries.div(grid.w, rounding_mode="floor") - keys.div(grid.w, rounding_mode="floor")
    return (down + grid.h - 1) * grid.offsets[1] + queries % grid.w - keys % grid.w + grid.w - 1


def mean_probs(q: Tensor, k: Tensor, probs: Tensor) -> None:
    """q, k: [V, F, n, H, d]. Fills probs [2, V, F-1, n, n or more]; columns past n become 0."""
    views, frames, n, heads, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    if heads * n * n < FEW_SCORES:
        return _mean_probs_of_many(q, k, probs, wide)
    scores, soft = (torch.empty((heads, n, n), dtype=wide, device=q.device) for _ in range(2))
    mean = torch.empty((n, n), dtype=wide, device=q.device)
    probs[..., n:] = 0
    for view in range(views):
        queries = (q[view].to(wide) * d**-0.5).transpose(1, 2)
        keys = k[view].to(wide).permute(0, 2, 3, 1)
        for direction in range(2):
            for pair in range(frames - 1):
                torch.bmm(queries[pair + 1 - direction], keys[pair + direction], out=scores)
                torch.softmax(scores, -1, out=soft)
                torch.mean(soft, 0, out=mean)
                probs[direction, view, pair, :, :n] = mean


def _mean_probs_of_many(q: Tensor, k: Tensor, probs: Tensor, wide: torch.dtype) -> None:
    """mean_probs of all pairs of many views in one product."""
    views, frames, n, heads, d = q.shape
    step = max(1, SCRATCH // max(1, 2 * (frames - 1) * heads * n * max(n, d)))
    probs[..., n:] = 0
    for direction in range(2):
        for start in range(0, views, step):
            chunk = slice(start, start + step)
            queries = query_frames(q[chunk], direction).to(wide).transpose(2, 3) * d**-0.5
            keys = query_frames(k[chunk], 1 - direction).to(wide).transpose(2, 3)
            probs[direction, chunk, ..., :n] = torch.softmax(queries @ keys.mT, -1).mean(2)


# -- all cells kept --


def _block_width(w: int) -> int:
    return next(b for b in range(min(w, WIDEST_BLOCK), 0, -1) if w % b == 0)


def _windows(table: Tensor, grid: Grid, width: int) -> list[Tensor]:
    """table, turned round, [2h-1, 2w-1, C]: for every block of queries of a row [(2h-1) * (w+b-1), C] with its columns."""
    starts = range(grid.w - width, -1, -width)
    return [table[:, s : s + grid.w + width - 1].reshape(-1, table.shape[2]) for s in starts]


def _place(probs: Tensor, grid: Grid, width: int, dtype: torch.dtype) -> Tensor:
    """probs [P, n, n] in windows: [h, w/b, P * b, h * (w+b-1)]."""
    h, w = grid.h, grid.w
    count, blocks, span = probs.shape[0], w // width, w + width - 1
    made = torch.zeros((h, blocks, count, width, h, span), dtype=dtype, device=probs.device)
    # One query on in its row is one offset less: a step of its own row minus one column.
    strides = list(made.stride())
    strides[3] -= 1
    diagonal = made.as_strided((h, blocks, count, width, h, w), strides, width - 1)
    diagonal.copy_(probs.unflatten(2, (h, w)).unflatten(1, (h, blocks, width)).permute(1, 2, 0, 3, 4, 5))
    return made.flatten(4).flatten(2, 3)


def _chunks(views: int, pairs: int, n: int, channels: int) -> Iterator[slice]:
    step = max(1, SCRATCH // max(1, pairs * n * 2 * max(n, channels // n)))
    return (slice(start, start + step) for start in range(0, views, step))


def _dense_product(probs: Tensor, tables: list[Tensor], grid: Grid, out: Tensor) -> None:
    """out [V, F, n, C] += the products of both directions; probs [2, V, F-1, n, n]."""
    views, frames, n, channels = out.shape
    width = _block_width(grid.w)
    rows = grid.w + width - 1
    for direction, table in enumerate(tables):
        windows = _windows(table.flip(0).view(*grid.offsets, channels), grid, width)
        for chunk in _chunks(views, frames - 1, n, channels):
            placed = _place(probs[direction, chunk].flatten(0, 1), grid, width, out.dtype)
            made = query_frames(out[chunk], direction).unflatten(2, (grid.h, -1, width))
            for y in range(grid.h):
                window = slice((grid.h - 1 - y) * rows, (2 * grid.h - 1 - y) * rows)
                for block, of_table in enumerate(windows):
                    product = torch.mm(placed[y, block], of_table[window])
                    made[:, :, y, block] += product.view(*made.shape[:2], width, channels)


def _dense_dtables(dout: Tensor, probs: Tensor, grid: Grid) -> list[Tensor]:
    """Both tables' gradients; dout [V, F, n, C], probs [2, V, F-1, n, n]."""
    views, frames, n, channels = dout.shape
    width = _block_width(grid.w)
    rows = grid.w + width - 1
    gradients = []
    for direction in range(2):
        turned = dout.new_zeros(*grid.offsets, channels)
        sums = [torch.zeros_like(t) for t in _windows(turned, grid, width)]
        for chunk in _chunks(views, frames - 1, n, channels):
            placed = _place(probs[direction, chunk].flatten(0, 1), grid, width, dout.dtype)
            given = query_frames(dout[chunk], direction).unflatten(2, (grid.h, -1, width))
            for y in range(grid.h):
                window = slice((grid.h - 1 - y) * rows, (2 * grid.h - 1 - y) * rows)
                for block, total in enumerate(sums):
                    total[window].addmm_(placed[y, block].t(), given[:, :, y, block].reshape(-1, channels))
        for start, total in zip(range(grid.w - width, -1, -width), sums, strict=True):
            turned[:, start : start + rows] += total.view(-1, rows, channels)
        gradients.append(turned.flatten(0, 1).flip(0))
    return gradients


# -- removed cells --


def _rows_of_queries(grid: Grid, view: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """For each row of the grid with kept cells: its queries, its window of the tables, and the offsets in it."""
    assert grid.cells is not None
    cells = grid.cells[view].contiguous()
    edges = torch.arange(0, (grid.h + 1) * grid.w, grid.w, dtype=cells.dtype, device=cells.device)
    bounds = torch.searchsorted(cells, edges).tolist()
    span = grid.offsets[1]
    for y in range(grid.h):
        queries = slice(bounds[y], bounds[y + 1])
        if queries.start < queries.stop:
            yield queries, slice(y * span, (y + grid.h) * span), relative(cells[queries], cells, grid) - y * span


def _scattered(probs: Tensor, offsets: Tensor, window: slice, dtype: torch.dtype) -> Tensor:
    """probs [P, queries, n] at their offsets [queries, n]: [P * queries, window]."""
    made = torch.zeros((*probs.shape[:2], window.stop - window.start), dtype=dtype, device=probs.device)
    return made.scatter_(2, offsets.expand(probs.shape), probs.to(dtype)).flatten(0, 1)


def _whole_tables(probs: Tensor, grid: Grid, dtype: torch.dtype) -> Iterator[tuple[slice, int, Tensor]]:
    """Some views at a time, with a direction: their probs at all offsets of a small grid, [views, (F-1) * n, offsets]."""
    assert grid.cells is not None
    _, views, pairs, n, _ = probs.shape
    step = max(1, SCRATCH // max(1, pairs * n * math.prod(grid.offsets)))
    for start in range(0, views, step):
        chunk = slice(start, start + step)
        offsets = relative(grid.cells[chunk], grid.cells[chunk], grid)
        for direction in range(2):
            seen = probs[direction, chunk].to(dtype)
            made = seen.new_zeros(*seen.shape[:3], math.prod(grid.offsets))
            made.scatter_(3, offsets.unsqueeze(1).expand(seen.shape), seen)
            yield chunk, direction, made.flatten(1, 2)


def _kept_product(probs: Tensor, tables: list[Tensor], grid: Grid, out: Tensor) -> None:
    if grid.h * grid.w <= FEW_CELLS:
        for chunk, direction, placed in _whole_tables(probs, grid, out.dtype):
            made = query_frames(out[chunk], direction)
            made += (placed @ tables[direction]).view(made.shape)
        return
    for view in range(out.shape[0]):
        for queries, window, offsets in _rows_of_queries(grid, view):
            for direction, table in enumerate(tables):
                placed = _scattered(probs[direction, view, :, queries], offsets, window, out.dtype)
                made = query_frames(out[view : view + 1], direction)[0, :, queries]
                made += torch.mm(placed, table[window]).view(made.shape)


def _kept_dtables(dout: Tensor, probs: Tensor, grid: Grid) -> list[Tensor]:
    channels = dout.shape[3]
    gradients = [dout.new_zeros(math.prod(grid.offsets), channels) for _ in range(2)]
    if grid.h * grid.w <= FEW_CELLS:
        for chunk, direction, placed in _whole_tables(probs, grid, dout.dtype):
            given = query_frames(dout[chunk], direction).reshape(-1, channels)
            gradients[direction].addmm_(placed.flatten(0, 1).t(), given)
        return gradients
    for view in range(dout.shape[0]):
        for queries, window, offsets in _rows_of_queries(grid, view):
            for direction, gradient in enumerate(gradients):
                placed = _scattered(probs[direction, view, :, queries], offsets, window, dout.dtype)
                given = query_frames(dout[view : view + 1], direction)[0, :, queries]
                gradient[window].addmm_(placed.t(), given.reshape(-1, channels))
    return gradients


# -- what the ops call --


def forward(q: Tensor, k: Tensor, tables: list[Tensor], grid: Grid, probs: Tensor) -> Tensor:
    """Fills probs; returns [V, F, n, C] fp32 or wider."""
    mean_probs(q, k, probs)
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tables]
    out = torch.zeros((*q.shape[:3], wide[0].shape[1]), dtype=wide[0].dtype, device=q.device)
    (_dense_product if grid.cells is None else _kept_product)(probs[..., : q.shape[2]], wide, grid, out)
    return out


def dtables(dout: Tensor, probs: Tensor, grid: Grid) -> list[Tensor]:
    """Gradients of both tables, fp32 or wider."""
    dout = dout.to(torch.promote_types(dout.dtype, torch.float32))
    probs = probs[..., : dout.shape[2]]
    return (_dense_dtables if grid.cells is None else _kept_dtables)(dout, probs, grid)


def dscores(dout: Tensor, q: Tensor, k: Tensor, tables: list[Tensor], grid: Grid) -> tuple[Tensor, Tensor]:
    """Gradients of q and k, fp32 or wider; probabilities are taken again, of as many pairs at a time as SCRATCH allows."""
    views, frames, n, heads, d = q.shape
    wide = torch.promote_types(torch.promote_types(q.dtype, tables[0].dtype), torch.float32)
    dq, dk = (torch.zeros(q.shape, dtype=wide, device=q.device) for _ in range(2))
    turned = [t.to(wide).t() for t in tables]
    scale = d**-0.5
    step = max(1, SCRATCH // max(1, n * max(heads * n, turned[0].shape[1])))
    everywhere = torch.arange(grid.h * grid.w, device=q.device)
    for view in range(views):
        cells = everywhere if grid.cells is None else grid.cells[view]
        offsets = relative(cells, cells, grid)
        for direction, table in enumerate(turned):
            for start in range(0, frames - 1, step):
                stop = min(start + step, frames - 1)
                from_q = slice(start + 1 - direction, stop + 1 - direction)
                from_k = slice(start + direction, stop + direction)
                queries = q[view, from_q].to(wide).transpose(1, 2)
                keys = k[view, from_k].to(wide).transpose(1, 2)
                soft = torch.softmax(queries @ keys.mT * scale, -1)
                by_offset = dout[view, from_q].to(wide) @ table
                given = by_offset.gather(2, offsets.expand(stop - start, -1, -1)).unsqueeze(1) * (scale / heads)
                ds = soft * (given - (soft * given).sum(-1, keepdim=True))
                dq[view, from_q] += (ds @ keys).transpose(1, 2)
                dk[view, from_k] += (ds.mT @ queries).transpose(1, 2)
    return dq, dk
