"""Kept tokens on their way to the patch embedding: their pixels, and the union of what several views keep.

    rows[i] = video[clip_idx[i], :, slot*tubelet : , y*patch : , x*patch : ] as (c, dt, dy, dx), * scale[c] + shift[c]
    token_idx[i] = (slot*h + y)*w + x over the grid (F/tubelet, H/patch, W/patch)

Only kept pixels are read. A uint8 video gathered into a pinned buffer sends over PCIe what the model will look at and
nothing else. Any strides are read, so that a decoder's [B, F, H, W, C] buffer goes in as a permuted view.
Routines in csrc/gather.cpp, csrc/cuda/gather.cu and csrc/pack.cpp.
"""

import torch
from torch import Tensor

from mmfast_kernels.dispatch import register
from mmfast_kernels.native import _C, address, check_ids, on_native_cuda, stream, threads

_PIXEL = {torch.uint8: 0, torch.float32: 1}


def _fill(
    out: Tensor,  # [T, C*tubelet*patch*patch] uint8 or float32
    video: Tensor,  # [B, C, F, H, W]
    token_idx: Tensor,  # [T] int32
    clip_idx: Tensor,  # [T] int32
    tubelet: int,
    patch: int,
    scale: Tensor | None,  # [C] float32
    shift: Tensor | None,
) -> None:
    pinned = on_native_cuda(token_idx) and video.device.type == "cpu" and video.is_pinned()
    if video.device != token_idx.device and not pinned:
        raise ValueError(
            f"video: got {video.device}, takes {token_idx.device} as token_idx (or pinned memory for a GPU's tokens)"
        )
    if video.dtype not in _PIXEL or not (token_idx.device.type == "cpu" or on_native_cuda(token_idx)):
        out.copy_(gather_tubes_ref(video, token_idx, clip_idx, tubelet, patch, scale, shift, out.dtype))
        return
    token_idx, clip_idx = token_idx.contiguous(), clip_idx.contiguous()
    scale, shift = (None if t is None else t.contiguous() for t in (scale, shift))
    given = (
        *(address(video), _PIXEL[video.dtype], video.shape, video.stride()),
        *(address(token_idx), address(clip_idx), token_idx.shape[0], tubelet, patch),
        *(address(out), _PIXEL[out.dtype], address(scale), address(shift)),
    )
    if token_idx.is_cuda:
        with torch.cuda.device(token_idx.device):
            _C.gather_tubes_cuda(*given, stream(token_idx.device))
    else:
        _C.gather_tubes(*given, threads())


def _gather(
    video: Tensor,
    token_idx: Tensor,
    clip_idx: Tensor,
    tubelet: int,
    patch: int,
    scale: Tensor | None,
    shift: Tensor | None,
    out_dtype: torch.dtype,
    pin: bool,
) -> Tensor:
    shape = (token_idx.shape[0], video.shape[1] * tubelet * patch * patch)
    dtype = torch.uint8 if out_dtype == torch.uint8 else torch.float32
    pin = pin and token_idx.device.type == "cpu" and torch.cuda.is_available()
    out = torch.empty(shape, dtype=dtype, device=token_idx.device, pin_memory=pin)
    _fill(out, video, token_idx, clip_idx, tubelet, patch, scale, shift)
    return out.to(out_dtype)


def _gather_fake(
    video: Tensor,
    token_idx: Tensor,
    clip_idx: Tensor,
    tubelet: int,
    patch: int,
    scale: Tensor | None,
    shift: Tensor | None,
    out_dtype: torch.dtype,
    pin: bool,
) -> Tensor:
    return token_idx.new_empty((token_idx.shape[0], video.shape[1] * tubelet * patch * patch), dtype=out_dtype)


def _fill_fake(*_: object) -> None:
    return None


