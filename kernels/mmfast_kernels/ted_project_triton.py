"""Triton kernel of the second product of ted_adapter.py, with what is added to it."""

import triton
import triton.language as tl


@triton.jit
def ted_project_kernel(
    x_ptr,  # [M, N]
    u_ptr,  # [M, K]
    w_ptr,  # [N, K]
    bias_ptr,  # [N]
    cell_bias_ptr,  # [N]
    cells_ptr,  # [M] int8: 0 for a class token | None
    y_ptr,  # [M, N]
    x_stride,
    u_stride,
    w_stride,
    n_rows,
    n_cols,
    n_inner,  # K
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tiles_n = tl.cdiv(n_cols, BN)
    tile = tl.program_id(0).to(tl.int64)
    rows = tile // tiles_n * BM + tl.arange(0, BM)
    cols = tile % tiles_n * BN + tl.arange(0, BN)
    live_rows = rows < n_rows
    live_cols = cols < n_cols
    ks = tl.arange(0, BK)
    u_ptrs = u_ptr + rows[:, None] * u_stride + ks[None, :]
    w_ptrs = w_ptr + cols[:, None] * w_stride + ks[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, n_inner, BK):
        if EVEN_K:
            u = tl.load(u_ptrs + k, mask=live_rows[:, None], other=0.0)
            w = tl.load(w_ptrs + k, mask=live_cols[:, None], other=0.0)
        else:
            live_k = (k + ks < n_inner)[None, :]
            u = tl.load(u_ptrs + k, mask=live_rows[:, None] & live_k, other=0.0)
            w = tl.load(w_ptrs + k, mask=live_cols[:, None] & live_k, other=0.0)
        acc = tl.dot(u, w.T, acc, input_precision=PRECISION)
    acc += tl.load(bias_ptr + cols, mask=live_cols, other=0.0).to(tl.float32)[None, :]
    cell_bias = tl.load(cell_bias_ptr + cols, mask=live_cols, other=0.0).to(tl.float32)[None, :]
    if cells_ptr is None:
        acc += cell_bias
    else:
        cell = tl.load(cells_ptr + rows, mask=live_rows, other=0) != 0
        acc += tl.where(cell[:, None], cell_bias, 0.0)
    mask = live_rows[:, None] & live_cols[None, :]
    acc += tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * n_cols + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)
