"""Error of the patches that a masked autoencoder predicts (VideoMAE, arXiv 2203.12602).

    loss   = mean over r, s, c of (pred[r, s*C + c] - target[r, s, c])^2,   s = (dt*p + dy)*p + dx
    raw    = video[clip_idx[r], c, slot*tt + dt, row*p + dy, col*p + dx] * scale[c] + shift[c]
    target = raw, or (raw - mean) / (deviation + 1e-6), both over the s of one r and c, the variance unbiased
    dpred  = 2 (pred - target) / (R K) * g,   the target computed again

Only the pixels of the tokens given are read, and no target outlives its block.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfast_kernels import gather, tables
from mmfast_kernels.dispatch import HAVE_TRITON, needs_grad, register, use_kernel
from mmfast_kernels.mae_tokens import decoder_tokens

if HAVE_TRITON:
    from mmfast_kernels import mae_triton

__all__ = ["decoder_tokens", "masked_patch_mse", "masked_patch_targets"]

EPS = 1e-6
_CPU_ROWS = 64  # rows at a time: pixels and errors stay in the L2 cache


class Patches(NamedTuple):
    """The pixels that predictions are compared with: arguments of the op, in its order."""

    video: Tensor  # [B, C, F, H, W]
    token_idx: Tensor  # [R] int32
    clip_idx: Tensor  # [R] int32
    scale: Tensor | None  # [C] fp32
    shift: Tensor | None
    tubelet: int
    patch: int
    normalize: bool

    @property
    def cube(self) -> int:
        """Pixels of a channel."""
        return self.tubelet * self.patch * self.patch

    def split(self) -> "Iterator[Patches]":
        """A few tokens at a time."""
        for token, clip in zip(self.token_idx.split(_CPU_ROWS), self.clip_idx.split(_CPU_ROWS), strict=True):
            yield self._replace(token_idx=token, clip_idx=clip)


def mse_geometry(channels: int, cube: int, config: Mapping[str, Any]) -> dict[str, int]:
    """The kernel's block for tokens of `cube` pixels a channel: as many channels, then rows, as its elements hold."""
    block = 1 << (cube - 1).bit_length()
    at_once = min(1 << (channels - 1).bit_length(), max(config["elements"] // block, 1))
    rows = max(config["elements"] // (block * at_once), 1)
    return {"ROWS": rows, "BLOCK": block, "CHANNELS": at_once, "num_warps": config["num_warps"]}


def _mse_launch(pred: Tensor, of: Patches, g: Tensor | None) -> Tensor:
    """Without g the sums of squares, one a program; with g the gradient."""
    pred = pred if pred.stride(1) == 1 else pred.contiguous()
    video, token_idx, clip_idx = of.video, of.token_idx.contiguous(), of.clip_idx.contiguous()
    scale, shift = (None if t is None else t.contiguous() for t in (of.scale, of.shift))
    n_rows, channels, patch = pred.shape[0], video.shape[1], of.patch

    def run(config: Mapping[str, Any]) -> Tensor:
        options = mse_geometry(channels, of.cube, config)
        programs = math.ceil(n_rows / options["ROWS"])
        sums = dpred = None
        if g is None:
            sums = torch.empty(programs, dtype=torch.float32, device=pred.device)
        else:
            dpred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
        mae_triton.masked_patch_mse_kernel[(programs,)](
            pred, video, token_idx, clip_idx, scale, shift, sums, g, dpred,
            pred.stride(0), *video.stride(), video.shape[3] // patch, video.shape[4] // patch, n_rows,
            2 / pred.numel(), C=channels, TT=of.tubelet, P=patch, UNIT_W=video.stride(4) == 1, NORMALIZE=of.normalize,
            **options,
        )  # fmt: skip
        out = sums if dpred is None else dpred
        assert out is not None
        return out

    with torch.cuda.device_of(pred):
        return run(tables.config("masked_patch_mse", run, cube=of.cube))


def _errors(pred: Tensor, of: Patches) -> Tensor:
    """pred - target as fp32 [r, C, cube] in torch.   pred: [r, K]."""
    affine = (None, None) if of.normalize else (of.scale, of.shift)
    ids = (of.token_idx, of.clip_idx)
    rows = gather.gather_tubes(of.video.detach(), *ids, of.tubelet, of.patch, *affine, torch.float32)
    target = rows.view(-1, of.video.shape[1], of.cube)
    if of.normalize:
        # Of the pixels as they are stored: raw = pixel * scale + shift moves the mean and stretches the deviation.
        target -= target.mean(-1, keepdim=True)
        deviation = target.square().sum(-1, keepdim=True).div_(of.cube - 1).sqrt_()
        if of.scale is None:
            target /= deviation + EPS
        else:
            stretch = of.scale.view(-1, 1)
            target *= stretch / (deviation * stretch.abs() + EPS)
    return pred.float().view(-1, of.cube, of.video.shape[1]).transpose(1, 2) - target


def _mse(pred: Tensor, *patches: Any) -> Tensor:
    of = Patches(*patches)
    if use_kernel(pred, of.video):
        return _mse_launch(pred, of, None).sum() / pred.numel()
    total = torch.zeros((), dtype=torch.float64, device=pred.device)
    for block, part in zip(pred.split(_CPU_ROWS), of.split(), strict=True):
        total += _errors(block, part).square_().sum()
    return (total / pred.numel()).float()


def _mse_fake(pred: Tensor, *_: object) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=pred.device)


def _mse_backward(g: Tensor, pred: Tensor, *patches: Any) -> Tensor:
    of = Patches(*patches)
    if use_kernel(pred, of.video):
        return _mse_launch(pred, of, g)
    dpred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    factor = g * (2 / pred.numel())
    for out, block, part in zip(dpred.split(_CPU_ROWS), pred.split(_CPU_ROWS), of.split(), strict=True):
        error = _errors(block, part).mul_(factor)
        out.view(-1, error.shape[2], error.shape[1]).copy_(error.transpose(1, 2))
    return dpred


def _mse_backward_fake(g: Tensor, pred: Tensor, *_: object) -> Tensor:
    return torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)


_MSE_ARGUMENTS = (
    "Tensor pred, Tensor video, Tensor token_idx, Tensor clip_idx, Tensor? scale, Tensor? shift, int tubelet, "
    "int patch, bool normalize"
)
masked_patch_mse_op = register(f"masked_patch_mse({_MSE_ARGUMENTS}) -> Tensor", _mse, _mse_fake)
masked_patch_mse_backward_op = register(
    f"masked_patch_mse_backward(Tensor g, {_MSE_ARGUMENTS}) -> Tensor", _mse_backward, _mse_backward_fake
)


class _MaskedPatchMse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, *given: Any) -> Tensor:
        tensors, ctx.how = given[:5], given[5:]
        ctx.save_for_backward(pred, *tensors)
        return masked_patch_mse_op(pred, *given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dpred = masked_patch_mse_backward_op(g, *ctx.saved_tensors, *ctx.how)
        return dpred, None, None, None, None, None, None, None, None


def masked_patch_mse(
    pred: Tensor,
    video: Tensor,
    token_idx: Tensor,
    clip_idx: Tensor,
    *,
    tubelet: int,
    patch: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """Mean squared error of predicted patches against the pixels of their tokens.

    pred: [R, K] float, K = tubelet*patch*patch*C with the channel fastest. video: [B, C, F, H, W] uint8 or float, any
    strides. token_idx, clip_idx: [R] int32, ids on the grid (F/tubelet, H/patch, W/patch) and rows of video.
    scale, shift: [C] fp32, pixel*scale + shift is the raw pixel: 1/255 and 0 for uint8, std and mean for a normalised
    video. normalize: targets of mean 0 and deviation 1 for each token and channel; raw pixels if False.
    Returns a scalar, fp32 (float64 for a float64 pred). Gradient for pred only, in its dtype.
    Ids out of range are not looked for on a GPU. Raises ValueError, TypeError; also where there is no row.
    """
    of = Patches(video, token_idx, clip_idx, scale, shift, tubelet, patch, normalize)
    _check_patches("masked_patch_mse", of)
    width = video.shape[1] * tubelet * patch * patch
    if pred.dim() != 2 or pred.shape != (token_idx.shape[0], width):
        raise ValueError(f"masked_patch_mse: pred takes {(token_idx.shape[0], width)}, got {tuple(pred.shape)}")
    if not pred.is_floating_point():
        raise TypeError(f"masked_patch_mse: pred takes a floating dtype, got {pred.dtype}")
    if pred.device != video.device:
        raise ValueError(f"masked_patch_mse: pred is on {pred.device}, video on {video.device}")
    if not torch.compiler.is_compiling() and token_idx.shape[0] == 0:  # a graph may not know how many there will be
        raise ValueError("masked_patch_mse: token_idx takes at least one token, got none: no clip, or nothing removed")
    if torch.float64 in (pred.dtype, video.dtype):
        target, _, _ = _targets(of, torch.float64)
        loss = (pred - target).square().mean()
        return loss if pred.dtype == torch.float64 else loss.float()
    run = _MaskedPatchMse.apply if needs_grad(pred) else masked_patch_mse_op
    return run(pred, *of)


def masked_patch_targets(
    video: Tensor,
    token_idx: Tensor,
    clip_idx: Tensor,
    *,
    tubelet: int,
    patch: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """What masked_patch_mse compares with, in plain torch and without gradient: for tests and for pictures.

    Arguments as there. Returns target [R, K], mean [R, C] and deviation [R, C] (1e-6 included), fp32 or float64 as video,
    with raw = target * deviation + mean for each token and channel; 0 and 1 where targets are not normalised.
    """
    of = Patches(video, token_idx, clip_idx, scale, shift, tubelet, patch, normalize)
    _check_patches("masked_patch_targets", of)
    wide = torch.float64 if video.dtype == torch.float64 else torch.float32
    return _targets(of, wide)


@torch.no_grad()
def _targets(of: Patches, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows = gather.gather_tubes_ref(of.video, of.token_idx, of.clip_idx, of.tubelet, of.patch, out_dtype=wide)
    raw = rows.view(of.token_idx.shape[0], of.video.shape[1], of.cube)
    if of.scale is not None and of.shift is not None:
        raw = raw * of.scale.view(-1, 1) + of.shift.view(-1, 1)
    mean, deviation = raw.new_zeros(raw.shape[:2]), raw.new_ones(raw.shape[:2])
    if of.normalize:
        variance, mean = torch.var_mean(raw, -1)
        deviation = variance.sqrt() + EPS
    target = (raw - mean.unsqueeze(-1)) / deviation.unsqueeze(-1)
    return target.transpose(1, 2).flatten(1), mean, deviation


def _check_patches(op: str, of: Patches) -> None:
    video, token_idx, clip_idx, scale, shift, tubelet, patch, normalize = of
    if video.dim() != 5:
        raise ValueError(f"{op}: video takes [B, C, F, H, W], got {tuple(video.shape)}")
    if tubelet < 1 or patch < 1 or video.shape[2] % tubelet or video.shape[3] % patch or video.shape[4] % patch:
        raise ValueError(f"{op}: video takes F in steps of {tubelet=}, H and W of {patch=}, got {tuple(video.shape)}")
    if normalize and tubelet * patch * patch == 1:
        raise ValueError(f"{op}: normalize takes tokens of two pixels or more, got {tubelet=} and {patch=}")
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise TypeError(f"{op}: video takes uint8 or a floating dtype, got {video.dtype}")
    if (scale is None) != (shift is None):
        raise ValueError(f"{op}: takes scale and shift together, got one of them")
    for name, t in (("scale", scale), ("shift", shift)):
        if t is not None and t.dtype != torch.float32:
            raise TypeError(f"{op}: {name} takes torch.float32, got {t.dtype}")
        if t is not None and t.shape != video.shape[1:2]:
            raise ValueError(f"{op}: {name} takes [{video.shape[1]}], got {tuple(t.shape)}")
    for name, t in (("token_idx", token_idx), ("clip_idx", clip_idx)):
        if t.dtype != torch.int32:
            raise TypeError(f"{op}: {name} takes torch.int32, got {t.dtype}")
        if t.dim() != 1 or t.shape != token_idx.shape:
            raise ValueError(f"{op}: {name} takes [R] as token_idx, got {tuple(t.shape)}")
    for name, t in (("token_idx", token_idx), ("clip_idx", clip_idx), ("scale", scale), ("shift", shift)):
        if t is not None and t.device != video.device:
            raise ValueError(f"{op}: {name} is on {t.device}, video on {video.device}")
