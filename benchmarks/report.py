"""What the ensemble benchmark prints: the ladder of one case, and the classes of every file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness import Timing
from variants import OURS, Case, Gate


@dataclass(frozen=True)
class Row:
    """One rung of one case."""

    name: str
    timing: Timing
    clips: int
    gflop_published: float
    gflop_true: float
    roofline: float
    peak_bytes: int | None
    resident_bytes: int | None

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.timing.median * 1e3


@dataclass(frozen=True)
class Ladder:
    """All rungs of one case. floor_ms: the bare matrix products in the same run."""

    case: Case
    rows: Sequence[Row]
    floor_ms: float
    gate: Gate

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    @property
    def published(self) -> Row:
        """The slowest published path that is as released: fp32 where it was run, else the only one."""
        return self.rows[0]

    @property
    def best_peer(self) -> Row:
        return min((row for row in self.rows if not row.name.startswith(OURS)), key=lambda row: row.timing.median)

    def as_json(self) -> dict[str, Any]:
        return {
            "case": asdict(self.case) | {"ratio": self.case.ratio, "tokens": self.case.tokens},
            "floor_ms": self.floor_ms,
            "best_peer": self.best_peer.name,
            "rows": [
                asdict(row)
                | {
                    "clips_per_second": row.clips_per_second,
                    "speedup_published": self.published.timing.median / row.timing.median,
                    "speedup_best_peer": self.best_peer.timing.median / row.timing.median,
                    "error": self.gate.errors[row.name],
                }
                for row in self.rows
            ],
            "allowed_error": self.gate.allowed,
            "left_out": dict(self.gate.crashed),
        }


def mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.0f}"


HEADER = (
    "",
    "ms",
    "+-",
    "clips/s",
    "GFLOP pub.",
    "GFLOP true",
    "roofline",
    "peak MiB",
    "x publ.",
    "x best peer",
    "error",
)


def ladder_lines(ladder: Ladder) -> list[str]:
    """The table of one case, as text."""
    table = [HEADER]
    for row in ladder.rows:
        ms = row.timing.median
        table.append(
            (
                row.name,
                f"{ms:.4g}",
                f"{row.timing.spread:.0%}",
                f"{row.clips_per_second:.4g}",
                f"{row.gflop_published:.2f}",
                f"{row.gflop_true:.2f}",
                f"{row.roofline:.0%}",
                mib(row.peak_bytes),
                f"{ladder.published.timing.median / ms:.2f}",
                f"{ladder.best_peer.timing.median / ms:.2f}",
                f"{ladder.gate.errors[row.name]:.1e}",
            )
        )
    lines = [f"{ladder.case.title}; bare matrix products {ladder.floor_ms:.4g} ms", *aligned(table)]
    lines += [f"  left out: {name}: {why}" for name, why in ladder.gate.crashed.items()]
    return lines


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]


def gate_lines(case: Case, gate: Gate) -> list[str]:
    """What a red gate has to say."""
    return [f"{case.title}: probabilities differ from the published path in fp32; nothing was timed"] + [
        f"  {name}: relative error {gate.errors[name]:.2e}, allowed {gate.allowed:.2e}" for name in gate.red
    ]


def prediction_lines(names: Sequence[str], probs: Any, top: int = 3) -> list[str]:
    """Classes with the highest probability of every file.   probs: [B, K]."""
    best, ids = probs.topk(min(top, probs.shape[1]), dim=1)
    table = [("file", "class", *[f"top {i + 1}" for i in range(best.shape[1])])]
    for name, values, classes in zip(names, best.tolist(), ids.tolist(), strict=True):
        ranked = [f"{c}: {p:.4f}" for c, p in zip(classes, values, strict=True)]
        table.append((name, str(classes[0]), *ranked))
    return aligned(table)


def machine_lines(facts: Mapping[str, Any], limits: Mapping[str, float]) -> list[str]:
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    versions = f"torch {facts['torch']}, triton {facts['triton'] or 'absent'}, Python {facts['python']}"
    busy = facts["load_average"] > facts["threads"] + 0.5
    return [
        f"{where}; {versions}; commit {facts['commit'][:12]}; {facts['date']}; load {facts['load_average']}",
        f"measured now: copy {limits['copy_gb_s']:.4g} GB/s, "
        f"matrix product {limits['gemm_tflop_s']:.3g} TFLOP/s ({limits['gemm_size']:.0f}^3)",
    ] + (["other work loads this machine: trust no difference below the spread (+-)"] if busy else [])
