"""Lists of labelled videos as M2-CLIP's and EVL's data sets have them, and the files that name their classes and words.

A list has a line a clip: `path label`, or `path n label`, where the path is a folder of n frames. A table of classes is CSV with
`id,name`. A vocabulary for masked words has lines `word id`.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mmfast.data.records import AnnotationSet, ClipRecord

FRAME = "img_{:05d}.jpg"  # a frame's name, unless told
_FORMS = {
    "path": re.compile(r"(?P<path>.+)"),
    "path label": re.compile(r"(?P<path>.+?)[\s,]+(?P<label>\d+)"),
    "path n label": re.compile(r"(?P<path>.+?)[\s,]+(?P<n>\d+)[\s,]+(?P<label>\d+)"),
}


def read_video_list(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] = "",
    *,
    names: Sequence[str] = (),
    columns: str | None = None,
    first_label: int = 0,
    template: str = FRAME,
    num_frames: int = 8,
    stride: int | None = None,
) -> AnnotationSet:
    """The clips of a list, a line each.

    root: what relative paths start from. names: the classes in order, which then bound the labels. columns: "path label",
    "path n label" (a folder with frames 1 to n, named by `template`), or "path" for a list without labels; by default the second
    where every line has that form, else the first. Paths may hold blanks. first_label: the number that the list gives the first
    class (1 in UCF101's). num_frames, stride: as in AnnotationSet. Raises ValueError naming the file and the line.
    """
    if columns is not None and columns not in _FORMS:
        raise ValueError(f"columns must be one of {', '.join(map(repr, _FORMS))}, got {columns!r}")
    lines = _lines(Path(path))
    if columns is None:
        counted = all(_FORMS["path n label"].fullmatch(line) for _, line in lines)
        columns = "path n label" if counted else "path label"
    records: list[ClipRecord] = []
    for number, line in lines:
        where = f"{path}: line {number}"
        parts = _FORMS[columns].fullmatch(line)
        if parts is None:
            raise ValueError(f"{where}: must be {columns!r}, its numbers whole, got {line!r}")
        fields = parts.groupdict()
        label = _label(fields.get("label"), first_label, names, where)
        file = os.path.join(os.fspath(root), parts["path"])
        source, start, stop = _source(file, fields.get("n"), template, where)
        called = names[label] if names and label is not None else None
        records.append(ClipRecord(len(records), parts["path"], {"rgb": source}, start, stop, label, called))
    if not records:
        raise ValueError(f"{path}: is empty")
    seen = sorted({r.label for r in records if r.label is not None})
    classes = {label: names[label] if names else str(label) for label in seen}
    return AnnotationSet(records, stride, classes, None, Path(path).stem, num_frames)


def read_class_names(path: str | os.PathLike[str]) -> list[str]:
    """Names of the classes 0, 1, ... of a CSV table `id,name`, in any order, with or without a heading.

    A name that holds a comma stands in quotes. Raises ValueError naming the file and the line.
    """
    rows = [(n, row) for n, row in enumerate(csv.reader(_text(Path(path)).splitlines()), 1) if any(map(str.strip, row))]
    if rows and not rows[0][1][0].strip().isdecimal():
        rows = rows[1:]
    found: dict[int, str] = {}
    for number, row in rows:
        where = f"{path}: line {number}"
        if len(row) != 2:
            hint = "; a name with a comma stands in quotes" if len(row) > 2 else ""
            raise ValueError(f"{where}: must be id,name, got {len(row)} fields{hint}")
        if not row[0].strip().isdecimal() or not row[1].strip():
            raise ValueError(f"{where}: must be a whole number and a name, got {','.join(row)!r}")
        if int(row[0]) in found:
            raise ValueError(f"{where}: id {int(row[0])} stands there twice")
        found[int(row[0])] = row[1].strip()
    return _in_order(found, f"{path}: ids")


def write_class_names(names: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Write a table of classes as read_class_names reads it."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("id", "name"), *enumerate(names)])


def read_words(path: str | os.PathLike[str]) -> dict[str, int]:
    """word -> id of a vocabulary of label words, lower-cased; ids 0 to V - 1, each once. ValueError naming file and line."""
    found: dict[str, int] = {}
    for number, line in _lines(Path(path)):
        parts = line.split()
        if len(parts) != 2 or not parts[1].isdecimal():
            raise ValueError(f"{path}: line {number}: must be a word and its id, got {line!r}")
        if parts[0].lower() in found:
            raise ValueError(f"{path}: line {number}: {parts[0].lower()!r} stands there twice")
        found[parts[0].lower()] = int(parts[1])
    by_id = {i: word for word, i in found.items()}
    if len(by_id) != len(found):
        raise ValueError(f"{path}: two words have one id")
    _in_order(by_id, f"{path}: ids")
    return found


def label_words(names: Iterable[str]) -> dict[str, int]:
    """A vocabulary of every word in names of classes, lower-cased and sorted, as the published ones are."""
    return {word: i for i, word in enumerate(sorted({word for name in names for word in name.lower().split()}))}


def write_words(words: Mapping[str, int], path: str | os.PathLike[str]) -> None:
    """Write a vocabulary as read_words reads it."""
    lines = [f"{word} {i}\n" for word, i in sorted(words.items(), key=lambda pair: pair[1])]
    Path(path).write_text("".join(lines), encoding="utf-8")


# -- inside ------------------------------------------------------------------------------------------------------------


def _label(text: str | None, first: int, names: Sequence[str], where: str) -> int | None:
    if text is None:
        return None
    label = int(text) - first
    if label < 0 or (names and label >= len(names)):
        allowed = f"{first} to {first + len(names) - 1}" if names else f"{first} or more"
        raise ValueError(f"{where}: label must be {allowed}, got {text}")
    return label


def _source(path: str, count: str | None, template: str, where: str) -> tuple[Path | str, int, int | None]:
    """A video file from its start to its end, or a folder of frames numbered from 1 with the first and last of them."""
    if count is None:
        return Path(path), 0, None
    if int(count) < 1:
        raise ValueError(f"{where}: the number of frames must be at least 1, got {count}")
    return os.path.join(path.replace("{", "{{").replace("}", "}}"), template), 1, int(count) + 1


def _lines(path: Path) -> list[tuple[int, str]]:
    return [(n, line.strip()) for n, line in enumerate(_text(path).splitlines(), 1) if line.strip()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no UTF-8 text: {error.reason} at byte {error.start}") from None


def _in_order(found: Mapping[int, str], what: str) -> list[str]:
    lacking = [i for i in range(len(found)) if i not in found]
    if not found or lacking:
        raise ValueError(
            f"{what} must be 0 to {max(len(found) - 1, 0)}, each once; {lacking[0] if lacking else 0} is missing"
        )
    return [found[i] for i in range(len(found))]
