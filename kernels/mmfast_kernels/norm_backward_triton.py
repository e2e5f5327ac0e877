"""Triton kernels of the backward of norm.py.

A few programs a multiprocessor walk over all rows. Each keeps its share of the parameters' gradients in fp32 registers
and writes it once, [programs, D]; column_sums_kernel adds the shares in a fixed order, so no atomics are needed.
"""

# mypy: disable-error-code="assignment"
import triton
import triton.language as tl

from mmfast_kernels.norm_triton import load_piece, store_piece


@triton.jit
def _load_columns(p_ptr, rows, live, START: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """A [D] parameter's columns, once a row: a load in the layout of the rows needs no exchange between warps."""
    return load_piece(p_ptr, rows, 0, live, START, D, CHUNK)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _zeros(ROWS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    pieces = ()
    for _ in tl.static_range(0, D, CHUNK):
        pieces = pieces + (tl.zeros([ROWS, CHUNK], tl.float32),)
    return pieces


@triton.jit
def _store_share(partials_ptr, share, index, D: tl.constexpr, CHUNK: tl.constexpr):
    """This program's row of the index-th [programs, D] of partials: a share summed over its rows."""
    row = index * tl.num_programs(0) + tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    for i in tl.static_range(len(share)):
        store_piece(partials_ptr, row, row >= 0, tl.sum(share[i], 0)[None, :], i * CHUNK, D, CHUNK)


@triton.jit
def norm_backward_kernel(
    ds_ptr,  # [R, D] | None
    dy_ptr,  # [R, D]
    s_ptr,  # [R, D]
    branch_ptr,  # [R, D] | None without DGAMMA
    gamma_ptr,  # [D] | None
    weight_ptr,  # [D]
    mean_ptr,  # [R] fp32
    rstd_ptr,  # [R] fp32
    dx_ptr,  # [R, D] | None
    dbranch_ptr,  # [R, D] | None
    partials_ptr,  # [k, programs, D] fp32: dweight, dbias with PARAMS, and dgamma, at LAST, with DGAMMA | None
    ds_stride,
    dy_stride,
    s_stride,
    branch_stride,
    n_rows,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PARAMS: tl.constexpr,
    DGAMMA: tl.constexpr,
    LAST: tl.constexpr,
):
    dweight = _zeros(ROWS, D if PARAMS else 0, CHUNK)
    dbias = _zeros(ROWS, D if PARAMS else 0, CHUNK)
    dgamma = _zeros(ROWS, D if DGAMMA else 0, CHUNK)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        live = rows < n_rows
        mean = tl.load(mean_ptr + rows, mask=live, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=live, other=0.0)[:, None]
        normed = ()
        scaled = ()
        grown_weight = ()
        grown_bias = ()
        along = tl.zeros([ROWS, CHUNK], tl.float32)
        total = tl.zeros([ROWS, CHUNK], tl.float32)
        for start in tl.static_range(0, D, CHUNK):
            xhat = (load_piece(s_ptr, rows, s_stride, live, start, D, CHUNK) - mean) * rstd
            dy = load_piece(dy_ptr, rows, dy_stride, live, start, D, CHUNK)
            g = dy * _load_columns(weight_ptr, rows, live, start, D, CHUNK)
            along += g * xhat
            total += g
            if PARAMS:
                grown_weight = grown_weight + (dweight[start // CHUNK] + dy * xhat,)
                grown_bias = grown_bias + (dbias[start // CHUNK] + dy,)
            normed = normed + (xhat,)
            scaled = scaled + (g,)
        dweight = grown_weight
        dbias = grown_bias
        along_sum, total_sum = tl.reduce((along, total), 1, _add_pairs)
        along_mean = (along_sum / D)[:, None]
        total_mean = (total_sum / D)[:, None]
        grown_gamma = ()
        for start in tl.static_range(0, D, CHUNK):
            dx = (scaled[start // CHUNK] - normed[start // CHUNK] * along_mean - total_mean) * rstd
            if ds_ptr is not None:
                dx += load_piece(ds_ptr, rows, ds_stride, live, start, D, CHUNK)
            if dx_ptr is not None:
                store_piece(dx_ptr, rows, live, dx, start, D, CHUNK)
            if DGAMMA:
                branch = load_piece(branch_ptr, rows, branch_stride, live, start, D, CHUNK)
                grown_gamma = grown_gamma + (dgamma[start // CHUNK] + dx * branch,)
            if dbranch_ptr is not None:
                if gamma_ptr is not None:
                    dx *= _load_columns(gamma_ptr, rows, live, start, D, CHUNK)
                store_piece(dbranch_ptr, rows, live, dx, start, D, CHUNK)
        dgamma = grown_gamma
    if PARAMS:
        _store_share(partials_ptr, dweight, 0, D, CHUNK)
        _store_share(partials_ptr, dbias, 1, D, CHUNK)
    if DGAMMA:
        _store_share(partials_ptr, dgamma, LAST, D, CHUNK)


@triton.jit
def _column_sum(partials_ptr, out_ptr, index, programs, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    if tl.program_id(1).to(tl.int64) == index:
        cols = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, programs, ROWS):
            rows = first + tl.arange(0, ROWS)
            live = (rows < programs)[:, None] & (cols < D)[None, :]
            offsets = (index * programs + rows)[:, None] * D + cols[None, :]
            total += tl.load(partials_ptr + offsets, mask=live, other=0.0)
        tl.store(out_ptr + cols, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def column_sums_kernel(
    partials_ptr,  # [k, programs, D] fp32
    first_ptr,  # [D]
    second_ptr,  # [D] | None
    third_ptr,  # [D] | None
    programs,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over programs: COLUMNS columns of one of the k gradients, which the grid's second axis counts."""
    _column_sum(partials_ptr, first_ptr, 0, programs, D, ROWS, COLUMNS)
    if second_ptr is not None:
        _column_sum(partials_ptr, second_ptr, 1, programs, D, ROWS, COLUMNS)
    if third_ptr is not None:
        _column_sum(partials_ptr, third_ptr, 2, programs, D, ROWS, COLUMNS)
