"""Checks a data set against its annotations: which clips' files are missing, short or unreadable, modality by modality.

A clip is looked at as training would read it: the same frames, from the same files, by the same reader. In one modality
it may be
  missing     none of its frames is there
  short       some are not there, or lie past the clip's end: a neighbour is shown in their place, and counted
  unreadable  a file is empty, damaged, or nothing that this modality can be
  odd         readable, but not of the size and kind that were published: (224, 224, 2) flow, (56, 56, 21) heatmaps
Without `decode` files are only looked up, and videos and arrays that hold a whole clip are not measured.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmfast.data.container import import_av
from mmfast.data.frames import ARRAYS, CHANNELS, PICTURES, ClipError, frame_path, frame_range, is_template, read_frames
from mmfast.data.records import AnnotationSet, ClipRecord

__all__ = ["DoctorReport", "Findings", "check_records"]

KINDS = ("missing", "short", "unreadable", "odd")
SHAPES: Mapping[str, tuple[int, int, int]] = {"flow": (224, 224, 2), "pose": (56, 56, 21)}
_CHUNK = 32  # clips that one task looks at


@dataclass
class _Clip:
    """What is wrong with one clip in one modality: kind -> why."""

    faults: dict[str, str] = field(default_factory=dict)
    absent: int = 0
    past_end: int = 0

    def add(self, kind: str, why: str) -> None:
        self.faults.setdefault(kind, why)


@dataclass
class Findings:
    """One modality: how many clips show each kind of fault, and the first of them."""

    clips: int = 0
    faulty: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    absent_frames: int = 0  # have no file, and show a neighbour
    past_end_frames: int = 0  # lie past the clip's end, and show its last frame
    examples: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def _add(self, name: str, clip: _Clip, examples: int) -> None:
        self.clips += 1
        self.faulty += bool(clip.faults)
        self.absent_frames += clip.absent
        self.past_end_frames += clip.past_end
        for kind, why in clip.faults.items():
            self.counts[kind] += 1
            if len(self.examples[kind]) < examples:
                self.examples[kind].append(why if why.startswith(f"{name}:") else f"{name}: {why}")


@dataclass
class DoctorReport:
    """What `check_records` found. str() is the report to print; `exit_status` is 0 when nothing is wrong, else 1."""

    clips: int
    num_frames: int
    stride: int | None
    decoded: bool
    modalities: dict[str, Findings]
    classes: dict[str, int]  # clips of each class by name, smallest class first
    unlabelled: int
    dataset: str = ""
    usable: int = 0  # clips without a fault in any modality

    @property
    def ok(self) -> bool:
        """True when no clip has a fault in any modality."""
        return not any(found.faulty for found in self.modalities.values())

    @property
    def exit_status(self) -> int:
        """0 clean, 1 with faults."""
        return 0 if self.ok else 1

    def as_dict(self) -> dict[str, Any]:
        """The same as plain numbers, texts, lists and dicts, as for JSON."""
        return {
            "dataset": self.dataset,
            "clips": self.clips,
            "usable": self.usable,
            "num_frames": self.num_frames,
            "stride": self.stride,
            "decoded": self.decoded,
            "classes": self.classes,
            "unlabelled": self.unlabelled,
            "modalities": {
                name: {
                    "clips": found.clips,
                    "faulty": found.faulty,
                    **{kind: found.counts[kind] for kind in KINDS},
                    "absent_frames": found.absent_frames,
                    "past_end_frames": found.past_end_frames,
                    "examples": {kind: shown for kind, shown in found.examples.items() if shown},
                }
                for name, found in self.modalities.items()
            },
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        of = f" of {self.dataset}" if self.dataset else ""
        rate = "spread over each clip" if self.stride is None else f"{self.stride} apart"
        how = "files opened" if self.decoded else "files looked up, not opened"
        yield f"{self.clips} clips{of}, {self.num_frames} frames {rate}; {how}"
        width = max(map(len, self.modalities))
        for name, found in self.modalities.items():
            said = ", ".join(f"{found.counts[kind]} {kind}" for kind in KINDS if found.counts[kind])
            yield f"  {name:{width}}  {found.clips - found.faulty} of {found.clips} clips fine{': ' * bool(said)}{said}"
            for count, what in (
                (found.absent_frames, "have no file and show their neighbour"),
                (found.past_end_frames, "lie past their clip's end and show its last frame"),
            ):
                if count:
                    yield f"    {count} frames {what}"
            for kind in KINDS:
                shown = found.examples[kind]
                more = found.counts[kind] - len(shown)
                yield from (f"    {kind}: {example}" for example in shown)
                if shown and more:
                    yield f"    {kind}: and {more} more"
        if self.classes:
            name, count = next(iter(self.classes.items()))
            yield f"  {len(self.classes)} classes, the smallest, {name!r}, with {count} clips"
        if self.unlabelled:
            yield f"  {self.unlabelled} clips without a label"
        yield "no faults" if self.ok else f"{self.usable} of {self.clips} clips have no fault in any modality"


def _siblings(path: Path) -> str:
    """What lies where the path leaves the disk: shows a folder that is called otherwise, or names of other length."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    try:
        with os.scandir(parent) as entries:
            names = [entry.name for entry, _ in zip(entries, range(1000), strict=False)]
    except OSError as error:
        return f"{parent}: {error.strerror}"
    if not names:
        return f"{parent} is empty"
    shown = ", ".join(sorted(names)[:3])
    return f"{parent} holds {shown}{', ...' * (len(names) > 3)}, no {path.name}"


