"""The Markdown page of roofline.py, from its figures alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; the first column to the left, the others to the right."""
    line = lambda cells: f"| {' | '.join(cells)} |"
    return [line(header), line(["---"] + ["--:"] * (len(header) - 1)), *map(line, rows), ""]


def number(value: float) -> str:
    """Three digits that count, without exponents."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def case(row: Mapping[str, Any]) -> str:
    return f"ViT-{row['model'][0].upper()}, {row['mask_ratio']:g}, {row['views']}"


class Unit(NamedTuple):
    """Of times, and what microseconds are multiplied by."""

    name: str
    factor: float

    def heading(self, key: str, text: str) -> str:
        return f"{self.name} {text}" if key.startswith("us") else text

    def figure(self, key: str, value: float) -> str:
        return number(value * self.factor if key.startswith("us") else value)


COSTS = {
    "gflop": "GFLOP",
    "gmac": "GMAC",
    "mb_least": "MB least",
    "mb_unfused": "MB unfused",
    "us_ideal": "ideal",
    "us_by_op": "an op at a time",
}
PCIE = {"us_pcie_whole": "PCIe, whole clip", "us_pcie_kept": "PCIe, kept cells"}


def page(result: Mapping[str, Any]) -> list[str]:
    """The whole page, a line an entry. Times of a GPU in microseconds, of a CPU in milliseconds."""
    m = result["machine"]
    unit = Unit("ms", 1e-3) if m["cpu"] else Unit("us", 1.0)
    pcie = f", {number(m['pcie_gb_s'])} GB/s from the host" if m["pcie_gb_s"] else ""
    return [
        f"# Roofline: {m['name']}",
        "",
        f"{number(m['tflop_s'])} TFLOP/s, {number(m['tb_s'])} TB/s{pcie}; {m['source']}. Activations of "
        f"{result['rules']['item']} bytes. Everything below is arithmetic unless it says measured.",
        "",
        *_inference(result, unit),
        *_training(result, unit),
        *_kernels(result, unit),
        *(_ladder(result) if result["ladder"] else []),
        *(_measured(result) if result["measured"] else []),
        *(_measured_steps(result) if result["measured_steps"] else []),
        *(_measured_kernels(result) if result["measured_kernels"] else []),
    ]


def _inference(result: Mapping[str, Any], unit: Unit) -> list[str]:
    rows = result["inference"]
    wanted = {"gflop": "GFLOP", "gflop_published": "published"} | COSTS
    wanted |= PCIE if any("us_pcie_whole" in row for row in rows) else {}
    return [
        "## Inference, per clip",
        "",
        f"Batches of about {result['batch_tokens']} tokens. GFLOP: a multiply and an add are two, kept tokens alone are "
        "embedded, attention counts. Published: every token embedded for every view, attention left out. GMAC: half of it.",
        "",
        *table(
            ["model, ratio, views", *(unit.heading(key, text) for key, text in wanted.items())],
            ([case(row), *(unit.figure(key, row[key]) for key in wanted)] for row in rows),
        ),
    ]


def _training(result: Mapping[str, Any], unit: Unit) -> list[str]:
    rows = []
    for row in result["training"]:
        stages = ", ".join(f"{stage} {unit.figure('us', us)}" for stage, us in row["by_stage"].items())
        rows.append([row["step"], *(unit.figure(key, row[key]) for key in COSTS), stages])
    header = ["step", *(unit.heading(key, text) for key, text in COSTS.items()), f"of it, {unit.name}"]
    about = f"Forward, backward, AdamW; {result['training_clips']} clips a step."
    return ["## Training, per clip", "", about, "", *table(header, rows)]


def _kernels(result: Mapping[str, Any], unit: Unit) -> list[str]:
    wanted = ("gflop", "mb", "flop_per_byte", "us")
    rows = (
        [row["op"], str(row["calls"]), *(unit.figure(key, row[key]) for key in wanted), row["limit"]]
        for row in result["kernels"]
    )
    header = ["op", "calls", "GFLOP", "MB", "FLOP/B", unit.name, "limit"]
    return ["## Kernels, per call", "", "ViT-S, ratio 0.75, 2 views.", "", *table(header, rows)]


def _ladder(result: Mapping[str, Any]) -> list[str]:
    names = list(result["ladder"][0]["us"])
    rows = ([case(row), *(number(row["us"][name]) for name in names)] for row in result["ladder"])
    title = "## Ladder, us a clip: **predicted, not measured**"
    return [title, "", *result["assumptions"], "", *table(["predicted", *names], rows)]


def _measured(result: Mapping[str, Any]) -> list[str]:
    wanted = ("ms_mmfast", "ms_best_peer", "ms_ideal")
    rows = (
        [
            f"{row['file']}, {row['commit']}: {row['model']}, {row['mask_ratio']:.2g}, {row['views']}",
            *(number(row[key]) for key in wanted),
            f"{row['share_of_ideal']:.0%}",
        ]
        for row in result["measured"]
    )
    header = ["file, commit: model, ratio, views", "mmfast", "best peer", "ideal", "ideal / mmfast"]
    return [
        "## Measured, beside the floor of the machine",
        "",
        "ms a clip. The rate is the best of the bare matrix products in the same run, as torch computes them.",
        "",
        *table(header, rows),
    ]


def _measured_steps(result: Mapping[str, Any]) -> list[str]:
    rows = (
        [
            f"{row['step']}; {row['file']}, {row['commit']}",
            number(row["ms_mmfast"]),
            "absent" if row["ms_best_peer"] is None else number(row["ms_best_peer"]),
            number(row["ms_ideal"]),
            f"{row['share_of_ideal']:.0%}",
        ]
        for row in result["measured_steps"]
    )
    header = ["step; file, commit", "mmfast", "best peer", "ideal", "ideal / mmfast"]
    return ["## Training steps, measured, ms a step", "", *table(header, rows)]


def _measured_kernels(result: Mapping[str, Any]) -> list[str]:
    wanted = ("us", "gb_s", "tflop_s", "flop_per_byte", "us_floor")
    rows = (
        [f"{row['op']} {row['shape']}", *(number(row[key]) for key in wanted), f"{row['share']:.0%}"]
        for row in result["measured_kernels"]
    )
    header = ["op", "us", "GB/s", "TFLOP/s", "FLOP/B", "floor, us", "floor / us"]
    return ["## Kernels, measured, on the roofline", "", *table(header, rows)]
