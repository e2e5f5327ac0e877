"""Adaptive ensembles: when a view is added, and thresholds calibrated on support clips."""

import pytest
import torch
from episode_makers import features, small
from torch import Tensor

from mmfast.adaptive import (
    AdaptiveResult,
    adaptive_ensemble,
    calibrate_threshold,
    evaluate_adaptive,
    margin,
    support_probabilities,
)
from mmfast.episodes import evaluate_episodes
from mmfast.fewshot import Prototype


def test_margin_is_of_the_two_largest() -> None:
    assert margin(torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.0, 0.5]])).tolist() == pytest.approx([0.5, 0.0])
    assert margin(torch.ones(2, 1)).tolist() == [1, 1]


def test_views_are_added_only_where_it_is_uncertain() -> None:
    known = torch.tensor([[[0.9, 0.1], [0.0, 1.0], [0.0, 1.0]], [[0.6, 0.4], [0.9, 0.1], [0.0, 1.0]], [[0.5, 0.5]] * 3])
    asked = []

    def view(which: Tensor, v: int) -> Tensor:
        asked.append((v, which.tolist()))
        return known[which, v]

    mean, used = adaptive_ensemble(view, 3, 3, 0.4)
    assert asked == [(0, [0, 1, 2]), (1, [1, 2]), (2, [2])]
    assert used.tolist() == [1, 2, 3]
    torch.testing.assert_close(mean, torch.tensor([[0.9, 0.1], [0.75, 0.25], [0.5, 0.5]]))


def test_thresholds_at_the_ends_are_one_view_and_all() -> None:
    known, episodes = features(), small()
    one = evaluate_adaptive(known[:, 0], known, episodes, 0.0, batch=4)
    full = evaluate_adaptive(known[:, 0], known, episodes, float("inf"))
    first = evaluate_episodes(known[:, 0], known[:, :1], episodes)
    assert (one.mean_views, full.mean_views, full.agreement) == (1.0, 3.0, 1.0)
    assert torch.equal(one.adaptive.correct, first.correct)
    assert torch.equal(full.adaptive.correct, full.full.correct)
    assert not torch.equal(one.adaptive.correct, full.full.correct)


def test_merged_adaptive_shards_equal_the_whole() -> None:
    known, episodes = features(), small()
    whole = evaluate_adaptive(known[:, 0], known, episodes, 0.5)
    parts = [evaluate_adaptive(known[:, 0], known, episodes.shard(rank, 2), 0.5) for rank in (0, 1)]
    assert str(AdaptiveResult.merge(parts)) == str(whole)
    assert 1 < whole.mean_views < 3


def test_calibration_meets_what_it_is_asked_for() -> None:
    known = features(views=4, noise=1.0)
    each = support_probabilities(known, small())
    agreements, views = [], []
    for agreement in (0.0, 0.9, 0.97, 1.0):
        threshold = calibrate_threshold(each, agreement=agreement)
        mean, used = adaptive_ensemble(lambda which, v: each[which, v], len(each), 4, threshold)
        agreements.append(float((mean.argmax(1) == each.mean(1).argmax(1)).double().mean()))
        views.append(float(used.double().mean()))
        assert agreements[-1] >= agreement
    assert views == sorted(views)
    assert views[0] == 1 < views[1] < views[3]
    for budget in (1.0, 1.5, 2.5, 4.0):
        threshold = calibrate_threshold(each, mean_views=budget)
        used = adaptive_ensemble(lambda which, v: each[which, v], len(each), 4, threshold)[1]
        assert budget - 0.3 < used.double().mean() <= budget


@pytest.mark.parametrize("k_shot", [1, 2])
def test_calibration_looks_at_support_clips_only(k_shot: int) -> None:
    known, episodes = features(), small(k_shot=k_shot, episodes=3)
    supports = {i for support, _ in episodes for i in support.tolist()}
    for clip in set(range(len(known))) - supports:
        known[clip] = float("nan")
    each = support_probabilities(known, episodes)
    assert each.shape[0] == 3 * 3 * k_shot
    assert bool(each.isfinite().all())


def test_calibration_leaves_the_predicted_clip_out() -> None:
    known, episodes = features(), small(episodes=1)
    ((support, _),) = list(episodes)
    first = known[support, 0]
    kept = [0, 1, 2, 4, 5]
    head = Prototype().fit(first[kept][None], torch.tensor([[0, 0, 1, 2, 2]]))
    expected = head.predict_proba(known[support[3]][None])[0]
    torch.testing.assert_close(support_probabilities(known, episodes, head=Prototype())[3], expected)


def test_calibration_of_one_shot_leaves_its_class_out() -> None:
    known, episodes = features(), small(k_shot=1, episodes=1)
    ((support, _),) = list(episodes)
    head = Prototype().fit(known[support[[0, 2]], 0][None], torch.tensor([[0, 1]]))
    expected = head.predict_proba(known[support[1]][None])[0]
    torch.testing.assert_close(support_probabilities(known, episodes, head=Prototype())[1], expected)


@pytest.mark.parametrize("k_shot", [1, 5])
def test_queries_are_decided_as_with_all_views_as_often_as_asked(k_shot: int) -> None:
    known, episodes = features(views=4, noise=1.0), small(n_way=5, k_shot=k_shot, n_query=4, episodes=100)
    threshold = calibrate_threshold(support_probabilities(known, episodes), agreement=0.95)
    result = evaluate_adaptive(known[:, 0], known, episodes, threshold)
    assert result.agreement > 0.93
    assert result.mean_views < 4


def test_calibration_refuses() -> None:
    each = torch.rand(5, 3, 4)
    with pytest.raises(ValueError, match="one of agreement and mean_views must be given"):
        calibrate_threshold(each)
    with pytest.raises(ValueError, match="agreement must lie in"):
        calibrate_threshold(each, agreement=1.5)
    with pytest.raises(ValueError, match="mean_views must be at least 1"):
        calibrate_threshold(each, mean_views=0.5)
    with pytest.raises(ValueError, match="view_probabilities must be"):
        calibrate_threshold(each[:0], agreement=0.9)
    with pytest.raises(ValueError, match="3 classes or two shots"):
        support_probabilities(features(), small(n_way=2, k_shot=1))
    with pytest.raises(ValueError, match="threshold must be at least 0"):
        evaluate_adaptive(features()[:, 0], features(), small(), -0.1)


@pytest.mark.gpu
def test_same_accuracy_on_the_gpu() -> None:
    known, episodes = features(), small()
    there = known.cuda()
    assert torch.equal(
        evaluate_episodes(there[:, 0], there, episodes).correct,
        evaluate_episodes(known[:, 0], known, episodes).correct,
    )
    here = evaluate_adaptive(known[:, 0], known, episodes, 0.5)
    assert str(evaluate_adaptive(there[:, 0], there, episodes, 0.5)) == str(here)
    assert len(support_probabilities(there, episodes)) == len(support_probabilities(known, episodes))
