"""The synthetic benchmark's table and figure."""

from pathlib import Path
from typing import Any

CHANCE = 20.0
SHOTS = (("1", "#8c8c8c"), ("5", "#d55e00"))


def markdown(report: dict[str, Any]) -> str:
    """The ablation and the sweep as Markdown tables, mean +- standard error."""
    options, machine = report["options"], report["machine"]
    lines = [
        f"5-way accuracy in % on {options['episodes']} episodes, ± standard error; chance is {CHANCE:g}. "
        "Two views of ratio 0.75 a query, one a support.",
        "",
        "| trained | sees | 1-shot | 5-shot |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {r['name']} | {r['modality']} | {_cell(r['1'])} | {_cell(r['5'])} |" for r in report["ablation"]]
    lines += [
        "",
        "Distilled from flow and pose, over mask ratio and number of views:",
        "",
        "| mask ratio | views | 1-shot | 5-shot |",
        "| --- | --- | --- | --- |",
    ]
    for row in report["sweep"]:
        views = row["views"]
        if views == "adaptive":
            views = f"adaptive, {row['1']['mean_views']:.2f} and {row['5']['mean_views']:.2f} on average"
        lines.append(f"| {row['mask_ratio']:g} | {views} | {_cell(row['1'])} | {_cell(row['5'])} |")
    lines += [
        "",
        "The same student, where the frames of every clip are shuffled, or all the same one:",
        "",
        "| frames | 1-shot | 5-shot |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {row['frames']} | {_cell(row['1'])} | {_cell(row['5'])} |" for row in report["order"]]
    clips = ", ".join(f"{count} {name}" for name, count in report["clips"].items())
    steps = f"{options['steps']} on rgb, {options['teacher_steps']} on flow and pose, {options['distill_steps']} of distillation"
    lines += [
        "",
        f"Seed {options['seed']}; clips: {clips}; steps: {steps}. {report['minutes']:.1f} minutes in {options['jobs']} processes "
        f"of one thread on {machine['cpu']} (load {machine['load_average']:g} at the end), torch {machine['torch']}.",
    ]
    return "\n".join(lines)


def _cell(score: dict[str, float]) -> str:
    return f"{100 * score['mean']:.2f} ± {100 * score['standard_error']:.2f}"


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of the ablation, and accuracy over views for every mask ratio; error bars are 95 %."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, sweep = report["ablation"], report["sweep"]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 5), layout="constrained", gridspec_kw={"width_ratios": (3, 2)}
    )
    for offset, (shots, colour) in zip((-0.2, 0.2), SHOTS, strict=True):
        means = [100 * row[shots]["mean"] for row in rows]
        errors = [196 * row[shots]["standard_error"] for row in rows]
        places = [i + offset for i in range(len(rows))]
        left.barh(places, means, 0.38, xerr=errors, color=colour, label=f"{shots}-shot")
        for place, mean, error in zip(places, means, errors, strict=True):
            left.text(mean + error + 0.6, place, f"{mean:.1f}", va="center", fontsize=8)
    left.set_yticks(range(len(rows)), [row["name"] for row in rows])
    left.invert_yaxis()
    left.margins(x=0.1)
    left.axvline(CHANCE, color="black", linewidth=0.8, linestyle=":")
    left.set_xlabel("5-way accuracy, % (dotted: chance; error bars: 95 %)")
    left.legend(frameon=False, loc="upper right")
    fixed = [row for row in sweep if row["views"] != "adaptive"]
    for ratio in sorted({row["mask_ratio"] for row in fixed}):
        line = [row for row in fixed if row["mask_ratio"] == ratio]
        means = [100 * row["5"]["mean"] for row in line]
        errors = [196 * row["5"]["standard_error"] for row in line]
        right.errorbar(
            [row["views"] for row in line], means, errors, marker="o", capsize=3, label=f"mask ratio {ratio:g}"
        )
    for row in sweep:
        if row["views"] == "adaptive":
            right.plot(row["5"]["mean_views"], 100 * row["5"]["mean"], "k*", markersize=11, label="0.75, adaptive")
    right.set_xticks(sorted({row["views"] for row in fixed}))
    right.set_xlabel("views of a query")
    right.set_ylabel("5-way 5-shot accuracy, %")
    right.set_title("distilled from flow and pose", fontsize=10)
    right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=110, format=path.suffix[1:] or "png")
    aside.replace(path)
    plt.close(figure)
