"""EVL's decoder and training step: mmfast against the published model, strong plain torch and end-to-end training, checked.

    python benchmarks/evl.py                                       # CLIP ViT-B/16, 8 frames, 400 classes
    python benchmarks/evl.py --batch 2 --threads 2 --json out.json --plot out.png

Cross entropy, backward and AdamW on what trains: decoder and head over a frozen backbone; the backbone too ("end to end", out
of place, as the released code cannot); decoder and head on features that are there already ("cached"). Before anything is
timed, the loss and the gradients of all that trains are held against the published model in float64. The decoder is timed
alone on given features, forward and backward. Peak memory at two batches gives the bytes of a clip, from which the batches at
equal memory are computed; one of them is measured. Clips are noise, without dropout, as the losses are compared.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evl_ways
import harness
import torch
import train_report
from evl_ways import PEERS, Batch, Memory, Way
from harness import Timing
from options import at_least, device_of
from report import aligned, machine_lines, mib
from train_report import Row
from train_variants import OURS, Gate, Setup

import mmfast

SECONDS = {"cpu": 120.0, "cuda": 20.0}  # for timing, unless --rounds says otherwise
MEMORY_NOTE = "peak MiB: weights, optimiser state, all that a step allocates (gradients too) and the clips"
CACHED, END_TO_END = f"{OURS}, cached", "published, end to end"


@dataclass(frozen=True)
class Alone:
    """The decoder and head on given features. peak_bytes: what a pass allocates, of that gradient_bytes of parameters'
    gradients, which every way has to hold."""

    timing: Timing
    peak_bytes: int
    gradient_bytes: int

    @property
    def beyond(self) -> int:
        """The peak without the gradients."""
        return self.peak_bytes - self.gradient_bytes


@dataclass(frozen=True)
class Equal:
    """clips: frozen, in `peak_bytes`. others: of each end-to-end way its peak, on `times` fewer clips."""

    clips: int
    times: int
    peak_bytes: int
    others: Mapping[str, int]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evl.py",
        description="EVL's decoder and training step: mmfast against the published model, plain torch and end-to-end "
        "training, checked. Exit codes: 0 done; 2 wrong options; 3 results differ, nothing timed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="clip_vit_b16", help="a CLIP of any size that mmfast knows")
    add("--frames", type=at_least(2), default=8)
    add("--layers", type=at_least(1), default=4, help="of the decoder")
    add("--classes", type=at_least(1), default=400)
    add("--batch", type=at_least(1), help="clips that are timed; default 2, CUDA 16")
    add("--check-clips", type=at_least(1), default=2, help="clips that are checked, at most the batch")
    add(
        "--memory-batches", type=at_least(1), nargs=2, metavar="N", help="clips of the two peaks; default 1 2, CUDA 4 8"
    )
    add("--budgets", type=at_least(1), nargs="*", default=[16, 80], metavar="GIB", help="to compute batches for")
    add("--times", type=at_least(1), default=8, help="so many times the clips of end-to-end are measured, frozen")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--autocast", choices=["none", "bf16"], help="default: bf16 on CUDA, none on CPU")
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="which to compare with")
    add("--no-recompute", action="store_true", help="leave out end-to-end mmfast with gradient checkpointing")
    add("--rounds", type=at_least(2), help="samples of each way; default: as many as two minutes allow, 2 to 25")
    add("--seed", type=at_least(0), default=0, help="of weights and clips")
    add("--threads", type=at_least(1), help="CPU threads; default: torch's")
    add("--quick", action="store_true", help="two rounds, nothing compiled, nothing measured at equal memory")
    add("--json", metavar="FILE", help="write everything")
    add("--plot", metavar="FILE", help="draw time and memory (needs matplotlib)")
    options = parser.parse_args(arguments)
    options.device = device_of(parser, options.device)
    cuda = options.device.type == "cuda"
    options.autocast = torch.bfloat16 if (options.autocast or ("bf16" if cuda else "none")) == "bf16" else None
    options.batch = options.batch or (16 if cuda else 2)
    options.memory_batches = sorted(options.memory_batches or ([4, 8] if cuda else [1, 2]))
    if options.memory_batches[0] == options.memory_batches[1]:
        parser.error(f"--memory-batches must be two different numbers, got {options.memory_batches[0]} twice")
    if options.quick:
        options.rounds, options.peers = 2, [name for name in options.peers if name != "compiled"]
    for target in (options.json, options.plot):
        if target and not Path(target).resolve().parent.is_dir():
            parser.error(f"{Path(target).resolve().parent} is no folder to write {target} into")
    return options


# -- measuring ---------------------------------------------------------------------------------------------------------


def decoder_alone(ways: Sequence[Way], batch: Batch, setup: Setup, rounds: int | None) -> dict[str, Alone]:
    variants = {way.name.removesuffix(", cached"): way.variant(batch, setup) for way in ways if way.kind == "cached"}
    peaks, gradients = {}, {}
    for name, variant in variants.items():
        variant.backward()
        gradients[name] = sum(p.grad.nbytes for p in variant.module.parameters() if p.grad is not None)
        variant.drop_gradients()
        peaks[name] = harness.peak_memory(variant.backward, setup.device)
        variant.drop_gradients()
    kind = setup.device.type
    calls = {name: variant.backward for name, variant in variants.items()}
    warmup = 3 if kind == "cuda" else 1
    taken = harness.measure(calls, setup.device, rounds=rounds, budget=SECONDS[kind] / 2, warmup=warmup, what="decoder")
    return {name: Alone(timing, peaks[name], gradients[name]) for name, timing in taken.items()}


def memories(ways: Sequence[Way], batch: Batch, batches: Sequence[int], setup: Setup) -> dict[str, Memory]:
    """Of what is not compiled, which would compile anew for each batch, nor cached."""
    good = [way for way in ways if way.kind != "cached" and not way.name.startswith("compiled")]
    return {
        way.name: evl_ways.memory_of(way, batch, batches, setup) for way in harness.progress(good, "batches", len(good))
    }


def equal_memory(
    ways: Sequence[Way], found: Mapping[str, Memory], batch: Batch, times: int, setup: Setup
) -> Equal | None:
    """Measure `times` the clips frozen, at which end-to-end ways were measured."""
    own = next((way for way in ways if way.name == OURS), None)
    trained = [way.name for way in ways if way.kind == "end to end" and way.name in found]
    if own is None or not trained:
        return None
    few = min(found[OURS].peaks)
    peak = evl_ways.peak_of_step(own, batch.first(times * few), setup)
    return Equal(times * few, times, peak, {name: found[name].peaks[few] for name in trained})


# -- telling -----------------------------------------------------------------------------------------------------------


def alone_lines(alone: Mapping[str, Alone]) -> list[str]:
    table: list[tuple[str, ...]] = [
        (
            "decoder alone, forward and backward",
            "ms",
            "+-",
            "x publ.",
            "peak MiB",
            "of publ.",
            "less gradients",
            "of publ.",
        )
    ]
    base = alone.get("published")
    for name, found in alone.items():
        ratios = ("-", "-", "-")
        if base is not None:
            ratios = (
                f"{base.timing.median / found.timing.median:.2f}",
                f"{found.peak_bytes / base.peak_bytes:.3f}",
                f"{found.beyond / base.beyond:.3f}",
            )
        ms, spread = train_report.figures(found.timing.median), f"{found.timing.spread:.0%}"
        table.append((name, ms, spread, ratios[0], mib(found.peak_bytes), ratios[1], mib(found.beyond), ratios[2]))
    return aligned(table)


def step_lines(rows: Sequence[Row], kinds: Mapping[str, str], gate: Gate) -> list[str]:
    header = ("training step", "ms", "+-", "clips/s", "x publ.", "x publ. e2e", "peak MiB", "loss err.", "grad err.")
    table: list[tuple[str, ...]] = [header]
    medians = {row.name: row.timing.median for row in rows}
    for kind in evl_ways.KINDS:
        for row in (row for row in rows if kinds[row.name] == kind):
            ms = row.timing.median
            ratios = [f"{medians[base] / ms:.2f}" if base in medians else "-" for base in ("published", END_TO_END)]
            shown = (train_report.figures(ms), f"{row.timing.spread:.0%}", f"{row.clips_per_second:.4g}", *ratios)
            errors = (f"{row.error.loss:.1e}", f"{row.error.gradient:.1e}")
            table.append((row.name, *shown, mib(row.peak_bytes), *errors))
    return aligned(table) + [f"  left out: {name}: {why}" for name, why in gate.crashed.items()]


def memory_lines(found: Mapping[str, Memory], budgets: Sequence[int]) -> list[str]:
    few, many = sorted(next(iter(found.values())).peaks)
    header = ["peak memory of a step", f"{few} clips", f"{many} clips", "MiB a clip", "fixed MiB"]
    table: list[Sequence[str]] = [[*header, *(f"clips in {gib} GiB" for gib in budgets)]]
    for name, memory in found.items():
        sizes = (memory.peaks[few], memory.peaks[many], round(memory.clip_bytes), round(memory.fixed_bytes))
        table.append([name, *map(mib, sizes), *(str(memory.most(gib * 2**30)) for gib in budgets)])
    return [*aligned(table), f"{MEMORY_NOTE}; clips in so many GiB are computed"]


def equal_lines(equal: Equal | None) -> list[str]:
    if equal is None:
        return []
    lines = [f"{OURS} on {equal.clips} clips, measured: {mib(equal.peak_bytes)} MiB"]
    for name, peak in equal.others.items():
        verdict = "fits into" if equal.peak_bytes <= peak else "does not fit into"
        lines.append(f"  {verdict} the {mib(peak)} MiB of {name} on {equal.clips // equal.times}")
    return lines


def goals(
    alone: Mapping[str, Alone],
    rows: Sequence[Row],
    kinds: Mapping[str, str],
    found: Mapping[str, Memory],
    budgets: Sequence[int],
) -> dict[str, float]:
    """mmfast's decoder and step against the published decoder, and against every end-to-end step."""
    reached: dict[str, float] = {}
    own = alone[OURS]
    if base := alone.get("published"):
        reached["decoder_speedup"] = base.timing.median / own.timing.median
        reached["decoder_peak_share"] = own.peak_bytes / base.peak_bytes
        reached["decoder_peak_share_less_gradients"] = own.beyond / base.beyond
    if peers := [a.timing.median for name, a in alone.items() if name != OURS]:
        reached["decoder_speedup_best_peer"] = min(peers) / own.timing.median
    medians = {row.name: row.timing.median for row in rows}
    for name in (name for name in medians if kinds[name] == "end to end"):
        reached[f"step_speedup over {name}"] = medians[name] / medians[OURS]
    if peers := [ms for name, ms in medians.items() if kinds[name] == "frozen" and name != OURS]:
        reached["step_speedup_best_frozen_peer"] = min(peers) / medians[OURS]
    reached["cached_step_speedup"] = medians[OURS] / medians[CACHED]
    for name, memory in found.items():
        if kinds[name] != "end to end":
            continue
        reached[f"bytes_a_clip over {name}"] = memory.clip_bytes / found[OURS].clip_bytes
        for gib in budgets:
            if most := memory.most(gib * 2**30):
                reached[f"batch in {gib} GiB over {name}"] = found[OURS].most(gib * 2**30) / most
    return reached


