"""Triton kernel of patches.py: a product whose left matrix is read from the video where it lies."""

import triton
import triton.language as tl


@triton.jit
def token_offsets(
    token, clip, b_stride, f_stride, h_stride, w_stride, grid_h, grid_w, TT: tl.constexpr, P: tl.constexpr
):
    """Where the first pixel of each token lies in the video."""
    x = (token % grid_w).to(tl.int64)
    y = (token // grid_w % grid_h).to(tl.int64)
    slot = (token // (grid_w * grid_h)).to(tl.int64)
    return clip.to(tl.int64) * b_stride + slot * (f_stride * TT) + y * (h_stride * P) + x * (w_stride * P)


@triton.jit
def pixel_offsets(
    k,
    c_stride,
    f_stride,
    h_stride,
    w_stride,
    C: tl.constexpr,
    TT: tl.constexpr,
    P: tl.constexpr,
    LAYOUT: tl.constexpr,
    UNIT_W: tl.constexpr,
):
    """Where a token's value k lies from its first pixel, and the value's channel."""
    if LAYOUT == "rows":
        offset = k
        channel = k // (TT * P * P)
    elif LAYOUT == "planar":
        across = k % P if UNIT_W else k % P * w_stride
        down = (k // P % P).to(tl.int64) * h_stride
        channel = k // (TT * P * P)
        offset = channel.to(tl.int64) * c_stride + (k // (P * P) % TT).to(tl.int64) * f_stride + down + across
    else:
        tl.static_assert(LAYOUT == "interleaved")
        channel = k % C
        down = (k // (P * C) % P).to(tl.int64) * h_stride
        offset = (k // (P * P * C)).to(tl.int64) * f_stride + down + k % (P * C)
    return offset, channel


@triton.jit
def tube_embed_kernel(
    video_ptr,  # [B, C, F, H, W] uint8 or float
    scale_ptr,  # [C] fp32 | None
    shift_ptr,  # [C] fp32 | None
    weight_ptr,  # [D, K], K in the order that LAYOUT says
    bias_ptr,  # [D] | None
    pos_ptr,  # [N, D] | None
    token_ptr,  # [T] int32
    clip_ptr,  # [T] int32
    pos_idx_ptr,  # [T] int32
    y_ptr,  # [T, D]
    b_stride,
    c_stride,
    f_stride,
    h_stride,
    w_stride,
    pos_stride,
    grid_h,
    grid_w,
    n_tokens,
    n_cols,
    C: tl.constexpr,
    TT: tl.constexpr,
    P: tl.constexpr,
    LAYOUT: tl.constexpr,  # "rows": K in one piece; "planar": P pixels of one channel; "interleaved": P * C values
    UNIT_W: tl.constexpr,  # planar only: w_stride is 1
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    K: tl.constexpr = C * TT * P * P
    CUBE: tl.constexpr = TT * P * P
    tiles_n = tl.cdiv(n_cols, BN)
    tile = tl.program_id(0).to(tl.int64)
    rows = tile // tiles_n * BM + tl.arange(0, BM)
    cols = tile % tiles_n * BN + tl.arange(0, BN)
    live_rows = rows < n_tokens
    live_cols = cols < n_cols

    token = tl.load(token_ptr + rows, mask=live_rows, other=0)
    clip = tl.load(clip_ptr + rows, mask=live_rows, other=0)
    tube = token_offsets(token, clip, b_stride, f_stride, h_stride, w_stride, grid_h, grid_w, TT, P)
    tube_ptrs = video_ptr + tube[:, None]
    weight_ptrs = weight_ptr + cols[:, None] * K

    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        offset, channel = pixel_offsets(k, c_stride, f_stride, h_stride, w_stride, C, TT, P, LAYOUT, UNIT_W)
        if K % BK == 0:
            pixels = tl.load(tube_ptrs + offset[None, :], mask=live_rows[:, None], other=0)
            weight = tl.load(weight_ptrs + k[None, :], mask=live_cols[:, None], other=0.0)
        else:
            live_k = (k < K)[None, :]
            pixels = tl.load(tube_ptrs + offset[None, :], mask=live_rows[:, None] & live_k, other=0)
            weight = tl.load(weight_ptrs + k[None, :], mask=live_cols[:, None] & live_k, other=0.0)
        if scale_ptr is not None:
            if CUBE % BK == 0 and LAYOUT != "interleaved":
                scale = tl.load(scale_ptr + start // CUBE)
                shift = tl.load(shift_ptr + start // CUBE)
            else:
                # Beyond K the weights are 0, and any finite pixel will do.
                scale = tl.load(scale_ptr + channel, mask=k < K, other=0.0)[None, :]
                shift = tl.load(shift_ptr + channel, mask=k < K, other=0.0)[None, :]
            pixels = pixels.to(tl.float32) * scale + shift
        acc = tl.dot(pixels.to(weight.dtype), weight.T, acc, input_precision=PRECISION)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=live_cols, other=0.0).to(tl.float32)[None, :]
    mask = live_rows[:, None] & live_cols[None, :]
    if pos_ptr is not None:
        pos_row = tl.load(pos_idx_ptr + rows, mask=live_rows, other=0).to(tl.int64)
        acc += tl.load(pos_ptr + pos_row[:, None] * pos_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * n_cols + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)
