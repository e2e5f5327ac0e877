"""Labelled videos, named classes and masked words to the batches of `mmfast fit-clip`."""

from functools import cached_property
from typing import Literal

from ..data.captions import TEMPLATE, Captions
from ..data.tokenizer import ClipTokenizer
from ..data.transforms import Augmentation
from ..data.video_lists import label_words, read_words
from .data import Clips
from .labelled import LabelledData


class FitClipData(LabelledData):
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
        randaugment: RandAugment of a crop, such as "rand-m7-n4-mstd0.5-inc1"; none unless given.
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
        randaugment: str | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__(train, val, labels, batch_size, num_workers, num_frames, size, sampling, stride, seed)
        self.augmentation = Augmentation(short_side=short_side, flip=flip, randaugment=randaugment)
        self.words, self.vocabulary = words, vocabulary
        self.template, self.mask_share, self.mask_template = template, mask_share, mask_template

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
