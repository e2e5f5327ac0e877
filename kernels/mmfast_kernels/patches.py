"""Patch embedding of kept tokens only.

    y[i] = sum over (c, dt, dy, dx) of W[:, c, dt, dy, dx] * pixel(c, dt, dy, dx) + bias + pos[pos_idx[i]]
    pixel = video[clip_idx[i], c, slot*tt + dt, row*p + dy, col*p + dx] * scale[c] + shift[c]
    token_idx[i] = (slot*h + row)*w + col over the grid (F/tt, H/p, W/p)

A product [T, K] x [K, D], K = C*tt*p*p, whose left matrix is never built: each block reads its pixels from the video.
The pixel is rounded to the weight's dtype before the product; bias and position are added in fp32.
Rows gathered elsewhere go in as a video [T, C, tt, p, p] with token_idx 0 and clip_idx 0, 1, 2, ...
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast_kernels import tables
from mmfast_kernels.dispatch import HAVE_TRITON, register, tf32_allowed, use_kernel
from mmfast_kernels.linear import linear

if HAVE_TRITON:
    from mmfast_kernels import patches_triton

_CPU_ROWS = 1024  # rows gathered at a time where no gradient is wanted: as fast as all at once, in less memory


def layout_of(video: Tensor, tubelet: int, patch: int) -> str:
    """How the kernel walks over a token's pixels: as "rows" in one piece, "interleaved" channels, or "planar"."""
    c, f, h, w = video.shape[1:]
    c_stride, f_stride, h_stride, w_stride = video.stride()[1:]
    if (f, h, w) == (tubelet, patch, patch) and (c_stride, f_stride, h_stride, w_stride) == (f * h * w, h * w, w, 1):
        return "rows"
    return "interleaved" if (c_stride, w_stride) == (1, c) and c > 1 else "planar"


