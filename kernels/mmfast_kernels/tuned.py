"""Configuration tables measured on this machine's GPU, which come before the shipped ones; `mmfast tune` makes them.

    $MMFAST_TABLES, or mmfast/tables in the user's cache folder / <gpu>-triton<version> / <op>.json
    {"made": {"gpu": "NVIDIA H200", "triton": "3.6.0", ...}, "rows": [{"when": {...}, "config": {...}, "timed": [...]}]}

They hold where GPU and Triton are those that they were measured with. A file of others, or one that cannot be read, is left
out, with a warning that names it.
"""

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


@functools.cache
def machine() -> dict[str, str] | None:
    """What measured configurations depend on: the first GPU and Triton's version. None without either."""
    if not torch.cuda.is_available():
        return None
    try:
        return {"gpu": torch.cuda.get_device_name(0), "triton": version("triton")}
    except PackageNotFoundError:
        return None


def folder() -> Path | None:
    """Where this machine's tables lie, or would; None where none can be measured."""
    about = machine()
    if about is None:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    base = Path(os.environ.get("MMFAST_TABLES") or cache / "mmfast" / "tables")
    return base / re.sub(r"[^\w.]+", "-", f"{about['gpu']}-triton{about['triton']}".lower())


_instead: Mapping[str, Sequence[Mapping[str, Any]]] | None = None


@contextlib.contextmanager
def instead(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[None]:
    """These rows, by op, and no others, in place of those on the disk. tables.reload() makes them seen, and unseen."""
    global _instead
    before, _instead = _instead, found
    try:
        yield
    finally:
        _instead = before


def rows(op: str) -> Sequence[Mapping[str, Any]]:
    """The rows measured on this machine for an op."""
    if _instead is not None:
        return _instead.get(op, ())
    place = folder()
    return () if place is None else read(place / f"{op}.json")["rows"]


def read(path: Path) -> dict[str, Any]:
    """A table of this machine, {"made": ..., "rows": ...}; one without rows where there is no file, or none that holds."""
    nothing: dict[str, Any] = {"made": {}, "rows": []}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        made, found = table["made"], table["rows"]
        fault = _fault(made, found)
    except FileNotFoundError:
        return nothing
    except (OSError, ValueError, KeyError, TypeError) as error:
        fault = f"is no table of mmfast ({type(error).__name__}: {error})"
    if fault is None:
        return {"made": made, "rows": found}
    warnings.warn(f"{path}: {fault}; left out. `mmfast tune` makes it anew", stacklevel=2)
    return nothing


def _fault(made: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str | None:
    for row in found:
        if not isinstance(row["when"], dict) or not isinstance(row["config"], dict):
            return "is no table of mmfast: a row's when and config must be objects"
    for name, value in (machine() or {}).items():
        if made.get(name) != value:
            return f"was measured with {name} {made.get(name)}, here is {value}"
    return None
