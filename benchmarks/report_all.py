"""A page, figures and the README's table from the results of the benchmarks.

    python benchmarks/report_all.py benchmarks/results/*.json --out FOLDER       # report.md and its figures
    python benchmarks/report_all.py benchmarks/results/*.json --readme README.md # the table between its markers, too

Every number is read from a file that is named beside it. A machine that has no result has no number: "not measured yet".
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import report_figures
from report_inputs import (
    CPU,
    GPU,
    IN_BF16,
    KEPT,
    KINDS,
    Best,
    Line,
    Measured,
    Results,
    Source,
    grid_lines,
    lines,
    read,
    size_name,
    step_lines,
)
from roofline_page import number, table

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
NOT_YET = "not measured yet"
COLUMNS = ("published", "strongest peer", "**mmfast**", "x published", "x peer")
# Of the README's table: model, cells kept, views.
SHOWN = (
    *(("videomae_small_patch16_224", kept, views) for kept, views in ((196, 1), (98, 2), (49, 2), (20, 2))),
    ("videomae_base_patch16_224", 49, 2),
    ("videomae_large_patch16_224", 49, 2),
)
RATIOS = {kept: ratio for ratio, kept in KEPT.items()}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="report_all.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="JSON", help="of run_all.py and of the other benchmarks")
    add("--out", type=Path, metavar="FOLDER", help="write report.md and the figures here")
    add("--readme", type=Path, metavar="FILE", help=f"replace what stands between {BEGIN} and {END}")
    add("--no-figures", action="store_true")
    options = parser.parse_args(arguments)
    if options.out is None and options.readme is None:
        parser.error("--out or --readme is needed")
    return options


# -- the README's table ------------------------------------------------------------------------------------------------


def cells(line: Line | None) -> list[str]:
    """A machine's columns of one row, empty where it has not measured this one."""
    if line is None:
        return [""] * len(COLUMNS)
    ratios = ("" if ratio is None else f"{ratio:.2f}" for ratio in (line.over_published, line.over_peer))
    return [
        "" if line.published is None else number(line.published.ms) + lower(line.published),
        "" if line.peer is None else number(line.peer.ms),
        f"**{number(line.ours.ms)}**",
        *ratios,
    ]


def lower(published: Best) -> str:
    """Said where the published path was run in lower precision alone."""
    return ", bf16" if published.name == IN_BF16 else ""


def case_name(model: str, kept: int, views: int) -> str:
    what = "all tokens" if kept == 196 else f"mask ratio {RATIOS.get(kept, 1 - kept / 196):.3g}"
    return f"{size_name(model)}, {what}, {views} view{'s' if views > 1 else ''}"


def readme_table(results: Results, command: str) -> list[str]:
    """The table and what it was made of, a line an entry. A machine without any result has one column that says so."""
    per_device = {device: lines(results, device) for device in (CPU, GPU)}
    steps = {device: step_lines(results, device) for device in (CPU, GPU)}
    found: dict[str, list[Line | None]] = {}
    for key in SHOWN:
        found[case_name(*key)] = [per_device[device].get(key) for device in (CPU, GPU)]
    used = [source for pair in found.values() for line in pair if line for source in line.sources]
    for kind, title in KINDS.items():
        pairs = [steps[device].get(kind) for device in (CPU, GPU)]
        found[title] = [pair[1] if pair else None for pair in pairs]
        used += [pair[0].source for pair in pairs if pair]
    there = [any(source.device == device for source in used) for device in (CPU, GPU)]
    head, rows = ["milliseconds a clip"], [[title] for title, pair in found.items() if any(pair)]
    for index, device in enumerate((CPU, GPU)):
        head += [f"{device}: {name}" for name in COLUMNS] if there[index] else [device]
        for row in rows:
            row += cells(found[row[0]][index]) if there[index] else [NOT_YET]
    return [
        *table(head, rows),
        f"{CPU}: {machines(used, CPU)}. {GPU}: {machines(used, GPU)}.",
        "Medians of interleaved rounds, each way at its own best batch; published: as released, in fp32 unless it says bf16.",
        f"Made by `{command}`.",
    ]


