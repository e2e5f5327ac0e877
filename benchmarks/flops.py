"""Operations of the ensemble in two conventions, least bytes, and the bare matrix products at the same shapes.

A multiply and an add are two operations; workloads.py counts them.

    published   Linear and Conv3d only, attention left out, as the masked-ensemble literature counts
    true        everything that multiplies matrices, attention included
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import workloads
from harness import time_once
from peers import have_onednn
from torch import Tensor
from workloads import patch_dim

if TYPE_CHECKING:
    from mmfast.config import ViTConfig


@dataclass(frozen=True)
class Flops:
    """Operations of one clip's ensemble."""

    linear: int
    attention: int

    @property
    def published(self) -> int:
        return self.linear

    @property
    def true(self) -> int:
        return self.linear + self.attention


def count(config: "ViTConfig", n: int, views: int, embedded: int | None = None) -> Flops:
    """Operations of one clip: `views` sequences of n kept tokens.

    embedded: tokens the patch embedding multiplies per view; the published path embeds the full grid, so that is the
    default. A path that gathers first passes n.
    """
    ops = workloads.inference(config, n, views, embedded=config.num_tokens if embedded is None else embedded)
    attention = workloads.flops_of(ops, "attention")
    return Flops(linear=workloads.flops_of(ops) - attention, attention=attention)


def least_bytes(config: "ViTConfig", sequences: int, n: int, itemsize: int, pixel_itemsize: int = 1) -> int:
    """Bytes that a path with one kernel an op has to move, as workloads.py counts them; weights are read once a batch."""
    rules = workloads.Rules(item=itemsize, pixel=pixel_itemsize)
    return sum(op.least for op in workloads.inference(config, n, sequences, rules=rules))


def _random(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Random, not zero: a GPU multiplies zeros measurably faster.
    return torch.randn(shape, device=device, dtype=torch.float32).mul_(0.05).to(dtype)


Product = Callable[[Tensor, Tensor, Tensor], object]  # x [M, K], weight [N, K], a buffer [M, N] that it may fill


def by_mm(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    return torch.mm(x, weight.t(), out=out)


def by_onednn(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@functools.cache
def fastest_product(device: torch.device, dtype: torch.dtype) -> Product:
    """Of the matrix products that torch carries, the faster one here: on a CPU that may be oneDNN's."""
    if device.type != "cpu" or dtype != torch.float32 or not have_onednn():
        return by_mm
    x, weight = _random(1024, 384, device=device, dtype=dtype), _random(1536, 384, device=device, dtype=dtype)
    out = torch.empty(1024, 1536)
    taken: dict[Product, float] = {}
    for product in (by_mm, by_onednn):
        product(x, weight, out)
        once = functools.partial(product, x, weight, out)
        taken[product] = min(time_once(once, device, 3) for _ in range(7))
    return min(taken, key=taken.__getitem__)


def bare_products(
    config: "ViTConfig",
    sequences: int,
    n: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    embedded: int | None = None,
    attention: bool = True,
    product: Product | None = None,
) -> Callable[[], None]:
    """A callable that runs the ensemble's matrix products and nothing else.

    sequences: views of all clips. embedded: tokens embedded per sequence, n unless told. attention: with the two
    attention products, a sequence at a time so that the scores stay in cache (on a GPU they would not: leave them out
    there and add their operations at the measured matrix-product rate). product: the fastest that torch has by default.
    """
    device = torch.device(device)
    product = fastest_product(device, dtype) if product is None else product
    D, H, hidden = config.embed_dim, config.num_heads, config.mlp_dim
    rows = sequences * n
    patches = sequences * (n if embedded is None else embedded)

    def make(*shape: int) -> Tensor:
        return _random(*shape, device=device, dtype=dtype)

    shapes = {"qkv": (D, 3 * D), "proj": (D, D), "fc1": (D, hidden), "fc2": (hidden, D)}
    weights = {name: make(wide, narrow) for name, (narrow, wide) in shapes.items()}
    inputs = {D: make(rows, D), hidden: make(rows, hidden)}
    outputs = {name: make(rows, wide) for name, (_, wide) in shapes.items()}
    pixels, embed_weight, embed_out = make(patches, patch_dim(config)), make(D, patch_dim(config)), make(patches, D)
    pooled, head, logits = make(sequences, D), make(config.num_classes, D), make(sequences, config.num_classes)
    q, k, v = (make(sequences, H, n, D // H) for _ in range(3))
    scores, mixed = make(H, n, n), make(H, n, D // H)

    def run() -> None:
        product(pixels, embed_weight, embed_out)
        for _ in range(config.depth):
            product(inputs[D], weights["qkv"], outputs["qkv"])
            if attention:
                for s in range(sequences):
                    torch.bmm(q[s], k[s].transpose(1, 2), out=scores)
                    torch.bmm(scores, v[s], out=mixed)
            product(inputs[D], weights["proj"], outputs["proj"])
            product(inputs[D], weights["fc1"], outputs["fc1"])
            product(inputs[hidden], weights["fc2"], outputs["fc2"])
        product(pooled, head, logits)

    return run
