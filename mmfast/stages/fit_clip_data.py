"""Labelled videos, named classes and masked words to the batches of `mmfast fit-clip`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from ..data.captions import TEMPLATE, Captions
from ..data.records import AnnotationSet
from ..data.tokenizer import ClipTokenizer
from ..data.transforms import Augmentation
from ..data.video_lists import label_words, read_class_names, read_words
from .data import Clips, StageData


class FitClipData(StageData):
    """Labelled videos to train on, and others to validate on. An epoch is one pass over the train videos.

    Args:
        train: labelled clips.
        val: labelled clips of the same classes; without them nothing is validated.
        labels: names of the classes, a CSV table `id,name`; those of the train clips unless given, which a list has not.
        words: vocabulary for masked words, lines `word id`; every word of the names unless given.
        vocabulary: CLIP's merges file or a tokenizer's folder; the installed open_clip's unless given.
        template: of the prompts, with {} for the name.
        mask_share: of a name's words, that are masked; at least one is.
        mask_template: words around the name may be masked too, as published.
        batch_size: clips on one device.
        num_workers: processes that read clips, on each rank.
        num_frames: of a clip.
        size: side of the frames.
        sampling: dense is num_frames frames, stride apart, from a place drawn; uniform a frame drawn from each of num_frames
            equal parts of the clip.
        stride: of dense sampling.
        short_side: frames are enlarged until their short side is so many times size, drawn from low to high, and cropped.
        flip: the share of clips that is mirrored; 0 where left and right mean something.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        train: Clips,
        val: Clips | None = None,
        labels: str | None = None,
        words: str | None = None,
        vocabulary: str | None = None,
        template: str = TEMPLATE,
        mask_share: float = 0.2,
        mask_template: bool = False,
        batch_size: int = 36,
        num_workers: int = 4,
        num_frames: int = 8,
        size: int = 224,
        sampling: Literal["dense", "uniform"] = "dense",
        stride: int = 16,
        short_side: tuple[float, float] = (1.0, 1.15),
        flip: float = 0.5,
        seed: int = 42,
    ) -> None:
        super().__init__(batch_size, num_workers, num_frames, size, "joint", True, seed)
        self.augmentation = Augmentation(short_side=short_side, flip=flip)
        self.train, self.val, self.labels, self.words, self.vocabulary = train, val, labels, words, vocabulary
        self.template, self.mask_share, self.mask_template = template, mask_share, mask_template
        self.stride = stride if sampling == "dense" else None

    @cached_property
    def names(self) -> list[str]:
        """The classes, by number."""
        if self.labels is not None:
            return read_class_names(self.labels)
        if self.train.format == "list":
            raise ValueError(
                "data.labels must be given, a CSV table `id,name`: a list knows its classes by number alone"
            )
        records = self._clips("train", self.train, ("rgb",)).records
        classes = {r.label: r.label_name or str(r.label) for r in records if r.label is not None}
        if not classes:
            raise ValueError(f"data.train must be labelled: none of its {len(records)} clips is")
        lacking = [i for i in range(len(classes)) if i not in classes]
        if lacking:
            raise ValueError(f"data.train must number its classes from 0 on, without a gap; {lacking[0]} is missing")
        return [classes[i] for i in range(len(classes))]

    @cached_property
    def captions(self) -> Captions:
        """Prompts of the classes, whole and masked."""
        words = label_words(self.names) if self.words is None else read_words(self.words)
        return Captions(
            ClipTokenizer.load(self.vocabulary),
            self.names,
            words,
            template=self.template,
            share=self.mask_share,
            mask_template=self.mask_template,
        )

    def sets(self) -> dict[str, Any]:
        position = "random" if self.stride else "parts"
        clips = self._labelled("train", self.train)
        own = {"train": True, "augment": self.augmentation, "position": position, "seed": self.seed}
        return {"train": self.train.dataset(("rgb",), clips, **own, **self._sampling(self.train), **self.settings)}

    def val_dataloader(self) -> Any:
        if self.val is None:
            return []
        clips = self._labelled("val", self.val)
        own = {"train": False, "resize": "crop", "position": "centre"}
        dataset = self.val.dataset(("rgb",), clips, **own, **self._sampling(self.val), **self.settings)
        return self._placed(dataset, len(clips))

    # -- inside ------------------------------------------------------------------------------------------------

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
