"""Triton kernels of mae.py."""

import triton
import triton.language as tl

from mmfast_kernels.patches_triton import token_offsets


@triton.jit
def masked_patch_mse_kernel(
    pred_ptr,  # [R, CUBE * C]
    video_ptr,  # [B, C, F, H, W] uint8 or float
    token_ptr,  # [R] int32
    clip_ptr,  # [R] int32
    scale_ptr,  # [C] fp32 | None
    shift_ptr,  # [C] fp32 | None
    loss_ptr,  # [programs] fp32 sums of squares | None in the backward
    g_ptr,  # [1] fp32 | None in the forward
    dpred_ptr,  # [R, CUBE * C] | None in the forward
    pred_stride,
    b_stride,
    c_stride,
    f_stride,
    h_stride,
    w_stride,
    grid_h,
    grid_w,
    n_rows,
    factor,  # 2 / (R * CUBE * C)
    C: tl.constexpr,
    TT: tl.constexpr,
    P: tl.constexpr,
    UNIT_W: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # pixels of a channel, CUBE or more
    CHANNELS: tl.constexpr,  # channels at a time
):
    """Squares of the errors of ROWS rows, or the gradient of their mean, a block [ROWS, BLOCK, CHANNELS] at a time."""
    CUBE: tl.constexpr = TT * P * P
    program = tl.program_id(0).to(tl.int64)
    rows = program * ROWS + tl.arange(0, ROWS)
    live_rows = rows < n_rows
    token = tl.load(token_ptr + rows, mask=live_rows, other=0)
    clip = tl.load(clip_ptr + rows, mask=live_rows, other=0)
    tube = token_offsets(token, clip, b_stride, f_stride, h_stride, w_stride, grid_h, grid_w, TT, P)

    s = tl.arange(0, BLOCK)
    across = s % P if UNIT_W else s % P * w_stride
    inside = (s // (P * P)).to(tl.int64) * f_stride + (s // P % P).to(tl.int64) * h_stride + across
    live_tubes = live_rows[:, None] & (s < CUBE)[None, :]
    pixel_ptrs = video_ptr + (tube[:, None] + inside[None, :])[:, :, None]
    value = rows[:, None].to(tl.int64) * pred_stride + s[None, :] * C

    if dpred_ptr is not None:
        g = tl.load(g_ptr) * factor
    total = tl.zeros([ROWS, BLOCK, CHANNELS], tl.float32)
    for start in tl.static_range(0, C, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        live = live_tubes[:, :, None] & (c < C)[None, None, :]
        target = tl.load(pixel_ptrs + (c.to(tl.int64) * c_stride)[None, None, :], mask=live, other=0).to(tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)[None, None, :]
        if NORMALIZE:
            # Of the pixels as they are stored: raw = pixel * scale + shift moves the mean and stretches the deviation.
            mean = tl.sum(target, 1) / CUBE
            target = tl.where(live, target - mean[:, None, :], 0.0)
            deviation = tl.sqrt_rn(tl.sum(target * target, 1) / (CUBE - 1))[:, None, :]
            if scale_ptr is not None:
                target = target * scale / (deviation * tl.abs(scale) + 1e-6)
            else:
                target = target / (deviation + 1e-6)
        elif scale_ptr is not None:
            target = target * scale + tl.load(shift_ptr + c, mask=c < C, other=0.0)[None, None, :]
        pred = tl.load(pred_ptr + value[:, :, None] + c[None, None, :], mask=live, other=0.0).to(tl.float32)
        error = tl.where(live, pred - target, 0.0)
        if dpred_ptr is None:
            total += error * error
        else:
            out = rows[:, None, None] * (CUBE * C) + (s * C)[None, :, None] + c[None, None, :]
            tl.store(dpred_ptr + out, (error * g).to(dpred_ptr.dtype.element_ty), mask=live)
    if loss_ptr is not None:
        tl.store(loss_ptr + program, tl.sum(total))


@triton.jit
def decoder_tokens_kernel(
    visible_ptr,  # [Tv, D]
    mask_ptr,  # [D]
    pos_ptr,  # [N, D] fp32
    source_ptr,  # [R] int32
    token_ptr,  # [R] int32
    y_ptr,  # [R, D]
    visible_stride,
    pos_stride,
    n_rows,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    tiles: tl.constexpr = (D + CHUNK - 1) // CHUNK
    program = tl.program_id(0).to(tl.int64)
    rows = program // tiles * ROWS + tl.arange(0, ROWS)
    cols = (program % tiles).to(tl.int32) * CHUNK + tl.arange(0, CHUNK)
    live_rows = rows < n_rows
    live_cols = cols < D if D % CHUNK else cols >= 0
    live = live_rows[:, None] & live_cols[None, :]
    source = tl.load(source_ptr + rows, mask=live_rows, other=-1).to(tl.int64)
    token = tl.load(token_ptr + rows, mask=live_rows, other=0).to(tl.int64)
    is_visible = (source >= 0)[:, None]
    visible = tl.load(
        visible_ptr + source[:, None] * visible_stride + cols[None, :], mask=live & is_visible, other=0.0
    ).to(tl.float32)
    mask_token = tl.load(mask_ptr + cols, mask=live_cols, other=0.0).to(tl.float32)[None, :]
    pos = tl.load(pos_ptr + token[:, None] * pos_stride + cols[None, :], mask=live, other=0.0)
    y = tl.where(is_visible, visible, mask_token) + pos
    tl.store(y_ptr + rows[:, None] * D + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def masked_rows_sum_kernel(
    dy_ptr,  # [R, D]
    source_ptr,  # [R] int32
    sums_ptr,  # [PARTS, D] fp32
    dy_stride,
    n_rows,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Sum of the rows that a mask token stands in, over one of PARTS parts of the rows."""
    tiles: tl.constexpr = (D + CHUNK - 1) // CHUNK
    program = tl.program_id(0).to(tl.int64)
    part = program // tiles
    cols = (program % tiles).to(tl.int32) * CHUNK + tl.arange(0, CHUNK)
    live_cols = cols < D if D % CHUNK else cols >= 0
    length = tl.cdiv(n_rows, PARTS)
    first = part.to(tl.int32) * length
    last = tl.minimum(first + length, n_rows)
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        source = tl.load(source_ptr + rows, mask=rows < last, other=0)
        live = (source < 0)[:, None] & live_cols[None, :]
        offsets = rows.to(tl.int64)[:, None] * dy_stride + cols[None, :]
        total += tl.load(dy_ptr + offsets, mask=live, other=0.0).to(tl.float32)
    tl.store(sums_ptr + part * D + cols, tl.sum(total, 0), mask=live_cols)
