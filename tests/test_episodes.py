"""Episodes, their evaluation from cached features, fresh masks."""

from collections import Counter
from typing import Any

import pytest
import torch
from episode_makers import LABELS, features, small
from makers import tiny_config
from sklearn.linear_model import LogisticRegression as SklearnLogistic
from torch import Tensor

from mmfast import MaskedViT, tube_masks
from mmfast.episodes import EpisodeResult, Episodes, encode_views, evaluate_episodes, evaluate_fresh
from mmfast.fewshot import Prototype

SUPPORT = [4, 11, 80, 66, 40, 12]
QUERY = [88, 32, 67, 39, 24, 45, 10, 87, 68, 33, 75, 19]


def drawn(episodes: Episodes) -> dict[int, list[list[int]]]:
    return {
        number: [support, query]
        for batch in episodes.batches(4)
        for number, support, query in zip(
            batch.number.tolist(), batch.support.tolist(), batch.query.tolist(), strict=True
        )
    }


# -- which clips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [False, True])
def test_an_episode_has_n_classes_in_order_and_no_clip_twice(reference: bool) -> None:
    for support, query in small(reference=reference):
        classes = LABELS[support].view(3, 2)
        assert (classes == classes[:, :1]).all()
        assert len(set(classes[:, 0].tolist())) == 3
        assert torch.equal(LABELS[query].view(3, 4), classes[:, :1].expand(3, 4))
        assert len({*support.tolist(), *query.tolist()}) == 3 * 6


def test_labels_within_an_episode_go_class_by_class() -> None:
    (batch,) = small(episodes=2).batches(2)
    assert batch.support_labels.tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    assert batch.query_labels.tolist() == [[0] * 4 + [1] * 4 + [2] * 4] * 2


@pytest.mark.parametrize("reference", [False, True])
def test_shards_have_each_episode_once_and_unchanged(reference: bool) -> None:
    whole = small(reference=reference)
    parts = [drawn(whole.shard(rank, 3)) for rank in range(3)]
    assert sum(map(len, parts)) == len(whole) == 11
    assert parts[0] | parts[1] | parts[2] == drawn(small(reference=reference))


def test_an_episode_does_not_depend_on_how_many_there_are() -> None:
    assert drawn(small(episodes=3)).items() <= drawn(small(episodes=11)).items()


def test_more_ranks_than_episodes() -> None:
    assert [len(small(episodes=2).shard(rank, 4)) for rank in range(4)] == [1, 1, 0, 0]


def test_episodes_and_seeds_differ() -> None:
    first, second = drawn(small()), drawn(small(seed=6))
    seen = [str(e) for e in [*first.values(), *second.values()]]
    assert len(set(seen)) == len(seen)


def test_episodes_are_the_same_in_every_version() -> None:
    """Written down once: published accuracies must stay reproducible."""
    support, query = next(iter(small()))
    assert support.tolist() == SUPPORT
    assert query.tolist() == QUERY


def test_clips_are_drawn_evenly() -> None:
    counts = Counter(i for support, query in small(episodes=700) for i in (*support.tolist(), *query.tolist()))
    expected = 700 * 3 * 6 / len(LABELS)
    assert len(counts) == len(LABELS)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_reference_order_uses_a_class_up_before_it_repeats() -> None:
    seen: dict[int, list[int]] = {}
    for support, query in small(reference=True, episodes=60):
        for c, clips in enumerate(torch.cat((support.view(3, 2), query.view(3, 4)), 1).tolist()):
            seen.setdefault(int(LABELS[support.view(3, 2)[c, 0]]), []).extend(clips)
    for clips in seen.values():
        walks = [clips[i : i + 12] for i in range(0, len(clips), 12)]  # 13 clips give two steps of 6, then a new order
        assert all(len(set(walk)) == len(walk) for walk in walks)
        assert len({tuple(walk) for walk in walks}) == len(walks) > 1


def test_names_are_classes_too() -> None:
    names = ["cut", None, "pour", "cut", "pour", -1, "cut", "pour"]
    episodes = Episodes(names, n_way=2, k_shot=1, n_query=2, episodes=4)
    assert episodes.classes == ["cut", "pour"]
    assert {i for s, q in episodes for i in (*s.tolist(), *q.tolist())} == {0, 2, 3, 4, 6, 7}


def test_small_classes_are_refused_by_name() -> None:
    labels = [0] * 9 + [1] * 3 + [2] * 9 + [7] * 5
    with pytest.raises(ValueError, match=r"at least k_shot \+ n_query = 6 clips.* too few in wash \(3\), 7 \(5\)\."):
        Episodes(labels, n_way=2, k_shot=1, n_query=5, names={1: "wash"})
    with pytest.raises(ValueError, match=r"too few in wash \(3\), 7 \(5\)"):
        Episodes(labels, n_way=2, k_shot=1, n_query=5, names=["cut", "wash", "pour"])


