"""What both towers of CLIP are made of: a stack of blocks, some with adapters in front of a half."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from . import profiling
from .adapters import FrameLayout, TEDAdapter, TextAdapter
from .fused import Fusible
from .layers import Block, run_block, set_recompute
from .masks import Pack

_KINDS = {"ted": TEDAdapter, "text": TextAdapter}


@dataclass(frozen=True)
class AdapterPlacement:
    """Which blocks have adapters and where.

    layers: block numbers from 0, or None for all.   before: "attn", "mlp" or both.   hidden: an adapter's inner width.
    kind: "ted", over frames, or "text", on each token alone.
    """

    layers: tuple[int, ...] | None = None
    before: tuple[str, ...] = ("attn",)
    hidden: int = 384
    kind: Literal["ted", "text"] = "ted"

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "before", (self.before,) if isinstance(self.before, str) else tuple(self.before))
        if not self.before or not set(self.before) <= {"attn", "mlp"}:
            raise ValueError(f'before must be "attn", "mlp" or both, got {self.before!r}')
        if self.hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {self.hidden}")
        if self.kind not in _KINDS:
            raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {self.kind!r}")


def place_adapters(blocks: nn.ModuleList, dim: int, placement: AdapterPlacement) -> None:
    """Put a fresh adapter, as `adapter_pre_attn` or `adapter_pre_mlp`, into each block the placement names."""
    layers = range(len(blocks)) if placement.layers is None else placement.layers
    for n in layers:
        if not 0 <= n < len(blocks):
            raise ValueError(f"layers must lie in 0..{len(blocks) - 1}, the blocks there are, got {n}")
        for half in placement.before:
            setattr(blocks[n], f"adapter_pre_{half}", _KINDS[placement.kind](dim, placement.hidden))


class Transformer(Fusible):
    """Blocks of CLIP's kind, called `resblocks` as its files do. The first `depth` run; `extra` more only hold weights."""

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        hidden: int,
        *,
        norm_eps: float,
        gelu: str,
        causal: bool = False,
        adapters: AdapterPlacement | None = None,
        extra: int = 0,
    ) -> None:
        super().__init__()
        options = dict(qkv_bias="full", norm_eps=norm_eps, gelu=gelu, causal=causal)
        self.resblocks = nn.ModuleList(
            Block(dim, num_heads, hidden, **options)  # type: ignore[arg-type]  # options is a dict of several types
            for _ in range(depth + extra)
        )
        self.depth = depth
        self.grad_checkpointing = False
        self._init_weights(dim)
        if adapters is not None:
            place_adapters(self.resblocks, dim, adapters)
        self.use_adapters = adapters is not None

    def forward(
        self, x: Tensor, pack: Pack, layout: FrameLayout | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream [T, D] after the last block that runs, and the branch still to be added to it.

        rows: int [S], a token of each sequence (of a causal tower the last): these alone are given, [S, D] both.
        """
        branch: Tensor | None = None
        done = 0
        if self.fused is not None:
            x, done = self.fused(x, pack, layout), self.depth - 1
        for i in range(done, self.depth):
            block = self.resblocks[i]
            # An adapter over frames before the last MLP reads the neighbours of the rows.
            early = i == self.depth - 1 and (layout is None or block.adapter_pre_mlp is None or not block.use_adapters)
            with profiling.range(f"block{i}"):
                only = rows if early else None
                x, branch = run_block(block, x, branch, pack, self.grad_checkpointing, layout, only)
        assert branch is not None
        if rows is not None and not early:
            return x.index_select(0, rows), branch.index_select(0, rows)
        return x, branch

    def _to_fuse(self) -> Sequence[nn.Module]:
        # The last block runs as it is: of what it computes most is not needed.
        return list(self.resblocks[: self.depth - 1])

    def set_grad_checkpointing(self, enable: bool = True, what: str = "block") -> None:
        """As MaskedViT's."""
        self.grad_checkpointing = set_recompute(self.resblocks, enable, what)

    def enable_adapters(self, on: bool = True) -> None:
        """Whether the adapters take part; without them the tower is the one they were added to."""
        self.use_adapters = on
        for block in self.resblocks:
            block.use_adapters = on  # type: ignore[assignment]  # blocks are Blocks

    def _init_weights(self, dim: int) -> None:
        # As CLIP: what is added to the stream shrinks with the depth.
        std, shrunk = dim**-0.5, dim**-0.5 * (2 * self.depth) ** -0.5
        for block in self.resblocks:
            assert isinstance(block, Block)
            for layer, scale in (
                (block.attn.qkv, std),
                (block.attn.proj, shrunk),
                (block.mlp.fc1, (2 * dim) ** -0.5),
                (block.mlp.fc2, shrunk),
            ):
                nn.init.normal_(layer.weight, std=scale)
                nn.init.zeros_(layer.bias)


def normal(*shape: int, std: float) -> nn.Parameter:
    """A parameter drawn from a normal distribution."""
    return nn.Parameter(torch.randn(shape) * std)
