"""Pictures of what a masked autoencoder predicts. Needs matplotlib."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from .mae import MaskedAutoencoder
from .masks import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Statistics = Literal["visible", "target"]
_STATISTICS = ("visible", "target")
_REMOVED = 0.42  # grey of a removed patch
_WIDE = 1.94  # inches of a frame
_POWER = (
    3.0  # of the distance, where statistics of visible patches stand in for removed ones; the best of 1..8 on clips
)


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, video: Tensor, mask: Tensor, statistics: Statistics = "visible") -> Tensor:
    """The clips with their removed patches as predicted, the visible ones as they are.

    video: uint8 or normalised float [B, C, F, H, W]. mask: bool [B, N], True = removed, equally many in each.
    statistics: for a model that predicts normalised patches, where the mean and std of a removed patch come from.
    "visible" estimates them from the visible patches of the clip, nearer ones weighing more; "target" takes the removed
    patch's own, as published pictures do: what the model cannot know then shows in the picture.

    Returns fp32 [B, C, F, H, W] before normalisation: 0..1 for RGB, pixels for flow. Predictions are not clipped.
    Raises ValueError or TypeError.
    """
    if statistics not in _STATISTICS:
        raise ValueError(f"statistics must be one of {', '.join(_STATISTICS)}, got {statistics!r}")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be bool [B, N], one view a clip, got {got}")
    grid = model.encoder.check_video(video)
    training = model.training
    model.eval()
    try:
        visible, plan, _ = model.packs(video, mask)
        pred = model.predict(model.encode(video, visible), plan, grid).float()
    finally:
        model.train(training)
    patches = _patches(pixels(model, video), model)
    clip, token = plan.clip_idx.long(), plan.token_idx.long()
    values = pred.view(-1, *patches.shape[2:])
    if model.config.normalize_target:
        mean = patches.mean(2)
        std = patches.var(2, unbiased=True).sqrt() + 1e-6
        if statistics == "visible":
            weight = _nearness(grid, mask.to(pred.device))
            mean, std = weight @ mean, weight @ std
        values = values * std[clip, token][:, None] + mean[clip, token][:, None]
    return _unpatched(patches.index_put((clip, token), values), grid, model)


def pixels(model: MaskedAutoencoder, video: Tensor) -> Tensor:
    """A clip before normalisation, fp32 on the model's device: 0..1 for RGB.   video: uint8 or normalised float."""
    video = video.to(model.mask_token.device)
    if video.dtype == torch.uint8:
        return video.float() / 255
    mean, std = (
        video.new_tensor(v, dtype=torch.float32).view(-1, 1, 1, 1) for v in (model.config.mean, model.config.std)
    )
    return video.float() * std + mean


def _patches(video: Tensor, model: MaskedAutoencoder) -> Tensor:
    """[B, C, F, H, W] -> [B, N, tt*p*p, C]"""
    p = model.config.patch_size
    return rearrange(
        video, "b c (t a) (h p) (w q) -> b (t h w) (a p q) c", a=model.config.tubelet_size, p=p, q=p
    ).contiguous()


def _unpatched(patches: Tensor, grid: Grid, model: MaskedAutoencoder) -> Tensor:
    """[B, N, tt*p*p, C] -> [B, C, F, H, W]"""
    t, h, w = grid
    p = model.config.patch_size
    return rearrange(patches, "b (t h w) (a p q) c -> b c (t a) (h p) (w q)", t=t, h=h, w=w, p=p, q=p)


def _nearness(grid: Grid, mask: Tensor) -> Tensor:
    """Weights [B, N, N] over the visible tokens: the inverse of their distance on the grid, to a power."""
    sides = [torch.arange(side, dtype=torch.float32, device=mask.device) for side in grid]
    places = torch.cartesian_prod(*sides)
    # A token's own place has no inverse distance; half a step stands for it.
    weight = torch.cdist(places, places).clamp(min=0.5).pow(-_POWER) * ~mask[:, None]
    return weight / weight.sum(-1, keepdim=True)


