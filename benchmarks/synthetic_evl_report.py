"""The tables and the figure of the synthetic EVL benchmark."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Which decoder is compared with which, in the order of the table of gains.
GAINS = {
    "convolution, over none": ("+ convolution", "no temporal module"),
    "positions, over the convolution": ("+ positions", "+ convolution"),
    "cross-attention, over both": ("+ cross-attention", "+ positions"),
    "all three, over none": ("+ cross-attention", "no temporal module"),
    "positions alone, over none": ("positions alone", "no temporal module"),
    "cross-attention alone, over none": ("cross-attention alone", "no temporal module"),
}


def markdown(report: dict[str, Any]) -> str:
    """What was measured, as Markdown tables."""
    options, machine, sizes = report["options"], report["machine"], report["classes"]
    seeds = [frozen["seed"] for frozen in report["frozen"]]
    lines = [
        f"Accuracy in %, mean ± standard error over seeds {_span(seeds)}, each with its own CLIP, clips and decoders. "
        "Shuffled: the decoder trained on frames in order, tested on frames out of order.",
        "",
        f"| | parameters | appearance, {sizes['appearance']} classes | motion, {sizes['motion']} classes | of it manner | "
        "direction | motion, shuffled |",
        "| ---" + " | ---" * 6 + " |",
        f"| chance | | {100 / sizes['appearance']:.1f} | {100 / sizes['motion']:.1f} | 25.0 | 25.0 | "
        f"{100 / sizes['motion']:.1f} |",
    ]
    for name in report["frozen"][0]["probes"]:
        scores = [spread(probed(report, name, kind)) for kind in ("appearance", "motion")]
        lines.append(f"| linear probe, {name} | | {' | '.join(map(_percent, scores))} | | | |")
    for name in dict.fromkeys(run["decoder"] for run in report["runs"]):
        wanted = [
            ("appearance", "class", "in order"),
            ("motion", "class", "in order"),
            ("motion", "manner", "in order"),
        ]
        wanted += [("motion", "direction", "in order"), ("motion", "class", "shuffled")]
        cells = [_percent(spread(scores_of(report, name, *which))) for which in wanted]
        count = next(r["parameters"] for r in report["runs"] if r["decoder"] == name and r["labels"] == "motion")
        lines.append(f"| EVL, {name} | {count:,} | {' | '.join(cells)} |")
    lines += [
        "",
        "What a module adds, in points, paired seed by seed:",
        "",
        "| | appearance | motion |",
        "| --- | --- | --- |",
    ]
    for title, (more, less) in GAINS.items():
        cells = [_percent(spread(gains(report, more, less, kind)), "+") for kind in ("appearance", "motion")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    stills = [100 * frozen["stills"]["accuracy"] for frozen in report["frozen"]]
    seconds = statistics.median(run["seconds"] for run in report["runs"])
    clips = report["frozen"][0]["clips"]
    lines += [
        "",
        f"The CLIPs find the caption of {_span([round(share, 1) for share in stills])} % of new stills among about "
        f"{report['frozen'][0]['stills']['captions']}. {clips['train']} training and "
        f"{clips['test']} test clips; {options['still_steps']} steps of {options['still_batch']} stills; decoders of "
        f"{options['layers']} layers, {options['steps']} steps of {options['batch']} clips from cached features, learning rate "
        f"{options['rate']:g}, dropout {options['dropout']:g}, {seconds:.0f} s each. {report['minutes']:.1f} minutes in "
        f"{options['jobs']} processes of one thread on {machine['cpu']} (load {machine['load_average']:g} at the end), torch "
        f"{machine['torch']}.",
    ]
    return "\n".join(lines)


def scores_of(
    report: dict[str, Any], name: str, kind: str, part: str = "class", order: str = "in order"
) -> list[float]:
    """A decoder's accuracy, of every seed in turn."""
    return [r["scores"][order][part] for r in report["runs"] if (r["decoder"], r["labels"]) == (name, kind)]


def probed(report: dict[str, Any], name: str, kind: str) -> list[float]:
    """A probe's accuracy, of every seed in turn."""
    return [frozen["probes"][name][kind]["accuracy"] for frozen in report["frozen"]]


def gains(report: dict[str, Any], more: str, less: str, kind: str) -> list[float]:
    """How much better one decoder is than another, of every seed in turn."""
    return [a - b for a, b in zip(scores_of(report, more, kind), scores_of(report, less, kind), strict=True)]


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error; None for the error of a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _percent(value: tuple[float, float | None], sign: str = "") -> str:
    mean, error = value
    return f"{100 * mean:{sign}.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of accuracy on both sets of labels, with a dot for every seed; and the training losses on motion."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained", gridspec_kw={"width_ratios": (3, 3, 2)})
    names = list(dict.fromkeys(run["decoder"] for run in report["runs"]))
    colours = dict(zip(names, ("#7f7f7f", "#56b4e9", "#0072b2", "#d55e00", "#009e73", "#e69f00"), strict=True))
    for axis, kind in zip(axes, ("appearance", "motion"), strict=False):
        bars = [
            (f"linear probe,\n{name}", probed(report, name, kind), "#c0c0c0") for name in report["frozen"][0]["probes"]
        ]
        bars += [(name, scores_of(report, name, kind), colours[name]) for name in names]
        spreads = [spread(values) for _, values, _ in bars]
        drawn = axis.barh(
            [name for name, _, _ in bars],
            [100 * mean for mean, _ in spreads],
            xerr=[100 * (error or 0) for _, error in spreads],
            color=[colour for _, _, colour in bars],
            error_kw={"elinewidth": 1, "capsize": 3},
        )
        axis.bar_label(drawn, [f"{100 * mean:.1f}" for mean, _ in spreads], padding=6, fontsize=8)
        for row, (_, values, _) in enumerate(bars):
            axis.plot([100 * v for v in values], [row] * len(values), "k.", markersize=4)
        classes = report["classes"][kind]
        axis.axvline(100 / classes, color="black", linewidth=0.8, linestyle=":")
        axis.invert_yaxis()
        axis.set_xlim(0, 112)
        axis.set_xlabel(f"{kind}: accuracy of {classes} classes, % (dotted: chance)")
    axes[1].set_yticklabels([])
    for name in names:
        curves = [r["curve"] for r in report["runs"] if (r["decoder"], r["labels"]) == (name, "motion")]
        losses = [statistics.fmean(point["loss"] for point in points) for points in zip(*curves, strict=True)]
        axes[2].plot([point["step"] for point in curves[0]], losses, color=colours[name], label=name)
    axes[2].set_xlabel("step")
    axes[2].set_ylabel("training loss on motion, mean of the seeds")
    axes[2].legend(frameon=False, fontsize=8)
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=110, format=path.suffix[1:] or "png")
    aside.replace(path)
    plt.close(figure)
