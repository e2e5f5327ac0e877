"""Clips for training and evaluation: which frames of a record, how they are cut, and what happens when they cannot be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from mmfast.config import ViTConfig
from mmfast.data.frames import CHANNELS, ClipError, Frames, frame_range, is_template, read_frames
from mmfast.data.randaugment import operate
from mmfast.data.records import ClipRecord
from mmfast.data.transforms import WHOLE, Augmentation, Crop, Draw, centre_crop, crop_flow, crop_resize, normalize
from mmfast.data.video import RESIZE_MODES

_POSITIONS = ("random", "start", "centre", "parts")
_ON_BROKEN = ("replace", "skip", "raise")
_AUGMENT = {"joint": Augmentation(), "reference": Augmentation(joint=False), "none": None}
_HEATMAP = 4  # a heatmap's side is this part of a frame's, as 56 is of 224


def _generator(*key: int) -> torch.Generator:
    """A generator that depends on every number of the key, and on nothing else."""
    state = np.random.SeedSequence([number & (1 << 64) - 1 for number in key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


@dataclass(frozen=True)
class Faults:
    """What went wrong since the last `set_epoch`, over all workers of this process.

    broken: names of the clips that could not be read. reasons: why, for the first of them.
    missing_frames, in missing_clips clips: frames that were not there or damaged and show another frame.
    clamped_frames, in clamped_clips clips: frames past the clip's stop that show its last one.
    A clip counts once however often it is read.
    """

    clips: int
    broken: tuple[str, ...]
    reasons: tuple[str, ...]
    missing_frames: int
    missing_clips: int
    clamped_frames: int
    clamped_clips: int

    def __bool__(self) -> bool:
        return bool(self.broken or self.missing_frames or self.clamped_frames)

    def summary(self) -> str:
        """One line a kind of fault, with the first examples; "" when there is none."""
        lines = []
        if self.broken:
            lines.append(f"{len(self.broken)} of {self.clips} clips cannot be read and were left out:")
            lines += [f"  {reason}" for reason in self.reasons]
            lines += [f"  and {len(self.broken) - len(self.reasons)} more"] * (len(self.broken) > len(self.reasons))
        for frames, clips, what in (
            (self.missing_frames, self.missing_clips, "are missing or damaged and show their neighbour"),
            (self.clamped_frames, self.clamped_clips, "lie past their clip's end and show its last frame"),
        ):
            if frames:
                lines.append(f"{frames} frames of {clips} clips {what}")
        return "\n".join(lines)


class ClipDataset(Dataset[dict[str, Any]]):
    """One item a record: {"clip_id": int, "label": int, "rgb" | "flow" | "pose": Tensor, "broken": int}.

    rgb: uint8 [3, F, h, w], a view of [F, h, w, 3]; flow float32 [2, F, h, w] and pose float32 [21, F, h/4, w/4],
    normalised. label: -1 where there is none. broken: clips that could not be read on the way to this item.

    Sampling. num_frames frames, stride apart; stride None spreads them over the clip (the middles of equal parts).
    position: "start" at the record's start, as published, "centre", or "random", the default in training; "parts", in training
    and with stride None: a random frame of each part instead of its middle. A record
    without a stop is sampled at its start, unless it is a whole source (start 0). Frames past the stop show the last one
    (clamp), or are read on (clamp=False, as published).
    Pixels. size: of RGB and flow, int or (h, w); heatmaps have a quarter. resize: "squash" or "crop" in evaluation.
    augment, in training: "joint", "reference" or "none" (transforms.py), or an Augmentation.
    statistics: modality -> (mean, std) of flow and pose in place of the published ones.
    Faults. on_broken: "replace" a clip that cannot be read by another, the default in training, "skip" it (`collate`
    leaves it out), the default else, or "raise" the ClipError. More than max_broken in a row raise it in any case.

    An item is a function of (seed, epoch, clip_id): the same whatever the workers, the order and the past. threads: of
    FFmpeg in each worker. Raises ValueError or TypeError for arguments that make no sense.
    """

    def __init__(
        self,
        records: Sequence[ClipRecord],
        modalities: Sequence[str] = ("rgb",),
        *,
        num_frames: int = 16,
        stride: int | None = 4,
        train: bool = False,
        size: int | tuple[int, int] = 224,
        resize: str = "squash",
        augment: str | Augmentation = "joint",
        position: str | None = None,
        clamp: bool = True,
        seed: int = 0,
        statistics: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
        on_broken: str | None = None,
        max_broken: int = 20,
        threads: int = 1,
    ) -> None:
        self.records = list(records)
        self.modalities = _check_modalities(modalities, self.records)
        numbers = {"num_frames": (num_frames, 1), "max_broken": (max_broken, 0), "threads": (threads, 0)}
        for name, (value, least) in {**numbers, "stride": (1 if stride is None else stride, 1)}.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.num_frames, self.stride, self.max_broken, self.threads = num_frames, stride, max_broken, threads
        self.train, self.clamp, self.seed = train, clamp, seed
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        if (
            len(self.size) != 2
            or min(self.size) < 1
            or ("pose" in self.modalities and any(n % _HEATMAP for n in self.size))
        ):
            quarter = f", a multiple of {_HEATMAP} with pose" if "pose" in self.modalities else ""
            raise ValueError(f"size must be an int or (h, w) of at least 1{quarter}, got {size}")
        self.position = _choice("position", position or ("random" if train else "start"), _POSITIONS)
        if self.position == "parts" and stride is not None:
            raise ValueError(
                f'position "parts" takes frames from equal parts of the clip: stride must be None, got {stride}'
            )
        self.on_broken = _choice("on_broken", on_broken or ("replace" if train else "skip"), _ON_BROKEN)
        self.resize = _choice("resize", resize, RESIZE_MODES)
        if isinstance(augment, str):
            self.augment = _AUGMENT[_choice("augment", augment, tuple(_AUGMENT))]
        elif isinstance(augment, Augmentation):
            self.augment = augment
        else:
            raise TypeError(f"augment must be one of {', '.join(_AUGMENT)} or an Augmentation, got {augment!r}")
        if self.augment is not None and self.augment.randaugment is not None and self.modalities != ("rgb",):
            raise ValueError(
                f"augment has randaugment, which is of rgb alone: it would move rgb off {', '.join(self.modalities)}"
            )
        self.statistics = _statistics(self.modalities, statistics)
        # Shared memory: workers that live through many epochs see the epoch change, and their findings come back.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._found = torch.zeros(len(self.records), 3, dtype=torch.int32).share_memory_()
        self._in_a_row: list[ClipError] = []

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> list[int]:
        """Class of every record, -1 where there is none."""
        return [-1 if record.label is None else record.label for record in self.records]

    def set_epoch(self, epoch: int) -> None:
        """Draws anew from here on, and forgets the faults so far. Call it before the loader's iterator is made."""
        self._epoch.fill_(epoch)
        self._found.zero_()

    @property
    def faults(self) -> Faults:
        """What went wrong since the last set_epoch. Reads the first broken clips once more, to say why."""
        broken, missing, clamped = self._found.clone().unbind(1)
        at = broken.nonzero().flatten().tolist()
        return Faults(
            clips=len(self.records),
            broken=tuple(self.records[i].name for i in at),
            reasons=tuple(self._reason(self.records[i]) for i in at[:3]),
            missing_frames=int(missing.sum()),
            missing_clips=int((missing > 0).sum()),
            clamped_frames=int(clamped.sum()),
            clamped_clips=int((clamped > 0).sum()),
        )

    def _reason(self, record: ClipRecord) -> str:
        try:
            self.load(record)
        except ClipError as error:
            return str(error)
        return f"{record.name}: could not be read then, can be read now"

    def load(self, record: ClipRecord) -> dict[str, Any]:
        """The item of a record, nothing random about it: as outside training. Raises ClipError."""
        return self._read(record, None)[0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The item of records[index], or of another in its place (on_broken)."""
        index = range(len(self.records))[index]
        asked = self.records[index]
        epoch, broken = int(self._epoch), 0
        while True:
            record = self.records[index]
            generator = _generator(self.seed, epoch, record.clip_id) if self.train else None
            try:
                item, missing, clamped = self._read(record, generator)
            except ClipError as error:
                self._found[index, 0] = 1
                self._in_a_row.append(error)
                if self.on_broken == "raise":
                    raise
                if len(self._in_a_row) > self.max_broken:
                    raise self._too_many() from None
                broken += 1
                if self.on_broken == "skip":
                    return self._nothing(asked)
                other = _generator(self.seed, epoch, asked.clip_id, broken)
                index = int(torch.randint(len(self.records), (), generator=other))
            else:
                self._found[index, 1], self._found[index, 2] = missing, clamped
                self._in_a_row.clear()
                return {**item, "broken": broken}

    def _too_many(self) -> ClipError:
        first, count = self._in_a_row[0], len(self._in_a_row)
        advice = "`mmfast doctor` lists what is missing; max_broken allows more"
        return ClipError(first.name, f"{first.reason}\n{count} clips in a row cannot be read, this one first: {advice}")

    def _sides(self, modality: str) -> tuple[int, int]:
        return (self.size[0] // _HEATMAP, self.size[1] // _HEATMAP) if modality == "pose" else self.size

    def _nothing(self, record: ClipRecord) -> dict[str, Any]:
        item: dict[str, Any] = {"clip_id": record.clip_id, "label": -1 if record.label is None else record.label}
        for modality in self.modalities:
            blank = torch.zeros((), dtype=torch.uint8 if modality == "rgb" else torch.float32)
            item[modality] = blank.expand(CHANNELS[modality], self.num_frames, *self._sides(modality))
        return {**item, "broken": 1, "skipped": True}

    def _extent(self, record: ClipRecord) -> tuple[int, int | None]:
        """First frame of the clip and the one behind its last, None where only the start is said."""
        start, stop = record.start, record.stop
        to_end = stop is None and (start == 0 or self.stride is None)
        for modality in self.modalities:
            source = record.sources.get(modality, "")
            if is_template(source) and not to_end:
                continue  # no folder is listed where the annotation says enough
            first, end = frame_range(record, modality)
            start = max(start, first)
            if end <= start:
                raise ClipError(record.name, f"{modality}: starts at frame {start}, its source ends at frame {end - 1}")
            if to_end or record.stop is not None:
                stop = end if stop is None else min(stop, end)
        if stop is not None and stop <= start:
            raise ClipError(record.name, f"starts at frame {start} and stops before frame {stop}: no frame between")
        return start, stop

    def _indices(self, record: ClipRecord, generator: torch.Generator | None) -> tuple[list[int], int]:
        """Frames of the clip, and how many of them the stop holds back."""
        start, stop = self._extent(record)
        if self.stride is None:
            assert stop is not None
            if self.position == "parts" and generator is not None:
                share = torch.rand(self.num_frames, generator=generator, dtype=torch.float64).tolist()
                places = [start + int((i + u) * (stop - start) / self.num_frames) for i, u in enumerate(share)]
                return [min(place, stop - 1) for place in places], 0
            return [start + (2 * i + 1) * (stop - start) // (2 * self.num_frames) for i in range(self.num_frames)], 0
        span = (self.num_frames - 1) * self.stride + 1
        room = 0 if stop is None else stop - start - span
        if room > 0 and self.position == "random" and generator is not None:
            start += int(torch.randint(room + 1, (), generator=generator))
        elif room > 0 and self.position == "centre":
            start += room // 2
        wanted = [start + i * self.stride for i in range(self.num_frames)]
        if stop is None or not self.clamp:
            return wanted, 0
        return [min(index, stop - 1) for index in wanted], sum(index >= stop for index in wanted)

    def _read(self, record: ClipRecord, generator: torch.Generator | None) -> tuple[dict[str, Any], int, int]:
        """(item, frames missing, frames clamped)."""
        indices, clamped = self._indices(record, generator)
        draw = self.augment.draw(generator) if self.augment is not None and generator is not None else None
        joint = self.augment is not None and self.augment.joint
        item: dict[str, Any] = {"clip_id": record.clip_id, "label": -1 if record.label is None else record.label}
        missing, crop = 0, None
        # RGB first: a crop is drawn, or centred, in a frame's own pixels, and flow is often stored square.
        for modality in sorted(self.modalities, key=list(CHANNELS).index):
            own = draw if joint or modality == "rgb" else None
            if modality == "rgb":
                found = self._rgb(record, indices, own)
                item[modality] = found.pixels
            else:
                found = read_frames(record, modality, indices)
            if crop is None:
                crop = self._crop(found.size, draw if joint else None)
            if modality != "rgb":
                cut = crop_flow if modality == "flow" else crop_resize
                item[modality] = normalize(cut(found.pixels, crop, self._sides(modality)), *self.statistics[modality])
            missing += found.missing
        return item, missing, clamped

    def _crop(self, stored: tuple[int, int], draw: Draw | None) -> Crop:
        """The part of the frame that flow and heatmaps show."""
        if draw is not None:
            return draw.crop(*stored)
        return centre_crop(*stored, self.size) if self.resize == "crop" else WHOLE

    def _rgb(self, record: ClipRecord, indices: Sequence[int], draw: Draw | None) -> Frames:
        if draw is None:
            return read_frames(record, "rgb", indices, self.size, resize=self.resize, threads=self.threads)

        def cut(clip: Tensor) -> Tensor:
            return operate(crop_resize(clip, draw.crop(*clip.shape[2:]), self.size), draw.operations)

        return read_frames(record, "rgb", indices, fit=cut, threads=self.threads)


def _choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def _check_modalities(modalities: Sequence[str], records: Sequence[ClipRecord]) -> tuple[str, ...]:
    if isinstance(modalities, str):
        raise TypeError(f"modalities must be a sequence of names, got the text {modalities!r}")
    for modality in modalities:
        _choice("modalities", modality, tuple(CHANNELS))
    if not modalities or len(set(modalities)) < len(modalities):
        raise ValueError(f"modalities must name each one once, at least one, got {tuple(modalities)}")
    names: dict[int, str] = {}
    for record in records:
        if record.clip_id in names:
            raise ValueError(
                f"records: {names[record.clip_id]} and {record.name} have the same clip_id {record.clip_id}"
            )
        names[record.clip_id] = record.name
    for modality in modalities:
        lacking = [record.name for record in records if modality not in record.sources]
        if lacking:
            raise ValueError(f"records: {len(lacking)} of {len(records)} have no {modality}, {lacking[0]} first")
    return tuple(modalities)


def _statistics(
    modalities: Sequence[str], given: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None
) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    for name in given or {}:
        _choice("statistics", name, [m for m in CHANNELS if m != "rgb"])  # the engine normalises uint8
    chosen = {}
    for modality in modalities:
        published = ViTConfig(in_chans=CHANNELS[modality])
        mean, std = (given or {}).get(modality, (published.mean, published.std))
        if not len(mean) == len(std) == CHANNELS[modality] or min(std) <= 0:
            raise ValueError(
                f"statistics of {modality} must be (mean, std) of {CHANNELS[modality]} values each, std above 0, "
                f"got {(mean, std)}"
            )
        chosen[modality] = (mean, std)
    return chosen


def _stack(clips: list[Tensor]) -> Tensor:
    """Clips [C, F, h, w] to [B, C, F, h, w], in the order in memory that they have: RGB stays [B, F, h, w, C]."""
    order = sorted(range(4), key=clips[0].stride, reverse=True)
    back = [order.index(dim) + 1 for dim in range(4)]
    stacked: Tensor = default_collate([clip.permute(order) for clip in clips])
    return stacked.permute(0, *back)


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Items of a ClipDataset to one batch: int64 clip_id, label, broken [B], every modality [B, C, F, h, w] in its dtype.

    Skipped items are left out of everything but broken, which has one number for each of them too, at its end. A batch of
    nothing else has modalities of zero clips. Raises ValueError for no items.
    """
    if not samples:
        raise ValueError("samples must hold at least one item")
    kept = [sample for sample in samples if "skipped" not in sample]
    left = [sample for sample in samples if "skipped" in sample]
    batch: dict[str, Tensor] = {}
    for key, value in samples[0].items():
        if key == "skipped":
            continue
        if not isinstance(value, Tensor) or value.dim() != 4:
            batch[key] = torch.tensor(
                [int(s[key]) for s in (kept + left if key == "broken" else kept)], dtype=torch.int64
            )
        elif kept:
            batch[key] = _stack([sample[key] for sample in kept])
        else:
            batch[key] = value.new_empty(0, *value.shape)
    return batch
