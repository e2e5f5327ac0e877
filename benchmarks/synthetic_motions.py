"""Rendered clips for M2-CLIP in miniature: a coloured shape that moves, and captions of what is seen and of how it moves.

A motion has a manner and a direction. A clip played backwards is one of the opposite direction, as likely as it is itself, so
that nothing in its frames without their order tells the direction. A still is one frame of a clip; its caption tells size,
colour, shape and place, never motion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.data.tokenizer import ClipTokenizer

SIDE, FRAMES, CONTEXT = 32, 8, 24
SHAPES = ("circle", "square", "cross")
MANNERS = ("slides", "zigzags", "pulses", "blinks")
DIRECTIONS = ("leftwards", "rightwards", "upwards", "downwards")
_WAYS = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))  # x to the right, y down
_COLOURS = {"red": (225, 45, 40), "green": (45, 190, 60), "blue": (50, 80, 230), "yellow": (235, 215, 50),
            "white": (240, 240, 240)}  # fmt: skip
COLOURS = tuple(_COLOURS)
_PLACES = ("left", "right", "top", "bottom", "middle")
_LARGE = 0.335  # radius, in halves of the side, from which a shape is called large
TEMPLATES = ("A photo of {}", "A video of {}")
# Of each manner one direction is never shown in training, so every word is, but these four motions are not.
NEW_MOTIONS = frozenset(zip(range(4), (0, 2, 1, 3), strict=True))


@dataclass(frozen=True)
class Label:
    """A class: numbers of the shape, the manner and the direction."""

    shape: int
    manner: int
    direction: int

    @property
    def name(self) -> str:
        return f"{SHAPES[self.shape]} {MANNERS[self.manner]} {DIRECTIONS[self.direction]}"

    @property
    def motion(self) -> tuple[int, int]:
        return self.manner, self.direction


def label_sets() -> dict[str, list[Label]]:
    """seen: 24 classes to train on. new pairs: 12 of their motions with another shape. new motions: 12 of four others."""
    every = [Label(*numbers) for numbers in product(range(3), range(4), range(4))]
    known = [label for label in every if label.motion not in NEW_MOTIONS]
    spared = []
    for manner in range(len(MANNERS)):
        ways = [way for way in range(len(DIRECTIONS)) if (manner, way) not in NEW_MOTIONS]
        spared += [Label((manner + i) % 3, manner, way) for i, way in enumerate(ways)]  # of each shape as many
    return {
        "seen": [label for label in known if label not in spared],
        "new pairs": spared,
        "new motions": [label for label in every if label.motion in NEW_MOTIONS],
    }


def tokenizer() -> ClipTokenizer:
    """A byte pair encoding made for these captions: few tokens a word."""
    size_words = ("small", "large", "at", "the", "a", "A", "of", "photo", "video")
    words = [*SHAPES, *MANNERS, *DIRECTIONS, *_COLOURS, *_PLACES, *size_words]
    merges: dict[tuple[str, str], None] = {}
    for word in sorted({word.lower() for word in words}, key=len):
        letters = [*word[:-1], f"{word[-1]}</w>"]
        start = letters[0]
        for letter in letters[1:]:
            merges.setdefault((start, letter))
            start += letter
    return ClipTokenizer(list(merges), context=CONTEXT)


def draw_clips(labels: Sequence[Label], seed: int) -> Tensor:
    """A clip for each label: uint8 [B, 3, F, H, W]."""
    return draw_coloured(labels, seed)[0]


def draw_coloured(labels: Sequence[Label], seed: int) -> tuple[Tensor, Tensor]:
    """The clips of draw_clips, and which of COLOURS each shape has, [B]."""
    clips, _, _, colours = _draw(labels, seed)
    return clips, colours


def draw_stills(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Stills uint8 [B, 3, H, W] of clips of any motion, and what they show in words, without template."""
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.stack([torch.randint(n, (count,), generator=draw) for n in (3, 4, 4)], 1).tolist()
    labels = [Label(*row) for row in numbers]
    clips, centre, radius, colours = _draw(labels, seed)
    frame = torch.randint(FRAMES, (count,), generator=draw)
    rows = torch.arange(count)
    place = _place(centre[rows, frame])
    large = (radius[rows, frame] > _LARGE).tolist()
    names = list(_COLOURS)
    captions = [
        f"a {'large' if big else 'small'} {names[colour]} {SHAPES[label.shape]} at the {_PLACES[where]}"
        for big, colour, label, where in zip(large, colours.tolist(), labels, place.tolist(), strict=True)
    ]
    return clips[rows, :, frame], captions


