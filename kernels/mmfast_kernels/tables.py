"""Checked-in tables of kernel configurations, one JSON file an op: `tables/<op>.json`.

    {"comment": "...", "rows": [{"when": {"arch_min": 90, "dtype": ["bf16", "fp16"], "d": 64, "n_max": 1024},
                                 "config": {...}, "alternatives": [{...}], "note": "..."}]}

The first row whose conditions all hold wins. `<key>_min` and `<key>_max` bound the case's `<key>`, a list means any of
it, anything else must be equal; a row without conditions takes everything. Rows that `mmfast tune` measured on this
machine's GPU (tuned.py) come before the shipped ones. Nothing is timed while a model runs: with MMFAST_AUTOTUNE=1, and only
then, the config and its alternatives are timed once a case and remembered in the process.
"""

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmfast_kernels import tuned

FOLDER = Path(__file__).with_suffix("")
_SHORT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Row:
    when: Mapping[str, Any]
    config: Mapping[str, Any]
    alternatives: tuple[Mapping[str, Any], ...]

    def holds(self, case: Mapping[str, Any]) -> bool:
        return all(_holds(key, wanted, case) for key, wanted in self.when.items())


def _holds(key: str, wanted: Any, case: Mapping[str, Any]) -> bool:
    if key.endswith("_min"):
        return case[key[:-4]] >= wanted
    if key.endswith("_max"):
        return case[key[:-4]] <= wanted
    return case[key] in wanted if isinstance(wanted, list) else case[key] == wanted


@functools.cache
def rows(op: str) -> tuple[Row, ...]:
    """Every row that an op's configuration may come from, in the order in which they are tried."""
    return (*(_row(r) for r in tuned.rows(op)), *shipped(op))


@functools.cache
def shipped(op: str) -> tuple[Row, ...]:
    """The rows of the table that came with the package."""
    with open(FOLDER / f"{op}.json", encoding="utf-8") as file:
        return tuple(_row(r) for r in json.load(file)["rows"])


def names() -> list[str]:
    """The ops that have a table."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def reload() -> None:
    """Forget what was read: tables on the disk have changed."""
    for cached in (rows, shipped, _lookup):
        cached.cache_clear()


def _row(about: Mapping[str, Any]) -> Row:
    return Row(about.get("when", {}), about["config"], tuple(about.get("alternatives", ())))


def lookup(op: str, **case: Any) -> Row:
    """The first row of op's table that holds for this case (hashable values); LookupError when none does."""
    items = tuple(case.items())
    if _recording is not None:
        _recording.asked.add((op, items))
    return _lookup(op, items)


@functools.lru_cache(maxsize=4096)
def _lookup(op: str, items: tuple[tuple[str, Any], ...]) -> Row:
    case = dict(items)
    for row in rows(op):
        if row.holds(case):
            return row
    raise LookupError(f"tables/{op}.json has no row for {case}")


@functools.cache
def arch_of(device: torch.device) -> int:
    """90 for a CUDA device of compute capability 9.0; 0 for a device that is not CUDA."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def dtype_name(dtype: torch.dtype) -> str:
    """How the tables call a dtype: bf16, fp16, fp32."""
    return _SHORT_NAMES.get(dtype, str(dtype).removeprefix("torch."))


_tuned: dict[tuple[Any, ...], Mapping[str, Any]] = {}


@dataclass(frozen=True)
class Timed:
    """A configuration with its median and quartiles' distance in milliseconds, infinite where it cannot run."""

    config: Mapping[str, Any]
    ms: float
    spread: float = 0.0


Key = tuple[str, tuple[tuple[str, Any], ...]]  # op and case


@dataclass(frozen=True)
class Recording:
    """timed: of every case that was launched, the shipped configuration and its alternatives. asked: all that was looked up."""

    timed: dict[Key, list[Timed]] = field(default_factory=dict)
    asked: set[Key] = field(default_factory=set)


_recording: Recording | None = None


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Time every shipped configuration and its alternatives, once a case, of whatever is launched inside."""
    global _recording
    if _recording is not None:
        raise RuntimeError("configurations are being timed already")
    _recording = found = Recording()
    try:
        yield found
    finally:
        _recording = None


def config(op: str, run: Callable[[Mapping[str, Any]], Any], **case: Any) -> Mapping[str, Any]:
    """The configuration to launch with: the table's, or under MMFAST_AUTOTUNE=1 the fastest of its row.

    run launches the kernel with one configuration; it is only called to time it, and never while a CUDA graph is
    being captured.
    """
    row = lookup(op, **case)
    if _recording is not None:
        _record(_recording.timed, op, run, case)
        return row.config
    if not row.alternatives or os.environ.get("MMFAST_AUTOTUNE", "0") != "1":
        return row.config
    key = (op, *case.items())
    if key not in _tuned:
        if torch.cuda.is_current_stream_capturing():
            return row.config
        _tuned[key] = min((row.config, *row.alternatives), key=lambda candidate: measure(run, candidate).ms)
    return _tuned[key]


def _record(
    found: dict[Key, list[Timed]], op: str, run: Callable[[Mapping[str, Any]], Any], case: Mapping[str, Any]
) -> None:
    key = (op, tuple(case.items()))
    if key in found or torch.cuda.is_current_stream_capturing():
        return
    own = next(row for row in shipped(op) if row.holds(case))
    found[key] = [measure(run, candidate) for candidate in (own.config, *own.alternatives)]


def measure(run: Callable[[Mapping[str, Any]], Any], candidate: Mapping[str, Any]) -> Timed:
    """Time one configuration, warmed up, on a GPU whose caches are emptied before each call."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        low, median, high = do_bench(lambda: run(candidate), quantiles=[0.25, 0.5, 0.75])
    except (OutOfResources, CompilationError):  # one that this device or compiler cannot take loses, and stops nothing
        return Timed(candidate, math.inf)
    except RuntimeError as error:
        if "PassManager" not in str(error):
            raise
        return Timed(candidate, math.inf)
    return Timed(candidate, median, high - low)
