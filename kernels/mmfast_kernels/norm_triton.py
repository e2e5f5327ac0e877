"""Triton kernel of norm.py.

A program takes ROWS rows. A row is held in registers as a tuple of pieces of CHUNK columns, so that a width such as
384 = 3 * 128 leaves no lane idle; where CHUNK columns fit one warp, nothing crosses a barrier.
"""

# mypy: disable-error-code="assignment"
import triton
import triton.language as tl

from mmfast_kernels.overlap_triton import begin


@triton.jit
def _piece_mask(live, START: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    if START + CHUNK <= D:
        return live[:, None]
    else:
        return live[:, None] & (START + tl.arange(0, CHUNK) < D)[None, :]


@triton.jit
def load_piece(x_ptr, rows, stride, live, START: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """Columns START to START + CHUNK of rows of x, in fp32; columns beyond D and dead rows are 0."""
    offsets = rows[:, None] * stride + (START + tl.arange(0, CHUNK))[None, :]
    return tl.load(x_ptr + offsets, mask=_piece_mask(live, START, D, CHUNK), other=0.0).to(tl.float32)


@triton.jit
def load_rows(x_ptr, rows, stride, live, D: tl.constexpr, CHUNK: tl.constexpr):
    """Rows of x in fp32 as a tuple of [ROWS, CHUNK] pieces; columns beyond D and dead rows are 0."""
    pieces = ()
    for start in tl.static_range(0, D, CHUNK):
        pieces = pieces + (load_piece(x_ptr, rows, stride, live, start, D, CHUNK),)
    return pieces


@triton.jit
def store_piece(y_ptr, rows, live, piece, START: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """Columns START to START + CHUNK of rows of a contiguous [R, D] tensor."""
    offsets = rows[:, None] * D + (START + tl.arange(0, CHUNK))[None, :]
    tl.store(y_ptr + offsets, piece.to(y_ptr.dtype.element_ty), mask=_piece_mask(live, START, D, CHUNK))


@triton.jit
def load_columns(p_ptr, START: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """Columns START to START + CHUNK of a [D] parameter, as a [1, CHUNK] row in fp32."""
    cols = START + tl.arange(0, CHUNK)
    if START + CHUNK <= D:
        return tl.load(p_ptr + cols).to(tl.float32)[None, :]
    else:
        return tl.load(p_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def row_statistics(pieces, eps, D: tl.constexpr, CHUNK: tl.constexpr):
    """Mean and 1 / standard deviation of every row; the variance is taken from centred values."""
    total = pieces[0]
    for i in tl.static_range(1, len(pieces)):
        total += pieces[i]
    mean = tl.sum(total, 1) / D
    squares = tl.zeros_like(total)
    for i in tl.static_range(len(pieces)):
        centred = pieces[i] - mean[:, None]
        if (i + 1) * CHUNK > D:
            centred = tl.where((i * CHUNK + tl.arange(0, CHUNK) < D)[None, :], centred, 0.0)
        squares += centred * centred
    return mean, tl.rsqrt(tl.sum(squares, 1) / D + eps)


@triton.jit
def norm_kernel(
    x_ptr,  # [R, D]
    branch_ptr,  # [R, D] | None
    gamma_ptr,  # [D] | None
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    sum_ptr,  # [R, D] of x's dtype | None without a branch
    y_ptr,  # [R, D]
    mean_ptr,  # [R] fp32 | None
    rstd_ptr,  # [R] fp32 | None
    x_stride,
    branch_stride,
    n_rows,
    eps,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    pieces = load_rows(x_ptr, rows, x_stride, live, D, CHUNK)
    if branch_ptr is not None:
        branches = load_rows(branch_ptr, rows, branch_stride, live, D, CHUNK)
        sums = ()
        for i in tl.static_range(len(pieces)):
            branch = branches[i]
            if gamma_ptr is not None:
                branch = branch * load_columns(gamma_ptr, i * CHUNK, D, CHUNK)
            # The norm sees what is stored, so that a backward can start from the stored sum.
            stored = (pieces[i] + branch).to(sum_ptr.dtype.element_ty)
            store_piece(sum_ptr, rows, live, stored, i * CHUNK, D, CHUNK)
            sums = sums + (stored.to(tl.float32),)
        pieces = sums
    mean, rstd = row_statistics(pieces, eps, D, CHUNK)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=live)
        tl.store(rstd_ptr + rows, rstd, mask=live)
    for i in tl.static_range(len(pieces)):
        y = (pieces[i] - mean[:, None]) * rstd[:, None] * load_columns(weight_ptr, i * CHUNK, D, CHUNK)
        store_piece(y_ptr, rows, live, y + load_columns(bias_ptr, i * CHUNK, D, CHUNK), i * CHUNK, D, CHUNK)
