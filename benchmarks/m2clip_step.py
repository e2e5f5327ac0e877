"""One training step of M2CLIP, forward to optimiser: mmfast against the published step and strong plain torch, checked first.

    python benchmarks/m2clip_step.py                               # ViT-B/16, 8 frames, 400 classes
    python benchmarks/m2clip_step.py --batch 2 --json out.json --plot out.png

Four losses and AdamW on what trains. Before anything is timed, every loss and the gradients of all that trains are held
against the published step in float64. The two towers are also timed alone, forward and backward. Texts are drawn: as many
tokens as names of classes have, three words before them.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import harness
import torch
import train_report
from harness import Timing
from m2clip_ways import PEERS, Work, checked, prepare
from options import at_least, device_of
from report import aligned, machine_lines
from train_variants import OURS, Gate, Setup

import mmfast

SECONDS = {"cpu": 60.0, "cuda": 15.0}  # for timing, unless --rounds says otherwise
TOWERS = ("text tower", "vision tower")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="m2clip_step.py",
        description="One training step of M2CLIP: mmfast against the published step and strong plain torch, checked. "
        "Exit codes: 0 done; 2 wrong options; 3 results differ, nothing timed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="clip_vit_b16", help="a CLIP of any size that mmfast knows")
    add("--preset", default="k400", help="where adapters stand: k400, ssv2 or paper")
    add("--classes", type=at_least(1), default=400)
    add("--name-words", type=float, default=2.0, help="tokens of a class's name on average; K400's 2.0, SSv2's 6.6")
    add("--batch", type=at_least(1), help="clips; default 2, CUDA 32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--autocast", choices=["none", "bf16"], help="default: bf16 on CUDA, none on CPU")
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="which to compare with")
    add("--no-recompute", action="store_true", help="leave out mmfast with gradient checkpointing")
    add("--rounds", type=at_least(2), help="samples of each variant; default: as many as a minute allows, 2 to 25")
    add("--seed", type=at_least(0), default=0, help="of weights, clips and texts")
    add("--threads", type=at_least(1), help="CPU threads; default: torch's")
    add("--json", metavar="FILE", help="write everything")
    add("--plot", metavar="FILE", help="draw time and memory (needs matplotlib)")
    options = parser.parse_args(arguments)
    options.device = device_of(parser, options.device)
    cuda = options.device.type == "cuda"
    if not 1 <= options.name_words < 40:
        parser.error(f"--name-words must be from 1 to 40, got {options.name_words:g}")
    options.autocast = torch.bfloat16 if (options.autocast or ("bf16" if cuda else "none")) == "bf16" else None
    options.batch = options.batch or (32 if cuda else 2)
    for target in (options.json, options.plot):
        if target and not Path(target).resolve().parent.is_dir():
            parser.error(f"{Path(target).resolve().parent} is no folder to write {target} into")
    return options


def tower_table(work: Work, gate: Gate, rounds: int | None, device: torch.device) -> dict[str, dict[str, Timing]]:
    """tower -> way -> time of forward and backward of that tower alone."""
    good = [way for way in work.ways if way.variant.name in gate.errors and way.towers]
    return {
        tower: harness.measure(
            {way.variant.name: way.towers[tower] for way in good},
            device,
            rounds=rounds,
            budget=SECONDS[device.type] / 2,
            warmup=3 if device.type == "cuda" else 0,
            what=tower,
        )
        for tower in TOWERS
    }


def tower_lines(towers: Mapping[str, Mapping[str, Timing]]) -> list[str]:
    table: list[tuple[str, ...]] = [("alone, forward and backward", "ms", "+-", "x publ.")]
    for tower, timings in towers.items():
        for name, timing in timings.items():
            times = timings["published"].median / timing.median if "published" in timings else float("nan")
            table.append(
                (f"{tower}, {name}", train_report.figures(timing.median), f"{timing.spread:.0%}", f"{times:.2f}")
            )
    return aligned(table)


def goals(rows: Sequence[train_report.Row], towers: Mapping[str, Mapping[str, Timing]]) -> dict[str, float]:
    """mmfast against the published step: the text tower's cost, the step's speed, the peak memory."""
    own, base = (next((row for row in rows if row.name == name), None) for name in (OURS, "published"))
    if own is None or base is None:
        return {}
    texts = towers["text tower"]
    return {
        "text_tower_share": texts[OURS].median / texts["published"].median,
        "step_speedup": base.timing.median / own.timing.median,
        "peak_memory_share": own.peak_bytes / base.peak_bytes,
    }


def run(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    setup = Setup(options.device, options.autocast)
    facts = harness.machine(options.device)
    try:
        work = prepare(options, setup)
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = checked(work, setup)
    if wrong := [line for one in found for line in one.wrong]:
        print(
            "losses or gradients differ from the published step; nothing was timed", *wrong, sep="\n", file=sys.stderr
        )
        return 3
    gate = found[-1].gate
    work = replace(work, published=work.ways[0], exact=work.ways[0])  # their weights would only fill memory
    limits = harness.ceilings(options.device, options.autocast or torch.float32)
    precision = "fp32" if options.autocast is None else "bfloat16 autocast"
    title = f"M2CLIP step of {options.model}, {options.preset}, {precision}; {work.title}"
    print(*machine_lines(facts, limits), f"{title}; seed {options.seed}", sep="\n", flush=True)
    variants = [way.variant for way in work.ways]
    rows = train_report.rows_of(variants, gate, work.clips, options.rounds, SECONDS[options.device.type])
    print(*train_report.table_lines(rows, gate), train_report.MEMORY_NOTE, sep="\n", flush=True)
    towers = tower_table(work, gate, options.rounds, options.device)
    reached = goals(rows, towers)
    print(*tower_lines(towers), *(f"{name}: {value:.3f}" for name, value in reached.items()), sep="\n")
    if options.json:
        saved = {"mmfast": mmfast.__version__, "options": vars(options), "machine": facts, "ceilings": limits}
        saved |= {"title": title, "loss_errors": found[-1].losses, "towers": towers, "against_published": reached}
        harness.write_json(options.json, saved | train_report.as_json(rows, gate))
        print(f"written: {options.json}")
    if options.plot:
        where = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
        try:
            train_report.save_plot(options.plot, rows, f"{title}\n{where}")
        except ImportError:
            print("no figure: matplotlib is not installed", file=sys.stderr)
        else:
            print(f"written: {options.plot}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
