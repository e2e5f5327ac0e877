"""Masked words of captions told from the video: only masked tokens are computed, for each query stands alone.

x = adapter(state of a masked token before ln_final)          k, v from the norm of the clip's frame features
x = x + attention(norm1(x), norm1(frames))                    logits = decoder(LN(gelu(dense(ln_final(x + mlp(norm2(x)))))))
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast_kernels.attention import packed_attention
from mmfast_kernels.linear import linear

from .layers import Block, LayerNorm, Linear
from .m2clip_losses import IGNORED

_BERT_EPS = 1e-12  # of BERT's head, which this one has the form of


class MaskedRows(NamedTuple):
    """The masked tokens of a batch, of clips one after another.

    rows: int64 [M], their rows in the packed tokens. labels: int64 [M], the words' ids. clips: int64 [C], those that have
    any. cu_seqlens: int32 [C+1], where those of each begin. longest: the most that one has.
    """

    rows: Tensor
    labels: Tensor
    clips: Tensor
    cu_seqlens: Tensor
    longest: int

    def to(self, device: torch.device) -> "MaskedRows":
        place = lambda t: t.to(device, non_blocking=True)
        return MaskedRows(place(self.rows), place(self.labels), place(self.clips), place(self.cu_seqlens), self.longest)


class WordTransform(nn.Module):
    """Dense, GELU, norm, as BERT's head has them and by its names."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense = Linear(dim, dim)
        self.LayerNorm = LayerNorm(dim, eps=_BERT_EPS)
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)), x.dtype)


class WordHead(nn.Module):
    """Logits over V words of states [..., W]."""

    def __init__(self, dim: int, num_words: int) -> None:
        super().__init__()
        self.transform = WordTransform(dim)
        self.decoder = Linear(dim, num_words, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_words))
        nn.init.normal_(self.decoder.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.transform(x), self.decoder.weight, self.bias)


def masked_rows(mlm_labels: Tensor, unique_ids: Tensor, row_of: Tensor, num_words: int) -> MaskedRows:
    """Where the masked tokens lie in the packed unique texts.   All on the CPU.

    mlm_labels: int64 [B, context]. unique_ids: [U, context]. row_of: int64 [B], the text of each clip.
    Raises ValueError for a word id out of range, and for one behind the end of its text.
    """
    clip, place = (mlm_labels != IGNORED).nonzero().unbind(1)
    labels = mlm_labels[clip, place]
    if len(labels):
        low, high = torch.stack(labels.aminmax()).tolist()
        if low < 0 or high >= num_words:
            raise ValueError(f"mlm_labels must be {IGNORED} or lie in 0..{num_words - 1}, got {low}..{high}")
    ends = unique_ids.argmax(-1)
    text = row_of[clip]
    if bool((place > ends[text]).any()):
        raise ValueError("mlm_labels must not mark a place behind the end of its text")
    starts = F.pad((ends + 1).cumsum(0), (1, 0))
    clips, counts = clip.unique_consecutive(return_counts=True)
    cu_seqlens = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return MaskedRows(starts[text] + place, labels, clips, cu_seqlens, int(counts.max()) if len(counts) else 0)


def attend_frames(block: nn.Module, x: Tensor, frames: Tensor, words: MaskedRows) -> Tensor:
    """A text block whose attention goes to the clip's frames instead.   x: [M, W]. frames: [C, F, W]. Returns [M, W]."""
    assert isinstance(block, Block)
    attn = block.attn
    weight, bias = attn.qkv.weight, attn.qkv.bias
    if block.adapter_pre_attn is not None and block.use_adapters:
        x = block.adapter_pre_attn(x)
    dim, num_frames = x.shape[-1], frames.shape[1]
    q = linear(block.norm1(x), weight[:dim], bias[:dim]).unflatten(-1, (attn.num_heads, -1))
    kv = linear(block.norm1(frames.flatten(0, 1)), weight[dim:], bias[dim:]).unflatten(-1, (2, attn.num_heads, -1))
    k, v = kv.unbind(1)
    out = packed_attention(q, k, v, cu_seqlens=words.cu_seqlens, max_length=words.longest, length_k=num_frames)
    x = x + attn.proj(out.flatten(1))
    if block.adapter_pre_mlp is not None and block.use_adapters:
        x = block.adapter_pre_mlp(x)
    return x + block.mlp(block.norm2(x))
