"""Triton kernel of ted.py.

A program has BS sites of one copy and BC columns of one branch, and walks over the frames: the branch over time then
reads each row once; that over space takes the nine taps of h itself and the difference to what they gave a frame before.
"""

# mypy: disable-error-code="assignment"
import triton
import triton.language as tl

WORDS = tl.constexpr(12)  # of a site in the table
FIRST = tl.constexpr(9)
STEP = tl.constexpr(10)
NO_SITE = tl.constexpr(-(2**31))


@triton.jit
def load_block(p_ptr, rows, stride, live_rows, cols, live_cols):
    """[BS, BC] of rows in fp32; 0 for dead rows and columns."""
    offsets = rows[:, None] * stride + cols[None, :]
    return tl.load(p_ptr + offsets, mask=live_rows[:, None] & live_cols[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_tap(p_ptr, cols, live_cols, K: tl.constexpr, WIDTH: tl.constexpr):
    """Row K of a parameter [taps, WIDTH], as [1, BC] in fp32."""
    return tl.load(p_ptr + K * WIDTH + cols, mask=live_cols, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_block(p_ptr, rows, stride, live_rows, cols, live_cols, value):
    offsets = rows[:, None] * stride + cols[None, :]
    tl.store(p_ptr + offsets, value.to(p_ptr.dtype.element_ty), mask=live_rows[:, None] & live_cols[None, :])


@triton.jit
def sites_of(sites_ptr, block, blocks, n_sites, frames, BS: tl.constexpr):
    """The sites of one block: their numbers, whether they are any, their first rows, and rows from frame to frame."""
    site = block % blocks * BS + tl.arange(0, BS)
    live = site < n_sites
    first = tl.load(sites_ptr + site * WORDS + FIRST, mask=live, other=0).to(tl.int64)
    step = tl.load(sites_ptr + site * WORDS + STEP, mask=live, other=0).to(tl.int64)
    return site, live, first + block // blocks * (frames * n_sites.to(tl.int64)), step


@triton.jit
def places_of(sites_ptr, site, live):
    """Distances in rows to the nine cells around, and whether there are such: two tuples of [BS]."""
    away = ()
    there = ()
    for k in tl.static_range(9):
        place = tl.load(sites_ptr + site * WORDS + k, mask=live, other=NO_SITE)
        away = away + (tl.where(place != NO_SITE, place, 0),)
        there = there + (place != NO_SITE,)
    return away, there


@triton.jit
def load_taps(p_ptr, cols, live_cols, FLIP: tl.constexpr, WIDTH: tl.constexpr):
    """The nine taps over space; with FLIP the other way round."""
    taps = ()
    for k in tl.static_range(9):
        taps = taps + (load_tap(p_ptr, cols, live_cols, 8 - k if FLIP else k, WIDTH),)
    return taps


@triton.jit
def around(p_ptr, taps, away, there, rows, stride, cols, live_cols):
    """Sum over the nine cells around of taps times rows of p."""
    total = load_block(p_ptr, rows + away[0], stride, there[0], cols, live_cols) * taps[0]
    for k in tl.static_range(1, 9):
        total += load_block(p_ptr, rows + away[k], stride, there[k], cols, live_cols) * taps[k]
    return total


@triton.jit
def ted_stencil_kernel(
    h_ptr,  # [T, TIME + SPACE]
    time_shift_ptr,  # [TIME]
    time_taps_ptr,  # [3, TIME]
    time_bias_ptr,  # [TIME]
    space_shift_ptr,  # [SPACE]
    space_taps_ptr,  # [9, SPACE]
    space_bias_ptr,  # [SPACE]
    sites_ptr,  # [U, 12] int32
    out_ptr,  # [T, TIME + SPACE]
    h_stride,
    n_sites,
    frames,
    blocks,  # of sites
    TIME: tl.constexpr,
    SPACE: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    WIDTH: tl.constexpr = TIME + SPACE
    site, live, rows, step = sites_of(sites_ptr, tl.program_id(0).to(tl.int64), blocks, n_sites, frames, BS)
    part = tl.program_id(1).to(tl.int64)
    if part < tl.cdiv(TIME, BC):
        cols = part * BC + tl.arange(0, BC)
        live_cols = cols < TIME
        shift = load_tap(time_shift_ptr, cols, live_cols, 0, TIME)
        bias = load_tap(time_bias_ptr, cols, live_cols, 0, TIME)
        first_tap = load_tap(time_taps_ptr, cols, live_cols, 0, TIME)
        middle_tap = load_tap(time_taps_ptr, cols, live_cols, 1, TIME)
        last_tap = load_tap(time_taps_ptr, cols, live_cols, 2, TIME)
        before = tl.zeros([BS, BC], tl.float32)
        here = load_block(h_ptr, rows, h_stride, live, cols, live_cols) + shift
        for t in range(frames):
            more = t + 1 < frames
            after = load_block(h_ptr, rows + step, h_stride, live & more, cols, live_cols)
            after = tl.where(more, after + shift, 0.0)
            value = bias + first_tap * before + middle_tap * here + last_tap * after
            store_block(out_ptr, rows, WIDTH, live, cols, live_cols, value)
            before = here
            here = after
            rows += step
    else:
        cols = (part - tl.cdiv(TIME, BC)) * BC + tl.arange(0, BC)
        live_cols = cols < SPACE
        away, there = places_of(sites_ptr, site, live)
        taps = load_taps(space_taps_ptr, cols, live_cols, False, SPACE)
        # What the added bias comes to: the sum of the taps whose cell is there.
        constant = tl.zeros([BS, BC], tl.float32)
        for k in tl.static_range(9):
            constant += tl.where(there[k][:, None], taps[k], 0.0)
        constant *= load_tap(space_shift_ptr, cols, live_cols, 0, SPACE)
        bias = load_tap(space_bias_ptr, cols, live_cols, 0, SPACE)
        constant = tl.where(there[4][:, None], constant + bias, 0.0)
        before = tl.zeros([BS, BC], tl.float32)
        for t in range(frames):
            here = around(h_ptr, taps, away, there, rows, h_stride, TIME + cols, live_cols)
            value = constant + tl.where(t > 0, here - before, 0.0)
            store_block(out_ptr, rows, WIDTH, live, TIME + cols, live_cols, value)
            before = here
            rows += step
