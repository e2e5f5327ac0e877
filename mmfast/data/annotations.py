"""The annotation files of MM-CDFSL: Ego4D (source), EPIC-KITCHENS-55, MECCANO and WEAR (targets).

A file is {"split": ..., "clips": [{field: value, ...}, ...]}. Where a clip's frames lie is said by one template a
modality, in which {any field of the clip}, {modality}, {ext} and {frame} may stand; the defaults are the folders as
published. Frames are sampled as published: 16 of them, `stride` apart, from the annotated start on.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfast.data.records import AnnotationSet, ClipRecord
from mmfast.data.templates import Entry, PathTemplates, parse_time

__all__ = [
    "DATASETS",
    "EGO4D_BLACKLIST",
    "AnnotationSet",
    "check_disjoint",
    "parse_time",
    "read_annotations",
    "read_ego4d",
    "read_epic",
    "read_meccano",
    "read_wear",
]

UNLABELLED = "train (unlabel)"
LABELLED = "val"
# Videos that the published configuration leaves out of the source data.
EGO4D_BLACKLIST = (
    "d18ef16d-f803-4387-bb5e-7876f1522a63",
    "77ed1624-f87b-4196-9a0a-95b7023b18e4",
    "128f69dd-f61d-494f-84c2-f3a8c937ae8f",
    "09910d48-41f9-4a84-bb1b-1bc96de62286",
    "8e914832-2dd1-44fd-81f8-1b7e2ccd2402",
)
_EPIC_FPS = 60  # of EPIC-KITCHENS-55's extracted frames: frame = max(1, int(60 * seconds)), true of all its clips
_CLIP_ENDS = ("video", "annotated")


@dataclass(frozen=True)
class _Dataset:
    """What the four files differ in. class_of: a labelled clip -> (its class number, or a key to be numbered; name)."""

    name: str
    stride: int
    templates: Mapping[str, str]
    start: str
    stop: str | None
    class_of: Callable[[Entry], tuple[Any, str]]
    named_by: tuple[str, ...]
    needs: tuple[str, ...] = ()
    splits: tuple[str, ...] | None = (UNLABELLED, LABELLED)  # None: any, and all of them labelled
    times: Mapping[str, str] = field(default_factory=dict)


def _read_json(path: Path, known: Sequence[str] | None, split: str | None) -> tuple[dict[str, Any], list[Entry]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is no JSON: {error.msg} in line {error.lineno}") from None
    if not isinstance(data, dict) or not isinstance(data.get("clips"), list):
        raise ValueError(f'{path}: must hold an object with a list "clips", got {_shape_of(data)}')
    found = data.get("split")
    if split is not None and found != split:
        raise ValueError(f"{path}: split must be {split!r}, the file says {found!r}")
    if known is not None and found not in known:
        raise ValueError(f"{path}: split must be {' or '.join(map(repr, known))}, the file says {found!r}")
    if not data["clips"]:
        raise ValueError(f'{path}: "clips" is empty')
    return data, [Entry(path, number, clip) for number, clip in enumerate(data["clips"])]


def _shape_of(data: Any) -> str:
    return f"an object with {sorted(data)}" if isinstance(data, dict) else f"a {type(data).__name__}"


def _unique(name: str, seen: dict[str, int]) -> str:
    """The name itself the first time, "name #2" the second."""
    seen[name] = seen.get(name, 0) + 1
    return name if seen[name] == 1 else f"{name} #{seen[name]}"


class _Classes:
    """Class numbers: the file's own, or in the order of first appearance for keys that are no numbers."""

    def __init__(self) -> None:
        self.keys: dict[Any, int] = {}
        self.names: dict[int, str] = {}

    def number(self, clip: Entry, key: Any, name: str) -> int:
        label = key if isinstance(key, int) else self.keys.setdefault(key, len(self.keys))
        if self.names.setdefault(label, name) != name:
            raise ValueError(
                f"{clip.path}: clip {clip.number} (counted from 0): its class {key} is called {name!r}, "
                f"an earlier clip's {self.names[label]!r}"
            )
        return label


