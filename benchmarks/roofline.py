"""Operations, least bytes and floors of every configuration on a given machine, and the predicted ladder.

    python benchmarks/roofline.py --machine h200                       # from the data sheet
    python benchmarks/roofline.py --machine h200 --tflops 788 --tb-s 4.3 --pcie 55
    python benchmarks/roofline.py --measured results/ --out roofline.md --json roofline.json
    python benchmarks/roofline.py --measure                            # this machine, its rates measured now

Floors are arithmetic: products at the machine's rate, bytes at its memory's. "ideal": every product at that rate, nothing
else. "an op at a time": each op takes the longer of the two. Predicted columns add assumed shares of the rates, printed
with them; they are no measurements. Where results are given (--results), what was measured stands beside its floor.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import harness
import machines
import predictions
import roofline_measured
import torch
import workloads
import workloads_clip
from machines import Machine, floor_of
from options import device_of
from roofline_page import page
from workloads import Op, Rules

from mmfast.config import ViTConfig, from_name, mae_from_name
from mmfast.evl_config import EVLConfig
from mmfast.m2clip_config import M2CLIPConfig

CLASSES = 204
SIZES = ("small", "base", "large")
KEPT = {0.0: 196, 0.5: 98, 0.75: 49, 0.9: 20}  # mask ratio -> cells of 196 that stay in each slot
VIEWS = (1, 2, 4, 8)
BATCH_TOKENS = 33712  # 86 views of 392: full waves of tiles on 132 multiprocessors
TRAINING_CLIPS = 32


def classifier(size: str) -> ViTConfig:
    return from_name(f"videomae_{size}_patch16_224", num_classes=CLASSES)


def kept_tokens(config: ViTConfig, kept: int) -> int:
    return config.grid[0] * kept


def clips_in_batch(n: int, views: int) -> int:
    """Clips that fill BATCH_TOKENS."""
    return max(1, round(BATCH_TOKENS / (n * views)))


def ladder(size: str, kept: int, views: int, machine: Machine) -> dict[str, float]:
    """Predicted microseconds a clip of every way, and the floors, of a batch of BATCH_TOKENS tokens in bf16."""
    config = classifier(size)
    n = kept_tokens(config, kept)
    clips = clips_in_batch(n, views)
    ops = workloads.inference(config, n, views, clips)
    times = predictions.of_ways(config, n, views, clips, machine)
    floor = floor_of(ops, machine)
    times |= {"floor, bf16, an op at a time": floor.by_op, "floor, bf16, ideal": floor.ideal}
    return {name: 1e3 * ms / clips for name, ms in times.items()}


# -- figures ------------------------------------------------------------------------------------------------------------


def pcie_bytes(config: ViTConfig, kept: int, views: int) -> tuple[float, float]:
    """uint8 bytes of a whole clip, and of the cells that one of its random views keeps, on average."""
    cells = config.grid[1] * config.grid[2]
    whole = float(config.num_tokens * workloads.patch_dim(config))
    return whole, whole * (1 - (1 - kept / cells) ** views)


def inference_rows(machine: Machine, rules: Rules) -> list[dict[str, Any]]:
    rows = []
    for size in SIZES:
        config = classifier(size)
        for ratio, kept in KEPT.items():
            for views in VIEWS if ratio else (1,):
                n = kept_tokens(config, kept)
                clips = clips_in_batch(n, views)
                ops = workloads.inference(config, n, views, clips, rules=rules)
                published = workloads.inference(config, n, views, 1, config.num_tokens)
                floor = floor_of(ops, machine)
                whole, union = pcie_bytes(config, kept, views)
                row: dict[str, Any] = {
                    "model": size,
                    "mask_ratio": ratio,
                    "views": views,
                    "clips": clips,
                    "gflop": workloads.flops_of(ops) / clips / 1e9,
                    "gflop_published": (workloads.flops_of(published) - workloads.flops_of(published, "attention"))
                    / 1e9,
                    "gmac": workloads.flops_of(ops) / clips / 2e9,
                    "mb_least": sum(op.least for op in ops) / clips / 1e6,
                    "mb_unfused": sum(op.unfused for op in ops) / clips / 1e6,
                    "us_ideal": 1e3 * floor.ideal / clips,
                    "us_by_op": 1e3 * floor.by_op / clips,
                }
                if machine.pcie_gb_s:
                    row |= {f"us_pcie_{k}": b / machine.pcie_gb_s / 1e3 for k, b in (("whole", whole), ("kept", union))}
                rows.append(row)
    return rows


def training_steps(rules: Rules) -> dict[str, tuple[int, list[Op]]]:
    """Every training step: its clips, and its ops."""
    clips = TRAINING_CLIPS
    steps: dict[str, tuple[int, list[Op]]] = {}
    for size in SIZES:
        config = mae_from_name(f"pretrain_videomae_{size}_patch16_224", num_classes=CLASSES)
        half = clips // 2
        steps[f"pre-training, ViT-{size[0].upper()}, ratio 0.9"] = (
            clips,
            workloads.pretraining(config, kept_tokens(config, KEPT[0.9]), half, half, rules),
        )
    teachers = {name: from_name(f"mmcdfsl_small_{name}") for name in ("rgb", "flow", "pose")}
    steps["distillation, ViT-S, 3 teachers, ratio 0.75"] = (
        clips,
        workloads.distillation(teachers["rgb"], teachers, kept_tokens(teachers["rgb"], KEPT[0.75]), clips, rules),
    )
    b16 = M2CLIPConfig.preset("k400", "clip_vit_b16")
    texts = b16.num_classes + clips  # a prompt of 7 tokens for each class, a caption with a masked word for each clip
    steps["M2-CLIP, B/16, 8 frames, 400 labels"] = (clips, workloads_clip.m2clip(b16, clips, texts, 7, 1, rules))
    evl = EVLConfig.preset("paper", "clip_vit_b16")
    steps["EVL, B/16, 8 frames, backbone frozen"] = (clips, workloads_clip.evl(evl, clips, rules=rules))
    return steps


def step_rows(machine: Machine, rules: Rules) -> list[dict[str, Any]]:
    rows = []
    for name, (clips, ops) in training_steps(rules).items():
        floor = floor_of(ops, machine)
        rows.append(
            {
                "step": name,
                "clips": clips,
                "gflop": workloads.flops_of(ops) / clips / 1e9,
                "gmac": workloads.flops_of(ops) / clips / 2e9,
                "mb_least": sum(op.least for op in ops) / clips / 1e6,
                "mb_unfused": sum(op.unfused for op in ops) / clips / 1e6,
                "us_ideal": 1e3 * floor.ideal / clips,
                "us_by_op": 1e3 * floor.by_op / clips,
                "by_stage": {
                    stage: 1e3 * floor_of([op for op in ops if op.stage == stage], machine).by_op / clips
                    for stage in dict.fromkeys(op.stage for op in ops)
                },
            }
        )
    return rows


def kernel_rows(machine: Machine, rules: Rules, size: str, kept: int, views: int) -> list[dict[str, Any]]:
    """Every op of one batch, and which of the two limits it meets."""
    config = classifier(size)
    n = kept_tokens(config, kept)
    rows = []
    for op in workloads.merged(workloads.inference(config, n, views, clips_in_batch(n, views), rules=rules)):
        products, memory = machine.milliseconds(op.flops, op.least)
        rows.append(
            {
                "op": op.kind,
                "calls": op.calls,
                "gflop": op.flops / op.calls / 1e9,
                "mb": op.least / op.calls / 1e6,
                "flop_per_byte": op.flops / op.least,
                "us": 1e3 * max(products, memory) / op.calls,
                "limit": "products" if products > memory else "memory",
            }
        )
    return rows


def everything(machine: Machine, results: Sequence[Path] = ()) -> dict[str, Any]:
    rules = Rules(item=4) if machine.cpu else Rules()
    cases = [(0.75, 2), (0.9, 2), (0.0, 1)]
    return {
        "machine": asdict(machine),
        "rules": asdict(rules),
        "batch_tokens": BATCH_TOKENS,
        "training_clips": TRAINING_CLIPS,
        "assumptions": predictions.assumptions(machine),
        "inference": inference_rows(machine, rules),
        "training": step_rows(machine, rules),
        "kernels": kernel_rows(machine, rules, "small", KEPT[0.75], 2),
        # The assumptions are a GPU's.
        "ladder": []
        if machine.cpu
        else [
            {"model": size, "mask_ratio": ratio, "views": views, "us": ladder(size, KEPT[ratio], views, machine)}
            for size in SIZES
            for ratio, views in cases
        ],
        **roofline_measured.beside_floors(results, machine),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="roofline.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--machine", choices=list(machines.PRESETS), default="h200", help="a data sheet's rates")
    where.add_argument("--measured", metavar="PATH", help="rates of a result JSON, or of a folder of run_all.py")
    where.add_argument("--measure", action="store_true", help="measure the rates of --device now")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="for --measure")
    add("--threads", type=int, help="CPU threads for --measure; default: torch's")
    add("--tflops", type=float, help="TFLOP/s in place of the machine's")
    add("--tb-s", type=float, help="TB/s in place of the machine's")
    add("--pcie", type=float, metavar="GB_S", help="GB/s from the host in place of the machine's")
    add(
        "--results",
        nargs="*",
        type=Path,
        default=[],
        metavar="JSON",
        help="of ensemble_masked.py, to stand beside floors",
    )
    add("--out", type=Path, metavar="FILE", help="write the Markdown page here; default: print it")
    add("--json", metavar="FILE", help="write all figures")
    options = parser.parse_args(arguments)
    for name in ("tflops", "tb_s", "pcie", "threads"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    options.device = device_of(parser, options.device)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.measure:
            machine = machines.measure(options.device)
        elif options.measured:
            machine = machines.from_results(options.measured)
        else:
            machine = machines.PRESETS[options.machine]
        machine = machines.with_rates(machine, options.tflops, options.tb_s, options.pcie)
        result = everything(machine, options.results)
    except (ValueError, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = "\n".join(page(result))
    if options.out:
        options.out.write_text(text)
        print(f"written: {options.out}")
    else:
        print(text)
    if options.json:
        harness.write_json(options.json, result)
        print(f"written: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
