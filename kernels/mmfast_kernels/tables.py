"""Checked-in tables of kernel configurations, one JSON file an op: `tables/<op>.json`.

    {"comment": "...", "rows": [{"when": {"arch_min": 90, "dtype": ["bf16", "fp16"], "d": 64, "n_max": 1024},
                                 "config": {...}, "alternatives": [{...}], "note": "..."}]}

The first row whose conditions all hold wins. `<key>_min` and `<key>_max` bound the case's `<key>`, a list means any of
it, anything else must be equal; a row without conditions takes everything. Nothing is timed while a model runs: with
MMFAST_AUTOTUNE=1, and only then, the config and its alternatives are timed once a case and remembered in the process.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
    """Every row of an op's table, in the order in which they are tried."""
    with open(FOLDER / f"{op}.json", encoding="utf-8") as file:
        table = json.load(file)
    return tuple(Row(r.get("when", {}), r["config"], tuple(r.get("alternatives", ()))) for r in table["rows"])


def lookup(op: str, **case: Any) -> Row:
    """The first row of op's table that holds for this case (hashable values); LookupError when none does."""
    return _lookup(op, tuple(case.items()))


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


def config(op: str, run: Callable[[Mapping[str, Any]], Any], **case: Any) -> Mapping[str, Any]:
    """The configuration to launch with: the table's, or under MMFAST_AUTOTUNE=1 the fastest of its row.

    run launches the kernel with one configuration; it is only called to time it, and never while a CUDA graph is
    being captured.
    """
    row = lookup(op, **case)
    if not row.alternatives or os.environ.get("MMFAST_AUTOTUNE", "0") != "1":
        return row.config
    key = (op, *case.items())
    if key not in _tuned:
        if torch.cuda.is_current_stream_capturing():
            return row.config
        _tuned[key] = min((row.config, *row.alternatives), key=lambda candidate: _time(run, candidate))
    return _tuned[key]


def _time(run: Callable[[Mapping[str, Any]], Any], candidate: Mapping[str, Any]) -> float:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(lambda: run(candidate), return_mode="median")
    except OutOfResources:  # a candidate too large for this device loses, and does not stop the run
        return float("inf")
