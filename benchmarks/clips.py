"""What the ensemble benchmark looks at: given video files, or clips of a moving hand that it draws itself."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from harness import progress
from torch import Tensor

from mmfast.data import synthetic
from mmfast.data.video import VideoError, find_videos, load_clip

RENDERED = 4  # clips drawn when no video is given


@dataclass
class Clips:
    """uint8 clips [3, F, H, W], one at a time in the order of the files, and what could not be read with its reason."""

    num_frames: int
    size: int
    source: str = ""
    names: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def decoded(self, paths: Sequence[str | Path]) -> Iterator[Tensor]:
        """Clips of the videos among files and folders; bad ones are skipped and noted."""
        files: list[Path] = []
        for path in paths:
            try:
                files += find_videos([path])
            except VideoError as error:
                self.bad.append(str(error))
        for file in progress(files, "decoding", len(files)):
            try:
                clip = load_clip(file, num_frames=self.num_frames, size=self.size)
            except VideoError as error:
                self.bad.append(str(error))
                continue
            self.names.append(file.name)
            yield clip

    def rendered(self, count: int, seed: int) -> Iterator[Tensor]:
        """Drawn clips, without a file in between."""
        for index in range(count):
            action = synthetic.ACTIONS[index % len(synthetic.ACTIONS)]
            self.names.append(f"{action}_{index:02d}")
            frames = synthetic.render_clip(seed + index, action, self.num_frames, self.size)
            yield frames.permute(3, 0, 1, 2)

    def written_and_read(self, count: int, seed: int) -> Iterator[Tensor]:
        """Drawn clips, encoded as mp4 into a temporary folder and decoded again."""
        with tempfile.TemporaryDirectory(prefix="mmfast-clips-") as folder:
            synthetic.render_videos(folder, count, seed, num_frames=max(48, self.num_frames))
            yield from self.decoded([folder])


def have_av() -> bool:
    try:
        import av  # noqa: F401 (only whether it is there)
    except ImportError:
        return False
    return True


def batches(clips: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Stack clips to uint8 [B, 3, F, H, W], laid out as a decoder does: [B, F, H, W, 3] in memory."""
    waiting: list[Tensor] = []
    for clip in clips:
        waiting.append(clip.permute(1, 2, 3, 0))
        if len(waiting) == size:
            yield torch.stack(waiting).permute(0, 4, 1, 2, 3)
            waiting = []
    if waiting:
        yield torch.stack(waiting).permute(0, 4, 1, 2, 3)
