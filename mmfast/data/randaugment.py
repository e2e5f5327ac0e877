"""RandAugment (Cubuk et al., arXiv 1909.13719) of a clip, with the operations and magnitudes that timm calls "inc1".

Of 15 operations so many are drawn with replacement, each is done with a probability, and as strongly as a level l says that is
drawn from N(magnitude, std) and cut to 0..10. A sign is drawn for what can go either way. Everything is drawn once a clip.

    Rotate           30 l/10 degrees, to either side             AutoContrast, Equalize, Invert: no level
    ShearX, ShearY   0.3 l/10 pixels a pixel, either way         Posterize     keeps 4 - floor(4 l/10) bits
    TranslateX, Y    0.45 l/10 of the frame, either way          Solarize      inverts from 256 - floor(256 l/10) on
    Color, Contrast, Brightness, Sharpness                       SolarizeAdd   adds min(128, floor(110 l/10)) below 128
                     enhanced by max(0.1, 1 +- 0.9 l/10)

Geometry is bicubic, and what comes in from outside the frame is grey (128).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_LEVELS = 10
_GREY = (128, 128, 128)
_FORM = re.compile(r"rand-m(\d+(?:\.\d+)?)-n(\d+)(?:-mstd(\d+(?:\.\d+)?))?(?:-p(\d+(?:\.\d+)?))?-inc1")


class Operation(NamedTuple):
    """What is done to every frame.   amount: in the operation's own unit; 0 where it has none."""

    name: str
    amount: float


@dataclass(frozen=True)
class RandAugment:
    """Which operations a clip gets.   magnitude, std: of the level. num_ops: drawn. probability: of each drawn one.

    Raises ValueError for a number out of range.
    """

    magnitude: float = 7.0
    num_ops: int = 4
    std: float = 0.5
    probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= _LEVELS:
            raise ValueError(f"magnitude must lie in 0..{_LEVELS}, got {self.magnitude}")
        if self.num_ops < 1:
            raise ValueError(f"num_ops must be at least 1, got {self.num_ops}")
        if not 0 <= self.std < math.inf:
            raise ValueError(f"std must be finite and at least 0, got {self.std}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must lie in 0..1, got {self.probability}")

    @classmethod
    def parse(cls, text: str) -> RandAugment:
        """The policy that timm writes so, such as "rand-m7-n4-mstd0.5-inc1". ValueError for any other form."""
        parts = _FORM.fullmatch(text)
        if parts is None:
            raise ValueError(
                f"randaugment must have the form rand-m7-n4-mstd0.5-inc1 (mstd, and p in front of inc1, may be left out), "
                f"got {text!r}"
            )
        magnitude, num_ops, std, probability = parts.groups()
        return cls(float(magnitude), int(num_ops), float(std or 0), float(probability or 0.5))

    def draw(self, generator: torch.Generator) -> tuple[Operation, ...]:
        """The operations of one clip, in order. Takes as many numbers from the generator whatever comes of it."""
        n = self.num_ops
        which = torch.randint(len(_AMOUNTS), (n,), generator=generator).tolist()
        done, signs = (torch.rand(2, n, generator=generator) < torch.tensor([[self.probability], [0.5]])).tolist()
        spread = torch.randn(n, generator=generator, dtype=torch.float64).tolist()
        names = list(_AMOUNTS)
        drawn = []
        for i in range(n):
            level = min(max(self.magnitude + self.std * spread[i], 0.0), float(_LEVELS))
            amount = _AMOUNTS[names[which[i]]](level / _LEVELS, -1.0 if signs[i] else 1.0)
            if done[i]:
                drawn.append(Operation(names[which[i]], amount))
        return tuple(drawn)


def operate(clip: Tensor, operations: Sequence[Operation]) -> Tensor:
    """Every frame after the operations, one after another.

    clip: uint8 [3, F, H, W] on any strides -> uint8 [3, F, H, W], a view of [F, H, W, 3]; without operations, the clip itself.
    Statistics of an operation (AutoContrast, Equalize, Contrast) are of each frame. Raises ValueError for another shape,
    TypeError for another dtype, ImportError without Pillow.
    """
    if clip.dim() != 4 or clip.shape[0] != 3:
        raise ValueError(f"clip must be [3, F, H, W], got {tuple(clip.shape)}")
    if clip.dtype != torch.uint8:
        raise TypeError(f"clip must be uint8, got {clip.dtype}")
    if not operations:
        return clip
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("RandAugment needs Pillow: pip install pillow") from error
    frames = []
    for pixels in clip.permute(1, 2, 3, 0).contiguous().numpy():
        image = Image.fromarray(pixels)
        for name, amount in operations:
            image = _operated(image, name, amount)
        frames.append(np.asarray(image))
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)


# -- inside ------------------------------------------------------------------------------------------------------------


def _enhanced(level: float, sign: float) -> float:
    return max(0.1, 1 + sign * 0.9 * level)


def _nothing(level: float, sign: float) -> float:
    return 0.0


# Name -> what a level in 0..1 and a sign make of it.
_AMOUNTS: dict[str, Callable[[float, float], float]] = {
    "AutoContrast": _nothing,
    "Equalize": _nothing,
    "Invert": _nothing,
    "Rotate": lambda level, sign: sign * 30 * level,
    "Posterize": lambda level, sign: 4.0 - int(4 * level),
    "Solarize": lambda level, sign: 256.0 - int(256 * level),
    "SolarizeAdd": lambda level, sign: float(min(128, int(110 * level))),
    "Color": _enhanced,
    "Contrast": _enhanced,
    "Brightness": _enhanced,
    "Sharpness": _enhanced,
    "ShearX": lambda level, sign: sign * 0.3 * level,
    "ShearY": lambda level, sign: sign * 0.3 * level,
    "TranslateX": lambda level, sign: sign * 0.45 * level,
    "TranslateY": lambda level, sign: sign * 0.45 * level,
}


def _operated(image: Any, name: str, amount: float) -> Any:
    """A Pillow image after one operation."""
    from PIL import Image, ImageEnhance, ImageOps

    if name in ("AutoContrast", "Equalize", "Invert"):
        return getattr(ImageOps, name.lower())(image)
    if name == "Posterize":
        return ImageOps.posterize(image, int(amount))
    if name == "Solarize":
        return ImageOps.solarize(image, int(amount))
    if name == "SolarizeAdd":
        table = [min(255, i + int(amount)) if i < 128 else i for i in range(256)]
        return image.point(table * 3)
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return getattr(ImageEnhance, name)(image).enhance(amount)
    how = {"resample": Image.Resampling.BICUBIC, "fillcolor": _GREY}
    if name == "Rotate":
        return image.rotate(amount, **how)
    # Where an output pixel (x, y) is taken from: (a x + b y + c, d x + e y + f).
    width, height = image.size
    taken = {
        "ShearX": (1, amount, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, amount, 1, 0),
        "TranslateX": (1, 0, amount * width, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, amount * height),
    }[name]
    return image.transform(image.size, Image.Transform.AFFINE, taken, **how)
