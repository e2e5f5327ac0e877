"""From a checked case to its table: memory, time and share of the roofline of every rung."""

from collections.abc import Mapping

import flops
import harness
import torch
from harness import Call
from report import Ladder, Row
from torch import nn
from variants import BARE, OURS, Case, Gate, Rungs

from mmfast.graphs import GRAPH_TOKENS


@torch.no_grad()
def spread_weights(model: nn.Module, seed: int) -> None:
    """Random weights of a size at which attention is not uniform and classes differ, so that an error shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() > 1:
            weight.copy_(noise * weight[0].numel() ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            weight.copy_(1 + 0.1 * noise)
        else:
            weight.copy_(0.1 * noise)


def climb(
    rungs: Rungs,
    case: Case,
    calls: Mapping[str, Call],
    gate: Gate,
    *,
    rounds: int | None = None,
    budget: float = 20.0,
) -> Ladder:
    """Memory and time of every rung of a case that passed its check; those that crashed there are left out."""
    device, clips = rungs.device, rungs.video.shape[0]
    calls = {name: call for name, call in calls.items() if name in gate.errors}
    peaks: dict[str, tuple[int | None, int | None]] = dict(gate.peaks)
    if device.type == "cuda":
        tokens = clips * case.views * case.tokens
        for name, call in calls.items():
            for _ in range(3):
                call()
            # A replayed CUDA graph allocates nothing in the call, so its memory cannot be read off one.
            replayed = name == "strong, max-autotune" or name.endswith("CUDA graph")
            replayed = replayed or (name.startswith(OURS) and tokens <= GRAPH_TOKENS)
            peaks[name] = (None, None) if replayed else harness.peak_of(call, device)
    timings = harness.measure(
        {**calls, **rungs.bare(case)},
        device,
        rounds=rounds,
        budget=budget,
        warmup=3 if device.type == "cuda" else 0,
        what=case.title,
    )
    floor = min(timing.median for name, timing in timings.items() if name.startswith(BARE))
    if device.type == "cuda":
        operations = clips * flops.count(rungs.config, case.tokens, case.views).attention
        floor += operations / harness.ceilings(device, rungs.dtype)["gemm_tflop_s"] / 1e9
    rows = []
    for name in calls:
        count = rungs.flops(name, case)
        gflop = count.published / 1e9, count.true / 1e9
        rows.append(Row(name, timings[name], clips, *gflop, floor / timings[name].median, *peaks[name]))
    return Ladder(case, rows, floor, gate)
