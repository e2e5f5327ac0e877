"""What a machine can do at most: data-sheet presets, a benchmark's own measurements, or measured now."""

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flops
import harness
import torch
import workloads
from workloads import Op

# Sides of the matrix products that are measured: depth and width of a ViT-S block's.
SHAPES = {384: (1152, 1536), 1536: (384,)}


@dataclass(frozen=True)
class Machine:
    """Rates of one device.

    tflop_s: of large matrix products. tb_s: of memory, read and written. pcie_gb_s: from the host; None without a bus.
    products: depth of a product -> TFLOP/s, where measured. source: where the rates are from. cpu: not a GPU.
    fp32_tflop_s: of fp32 products without tensor cores, as the published models run.
    """

    name: str
    tflop_s: float
    tb_s: float
    pcie_gb_s: float | None
    source: str
    products: Mapping[int, float] = field(default_factory=dict)
    cpu: bool = False
    fp32_tflop_s: float | None = None

    @property
    def balance(self) -> float:
        """Operations a byte at which both limits meet."""
        return self.tflop_s / self.tb_s

    def milliseconds(self, operations: float, moved: float) -> tuple[float, float]:
        """Of so many operations, and of so many bytes."""
        return operations / self.tflop_s / 1e9, moved / self.tb_s / 1e9


@dataclass(frozen=True)
class Floor:
    """Milliseconds below which no machine of these rates gets."""

    ideal: float
    by_op: float


def floor_of(ops: Iterable[Op], machine: Machine) -> Floor:
    ops = list(ops)
    times = [machine.milliseconds(workloads.flops_of([op]), op.least) for op in ops]
    return Floor(sum(products for products, _ in times), sum(max(pair) for pair in times))


_SHEET = "data sheet: dense bf16, no sparsity; PCIe x16, one way"
PRESETS = {
    "h100": Machine("H100 SXM", 989.0, 3.35, 64.0, _SHEET, fp32_tflop_s=67.0),
    "h200": Machine("H200 SXM", 989.0, 4.8, 64.0, _SHEET, fp32_tflop_s=67.0),
    "a100": Machine("A100 SXM 80 GB", 312.0, 2.04, 32.0, _SHEET, fp32_tflop_s=19.5),
}


def with_rates(machine: Machine, tflop_s: float | None, tb_s: float | None, pcie_gb_s: float | None) -> Machine:
    """The machine with the rates that are given in place of its own."""
    given = {"tflop_s": tflop_s, "tb_s": tb_s, "pcie_gb_s": pcie_gb_s}
    changed = {name: value for name, value in given.items() if value is not None}
    if not changed:
        return machine
    return replace(machine, **changed, source=f"{machine.source}; given: {', '.join(changed)}")  # type: ignore[arg-type]  # floats


def commit_of(facts: Mapping[str, Any]) -> str:
    """Of a result's `machine`, short, and whether files were changed since."""
    commit = str(facts.get("commit", "unknown"))
    return commit[:12] + "+changes" * commit.endswith("+changes")


def from_results(path: str | Path) -> Machine:
    """The machine that a result file, or a folder of run_all.py, was measured on.   ValueError where it has no ceilings."""
    path = Path(path)
    file = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from None
    limits = content.get("ceilings", content) if isinstance(content, dict) else {}
    if not {"copy_gb_s", "gemm_tflop_s"} <= set(limits):
        raise ValueError(f"{file} has no measured ceilings (copy_gb_s, gemm_tflop_s)")
    facts = content.get("machine", {})
    by_depth: dict[int, list[float]] = {}
    pcie = None
    for row in content.get("rows", []):
        if "product" in row:
            depth = int(row["product"].split()[1].split("x")[1])
            by_depth.setdefault(depth, []).append(row["tflop_s"])
        elif row.get("copy") == "pinned host to device":
            pcie = row["gb_s"]
    rates = [limits["gemm_tflop_s"], *(rate for found in by_depth.values() for rate in found)]
    # The model's own products in one run may be faster than the square one: on a CPU another library computes them.
    for ladder in content.get("ladders", []):
        least = min(row["gflop_true"] * row["clips"] for row in ladder["rows"])
        rates.append(least / ladder["floor_ms"])  # GFLOP a millisecond
    cpu = facts.get("device", "cpu") == "cpu"
    name = facts.get("gpu") or f"{facts.get('cpu', 'CPU')}, {facts.get('threads', '?')} threads"
    return Machine(
        name,
        max(rates),
        limits["copy_gb_s"] / 1e3,
        pcie,
        f"measured: {file.name}, commit {commit_of(facts)}",
        {depth: statistics.median(found) for depth, found in by_depth.items()},
        cpu,
    )


def measure(device: torch.device) -> Machine:
    """Rates of this device now: matrix products of a ViT-S block's depths, a large square one, and copying."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    limits = harness.ceilings(device, dtype)
    product = flops.fastest_product(device, dtype)
    rows, rates = 3136 if device.type == "cpu" else 33712, {}
    for depth, widths in SHAPES.items():
        found = []
        for wide in widths:
            x, weight = (torch.randn(n, depth, device=device).to(dtype) for n in (rows, wide))
            out = torch.empty(rows, wide, device=device, dtype=dtype)
            calls = {"product": lambda x=x, weight=weight, out=out: product(x, weight, out)}
            least = harness.measure(calls, device, rounds=5, warmup=2)["product"].least
            found.append(2 * rows * depth * wide / least / 1e9)
        rates[depth] = max(found)
    facts = harness.machine(device)
    name = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    best = max(limits["gemm_tflop_s"], *rates.values())
    source = f"measured now, {facts['date']}, load {facts['load_average']}"
    return Machine(name, best, limits["copy_gb_s"] / 1e3, None, source, rates, device.type == "cpu")
