"""EVL's temporal cross-attention, gradients of the tables.

    dw_r = sum over places and queries of the probability of the key at offset r from the query, times dout

A program has one row of offsets (all that differ in x only), BC channels and every SPLITS-th place. Queries whose key
would lie above or below the grid are never read; those beside it are 0 in the tile.
"""

import triton
import triton.language as tl

# -- kernels --


@triton.jit(do_not_specialize=["views", "pairs", "n", "col_tiles"])
def temporal_dtables_kernel(
    dout_ptr,  # [V, F, n, n_cols]
    probs_ptr,  # [2, V, F - 1, n, row]
    cells_ptr,  # [V, n] int32, None where all cells are kept
    slots_ptr,  # [V, H * W] int32, which of the n a cell is, -1 where it is removed; None as cells
    starts_ptr,  # [V, H + 1] int32, kept cells above each row of the grid; None as cells
    sums_ptr,  # [SPLITS, 2, (2 H - 1) (2 W - 1), n_cols] fp32
    dout_view,
    dout_frame,
    dout_cell,
    views,
    pairs,
    n,
    row,
    n_cols,
    col_tiles,
    H: tl.constexpr,
    W: tl.constexpr,
    BINS: tl.constexpr,  # 2 W - 1 or the next power of two
    BC: tl.constexpr,
    BQ: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = (program % col_tiles).to(tl.int32) * BC + tl.arange(0, BC)
    offset = (program // col_tiles % (2 * H - 1)).to(tl.int32)
    direction = program // col_tiles // (2 * H - 1) % 2
    split = program // col_tiles // (2 * H - 1) // 2
    down = offset - (H - 1)
    first_y = tl.maximum(down, 0)
    last_y = tl.minimum(H + down, H)
    bins = tl.arange(0, BINS)
    live_cols = cols < n_cols
    acc = tl.zeros([BC, BINS], tl.float32)
    # Divided in 32 bits: the 64-bit division is a call, around which registers are spilled.
    for place in range(split.to(tl.int32), views * pairs, SPLITS):
        view = (place // pairs).to(tl.int64)
        pair = place % pairs
        p_ptr = probs_ptr + (direction * (views * pairs) + place) * n * row
        g_ptr = dout_ptr + view * dout_view + (pair + 1 - direction) * dout_frame
        first = first_y * W
        last = last_y * W
        if cells_ptr is not None:
            first = tl.load(starts_ptr + view * (H + 1) + first_y)
            last = tl.load(starts_ptr + view * (H + 1) + last_y)
        for q0 in range(first, last, BQ):
            queries = q0 + tl.arange(0, BQ)
            live = queries < last
            cell = queries
            if cells_ptr is not None:
                cell = tl.load(cells_ptr + view * n + queries, mask=live, other=0)
            x = (cell % W)[:, None] - bins[None, :] + (W - 1)
            there = live[:, None] & (x >= 0) & (x < W) & (bins < 2 * W - 1)[None, :]
            key = (cell // W - down)[:, None] * W + x
            if cells_ptr is not None:
                key = tl.load(slots_ptr + view * (H * W) + key, mask=there, other=-1)
                there = there & (key >= 0)
            at = p_ptr + queries.to(tl.int64)[:, None] * row + key
            probs = tl.load(at, mask=there, other=0.0)
            g_at = g_ptr + queries.to(tl.int64)[:, None] * dout_cell + cols[None, :]
            g = tl.load(g_at, mask=live[:, None] & live_cols[None, :], other=0.0).to(probs.dtype)
            acc = tl.dot(tl.trans(g), probs, acc, input_precision=PRECISION)
    rows = ((split * 2 + direction) * (2 * H - 1) + offset) * (2 * W - 1) + bins
    live_bins = (bins < 2 * W - 1)[:, None]
    tl.store(sums_ptr + rows[:, None] * n_cols + cols[None, :], tl.trans(acc), mask=live_bins & live_cols[None, :])
