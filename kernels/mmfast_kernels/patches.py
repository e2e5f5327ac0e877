"""Patch embedding of kept tokens only.

    y[i] = sum over (c, dt, dy, dx) of W[:, c, dt, dy, dx] * pixel(c, dt, dy, dx) + bias + pos[pos_idx[i]]
    pixel = video[clip_idx[i], c, slot*tt + dt, row*p + dy, col*p + dx] * scale[c] + shift[c]
    token_idx[i] = (slot*h + row)*w + col over the grid (F/tt, H/p, W/p)

A product [T, K] x [K, D], K = C*tt*p*p, whose left matrix is never built: each block reads its pixels from the video.
The pixel is rounded to the product's dtype; bias and position are added in fp32.
Rows gathered elsewhere go in as a video [T, C, tt, p, p] with token_idx 0 and clip_idx 0, 1, 2, ...
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfast_kernels import tables
from mmfast_kernels.dispatch import HAVE_TRITON, needs_grad, register, tf32_allowed, use_kernel
from mmfast_kernels.linear import linear
from mmfast_kernels.patches_backward import (
    CPU_ROWS,
    dvideo_of,
    gathered_rows,
    layout_of,
    sum_by_row,
    tube_embed_dweight_op,
)

if HAVE_TRITON:
    from mmfast_kernels import patches_triton


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
    out_dtype: torch.dtype,
) -> Tensor:
    d, c, tubelet, patch, _ = weight.shape
    layout = layout_of(video, tubelet, patch)
    matrix = (weight.permute(0, 2, 3, 4, 1) if layout == "interleaved" else weight).contiguous()
    if pos is not None and pos.stride(1) != 1:
        pos = pos.contiguous()
    token_idx, clip_idx, pos_idx = token_idx.contiguous(), clip_idx.contiguous(), pos_idx.contiguous()
    bias, scale, shift = (None if t is None else t.contiguous() for t in (bias, scale, shift))
    y = torch.empty((token_idx.shape[0], d), dtype=out_dtype, device=video.device)
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


def _fwd_fake(video: Tensor, weight: Tensor, bias: Any, pos: Any, token_idx: Tensor, *rest: Any) -> Tensor:
    return torch.empty((token_idx.shape[0], weight.shape[0]), dtype=rest[-1], device=video.device)


tube_embed_op = register(
    "tube_embed(Tensor video, Tensor weight, Tensor? bias, Tensor? pos, Tensor token_idx, Tensor clip_idx, "
    "Tensor pos_idx, Tensor? scale, Tensor? shift, ScalarType out_dtype) -> Tensor",
    _fwd,
    _fwd_fake,
)


class Given(NamedTuple):
    """The arguments of tube_embed, and the product's dtype."""

    video: Tensor
    weight: Tensor
    bias: Tensor | None
    pos: Tensor | None
    token_idx: Tensor
    clip_idx: Tensor
    pos_idx: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    dtype: torch.dtype


class _TubeEmbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, dtype = arguments
        ctx.save_for_backward(*tensors)
        ctx.dtype = dtype
        return _forward(Given(*arguments))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        video, weight, bias, pos, token_idx, clip_idx, pos_idx, scale, shift = ctx.saved_tensors
        want_video, want_weight, want_bias, want_pos = ctx.needs_input_grad[:4]
        dvideo = dweight = dbias = dpos = None
        if want_video:
            dvideo = dvideo_of(dy, video, weight, token_idx, clip_idx, scale, ctx.dtype)
        if want_weight:
            _, _, tubelet, patch, _ = weight.shape
            pixels = (video, token_idx, clip_idx, scale, shift, tubelet, patch)
            dweight = tube_embed_dweight_op(dy, *pixels, ctx.dtype, weight.dtype)
        if want_bias:
            dbias = dy.sum(0, dtype=torch.float32).to(bias.dtype)
        if want_pos:
            dpos = sum_by_row(dy, token_idx if pos_idx is None else pos_idx, pos.shape[0]).to(pos.dtype)
        return dvideo, dweight, dbias, dpos, None, None, None, None, None, None


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
    scale, shift: [C] fp32 constants, pixel*scale + shift before the product. Returns [T, D] in the weight's dtype; under
    autocast too, where only the product is in autocast's dtype, so that the residual stream stays fp32.
    Gradients for weight, bias, pos and a float video, deterministic.
    Ids out of range are not looked for on a GPU. Raises ValueError, TypeError.
    """
    _check(video, weight, bias, pos, token_idx, clip_idx, pos_idx, scale, shift)
    double = any(t is not None and t.dtype == torch.float64 for t in (video, weight, bias, pos))
    dtype = weight.dtype
    if torch.is_autocast_enabled(video.device.type) and not double:
        dtype = torch.get_autocast_dtype(video.device.type)
    if pos_idx is token_idx:  # torch.compile takes no tensor twice in one Function
        pos_idx = None
    given = Given(video, weight, bias, pos, token_idx, clip_idx, pos_idx, scale, shift, dtype)
    if double or (torch.compiler.is_compiling() and not use_kernel(video)):
        return _embed(given)
    return _TubeEmbed.apply(*given) if needs_grad(video, weight, bias, pos) else _forward(given)


def _forward(given: Given) -> Tensor:
    video, weight, bias, pos, token_idx, clip_idx, pos_idx, scale, shift, dtype = given
    pos_idx = token_idx if pos_idx is None else pos_idx
    if use_kernel(video, weight, bias, pos):
        ids = (token_idx, clip_idx, pos_idx)
        return tube_embed_op(video, weight.to(dtype), bias, pos, *ids, scale, shift, weight.dtype)
    parts = zip(token_idx.split(CPU_ROWS), clip_idx.split(CPU_ROWS), pos_idx.split(CPU_ROWS), strict=True)
    blocks = [_embed(given._replace(token_idx=token, clip_idx=clip, pos_idx=row)) for token, clip, row in parts]
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def _embed(given: Given) -> Tensor:
    """Gathered rows times the weight, in torch."""
    video, weight, bias, pos, token_idx, clip_idx, pos_idx, scale, shift, dtype = given
    _, _, tubelet, patch, _ = weight.shape
    rows = gathered_rows(video, token_idx, clip_idx, tubelet, patch, scale, shift).to(dtype)
    y = linear(rows, weight.flatten(1).to(dtype), None if bias is None else bias.to(dtype))
    return (y if pos is None else y + pos[token_idx if pos_idx is None else pos_idx]).to(weight.dtype)


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
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"tube_embed: {name} takes a constant, got one that requires grad")
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