def _file_fault(path: Path) -> tuple[str, str] | None:
    """(kind, why) of a file that is not there, or empty."""
    try:
        if os.stat(path).st_size == 0:
            return "unreadable", f"{path}: empty file (0 bytes)"
    except (FileNotFoundError, NotADirectoryError):
        return "missing", f"{path}: no such file"
    except OSError as error:
        return "unreadable", f"{path}: {error.strerror}"
    return None


class _Check:
    """What one run looks for; called for a clip and a modality, from any thread."""

    def __init__(
        self, num_frames: int, stride: int | None, decode: bool, shapes: Mapping[str, tuple[int, int, int]]
    ) -> None:
        self.num_frames, self.stride, self.decode, self.shapes = num_frames, stride, decode, shapes
        self.numbered = lru_cache(maxsize=32)(_numbered)

    def __call__(self, record: ClipRecord, modality: str) -> _Clip:
        clip = _Clip()
        if modality not in record.sources:
            clip.add("missing", f"has no {modality}; it has {', '.join(record.sources) or 'nothing'}")
            return clip
        try:
            self._look(clip, record, modality)
        except (ValueError, OSError) as error:
            clip.add("unreadable", str(error))
        if "missing" in clip.faults:
            clip.faults.pop("short", None)
            clip.absent = clip.past_end = 0
        return clip

    def _look(self, clip: _Clip, record: ClipRecord, modality: str) -> None:
        source = record.sources[modality]
        by_frame = is_template(source) or os.path.isdir(source)
        if not by_frame:
            path = Path(source)
            fault = _file_fault(path)
            if fault is not None:
                clip.add(fault[0], f"{fault[1]}; {_siblings(path)}" if fault[0] == "missing" else fault[1])
                return
        whole = record.start == 0 and record.stop is None
        # A path with a number field is not listed where the annotation says enough: such folders may be huge.
        if (whole if is_template(source) else by_frame) and self._is_empty(source, modality):
            where = _siblings(frame_path(source, record.start)) if is_template(source) else os.fspath(source)
            clip.add("missing", f"no frames there: {where}")
            return
        measured = not is_template(source) and (by_frame or self.decode)
        wanted, end = self._wanted(clip, record, modality, measured)
        if by_frame:
            there = self._existing(clip, source, modality, sorted(set(wanted)))
        else:
            there = {n: Path(source) for n in wanted if end is None or n < end}
        absent = sum(n not in there for n in wanted)
        if wanted and not there and "unreadable" not in clip.faults:
            shown = frame_path(source, wanted[0]) if is_template(source) else None
            where = f"{shown}; {_siblings(shown)}" if shown else f"{source}, which ends with frame {(end or 0) - 1}"
            clip.add("missing", f"none of frames {wanted[0]} to {wanted[-1]} is there: {where}")
        elif absent:
            clip.absent = absent
            clip.add("short", f"{absent} of {len(wanted)} frames, from {wanted[0]} on, cannot be found or are empty")
        if self.decode and (by_frame or modality != "rgb"):
            self._open(clip, record, modality, there)

    def _wanted(self, clip: _Clip, record: ClipRecord, modality: str, measured: bool) -> tuple[list[int], int | None]:
        """Frames that training would read, those past the clip's stop held back; the source's end, None: not known."""
        start, stop, end = record.start, record.stop, None
        whole = start == 0 and stop is None
        if measured or (whole and is_template(record.sources[modality])):
            first, end = frame_range(record, modality)
            start = max(start, first)
            stop = end if whole else stop
        elif whole:
            return [], None
        if stop is not None and stop <= start:
            clip.add("missing", f"starts at frame {start} and ends before frame {stop}: no frame between")
            return [], end
        if self.stride is not None:
            wanted = [start + i * self.stride for i in range(self.num_frames)]
            clip.past_end = 0 if stop is None else sum(n >= stop for n in wanted)
        elif stop is not None:
            wanted = [start + (2 * i + 1) * (stop - start) // (2 * self.num_frames) for i in range(self.num_frames)]
            clip.past_end = max(0, self.num_frames - (stop - start))
        else:
            raise ClipError(record.name, "has no stop: a stride is needed")
        if stop is None:
            return wanted, end
        if clip.past_end:
            clip.add("short", f"has {stop - start} frames, from {start} on: {clip.past_end} samples lie past its end")
        return [min(n, stop - 1) for n in wanted], end

    def _existing(self, clip: _Clip, source: Path | str, modality: str, wanted: Sequence[int]) -> dict[int, Path]:
        """The files of those frames that have one with something in it."""
        if is_template(source):
            paths = {n: frame_path(source, n) for n in wanted}
        else:
            listed = self.numbered(Path(source), modality)
            paths = {n: listed[n] for n in wanted if n in listed}
        there = {}
        for n, path in paths.items():
            fault = _file_fault(path)
            if fault is None:
                there[n] = path
            elif fault[0] == "unreadable":
                clip.add(*fault)
        return there

    def _is_empty(self, source: Path | str, modality: str) -> bool:
        """True for a folder, or a path with a number field in its last part, without a single frame."""
        path = Path(source)
        if not is_template(source):
            return not self.numbered(path, modality)
        pattern = re.sub(r"\{[^{}]*\}", "*", glob.escape(path.name))
        return not is_template(path.parent) and next(path.parent.glob(pattern), None) is None

    def _open(self, clip: _Clip, record: ClipRecord, modality: str, there: Mapping[int, Path]) -> None:
        expected = self.shapes.get(modality)
        for n, path in there.items():
            try:
                found = read_frames(record, modality, [n])
            except ClipError as error:
                clip.add("unreadable", str(error))
                continue
            stored = (*found.size, len(found.pixels))
            if expected is not None and stored != tuple(expected):
                clip.add("odd", f"{path} is {stored}, published are {tuple(expected)}")
            if path.suffix == ".npy":
                dtype = np.load(path, mmap_mode="r", allow_pickle=False).dtype
                if dtype.kind != "f":
                    clip.add("odd", f"{path} holds {dtype}, published are floats")


def _numbered(folder: Path, modality: str) -> dict[int, Path]:
    """The frames of a folder by the last number in their names."""
    found: dict[int, Path] = {}
    for path in folder.iterdir():
        digits = re.search(r"(\d+)\D*$", path.stem)
        if digits is not None and path.suffix.lower() in (PICTURES if modality == "rgb" else ARRAYS):
            found[int(digits[1])] = path
    return found


def _run(
    check: _Check, records: Sequence[ClipRecord], modalities: Sequence[str], workers: int
) -> Iterator[tuple[ClipRecord, dict[str, _Clip]]]:
    """Every record with its findings, in order; at most 2 * workers chunks are under way."""

    def look(chunk: Sequence[ClipRecord]) -> list[tuple[ClipRecord, dict[str, _Clip]]]:
        return [(record, {modality: check(record, modality) for modality in modalities}) for record in chunk]

    starts = iter(range(0, len(records), _CHUNK))
    pending: deque[Future[list[tuple[ClipRecord, dict[str, _Clip]]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="mmfast-doctor")
    try:
        while True:
            while len(pending) < 2 * workers and (start := next(starts, None)) is not None:
                pending.append(pool.submit(look, records[start : start + _CHUNK]))
            if not pending:
                return
            yield from pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def check_records(
    records: Sequence[ClipRecord],
    modalities: Sequence[str] | None = None,
    *,
    num_frames: int = 16,
    stride: int | None = None,
    decode: bool = False,
    workers: int = 8,
    shapes: Mapping[str, tuple[int, int, int]] = SHAPES,
    examples: int = 3,
    progress: bool | None = None,
) -> DoctorReport:
    """Looks up, and with decode opens, every file that the clips need, and reports what is wrong without stopping.

    modalities: by default all that the records name. stride: frames between two samples; None takes an AnnotationSet's
    own, else samples are spread over each clip. decode: read every frame that is a file, and count every video's frames.
    shapes: modality -> (height, width, channels) as published. examples: how many clips of a kind the report names.
    progress: a bar; None: where stderr is a terminal. Raises ValueError for no records or arguments that make no sense,
    ImportError when decode needs a package that is not installed.
    """
    if not records:
        raise ValueError("records must hold at least one clip")
    if isinstance(modalities, str):
        raise TypeError(f"modalities must be a sequence of names, got the text {modalities!r}")
    if isinstance(records, AnnotationSet) and stride is None:
        stride = records.stride
    for name, value in (("num_frames", num_frames), ("stride", stride), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    chosen = tuple(modalities or dict.fromkeys(m for record in records for m in record.sources))
    unknown = [modality for modality in chosen if modality not in CHANNELS]
    if unknown or not chosen:
        raise ValueError(f"modalities must be some of {', '.join(CHANNELS)}, got {', '.join(unknown) or 'none'}")
    if decode and any(_is_video(record.sources.get("rgb", "{")) for record in records[:_CHUNK]):
        import_av()
    found = {modality: Findings() for modality in chosen}
    check, usable = _Check(num_frames, stride, decode, shapes), 0
    bar = tqdm(total=len(records), desc="doctor", unit="clip", disable=None if progress is None else not progress)
    with bar:
        for record, clips in _run(check, records, chosen, workers):
            for modality, clip in clips.items():
                found[modality]._add(record.name, clip, examples)
            usable += not any(clip.faults for clip in clips.values())
            bar.update()
    named = Counter(r.label_name or str(r.label) for r in records if r.label is not None)
    return DoctorReport(
        clips=len(records),
        num_frames=num_frames,
        stride=stride,
        decoded=decode,
        modalities=found,
        classes=dict(sorted(named.items(), key=lambda item: (item[1], item[0]))),
        unlabelled=sum(record.label is None for record in records),
        dataset=records.dataset if isinstance(records, AnnotationSet) else "",
        usable=usable,
    )


def _is_video(source: Path | str) -> bool:
    return not is_template(source) and os.path.isfile(source)
