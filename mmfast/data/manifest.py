"""Data sets of one's own: a manifest (CSV or JSON) that lists clips, or a folder of class folders.

A row has `path` (or `rgb`, the same thing) and, where there are any, one column a further modality: a video file, a
folder of frames, or a path with a number field such as "P01/frame_{:06d}.jpg", relative to the manifest's folder.
Optional: `name`; `start` and `stop` (the frame behind the last) or `frames` (how many); `label` (the class by name) and
`label_id`. JSON is a list of such objects, or {"clips": [...], "stride": ..., "split": ...}.
"""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfast.data.frames import PICTURES, frame_path, is_template
from mmfast.data.records import AnnotationSet, ClipRecord
from mmfast.data.templates import parse_time
from mmfast.data.video import EXTENSIONS

__all__ = ["AnnotationSet", "folder_manifest", "read_manifest", "write_manifest"]

MODALITIES = ("rgb", "flow", "pose")
_PLAIN = ("name", "start", "stop", "frames", "label", "label_id")
_AROUND = ("clips", "stride", "split", "version", "date", "description")
_SHOWN = 10  # faults that an error lists in full


@dataclass(frozen=True)
class _Row:
    where: str  # "line 3" of a CSV, "clip 3" of a JSON
    cells: dict[str, Any]  # filled cells only


class _Faults:
    """All that is wrong with a manifest, said at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[str] = []

    def add(self, where: str, what: str) -> None:
        self.found.append(f"{where}: {what}")

    def raise_any(self) -> None:
        if len(self.found) == 1:
            raise ValueError(f"{self.path}: {self.found[0]}")
        if self.found:
            more = [f"and {len(self.found) - _SHOWN} more"] if len(self.found) > _SHOWN else []
            listed = "\n  ".join(self.found[:_SHOWN] + more)
            raise ValueError(f"{self.path}: {len(self.found)} faults:\n  {listed}")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no UTF-8 text: {error.reason} at byte {error.start}") from None


def _check_columns(path: Path, where: str, names: Iterable[Any], modalities: Sequence[str]) -> None:
    known = ("path", *modalities, *_PLAIN)
    unknown = [name for name in names if name not in known]
    if unknown:
        listed = ", ".join(map(repr, unknown))
        raise ValueError(f"{path}: {where}: unknown columns {listed}; known are {', '.join(known)}")


def _csv_rows(path: Path, modalities: Sequence[str]) -> list[_Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[_Row] = []
    try:
        header = [name.strip() for name in next(lines, [])]
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise ValueError(f"{path}: line 1: columns given twice: {', '.join(map(repr, repeated))}")
        _check_columns(path, "line 1 (the header)", header, modalities)
        if not {"path", *modalities} & set(header):
            raise ValueError(f"{path}: line 1: the header must name path or a modality, got {', '.join(header) or '-'}")
        first = lines.line_num + 1
        for cells in lines:
            where, first = f"line {first}", lines.line_num + 1
            if len(cells) > len(header):
                raise ValueError(f"{path}: {where}: {len(cells)} cells, the header names {len(header)}")
            filled = {name: cell.strip() for name, cell in zip(header, cells, strict=False) if cell.strip()}
            if filled:
                rows.append(_Row(where, filled))
    except csv.Error as error:
        raise ValueError(f"{path}: line {lines.line_num}: is no CSV: {error}") from None
    return rows


def _json_rows(path: Path, modalities: Sequence[str]) -> tuple[list[_Row], dict[str, Any]]:
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}: is no JSON: {error.msg}") from None
    around = data if isinstance(data, dict) else {"clips": data}
    if not isinstance(around.get("clips"), list):
        raise ValueError(f'{path}: must be a list of clips or an object with a list "clips"')
    unknown = sorted(set(around) - set(_AROUND))
    if unknown:
        raise ValueError(f"{path}: unknown fields {', '.join(unknown)}; known are {', '.join(_AROUND)}")
    rows = []
    for number, clip in enumerate(around["clips"]):
        where = f"clip {number} (counted from 0)"
        if not isinstance(clip, dict):
            raise ValueError(f"{path}: {where}: must be an object, got {type(clip).__name__}")
        _check_columns(path, where, clip, modalities)
        rows.append(_Row(where, {name: cell for name, cell in clip.items() if cell is not None and cell != ""}))
    return rows, around


def _frame(value: Any, fps: float | None) -> int:
    """A frame's number from a whole number, or from a time where fps is given."""
    text = str(value).strip()
    if ":" in text:
        if fps is None:
            raise ValueError(f"{text!r} is a time: pass fps")
        return int(parse_time(text) * fps)
    if isinstance(value, bool) or not text.isdecimal():
        raise ValueError(f"must be a whole number from 0 on, got {value!r}")
    return int(text)


