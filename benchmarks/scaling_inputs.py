"""What the scaling page is computed from: measured files, a decode measurement, and figures that are given or predicted."""

import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import machines
import predictions
import roofline
import torch
import workloads
from machines import Machine, commit_of
from roofline import classifier, clips_in_batch, kept_tokens, pcie_bytes

CASES = ((0.0, 1), (0.75, 1), (0.75, 2), (0.75, 4), (0.9, 1), (0.9, 2), (0.9, 4))
MEASURED, GIVEN, ARITHMETIC, ABSENT = "measured", "given", "arithmetic", "absent"


@dataclass(frozen=True)
class Input:
    """A figure and where it is from.   kind: measured, given, arithmetic or absent (value None)."""

    name: str
    value: float | None
    unit: str
    kind: str
    source: str


@dataclass(frozen=True)
class Rate:
    """Clips a second of one device on one configuration.   device: "cuda" or "cpu"."""

    model: str
    mask_ratio: float
    views: int
    clips_s: float
    kind: str
    source: str
    device: str = "cuda"


def size_of(name: str) -> str | None:
    """small, base or large, of a published model's name."""
    return next((size for size in roofline.SIZES if size in name), None)


def results_in(paths: Iterable[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """JSON files among files and folders, read.   ValueError for what is none."""
    found: list[tuple[Path, dict[str, Any]]] = []
    for path in paths:
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        for file in files:
            try:
                content = json.loads(file.read_text())
            except (OSError, ValueError) as error:
                raise ValueError(f"{file} cannot be read as JSON: {error}") from None
            if isinstance(content, dict):
                found.append((file, content))
    return found


def rates_in(file: Path, content: Mapping[str, Any]) -> list[Rate]:
    """What mmfast did in a file of ensemble_masked.py or in a ladder of run_all.py."""
    ladders = content.get("ladders") or [row for row in content.get("rows", []) if "case" in row and "rows" in row]
    facts = content.get("machine", {})
    device = "cpu" if str(facts.get("device", "cpu")).startswith("cpu") else "cuda"
    rates = []
    for ladder in ladders:
        size = size_of(ladder.get("model") or content.get("options", {}).get("model", ""))
        ours = next((row for row in ladder["rows"] if row["name"] == "mmfast"), None)
        if size is None or ours is None:
            continue
        case, source = ladder["case"], f"{file.name}, commit {commit_of(content.get('machine', {}))}"
        # 0.9 of 196 cells leaves 19.6: 20 are kept, and the file has their exact share.
        ratio = min(roofline.KEPT, key=lambda known: abs(known - case["ratio"]))
        if roofline.KEPT[ratio] == case["kept"]:
            rates.append(Rate(size, ratio, case["views"], ours["clips_per_second"], MEASURED, source, device))
    return rates


def best(rates: Iterable[Rate], device: str) -> dict[tuple[str, float, int], Rate]:
    """The fastest measurement of every configuration on a kind of device."""
    found: dict[tuple[str, float, int], Rate] = {}
    for rate in rates:
        key = (rate.model, rate.mask_ratio, rate.views)
        if rate.device == device and (key not in found or rate.clips_s > found[key].clips_s):
            found[key] = rate
    return found


def gpu_rates(measured: Mapping[tuple[str, float, int], Rate], machine: Machine) -> list[Rate]:
    """Every configuration: measured where it was, else predicted for the machine."""
    way = next(way for way in predictions.WAYS if way.name == "mmfast")
    rates = []
    for size in roofline.SIZES:
        config = classifier(size)
        for ratio, views in CASES:
            if (size, ratio, views) in measured:
                rates.append(measured[size, ratio, views])
                continue
            n = kept_tokens(config, roofline.KEPT[ratio])
            clips = clips_in_batch(n, views)
            ms = predictions.predicted(workloads.inference(config, n, views, clips), n, machine, way)
            rates.append(Rate(size, ratio, views, clips / ms * 1e3, ARITHMETIC, f"predicted for {machine.name}"))
    return rates


def bytes_to_gpu(rate: Rate) -> tuple[float, float]:
    """Of a whole uint8 clip, and of its kept cells alone."""
    return pcie_bytes(classifier(rate.model), roofline.KEPT[rate.mask_ratio], rate.views)


def measure_decode(count: int, frames: int, height: int, rounds: int = 3) -> dict[str, Any]:
    """Clips a second of a core that mmfast's reader makes from videos that are drawn and encoded first."""
    from mmfast.data.synthetic import render_videos
    from mmfast.data.video import load_clip

    width = height * 4 // 3 // 2 * 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="mmfast-decode-") as folder:
            files = render_videos(folder, count, num_frames=frames, size=(height, width))
            load_clip(files[0])
            seconds = [_seconds(files, load_clip) for _ in range(rounds)]
            size = statistics.mean(Path(file).stat().st_size for file in files)
    finally:
        torch.set_num_threads(threads)
    return {
        "clips_per_core_second": len(files) / min(seconds),
        "spread": (max(seconds) - min(seconds)) / min(seconds),
        "file_bytes": size,
        "video": f"{frames} frames of {height} x {width}, drawn, mp4; 16 frames of 224 x 224 read, 1 thread",
        "machine": harness.machine(torch.device("cpu")),
    }


def _seconds(files: Sequence[str | Path], load: Any) -> float:
    """Of a core, so that other work on the machine does not count."""
    began = time.process_time()
    for file in files:
        load(file)
    return time.process_time() - began


def bus_of(results: Iterable[tuple[Path, Mapping[str, Any]]], machine: Machine) -> Input:
    """GB/s from the host to a GPU."""
    name, unit = "host to one GPU", "GB/s"
    for file, content in results:
        for row in content.get("rows", []):
            if row.get("copy") == "pinned host to device":
                return Input(
                    name, row["gb_s"], unit, MEASURED, f"{file.name}, commit {commit_of(content.get('machine', {}))}"
                )
    if machine.pcie_gb_s is None:
        return Input(name, None, unit, ABSENT, "no GPU result")
    return Input(name, machine.pcie_gb_s, unit, GIVEN, f"{machine.name}: {machine.source}")


def machine_of(results: Iterable[tuple[Path, Mapping[str, Any]]], preset: str) -> Machine:
    """The GPU whose ceilings were measured among the results, else the data sheet's of a name."""
    for file, content in results:
        facts = content.get("machine", {})
        if str(facts.get("device", "cpu")).startswith("cuda") and "gemm_tflop_s" in content.get("ceilings", content):
            return machines.from_results(file)
    return machines.PRESETS[preset]
