"""Triton kernel of standardise.py: a program takes ROWS rows, each held as norm_triton.py holds them."""

# mypy: disable-error-code="assignment"
import triton
import triton.language as tl

from mmfast_kernels.norm_triton import load_columns, load_rows, row_statistics, store_piece
from mmfast_kernels.overlap_triton import begin


@triton.jit
def standardise_kernel(
    x_ptr,  # [R, D]
    carry_ptr,  # [D] | None
    y_ptr,  # [R, D]
    x_stride,
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
    if carry_ptr is not None:
        sums = ()
        for i in tl.static_range(len(pieces)):
            sums = sums + (pieces[i] + load_columns(carry_ptr, i * CHUNK, D, CHUNK),)
        pieces = sums
    mean, rstd = row_statistics(pieces, eps, D, CHUNK)
    for i in tl.static_range(len(pieces)):
        store_piece(y_ptr, rows, live, (pieces[i] - mean[:, None]) * rstd[:, None], i * CHUNK, D, CHUNK)
