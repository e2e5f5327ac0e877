"""The table and the figure of the synthetic M2-CLIP benchmark."""

from pathlib import Path
from typing import Any

SETS = {"new pairs": "known motions, new shapes", "new motions": "new motions"}
CHANCE = {"label": 1 / 12, "of 48": 1 / 48, "new pairs": 1 / 12, "new motions": 1 / 4}


def markdown(report: dict[str, Any]) -> str:
    """What was measured, as Markdown tables."""
    options, machine, classes = report["options"], report["machine"], len(report["classes"]["seen"])
    lines = [
        f"Accuracy in %. {classes} classes that were trained on; chance is {100 / classes:.1f}.",
        "",
        "| | class head | texts | both |",
        "| --- | --- | --- | --- |",
    ]
    for name, probe in report["probes"].items():
        lines.append(f"| linear probe of the frozen CLIP, {name} | {_percent(probe['accuracy'])} | | |")
    for run in report["runs"]:
        for what, key in ((run["name"], "supervised"), (f"{run['name']}, frames shuffled", "shuffled")):
            lines.append(f"| {what} | " + " | ".join(_percent(score) for score in run[key].values()) + " |")
    lines += [
        "",
        "Zero-shot, 12 classes that were not trained on: of the label; of its motion where the shape is told; of the label "
        "among all 48.",
        "",
        "| | " + " | ".join(f"{title}: label | motion | of 48" for title in SETS.values()) + " |",
        "| ---" + " | ---" * 6 + " |",
        "| chance | " + " | ".join(f"8.3 | {_percent(CHANCE[name])} | 2.1" for name in SETS) + " |",
        f"| frozen CLIP | {_zero_shot(report['frozen_zero_shot'])} |",
    ]
    for run in report["runs"]:
        for switch, scores in run["zero_shot"].items():
            adapters = "" if switch == "on" else f", adapters {switch}"
            lines.append(f"| {run['name']}{adapters} | {_zero_shot(scores)} |")
    lines += [
        "",
        "| masked words, cross entropy | first 25 steps | last 25 steps | test clips |",
        "| --- | --- | --- | --- |",
    ]
    for run in report["runs"]:
        first, last = run["curve"][0]["cmlm"], run["curve"][-1]["cmlm"]
        lines.append(f"| {run['name']} | {first:.2f} | {last:.2f} | {run['cmlm_test']:.2f} |")
    stills = report["stills"]
    lines += [
        "",
        f"The CLIP finds the caption of {100 * stills['accuracy']:.1f} % of new stills among {stills['captions']}. "
        f"Seed {options['seed']}; {options['train_clips']} training and {options['test_clips']} test clips a class; "
        f"{options['still_steps']} steps of {options['still_batch']} stills, {options['steps']} of {options['batch']} clips. "
        f"{report['minutes']:.1f} minutes in {options['jobs']} processes of one thread on {machine['cpu']} (load "
        f"{machine['load_average']:g} at the end), torch {machine['torch']}.",
    ]
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _zero_shot(scores: dict[str, dict[str, float]]) -> str:
    return " | ".join(_percent(scores[name][kind]) for name in SETS for kind in ("label", "motion", "of 48"))


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of supervised and of zero-shot accuracy, and the loss of masked words."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(15, 4.6), layout="constrained", gridspec_kw={"width_ratios": (3, 3, 2)}
    )
    bars = [(f"linear probe,\n{name}", probe["accuracy"]) for name, probe in report["probes"].items()]
    for run in report["runs"]:
        name = run["name"].replace(" without", "\nwithout")
        bars += [(name, run["supervised"]["class head"]), (f"{name},\nframes shuffled", run["shuffled"]["class head"])]
    colours = ["#7f7f7f"] * len(report["probes"]) + ["#d55e00", "#e69f00"] * len(report["runs"])
    drawn = left.barh([name for name, _ in bars], [100 * score for _, score in bars], color=colours)
    left.bar_label(drawn, [_percent(score) for _, score in bars], padding=3, fontsize=8)
    left.axvline(100 / len(report["classes"]["seen"]), color="black", linewidth=0.8, linestyle=":")
    left.invert_yaxis()
    left.margins(x=0.1)
    left.set_xlabel("accuracy of 24 trained classes, % (dotted: chance)")
    systems = [
        ("frozen CLIP", report["frozen_zero_shot"]),
        *((r["name"], r["zero_shot"]["on"]) for r in report["runs"]),
    ]
    for number, ((name, scores), colour) in enumerate(zip(systems, ("#7f7f7f", "#d55e00", "#0072b2"), strict=False)):
        values = [100 * scores[which][kind] for which in SETS for kind in ("label", "motion")]
        places = [i + 0.27 * (number - 1) for i in range(4)]
        drawn = middle.bar(places, values, 0.25, color=colour, label=name)
        middle.bar_label(drawn, [f"{value:.0f}" for value in values], fontsize=8)
    for i, chance in enumerate(CHANCE[key] for which in SETS for key in ("label", which)):
        middle.plot([i - 0.45, i + 0.45], [100 * chance] * 2, color="black", linewidth=0.8, linestyle=":")
    ticks = [
        f"{title},\n{kind}".replace(", new", ",\nnew") for title in SETS.values() for kind in ("label of 12", "motion")
    ]
    middle.set_xticks(range(4), ticks, fontsize=8)
    middle.set_ylabel("zero-shot accuracy, % (dotted: chance)")
    middle.margins(y=0.2)
    middle.legend(frameon=False, fontsize=8)
    for run, colour in zip(report["runs"], ("#d55e00", "#0072b2"), strict=False):
        right.plot([point["step"] for point in run["curve"]], [point["cmlm"] for point in run["curve"]], color=colour)
    right.set_xlabel("step")
    right.set_ylabel("loss of masked words")
    right.legend([run["name"] for run in report["runs"]], frameon=False, fontsize=8)
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=110, format=path.suffix[1:] or "png")
    aside.replace(path)
    plt.close(figure)
