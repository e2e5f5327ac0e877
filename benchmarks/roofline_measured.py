"""What result files measured, beside the floors of the machine they were measured on."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import machines
import workloads
import workloads_clip
from machines import Machine, floor_of
from workloads import Op, Rules

from mmfast.config import from_name, mae_from_name
from mmfast.m2clip_config import M2CLIPConfig
from mmfast.masks import kept_per_slot

CLASSES = 204  # of every model that the other benchmarks build


def beside_floors(paths: Sequence[Path], machine: Machine) -> dict[str, list[dict[str, Any]]]:
    """All tables.   machine: its rates, if it is the same by name, are those of the steps' floors."""
    results = read(paths)
    return {
        "measured": measured_rows(results),
        "measured_steps": measured_steps(results, machine),
        "measured_kernels": measured_kernels(results),
    }


class Result(NamedTuple):
    """A result file, its content, and the machine that it was measured on."""

    file: Path
    content: dict[str, Any]
    machine: Machine


def read(paths: Iterable[Path]) -> list[Result]:
    """Result files among files and folders of run_all.py; those without ceilings are left out, with a line on stderr."""
    found = []
    for path in paths:
        try:
            machine = machines.from_results(path)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        found += [Result(file, json.loads(file.read_text()), machine) for file in files]
    return found


def ladders_of(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cases that a file of ensemble_masked.py, or of a ladder of run_all.py, has, each with its model and dtype."""
    options = content.get("options", {})
    found = content.get("ladders") or [row for row in content.get("rows", []) if "case" in row and "rows" in row]
    return [{"model": options.get("model"), "dtype": options.get("dtype"), **case} for case in found]


def measured_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """What ladders measured, beside the floors of the machine they ran on."""
    rows = []
    for file, content, machine in results:
        for case in ladders_of(content):
            about, found = case["case"], {row["name"]: row for row in case["rows"]}
            ours, peer = found.get("mmfast"), found.get(case["best_peer"])
            if ours is None or peer is None:
                continue
            rules, clips = Rules(item=4 if "32" in str(case["dtype"]) else 2), ours["clips"]
            config = from_name(case["model"], num_classes=CLASSES)
            floor = floor_of(workloads.inference(config, about["tokens"], about["views"], clips, rules=rules), machine)
            rows.append(
                {
                    "file": file.name,
                    "machine": machine.name,
                    "commit": machines.commit_of(content.get("machine", {})),
                    "model": case["model"],
                    "mask_ratio": about["ratio"],
                    "views": about["views"],
                    "ms_mmfast": ours["timing"]["median"] / clips,
                    "ms_best_peer": peer["timing"]["median"] / clips,
                    "ms_ideal": floor.ideal / clips,
                    "share_of_ideal": floor.ideal / ours["timing"]["median"],
                }
            )
    return rows


def measured_kernels(results: Iterable[Result]) -> list[dict[str, Any]]:
    """mmfast's ops as run_all.py measured them, beside the longer of their two limits."""
    rows = []
    for _, content, machine in results:
        for row in content.get("rows", []):
            if "op" not in row or not row["provider"].startswith("mmfast"):
                continue
            ms, floor = row["timing"]["median"], max(machine.milliseconds(row["flops"], row["bytes"]))
            rows.append(
                {name: row[name] for name in ("op", "shape", "dtype", "gb_s", "tflop_s")}
                | {"us": 1e3 * ms, "us_floor": 1e3 * floor, "share": floor / ms}
                | {"flop_per_byte": row["flops"] / row["bytes"]}
            )
    return rows


def step_ops(options: Mapping[str, Any], rules: Rules) -> tuple[str, list[Op]] | None:
    """A title and the ops of the step that these options of train_step.py or m2clip_step.py ran; None for others."""
    mode, model, batch = options.get("mode"), str(options.get("model")), int(options.get("batch") or 0)
    if mode == "pretrain":
        config = mae_from_name(model, num_classes=CLASSES)
        visible = config.grid[0] * kept_per_slot(config.grid, options.get("mask_ratio", 0.9))
        return "pre-training", workloads.pretraining(config, visible, batch, batch, rules)
    if mode == "distill":
        teachers = {name: from_name(f"{model}_{name}") for name in ("rgb", "flow", "pose")}
        grid = teachers["rgb"].grid
        n = grid[0] * kept_per_slot(grid, options.get("mask_ratio", 0.75))
        return "distillation", workloads.distillation(teachers["rgb"], teachers, n, batch, rules)
    if "preset" in options and "name_words" in options:
        m2clip = M2CLIPConfig.preset(options["preset"], model, num_classes=options["classes"])
        # Three words stand before a name, a token before and behind all; every caption has a word masked, so is its own text.
        length = round(options["name_words"] + 5)
        ops = workloads_clip.m2clip(m2clip, batch, options["classes"] + batch, length, 1, rules)
        return f"M2-CLIP, {options['preset']}", ops
    return None


def measured_steps(results: Iterable[Result], machine: Machine) -> list[dict[str, Any]]:
    """Training steps as measured on this machine; those of another are left out."""
    rows = []
    for file, content, other in results:
        if other.name != machine.name:
            continue
        runs = [content.get("options", {}) | content]
        runs += [row for row in content.get("rows", []) if "mode" in row]
        for run in runs:
            half = run.get("autocast") is not None if "autocast" in run else not machine.cpu
            pixel = 1 if run.get("uint8") else 4
            known = step_ops(run, Rules(item=2 if half else 4, pixel=pixel))
            found = {row["name"]: row for row in run.get("rows", []) if "name" in row}
            if known is None or "mmfast" not in found:
                continue
            ours, peer = found["mmfast"], found.get(run.get("best_peer") or "")
            floor = floor_of(known[1], machine)
            rows.append(
                {
                    "file": file.name,
                    "commit": machines.commit_of(content.get("machine", {})),
                    "step": known[0],
                    "ms_mmfast": ours["timing"]["median"],
                    "ms_best_peer": None if peer is None else peer["timing"]["median"],
                    "ms_ideal": floor.ideal,
                    "ms_by_op": floor.by_op,
                    "share_of_ideal": floor.ideal / ours["timing"]["median"],
                }
            )
    return rows
