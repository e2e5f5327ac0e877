"""CLIP's text tower, packed: every text at its true length, which a causal tower that reads the last token allows exactly."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast_kernels.linear import linear

from .clip_blocks import AdapterPlacement, Transformer, normal
from .clip_config import CLIPConfig
from .layers import LayerNorm
from .masks import Pack, pack_masks
from .vit import PackedTokens


class CLIPText(nn.Module):
    """The causal transformer of CLIP (2103.00020).

    token_ids: int [L, up to context_length]; the largest id of a row, at its first place, ends the text, and what stands
    behind it is never computed. adapters: blocks with adapters. extra_blocks: blocks behind the last that forward does not
    run, such as M2-CLIP's for masked words.
    """

    def __init__(self, config: CLIPConfig, adapters: AdapterPlacement | None = None, extra_blocks: int = 0) -> None:
        super().__init__()
        self.config = config
        dim = config.text_width
        self.token_embedding = nn.Embedding(config.vocab_size, dim)
        self.positional_embedding = normal(config.context_length, dim, std=0.01)
        self.transformer = Transformer(
            dim,
            config.text_depth,
            config.text_num_heads,
            config.hidden("text"),
            norm_eps=config.norm_eps,
            gelu=config.gelu,
            causal=True,
            adapters=adapters,
            extra=extra_blocks,
        )
        self.ln_final = LayerNorm(dim, eps=config.norm_eps)
        self.text_projection = normal(dim, config.embed_dim, std=dim**-0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, token_ids: Tensor, pack: Pack | None = None) -> Tensor:
        """Text features [L, E].   pack: of these ids by `pack`, when it is at hand."""
        pack = self.pack(token_ids) if pack is None else pack
        x, branch = self._encode(token_ids, pack, pack.cu_seqlens[1:] - 1)
        return self._project(x + branch)

    def forward_tokens(self, token_ids: Tensor, pack: Pack | None = None) -> PackedTokens:
        """Every token up to the end of its text, before ln_final: what `features` and `unpack` take."""
        pack = self.pack(token_ids) if pack is None else pack
        x, branch = self._encode(token_ids, pack)
        return PackedTokens(x + branch, pack)

    def features(self, tokens: PackedTokens) -> Tensor:
        """Text features [L, E] of the tokens of `forward_tokens`."""
        return self._project(tokens.tokens.index_select(0, tokens.pack.cu_seqlens[1:] - 1))

    def unpack(self, tokens: PackedTokens, context: int | None = None) -> Tensor:
        """Packed tokens in the places of their ids: [L, context, W], 0 behind the end of a text."""
        context = self.config.context_length if context is None else context
        pack, x = tokens.pack, tokens.tokens
        place = pack.clip_idx.long() * context + pack.keep_idx
        rows = x.new_zeros(pack.num_sequences * context, x.shape[1]).index_copy(0, place, x)
        return rows.unflatten(0, (pack.num_sequences, context))

    def pack(self, token_ids: Tensor) -> Pack:
        """One sequence a text, from its first token to the one that ends it.

        Of ids on a GPU it waits for the device, so make it of those on the CPU, or once. Raises ValueError or TypeError for
        what are no token ids.
        """
        self._check(token_ids)
        ends = token_ids.argmax(-1, keepdim=True)
        behind = torch.arange(token_ids.shape[1], device=token_ids.device) > ends
        return pack_masks(behind).to(self.text_projection.device)

    def set_grad_checkpointing(self, enable: bool = True, what: str = "block") -> None:
        """As MaskedViT's."""
        self.transformer.set_grad_checkpointing(enable, what)

    def _encode(self, token_ids: Tensor, pack: Pack, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        place = pack.clip_idx.long() * token_ids.shape[1] + pack.keep_idx
        ids = token_ids.to(place.device, non_blocking=True).flatten().index_select(0, place)
        x = self.token_embedding(ids) + F.embedding(pack.keep_idx, self.positional_embedding)
        return self.transformer(x, pack, None, rows)

    def _project(self, last: Tensor) -> Tensor:
        return linear(self.ln_final(last, last.dtype), self.text_projection.t())

    def _check(self, token_ids: Tensor) -> None:
        context, vocabulary = self.config.context_length, self.config.vocab_size
        if not isinstance(token_ids, Tensor):
            raise TypeError(f"token_ids must be an integer tensor [L, {context}], got {type(token_ids).__name__}")
        if token_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"token_ids must be int64 or int32, got {token_ids.dtype}")
        if token_ids.dim() != 2 or not 1 <= token_ids.shape[1] <= context:
            raise ValueError(f"token_ids must be [L, up to {context}], got {tuple(token_ids.shape)}")
        if torch.compiler.is_compiling() or not token_ids.numel():
            return
        lowest, highest = torch.stack(token_ids.aminmax()).tolist()
        if lowest < 0 or highest >= vocabulary:
            raise ValueError(f"token_ids must lie in 0..{vocabulary - 1}, got {lowest}..{highest}")
