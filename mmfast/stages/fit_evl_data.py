"""Labelled videos, or features of them that a frozen backbone gave once, to the batches of `mmfast fit-evl`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from ..data.records import AnnotationSet
from ..data.transforms import Augmentation
from ..evl_cache import CachedClips, FeatureCache, cache_features, collate_features
from .data import Clips
from .labelled import LabelledData

_PRECISIONS = {"bf16-mixed": "bf16", "16-mixed": "fp16"}


class FitEvlData(LabelledData):
    """Labelled videos to train on, and others to validate on. An epoch is one pass over the train videos.

    With `cache` the frozen backbone runs over every clip once, before training, and what the decoder reads of it is kept in
    that folder (in train and val); training then neither decodes videos nor runs the backbone, in this run and in later
    ones. The clips must not change for that: `augment` false, and `position` centre.

    Args:
        train: labelled clips.
        val: labelled clips of the same classes; without them nothing is validated.
        labels: names of the classes, a CSV table `id,name`; those of the train clips unless given, numbers for a list's.
        batch_size: clips on one device.
        num_workers: processes that read clips, on each rank.
        num_frames: of a clip.
        size: side of the frames.
        sampling: dense is num_frames frames, stride apart; uniform a frame from each of num_frames equal parts of the clip.
        stride: of dense sampling.
        position: random draws the place of the frames in time, centre takes the middle of the clip, or of each part.
        augment: draw a crop, its mirror image and RandAugment; false takes the centre of the frame.
        scale: of a crop's area to the frame's, drawn from low to high.
        flip: the share of clips that is mirrored; 0 where left and right mean something.
        randaugment: RandAugment of a crop, such as "rand-m7-n4-mstd0.5-inc1", or null for none.
        cache: folder of the features, made if absent, taken up again if a run was stopped while it made them.
        cache_gib: what the features of the train clips, and those of the val clips, may take at most.
        cache_dtype: of the features.
        seed: of order and augmentation.
    """

    numbered = True

    def __init__(
        self,
        train: Clips,
        val: Clips | None = None,
        labels: str | None = None,
        batch_size: int = 32,
        num_workers: int = 4,
        num_frames: int = 8,
        size: int = 224,
        sampling: Literal["dense", "uniform"] = "dense",
        stride: int = 16,
        position: Literal["random", "centre"] = "random",
        augment: bool = True,
        scale: tuple[float, float] = (0.08, 1.0),
        flip: float = 0.5,
        randaugment: str | None = "rand-m7-n4-mstd0.5-inc1",
        cache: str | None = None,
        cache_gib: float | None = None,
        cache_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
        seed: int = 42,
    ) -> None:
        super().__init__(train, val, labels, batch_size, num_workers, num_frames, size, sampling, stride, seed)
        self.augmentation = Augmentation(scale=scale, flip=flip, randaugment=randaugment) if augment else None
        self.sampling, self.position = sampling, position
        self.cache, self.cache_gib, self.cache_dtype = cache, cache_gib, cache_dtype
        if cache is None:
            if cache_gib is not None:
                raise ValueError(f"data.cache_gib is of data.cache, a folder, which is not given; got {cache_gib:g}")
        else:
            for name, value, wanted in (("augment", augment, False), ("position", position, "centre")):
                if value != wanted:
                    given = str(value).lower()
                    raise ValueError(
                        f"data.{name} must be {str(wanted).lower()} with data.cache, whose clips do not change; got {given}"
                    )
        self._val_set: Any = None

    @property
    def collate_train(self) -> Callable[[list[Any]], Any]:
        return super().collate_train if self.cache is None else _collate_drawn

    @property
    def collate_val(self) -> Callable[[list[Any]], Any]:
        return super().collate_val if self.cache is None else _collate_placed

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if self.cache is not None and self.val is not None and self._val_set is None:
            self._val_set = self._cached("val", self.val)

    def sets(self) -> dict[str, Any]:
        if self.cache is not None:
            return {"train": self._cached("train", self.train)}
        return super().sets()

    def val_dataloader(self) -> Any:
        if self._val_set is None:
            return super().val_dataloader()
        return self._placed(self._val_set, len(self._val_set))

    # -- inside ------------------------------------------------------------------------------------------------

    def _cached(self, which: str, clips: Clips) -> CachedClips:
        """The clips' features; those that are lacking are made first, each rank its share of them."""
        assert self.cache is not None
        trainer: Any = self.trainer
        if trainer is None:
            raise ValueError("data.cache needs a Trainer: the features are of the model that it trains")
        own, found = trainer.lightning_module, self._labelled(which, clips)
        folder = Path(self.cache) / which
        # Trained on masked clips, validated on whole ones.
        made = {
            "mask_ratio": own.mask_ratio if which == "train" else 0.0,
            "seed": own.seed,
            "dtype": self.cache_dtype,
            "precision": _PRECISIONS.get(str(trainer.precision), "fp32"),
            "about": self._about(clips),
        }
        model = own.model.to(trainer.strategy.root_device)
        report = cache_features(
            model,
            self._still(clips, found),
            folder,
            **made,
            max_gib=self.cache_gib,
            batch=self.batch_size,
            workers=self.num_workers,
            rank=trainer.global_rank,
            world=trainer.world_size,
            progress=trainer.progress_bar_callback is not None,
        )
        rank_zero_info(f"{which} features in {folder}: {report}")
        trainer.strategy.barrier(f"{which} features")
        return self._readable(which, FeatureCache(folder, model, **made), found)

    def _about(self, clips: Clips) -> dict[str, Any]:
        """What, beside the model and the clips' names, fixes the pixels of a clip."""
        stride = self.stride if clips.stride is None else clips.stride
        about = {"num_frames": self.settings["num_frames"], "size": self.settings["size"], "stride": stride}
        return {**about, "sampling": self.sampling, "options": clips.options, "split": clips.split}

    def _readable(self, which: str, cache: FeatureCache, found: AnnotationSet) -> CachedClips:
        """The clips that are in the cache, under the numbers of their classes."""
        there = [r for r in found.records if r.clip_id in cache]
        if len(there) < len(found):
            rank_zero_warn(
                f"{len(found) - len(there)} of {len(found)} {which} clips could not be read and are left out"
            )
        labels = [-1 if r.label is None else r.label for r in there]
        return CachedClips(cache, [r.clip_id for r in there], labels)


def _collate_drawn(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: collate_features([sample[name] for sample in samples]) for name in samples[0]}


def _collate_placed(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {"places": [s["place"] for s in samples], **collate_features([s["item"] for s in samples])}
