"""Several clips of one video: windows that share no frame."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from .frames import ClipError, frame_range
from .records import AnnotationSet, ClipRecord


def cut_windows(records: Sequence[ClipRecord], count: int, modality: str = "rgb") -> Sequence[ClipRecord]:
    """Every clip as `count` clips: windows of equal length, one after another, that share no frame.

    A window's name is its clip's with "#" and its number; its id, from which masks are drawn, follows from the clip's
    and that number. Where no clip has a label, each becomes a class of its own, called by its name. A clip that cannot
    be read stays whole, to be reported where it is read. Raises ValueError for a count below 1 or above the frames of
    a clip.
    """
    if count < 1:
        raise ValueError(f"windows must be at least 1, got {count}")
    if count == 1:
        return records
    if all(record.label is None for record in records):
        records = [replace(r, label=i, label_name=r.label_name or r.name) for i, r in enumerate(records)]
    cut = [window for record in records for window in _cut(record, count, modality)]
    return replace(records, records=cut) if isinstance(records, AnnotationSet) else cut


def _cut(record: ClipRecord, count: int, modality: str) -> list[ClipRecord]:
    try:
        first, end = frame_range(record, modality)
    except ClipError:
        return [record]
    start = max(record.start, first)
    length = (end if record.stop is None else min(end, record.stop)) - start
    if length < count:
        raise ValueError(f"windows must be at most the frames of every clip, got {count}; {record.name} has {length}")
    return [
        replace(
            record,
            clip_id=_window_id(record.clip_id, i),
            name=f"{record.name}#{i}",
            start=start + i * length // count,
            stop=start + (i + 1) * length // count,
        )
        for i in range(count)
    ]


def _window_id(clip_id: int, number: int) -> int:
    digest = hashlib.sha256(f"{clip_id}#{number}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
