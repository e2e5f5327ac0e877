"""Transformer modules over packed tokens: x [T, D], all sequences end to end, described by a Pack."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmfast_kernels.attention import packed_attention, packed_self_attention
from mmfast_kernels.linear import linear
from mmfast_kernels.mlp import linear_gelu
from mmfast_kernels.mlp_block import mlp
from mmfast_kernels.norm import add_layer_norm, layer_norm
from mmfast_kernels.pool import segment_mean

from . import profiling
from .masks import Grid, Pack

if TYPE_CHECKING:
    from .adapters import FrameLayout
    from .quantized import QuantizedBlock


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension through mmfast's kernel."""

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The norm of x in `dtype`, which is x's unless given; under autocast, autocast's."""
        return layer_norm(x, self.weight, self.bias, self.eps, dtype=dtype)

    def add(self, x: Tensor, branch: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """(x + branch, norm of it) in one pass; the norm in `dtype` as in forward."""
        return add_layer_norm(x, branch, self.weight, self.bias, self.eps, dtype=dtype)


class Linear(nn.Linear):
    """nn.Linear by the fastest library at hand."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head self-attention within each sequence of a pack.

    qkv_bias: "qv" (VideoMAE: biases on q and v, none on k), "full" (CLIP) or "none".
    causal: a token sees itself and those before it.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: str = "qv", causal: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias == "full")
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.proj = Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        pack: Pack,
        rows: Tensor | None = None,
        seen: list[Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x: [T, D]. rows: int [S], a token of each sequence to compute alone, over all of its sequence: of a causal one
        the last. seen: a list that takes the packed product [T, 3, H, d]. bias: joint_bias(), where it is at hand. Returns
        [T, D] or [S, D]."""
        bias = self.joint_bias() if bias is None else bias
        if rows is not None:
            return self.proj(self._of_rows(x, pack, rows, bias).flatten(1))
        qkv = linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        if seen is not None:
            seen.append(qkv)
        out = packed_self_attention(
            qkv, cu_seqlens=pack.cu_seqlens, length=pack.length, max_length=pack.max_length, causal=self.causal
        )
        return self.proj(out.flatten(1))

    def joint_bias(self) -> Tensor | None:
        """The bias [3D] of queries, keys and values together, or None."""
        if self.q_bias is None or self.v_bias is None:
            return self.qkv.bias
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))

    def _of_rows(self, x: Tensor, pack: Pack, rows: Tensor, bias: Tensor | None) -> Tensor:
        dim, weight = x.shape[-1], self.qkv.weight
        q_bias, kv_bias = (None, None) if bias is None else (bias[:dim], bias[dim:])
        q = linear(x.index_select(0, rows), weight[:dim], q_bias).unflatten(-1, (self.num_heads, -1))
        k, v = linear(x, weight[dim:], kv_bias).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        return packed_attention(
            q, k, v, length=1, cu_seqlens_k=pack.cu_seqlens, length_k=pack.length, max_length_k=pack.max_length
        )


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))).   gelu: "erf" (exact), "tanh" (refit, 2.5e-5 from exact), "quick" (CLIP).

    recompute: the backward computes the hidden layer again, so that only x is kept for it.
    """

    def __init__(self, dim: int, hidden: int, gelu: str = "erf") -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)
        self.gelu = gelu
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, self.gelu, recompute=self.recompute)


