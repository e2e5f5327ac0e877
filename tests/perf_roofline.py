"""What benchmarks/roofline.py counts for every configuration of its pages: a change of the model, or of the counting."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import machines
import roofline
import workloads

RULES = workloads.Rules()
COUNTED = ("gflop", "gflop_published", "mb_least", "mb_unfused")


def _figures(rows: list[dict[str, Any]], named: Callable[[dict[str, Any]], str]) -> dict[str, float]:
    return {f"{named(row)}: {name}": round(row[name], 4) for row in rows for name in COUNTED if name in row}


CASES: dict[str, Callable[[], dict[str, float]]] = {
    "inference": lambda: _figures(
        roofline.inference_rows(machines.PRESETS["h200"], RULES),
        lambda row: f"{row['model']}, ratio {row['mask_ratio']}, {row['views']} views",
    ),
    "training": lambda: _figures(roofline.step_rows(machines.PRESETS["h200"], RULES), lambda row: row["step"]),
}


def measure(case: str) -> dict[str, float]:
    return CASES[case]()