def _ego4d_class(clip: Entry) -> tuple[Any, str]:
    key = clip.whole("verb_label"), clip.whole("noun_label")
    return key, f"{clip.text('verb')} {clip.text('noun')}"


def _epic_class(clip: Entry) -> tuple[Any, str]:
    verb, noun = clip.whole("verb_label"), clip.whole("noun_label")
    named = [clip.text(f) if f in clip.fields else f"{f} {n}" for f, n in (("verb", verb), ("noun", noun))]
    return clip.whole("action_idx"), " ".join(named)


def _own_class(number: str, name: str) -> Callable[[Entry], tuple[Any, str]]:
    return lambda clip: (clip.whole(number), clip.text(name))


def _folders(digits: int) -> dict[str, str]:
    names = {"rgb": "RGB_frames", "flow": "flow_frames", "pose": "hand-pose/heatmap"}
    return {m: f"{folder}/{{video_id}}/{{frame:0{digits}d}}.{{ext}}" for m, folder in names.items()}


DATASETS: Mapping[str, _Dataset] = {
    "ego4d": _Dataset(
        name="ego4d",
        stride=4,
        templates={
            "rgb": "image_frame/{clip_uid}/{frame:06d}.jpg",
            "flow": "optical_flow/{clip_uid}/npy/{frame:06d}.npy",
            "pose": "hand-pose/heatmap/{clip_uid}/{frame:06d}.npy",
        },
        start="clip_frame",
        stop=None,
        class_of=_ego4d_class,
        named_by=("uid",),
        needs=("video_id", "clip_uid"),
        splits=None,
    ),
    "epic": _Dataset(
        name="epic",
        stride=8,
        templates=dict.fromkeys(
            ("rgb", "flow", "pose"), "frames/{modality}/train/{participant_id}/{video_id}/frame_{frame:010d}.{ext}"
        ),
        start="start_frame",
        stop="stop_frame",
        class_of=_epic_class,
        named_by=("uid",),
        needs=("participant_id", "video_id"),
        times={"start_frame": "start_timestamp", "stop_frame": "stop_timestamp"},
    ),
    "meccano": _Dataset(
        name="meccano",
        stride=1,
        templates=_folders(5),
        start="start_frame",
        stop="end_frame",
        class_of=_own_class("action_id", "action_name"),
        named_by=("video_id", "start_frame", "end_frame"),
        needs=("video_id",),
    ),
    "wear": _Dataset(
        name="wear",
        stride=8,
        templates=_folders(6),
        start="start_frame",
        stop=None,
        class_of=_own_class("label_id", "label"),
        named_by=("video_id", "start_frame"),
        needs=("video_id",),
    ),
}


def _read(
    dataset: _Dataset,
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] = "",
    *,
    modalities: Sequence[str] | None = None,
    templates: Mapping[str, str] | str | None = None,
    split: str | None = None,
    clip_end: str = "video",
    blacklist: Iterable[str] = (),
) -> AnnotationSet:
    if clip_end not in _CLIP_ENDS:
        raise ValueError(f"clip_end must be one of {_CLIP_ENDS}, got {clip_end!r}")
    data, clips = _read_json(Path(path), dataset.splits, split)
    banned = set(blacklist)
    clips = [clip for clip in clips if clip.fields.get("video_id") not in banned]
    if not clips:
        raise ValueError(f"{path}: every clip's video is in the blacklist")
    paths = PathTemplates(dataset.name, dataset.templates, modalities, templates, root, clips)
    labelled = dataset.splits is None or data["split"] != UNLABELLED
    classes, seen, records = _Classes(), dict[str, int](), list[ClipRecord]()
    for clip in clips:
        for needed in dataset.needs:
            clip.text(needed)
        # Published: max(1, frame), for frames are numbered from 1.
        start = max(1, clip.frame(dataset.start, dataset.times, _EPIC_FPS))
        stop = None
        if dataset.stop is not None and clip_end == "annotated":
            stop = clip.frame(dataset.stop, dataset.times, _EPIC_FPS) + 1
            if stop <= start:
                raise clip.error(dataset.stop, f"is {stop - 1}, before the start {start}")
        label = name = None
        if labelled:
            key, name = dataset.class_of(clip)
            label = classes.number(clip, key, name)
        called = ":".join(clip.text(named) for named in dataset.named_by if named in clip.fields)
        called = _unique(called or f"{clip.text('video_id')}:{start}", seen)
        records.append(ClipRecord(len(records), called, paths.of(clip), start, stop, label, name))
    promised = data.get("num_actions")
    if labelled and promised is not None and promised != len(classes.names):
        warnings.warn(f"{path}: num_actions says {promised}, its clips show {len(classes.names)} classes", stacklevel=3)
    names = dict(sorted(classes.names.items()))
    return AnnotationSet(records, dataset.stride, names, data.get("split"), dataset.name)


