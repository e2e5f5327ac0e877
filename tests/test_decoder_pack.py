"""What the decoder sees: visible tokens first, then the removed ones, whatever their numbers."""

import pytest
import torch

from mmfast.decoder_pack import decoder_pack
from mmfast.masks import pack_masks, sample_pack, tube_masks

EQUAL = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]]).bool()
UNEQUAL = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]]).bool()


@pytest.mark.parametrize("mask", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_rows_are_visible_then_removed(mask: torch.Tensor) -> None:
    visible = pack_masks(mask)
    plan = decoder_pack(visible, 6)
    first, seen, made = 0, [], []
    for clip, removed in enumerate(mask):
        kept, gone = (~removed).nonzero()[:, 0].tolist(), removed.nonzero()[:, 0].tolist()
        assert plan.pack.keep_idx[first : first + 6].tolist() == kept + gone
        seen += range(first, first + len(kept))
        made += range(first + len(kept), first + 6)
        first += 6
        assert plan.clip_idx[len(made) - 1] == clip
    assert plan.place.tolist() == seen
    assert plan.rows.tolist() == made
    assert plan.token_idx.tolist() == mask.nonzero()[:, 1].tolist()
    assert plan.source[plan.place.long()].tolist() == list(range(len(seen)))
    assert bool((plan.source[plan.rows.long()] == -1).all())
    assert plan.pack.cu_seqlens.tolist() == list(range(0, first + 1, 6))
    assert (plan.length, plan.pack.length) == ((3, 6) if mask is EQUAL else (None, None))


def test_decode_mask_leaves_removed_tokens_out_altogether() -> None:
    skipped = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    plan = decoder_pack(pack_masks(EQUAL), 6, skipped)
    assert plan.pack.keep_idx.tolist() == [0, 3, 5, 2, 4, 2, 3, 4, 0, 5]
    assert plan.token_idx.tolist() == [2, 4, 0, 5]
    assert (plan.length, plan.pack.length) == (2, 5)


def test_decode_mask_of_unequal_counts() -> None:
    plan = decoder_pack(pack_masks(EQUAL), 6, torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]]).bool())
    assert plan.length is None
    assert plan.pack.cu_seqlens.tolist() == [0, 3, 9]
    assert plan.rows.tolist() == [6, 7, 8]


def test_a_sampled_pack_gives_the_plan_of_its_mask() -> None:
    sampled = decoder_pack(sample_pack(3, 2, (2, 3, 4), 0.5, seed=7), 24)
    given = decoder_pack(pack_masks(tube_masks(3, 2, (2, 3, 4), 0.5, seed=7)), 24)
    for name in ("source", "place", "rows", "token_idx", "clip_idx"):
        torch.testing.assert_close(getattr(sampled, name), getattr(given, name), msg=lambda m, n=name: f"{n}: {m}")
