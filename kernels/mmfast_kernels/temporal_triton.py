"""EVL's temporal cross-attention, forward: mean probabilities of frame pairs, and their products with the tables.

A pair of frames is looked at in two directions: 0 is query frame pair + 1 with the frame before it, 1 is query frame
pair with the frame after it. A place is (direction, view, pair). Statistics first, then each tile of [n, n] adds up its
heads in registers, so that no head's probabilities reach memory. The product takes one query cell of many frames: they
all need the same rows of the tables, as many as there are keys and none of which is multiplied by nothing.
"""

import triton
import triton.language as tl

# -- kernels --


@triton.jit
def _places(place, views, pairs):
    """Direction, view and pair of a place."""
    return place // pairs // views, place // pairs % views, place % pairs


@triton.jit
def _block(ptr, start, row_stride, n, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] of the rows from `start` of a matrix [n, D]; what lies outside is 0."""
    rows = start + tl.arange(0, ROWS)
    cols = tl.arange(0, WIDTH)
    live = (rows < n)[:, None]
    if D < WIDTH:
        live = live & (cols < D)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * row_stride + cols[None, :], mask=live, other=0.0)


@triton.jit(do_not_specialize=["views", "pairs", "heads", "n", "tiles"])
def temporal_lse_kernel(
    q_ptr,  # [V, F, n, heads, D]
    k_ptr,  # [V, F, n, heads, D]
    lse_ptr,  # [2, V, F - 1, heads, n] fp32, in units of log2
    q_view,
    q_frame,
    q_cell,
    q_head,
    k_view,
    k_frame,
    k_cell,
    k_head,
    views,
    pairs,
    heads,
    n,
    tiles,  # of BM queries
    scale_log2,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # D or the next power of two
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    m0 = (program % tiles).to(tl.int32) * BM
    head = program // tiles % heads
    place = program // tiles // heads
    direction, view, pair = _places(place, views, pairs)
    q_ptr += view * q_view + (pair + 1 - direction) * q_frame + head * q_head
    k_ptr += view * k_view + (pair + direction) * k_frame + head * k_head
    q = _block(q_ptr, m0, q_cell, n, BM, D, WIDTH)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for n0 in range(0, n, BN):
        k = _block(k_ptr, n0, k_cell, n, BN, D, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where((n0 + tl.arange(0, BN) < n)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), 1)
        top = new_top
    rows = m0 + tl.arange(0, BM)
    tl.store(lse_ptr + (place * heads + head) * n + rows, top + tl.log2(total), mask=rows < n)


@triton.jit(do_not_specialize=["views", "pairs", "heads", "n", "q_tiles", "k_tiles"])
def temporal_probs_kernel(
    q_ptr,  # [V, F, n, heads, D]
    k_ptr,  # [V, F, n, heads, D]
    lse_ptr,  # [2, V, F - 1, heads, n] fp32
    probs_ptr,  # [2, V, F - 1, n, row]
    q_view,
    q_frame,
    q_cell,
    q_head,
    k_view,
    k_frame,
    k_cell,
    k_head,
    views,
    pairs,
    heads,
    n,
    row,  # n or a little more: the columns past n become 0
    q_tiles,
    k_tiles,
    scale_log2,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n0 = (program % k_tiles).to(tl.int32) * BN
    m0 = (program // k_tiles % q_tiles).to(tl.int32) * BM
    place = program // k_tiles // q_tiles
    direction, view, pair = _places(place, views, pairs)
    q_ptr += view * q_view + (pair + 1 - direction) * q_frame
    k_ptr += view * k_view + (pair + direction) * k_frame
    rows = m0 + tl.arange(0, BM)
    cols = n0 + tl.arange(0, BN)
    lse_ptr += place * heads * n
    total = tl.zeros([BM, BN], tl.float32)
    for head in range(heads):
        at = tl.cast(head, tl.int64)
        q = _block(q_ptr + at * q_head, m0, q_cell, n, BM, D, WIDTH)
        k = _block(k_ptr + at * k_head, n0, k_cell, n, BN, D, WIDTH)
        lse = tl.load(lse_ptr + at * n + rows, mask=rows < n, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        total += tl.exp2(scores * scale_log2 - lse[:, None])
    mean = tl.where((cols < n)[None, :], total / heads, 0.0)
    at = probs_ptr + (place * n + rows)[:, None] * row + cols[None, :]
    tl.store(at, mean.to(probs_ptr.dtype.element_ty), mask=(rows < n)[:, None] & (cols < row)[None, :])


@triton.jit(do_not_specialize=["views", "frames", "n", "row_tiles", "col_tiles"])
def temporal_tables_kernel(
    probs_ptr,  # [2, V, F - 1, n, row]
    w1_ptr,  # [(2 H - 1) (2 W - 1), n_cols]
    w2_ptr,
    cells_ptr,  # [V, n] int32, None where all cells are kept
    out_ptr,  # [V, F, n, n_cols]
    views,
    frames,
    n,
    row,
    n_cols,
    row_tiles,  # of BR frames
    col_tiles,  # of BC channels
    H: tl.constexpr,
    W: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One query cell of BR frames, of all views where these have the same cells, else of one. Channels are the rows of
    the product: they are many, frames may be 8."""
    program = tl.program_id(0).to(tl.int64)
    cols = (program % col_tiles).to(tl.int32) * BC + tl.arange(0, BC)
    rows = program // col_tiles % row_tiles * BR + tl.arange(0, BR)
    query = program // col_tiles // row_tiles % n
    group = program // col_tiles // row_tiles // n
    cell = query.to(tl.int32)
    if cells_ptr is None:
        view = rows // frames
        live_rows = rows < views.to(tl.int64) * frames
    else:
        view = group + tl.zeros([BR], tl.int64)
        live_rows = rows < frames
        cells_ptr += group * n
        cell = tl.load(cells_ptr + query)
    frame = rows % frames
    live_cols = cols < n_cols
    acc = tl.zeros([BC, BR], tl.float32)
    for direction in tl.static_range(2):
        w_ptr = w2_ptr if direction else w1_ptr
        pair = frame - 1 + direction
        live = live_rows & (pair >= 0) & (pair < frames - 1)
        place = (direction * views + view) * (frames - 1) + pair
        p_at = probs_ptr + ((place * n + query) * row)[:, None]
        for k0 in range(0, n, BK):
            keys = k0 + tl.arange(0, BK)
            probs = tl.load(p_at + keys[None, :], mask=live[:, None] & (keys < row)[None, :], other=0.0)
            key = keys
            if cells_ptr is not None:
                key = tl.load(cells_ptr + keys, mask=keys < n, other=0)
            away = (cell // W - key // W + (H - 1)) * (2 * W - 1) + cell % W - key % W + (W - 1)
            known = (keys < n) & (away >= 0) & (away < (2 * H - 1) * (2 * W - 1))
            w_at = w_ptr + away.to(tl.int64)[:, None] * n_cols + cols[None, :]
            w = tl.load(w_at, mask=known[:, None] & live_cols[None, :], other=0.0)
            acc = tl.dot(tl.trans(w), tl.trans(probs), acc, input_precision=PRECISION)
    out_at = out_ptr + (((view * frames + frame) * n + query) * n_cols)[:, None] + cols[None, :]
    out = tl.trans(acc).to(out_ptr.dtype.element_ty)
    tl.store(out_at, out, mask=live_rows[:, None] & live_cols[None, :])
