"""Triton kernels of the backward of ted.py.

The rows' gradient is a stencil like the forward. The parameters' are sums over all rows: a fixed number of programs, each
with its share of the blocks of sites, writes them as partials in fp32, and a last kernel adds those in a fixed order.
"""

# mypy: disable-error-code="assignment"
import triton
import triton.language as tl

from mmfast_kernels.ted_triton import around, load_block, load_tap, load_taps, places_of, sites_of, store_block


@triton.jit
def ted_backward_rows_kernel(
    dout_ptr,  # [T, TIME + SPACE]
    time_taps_ptr,  # [3, TIME]
    space_taps_ptr,  # [9, SPACE]
    sites_ptr,  # [U, 12] int32
    dh_ptr,  # [T, TIME + SPACE]
    dout_stride,
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
        first_tap = load_tap(time_taps_ptr, cols, live_cols, 0, TIME)
        middle_tap = load_tap(time_taps_ptr, cols, live_cols, 1, TIME)
        last_tap = load_tap(time_taps_ptr, cols, live_cols, 2, TIME)
        before = tl.zeros([BS, BC], tl.float32)
        here = load_block(dout_ptr, rows, dout_stride, live, cols, live_cols)
        for t in range(frames):
            after = load_block(dout_ptr, rows + step, dout_stride, live & (t + 1 < frames), cols, live_cols)
            value = first_tap * after + middle_tap * here + last_tap * before
            store_block(dh_ptr, rows, WIDTH, live, cols, live_cols, value)
            before = here
            here = after
            rows += step
    else:
        cols = (part - tl.cdiv(TIME, BC)) * BC + tl.arange(0, BC)
        live_cols = cols < SPACE
        away, there = places_of(sites_ptr, site, live)
        taps = load_taps(space_taps_ptr, cols, live_cols, True, SPACE)
        # Frame t has what comes around at t less what comes at t + 1; the first frame's difference is nobody's.
        here = tl.zeros([BS, BC], tl.float32)
        for t in range(frames):
            after = tl.zeros([BS, BC], tl.float32)
            if t + 1 < frames:
                after = around(dout_ptr, taps, away, there, rows + step, dout_stride, TIME + cols, live_cols)
            store_block(dh_ptr, rows, WIDTH, live, TIME + cols, live_cols, here - after)
            here = after
            rows += step


@triton.jit
def _store_sum(p_ptr, program, SUMS: tl.constexpr, INDEX: tl.constexpr, WIDTH: tl.constexpr, cols, live_cols, value):
    """One program's row INDEX of partials [programs, SUMS, WIDTH]."""
    tl.store(p_ptr + (program * SUMS + INDEX) * WIDTH + cols, value, mask=live_cols)


@triton.jit
def ted_backward_sums_kernel(
    dout_ptr,  # [T, TIME + SPACE]
    h_ptr,  # [T, TIME + SPACE]
    time_shift_ptr,  # [TIME]
    time_taps_ptr,  # [3, TIME]
    sites_ptr,  # [U, 12] int32
    time_ptr,  # [programs, 5, TIME] fp32: of dout times the three frames, of dout, of dh
    space_ptr,  # [programs, 18, SPACE] fp32: of the changes of dout times the nine cells, of dout where there is such a cell
    dout_stride,
    h_stride,
    n_sites,
    frames,
    blocks,  # of sites
    all_blocks,  # of all copies
    TIME: tl.constexpr,
    SPACE: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    part = tl.program_id(1).to(tl.int64)
    if part < tl.cdiv(TIME, BC):
        cols = part * BC + tl.arange(0, BC)
        live_cols = cols < TIME
        shift = load_tap(time_shift_ptr, cols, live_cols, 0, TIME)
        first = tl.zeros([BS, BC], tl.float32)
        middle = tl.zeros([BS, BC], tl.float32)
        last = tl.zeros([BS, BC], tl.float32)
        total = tl.zeros([BS, BC], tl.float32)
        begin = tl.zeros([BS, BC], tl.float32)  # dout of the first frames, and of the last: they have one tap less
        end = tl.zeros([BS, BC], tl.float32)
        for block in range(program, all_blocks, programs):
            site, live, rows, step = sites_of(sites_ptr, block, blocks, n_sites, frames, BS)
            dout = load_block(dout_ptr, rows, dout_stride, live, cols, live_cols)
            h = load_block(h_ptr, rows, h_stride, live, cols, live_cols) + shift
            begin += dout
            for t in range(frames):
                total += dout
                middle += dout * h
                rows += step
                more = live & (t + 1 < frames)
                next_dout = load_block(dout_ptr, rows, dout_stride, more, cols, live_cols)
                next_h = load_block(h_ptr, rows, h_stride, more, cols, live_cols) + shift
                first += next_dout * h
                last += tl.where(t + 1 < frames, dout * next_h, 0.0)
                end += tl.where(t + 1 < frames, 0.0, dout)
                dout = next_dout
                h = next_h
        _store_sum(time_ptr, program, 5, 0, TIME, cols, live_cols, tl.sum(first, 0))
        _store_sum(time_ptr, program, 5, 1, TIME, cols, live_cols, tl.sum(middle, 0))
        _store_sum(time_ptr, program, 5, 2, TIME, cols, live_cols, tl.sum(last, 0))
        _store_sum(time_ptr, program, 5, 3, TIME, cols, live_cols, tl.sum(total, 0))
        grown = total * load_tap(time_taps_ptr, cols, live_cols, 1, TIME)
        grown += (total - begin) * load_tap(time_taps_ptr, cols, live_cols, 0, TIME)
        grown += (total - end) * load_tap(time_taps_ptr, cols, live_cols, 2, TIME)
        _store_sum(time_ptr, program, 5, 4, TIME, cols, live_cols, tl.sum(grown, 0))
    elif part < tl.cdiv(TIME, BC) + tl.cdiv(SPACE, BC):
        cols = (part - tl.cdiv(TIME, BC)) * BC + tl.arange(0, BC)
        live_cols = cols < SPACE
        sums = ()
        for _k in tl.static_range(9):
            sums = sums + (tl.zeros([BS, BC], tl.float32),)
        for block in range(program, all_blocks, programs):
            site, live, rows, step = sites_of(sites_ptr, block, blocks, n_sites, frames, BS)
            away, there = places_of(sites_ptr, site, live)
            here = load_block(dout_ptr, rows, dout_stride, there[4], TIME + cols, live_cols)
            for t in range(frames):
                more = there[4] & (t + 1 < frames)
                after = load_block(dout_ptr, rows + step, dout_stride, more, TIME + cols, live_cols)
                change = tl.where(t > 0, here, 0.0) - after
                grown = ()
                for k in tl.static_range(9):
                    cells = load_block(h_ptr, rows + away[k], h_stride, there[k], TIME + cols, live_cols)
                    grown = grown + (sums[k] + change * cells,)
                sums = grown
                here = after
                rows += step
        for k in tl.static_range(9):
            _store_sum(space_ptr, program, 18, k, SPACE, cols, live_cols, tl.sum(sums[k], 0))
    else:
        cols = (part - tl.cdiv(TIME, BC) - tl.cdiv(SPACE, BC)) * BC + tl.arange(0, BC)
        live_cols = cols < SPACE
        counts = ()
        for _k in tl.static_range(9):
            counts = counts + (tl.zeros([BC], tl.float32),)
        for block in range(program, all_blocks, programs):
            site, live, rows, step = sites_of(sites_ptr, block, blocks, n_sites, frames, BS)
            away, there = places_of(sites_ptr, site, live)
            total = tl.zeros([BS, BC], tl.float32)
            for _t in range(frames):
                total += load_block(dout_ptr, rows, dout_stride, there[4], TIME + cols, live_cols)
                rows += step
            counted = ()
            for k in tl.static_range(9):
                counted = counted + (counts[k] + tl.sum(tl.where(there[k][:, None], total, 0.0), 0),)
            counts = counted
        for k in tl.static_range(9):
            _store_sum(space_ptr, program, 18, 9 + k, SPACE, cols, live_cols, counts[k])


@triton.jit
def _joined(p_ptr, SUMS: tl.constexpr, INDEX: tl.constexpr, WIDTH: tl.constexpr, cols, live_cols, n, PROGRAMS, COLUMNS):
    """The sum over n programs of row INDEX of partials [n, SUMS, WIDTH]: [COLUMNS]."""
    total = tl.zeros([PROGRAMS, COLUMNS], tl.float32)
    for first in range(0, n, PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)
        offsets = (program * SUMS + INDEX)[:, None] * WIDTH + cols[None, :]
        total += tl.load(p_ptr + offsets, mask=(program < n)[:, None] & live_cols[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _store(p_ptr, offsets, live_cols, value):
    tl.store(p_ptr + offsets, value.to(p_ptr.dtype.element_ty), mask=live_cols)


@triton.jit
def ted_backward_join_kernel(
    time_ptr,  # [programs, 5, TIME] fp32
    space_ptr,  # [programs, 18, SPACE] fp32
    space_shift_ptr,  # [SPACE]
    space_taps_ptr,  # [SPACE, 9]
    dtime_shift_ptr,  # [TIME]
    dtime_taps_ptr,  # [TIME, 3]
    dtime_bias_ptr,  # [TIME]
    dspace_shift_ptr,  # [SPACE]
    dspace_taps_ptr,  # [SPACE, 9]
    dspace_bias_ptr,  # [SPACE]
    programs,
    TIME: tl.constexpr,
    SPACE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    if part < tl.cdiv(TIME, COLUMNS):
        cols = part * COLUMNS + tl.arange(0, COLUMNS)
        live = cols < TIME
        for k in tl.static_range(3):
            _store(
                dtime_taps_ptr,
                cols * 3 + k,
                live,
                _joined(time_ptr, 5, k, TIME, cols, live, programs, PROGRAMS, COLUMNS),
            )
        _store(dtime_bias_ptr, cols, live, _joined(time_ptr, 5, 3, TIME, cols, live, programs, PROGRAMS, COLUMNS))
        _store(dtime_shift_ptr, cols, live, _joined(time_ptr, 5, 4, TIME, cols, live, programs, PROGRAMS, COLUMNS))
    else:
        cols = (part - tl.cdiv(TIME, COLUMNS)) * COLUMNS + tl.arange(0, COLUMNS)
        live = cols < SPACE
        shift = tl.load(space_shift_ptr + cols, mask=live, other=0.0).to(tl.float32)
        dshift = tl.zeros([COLUMNS], tl.float32)
        for k in tl.static_range(9):
            count = _joined(space_ptr, 18, 9 + k, SPACE, cols, live, programs, PROGRAMS, COLUMNS)
            dshift += count * tl.load(space_taps_ptr + cols * 9 + k, mask=live, other=0.0).to(tl.float32)
            dtaps = _joined(space_ptr, 18, k, SPACE, cols, live, programs, PROGRAMS, COLUMNS) + shift * count
            _store(dspace_taps_ptr, cols * 9 + k, live, dtaps)
            if k == 4:
                _store(dspace_bias_ptr, cols, live, count)
        _store(dspace_shift_ptr, cols, live, dshift)