def _fwd(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    token_idx: Tensor,
    clip_idx: Tensor,
    pos_idx: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    d, c, tubelet, patch, _ = weight.shape
    layout = layout_of(video, tubelet, patch)
    matrix = (weight.permute(0, 2, 3, 4, 1) if layout == "interleaved" else weight).contiguous()
    if pos is not None and pos.stride(1) != 1:
        pos = pos.contiguous()
    token_idx, clip_idx, pos_idx = token_idx.contiguous(), clip_idx.contiguous(), pos_idx.contiguous()
    bias, scale, shift = (None if t is None else t.contiguous() for t in (bias, scale, shift))
    y = _fwd_fake(video, weight, bias, pos, token_idx)
    n_tokens = token_idx.shape[0]
    tf32 = weight.dtype == torch.float32 and tf32_allowed()

    def run(config: Mapping[str, Any]) -> None:
        tiles = math.ceil(n_tokens / config["BM"]) * math.ceil(d / config["BN"])
        patches_triton.tube_embed_kernel[(tiles,)](
            video, scale, shift, matrix, bias, pos, token_idx, clip_idx, pos_idx, y,
            *video.stride(), 0 if pos is None else pos.stride(0),
            video.shape[3] // patch, video.shape[4] // patch, n_tokens, d,
            C=c, TT=tubelet, P=patch, LAYOUT=layout, UNIT_W=video.stride(4) == 1,
            PRECISION="tf32" if tf32 else "ieee", **config,
        )  # fmt: skip

    if y.numel():
        dtype = "tf32" if tf32 else tables.dtype_name(weight.dtype)
        with torch.cuda.device_of(video):
            run(tables.config("tube_embed", run, arch=tables.arch_of(video.device), dtype=dtype))
    return y


def _fwd_fake(
    video: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None, token_idx: Tensor, *_: object
) -> Tensor:
    return torch.empty((token_idx.shape[0], weight.shape[0]), dtype=weight.dtype, device=video.device)


tube_embed_op = register(
    "tube_embed(Tensor video, Tensor weight, Tensor? bias, Tensor? pos, Tensor token_idx, Tensor clip_idx, "
    "Tensor pos_idx, Tensor? scale, Tensor? shift) -> Tensor",
    _fwd,
    _fwd_fake,
)


def tube_embed(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    token_idx: Tensor,
    clip_idx: Tensor,
    *,
    pos_idx: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Embed the given tokens of a batch of videos; no other pixel is read.

    video: [B, C, F, H, W] uint8 or float, any strides; uint8 takes scale and shift. weight: [D, C, tt, p, p], as Conv3d
    has it. bias: [D] or None. pos: [N, D] in fp32 or the weight's dtype, or None. token_idx, clip_idx: [T] int32, ids
    on the grid (F/tt, H/p, W/p) and rows of video. pos_idx: [T] int32 rows of pos, by default token_idx.
    scale, shift: [C] fp32, pixel*scale + shift before the product. Returns [T, D] in the weight's dtype, or autocast's.
    Ids out of range are not looked for on a GPU. Raises ValueError, TypeError.
    """
    _check(video, weight, bias, pos, token_idx, clip_idx, pos_idx, scale, shift)
    if torch.is_autocast_enabled(video.device.type):
        weight = weight.to(torch.get_autocast_dtype(video.device.type))
    pos_idx = token_idx if pos_idx is None else pos_idx
    if use_kernel(video, weight, bias, pos):
        return tube_embed_op(video, weight, bias, pos, token_idx, clip_idx, pos_idx, scale, shift)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (video, weight, bias, pos))
    if needs_grad or torch.compiler.is_compiling():
        return _embed(video, weight, bias, pos, token_idx, clip_idx, pos_idx, scale, shift)
    parts = zip(token_idx.split(_CPU_ROWS), clip_idx.split(_CPU_ROWS), pos_idx.split(_CPU_ROWS), strict=True)
    blocks = [_embed(video, weight, bias, pos, token, clip, row, scale, shift) for token, clip, row in parts]
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def _embed(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    token_idx: Tensor,
    clip_idx: Tensor,
    pos_idx: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """Gathered rows times the weight, in torch."""
    from mmfast_kernels import gather

    _, c, tubelet, patch, _ = weight.shape
    plain = video.requires_grad or video.dtype == torch.float64
    rows_of = gather.gather_tubes_ref if plain else gather.gather_tubes
    wide = torch.float64 if video.dtype == torch.float64 else torch.float32
    rows = rows_of(video, token_idx, clip_idx, tubelet, patch, scale, shift, wide).to(weight.dtype)
    y = linear(rows, weight.flatten(1), None if bias is None else bias.to(weight.dtype))
    return y if pos is None else (y + pos[pos_idx]).to(weight.dtype)


def _check(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    token_idx: Tensor,
    clip_idx: Tensor,
    pos_idx: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    if weight.dim() != 5 or weight.shape[3] != weight.shape[4] or 0 in weight.shape:
        raise ValueError(f"tube_embed: weight takes [D, C, tt, p, p], got {tuple(weight.shape)}")
    d, c, tubelet, patch, _ = weight.shape
    if video.dim() != 5 or video.shape[1] != c:
        raise ValueError(f"tube_embed: video takes [B, {c}, F, H, W], got {tuple(video.shape)}")
    if video.shape[2] % tubelet or video.shape[3] % patch or video.shape[4] % patch:
        raise ValueError(
            f"tube_embed: video takes F in steps of {tubelet}, H and W of {patch}, got {tuple(video.shape)}"
        )
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise TypeError(f"tube_embed: video takes uint8 or a floating dtype, got {video.dtype}")
    if (scale is None) != (shift is None) or (scale is None and video.dtype == torch.uint8):
        raise ValueError("tube_embed: takes scale and shift together, and needs them for a uint8 video")
    for name, ids in (("token_idx", token_idx), ("clip_idx", clip_idx), ("pos_idx", pos_idx)):
        if ids is not None and ids.dtype != torch.int32:
            raise TypeError(f"tube_embed: {name} takes torch.int32, got {ids.dtype}")
        if ids is not None and (ids.dim() != 1 or ids.shape != token_idx.shape):
            raise ValueError(f"tube_embed: {name} takes [T] as token_idx, got {tuple(ids.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("pos", pos)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"tube_embed: {name} takes a floating dtype, got {tensor.dtype}")
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"tube_embed: {name} takes torch.float32, got {tensor.dtype}")
        if tensor is not None and tensor.shape != (c,):
            raise ValueError(f"tube_embed: {name} takes [{c}], got {tuple(tensor.shape)}")
    if bias is not None and bias.shape != (d,):
        raise ValueError(f"tube_embed: bias takes [{d}], got {tuple(bias.shape)}")
    if pos is not None and (pos.dim() != 2 or pos.shape[1] != d):
        raise ValueError(f"tube_embed: pos takes [N, {d}], got {tuple(pos.shape)}")
    for name, tensor in (("weight", weight), ("pos", pos), ("token_idx", token_idx), ("scale", scale)):
        if tensor is not None and tensor.device != video.device:
            raise ValueError(f"tube_embed: {name} is on {tensor.device}, video on {video.device}")


def tube_embed_ref(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    token_idx: Tensor,
    clip_idx: Tensor,
    *,
    pos_idx: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """tube_embed in plain torch, over every token of the grid."""
    _, _, tubelet, patch, _ = weight.shape
    if scale is not None and shift is not None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        video = video.to(wide) * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)
    patches = video.to(weight.dtype).unfold(2, tubelet, tubelet).unfold(3, patch, patch).unfold(4, patch, patch)
    tokens = patches.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(1, 3)  # [B, N, C, tt, p, p]
    rows = tokens[clip_idx, token_idx].flatten(1)
    y = F.linear(rows, weight.flatten(1), None if bias is None else bias.to(weight.dtype))
    return y if pos is None else (y + pos[token_idx if pos_idx is None else pos_idx]).to(weight.dtype)
