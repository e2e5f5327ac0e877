"""Triton kernel of patches.py's backward: a product whose right matrix is read from the video where it lies."""

import triton
import triton.language as tl

from mmfast_kernels.patches_triton import pixel_offsets, token_offsets


@triton.jit
def tube_embed_dweight_kernel(
    dy_ptr,  # [T, D], the dtype of the product
    video_ptr,  # [B, C, F, H, W] uint8 or float
    scale_ptr,  # [C] fp32 | None
    shift_ptr,  # [C] fp32 | None
    token_ptr,  # [T] int32
    clip_ptr,  # [T] int32
    out_ptr,  # [PARTS, D, K] fp32, K in the order that LAYOUT says
    dy_stride,
    b_stride,
    c_stride,
    f_stride,
    h_stride,
    w_stride,
    grid_h,
    grid_w,
    n_tokens,
    n_cols,
    C: tl.constexpr,
    TT: tl.constexpr,
    P: tl.constexpr,
    LAYOUT: tl.constexpr,
    UNIT_W: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BM rows and BN columns of the weight's gradient, summed over one of PARTS parts of the tokens."""
    K: tl.constexpr = C * TT * P * P
    tiles_m = tl.cdiv(n_cols, BM)
    tile = tl.program_id(0).to(tl.int64)
    part = tile // (tiles_m * tl.cdiv(K, BN))
    rows = tile % tiles_m * BM + tl.arange(0, BM)
    k = (tile // tiles_m % tl.cdiv(K, BN) * BN).to(tl.int32) + tl.arange(0, BN)
    live_rows = (rows < n_cols)[None, :]
    live_k = (k < K)[None, :]

    offset, channel = pixel_offsets(k, c_stride, f_stride, h_stride, w_stride, C, TT, P, LAYOUT, UNIT_W)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel, mask=k < K, other=0.0)[None, :]
        shift = tl.load(shift_ptr + channel, mask=k < K, other=0.0)[None, :]

    length = tl.cdiv(tl.cdiv(n_tokens, BK), PARTS) * BK
    first = part.to(tl.int32) * length
    last = tl.minimum(first + length, n_tokens)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(first, last, BK):
        t = start + tl.arange(0, BK)
        live = t < last
        token = tl.load(token_ptr + t, mask=live, other=0)
        clip = tl.load(clip_ptr + t, mask=live, other=0)
        tube = token_offsets(token, clip, b_stride, f_stride, h_stride, w_stride, grid_h, grid_w, TT, P)
        pixel_ptrs = video_ptr + tube[:, None] + offset[None, :]
        dy_ptrs = dy_ptr + t.to(tl.int64)[:, None] * dy_stride + rows[None, :]
        pixels = tl.load(pixel_ptrs, mask=live[:, None] & live_k, other=0)
        dy = tl.load(dy_ptrs, mask=live[:, None] & live_rows, other=0.0)  # 0 beyond the part, whatever the pixels
        if scale_ptr is not None:
            pixels = pixels.to(tl.float32) * scale + shift
        acc = tl.dot(dy.T, pixels.to(dy.dtype), acc, input_precision=PRECISION)

    out_ptrs = out_ptr + (part * n_cols + rows)[:, None] * K + k[None, :]
    tl.store(out_ptrs, acc, mask=(rows < n_cols)[:, None] & live_k)
