"""Data modules: clips listed in a file, or synthetic ones, to the batches of a stage."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.annotations import check_disjoint, read_annotations
from ..data.crossdomain import CrossDomain
from ..data.dataset import ClipDataset, collate
from ..data.manifest import folder_manifest, read_manifest
from ..data.records import AnnotationSet, ClipRecord
from ..data.video_lists import FRAME, read_video_list
from .modalities import check_modality
from .sampler import Drawn, EpochSampler, Placed, RankPlaces


@dataclass
class Clips:
    """Which clips, and where they lie.

    Args:
        format: the annotation file of a published data set, a manifest (CSV or JSON), a folder of class folders, a list with
            lines `path label` or `path n label`, or the synthetic cross-domain set. A manifest that ends in .txt is a list.
        path: the annotation file, manifest, folder or list; of synthetic clips the domain, source or target.
        root: the folder that the paths of a published data set or a list start from.
        templates: modality -> path of a published data set's frames, in place of the published ones; of a list's folders the
            name of a frame.
        first_label: the number that a list gives the first class.
        split: what the annotation file must say it is; of synthetic clips train, unlabelled or test.
        stride: frames between two sampled ones; the data set's own unless given.
        options: further arguments of ClipDataset, or of CrossDomain for synthetic clips.
    """

    format: Literal["ego4d", "epic", "meccano", "wear", "manifest", "folder", "list", "synthetic"] = "manifest"
    path: str = ""
    root: str = ""
    templates: dict[str, str] | None = None
    split: str | None = None
    stride: int | None = None
    first_label: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format == "manifest" and self.path.lower().endswith(".txt"):
            self.format = "list"

    def read(self, modalities: Sequence[str] = ("rgb",)) -> AnnotationSet:
        """The list of clips. Raises ValueError naming the file for whatever is wrong with it."""
        if not self.path:
            raise ValueError(f"path must be given for clips of format {self.format}")
        if self.format == "synthetic":
            records = self._synthetic(modalities, {}).records
            return AnnotationSet(records, split=self.split, dataset="synthetic")
        if self.format == "manifest":
            return read_manifest(self.path, self.root or None)
        if self.format == "folder":
            return folder_manifest(self.path)
        if self.format == "list":
            frame = (self.templates or {}).get("rgb", FRAME)
            return read_video_list(self.path, self.root, first_label=self.first_label, template=frame)
        return read_annotations(
            self.format, self.path, self.root, modalities=modalities, templates=self.templates, split=self.split
        )

    def dataset(self, modalities: Sequence[str], clips: AnnotationSet, **settings: Any) -> "ClipDataset | CrossDomain":
        """The data set of `clips`, which `read` gave.   settings: of ClipDataset; `options` come before them."""
        if self.format == "synthetic":
            return self._synthetic(modalities, {k: settings[k] for k in ("num_frames", "size")})
        stride = clips.stride if self.stride is None else self.stride
        return ClipDataset(clips.records, modalities, **{"stride": stride, **settings, **self.options})

    def _synthetic(self, modalities: Sequence[str], settings: dict[str, Any]) -> CrossDomain:
        return CrossDomain(self.path, self.split or "train", modalities=modalities, **{**settings, **self.options})


class StageData(LightningDataModule):
    """What the data modules share: workers, and going on from a checkpoint within an epoch. A subclass has `sets()`."""

    def __init__(
        self,
        batch_size: int,
        num_workers: int,
        num_frames: int,
        size: int,
        augment: Literal["joint", "reference", "none"],
        clamp: bool,
        seed: int,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.settings = {"num_frames": num_frames, "size": size, "clamp": clamp}
        self.augment = augment
        self.train_sets: dict[str, Any] = {}
        self._reported: dict[str, int] = {}
        self._read: dict[str, AnnotationSet] = {}
        self._saved: dict[str, int] | None = None

    def sets(self) -> dict[str, Any]:
        """The data sets that are read side by side, by name; an epoch is one pass over the first."""
        raise NotImplementedError

    @property
    def collate_train(self) -> Callable[[list[Any]], Any]:
        """Items of an EpochSampler's keys to a batch."""
        return _collate_drawn

    @property
    def collate_val(self) -> Callable[[list[Any]], Any]:
        """Items of Placed to a batch."""
        return _collate_placed

    def setup(self, stage: str | None = None) -> None:
        if not self.train_sets:
            self.train_sets = self.sets()

    def train_dataloader(self) -> DataLoader:
        drawn = Drawn(self.train_sets, self.seed)
        ranks = {"rank": 0, "world": 1}
        if self.trainer is not None:
            ranks = {"rank": self.trainer.global_rank, "world": self.trainer.world_size}
        sampler = EpochSampler(drawn.sizes, self.batch_size, seed=self.seed, **ranks)
        if self._saved is not None:
            epoch, step = divmod(self._saved["batches"], self._saved["batches_an_epoch"])
            if step and sampler.steps != self._saved["steps"]:
                raise ValueError(
                    f"the checkpoint lies within an epoch of {self._saved['steps']} steps, these clips, batch_size and ranks "
                    f"make {sampler.steps}; go on with what it was written with, or from the end of an epoch"
                )
            sampler.start = epoch, step
        return DataLoader(
            drawn,
            self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.collate_train,
            pin_memory=_pins(self.trainer),
            worker_init_fn=_leave_interrupts,
        )

    def state_dict(self) -> dict[str, int]:
        """Where training is: batches done, how many make an epoch, and how many would without limit_train_batches."""
        trainer: Any = self.trainer
        return {
            "batches": trainer.fit_loop.epoch_loop.batch_progress.total.processed,
            "batches_an_epoch": int(trainer.num_training_batches),
            "steps": trainer.train_dataloader.sampler.steps,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._saved = dict(state_dict)

    def report_faults(self) -> None:
        """Warn of clips that could not be read, when there are more than at the last report."""
        for name, dataset in self.train_sets.items():
            if not isinstance(dataset, ClipDataset):
                continue
            faults = dataset.faults
            count = len(faults.broken) + faults.missing_frames + faults.clamped_frames
            if count > self._reported.get(name, 0):
                self._reported[name] = count
                rank_zero_warn(f"{name} clips: {faults.summary()}")

    # -- inside ------------------------------------------------------------------------------------------------

    def _clips(self, name: str, clips: Clips, modalities: Sequence[str]) -> AnnotationSet:
        if name not in self._read:
            try:
                self._read[name] = clips.read(modalities)
            except ValueError as fault:
                raise ValueError(f"data.{name}: {fault}") from None
        return self._read[name]

    def _placed(self, dataset: Any, clips: int) -> DataLoader:
        """Every clip once, with its place, for validation; each rank reads its share."""
        ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        # Lightning takes a sampler of its own under several ranks, unless it finds a DistributedSampler.
        return DataLoader(
            Placed(dataset),
            self.batch_size,
            sampler=RankPlaces(clips, *ranks),
            num_workers=self.num_workers,
            collate_fn=self.collate_val,
            pin_memory=_pins(self.trainer),
            worker_init_fn=_leave_interrupts,
        )

    def _train_set(self, name: str, clips: Clips, modalities: Sequence[str]) -> Any:
        found = self._clips(name, clips, modalities)
        return clips.dataset(modalities, found, train=True, augment=self.augment, seed=self.seed, **self.settings)


class PretrainData(StageData):
    """Labelled source clips beside unlabelled target clips, of one modality. An epoch is one pass over the source.

    Args:
        source: labelled clips.
        target: clips of the target domain; labels they may have are not used.
        test: labelled target clips, of which only the class names are read: shared with the source they are refused.
        modality: rgb, flow or pose.
        with_target: False leaves the target clips unread.
        batch_size: clips of each domain on one device.
        num_workers: processes that read clips, on each rank.
        num_frames: of a clip.
        size: side of RGB and flow frames; heatmaps have a quarter of it.
        augment: joint, reference or none.
        clamp: frames past a clip's end show its last one; False reads on, as published.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        source: Clips,
        target: Clips | None = None,
        test: Clips | None = None,
        modality: str = "rgb",
        with_target: bool = True,
        batch_size: int = 48,
        num_workers: int = 4,
        num_frames: int = 16,
        size: int = 224,
        augment: Literal["joint", "reference", "none"] = "joint",
        clamp: bool = True,
        seed: int = 42,
    ) -> None:
        super().__init__(batch_size, num_workers, num_frames, size, augment, clamp, seed)
        check_modality(modality)
        if with_target and target is None:
            raise ValueError("data.target must be given: model.target_weight is above 0")
        self.source, self.target, self.test = source, target if with_target else None, test
        self.modalities = (modality,)

    @property
    def num_classes(self) -> int:
        """Classes of the source clips."""
        labels = self._clips("source", self.source, self.modalities).labels
        given = [label for label in labels if label is not None]
        if len(given) < len(labels):
            raise ValueError(f"data.source must be labelled: {len(labels) - len(given)} of {len(labels)} clips are not")
        if min(given) < 0:
            raise ValueError(f"data.source must have class numbers from 0, got {min(given)}")
        return max(given) + 1

    def sets(self) -> dict[str, Any]:
        own = self._clips("source", self.source, self.modalities).records
        for name, clips in (("target", self.target), ("test", self.test)):
            if clips is not None:
                check_disjoint(own, self._clips(name, clips, self.modalities).records)
        found = {"source": self._train_set("source", self.source, self.modalities)}
        if self.target is not None:
            found["target"] = self._train_set("target", self.target, self.modalities)
        return found


class DistillData(StageData):
    """Unlabelled target clips in all modalities, and labelled ones to validate on. An epoch is one pass over the target.

    Args:
        target: clips of the target domain; labels they may have are not used.
        val: labelled target clips for few-shot episodes; without them nothing is validated.
        source: the labelled source clips, of which only the class names are read: shared with val they are refused.
        modalities: of the student and the teachers.
        batch_size: clips on one device.
        num_workers: processes that read clips, on each rank.
        num_frames: of a clip.
        size: side of RGB and flow frames; heatmaps have a quarter of it.
        augment: joint, reference or none.
        clamp: frames past a clip's end show its last one; False reads on, as published.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        target: Clips,
        val: Clips | None = None,
        source: Clips | None = None,
        modalities: tuple[str, ...] = ("rgb", "flow", "pose"),
        batch_size: int = 64,
        num_workers: int = 4,
        num_frames: int = 16,
        size: int = 224,
        augment: Literal["joint", "reference", "none"] = "joint",
        clamp: bool = True,
        seed: int = 42,
    ) -> None:
        super().__init__(batch_size, num_workers, num_frames, size, augment, clamp, seed)
        self.modalities = tuple(dict.fromkeys(("rgb", *modalities)))
        for modality in self.modalities:
            check_modality(modality)
        self.target, self.val, self.source = target, val, source

    def sets(self) -> dict[str, Any]:
        if self.source is not None and self.val is not None:
            check_disjoint(self._clips("source", self.source, ("rgb",)), self.val_records)
        return {"target": self._train_set("target", self.target, self.modalities)}

    @property
    def val_records(self) -> list[ClipRecord]:
        """The clips that are validated on, in order."""
        if self.val is None:
            return []
        records = self._clips("val", self.val, ("rgb",)).records
        nameless = sum(record.label is None for record in records)
        if nameless:
            raise ValueError(f"data.val must be labelled: {nameless} of {len(records)} clips are not")
        return records

    def val_dataloader(self) -> Any:
        if self.val is None:
            return []
        found = self._clips("val", self.val, ("rgb",))
        dataset = self.val.dataset(("rgb",), found, train=False, **self.settings)
        return self._placed(dataset, len(self.val_records))


# -- inside ------------------------------------------------------------------------------------------------------------


def _collate_drawn(samples: list[dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    return {name: collate([sample[name] for sample in samples]) for name in samples[0]}


def _collate_placed(samples: list[dict[str, Any]]) -> dict[str, Any]:
    readable = [sample for sample in samples if "skipped" not in sample["item"]]
    return {"places": [sample["place"] for sample in readable], **collate([s["item"] for s in readable or samples])}


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C reaches the workers too; what to do about it is the main process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _pins(trainer: Any) -> bool:
    return trainer is not None and trainer.strategy.root_device.type == "cuda"
