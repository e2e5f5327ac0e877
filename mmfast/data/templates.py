"""Where a clip's frames lie: one entry of an annotation file, and the path templates that its fields fill."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_TIME = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?)")


class Entry:
    """One entry of "clips"; every complaint about it names the file, its number and the field."""

    def __init__(self, path: Path, number: int, fields: Any) -> None:
        self.path, self.number = path, number
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: clip {number}: must be an object with fields, got {type(fields).__name__}")
        self.fields: dict[str, Any] = fields

    def error(self, field: str, what: str) -> ValueError:
        return ValueError(f"{self.path}: clip {self.number} (counted from 0): field {field!r} {what}")

    def text(self, field: str) -> str:
        value = self.fields.get(field)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise self.error(field, "is missing" if field not in self.fields else f"must be a text, got {value!r}")
        return str(value)

    def whole(self, field: str) -> int:
        value = self.fields.get(field)
        try:
            if isinstance(value, bool) or not isinstance(value, (str, int, float)) or float(value) != int(float(value)):
                raise ValueError
            return int(float(value))
        except (ValueError, OverflowError):
            what = "is missing" if field not in self.fields else f"must be a whole number, got {value!r}"
            raise self.error(field, what) from None

    def frame(self, field: str, times: Mapping[str, str], fps: int) -> int:
        """A frame's number, or its time where only that is given."""
        if field in self.fields or times.get(field) not in self.fields:
            return self.whole(field)
        try:
            return max(1, int(parse_time(self.fields[times[field]]) * fps))
        except ValueError as error:
            raise self.error(times[field], f"is no time: {error}") from None


def parse_time(text: Any) -> float:
    """Seconds of "HH:MM:SS.ff", "MM:SS.ff", "SS.ff" or a number; ValueError for anything else."""
    found = _TIME.fullmatch(str(text).strip())
    if found is None:
        raise ValueError(f"a time must be HH:MM:SS.ff or seconds, got {text!r}")
    hours, minutes, seconds = found.groups()
    return 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds)


def _parse_template(modality: str, template: str) -> list[tuple[str, str | None, str]]:
    """(literal, field, format) of every part; ValueError for a template that is not made of plain fields."""
    try:
        parts = [(text, name, spec or "", conv) for text, name, spec, conv in string.Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"template of {modality!r}: {template!r} cannot be read: {error}") from None
    for _, name, spec, conversion in parts:
        if name is not None and (not name.isidentifier() or conversion):
            raise ValueError(f"template of {modality!r}: {template!r}: a field must be a plain name, got {{{name}}}")
        if name == "frame" and re.fullmatch(r"0?\d*d?", spec) is None:
            raise ValueError(f"template of {modality!r}: {template!r}: frame takes a format like 06d, got {spec!r}")
    if sum(name == "frame" for _, name, _, _ in parts) > 1:
        raise ValueError(f"template of {modality!r}: {template!r} names the frame more than once")
    return [(text, name, spec) for text, name, spec, _ in parts]


class PathTemplates:
    """The templates of one file, filled clip by clip."""

    def __init__(
        self,
        dataset: str,
        defaults: Mapping[str, str],
        modalities: Sequence[str] | None,
        templates: Mapping[str, str] | str | None,
        root: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
        clips: Iterable[Entry],
    ) -> None:
        if isinstance(modalities, str):
            raise TypeError(f"modalities must be a sequence of names, got the text {modalities!r}")
        given = dict(templates) if isinstance(templates, Mapping) else {}
        modalities = tuple(modalities or given or ("rgb",))
        fields = {"modality", "ext", "frame"}.union(*(clip.fields for clip in clips))
        self.parts, self.roots = {}, {}
        for modality in modalities:
            template = templates if isinstance(templates, str) else given.pop(modality, defaults.get(modality))
            if template is None:
                known = ", ".join(defaults)
                raise ValueError(f"no template for modality {modality!r}: {dataset} has ones for {known}")
            self.parts[modality] = _parse_template(modality, template)
            unknown = sorted({name for _, name, _ in self.parts[modality] if name is not None} - fields)
            if unknown:
                has = ", ".join(sorted(fields))
                raise ValueError(
                    f"template of {modality!r}: {template!r} names unknown fields: {', '.join(unknown)}; there are {has}"
                )
            if isinstance(root, Mapping) and modality not in root:
                raise ValueError(f"root must name a folder for {modality!r}, got ones for {', '.join(root)}")
            self.roots[modality] = os.fspath(root[modality] if isinstance(root, Mapping) else root)
        if given:
            raise ValueError(f"templates are given for {', '.join(given)}, modalities are {', '.join(modalities)}")

    def of(self, clip: Entry) -> dict[str, Path | str]:
        return {modality: self._fill(modality, clip) for modality in self.parts}

    def _fill(self, modality: str, clip: Entry) -> Path | str:
        parts = self.parts[modality]
        numbered = any(name == "frame" for _, name, _ in parts)
        quote = (lambda text: text.replace("{", "{{").replace("}", "}}")) if numbered else str
        path = ""
        for literal, name, spec in parts:
            path += quote(literal)
            if name == "frame":
                path += f"{{:{spec}}}"
            elif name is not None:
                path += quote(self._value(modality, clip, name, spec))
        root = self.roots[modality]
        filled = os.path.join(quote(root), path) if root not in ("", ".") else path
        return filled if numbered else Path(filled)

    def _value(self, modality: str, clip: Entry, name: str, spec: str) -> str:
        if name in ("modality", "ext") and name not in clip.fields:
            return modality if name == "modality" else "jpg" if modality == "rgb" else "npy"
        if not isinstance(value := clip.fields.get(name), (str, int, float)):
            what = "is missing" if name not in clip.fields else f"cannot stand in a path: {value!r}"
            raise clip.error(name, f"{what}, and the template of {modality!r} needs it")
        try:
            return format(value, spec)
        except ValueError as error:
            raise clip.error(name, f"does not fit the template of {modality!r}: {error}") from None
