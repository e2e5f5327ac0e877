"""What a data set is a list of: clips, each with where its pixels lie, which frames are its, and what it shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload


@dataclass(frozen=True)
class ClipRecord:
    """One clip.

    clip_id: its number in the data set, from which masks are drawn, so the same wherever the clip stands in a batch.
    name: what a user would call it in a message, unique in the data set.
    sources: modality ("rgb", "flow", "pose") -> a video file, a folder of frames, or a path with a number field such as
    "frames/P01/frame_{:010d}.jpg".
    start, stop: its first frame and the one behind its last, counted as its files are; stop None: to the end.
    label: class number, None where there is none. label_name: the class by name.
    """

    clip_id: int
    name: str
    sources: Mapping[str, Path | str] = field(default_factory=dict)
    start: int = 0
    stop: int | None = None
    label: int | None = None
    label_name: str | None = None


@dataclass(frozen=True)
class AnnotationSet(Sequence[ClipRecord]):
    """The clips of one annotation file, and how they are to be sampled. Iterates over its records.

    stride: frames between two sampled ones; None: samples spread over the whole clip. classes: class number -> name,
    ascending, of every class that a clip has; empty without labels. split: as the file says.
    """

    records: list[ClipRecord]
    stride: int | None = None
    classes: Mapping[int, str] = field(default_factory=dict)
    split: str | None = None
    dataset: str = ""
    num_frames: int = 16

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[ClipRecord]:
        return iter(self.records)

    @overload
    def __getitem__(self, index: int) -> ClipRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[ClipRecord]: ...
    def __getitem__(self, index: int | slice) -> ClipRecord | list[ClipRecord]:
        return self.records[index]

    @property
    def labels(self) -> list[int | None]:
        """Class number of every clip, in order."""
        return [record.label for record in self.records]
