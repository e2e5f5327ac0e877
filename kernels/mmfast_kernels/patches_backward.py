"""Gradients of patches.py's embedding. Its rows of pixels are gathered again, so that no forward keeps them.

dW[d, k] = sum over i of dy[i, d] * pixel(i, k)      i in a fixed number of parts, fp32
dpos     = dy summed over the tokens at a position
dvideo   = dy summed over the tokens at a place, times W * scale; 0 where no token was embedded
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmfast_kernels import gather, tables
from mmfast_kernels.dispatch import HAVE_TRITON, needs_grad, register, tf32_allowed, use_kernel
from mmfast_kernels.linear import linear

if HAVE_TRITON:
    from mmfast_kernels import patches_backward_triton

CPU_ROWS = 1024  # rows gathered at a time: as fast as all at once, in less memory


def layout_of(video: Tensor, tubelet: int, patch: int) -> str:
    """How the kernel walks over a token's pixels: as "rows" in one piece, "interleaved" channels, or "planar"."""
    c, f, h, w = video.shape[1:]
    c_stride, f_stride, h_stride, w_stride = video.stride()[1:]
    if (f, h, w) == (tubelet, patch, patch) and (c_stride, f_stride, h_stride, w_stride) == (f * h * w, h * w, w, 1):
        return "rows"
    return "interleaved" if (c_stride, w_stride) == (1, c) and c > 1 else "planar"


def gathered_rows(
    video: Tensor,
    token_idx: Tensor,
    clip_idx: Tensor,
    tubelet: int,
    patch: int,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    plain = video.dtype == torch.float64 or needs_grad(video)
    rows_of = gather.gather_tubes_ref if plain else gather.gather_tubes
    wide = torch.float64 if video.dtype == torch.float64 else torch.float32
    return rows_of(video, token_idx, clip_idx, tubelet, patch, scale, shift, wide)


def _dweight_blocks(
    dy: Tensor,
    video: Tensor,
    token_idx: Tensor,
    clip_idx: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    tubelet: int,
    patch: int,
    dtype: torch.dtype,
) -> Tensor:
    """fp32 [D, K] where no kernel runs."""
    total = torch.zeros((dy.shape[1], video.shape[1] * tubelet * patch * patch), dtype=torch.float32, device=dy.device)
    if dy.shape[0]:
        parts = zip(dy.split(CPU_ROWS), token_idx.split(CPU_ROWS), clip_idx.split(CPU_ROWS), strict=True)
        for block, token, clip in parts:
            rows = gathered_rows(video, token, clip, tubelet, patch, scale, shift).to(dtype)
            total += linear(block.to(dtype).t(), rows.t())  # through oneDNN half the time of torch.mm
    return total


def _dweight(
    dy: Tensor,  # [T, D]
    video: Tensor,
    token_idx: Tensor,
    clip_idx: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    tubelet: int,
    patch: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    shape = (dy.shape[1], video.shape[1], tubelet, patch, patch)
    if not use_kernel(dy, video):
        how = (scale, shift, tubelet, patch, dtype)
        return _dweight_blocks(dy, video, token_idx, clip_idx, *how).to(out_dtype).view(shape)
    layout = layout_of(video, tubelet, patch)
    dy = dy.to(dtype)
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    token_idx, clip_idx = token_idx.contiguous(), clip_idx.contiguous()
    scale, shift = (None if t is None else t.contiguous() for t in (scale, shift))
    (n_tokens, d), c = dy.shape, video.shape[1]
    k = c * tubelet * patch * patch
    tf32 = dtype == torch.float32 and tf32_allowed()

    def run(config: Mapping[str, Any]) -> Tensor:
        parts = config["PARTS"]
        out = torch.empty((parts, d, k), dtype=torch.float32, device=video.device)
        tiles = parts * math.ceil(d / config["BM"]) * math.ceil(k / config["BN"])
        patches_backward_triton.tube_embed_dweight_kernel[(tiles,)](
            dy, video, scale, shift, token_idx, clip_idx, out,
            dy.stride(0), *video.stride(), video.shape[3] // patch, video.shape[4] // patch, n_tokens, d,
            C=c, TT=tubelet, P=patch, LAYOUT=layout, UNIT_W=video.stride(4) == 1,
            PRECISION="tf32" if tf32 else "ieee", **config,
        )  # fmt: skip
        return out

    with torch.cuda.device_of(video):
        name = "tf32" if tf32 else tables.dtype_name(dtype)
        arch = tables.arch_of(video.device)
        partials = run(tables.config("tube_embed_dweight", run, arch=arch, dtype=name, d=d))
    total = partials.sum(0).to(out_dtype)
    if layout == "interleaved":
        return total.view(d, tubelet, patch, patch, c).permute(0, 4, 1, 2, 3).contiguous()
    return total.view(shape)


def _dweight_fake(
    dy: Tensor,
    video: Tensor,
    token_idx: Tensor,
    clip_idx: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    tubelet: int,
    patch: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    return torch.empty((dy.shape[1], video.shape[1], tubelet, patch, patch), dtype=out_dtype, device=video.device)


tube_embed_dweight_op = register(
    "tube_embed_dweight(Tensor dy, Tensor video, Tensor token_idx, Tensor clip_idx, Tensor? scale, Tensor? shift, "
    "int tubelet, int patch, ScalarType dtype, ScalarType out_dtype) -> Tensor",
    _dweight,
    _dweight_fake,
)


def sum_by_row(dy: Tensor, row: Tensor, count: int) -> Tensor:
    """fp32 [count, D]: the sum of dy's rows that go to each row, in one order whatever the machine does."""
    out = torch.zeros((count, dy.shape[1]), dtype=torch.float32, device=dy.device)
    if dy.is_cuda:  # which of the two adds without atomics
        return out.index_put_((row.long(),), dy.float(), accumulate=True)
    return out.index_add_(0, row, dy.float())


def dvideo_of(
    dy: Tensor,
    video: Tensor,
    weight: Tensor,
    token_idx: Tensor,
    clip_idx: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    _, c, tubelet, patch, _ = weight.shape
    slots, grid_h, grid_w = video.shape[2] // tubelet, video.shape[3] // patch, video.shape[4] // patch
    tokens = slots * grid_h * grid_w
    places = sum_by_row(dy, clip_idx.long() * tokens + token_idx, video.shape[0] * tokens)
    rows = torch.mm(places.to(dtype), weight.flatten(1).to(dtype)).float()
    cubes = rows.view(-1, slots, grid_h, grid_w, c, tubelet, patch, patch)
    if scale is not None:
        cubes = cubes * scale.view(-1, 1, 1, 1)
    return cubes.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(video.shape).to(video.dtype)
