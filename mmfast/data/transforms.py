"""Crop, flip and normalise one clip. What is drawn, once a clip, are fractions of the frame, which every modality may share.

What "joint" does to the modalities of one clip, so that a token covers the same scene in all of them:
- every modality shows the same part of the frame, whatever its stored size, and all are mirrored or none;
- flow's x changes its sign in a mirrored clip, and both components grow with the zoom: the flow of an enlarged clip is
  larger, by frame / crop along each side;
- hand heatmaps keep their channels: a channel is a joint of any hand, and a mirrored left hand is a right one.
"reference" is what MM-CDFSL released: RGB is cropped and mirrored, flow and heatmaps stay whole, so a token of RGB lies
over another part of the scene than the same token of flow.

Pixels are resized with an antialiased bilinear filter in training as in evaluation; uint8 stays uint8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.data.randaugment import Operation, RandAugment

_ATTEMPTS = 10  # torchvision's, before it falls back to the centre


@dataclass(frozen=True)
class Crop:
    """The part of the frame that is kept, in fractions of its height and width, and whether it is mirrored."""

    top: float = 0.0
    left: float = 0.0
    height: float = 1.0
    width: float = 1.0
    flip: bool = False

    def __post_init__(self) -> None:
        inside = (
            0 <= self.top < self.top + self.height <= 1 + 1e-9 and 0 <= self.left < self.left + self.width <= 1 + 1e-9
        )
        if not inside:
            raise ValueError(
                f"a crop must lie in the frame: top {self.top} + height {self.height} and left {self.left} + "
                f"width {self.width} must stay within 0..1"
            )


WHOLE = Crop()


@dataclass(frozen=True)
class Draw:
    """The random numbers of one clip, drawn before its size is known."""

    areas: tuple[float, ...]  # fractions of the frame's area
    ratios: tuple[float, ...]  # width / height
    place: tuple[float, float]  # down and across, 0..1
    flip: bool
    ratio_range: tuple[float, float]
    zoom: float | None = None  # the frame's short side over that of a square crop, in place of areas and ratios
    operations: tuple[Operation, ...] = ()  # of RandAugment, done to the crop

    def crop(self, height: int, width: int) -> Crop:
        """The crop of a frame of this size, on whole pixels: torchvision's rule for a random resized crop, or a square."""
        if self.zoom is not None:
            side = max(round(min(height, width) / self.zoom), 1)
            top, left = int(self.place[0] * (height - side + 1)), int(self.place[1] * (width - side + 1))
            return Crop(top / height, left / width, side / height, side / width, self.flip)
        for area, ratio in zip(self.areas, self.ratios, strict=True):
            w, h = round(math.sqrt(height * width * area * ratio)), round(math.sqrt(height * width * area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = min(int(self.place[0] * (height - h + 1)), height - h)
                left = min(int(self.place[1] * (width - w + 1)), width - w)
                return Crop(top / height, left / width, h / height, w / width, self.flip)
        low, high = self.ratio_range
        w, h = width, height
        if width / height < low:
            h = min(round(width / low), height)
        elif width / height > high:
            w = min(round(height * high), width)
        return Crop((height - h) // 2 / height, (width - w) // 2 / width, h / height, w / width, self.flip)


@dataclass(frozen=True)
class Augmentation:
    """One random resized crop and one flip a clip.

    scale: of the crop's area to the frame's; ratio: of its width to its height; flip: the probability of mirroring;
    joint: whether flow and heatmaps share them, or stay whole (module docstring). short_side: a square crop instead, into which
    the frame's short side would go so many times, from low to high. randaugment: what is done to the colours and the place of the
    crop besides, of RGB alone, such as "rand-m7-n4-mstd0.5-inc1" (randaugment.py). Raises ValueError.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    joint: bool = True
    short_side: tuple[float, float] | None = None
    randaugment: str | None = None

    def __post_init__(self) -> None:
        if self.randaugment is not None:
            RandAugment.parse(self.randaugment)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be (low, high) within 0..1, low above 0, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio must be (low, high), finite and above 0, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be a probability, got {self.flip}")
        if self.short_side is not None and not 1 <= self.short_side[0] <= self.short_side[1] < math.inf:
            raise ValueError(f"short_side must be (low, high), finite and from 1 on, got {self.short_side}")

    def draw(self, generator: torch.Generator) -> Draw:
        """Everything random about one clip. Takes as many numbers from the generator whatever comes of it."""
        u = torch.rand(2 * _ATTEMPTS + 3, generator=generator, dtype=torch.float64).tolist()
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        near, far = self.short_side or (1.0, 1.0)
        return Draw(
            areas=tuple(self.scale[0] + (self.scale[1] - self.scale[0]) * v for v in u[:_ATTEMPTS]),
            ratios=tuple(math.exp(low + (high - low) * v) for v in u[_ATTEMPTS : 2 * _ATTEMPTS]),
            place=(u[-3], u[-2]),
            flip=u[-1] < self.flip,
            ratio_range=self.ratio,
            zoom=None if self.short_side is None else near + (far - near) * u[0],
            operations=() if self.randaugment is None else RandAugment.parse(self.randaugment).draw(generator),
        )


def centre_crop(height: int, width: int, size: tuple[int, int]) -> Crop:
    """The largest crop in the middle of the frame that has the shape of size (h, w)."""
    if size[0] * width >= size[1] * height:
        share = size[1] * height / (size[0] * width)
        return Crop(0.0, (1 - share) / 2, 1.0, share)
    share = size[0] * width / (size[1] * height)
    return Crop((1 - share) / 2, 0.0, share, 1.0)


def _resampling(source: int, target: int, start: float, length: float, like: Tensor) -> Tensor:
    """[target, source]: row i weighs the source's pixels around the middle of the i-th part of start..start + length."""
    step = length / target
    middle = start + (torch.arange(target, dtype=torch.float64) + 0.5) * step - 0.5
    reach = max(step, 1.0)  # a wider filter where pixels are merged: antialiasing
    weights = (1 - (torch.arange(source) - middle[:, None]).abs() / reach).clamp_min(0)
    return (weights / weights.sum(1, keepdim=True)).to(like.dtype)


def _resample(clip: Tensor, crop: Crop, size: tuple[int, int]) -> Tensor:
    """`crop_resize` of float maps [C, F, H, W], at the crop's exact place."""
    height, width = clip.shape[2:]
    if crop.height * height > size[0] or crop.width * width > size[1]:
        down = _resampling(height, size[0], crop.top * height, crop.height * height, clip)
        across = _resampling(width, size[1], crop.left * width, crop.width * width, clip)
        return down @ (clip @ (across.flip(0) if crop.flip else across).T)
    # The same sums, several times as fast, where no pixels are merged: all maps as channels of one picture.
    x = [-crop.width if crop.flip else crop.width, 0.0, 2 * crop.left + crop.width - 1]
    theta = torch.tensor([[x, [0.0, crop.height, 2 * crop.top + crop.height - 1]]], dtype=clip.dtype)
    frames = clip.transpose(0, 1)  # as they lie in memory when read from files
    pixels = frames.reshape(1, -1, height, width)
    grid = F.affine_grid(theta, [1, 1, *size], align_corners=False)
    seen = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return seen.view(*frames.shape[:2], *size).transpose(0, 1)


def crop_resize(clip: Tensor, crop: Crop = WHOLE, size: tuple[int, int] | None = None) -> Tensor:
    """One crop of every frame, resized to size (h, w), mirrored if the crop says so.

    clip: uint8 or float [C, F, H, W] on any strides -> the same dtype, [C, F, h, w]; size None keeps the crop's.
    uint8 is cut at whole pixels and resized in uint8; float maps are resampled at the crop's exact place, so that a
    crop of a 56 x 56 map fits that of a 456 x 256 frame. Raises ValueError for another rank, TypeError for another dtype.
    """
    if clip.dim() != 4:
        raise ValueError(f"clip must be [C, F, H, W], got {tuple(clip.shape)}")
    height, width = clip.shape[2:]
    h, w = max(round(crop.height * height), 1), max(round(crop.width * width), 1)
    size = size or (h, w)
    if clip.dtype == torch.uint8:
        top, left = min(round(crop.top * height), height - h), min(round(crop.left * width), width - w)
        pixels = clip[:, :, top : top + h, left : left + w].transpose(0, 1)
        if size != (h, w):
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        return (pixels.flip(3) if crop.flip else pixels).transpose(0, 1)
    if not clip.is_floating_point():
        raise TypeError(f"clip must be uint8 or floating point, got {clip.dtype}")
    if crop == WHOLE and size == (height, width):
        return clip
    return _resample(clip, crop, size)


def crop_flow(flow: Tensor, crop: Crop = WHOLE, size: tuple[int, int] | None = None) -> Tensor:
    """`crop_resize` of optical flow, float [2, F, H, W], x first: its vectors are enlarged and mirrored with the picture.

    Vectors stay in the unit they are stored in, pixels of a whole frame: resizing alone (size) leaves them as they are.
    """
    if flow.dim() != 4 or flow.shape[0] != 2:
        raise ValueError(f"flow must be [2, F, H, W], got {tuple(flow.shape)}")
    moved = crop_resize(flow, crop, size)
    if crop == WHOLE:
        return moved
    factors = moved.new_tensor([(-1 if crop.flip else 1) / crop.width, 1 / crop.height])
    return moved.mul_(factors.view(2, 1, 1, 1))


def normalize(clip: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(clip - mean) / std, one number a channel: float32 [C, F, H, W], in new memory."""
    shape = (len(mean),) + (1,) * (clip.dim() - 1)
    if len(mean) != clip.shape[0] or len(std) != len(mean):
        raise ValueError(f"mean and std must have {clip.shape[0]} values, got {len(mean)} and {len(std)}")
    centre, scale = (torch.tensor(v, dtype=torch.float32).view(shape) for v in (mean, std))
    return (clip - centre).div_(scale)
