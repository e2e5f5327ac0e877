"""The figure of the ensemble benchmark: milliseconds a clip against views, one panel for each masking ratio."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import Ladder
from variants import OURS

# Colours that stay apart for colour-blind readers; ours is the strongest.
COLOURS = {"published": "#7f7f7f", "best peer": "#0072b2", OURS: "#d55e00", "bare matrix products": "#009e73"}
MARKERS = {"published": "s", "best peer": "D", OURS: "o"}


def save(path: str | Path, ladders: Sequence[Ladder], subtitle: str) -> None:
    """Write a PNG (or what the suffix asks for). Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    full = next((ladder for ladder in ladders if ladder.case.full), None)
    kept = sorted({ladder.case.kept for ladder in ladders if not ladder.case.full}, reverse=True)
    panels = [[ladder for ladder in ladders if ladder.case.kept == k] for k in kept] or [list(ladders)]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.6 + 3.6 * len(panels), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        _panel(axis, sorted(panel, key=lambda ladder: ladder.case.views), full)
    axes[0][0].set_ylabel("milliseconds a clip")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=9)
    figure.suptitle(f"Ensemble masked inference\n{subtitle}", fontsize=10)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _panel(axis: Any, panel: Sequence[Ladder], full: Ladder | None) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    views = [ladder.case.views for ladder in panel]
    series = {
        "published": [(ladder.published.timing, ladder.published.clips) for ladder in panel],
        "best peer": [(ladder.best_peer.timing, ladder.best_peer.clips) for ladder in panel],
        OURS: [(ladder.row(OURS).timing, ladder.row(OURS).clips) for ladder in panel],
    }
    for name, points in series.items():
        middle = [timing.median / clips for timing, clips in points]
        below = [(timing.median - timing.q1) / clips for timing, clips in points]
        above = [(timing.q3 - timing.median) / clips for timing, clips in points]
        axis.errorbar(
            views, middle, yerr=(below, above), color=COLOURS[name], marker=MARKERS[name], capsize=3, label=name
        )
    floor = [ladder.floor_ms / ladder.rows[0].clips for ladder in panel]
    name = "bare matrix products"
    axis.plot(views, floor, color=COLOURS[name], linestyle=":", marker="_", markersize=14, label=name)
    if full is not None and not panel[0].case.full:
        whole = full.row(OURS)
        axis.axhline(
            whole.timing.median / whole.clips,
            color=COLOURS[OURS],
            linestyle="--",
            linewidth=1,
            label="mmfast, all tokens",
        )
    case = panel[0].case
    axis.set_title(f"ratio {case.ratio:.3g}: {case.tokens} tokens a view", fontsize=9)
    axis.set_xlabel("views a clip")
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(views) / 1.5, max(views) * 1.5)
    axis.set_xticks(views, labels=[str(count) for count in views])
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, which="both", axis="y", alpha=0.25)
