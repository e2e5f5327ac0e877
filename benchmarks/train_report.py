"""What the training benchmark prints, saves and draws."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
from harness import Timing
from report import aligned, mib
from train_variants import OURS, Error, Gate, Outcome, Variant


@dataclass(frozen=True)
class Row:
    """One variant. step_bytes: the most that a step holds beyond what stays between steps, gradients included."""

    name: str
    timing: Timing
    clips: int
    weights_bytes: int
    optimiser_bytes: int
    step_bytes: int
    error: Error
    outcome: Outcome

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.timing.median * 1e3

    @property
    def peak_bytes(self) -> int:
        return self.weights_bytes + self.optimiser_bytes + self.step_bytes


MEMORY_NOTE = (
    "peak MiB: weights, optimiser state and all that a step allocates (activations, gradients, temporaries), without the "
    "input clips; step MiB: the last of these alone"
)
HEADER = ("", "ms a step", "+-", "clips/s", "x publ.", "x best peer", "peak MiB", "step MiB", "loss err.", "grad err.")


def figures(value: float) -> str:
    """Four figures, or all of a larger number."""
    return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def rows_of(variants: Sequence[Variant], gate: Gate, clips: int, rounds: int | None, budget: float) -> list[Row]:
    """Memory and time of the variants that passed the check."""
    good = [v for v in variants if v.name in gate.errors and v.name not in gate.red]
    device = good[0].setup.device
    held, step = {}, {}
    for variant in harness.progress(good, "memory", len(good)):
        for _ in range(2):
            variant.step()
        variant.drop_gradients()
        step[variant.name] = harness.peak_memory(variant.step, device)
        held[variant.name] = variant.held_bytes()
    calls = {v.name: v.step for v in good}
    warmup = 3 if device.type == "cuda" else 0
    timings = harness.measure(calls, device, rounds=rounds, budget=budget, warmup=warmup, what="steps")
    return [
        Row(
            v.name,
            timings[v.name],
            clips,
            held[v.name]["weights"],
            held[v.name]["optimiser"],
            step[v.name],
            gate.errors[v.name],
            gate.outcomes[v.name],
        )
        for v in good
    ]


def published(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row.name == "published"), None)


def best_peer(rows: Sequence[Row]) -> Row | None:
    peers = [row for row in rows if not row.name.startswith(OURS)]
    return min(peers, key=lambda row: row.timing.median, default=None)


def _times(base: Row | None, row: Row) -> float | None:
    return None if base is None else base.timing.median / row.timing.median


def table_lines(rows: Sequence[Row], gate: Gate) -> list[str]:
    """The table, as text."""
    table: list[tuple[str, ...]] = [HEADER]
    for row in rows:
        ratios = [_times(base(rows), row) for base in (published, best_peer)]
        table.append(
            (
                row.name,
                figures(row.timing.median),
                f"{row.timing.spread:.0%}",
                f"{row.clips_per_second:.4g}",
                *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                mib(row.peak_bytes),
                mib(row.step_bytes),
                f"{row.error.loss:.1e}",
                f"{row.error.gradient:.1e}",
            )
        )
    return aligned(table) + [f"  left out: {name}: {why}" for name, why in gate.crashed.items()]


def red_lines(gate: Gate) -> list[str]:
    """What a red gate has to say."""
    allowed = gate.allowed
    return ["loss or gradients differ from the published step in fp32; nothing was timed"] + [
        f"  {name}: relative error of the loss {gate.errors[name].loss:.2e}, allowed {allowed.loss:.2e}; "
        f"of the gradients {gate.errors[name].gradient:.2e}, allowed {allowed.gradient:.2e}"
        for name in gate.red
    ]


def as_json(rows: Sequence[Row], gate: Gate) -> dict[str, Any]:
    peer = best_peer(rows)
    return {
        "best_peer": None if peer is None else peer.name,
        "memory": MEMORY_NOTE,
        "allowed_error": asdict(gate.allowed),
        "left_out": dict(gate.crashed),
        "rows": [
            {
                "name": row.name,
                "timing": row.timing,
                "clips": row.clips,
                "clips_per_second": row.clips_per_second,
                "speedup_published": _times(published(rows), row),
                "speedup_best_peer": _times(peer, row),
                "peak_bytes": row.peak_bytes,
                "weights_bytes": row.weights_bytes,
                "optimiser_bytes": row.optimiser_bytes,
                "step_bytes": row.step_bytes,
                "loss": row.outcome.loss,
                "gradient_norm": row.outcome.norm,
                "error": asdict(row.error),
            }
            for row in rows
        ],
    }


def save_plot(path: str | Path, rows: Sequence[Row], title: str) -> None:
    """Bars of time and of memory. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 1.5 + 0.42 * len(rows)), layout="constrained")
    panels: Mapping[str, list[float]] = {
        "milliseconds a step": [row.timing.median for row in rows],
        "peak memory, MiB": [row.peak_bytes / 2**20 for row in rows],
    }
    colours = ["#d55e00" if row.name.startswith(OURS) else "#7f7f7f" for row in rows]
    spread = [[row.timing.median - row.timing.q1 for row in rows], [row.timing.q3 - row.timing.median for row in rows]]
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (label, values) in zip(axes, panels.items(), strict=True):
        error = spread if axis is axes[0] else None
        bars = axis.barh([row.name for row in rows], values, xerr=error, color=colours, height=0.6)
        axis.bar_label(bars, [figures(value) for value in values], padding=4, fontsize=8)
        axis.set_xlabel(label)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=160)
