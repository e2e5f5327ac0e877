"""Which tokens a masked autoencoder's decoder sees and which it predicts: the counterpart of a Pack."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast_kernels.kept import kept_ids

from .masks import Pack


@dataclass(frozen=True)
class DecoderPack:
    """Sequences of the decoder: the visible tokens of a view, then the removed ones it is to predict (M in all).

    pack: of these sequences, R rows in all; its keep_idx are the token ids of the rows.
    source: int32 [R], the row among the visible tokens, -1 for a removed one.
    place: int32 [Tv], the row of each visible token.
    rows: int32 [M], the rows of the removed tokens. token_idx, clip_idx: int32 [M], their ids and clips.
    length: removed tokens of every sequence where all have equally many, else None.
    """

    pack: Pack
    source: Tensor
    place: Tensor
    rows: Tensor
    token_idx: Tensor
    clip_idx: Tensor
    length: int | None


def decoder_pack(visible: Pack, tokens: int, decode_mask: Tensor | None = None) -> DecoderPack:
    """The decoder's pack of the views that keep `visible` of `tokens` tokens.

    decode_mask: bool [S, N], True = not decoded (VideoMAE v2's dual masking); None decodes every removed token.
    Waits for the device only where counts are not known from the shapes: unequal views, or a decode_mask. While torch.compile
    traces there are no counts: the plan then has no common length.
    """
    length: int | None = None
    longest = tokens
    if visible.length is not None and decode_mask is None:
        removed = _removed_of_equal(visible, tokens)
        longest = removed.shape[1]
        length = longest
        removed_starts = torch.arange(visible.num_sequences + 1, dtype=torch.int32, device=removed.device) * longest
        token_idx = removed.flatten()
    else:
        chosen = _removed(visible, tokens)
        if decode_mask is not None:
            chosen = chosen & ~decode_mask
        counts = chosen.sum(1)
        removed_starts = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32)
        if not torch.compiler.is_compiling():
            lengths = counts.tolist()
            longest = max(lengths, default=0)
            length = longest if len(set(lengths)) <= 1 else None
        token_idx = kept_ids(chosen.logical_not())
    removed_of = Pack(token_idx, removed_starts, visible.clip_of, length, longest)
    return _join(visible, removed_of)


def _removed_of_equal(visible: Pack, tokens: int) -> Tensor:
    """int32 [S, N - n]: ids of the removed tokens, ascending. Their number is known, so nothing is read back."""
    assert visible.length is not None
    order = _removed(visible, tokens).to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, visible.length :].to(torch.int32)


def _removed(visible: Pack, tokens: int) -> Tensor:
    """bool [S, N], True = removed."""
    sequence = visible.per_token(torch.arange(visible.num_sequences, device=visible.keep_idx.device))
    removed = torch.ones(visible.num_sequences * tokens, dtype=torch.bool, device=visible.keep_idx.device)
    removed = removed.scatter(0, sequence * tokens + visible.keep_idx, False)
    return removed.view(visible.num_sequences, tokens)


def _join(visible: Pack, removed: Pack) -> DecoderPack:
    device = visible.keep_idx.device
    place = torch.arange(visible.num_tokens, dtype=torch.int32, device=device)
    place = place + visible.per_token(removed.cu_seqlens[:-1])
    rows = torch.arange(removed.num_tokens, dtype=torch.int32, device=device)
    rows = rows + removed.per_token(visible.cu_seqlens[1:])
    total = visible.num_tokens + removed.num_tokens
    ids = torch.arange(visible.num_tokens, dtype=torch.int32, device=device)
    source = torch.full((total,), -1, dtype=torch.int32, device=device).scatter(0, place.long(), ids)
    token_idx = torch.zeros(total, dtype=torch.int32, device=device)
    token_idx = token_idx.scatter(0, place.long(), visible.keep_idx).scatter(0, rows.long(), removed.keep_idx)
    both = visible.length is not None and removed.length is not None
    pack = Pack(
        token_idx,
        visible.cu_seqlens + removed.cu_seqlens,
        visible.clip_of,
        (visible.length or 0) + (removed.length or 0) if both else None,
        visible.max_length + removed.max_length,
    )
    return DecoderPack(pack, source, place, rows, removed.keep_idx, removed.clip_idx, removed.length)