def as_json(rows: Sequence[Row], kinds: Mapping[str, str], found: Mapping[str, Memory]) -> dict[str, Any]:
    return {
        "memory": MEMORY_NOTE,
        "rows": [
            {
                "name": row.name,
                "kind": kinds[row.name],
                "timing": row.timing,
                "clips_per_second": row.clips_per_second,
                "peak_bytes": row.peak_bytes,
                "weights_bytes": row.weights_bytes,
                "optimiser_bytes": row.optimiser_bytes,
                "step_bytes": row.step_bytes,
                "error": vars(row.error),
            }
            for row in rows
        ],
        "batches": {
            name: {
                "peaks": {str(clips): peak for clips, peak in memory.peaks.items()},
                "clip_bytes": memory.clip_bytes,
                "fixed_bytes": memory.fixed_bytes,
            }
            for name, memory in found.items()
        },
    }


def run(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    setup = Setup(options.device, options.autocast)
    facts = harness.machine(options.device)
    try:
        ways, model = evl_ways.prepare(options, setup)
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    most = max(
        options.batch, options.memory_batches[1], 0 if options.quick else options.times * options.memory_batches[0]
    )
    clips = evl_ways.draw_batch(model.config, most, options.seed, options.device)
    batch = clips.first(options.batch)
    gate = evl_ways.check(ways, model, batch.first(options.check_clips), setup)
    del model  # its weights would only fill memory
    if gate.red:
        print("loss or gradients differ from the published model; nothing was timed", file=sys.stderr)
        print(*train_report.red_lines(gate)[1:], sep="\n", file=sys.stderr)
        return 3
    ways = [way for way in ways if way.name in gate.errors]
    kinds = {way.name: way.kind for way in ways}
    limits = harness.ceilings(options.device, options.autocast or torch.float32)
    precision = "fp32" if options.autocast is None else "bfloat16 autocast"
    title = (
        f"EVL on {options.model}, {options.layers} layers, {options.frames} frames, {options.classes} classes, "
        f"{options.batch} clips, {precision}"
    )
    print(*machine_lines(facts, limits), f"{title}; seed {options.seed}", sep="\n", flush=True)
    alone = decoder_alone(ways, batch, setup, options.rounds)
    print(*alone_lines(alone), sep="\n", flush=True)
    variants = [way.variant(batch, setup) for way in ways]
    rows = train_report.rows_of(variants, gate, options.batch, options.rounds, SECONDS[options.device.type])
    del variants
    print(*step_lines(rows, kinds, gate), train_report.MEMORY_NOTE, sep="\n", flush=True)
    found = memories(ways, clips, options.memory_batches, setup)
    equal = None if options.quick else equal_memory(ways, found, clips, options.times, setup)
    reached = goals(alone, rows, kinds, found, options.budgets)
    print(*memory_lines(found, options.budgets), *equal_lines(equal), sep="\n")
    print(*(f"{name}: {value:.3f}" for name, value in reached.items()), sep="\n")
    if options.json:
        saved: dict[str, Any] = {"mmfast": mmfast.__version__, "options": vars(options), "machine": facts}
        saved |= {"ceilings": limits, "title": title, "reached": reached}
        saved |= {"allowed_error": vars(gate.allowed), "left_out": dict(gate.crashed)}
        saved |= {"decoder_alone": {name: vars(each) for name, each in alone.items()}}
        saved |= {"equal_memory": None if equal is None else vars(equal)}
        harness.write_json(options.json, saved | as_json(rows, kinds, found))
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
