"""Triton kernels of fp8.py: rows rounded to e4m3, and a product of such rows over tensor descriptors or over pointers."""

# mypy: disable-error-code="assignment"
import triton
import triton.language as tl

from mmfast_kernels.mlp_triton import gelu
from mmfast_kernels.norm_triton import load_columns, load_rows, row_statistics, store_piece
from mmfast_kernels.overlap_triton import begin


@triton.jit
def fp8_rows_kernel(
    x_ptr,  # [R, D]
    branch_ptr,  # [R, D] | None
    weight_ptr,  # [D] | None: without it there is no norm
    bias_ptr,  # [D] | None
    bound_ptr,  # [2] fp32 | None: of the weight that the rows are for
    total_ptr,  # [R, D] of x's dtype | None without a branch
    rows_ptr,  # [R, D] e4m3
    scale_ptr,  # [R] fp32
    bound_scale_ptr,  # [R] fp32 | None
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
            stored = (pieces[i] + branches[i]).to(total_ptr.dtype.element_ty)
            store_piece(total_ptr, rows, live, stored, i * CHUNK, D, CHUNK)
            sums = sums + (stored.to(tl.float32),)
        pieces = sums
    if weight_ptr is not None:
        mean, rstd = row_statistics(pieces, eps, D, CHUNK)
        normed = ()
        for i in tl.static_range(len(pieces)):
            # Columns beyond D have weight and bias 0, and count for nothing below.
            y = (pieces[i] - mean[:, None]) * rstd[:, None] * load_columns(weight_ptr, i * CHUNK, D, CHUNK)
            normed = normed + (y + load_columns(bias_ptr, i * CHUNK, D, CHUNK),)
        pieces = normed
    most = tl.abs(pieces[0])
    faults = pieces[0] * 0.0  # NaN where a number is not finite, which a maximum need not show
    squares = pieces[0] * pieces[0]
    for i in tl.static_range(1, len(pieces)):
        most = tl.maximum(most, tl.abs(pieces[i]))
        faults += pieces[i] * 0.0
        squares += pieces[i] * pieces[i]
    largest = tl.max(most, 1)
    fault = tl.sum(faults, 1)
    scale = tl.where(largest < 1e-30, 0.0, largest / 448.0)
    tl.store(scale_ptr + rows, scale + fault, mask=live)
    if bound_ptr is not None:
        norm = tl.sqrt(tl.sum(squares, 1))
        bound = norm * tl.load(bound_ptr) + tl.load(bound_ptr + 1)
        tl.store(bound_scale_ptr + rows, bound / 448.0 + fault, mask=live)
    inverse = 1.0 / tl.where(scale > 0.0, scale, float("inf"))
    for i in tl.static_range(len(pieces)):
        store_piece(rows_ptr, rows, live, pieces[i] * inverse[:, None], i * CHUNK, D, CHUNK)


@triton.jit
def _finished(
    acc, row_scale, out_scale, weight_scale_ptr, bias_ptr, cols, n_cols, GELU: tl.constexpr, APPROX: tl.constexpr
):
    """From the sums to what is stored, but for the residual.   row_scale: [BM].   out_scale: [BM] | None."""
    live = cols < n_cols
    h = acc * row_scale[:, None] * tl.load(weight_scale_ptr + cols, mask=live, other=0.0)[None, :]
    if bias_ptr is not None:
        h += tl.load(bias_ptr + cols, mask=live, other=0.0)[None, :]
    if GELU != "none":
        h = gelu(h, GELU, APPROX)
    if out_scale is not None:
        h = h * (1.0 / tl.where(out_scale > 0.0, out_scale, float("inf")))[:, None]
    return h


@triton.jit
def fp8_linear_descriptor_kernel(
    x_desc,  # [M, K] e4m3 in blocks [BM, BK]
    w_desc,  # [N, K] e4m3 in blocks [BN, BK]
    y_desc,  # [M, N] in blocks [BM, BN / 2]
    residual_desc,  # [M, N] in blocks [BM, BN / 2] | None
    scale_ptr,  # [M] fp32
    weight_scale_ptr,  # [N] fp32
    bias_ptr,  # [N] fp32 | None
    out_scale_ptr,  # [M] fp32 | None
    n_rows,
    n_cols,
    n_inner,  # K
    GELU: tl.constexpr,
    APPROX: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FLATTEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Persistent: each program walks over tiles, those of one block of rows first, so that x is read from L2."""
    begin(OVERLAP)
    tiles_n = tl.cdiv(n_cols, BN)
    first = (
        tl.program_id(0).to(tl.int64).to(tl.int32)
    )  # a descriptor takes 32-bit coordinates and makes 64-bit addresses
    for tile in tl.range(first, tl.cdiv(n_rows, BM) * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        row = tile // tiles_n * BM
        col = tile % tiles_n * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, n_inner, BK):
            acc = tl.dot(x_desc.load([row, k]), w_desc.load([col, k]).T, acc)
        rows = row + tl.arange(0, BM)
        live = rows < n_rows
        scale = tl.load(scale_ptr + rows, mask=live, other=0.0)
        out_scale = None if out_scale_ptr is None else tl.load(out_scale_ptr + rows, mask=live, other=0.0)
        halves = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        for i in tl.static_range(2):
            start = col + i * (BN // 2)
            cols = start + tl.arange(0, BN // 2)
            h = _finished(halves[i], scale, out_scale, weight_scale_ptr, bias_ptr, cols, n_cols, GELU, APPROX)
            if residual_desc is not None:
                h += residual_desc.load([row, start]).to(tl.float32)
            y_desc.store([row, start], h.to(y_desc.dtype))


@triton.jit
def fp8_linear_kernel(
    x_ptr,  # [M, K] e4m3
    w_ptr,  # [N, K] e4m3
    y_ptr,  # [M, N]
    residual_ptr,  # [M, N] | None
    scale_ptr,  # [M] fp32
    weight_scale_ptr,  # [N] fp32
    bias_ptr,  # [N] fp32 | None
    out_scale_ptr,  # [M] fp32 | None
    n_rows,
    n_cols,
    n_inner,  # K
    GELU: tl.constexpr,
    APPROX: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    tiles_n = tl.cdiv(n_cols, BN)
    tile = tl.program_id(0).to(tl.int64)
    rows = tile // tiles_n * BM + tl.arange(0, BM)
    cols = tile % tiles_n * BN + tl.arange(0, BN)
    live_rows = rows < n_rows
    live_cols = cols < n_cols
    ks = tl.arange(0, BK)
    x_ptrs = x_ptr + rows[:, None] * n_inner + ks[None, :]
    w_ptrs = w_ptr + cols[:, None] * n_inner + ks[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, n_inner, BK):
        if EVEN_K:
            x = tl.load(x_ptrs + k, mask=live_rows[:, None], other=0.0)
            w = tl.load(w_ptrs + k, mask=live_cols[:, None], other=0.0)
        else:
            live_k = (k + ks < n_inner)[None, :]
            x = tl.load(x_ptrs + k, mask=live_rows[:, None] & live_k, other=0.0)
            w = tl.load(w_ptrs + k, mask=live_cols[:, None] & live_k, other=0.0)
        acc = tl.dot(x, w.T, acc)
    scale = tl.load(scale_ptr + rows, mask=live_rows, other=0.0)
    out_scale = None if out_scale_ptr is None else tl.load(out_scale_ptr + rows, mask=live_rows, other=0.0)
    h = _finished(acc, scale, out_scale, weight_scale_ptr, bias_ptr, cols, n_cols, GELU, APPROX)
    mask = live_rows[:, None] & live_cols[None, :]
    offsets = rows[:, None] * n_cols + cols[None, :]
    if residual_ptr is not None:
        h += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, h.to(y_ptr.dtype.element_ty), mask=mask)
