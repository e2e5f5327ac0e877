"""A small CLIP on the disk, a toy vocabulary for it, and clips of solid colours, for fit-clip and the test protocols."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfast import CLIP, CLIPConfig
from mmfast.data.tokenizer import ClipTokenizer

MERGES = [("r", "e"), ("re", "d</w>"), ("o", "f</w>"), ("v", "i"), ("e", "o</w>"), ("vi", "d"), ("vid", "eo</w>")]
SIZE: dict[str, Any] = dict(
    embed_dim=32, image_size=32, patch_size=8, vision_width=48, vision_depth=2, vision_num_heads=3,
    text_width=32, text_depth=2, text_num_heads=2,
)  # fmt: skip
HIDDEN = {"vision_hidden": 8, "text_hidden": 8}
COLOURS = {"red thing": (220, 20, 20), "green thing": (20, 220, 20), "blue, cold": (20, 20, 220)}


def write_vocabulary(folder: Path) -> Path:
    path = folder / "merges.txt"
    path.write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n")
    return path


def write_clip_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A CLIP of random weights that fits the vocabulary."""
    torch.manual_seed(seed)
    model = CLIP(CLIPConfig(**{**SIZE, "vocab_size": len(ClipTokenizer(MERGES)), **changes}))
    with torch.no_grad():  # pixels must matter more than a random tower lets them
        model.visual.conv1.weight.mul_(4)
    model.save_pretrained(folder)
    return folder


def write_labels(path: Path, names: list[str] | None = None) -> Path:
    rows = [f'{i},"{name}"' for i, name in enumerate(names or list(COLOURS))]
    path.write_text("id,name\n" + "\n".join(rows) + "\n")
    return path


def write_videos(folder: Path, per_class: int = 4, size: tuple[int, int] = (32, 48), frames: int = 6) -> Path:
    """Videos of the colours, and a list of them, `path label`."""
    from video_files import write_clip

    rng = np.random.default_rng(0)
    lines = []
    for label, colour in enumerate(COLOURS.values()):
        for i in range(per_class):
            pixels = np.asarray(colour) + rng.integers(-15, 16, (frames, *size, 1))
            name = f"clip {label} {i}.mp4"
            write_clip(folder / name, np.clip(pixels, 0, 255).astype(np.uint8))
            lines.append(f"{name} {label}")
    path = folder / "list.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def flags(**data: Any) -> list[str]:
    """--data.name value; what is no text goes as JSON."""
    return [t for n, v in data.items() for t in (f"--data.{n}", v if isinstance(v, str) else json.dumps(v))]
