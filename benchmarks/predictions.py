"""Predicted times of the ensemble on a GPU: the roofline's bytes and operations at assumed shares of the machine's rates.

Nothing here was measured. Each op takes the longer of its products and its bytes; passes that a way does not fuse come on
top. Not counted: launches, the arithmetic of exponentials and of GELU, the head's softmax.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import workloads
from machines import Machine
from workloads import Op, Rules

if TYPE_CHECKING:
    from mmfast.config import ViTConfig


@dataclass(frozen=True)
class Way:
    """A way to run the ensemble in bf16, and what is assumed of it.

    passes: share of the unfused passes it makes. tile, key_tile: queries and keys of a tile of attention. attention: share of
    the machine's product rate on tiles without waste. memory: share of its copy rate. fp8: products of the Linear layers.
    """

    name: str
    passes: Callable[[Op], float]
    tile: int
    key_tile: int
    attention: float
    memory: float
    fp8: bool = False


def all_passes(op: Op) -> float:
    return 1.0


def joined_passes(op: Op) -> float:
    """A compiler joins a residual with the norm behind it, and the passes around the embedding; GELU stays a pass."""
    return 0.5 if op.kind in ("proj", "fc2", "embed") else 1.0


def no_passes(op: Op) -> float:
    return 0.0


WAYS = (
    Way("plain torch, eager", all_passes, 128, 128, 0.355, 0.65),
    Way("torch.compile", joined_passes, 128, 128, 0.42, 0.75),
    Way("mmfast", no_passes, 64, 16, 0.44, 0.85),
    Way("mmfast, activations in L2", no_passes, 64, 16, 0.44, 2.0),
    Way("mmfast, in L2, fp8", no_passes, 64, 16, 0.44, 2.0, fp8=True),
)
# Share of the product rate that a product of this depth reaches, where no measured one is at hand, and what fp8 gains on it.
PRODUCT_SHARES = {384: 0.58, 512: 0.63, 768: 0.70, 1024: 0.74, 1536: 0.78, 4096: 0.85}
FP8_GAINS = {384: 1.1, 1024: 1.35, 4096: 1.45}
FP32_SHARE = 0.7  # of the rate of fp32 products, and of the copy rate 0.85, in the published model


def between(known: Mapping[int, float], depth: int) -> float:
    """Between two known depths in proportion to the logarithm; beyond them the nearest."""
    depths = sorted(known)
    depth = min(max(depth, depths[0]), depths[-1])
    low = max(d for d in depths if d <= depth)
    high = min(d for d in depths if d >= depth)
    if low == high:
        return known[low]
    part = math.log(depth / low) / math.log(high / low)
    return known[low] + part * (known[high] - known[low])


def product_share(depth: int, machine: Machine) -> float:
    """Share of the machine's rate that products of a depth reach; its measured rates go first."""
    return between({d: rate / machine.tflop_s for d, rate in machine.products.items()} or PRODUCT_SHARES, depth)


def useful(n: int, tile: int, key_tile: int) -> float:
    """Share of the products in whole tiles that belong to n queries and n keys."""
    return n / (math.ceil(n / tile) * tile) * n / (math.ceil(n / key_tile) * key_tile)


def predicted(ops: Iterable[Op], n: int, machine: Machine, way: Way) -> float:
    """Milliseconds, by the way's assumptions."""
    total = 0.0
    for op in ops:
        products, least = machine.milliseconds(workloads.flops_of([op]), op.least)
        if op.kind == "attention":
            products /= way.attention * useful(n, way.tile, way.key_tile)
        elif products:
            products /= product_share(op.inner, machine) * (between(FP8_GAINS, op.inner) if way.fp8 else 1)
        extra = machine.milliseconds(0, op.unfused - op.least)[1] * way.passes(op)
        total += max(products, least / way.memory) + extra / way.memory
    return total


def published(config: "ViTConfig", n: int, views: int, clips: int, machine: Machine) -> float | None:
    """Milliseconds of the model as released: fp32, every token embedded, scores in memory, a view after another."""
    if machine.fp32_tflop_s is None:
        return None
    ops = workloads.inference(config, n, 1, clips, config.num_tokens, Rules(item=4, pixel=4))
    passes = 4 * clips * config.depth * config.num_heads * n * n * 4  # written, read and written by softmax, read
    moved = sum(op.unfused for op in ops) + passes
    memory = machine.milliseconds(0, moved)[1] / 0.85
    return views * (workloads.flops_of(ops) / machine.fp32_tflop_s / 1e9 / FP32_SHARE + memory)


def of_ways(config: "ViTConfig", n: int, views: int, clips: int, machine: Machine) -> dict[str, float]:
    """Predicted milliseconds of a batch of every way, the slowest first."""
    ops = workloads.inference(config, n, views, clips)
    times = {way.name: predicted(ops, n, machine, way) for way in WAYS}
    first = published(config, n, views, clips, machine)
    return times if first is None else {"published, fp32": first} | times


def assumptions(machine: Machine) -> list[str]:
    """What the predictions assume, a line of Markdown each."""
    known = machine.products or PRODUCT_SHARES
    shares = ", ".join(f"{depth}: {product_share(depth, machine):.2f}" for depth in sorted(known))
    gains = ", ".join(f"{depth}: {gain:g}" for depth, gain in FP8_GAINS.items())
    lines = [
        f"- share of the product rate by depth of the product ({'measured' if machine.products else 'assumed'}): {shares}",
        f"- fp8 gains on it, by depth (assumed): {gains}",
        f"- published, fp32: products at {FP32_SHARE:g} of the fp32 rate, copying at 0.85, not overlapped (assumed)",
    ]
    return lines + [
        f"- {way.name}: attention at {way.attention:g} of the product rate on tiles of {way.tile} x {way.key_tile} without "
        f"waste, copying at {way.memory:g} of the copy rate (assumed)"
        for way in WAYS
    ]
