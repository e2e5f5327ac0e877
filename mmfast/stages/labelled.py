"""Labelled videos with named classes: what the stages share that learn to classify them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from ..data.records import AnnotationSet
from ..data.transforms import Augmentation
from ..data.video_lists import read_class_names
from .data import Clips, StageData


class LabelledData(StageData):
    """Labelled train clips, and val clips of the same classes or none. A subclass sets `augmentation` of the train clips.

    Training draws a place in time: with dense sampling the first of num_frames frames, stride apart, with uniform sampling a
    frame of each of num_frames equal parts. Validation takes the centre of frame and clip, or the middles of the parts; so
    does training with `position` centre, and the centre of the frame without an `augmentation`.
    """

    augmentation: Augmentation | None
    position: Literal["random", "centre"] = "random"
    numbered = False  # whether the classes of a list may go by number, without a table of their names

    def __init__(
        self,
        train: Clips,
        val: Clips | None,
        labels: str | None,
        batch_size: int,
        num_workers: int,
        num_frames: int,
        size: int,
        sampling: Literal["dense", "uniform"],
        stride: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size, num_workers, num_frames, size, "joint", True, seed)
        self.train, self.val, self.labels = train, val, labels
        self.stride = stride if sampling == "dense" else None

    @cached_property
    def names(self) -> list[str]:
        """The classes, by number."""
        if self.labels is not None:
            return read_class_names(self.labels)
        if self.train.format == "list" and not self.numbered:
            raise ValueError(
                "data.labels must be given, a CSV table `id,name`: a list knows its classes by number alone"
            )
        records = self._clips("train", self.train, ("rgb",)).records
        if self.train.format == "list":
            return [str(i) for i in range(1 + max(-1 if r.label is None else r.label for r in records))]
        classes = {r.label: r.label_name or str(r.label) for r in records if r.label is not None}
        if not classes:
            raise ValueError(f"data.train must be labelled: none of its {len(records)} clips is")
        lacking = [i for i in range(len(classes)) if i not in classes]
        if lacking:
            raise ValueError(f"data.train must number its classes from 0 on, without a gap; {lacking[0]} is missing")
        return [classes[i] for i in range(len(classes))]

    def sets(self) -> dict[str, Any]:
        position = "parts" if self.position == "random" and not self.stride else self.position
        clips = self._labelled("train", self.train)
        augment = "none" if self.augmentation is None else self.augmentation
        own = {"train": True, "augment": augment, "resize": "crop", "position": position, "seed": self.seed}
        return {"train": self.train.dataset(("rgb",), clips, **own, **self._sampling(self.train), **self.settings)}

    def val_dataloader(self) -> Any:
        if self.val is None:
            return []
        clips = self._labelled("val", self.val)
        return self._placed(self._still(self.val, clips), len(clips))

    # -- inside ------------------------------------------------------------------------------------------------

    def _still(self, clips: Clips, found: AnnotationSet) -> Any:
        """The clips as they are validated on: nothing about them is drawn."""
        own = {"train": False, "resize": "crop", "position": "centre"}
        return clips.dataset(("rgb",), found, **own, **self._sampling(clips), **self.settings)

    def _sampling(self, clips: Clips) -> dict[str, int | None]:
        return {} if clips.stride is not None else {"stride": self.stride}

    def _labelled(self, which: str, clips: Clips) -> AnnotationSet:
        """The clips, all labelled, under the numbers that `names` gives their classes."""
        found = self._clips(which, clips, ("rgb",))
        nameless = sum(record.label is None for record in found.records)
        if nameless:
            raise ValueError(f"data.{which} must be labelled: {nameless} of {len(found)} clips are not")
        if clips.format == "list":
            outside = [r for r in found.records if r.label is not None and not 0 <= r.label < len(self.names)]
            if outside:
                raise ValueError(
                    f"data.{which}: {outside[0].name} has label {outside[0].label}, there are {len(self.names)} classes"
                )
            return found
        number = {name: i for i, name in enumerate(self.names)}
        called = [record.label_name or str(record.label) for record in found.records]
        unknown = sorted({name for name in called if name not in number})
        if unknown:
            raise ValueError(
                f"data.{which} has classes that have no name in data.labels or data.train: {_few(unknown)}"
            )
        numbers = [number[name] for name in called]
        if clips.format == "synthetic" and numbers != found.labels:
            raise ValueError(f"data.{which}: synthetic classes have numbers of their own; leave data.labels out")
        records = [replace(r, label=label) for r, label in zip(found.records, numbers, strict=True)]
        return replace(found, records=records, classes=dict(enumerate(self.names)))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