def _bounds(cells: Mapping[str, Any], fps: float | None) -> tuple[int, int | None]:
    """(start, stop) of a row; ValueError naming the column."""
    found: dict[str, int] = {}
    for column in ("start", "stop", "frames"):
        if column in cells:
            try:
                found[column] = _frame(cells[column], None if column == "frames" else fps)
            except ValueError as error:
                raise ValueError(f"{column}: {error}") from None
    if "stop" in found and "frames" in found:
        raise ValueError("give stop or frames, not both")
    start = found.get("start", 0)
    stop = start + found["frames"] if "frames" in found else found.get("stop")
    if stop is not None and stop <= start:
        raise ValueError(f"stop {stop} must be greater than start {start}")
    return start, stop


def _sources(cells: Mapping[str, Any], modalities: Sequence[str], root: Path) -> dict[str, Path | str]:
    if "path" in cells and "rgb" in cells:
        raise ValueError("give path or rgb, not both: they mean the same")
    sources: dict[str, Path | str] = {}
    for modality in modalities:
        cell = cells.get(modality, cells.get("path") if modality == "rgb" else None)
        if cell is None:
            continue
        if not isinstance(cell, str):
            raise ValueError(f"{modality}: must be a path, got {cell!r}")
        joined = os.path.join(root, cell)
        sources[modality] = joined if is_template(joined) else Path(joined)
        if is_template(joined):
            frame_path(joined, 0)  # which says what is wrong with its field
    if not sources:
        raise ValueError("names no file: path or a modality is needed")
    return sources


def _missing(source: Path | str) -> bool:
    path = os.fspath(source)
    if is_template(path):
        # The folder above the number: single frames are the doctor's business.
        path = os.path.dirname(path.split("{")[0] or ".") or "."
    return not os.path.exists(path)


def _number_classes(
    rows: Sequence[_Row], classes: Sequence[str] | None, faults: _Faults
) -> list[tuple[int | None, str | None]]:
    """(class number, name) of every row."""
    names = [None if "label" not in row.cells else str(row.cells["label"]) for row in rows]
    given = {name for name in names if name is not None}
    if classes is not None:
        numbers = {name: number for number, name in enumerate(classes)}
    elif given and all(name.isdecimal() for name in given):
        numbers = {name: int(name) for name in given}
    else:
        numbers = {name: number for number, name in enumerate(sorted(given))}
    used: dict[int, str] = {}
    labels: list[tuple[int | None, str | None]] = []
    for row, name in zip(rows, names, strict=True):
        number = numbers.get(name) if name is not None else None
        if name is not None and number is None and "label_id" not in row.cells:
            faults.add(row.where, f"label {name!r} is none of the {len(numbers)} classes")
        if "label_id" in row.cells:
            try:
                number = _frame(row.cells["label_id"], None)
            except ValueError as error:
                faults.add(row.where, f"label_id: {error}")
        if number is not None:
            called = name or str(number)
            if used.setdefault(number, called) != called:
                faults.add(row.where, f"class {number} is called {called!r}, earlier {used[number]!r}")
        labels.append((number, name))
    return labels


def _called(row: _Row, start: int, stop: int | None, root: Path, sources: Mapping[str, Path | str]) -> str:
    if "name" in row.cells:
        return str(row.cells["name"])
    source = os.fspath(next(iter(sources.values())))
    inside = os.path.relpath(source, root) if os.path.commonpath([root, source]) == str(root) else source
    return inside if start == 0 and stop is None else f"{inside}:{start}-{'' if stop is None else stop}"


def read_manifest(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    *,
    modalities: Sequence[str] = MODALITIES,
    classes: Sequence[str] | None = None,
    stride: int | None = None,
    fps: float | None = None,
    check_files: bool = True,
) -> AnnotationSet:
    """Reads a manifest of clips from a .csv, .tsv or .json file.

    root: the folder that paths start from, by default the manifest's. modalities: the names a column may have. classes:
    class names in the order of their numbers; by default the names found, sorted, and labels that are all whole numbers
    stand for themselves. stride: frames between two samples, by default what the JSON says, else None. fps: turns a
    start or stop such as 00:01:02.5 into a frame. check_files: look whether every file is there.
    Raises ValueError that names each fault with its line (CSV) or clip number (JSON): unknown columns, names given
    twice, missing files, and whatever cannot be read.
    """
    path = Path(path)
    base = Path(os.path.abspath(path.parent if root is None else root))
    if root is not None and not base.is_dir():
        raise ValueError(f"root must be a folder, got {root}")
    suffix, around = path.suffix.lower(), dict[str, Any]()
    if suffix in (".csv", ".tsv"):
        rows = _csv_rows(path, modalities)
    elif suffix == ".json":
        rows, around = _json_rows(path, modalities)
    else:
        raise ValueError(f"{path}: a manifest must be a .csv, .tsv or .json file")
    if not rows:
        raise ValueError(f"{path}: lists no clip")
    step = around.get("stride") if stride is None else stride
    if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 1):
        raise ValueError(f"{path}: stride must be a whole number from 1 on, got {step!r}")
    faults, seen, there = _Faults(path), dict[str, str](), dict[str, bool]()
    records: list[ClipRecord] = []
    for row, (label, label_name) in zip(rows, _number_classes(rows, classes, faults), strict=True):
        try:
            start, stop = _bounds(row.cells, fps)
            sources = _sources(row.cells, modalities, base)
        except ValueError as error:
            faults.add(row.where, str(error))
            continue
        for modality, source in sources.items() if check_files else ():
            if there.setdefault(os.fspath(source), not _missing(source)) is False:
                faults.add(row.where, f"{modality}: no such file: {source}")
        name = _called(row, start, stop, base, sources)
        if seen.setdefault(name, row.where) != row.where:
            faults.add(row.where, f"name {name!r} was given before, in {seen[name]}")
        records.append(ClipRecord(len(records), name, sources, start, stop, label, label_name))
    faults.raise_any()
    found = {r.label: r.label_name or str(r.label) for r in records if r.label is not None}
    return AnnotationSet(records, step, dict(sorted(found.items())), around.get("split"), path.stem)