def _place(centre: Tensor) -> Tensor:
    """Numbers of the places of centres [B, 2]."""
    x, y = centre.unbind(-1)
    aside = torch.where(x < 0, 0, 1)
    over = torch.where(y < 0, 2, 3)
    outer = torch.where(x.abs() > y.abs(), aside, over)
    return torch.where(centre.abs().amax(-1) < 0.25, 4, outer)


def _draw(labels: Sequence[Label], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clips, centres [B, F, 2] and radii [B, F] in halves of the side, and numbers of colours [B]."""
    draw = torch.Generator().manual_seed(seed)
    count = len(labels)
    uniform = lambda low, high, *more: low + (high - low) * torch.rand(count, *more, generator=draw)
    manner = torch.tensor([label.manner for label in labels])[:, None]
    way = torch.tensor(_WAYS)[torch.tensor([label.direction for label in labels], dtype=torch.int64)]
    time = torch.linspace(-0.5, 0.5, FRAMES)
    wave = torch.sin(2 * torch.pi * (uniform(1.5, 2.5, 1) * time + uniform(0, 1, 1)))
    length = uniform(0.7, 1.2)
    along = uniform(-1, 1) * (0.65 - length / 2)
    path = along[:, None] + length[:, None] * time
    across = uniform(-0.45, 0.45)[:, None] + torch.where(manner == 1, 0.22 * wave, 0.0)
    centre = path[..., None] * way[:, None] + across[..., None] * way.flip(-1).abs()[:, None]
    radius = uniform(0.24, 0.38)[:, None] * torch.where(manner == 2, 1 + 0.35 * wave, 1.0)
    opacity = torch.where(manner == 3, 0.625 + 0.375 * wave, 1.0)
    colours = torch.randint(len(_COLOURS), (count,), generator=draw)
    paint = torch.tensor(list(_COLOURS.values()), dtype=torch.float32)[colours] * uniform(0.85, 1.05, 1)
    wall = uniform(20, 130, 3, 4, 4)
    wall = (wall + wall.mean(1, keepdim=True)) / 2  # half way to grey
    walls = F.interpolate(wall, (SIDE, SIDE), mode="bicubic", align_corners=False)[:, :, None]
    grid = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    x = grid - centre[..., 0, None, None]
    y = grid[:, None] - centre[..., 1, None, None]
    inside = _distance(torch.tensor([label.shape for label in labels]), x.expand(-1, -1, SIDE, -1),
                       y.expand(-1, -1, -1, SIDE), radius[..., None, None])  # fmt: skip
    cover = (0.5 - inside * SIDE / 2).clamp(0, 1) * opacity[..., None, None]
    pictures = walls + cover[:, None] * (paint[:, :, None, None, None] - walls)
    pictures = pictures + 6 * torch.randn(pictures.shape, generator=draw)
    return pictures.clamp(0, 255).to(torch.uint8), centre, radius.expand(-1, FRAMES), colours


def _distance(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How far [B, F, H, W] pixels are outside their clip's shape."""
    a, b = x.abs(), y.abs()
    circle = (x.square() + y.square()).sqrt() - radius
    square = torch.maximum(a, b) - 0.85 * radius
    bars = [torch.maximum(p - 1.1 * radius, q - 0.36 * radius) for p, q in ((a, b), (b, a))]
    cross = torch.minimum(*bars)
    number = shape[:, None, None, None]
    return torch.where(number == 0, circle, torch.where(number == 1, square, cross))