def _union(keep_idx: Tensor, cu_seqlens: Tensor, views: int) -> tuple[Tensor, Tensor, Tensor]:
    keep_idx, cu_seqlens = keep_idx.contiguous(), cu_seqlens.contiguous()
    union_idx, union_clip, row_of = (torch.empty(keep_idx.shape, dtype=torch.int32) for _ in range(3))
    rows = _C.union_rows(
        *(address(keep_idx), keep_idx.shape[0], address(cu_seqlens), cu_seqlens.shape[0] - 1, views),
        *(address(union_idx), address(union_clip), address(row_of)),
    )
    return union_idx[:rows], union_clip[:rows], row_of


def _union_fake(keep_idx: Tensor, cu_seqlens: Tensor, views: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size()
    return keep_idx.new_empty((rows,)), keep_idx.new_empty((rows,)), torch.empty_like(keep_idx)


_gather_op = register(
    "gather_tubes(Tensor video, Tensor token_idx, Tensor clip_idx, int tubelet, int patch, Tensor? scale, "
    "Tensor? shift, ScalarType out_dtype, bool pin) -> Tensor",
    _gather,
    _gather_fake,
)
_fill_op = register(
    "gather_into(Tensor(a!) out, Tensor video, Tensor token_idx, Tensor clip_idx, int tubelet, int patch, "
    "Tensor? scale, Tensor? shift) -> ()",
    _fill,
    _fill_fake,
)
_union_op = register(
    "union_rows(Tensor keep_idx, Tensor cu_seqlens, int views) -> (Tensor, Tensor, Tensor)", _union, _union_fake
)


def _check(
    video: Tensor,
    token_idx: Tensor,
    clip_idx: Tensor,
    tubelet: int,
    patch: int,
    scale: Tensor | None,
    shift: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise TypeError(f"video: got {video.dtype}, takes uint8 or a float dtype")
    if video.dim() != 5:
        raise ValueError(f"video: got shape {tuple(video.shape)}, takes [B, C, F, H, W]")
    if tubelet < 1 or patch < 1 or video.shape[2] % tubelet or video.shape[3] % patch or video.shape[4] % patch:
        raise ValueError(f"video: got shape {tuple(video.shape)}, takes F in steps of {tubelet=}, H and W of {patch=}")
    check_ids("token_idx", token_idx, torch.int32)
    check_ids("clip_idx", clip_idx, torch.int32)
    if clip_idx.shape != token_idx.shape or clip_idx.device != token_idx.device:
        raise ValueError(
            f"clip_idx: got {tuple(clip_idx.shape)} on {clip_idx.device}, takes {tuple(token_idx.shape)} on "
            f"{token_idx.device}, as token_idx"
        )
    if (scale is None) != (shift is None):
        raise ValueError("scale, shift: got one of them, takes both or neither")
    for name, t in (("scale", scale), ("shift", shift)):
        if t is not None and (t.shape != video.shape[1:2] or t.dtype != torch.float32 or t.device != token_idx.device):
            raise ValueError(
                f"{name}: got {t.dtype} {tuple(t.shape)} on {t.device}, takes float32 ({video.shape[1]},) on "
                f"{token_idx.device}"
            )
    if out_dtype == torch.uint8 and (video.dtype != torch.uint8 or scale is not None):
        raise ValueError(f"out_dtype: got uint8 for a {video.dtype} video, takes uint8 for raw uint8 pixels only")


def gather_tubes(
    video: Tensor,
    token_idx: Tensor,
    clip_idx: Tensor,
    tubelet: int,
    patch: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    pin: bool = False,
) -> Tensor:
    """Pixels of the given tokens, one row a token, on the device of token_idx.

    video: [B, C, F, H, W] uint8 or float, any strides; for tokens on a GPU also in pinned host memory, which must then
    stay as it is until the stream has passed.  token_idx, clip_idx: [T] int32.  scale, shift: [C] float32, or neither.
    out_dtype: default uint8 for raw uint8 pixels, else float32.  pin: rows of a CPU gather in page-locked memory, where
    there is a CUDA device.  Returns [T, C*tubelet*patch*patch] in the order (c, dt, dy, dx).
    Where a gradient is asked for, the reference runs.  Raises ValueError, TypeError; on the CPU also for an id out of
    range, which on CUDA gives a row of NaN (uint8: zeros).
    """
    if out_dtype is None:
        out_dtype = torch.uint8 if video.dtype == torch.uint8 and scale is None else torch.float32
    _check(video, token_idx, clip_idx, tubelet, patch, scale, shift, out_dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (video, scale, shift)):
        return gather_tubes_ref(video, token_idx, clip_idx, tubelet, patch, scale, shift, out_dtype)
    return _gather_op(video, token_idx, clip_idx, tubelet, patch, scale, shift, out_dtype, pin)


def gather_into(
    out: Tensor,
    video: Tensor,
    token_idx: Tensor,
    clip_idx: Tensor,
    tubelet: int,
    patch: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> None:
    """`gather_tubes` into a buffer that is there already, such as a pinned one.

    out: [T, C*tubelet*patch*patch] uint8 or float32, contiguous, on the device of token_idx; the rest as in
    gather_tubes.
    """
    _check(video, token_idx, clip_idx, tubelet, patch, scale, shift, out.dtype)
    shape = (token_idx.shape[0], video.shape[1] * tubelet * patch * patch)
    if out.dtype not in _PIXEL:
        raise TypeError(f"out: got {out.dtype}, takes uint8 or float32")
    if out.shape != shape or not out.is_contiguous() or out.device != token_idx.device:
        raise ValueError(
            f"out: got {tuple(out.shape)} with strides {out.stride()} on {out.device}, takes contiguous {shape} on "
            f"{token_idx.device}"
        )
    _fill_op(out, video, token_idx, clip_idx, tubelet, patch, scale, shift)


def gather_tubes_ref(
    video: Tensor,
    token_idx: Tensor,
    clip_idx: Tensor,
    tubelet: int,
    patch: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`gather_tubes` in plain torch."""
    if out_dtype is None:
        out_dtype = torch.uint8 if video.dtype == torch.uint8 and scale is None else torch.float32
    patches = video.unfold(2, tubelet, tubelet).unfold(3, patch, patch).unfold(4, patch, patch)
    h, w = patches.shape[3:5]
    rows = patches[clip_idx, :, token_idx // (h * w), token_idx // w % h, token_idx % w]  # [T, C, dt, dy, dx]
    if scale is not None and shift is not None:
        rows = rows.float() * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)
    return rows.flatten(1).to(out_dtype)


def union_rows(keep_idx: Tensor, cu_seqlens: Tensor, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that any view of a clip keeps, so that each is moved and embedded once; host tensors.

    keep_idx: [T] int32, ascending in every sequence.  cu_seqlens: [S+1] int32, `views` sequences in a row a clip.
    Returns union_idx [U] int32, ascending ids clip by clip; union_clip [U] int32, their clip; row_of [T] int32, the row
    in that list of every packed token.  Raises ValueError, TypeError, also for ids or bounds that do not ascend.
    """
    check_ids("keep_idx", keep_idx, torch.int32)
    check_ids("cu_seqlens", cu_seqlens, torch.int32)
    if keep_idx.device.type != "cpu" or cu_seqlens.device.type != "cpu":
        raise ValueError(f"keep_idx, cu_seqlens: got {keep_idx.device}, {cu_seqlens.device}, takes cpu")
    sequences = cu_seqlens.shape[0] - 1
    if views < 1 or sequences < 0 or sequences % views:
        raise ValueError(f"views: got {views} for {sequences} sequences, takes a divisor of them")
    return _union_op(keep_idx, cu_seqlens, views)


def union_rows_ref(keep_idx: Tensor, cu_seqlens: Tensor, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """`union_rows` in plain torch."""
    tokens_of = cu_seqlens[::views].diff()  # [B]
    clip = torch.repeat_interleave(torch.arange(tokens_of.shape[0]), tokens_of)
    union, row_of = (clip << 31 | keep_idx).unique(return_inverse=True)
    return (union & 0x7FFFFFFF).int(), (union >> 31).int(), row_of.int()