def read_ego4d(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] = "",
    *,
    blacklist: Iterable[str] = EGO4D_BLACKLIST,
    **options: Any,
) -> AnnotationSet:
    """Ego4D: every split is labelled; a class is a (verb, noun), numbered in the order of first appearance.

    blacklist: video ids to leave out, by default those that the published configuration leaves out. The rest as in
    `read_annotations`.
    """
    return _read(DATASETS["ego4d"], path, root, blacklist=blacklist, **options)


def read_epic(path: str | os.PathLike[str], root: Any = "", **options: Any) -> AnnotationSet:
    """EPIC-KITCHENS-55: class number action_idx. Arguments as in `read_annotations`."""
    return _read(DATASETS["epic"], path, root, **options)


def read_meccano(path: str | os.PathLike[str], root: Any = "", **options: Any) -> AnnotationSet:
    """MECCANO: class number action_id, the data set's own. Arguments as in `read_annotations`."""
    return _read(DATASETS["meccano"], path, root, **options)


def read_wear(path: str | os.PathLike[str], root: Any = "", **options: Any) -> AnnotationSet:
    """WEAR: class number label_id, the data set's own. Arguments as in `read_annotations`."""
    return _read(DATASETS["wear"], path, root, **options)


def read_annotations(
    dataset: str,
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] = "",
    **options: Any,
) -> AnnotationSet:
    """Reads a published annotation file of "ego4d", "epic", "meccano" or "wear".

    root: the folder that the templates start from, or one a modality. modalities: which ones the clips shall have, by
    default those of templates, else rgb. templates: modality -> path, in the place of the published ones, or one text
    for all. split: what the file must say it is. clip_end: "video", as published, lets the sampled frames run past the
    annotated end; "annotated" sets `stop` there. blacklist: video ids to leave out.
    Raises ValueError naming the file, the clip's number and the field for whatever is missing or odd.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")
    readers = {"ego4d": read_ego4d, "epic": read_epic, "meccano": read_meccano, "wear": read_wear}
    return readers[dataset](path, root, **options)


def check_disjoint(source: Iterable[ClipRecord], target: Iterable[ClipRecord], on_overlap: str = "raise") -> list[str]:
    """Names of the classes that source and target share: cross-domain few-shot learning wants none.

    Names are compared without regard to case, and with "_", "-" and blanks alike; clips without a class do not count.
    on_overlap: "raise" a ValueError that lists them, "warn", or "ignore". Returns them as the target calls them, sorted.
    """
    if on_overlap not in ("raise", "warn", "ignore"):
        raise ValueError(f"on_overlap must be raise, warn or ignore, got {on_overlap!r}")
    left, right = (
        {re.sub(r"[\s_-]+", " ", r.label_name).strip().casefold(): r.label_name for r in records if r.label_name}
        for records in (source, target)
    )
    shared = sorted(right[name] for name in left.keys() & right.keys())
    if shared and on_overlap != "ignore":
        message = f"source and target share {len(shared)} of the target's {len(right)} classes: {', '.join(shared)}"
        if on_overlap == "raise":
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    return shared