def _clips_below(folder: Path) -> Iterator[Path]:
    """Video files, and folders that hold pictures: the clips of one class."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: cannot be read: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        shown = sorted(name for name in names if not name.startswith("."))
        yield from (Path(parent, name) for name in shown if Path(name).suffix.lower() in EXTENSIONS)
        if Path(parent) != folder and any(Path(name).suffix.lower() in PICTURES for name in shown):
            yield Path(parent)


def folder_manifest(folder: str | os.PathLike[str], *, stride: int | None = None) -> AnnotationSet:
    """A folder of class folders as a labelled data set: every video file, or folder of pictures, below one is a clip.

    Classes are numbered in the order of their folders' names; hidden files and folders are left out. Raises ValueError
    for a folder that is not there, has no class folder with a clip, or has videos outside the class folders; warns of
    class folders without a clip.
    """
    base = Path(os.path.abspath(folder))
    if not base.is_dir():
        raise ValueError(f"{folder}: no such folder")
    inside = sorted(path for path in base.iterdir() if not path.name.startswith("."))
    strays = [path.name for path in inside if path.is_file() and path.suffix.lower() in EXTENSIONS]
    if strays:
        raise ValueError(f"{folder}: {len(strays)} videos lie outside the class folders: {', '.join(strays[:3])}")
    found = {path.name: list(_clips_below(path)) for path in inside if path.is_dir()}
    empty = [name for name, clips in found.items() if not clips]
    if len(empty) == len(found):
        raise ValueError(f"{folder}: no class folder with a video or a folder of pictures in it")
    if empty:
        warnings.warn(f"{folder}: class folders without a clip: {', '.join(empty)}", stacklevel=2)
    classes = [name for name, clips in found.items() if clips]
    records: list[ClipRecord] = []
    for label, name in enumerate(classes):
        for path in found[name]:
            called = path.relative_to(base).as_posix()
            records.append(ClipRecord(len(records), called, {"rgb": path}, label=label, label_name=name))
    return AnnotationSet(records, stride, dict(enumerate(classes)), None, base.name)


def _cells(record: ClipRecord, place: Callable[[Path | str], str]) -> dict[str, Any]:
    cells: dict[str, Any] = {"name": record.name, **{m: place(source) for m, source in record.sources.items()}}
    label = {"label": record.label_name, "label_id": record.label}
    optional = {"start": record.start or None, "stop": record.stop, **label}
    return cells | {name: value for name, value in optional.items() if value is not None}


def write_manifest(annotations: Iterable[ClipRecord], path: str | os.PathLike[str]) -> Path:
    """Writes clips as a manifest that `read_manifest` reads back the same; .csv, .tsv or .json.

    Files below the manifest's folder are written relative to it, others in full. The file is written aside and renamed:
    it appears whole or not at all. Of an AnnotationSet, JSON keeps stride and split.
    """
    path = Path(path)
    suffix, base = path.suffix.lower(), os.path.abspath(path.parent)
    if suffix not in (".csv", ".tsv", ".json"):
        raise ValueError(f"{path}: a manifest must be a .csv, .tsv or .json file")

    def place(source: Path | str) -> str:
        full = os.path.abspath(source)
        return os.path.relpath(full, base) if os.path.commonpath([base, full]) == base else full

    rows = [_cells(record, place) for record in annotations]
    columns = [c for c in ("name", *dict.fromkeys(c for row in rows for c in row)) if any(c in row for row in rows)]
    aside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        with aside.open("w", encoding="utf-8", newline="") as file:
            if suffix == ".json":
                around = {name: getattr(annotations, name, None) for name in ("split", "stride")}
                given = {name: value for name, value in around.items() if value is not None}
                json.dump({**given, "clips": rows}, file, indent=1, ensure_ascii=False)
            else:
                table = csv.DictWriter(file, list(dict.fromkeys(columns)), delimiter="\t" if suffix == ".tsv" else ",")
                table.writeheader()
                table.writerows(rows)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path
