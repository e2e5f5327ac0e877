"""One training step, forward to optimiser: mmfast against the published step and strong plain torch, checked first.

    python benchmarks/train_step.py                                # masked pre-training of ViT-S, ratio 0.9
    python benchmarks/train_step.py --mode distill --batch 2 --json out.json --plot out.png

Pre-training: source and target clips, their reconstruction losses and 0.05 cross-entropy on the source, AdamW.
Distillation: an RGB student, frozen RGB, flow and pose teachers, one MLP a teacher, AdamW. Before anything is timed, the
loss and gradients of every variant are held against the published step in fp32.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import harness
import torch
import train_report
from options import at_least, device_of, ratio
from report import machine_lines
from train_variants import (
    LEAN,
    PEERS,
    Batch,
    Gate,
    Setup,
    Variant,
    check,
    distillation,
    draw_batch,
    pretraining,
    published_distillation,
    published_pretraining,
    spread,
)

import mmfast
from mmfast import MaskedViT

CLASSES = 204
MODELS = {"pretrain": "pretrain_videomae_small_patch16_224", "distill": "mmcdfsl_small"}
RATIOS = {"pretrain": 0.9, "distill": 0.75}
SECONDS = {"cpu": 60.0, "cuda": 15.0}  # for timing, unless --rounds says otherwise


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_step.py",
        description="One training step: mmfast against the published step and strong plain torch, checked. "
        "Exit codes: 0 done; 2 wrong options; 3 results differ, nothing timed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--mode", choices=list(MODELS), default="pretrain")
    add("--model", help=f"default: {MODELS['pretrain']}; for distill the start of three names, {MODELS['distill']}")
    add(
        "--batch", type=at_least(1), help="source clips, and as many target clips; distill: samples; default 4, CUDA 32"
    )
    add("--mask-ratio", type=ratio, help="share of tubes removed; default 0.9, distill 0.75")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--autocast", choices=["none", "bf16"], help="default: bf16 on CUDA, none on CPU")
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="which to compare with")
    add("--no-recompute", action="store_true", help="leave out mmfast with gradient checkpointing")
    add("--uint8", action="store_true", help="give every variant uint8 clips, not normalised float ones")
    add("--rounds", type=at_least(2), help="samples of each variant; default: as many as a minute allows, 2 to 25")
    add("--seed", type=at_least(0), default=0, help="of masks, weights and clips")
    add("--threads", type=at_least(1), help="CPU threads; default: torch's")
    add("--json", metavar="FILE", help="write everything")
    add("--plot", metavar="FILE", help="draw time and memory (needs matplotlib)")
    options = parser.parse_args(arguments)
    options.device = device_of(parser, options.device)
    cuda = options.device.type == "cuda"
    options.autocast = torch.bfloat16 if (options.autocast or ("bf16" if cuda else "none")) == "bf16" else None
    options.batch = options.batch or (32 if cuda else 4)
    options.model = options.model or MODELS[options.mode]
    options.mask_ratio = RATIOS[options.mode] if options.mask_ratio is None else options.mask_ratio
    for target in (options.json, options.plot):
        if target and not Path(target).resolve().parent.is_dir():
            parser.error(f"{Path(target).resolve().parent} is no folder to write {target} into")
    return options


@dataclass(frozen=True)
class Work:
    """A step to be timed. clips: what clips/s counts."""

    variants: list[Variant]
    published: list[Variant]
    clips: int
    title: str


def prepare(options: argparse.Namespace, setup: Setup) -> Work:
    """The variants of a mode. Raises ValueError or TypeError for a model that does not exist."""
    how = dict(uint8=options.uint8, seed=options.seed)
    ask = (options.peers, not options.no_recompute)
    if options.mode == "pretrain":
        from mmfast.mae import MaskedAutoencoder

        # No dropout: the losses are compared.
        model = MaskedAutoencoder.from_name(options.model, num_classes=CLASSES, head_drop_rate=0.0)
        spread(model, options.seed)
        config = model.config
        batch = draw_batch([config] * 2, options.batch, options.mask_ratio, CLASSES, setup.device, **how)
        variants = pretraining(model, batch, setup, *ask)
        what = (
            f"{options.batch} source and {options.batch} target clips, {visible(batch)} of {config.num_tokens} tokens"
        )
        return Work(variants, published_pretraining(model, batch, setup), 2 * options.batch, what)
    models = {}
    for seed, (name, modality) in enumerate((("student", "rgb"), ("rgb", "rgb"), ("flow", "flow"), ("pose", "pose"))):
        models[name] = MaskedViT.from_name(f"{options.model}_{modality}", num_classes=0)
        spread(models[name], options.seed + seed)
    configs = [model.config for model in models.values()]
    batch = draw_batch(configs[1:], options.batch, options.mask_ratio, 0, setup.device, **how)
    batch = replace(batch, videos=(batch.videos[0], *batch.videos))  # the student sees its RGB teacher's clips
    variants = distillation(models, batch, setup, *ask)
    what = f"{options.batch} samples of rgb, flow and pose, {visible(batch)} of {configs[0].num_tokens} tokens"
    return Work(variants, published_distillation(models, batch, setup), options.batch, what)


def visible(batch: Batch) -> int:
    return batch.keep.shape[1]


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
    gate = check(work.variants, work.published)
    if gate.red:
        print(*train_report.red_lines(gate), sep="\n", file=sys.stderr)
        return 3
    work.published.clear()  # its weights would only fill memory
    limits = harness.ceilings(options.device, options.autocast or torch.float32)
    precision = "fp32" if options.autocast is None else f"{options.autocast} autocast"
    precision = precision.removeprefix("torch.")
    pixels = "uint8" if options.uint8 else "float"
    title = f"{options.mode} step of {options.model}, {precision}; {work.title}; {pixels} clips"
    print(*machine_lines(facts, limits), f"{title}; seed {options.seed}", sep="\n", flush=True)
    rows = train_report.rows_of(work.variants, gate, work.clips, options.rounds, SECONDS[options.device.type])
    print(*train_report.table_lines(rows, gate), *notes(options, gate), sep="\n")
    if options.json:
        saved = {"mmfast": mmfast.__version__, "options": vars(options), "machine": facts, "ceilings": limits}
        harness.write_json(options.json, saved | {"title": title} | train_report.as_json(rows, gate))
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


def notes(options: argparse.Namespace, gate: Gate) -> list[str]:
    lines = [
        train_report.MEMORY_NOTE,
        "published: AdamW as torch sets it; eager, compiled and mmfast: AdamW(fused=True)",
    ]
    if "transformers" in gate.errors:
        lines.append("transformers: reconstruction only, no class branch, torch's AdamW")
    elif options.mode == "pretrain" and "transformers" in options.peers:
        lines.append("transformers is not installed or failed")
    if not options.no_recompute:
        lines += [f'{name}: set_grad_checkpointing(what="{what}")' for name, what in LEAN.items()]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
