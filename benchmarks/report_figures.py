"""The figures of report_all.py: ladder, roofline, speed-up over ratio and views, latency over batch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from report_inputs import GPU, IN_BF16, Measured, Results, Source, grid_lines, is_ours, newest, size_name
from variants import OURS

# Colours that stay apart for colour-blind readers; ours is the strongest.
COLOURS = {OURS: "#d55e00", "peer": "#0072b2", "published": "#7f7f7f", "floor": "#009e73"}

MARKS = "osD^vP*X<>hpd8H"  # of ops, on the roofline
BOTH = "forward and backward"


def colour_of(name: str) -> str:
    if name.startswith(OURS):
        return COLOURS[OURS]
    return COLOURS["published" if name.startswith("published") else "peer"]


def figure_of(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def figures(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def where(source: Source) -> str:
    return f"{source.machine}, torch {source.torch}, commit {source.commit}"


def latest(found: Sequence[Measured]) -> list[Measured]:
    """Those of the machine and commit that measured last, a GPU before a CPU."""
    if not found:
        return []
    best = max((case.source for case in found), key=lambda source: (source.device == GPU, source.date))
    return [case for case in found if (case.source.machine, case.source.commit) == (best.machine, best.commit)]


def ladder(results: Results, path: Path) -> bool:
    """Milliseconds a clip of every way; a panel for each machine, the usual case of the smallest model that has one."""
    panels = []
    for device in ("CPU", "GPU"):
        found = [c for c in results.cases if c.kind == "ladder" and c.source.device == device and c.views == 2]
        usual = [c for c in found if c.kept == 49] or found
        if usual:
            date = newest(c.source for c in usual)
            panels.append(next(c for c in usual if c.source.date == date))
    if not panels:
        return False
    most = max(len(panel.ms) for panel in panels)
    figure = figure_of(7.2 * len(panels), 1.6 + 0.36 * most)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        rungs(axis, panel)
    figure.savefig(path, dpi=160)
    return True


def rungs(axis: Any, panel: Measured) -> None:
    names = list(panel.ms)
    times = [panel.ms[name]["median"] / panel.clips for name in names]
    low = [(panel.ms[name]["median"] - panel.ms[name]["q1"]) / panel.clips for name in names]
    high = [(panel.ms[name]["q3"] - panel.ms[name]["median"]) / panel.clips for name in names]
    bars = axis.barh(names, times, xerr=(low, high), color=[colour_of(name) for name in names], height=0.65)
    axis.bar_label(bars, [figures(t) for t in times], padding=4, fontsize=8)
    if panel.floor_ms is not None:
        label = f"bare matrix products {figures(panel.floor_ms / panel.clips)}"
        axis.axvline(panel.floor_ms / panel.clips, color=COLOURS["floor"], linestyle=":", label=label)
        axis.legend(loc="lower right", fontsize=8, frameon=False)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlim(left=0)
    axis.set_xlabel("milliseconds a clip")
    axis.spines[["top", "right"]].set_visible(False)
    title = f"{size_name(panel.model)}, ratio {panel.ratio:g}, {panel.views} views, {panel.clips} clips"
    axis.set_title(f"{title}\n{where(panel.source)}", fontsize=8)


def heat(results: Results, path: Path) -> bool:
    """How many times faster than the published path, and than the strongest peer, over ratio and views."""
    panels = []
    for device in ("GPU", "CPU"):
        found = grid_lines(results, device)
        for model in sorted({key[0] for key in found}, key=list(dict.fromkeys(key[0] for key in found)).index):
            cells = {key[1:]: line for key, line in found.items() if key[0] == model}
            if len({kept for kept, _ in cells}) > 1 and len({views for _, views in cells}) > 1:
                panels.append((model, cells))
        if panels:
            break  # one machine a figure
    if not panels:
        return False
    figure = figure_of(7.6, 0.9 + 2.7 * len(panels))
    axes = figure.subplots(len(panels), 2, squeeze=False)
    ratios = {case.kept: case.ratio for case in results.cases}
    for row, (model, cells) in zip(axes, panels, strict=True):
        for axis, what in zip(row, ("published", "strongest peer"), strict=True):
            values = {
                key: line.over_published if what == "published" else line.over_peer for key, line in cells.items()
            }
            grid(axis, {key: value for key, value in values.items() if value is not None}, ratios)
            first = next(iter(cells.values())).published
            in_bf16 = " in bf16" if what == "published" and first is not None and first.name == IN_BF16 else ""
            axis.set_title(f"{size_name(model)}: times faster than {what}{in_bf16}", fontsize=9)
    source = next(iter(panels[0][1].values())).sources[0]
    figure.suptitle(f"{where(source)}; each way at its own best batch", fontsize=8)
    figure.savefig(path, dpi=160)
    return True


def grid(axis: Any, values: Mapping[tuple[int, int], float], ratios: Mapping[int, float]) -> None:
    kept = sorted({key[0] for key in values}, reverse=True)
    views = sorted({key[1] for key in values})
    table = [[values.get((k, p), float("nan")) for p in views] for k in kept]
    # Equal speed is the middle: what is slower shows in another colour.
    axis.imshow(
        table, cmap="PuOr_r", vmin=1 - max(values.values(), default=2), vmax=1 + max(values.values(), default=2)
    )
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            if value == value:
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=9)
    axis.set_xticks(range(len(views)), [str(p) for p in views])
    axis.set_yticks(range(len(kept)), [f"{ratios[k]:g}" for k in kept])
    axis.set_xlabel("views")
    axis.set_ylabel("mask ratio")
    axis.spines[:].set_visible(False)


def latency(results: Results, path: Path) -> bool:
    """Milliseconds of a batch over its clips: mmfast, the strongest peer at each batch, the published path."""
    found = latest([c for c in results.cases if c.kind == "grid" and c.views == 2 and c.kept == 49])
    models = [m for m in dict.fromkeys(c.model for c in found) if len({c.clips for c in found if c.model == m}) > 1]
    if not models:
        return False
    figure = figure_of(1.2 + 3.6 * len(models), 3.8)
    for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        cases = sorted((c for c in found if c.model == model), key=lambda c: c.clips)
        series: dict[str, Callable[[str], bool]] = {
            "published": lambda name: name.startswith("published"),
            "strongest peer": lambda name: not name.startswith((OURS, "published")),
            OURS: is_ours,
        }
        for name, wanted in series.items():
            points = [(c.clips, min(t["median"] for n, t in c.ms.items() if wanted(n))) for c in cases]
            colour = COLOURS.get(name, COLOURS["peer"])
            axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
        batches = [c.clips for c in cases]
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(batches, [str(b) for b in batches])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("clips in the batch")
        axis.grid(True, which="major", alpha=0.25)
        axis.set_title(f"{size_name(model)}, ratio {cases[0].ratio:g}, 2 views", fontsize=9)
    first = figure.axes[0]
    first.set_ylabel("milliseconds a batch")
    first.legend(frameon=False, fontsize=8)
    figure.suptitle(where(found[0].source), fontsize=8)
    figure.savefig(path, dpi=160)
    return True


def roofline(results: Results, path: Path) -> bool:
    """Our ops and their best peers under the two ceilings that were measured in the same run."""
    sources = [s for s in results.ceilings if any(source is s for source, row in results.ops if row["flops"])]
    if not sources:
        return False
    source = max(sources, key=lambda s: (s.device == GPU, s.date))
    limits = results.ceilings[source]
    rows = [row for found, row in results.ops if found is source and row["flops"]]
    rows = [row for row in rows if row["dtype"] == rows[0]["dtype"]]
    top, copy = results.product_rate(source), limits["copy_gb_s"] / 1e3
    panels = {"forward": [row for row in rows if BOTH not in row["op"]]}
    panels[BOTH] = [row for row in rows if BOTH in row["op"]]
    panels = {title: found for title, found in panels.items() if found}
    figure = figure_of(8.4 * len(panels), 5.2)
    for axis, (title, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        roof(axis, found, top, copy)
        axis.set_title(f"{title}\nfull: mmfast, hollow: its best peer", fontsize=8)
    figure.suptitle(where(source), fontsize=8)
    figure.savefig(path, dpi=160)
    return True


def roof(axis: Any, rows: Sequence[Mapping[str, Any]], top: float, copy: float) -> None:
    """Ops under their ceilings.   top: TFLOP/s of products; those of 8 bits may lie above. copy: TB/s."""
    at = [row["flops"] / row["bytes"] for row in rows]
    ends = [min(at) / 2, top / copy, max(max(at), top / copy) * 3]
    axis.plot(ends, [min(top, x * copy) for x in ends], color="black", linewidth=1)
    axis.text(ends[2], top * 1.06, f"matrix products {figures(top)} TFLOP/s", ha="right", fontsize=8)
    middle = (ends[0] * ends[1]) ** 0.5
    axis.text(middle / 1.2, middle * copy, f"copying {figures(copy)} TB/s", ha="right", fontsize=8)
    for index, op in enumerate(dict.fromkeys(row["op"] for row in rows)):
        mine = [row for row in rows if row["op"] == op and row["provider"] == OURS]
        for row in mine:
            peers = [
                r for r in rows if (r["op"], r["shape"]) == (op, row["shape"]) and not r["provider"].startswith(OURS)
            ]
            x = row["flops"] / row["bytes"]
            mark = MARKS[index % len(MARKS)]
            label = op.removesuffix(f", {BOTH}") if row is mine[0] else None
            axis.plot(x, row["tflop_s"], mark, color=COLOURS[OURS], markersize=7, label=label, zorder=3)
            if peers:
                best = max(r["tflop_s"] for r in peers)
                axis.plot(x, best, mark, color=COLOURS["peer"], markersize=7, fillstyle="none", zorder=4)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations a byte")
    axis.set_ylabel("TFLOP/s")
    axis.grid(True, which="major", alpha=0.25)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)


FIGURES: dict[str, tuple[Callable[[Results, Path], bool], str]] = {
    "ladder": (ladder, "milliseconds a clip of every way"),
    "heat": (heat, "times faster than the published path and the strongest peer, over ratio and views"),
    "latency": (latency, "milliseconds of a batch over its clips"),
    "roofline": (roofline, "ops and their best peers under the measured ceilings"),
}


def draw(results: Results, folder: Path) -> dict[str, str]:
    """Every figure that there are measurements for: name -> caption.   Raises ImportError without matplotlib."""
    return {name: caption for name, (make, caption) in FIGURES.items() if make(results, folder / f"{name}.png")}