def plot_reconstruction(
    model: MaskedAutoencoder,
    video: Tensor,
    mask: Tensor,
    *,
    clip: int = 0,
    frames: int | Sequence[int] = 4,
    statistics: Statistics = "visible",
    path: str | os.PathLike[str] | None = None,
    title: str = "",
) -> "Figure":
    """A figure of one clip: rows original, masked, reconstruction; columns frames. What was done stands in its title.

    video, mask, statistics: as in `reconstruct`. clip: which of the batch. frames: how many, evenly spread, or which.
    path: where to write the picture; the file appears whole or not at all. RGB is shown as it is, two channels as optical
    flow on the colour wheel (white is no motion), any other number as the maximum over channels.

    Raises ValueError, TypeError, and ImportError without matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not isinstance(video, Tensor) or video.dim() != 5:
        raise ValueError("video must be a tensor [B, C, F, H, W]")
    if not -len(video) <= clip < len(video):
        raise ValueError(f"clip must be one of {len(video)}, got {clip}")
    chosen = _frames(frames, video.shape[2])
    clip %= len(video)
    video, mask = video[clip : clip + 1], mask[clip : clip + 1]
    predicted = reconstruct(model, video, mask, statistics)[0].cpu()
    original = pixels(model, video)[0].cpu()
    removed = _removed_pixels(model, mask, original)
    pictures = [_pictures(x[:, chosen], original) for x in (original, original, predicted)]
    pictures[1][removed[chosen].numpy()] = _REMOVED

    height, width = original.shape[2:]
    wide, tall = 0.25 + _WIDE * len(chosen), _WIDE * height / width
    said = [title] * bool(title) + _captions(model, mask, original, predicted, removed, statistics)
    said = [line for text in said for line in textwrap.wrap(text, int(16 * wide))]
    tight = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    figure = Figure(figsize=(wide, 0.35 + 0.14 * len(said) + (tall + 0.04) * 3), layout=tight)
    axes = figure.subplots(3, len(chosen), squeeze=False)
    for name, row, shown in zip(("original", "masked", "reconstruction"), axes, pictures, strict=True):
        row[0].set_ylabel(name, fontsize=9)
        for axis, frame, picture in zip(row, chosen, shown, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if name == "original":
                axis.set_title(f"frame {frame}", fontsize=8, pad=3)
    figure.suptitle("\n".join(said), fontsize=8.5)
    if path is not None:
        save_figure(figure, path)
    return figure


def save_figure(figure: "Figure", path: str | os.PathLike[str], dpi: int = 160) -> Path:
    """Write a figure in the format of the path's suffix, aside and renamed: the file appears whole or not at all."""
    path = Path(path)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        figure.savefig(aside, dpi=dpi)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _frames(frames: int | Sequence[int], count: int) -> list[int]:
    if isinstance(frames, int):
        if not 1 <= frames <= count:
            raise ValueError(f"frames must lie in 1..{count}, got {frames}")
        return torch.linspace(0, count - 1, frames).round().long().tolist()
    chosen = list(frames)
    if not chosen or not all(isinstance(f, int) and 0 <= f < count for f in chosen):
        raise ValueError(f"frames must be numbers in 0..{count - 1}, at least one, got {chosen}")
    return chosen


def _removed_pixels(model: MaskedAutoencoder, mask: Tensor, video: Tensor) -> Tensor:
    """bool [F, H, W]: the pixels of the removed patches."""
    c = model.config
    t, h, w = video.shape[1] // c.tubelet_size, video.shape[2] // c.patch_size, video.shape[3] // c.patch_size
    cells = mask.cpu().view(t, h, w).repeat_interleave(c.tubelet_size, 0)
    return cells.repeat_interleave(c.patch_size, 1).repeat_interleave(c.patch_size, 2)


def _pictures(video: Tensor, original: Tensor) -> Any:
    """numpy [F, H, W, 3] in 0..1.   video: [C, F, H, W]; original: [C, F, H, W], which sets the scale of all rows."""
    import matplotlib

    if video.shape[0] == 3:
        return video.clamp(0, 1).permute(1, 2, 3, 0).numpy().copy()
    if video.shape[0] == 2:
        return _flow_wheel(video, float(original.square().sum(0).sqrt().quantile(0.99)))
    shown, scale = video.amax(0), original.amax(0)
    low, high = float(scale.min()), float(scale.max())
    return matplotlib.colormaps["magma"](((shown - low) / max(high - low, 1e-6)).clamp(0, 1).numpy())[..., :3]


def _flow_wheel(flow: Tensor, largest: float) -> Any:
    """Direction as hue, speed as saturation.   flow: [2, F, H, W]."""
    from matplotlib.colors import hsv_to_rgb

    hue = torch.atan2(flow[1], flow[0]) / (2 * torch.pi) % 1
    speed = (flow.square().sum(0).sqrt() / max(largest, 1e-6)).clamp(0, 1)
    return hsv_to_rgb(torch.stack((hue, speed, torch.ones_like(hue)), -1).numpy())


def _captions(
    model: MaskedAutoencoder, mask: Tensor, original: Tensor, predicted: Tensor, removed: Tensor, statistics: str
) -> list[str]:
    """How much was removed, how well it was predicted, and where mean and contrast come from."""
    shown = predicted.clamp(0, 1) if len(original) == 3 else predicted
    error = (shown - original)[:, removed].square().mean()
    quality = (
        f"{-10 * float(error.log10()):.1f} dB PSNR" if len(original) == 3 else f"mean squared error {float(error):.3g}"
    )
    if not model.config.normalize_target:
        how = "pixels as predicted"
    elif statistics == "visible":
        how = "mean and contrast of a removed patch estimated from visible patches"
    else:
        how = "mean and contrast of a removed patch taken from the original"
    return [f"{int(mask.sum())} of {mask.numel()} patches removed; {quality} over them", how]