def machines(used: Sequence[Source], device: str) -> str:
    """Machines, versions and commits behind a device's columns, with the files they are in."""
    own = list(dict.fromkeys(source for source in used if source.device == device))
    if not own:
        return NOT_YET
    by_machine: dict[tuple[str, str], list[Source]] = {}
    for source in own:
        by_machine.setdefault((source.machine, source.torch), []).append(source)
    parts = []
    for (machine, torch), sources in by_machine.items():
        commits: dict[str, dict[str, None]] = {}  # a file may hold several parts of a run: each is named once
        for source in sources:
            commits.setdefault(source.commit, {})[f"`{source.file}`"] = None
        files = "; ".join(f"commit `{commit}` ({', '.join(files)})" for commit, files in commits.items())
        parts.append(f"{machine}, torch {torch}, {files}")
    return "; ".join(parts)


def put_into(path: Path, made: Sequence[str]) -> None:
    """Replace what stands between the markers.   ValueError where there is not one of each, in order."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} must have one line {BEGIN} and, below it, one line {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text("\n".join([f"{before}{BEGIN}", *made, f"{END}{after}"]))


# -- the page ----------------------------------------------------------------------------------------------------------


def page(results: Results, drawn: Mapping[str, str], command: str) -> list[str]:
    text = ["# Measurements", "", f"Made by `{command}`.", ""]
    text += table(["file", "machine", "torch", "commit", "date", "command"], map(source_row, results.sources))
    if not results.measured_gpu:
        text += [f"**GPU: {NOT_YET}.**", ""]
    text += ["## In short", "", *readme_table(results, command), ""]
    for name, caption in drawn.items():
        text += [f"![{caption}]({name}.png)", ""]
    text += ladder_tables(results) + grid_table(results) + latency_tables(results) + host_table(results)
    text += step_tables(results) + op_table(results)
    if results.notes:
        text += ["## Skipped, and wrong", "", *(f"- {note}" for note in results.notes), ""]
    return text


def source_row(source: Source) -> list[str]:
    command = f"`{source.command}`" if source.command else ""
    return [source.file, source.machine, source.torch, f"`{source.commit}`", source.date, command]


def title_of(case: Measured) -> str:
    views = f"{case.views} view{'s' if case.views > 1 else ''}"
    where = f"{case.source.machine}, `{case.source.commit}`"
    return f"{size_name(case.model)}, {case.tokens} tokens, {views}, {case.clips} clips; {where}"


def way_rows(case: Measured) -> list[list[str]]:
    """Every way of a case: milliseconds a batch, spread, clips a second, and against mmfast."""
    own = case.ms.get("mmfast")
    rows = []
    for name, timing in case.ms.items():
        ms, spread = timing["median"], (timing["q3"] - timing["q1"]) / 2 / timing["median"]
        ratio = f"{ms / own['median']:.2f}" if own else ""
        rows.append([name, number(ms), f"{spread:.0%}", number(case.clips / ms * 1e3), ratio])
    return rows


HEAD = ["way", "ms", "±", "clips/s", "x mmfast"]


def ladder_tables(results: Results) -> list[str]:
    text: list[str] = []
    for case in (case for case in results.cases if case.kind == "ladder"):
        rows = way_rows(case)
        for row in rows:
            peak = case.peaks.get(row[0])
            row.append("" if peak is None else f"{peak / 2**20:.0f}")
        text += [f"### {title_of(case)}", "", *table([*HEAD, "peak MiB"], rows)]
        if case.floor_ms is not None:
            text += [f"Bare matrix products: {number(case.floor_ms)} ms.", ""]
        taken = {name: s for name, s in (case.row.get("compile_seconds") or {}).items() if s is not None}
        if taken:
            text += ["First calls: " + ", ".join(f"{name} {s:.0f} s" for name, s in taken.items()) + ".", ""]
        text += kernel_lines(case.row.get("kernels") or {})
    return ["## Ladders", "", *text] if text else []


def kernel_lines(kernels: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The kernels that took longest, of each way."""
    text = []
    for name, found in kernels.items():
        if found:
            listed = ", ".join(f"{one['calls']} x `{one['name'][:60]}` {number(one['us'])} us" for one in found[:3])
            text.append(f"- {name}: {listed}")
    return [*text, ""] if text else []


