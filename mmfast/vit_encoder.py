"""From embedded tokens to features: what of a MaskedViT runs on packed tokens alone."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmfast_kernels.pool import segment_mean_norm

from . import profiling
from .adapters import FrameLayout
from .config import ViTConfig
from .fused import FusedBlocks
from .layers import LayerNorm, is_bare, joint_biases, run_block
from .masks import Grid, Pack

Stream = tuple[Tensor, Tensor | None]
MEAN_TOKENS = 8_192  # fewer than this keep a GPU busy for less time than two more launches take


class Encoder(nn.Module):
    """The blocks of a ViT over packed tokens, its final norm and its pooling."""

    config: ViTConfig
    blocks: nn.ModuleList
    norm: LayerNorm | None
    fc_norm: LayerNorm | None
    fused: FusedBlocks | None
    grad_checkpointing: bool

    def _layout(self, pack: Pack, grid: Grid) -> FrameLayout | None:
        """What the adapters run on, where there are any."""
        raise NotImplementedError

    def _features(self, x: Tensor, pack: Pack, grid: Grid | None) -> Tensor:
        """Pooled features [S, D] of embedded tokens [T, D]."""
        if not self._means_suffice(pack):
            return self._pool(self._encode(x, pack, grid), pack)
        layout = self._layout(pack, grid or self.config.grid)
        if self.fused is not None:
            mean = self.fused.forward_mean(x, pack, layout)
        else:
            biases, last = joint_biases(self.blocks), len(self.blocks) - 1
            stream = self._through(x, pack, layout, biases[:-1])
            with profiling.range(f"block{last}"):
                mean = self.blocks[last].forward_mean(*stream, pack, layout, biases[last])  # type: ignore[operator]  # a Block's
        with profiling.range("pool"):
            return mean.to(x.dtype) if self.fc_norm is None else self.fc_norm(mean, x.dtype)

    def _means_suffice(self, pack: Pack) -> bool:
        """Whether the last block's tokens are read for nothing but their means, and few means stand for many tokens."""
        last = self.blocks[-1]
        return (
            self.config.pool == "mean"
            and self.norm is None
            and pack.length is not None
            and not self.training
            and not torch.is_grad_enabled()
            and (self.fused is not None or is_bare(last))
            and (not pack.keep_idx.is_cuda or pack.num_tokens >= MEAN_TOKENS)
        )

    def _encode(self, x: Tensor, pack: Pack, grid: Grid | None = None) -> Stream:
        """The residual stream after the last block, and the branch still to be added to it, if any."""
        layout = self._layout(pack, grid or self.config.grid)
        if self.fused is not None:
            return self.fused(x, pack, layout), None
        return self._through(x, pack, layout, joint_biases(self.blocks))

    def _through(self, x: Tensor, pack: Pack, layout: FrameLayout | None, biases: Sequence[Tensor | None]) -> Stream:
        """As _encode, after the first blocks, whose biases are given."""
        branch = None
        for i, bias in enumerate(biases):
            with profiling.range(f"block{i}"):
                x, branch = run_block(
                    self.blocks[i], x, branch, pack, self.grad_checkpointing, layout, None, None, bias
                )
        return x, branch

    def _normed(self, stream: Stream) -> Tensor:
        x, branch = stream
        if self.norm is None:
            return joined(stream)
        # Features keep the stream's dtype under autocast, as plain torch's do.
        return self.norm(x, x.dtype) if branch is None else self.norm.add(x, branch, x.dtype)[1]

    def _pool(self, stream: Stream, pack: Pack) -> Tensor:
        with profiling.range("pool"):
            if self.config.pool == "first":
                starts = pack.cu_seqlens[:-1]
                x, branch = (None if t is None else t.index_select(0, starts) for t in stream)
                assert x is not None
                first = self._normed((x, branch))
                return first if self.fc_norm is None else self.fc_norm(first, first.dtype)
            weight, bias, eps = norm_arguments(self.fc_norm)
            token_weight, token_bias, token_eps = norm_arguments(self.norm)
            return segment_mean_norm(
                joined(stream),
                pack.cu_seqlens if pack.length is None else None,
                length=pack.length,
                weight=weight,
                bias=bias,
                eps=eps,
                token_weight=token_weight,
                token_bias=token_bias,
                token_eps=token_eps,
            )


def joined(stream: Stream) -> Tensor:
    """The stream with its branch added."""
    x, branch = stream
    return x if branch is None else x + branch


def norm_arguments(norm: LayerNorm | None) -> tuple[Tensor | None, Tensor | None, float]:
    """Weight, bias and eps; of no norm, neither and the default."""
    return (None, None, 1e-6) if norm is None else (norm.weight, norm.bias, norm.eps)