def test_small_classes_are_left_out_on_request() -> None:
    labels = [0] * 9 + [1] * 3 + [2] * 9
    episodes = Episodes(labels, n_way=2, k_shot=1, n_query=5, episodes=5, drop_small=True)
    assert (episodes.classes, episodes.dropped) == ([0, 2], {"1": 3})
    with pytest.raises(ValueError, match="at least n_way = 3 classes of 6 clips or more, got 2"):
        Episodes(labels, n_way=3, k_shot=1, n_query=5, drop_small=True)


@pytest.mark.parametrize("change", [{"n_way": 0}, {"k_shot": 0}, {"n_query": 0}, {"episodes": -1}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be at least"):
        small(**change)


def test_places_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="rank must lie in"):
        small().shard(2, 2)
    with pytest.raises(ValueError, match="size must be at least 1"):
        next(small().batches(0))


# -- accuracy ---------------------------------------------------------------------------------------------------


def test_accuracy_is_that_of_a_loop_over_episodes_with_scikit_learn() -> None:
    known, episodes = features(), small()
    expected = []
    for support, query in episodes:
        labels = torch.arange(3).repeat_interleave(2)
        head = SklearnLogistic(max_iter=5000, tol=1e-10).fit(known[support, 0].double().numpy(), labels.numpy())
        each = [torch.from_numpy(head.predict_proba(known[query, v].double().numpy())) for v in range(3)]
        guess = torch.stack(each).mean(0).argmax(1)
        expected.append(int((guess == torch.arange(3).repeat_interleave(4)).sum()))
    result = evaluate_episodes(known[:, 0], known, episodes, batch=4)
    assert result.correct.tolist() == expected
    assert min(expected) < max(expected) <= result.queries == 12


def test_mean_and_errors_are_the_populations() -> None:
    result = EpisodeResult(torch.arange(4), torch.tensor([1, 2, 3, 6]), 10)
    assert result.mean == pytest.approx(0.3)
    assert result.std == pytest.approx((0.14 / 4) ** 0.5)
    assert result.standard_error == pytest.approx((0.14 / 4) ** 0.5 / 2)
    assert result.confidence == pytest.approx(1.96 * (0.14 / 4) ** 0.5 / 2)
    assert str(result) == "30.00 +- 9.35 % (standard error) over 4 episodes"


def test_merged_shards_equal_the_whole() -> None:
    known, episodes = features(), small()
    whole = evaluate_episodes(known[:, 0], known, episodes)
    parts = [evaluate_episodes(known[:, 0], known, episodes.shard(rank, 14), batch=2) for rank in range(14)]
    merged = EpisodeResult.merge(reversed(parts))
    assert torch.equal(merged.number, whole.number)
    assert torch.equal(merged.correct, whole.correct)
    assert (merged.mean, merged.standard_error) == (whole.mean, whole.standard_error)
    assert whole.gather() is whole


def test_an_episode_counted_twice_is_refused() -> None:
    part = EpisodeResult(torch.tensor([0, 3]), torch.tensor([1, 1]), 12)
    with pytest.raises(ValueError, match="got 3 twice"):
        EpisodeResult.merge([part, EpisodeResult(torch.tensor([3]), torch.tensor([1]), 12)])
    with pytest.raises(ValueError, match="same episodes"):
        EpisodeResult.merge([part, EpisodeResult(torch.tensor([5]), torch.tensor([1]), 10)])


def test_all_views_of_a_support_clip_can_be_supports() -> None:
    known, episodes = features(), small(episodes=3)
    result = evaluate_episodes(known, known, episodes, head=Prototype())
    means = evaluate_episodes(known.mean(1), known, episodes, head=Prototype())
    first = evaluate_episodes(known[:, 0], known, small(episodes=40), head=Prototype())
    every = evaluate_episodes(known, known, small(episodes=40), head=Prototype())
    assert torch.equal(result.correct, means.correct)
    assert not torch.equal(first.correct, every.correct)


def test_features_of_other_clips_are_refused() -> None:
    known = features()
    with pytest.raises(ValueError, match=r"query_features must be \[91, P, D\]"):
        evaluate_episodes(known[:, 0], known[:-1], small())
    with pytest.raises(ValueError, match=r"query_features must be \[91, P, D\]"):
        evaluate_episodes(known[:, 0], known[:, 0], small())
    with pytest.raises(ValueError, match=r"support_features must be \[91, 12\]"):
        evaluate_episodes(known[:-1, 0], known, small())


# -- features ---------------------------------------------------------------------------------------------------


class Clips(torch.utils.data.Dataset[dict[str, Any]]):
    """Noise, one clip an item; those of `broken` are skipped, as ClipDataset does."""

    def __init__(self, labels: Tensor, broken: tuple[int, ...] = ()) -> None:
        self.labels, self.broken = labels, broken

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        make = torch.Generator().manual_seed(i)
        pixels = torch.randint(0, 256, (3, 4, 32, 32), dtype=torch.uint8, generator=make)
        item = {"clip_id": 100 + i, "label": int(self.labels[i]), "rgb": pixels, "broken": int(i in self.broken)}
        return item | ({"skipped": True} if i in self.broken else {})


class Counting(MaskedViT):
    """Counts the (clip, view) that it encodes."""

    seen = 0

    def encode(self, video: Tensor, mask: Any = None) -> Tensor:
        self.seen += mask.num_sequences
        assert not self.training
        return super().encode(video, mask)


def model() -> Counting:
    torch.manual_seed(0)
    return Counting(tiny_config())


def test_every_clip_and_view_is_encoded_once() -> None:
    net, clips = model(), Clips(LABELS)
    cached = encode_views(net, clips, views=3, mask_ratio=0.5, seed=9, batch_size=10, progress=False)
    assert net.seen == cached.encoded == len(LABELS) * 3
    result = cached.evaluate(Episodes(cached.labels, 3, 2, 4, episodes=30))
    assert net.seen == len(LABELS) * 3
    assert len(result.number) == 30
    assert net.training


def test_masks_follow_from_seed_clip_and_view_alone() -> None:
    net, clips = model(), Clips(LABELS[:9])
    cached = encode_views(net, clips, views=2, mask_ratio=0.5, seed=9, batch_size=4, progress=False)
    masks = tube_masks(1, 2, (2, 2, 2), 0.5, seed=9, clip_ids=[104])
    net.eval()
    with torch.no_grad():
        expected = MaskedViT.encode(net, clips[4]["rgb"][None], masks)[0]
    torch.testing.assert_close(cached.features[4], expected, rtol=1e-4, atol=1e-5)
    assert (cached.features[:, 0] - cached.features[:, 1]).abs().max() > 1e-3


def test_clips_that_cannot_be_read_have_no_row() -> None:
    cached = encode_views(model(), Clips(LABELS[:9], broken=(0, 5)), 1, 0.5, batch_size=3, progress=False)
    assert cached.clip_ids.tolist() == [101, 102, 103, 104, 106, 107, 108]
    assert cached.labels.tolist() == LABELS[[1, 2, 3, 4, 6, 7, 8]].tolist()
    assert (len(cached.features), cached.left_out, cached.encoded) == (7, 2, 7)


def test_an_empty_data_set_has_no_features() -> None:
    cached = encode_views(model(), Clips(LABELS[:0]), views=2, progress=False)
    assert cached.features.shape == (0, 2, 64)


def test_fresh_masks_are_drawn_for_every_episode() -> None:
    net, clips, episodes = model(), Clips(LABELS), small(episodes=4)
    whole = evaluate_fresh(net, clips, episodes, views=3, mask_ratio=0.5, progress=False)
    assert net.seen == 4 * (3 * 2 * 1 + 3 * 4 * 3)
    parts = [evaluate_fresh(net, clips, episodes.shard(r, 2), 3, 0.5, batch=1, progress=False) for r in (0, 1)]
    assert torch.equal(EpisodeResult.merge(parts).correct, whole.correct)


def test_fresh_masks_of_one_clip_differ_between_episodes() -> None:
    net, seen = model(), []
    net.encode = lambda video, pack: seen.append(pack.keep_idx.tolist()) or torch.zeros(pack.num_sequences, 64)
    episodes = Episodes([0] * 2, n_way=1, k_shot=1, n_query=1, episodes=12)
    evaluate_fresh(net, Clips(torch.tensor([0, 0])), episodes, 1, 0.75, head=Prototype(), progress=False)
    assert len({str(kept) for kept in seen}) > 3


def test_fresh_masks_need_every_clip() -> None:
    with pytest.raises(ValueError, match="dataset has 1 clips of episode 0 that cannot be read"):
        evaluate_fresh(model(), Clips(torch.zeros(3), broken=(1,)), Episodes([0] * 3, 1, 1, 2), 1, 0.5, progress=False)
    with pytest.raises(ValueError, match="dataset must have 91 clips"):
        evaluate_fresh(model(), Clips(LABELS[:5]), small(), progress=False)


@pytest.mark.parametrize("change", [{"views": 0}, {"mask_ratio": 1.0}, {"modality": "flow"}])
def test_encoding_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} must"):
        encode_views(model(), Clips(LABELS[:3]), progress=False, **change)