def grid_table(results: Results) -> list[str]:
    rows = []
    for device in (CPU, GPU):
        for (model, kept, views), line in grid_lines(results, device).items():
            rows.append([case_name(model, kept, views), device, *bests(line), *cells(line)[3:]])
    head = ["case", "on", "published", "strongest peer", "mmfast", *COLUMNS[3:]]
    note = "Milliseconds a clip, each way at its own best batch (in brackets, with what it is)."
    return ["## Ratio and views", "", note, "", *table(head, rows)] if rows else []


def bests(line: Line) -> list[str]:
    return [best_text(one) for one in (line.published, line.peer, line.ours)]


def best_text(one: Best | None) -> str:
    return "" if one is None else f"{number(one.ms)} ({one.clips}, {one.name}, ±{one.spread:.0%})"


def latency_tables(results: Results) -> list[str]:
    text: list[str] = []
    for case in (case for case in results.cases if case.kind == "latency"):
        text += [f"### {title_of(case)}", "", *table(HEAD, way_rows(case))]
    return ["## Latency: wall time, probabilities back in host memory", "", *text] if text else []


def host_table(results: Results) -> list[str]:
    rows = []
    for source, row in results.host:
        case = row["case"]
        for name, timing in row["timings"].items():
            rate = row["clips"] / timing["median"] * 1e3
            what = f"{size_name(row['model'])}, {case['kept'] * case['slots']} tokens, {case['views']} views"
            rows.append([what, name, str(row["clips"]), number(timing["median"]), number(rate), source.file])
    head = ["case", "way", "clips", "ms", "clips/s", "file"]
    return ["## From pinned clips in host memory", "", *table(head, rows)] if rows else []


def step_tables(results: Results) -> list[str]:
    text: list[str] = []
    for step in results.steps:
        own = step.ms.get("mmfast")
        rows = []
        for name, timing in step.ms.items():
            peak = step.peaks.get(name)
            ratio = f"{timing['median'] / own['median']:.2f}" if own else ""
            rows.append([name, number(timing["median"]), ratio, "" if peak is None else f"{peak / 2**20:.0f}"])
        text += [f"### {KINDS[step.kind]}: {step.title}; {step.source.machine}, `{step.source.commit}`", ""]
        text += table(["way", "ms", "x mmfast", "peak MiB"], rows)
    return ["## Training steps and adapters", "", *text] if text else []


def op_table(results: Results) -> list[str]:
    rows = []
    for source, row in results.ops:
        limits = results.ceilings.get(source)
        ms, share = row["timing"]["median"], ""
        if limits:
            floor = max(row["flops"] / results.product_rate(source), row["bytes"] / limits["copy_gb_s"] * 1e3) / 1e9
            share = f"{floor / ms:.0%}"
        kernel = row.get("kernels") or [{"name": ""}]
        name = f"`{kernel[0]['name'][:48]}`" if kernel[0]["name"] else ""
        figures = [number(value) for value in (1e3 * ms, row["gb_s"], row["tflop_s"])]
        rows.append([f"{row['op']} {row['shape']}", row["provider"], *figures, share, f"{row['error']:.1e}", name])
    head = ["op", "provider", "us", "GB/s", "TFLOP/s", "of the roofline", "error", "kernel"]
    note = (
        "Of the roofline: operations at the rate of the run's fastest product or bytes at that of copying, what takes longer. "
        "That product is in the run's own precision: those in 8 bits may be faster."
    )
    return ["## Ops", "", note, "", *table(head, rows)] if rows else []


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    shown = [str(path) for path in options.results]
    if len({path.parent for path in options.results}) == 1 and len(shown) > 1:
        shown = [f"{options.results[0].parent}/*.json"]
    command = f"python benchmarks/report_all.py {' '.join(shown)}"
    try:
        results = read(options.results)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            drawn: Mapping[str, str] = {}
            if not options.no_figures:
                try:
                    drawn = report_figures.draw(results, options.out)
                except ImportError:
                    print("no figures: matplotlib is not installed", file=sys.stderr)
            (options.out / "report.md").write_text(
                "\n".join(page(results, drawn, f"{command} --out {options.out.name}"))
            )
            print(f"written: {options.out / 'report.md'}, figures: {', '.join(drawn) or 'none'}")
        if options.readme:
            put_into(options.readme, readme_table(results, f"{command} --readme {options.readme.name}"))
            print(f"written: {options.readme}")
    except (ValueError, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