class Block(nn.Module):
    """Pre-norm transformer block.

    forward(x, branch, pack) takes the residual stream and the branch the block before left to be added (None at first and
    after a block in fp8), and returns the same two, so that every addition is fused with the norm that follows it, and every
    parameter is used inside its own block. Adapters, residual included, stand where they are set: `adapter_pre_attn`,
    `adapter_pre_mlp`. layout, where the adapters run over frames: how x is laid out in them. rows: int [S], a token of each
    sequence, which alone leave the block, [S, D] both: what follows reads no others, so neither is their MLP computed. seen
    and bias: as Attention's.
    """

    adapter_pre_attn: nn.Module | None
    adapter_pre_mlp: nn.Module | None
    quantized: "QuantizedBlock | None" = None  # what runs in place of forward

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        qkv_bias: str = "qv",
        norm_eps: float = 1e-6,
        init_values: float = 0.0,
        drop_path: float = 0.0,
        gelu: str = "erf",
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.register_module("adapter_pre_attn", None)
        self.norm1 = LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias, causal)
        self.register_module("adapter_pre_mlp", None)
        self.norm2 = LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, hidden, gelu)
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values)) if init_values > 0 else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values)) if init_values > 0 else None
        self.drop_path = drop_path
        self.use_adapters = True

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        pack: Pack,
        layout: "FrameLayout | None" = None,
        rows: Tensor | None = None,
        seen: list[Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if self.quantized is not None:
            if rows is not None:
                raise ValueError(f"a block in {self.quantized.kind} computes all tokens; rows must be None")
            return self.quantized(self, x, branch, pack, layout, seen)
        x, branch = self._attended(x, branch, pack, layout, rows, seen, bias)
        layout = layout if rows is None else None
        with profiling.range("mlp"):
            x, h = self._normed(self.norm2, self.adapter_pre_mlp, x, branch, layout)
            return x, self._scaled(self.mlp(h), self.gamma_2, pack, rows)

    def forward_mean(
        self, x: Tensor, branch: Tensor | None, pack: Pack, layout: "FrameLayout | None", bias: Tensor | None
    ) -> Tensor:
        """The mean over each sequence of the stream that forward leaves, its branch added: [S, D] fp32, for inference.

        A mean of products is the product of the mean: fc2 takes one row a sequence. The pack's lengths must be equal.
        """
        assert pack.length is not None
        x, branch = self._attended(x, branch, pack, layout, None, None, bias)
        with profiling.range("mlp"):
            x, h = self._normed(self.norm2, self.adapter_pre_mlp, x, branch, layout)
            fc1, fc2 = self.mlp.fc1, self.mlp.fc2
            hidden = linear_gelu(h, fc1.weight, fc1.bias, self.mlp.gelu)
            return mean_with_product(x, hidden, pack.length, fc2.weight, fc2.bias, self.gamma_2)

    def _attended(
        self,
        x: Tensor,
        branch: Tensor | None,
        pack: Pack,
        layout: "FrameLayout | None",
        rows: Tensor | None,
        seen: list[Tensor] | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The stream, of the rows if only they go on, and attention's branch."""
        with profiling.range("attention"):
            x, h = self._normed(self.norm1, self.adapter_pre_attn, x, branch, layout)
            branch = self._scaled(self.attn(h, pack, rows, seen, bias), self.gamma_1, pack, rows)
        return x if rows is None else x.index_select(0, rows), branch

    def _normed(
        self,
        norm: LayerNorm,
        adapter: nn.Module | None,
        x: Tensor,
        branch: Tensor | None,
        layout: "FrameLayout | None",
    ) -> tuple[Tensor, Tensor]:
        """The stream with the branch added and the adapter applied, and its norm."""
        if not self.runs(adapter):
            return (x, norm(x)) if branch is None else norm.add(x, branch)
        x = self.adapted(adapter, x if branch is None else x + branch, layout)
        return x, norm(x)

    def runs(self, adapter: nn.Module | None) -> bool:
        """Whether this adapter of the block's is there and takes part."""
        return adapter is not None and self.use_adapters

    def adapted(self, adapter: nn.Module | None, x: Tensor, layout: "FrameLayout | None") -> Tensor:
        """x [T, D] through an adapter that runs, over the frames of a layout where there is one."""
        return adapter(x) if layout is None else adapter.run(x, layout)  # type: ignore[operator,misc,union-attr]  # one that runs

    def _scaled(self, branch: Tensor, gamma: Tensor | None, pack: Pack, rows: Tensor | None) -> Tensor:
        """LayerScale, and stochastic depth: the branch of a whole sequence dropped (Huang et al., ECCV 2016)."""
        if gamma is not None:
            branch = branch * gamma
        if self.training and self.drop_path > 0:
            keep = 1 - self.drop_path
            scale = branch.new_empty(pack.num_sequences, 1).bernoulli_(keep) / keep
            branch = branch * (pack.per_token(scale) if rows is None else scale)
        return branch


def mean_with_product(
    x: Tensor, hidden: Tensor, length: int, weight: Tensor, bias: Tensor | None, gamma: Tensor | None = None
) -> Tensor:
    """The mean over sequences of `length` tokens of x + gamma (hidden W^T + b), fp32.   x: [T, D]. hidden: [T, K]."""
    mean = segment_mean(hidden, length)
    with torch.autocast(x.device.type, enabled=False):
        product = F.linear(mean, weight.to(mean.dtype), None if bias is None else bias.to(mean.dtype))
    return segment_mean(x, length) + (product if gamma is None else product * gamma)


def is_bare(block: nn.Module) -> bool:
    """Whether a block is what this module makes, and nobody listens to what goes through it."""
    return (
        type(block) is Block
        and type(block.attn) is Attention
        and type(block.mlp) is Mlp
        and type(block.mlp.fc2) is Linear
        and block.quantized is None
        and not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())
    )


def joint_biases(blocks: nn.ModuleList) -> Sequence[Tensor | None]:
    """Every block's joint_bias, in two launches for all of them instead of two for each; None where a block makes its own.

    Only without gradients, and where the blocks hold their parameters themselves, on one device.
    """
    own: list[Tensor | None] = [None] * len(blocks)
    if torch.is_grad_enabled():
        return own
    pairs: list[tuple[Tensor, Tensor]] = []
    for block in blocks:
        if type(block) is not Block or type(block.attn) is not Attention or block.quantized is not None:
            return own  # sharded ones have a class of their own
        q_bias, v_bias = block.attn.q_bias, block.attn.v_bias
        if q_bias is None or v_bias is None or 3 * q_bias.numel() != block.attn.qkv.out_features:
            return own  # of partitioned ones nothing is there before the forward
        pairs.append((q_bias, v_bias))
    if len({(bias.device, bias.dtype) for pair in pairs for bias in pair}) != 1 or pairs[0][0].is_meta:
        return own
    none = torch.zeros_like(pairs[0][0])
    return torch.cat([part for q_bias, v_bias in pairs for part in (q_bias, none, v_bias)]).chunk(len(pairs))


def set_recompute(blocks: nn.ModuleList, enable: bool, what: str) -> bool:
    """Have the blocks keep less for the backward. Returns whether run_block is to recompute whole blocks."""
    if what not in ("block", "mlp"):
        raise ValueError(f'what must be "block" or "mlp", got {what!r}')
    for block in blocks:
        block.mlp.recompute = enable and what == "mlp"  # type: ignore[union-attr]  # blocks are Blocks
    return enable and what == "block"


def run_block(
    block: nn.Module, x: Tensor, branch: Tensor | None, pack: Pack, recompute: bool, *rest: Any
) -> tuple[Tensor, Tensor]:
    """block(x, branch, pack, *rest); with recompute only its inputs are kept for the backward."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, branch, pack, *rest, use_reentrant=False)
    return block(x, branch, pack, *rest)


def stream_blocks(
    blocks: Iterable[nn.Module], x: Tensor, pack: Pack, layout: "FrameLayout | None", last: int, recompute: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens [T, D], packed queries, keys and values [T, 3, H, d]) of each of the last blocks, as soon as it has run.

    recompute: as run_block has it.
    """
    stack = list(blocks)
    if not 1 <= last <= len(stack):
        raise ValueError(f"last must lie in 1..{len(stack)}, the blocks there are, got {last}")
    branch: Tensor | None = None
    for i, block in enumerate(stack):
        with profiling.range(f"block{i}"):
            if i < len(stack) - last:
                x, branch = run_block(block, x, branch, pack, recompute, layout)
                continue
            if recompute and torch.is_grad_enabled():
                x, qkv = checkpoint(_seen_block, block, x, branch, pack, layout, use_reentrant=False)
            else:
                x, qkv = _seen_block(block, x, branch, pack, layout)
            branch = None
        yield x, qkv
        del qkv  # free while the next block runs


def _seen_block(
    block: nn.Module, x: Tensor, branch: Tensor | None, pack: Pack, layout: "FrameLayout | None"
) -> tuple[Tensor, Tensor]:
    """The tokens after a block, and its packed queries, keys and values."""
    seen: list[Tensor] = []
    x, branch = block(x, branch, pack, layout, None, seen)
    return x if branch is None else x + branch, seen[0]


class Constant(nn.Module):
    """An fp32 constant that moves with the model but keeps its precision under model.to(dtype).

    It is stored as integers, which nn.Module.to(dtype) leaves alone, and not in the state dict: VideoMAE's files have no
    positions either.
    """

    bits: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("bits", values.float().view(torch.int32), persistent=False)

    def forward(self) -> Tensor:
        return self.bits.view(torch.float32)


def pixel_affine(mean: Sequence[float], std: Sequence[float]) -> Constant:
    """fp32 [2, C]: the scale and shift that normalise uint8 pixels."""
    means, stds = torch.tensor(mean), torch.tensor(std)
    return Constant(torch.stack((1 / (255 * stds), -means / stds)))


def sinusoid_positions(num_tokens: int, dim: int) -> Tensor:
    """Fixed sinusoid table of VideoMAE over the flattened token id: sin(id / 10000^(2 floor(j/2) / D)), cos for odd j.

    Returns fp32 [num_tokens, dim], computed in float64.
    """
    columns = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(num_tokens, dtype=torch.float64)[:, None] / 10000 ** (2 * (columns // 2) / dim)
    return torch.where(columns % 2 == 0, angle.sin(), angle.cos()).float()


def resize_positions(table: Tensor, native: Grid, grid: Grid) -> Tensor:
    """Positions of another grid: the native table, trilinearly resized.   table: [t*h*w, D] over `native`."""
    if native == grid:
        return table
    volume = table.reshape(1, *native, -1).movedim(-1, 1)
    return F.interpolate(volume, size=grid, mode="trilinear", align_corners=False).movedim(1, -1).flatten(0, 3)
