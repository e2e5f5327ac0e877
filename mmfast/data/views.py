"""The views of a clip that a test averages over: parts in time, and square crops of each.

Frames are resized until their short side is the side of a crop, whose places along the long side, with m left over, are

    1 crop: m/2        3 crops: 0, m/2, m        4 crops: 0, m/4, m/2, m, as M2-CLIP published
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.data.dataset import ClipDataset
from mmfast.data.frames import read_frames
from mmfast.data.records import ClipRecord
from mmfast.data.transforms import WHOLE, crop_resize

_QUARTERS = {1: (2,), 3: (0, 2, 4), 4: (0, 1, 2, 4)}  # of what the long side has left over


class ViewClips(ClipDataset):
    """Clips of which an item holds all views: "rgb" uint8 [3, V*F, size, size], V = clips * crops, the crops of a part together.

    stride: frames between two sampled ones, in parts at equal distances from the first to the last that fits, or the middle one
    alone; past the end the last frame is shown. None spreads each part's frames over the whole clip, each part some frames later.
    Raises ValueError or TypeError for arguments that make no sense, and ClipError for a clip that cannot be read.
    """

    def __init__(
        self,
        records: Sequence[ClipRecord],
        *,
        num_frames: int = 8,
        stride: int | None = 16,
        size: int = 224,
        clips: int = 1,
        crops: int = 1,
        threads: int = 1,
    ) -> None:
        if not isinstance(clips, int) or clips < 1:
            raise ValueError(f"clips must be at least 1, got {clips}")
        if crops not in _QUARTERS:
            raise ValueError(f"crops must be one of {', '.join(map(str, _QUARTERS))}, got {crops}")
        self.clips, self.crops = clips, crops
        super().__init__(
            records, num_frames=num_frames, stride=stride, size=size, resize="crop", on_broken="raise", threads=threads
        )

    def _read(self, record: ClipRecord, generator: torch.Generator | None) -> tuple[dict[str, Any], int, int]:
        start, stop = self._extent(record)
        wanted = [index for part in range(self.clips) for index in self._part(part, start, stop)]
        held = wanted if stop is None else [min(index, stop - 1) for index in wanted]
        found = read_frames(record, "rgb", held, fit=self._fit, threads=self.threads)
        # In memory [F, h, w, C], as they were read.
        parts = found.pixels.permute(1, 2, 3, 0).split(self.num_frames)
        views = torch.cat([crop for part in parts for crop in self._cut(part)]).permute(3, 0, 1, 2)
        item = {"clip_id": record.clip_id, "label": -1 if record.label is None else record.label, "rgb": views}
        clamped = 0 if stop is None else sum(index >= stop for index in wanted)
        return item, found.missing, clamped

    def _part(self, part: int, start: int, stop: int | None) -> list[int]:
        if self.stride is None:
            assert stop is not None
            length, total = stop - start, 2 * self.clips * self.num_frames
            return [start + (2 * (self.clips * i + part) + 1) * length // total for i in range(self.num_frames)]
        span = (self.num_frames - 1) * self.stride + 1
        room = 0 if stop is None else max(stop - start - span, 0)
        first = start + (room // 2 if self.clips == 1 else round(room * part / (self.clips - 1)))
        return [first + i * self.stride for i in range(self.num_frames)]

    def _fit(self, clip: Tensor) -> Tensor:
        """The clip [3, F, H, W] with a short side of `size`."""
        height, width = clip.shape[2:]
        side, short = self.size[0], min(height, width)
        return crop_resize(clip, WHOLE, (height * side // short, width * side // short))

    def _cut(self, frames: Tensor) -> list[Tensor]:
        """Square crops of frames [F, h, w, C]."""
        side = self.size[0]
        down, across = frames.shape[1] - side, frames.shape[2] - side
        places = [(down * q // 4, across * q // 4) for q in _QUARTERS[self.crops]]
        return [frames[:, top : top + side, left : left + side] for top, left in places]
