"""Small clips as numbered files for the tests: RGB pictures, flow and heatmap arrays, and records that point at them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmfast.data.records import ClipRecord

Image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install pillow")

ALL = ("rgb", "flow", "pose")
SIZE = (48, 80)  # of the pictures; flow is stored 28 x 28, heatmaps 14 x 14, as 224 and 56 are stored


def scene(index: int, seed: int = 0) -> np.ndarray:
    """uint8 [H, W, 3], smooth, so that resizing keeps it, and another one for every index and seed."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    waves = [np.sin(x / (9 + c) + index * 0.7 + seed) + np.cos(y / (7 + c) - index * 0.4 + c) for c in range(3)]
    return np.clip(127 + 60 * np.stack(waves, 2), 0, 255).astype(np.uint8)


def array_frame(modality: str, index: int, seed: int = 0) -> np.ndarray:
    """float32 [28, 28, 2] of flow, [14, 14, 21] of pose."""
    rng = np.random.default_rng([index, seed, modality == "flow"])
    side, channels = (28, 2) if modality == "flow" else (14, 21)
    return rng.standard_normal((side, side, channels)).astype(np.float32)


def write_frame(path: Path, modality: str, index: int, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if modality == "rgb":
        Image.fromarray(scene(index, seed)).save(path, quality=95)
    else:
        np.save(path, array_frame(modality, index, seed))


def write_record(
    root: Path,
    clip_id: int = 0,
    modalities: Iterable[str] = ("rgb",),
    numbers: Iterable[int] = range(1, 9),
    start: int = 1,
    stop: int | None = 9,
    label: int | None = None,
    kind: str = "png",
) -> ClipRecord:
    """A clip of numbered files, one folder a modality, and its record with paths that have a number field."""
    sources = {}
    for modality in modalities:
        ending = kind if modality == "rgb" else "npy"
        sources[modality] = f"{root}/{modality}/{clip_id}/frame_{{:06d}}.{ending}"
        for number in numbers:
            write_frame(Path(sources[modality].format(number)), modality, number, clip_id)
    return ClipRecord(clip_id, f"clip-{clip_id}", sources, start, stop, label)


def same_items(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
