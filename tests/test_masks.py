"""Masks: what is removed, how often, and that nothing but (seed, clip id, view) decides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast import pack_masks, random_masks, running_cell_masks, sample_pack, tube_masks
from mmfast.masks import join_packs, kept_per_slot

GRID = (8, 14, 14)


@pytest.mark.parametrize(("ratio", "kept"), [(0, 1568), (0.5, 784), (0.75, 392), (0.9, 160)])
@pytest.mark.parametrize("masks", [tube_masks, random_masks])
def test_published_counts(masks, ratio: float, kept: int) -> None:
    mask = masks(2, 3, GRID, ratio)
    assert mask.shape == (2, 3, 1568)
    assert bool(((~mask).sum(-1) == kept).all())


def test_exact_counts_by_keep() -> None:
    assert bool(((~tube_masks(2, 1, GRID, keep=48)).sum(-1) == 384).all())


def test_a_tube_is_removed_in_every_slot() -> None:
    slots = tube_masks(3, 2, GRID).view(3, 2, 8, 196)
    assert bool((slots == slots[:, :, :1]).all())


def test_random_slots_differ_and_keep_equally_many() -> None:
    slots = random_masks(3, 2, GRID).view(3, 2, 8, 196)
    assert bool(((~slots).sum(-1) == 49).all())
    assert not bool((slots[:, :, 0] == slots[:, :, 1]).all())


def test_views_clips_and_seeds_differ() -> None:
    mask = tube_masks(2, 2, GRID)
    other = tube_masks(2, 2, GRID, seed=1)
    assert len({tuple(m.tolist()) for m in (*mask.flatten(0, 1), *other.flatten(0, 1))}) == 8


@given(
    ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
    views=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=30, deadline=None)
def test_a_mask_depends_on_seed_clip_and_view_alone(ids: list[int], views: int, seed: int) -> None:
    together = tube_masks(len(ids), views, (2, 5, 7), 0.6, seed=seed, clip_ids=ids)
    for row, clip in enumerate(ids):
        alone = tube_masks(1, 4, (2, 5, 7), 0.6, seed=seed, clip_ids=[clip])
        assert torch.equal(together[row], alone[0, :views])


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.floats(0, 0.999)
)
@settings(max_examples=50, deadline=None)
def test_sampled_pack_equals_pack_of_sampled_masks(b: int, p: int, t: int, h: int, w: int, ratio: float) -> None:
    sampled = sample_pack(b, p, (t, h, w), ratio, seed=3)
    given_ = pack_masks(tube_masks(b, p, (t, h, w), ratio, seed=3))
    assert sampled.length == given_.length == t * kept_per_slot((t, h, w), ratio)
    for name in ("keep_idx", "cu_seqlens", "clip_of"):
        assert torch.equal(getattr(sampled, name), getattr(given_, name)), name
        assert getattr(sampled, name).dtype == torch.int32


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_pack_of_any_masks_holds_what_stays(b: int, p: int, n: int, seed: int) -> None:
    mask = torch.rand(b, p, n, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[..., seed % n] = False
    pack = pack_masks(mask)
    rebuilt = torch.ones(b * p, n, dtype=torch.bool)
    for s, (start, end) in enumerate(zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], strict=True)):
        rebuilt[s, pack.keep_idx[start:end].long()] = False
        assert int(pack.clip_of[s]) == s // p
        assert bool((pack.clip_idx[start:end] == s // p).all())
    assert torch.equal(rebuilt.view(b, p, n), mask)
    assert pack.max_length == int((~mask).sum(-1).max())


def test_joined_packs_number_clips_through() -> None:
    a, b = sample_pack(2, 2, (1, 2, 2), keep=3), sample_pack(1, 1, (1, 3, 3), keep=5)
    joined = join_packs([a, b], [2, 1])
    assert joined.length is None
    assert joined.max_length == 5
    assert joined.cu_seqlens.tolist() == [0, 3, 6, 9, 12, 17]
    assert joined.clip_of.tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(mask_ratio=1.0), r"mask_ratio must lie in \[0, 1\), got 1.0"),
        (dict(mask_ratio=-0.5), "mask_ratio"),
        (dict(keep=0), r"keep must lie in 1\.\.196"),
        (dict(keep=197), "got 197"),
        (dict(views=0), "views"),
        (dict(clip_ids=[1]), "clip_ids must be 2 integers"),
        (dict(clip_ids=torch.rand(2)), "float32"),
        (dict(seed=-1), "seed"),
        (dict(seed=2**64), "seed"),
        (dict(grid=(0, 14, 14)), "grid"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tube_masks(2, **arguments)


def test_kept_ids_pass_opcheck() -> None:
    mask = tube_masks(2, 2, (2, 3, 3), 0.5)
    torch.library.opcheck(torch.ops.mmfast.kept_ids.default, (mask,))


@pytest.mark.parametrize(("ratio", "left"), [(0.0, 4), (0.25, 3), (0.5, 2), (0.75, 1)])
def test_running_cells_cover_every_place_evenly(ratio: float, left: int) -> None:
    decoded = ~running_cell_masks(5, 2, (4, 6, 8), ratio, seed=3).view(5, 2, 4, 6, 8)
    cells = decoded.unfold(3, 2, 2).unfold(4, 2, 2).sum((-1, -2))
    assert bool((cells == left).all()), "tokens decoded in each 2 x 2 cell of each slot"
    assert bool((decoded.sum(2) == left).all()), "slots of four in which each place is decoded"


def test_running_cells_start_where_the_clip_says() -> None:
    masks = running_cell_masks(64, 1, (2, 4, 4), 0.5, seed=1)
    torch.testing.assert_close(running_cell_masks(2, 1, (2, 4, 4), 0.5, seed=1, clip_ids=[63, 7]), masks[[63, 7]])
    assert len({tuple(m.flatten().tolist()) for m in masks}) > 3


def test_running_cells_refuse_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"mask_ratio must lie in \[0, 1\), got 1"):
        running_cell_masks(1, mask_ratio=1)
    with pytest.raises(ValueError, match="grid must be three positive sizes"):
        running_cell_masks(1, grid=(2, 0, 2))
