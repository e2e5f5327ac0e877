"""What the tests of the commands run on: a checkpoint, labelled videos, and the commands themselves."""

from pathlib import Path

import numpy as np
from makers import canonical, tiny_config
from video_files import moving_frames, write_clip

from mmfast.checkpoints import save_pretrained
from mmfast.commands import COMMANDS
from mmfast.vit import MaskedViT

MAIN = "import sys; from mmfast.commands import COMMANDS; sys.exit(COMMANDS[sys.argv[1]](sys.argv[2:]))"


def run(command: str, *arguments: object) -> int:
    return COMMANDS[command]([str(a) for a in arguments])


def write_checkpoint(folder: Path) -> Path:
    net = MaskedViT(tiny_config())
    net.load_state_dict(canonical(tiny_config()))
    save_pretrained(net, folder)
    return folder


def write_labelled(folder: Path) -> Path:
    """Three classes of six short videos; a class is a brightness."""
    for name, level in (("bright", 200), ("dark", 0), ("grey", 100)):
        (folder / name).mkdir()
        for i in range(6):
            frames = moving_frames(6, seed=i) // 8 + np.uint8(level)
            write_clip(folder / name / f"{i}.mp4", frames)
    return folder
