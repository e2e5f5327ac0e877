"""Adaptive ensembles: another masked view only for queries that are still uncertain.

    after v views   p_v = mean of the first v class probabilities,  margin = largest - second largest of p_v
    stop            as soon as margin >= threshold, at the latest after P views

The threshold is calibrated on support clips, whose classes are known to the user and whose queries' are not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .episodes import (
    EpisodeResult,
    Episodes,
    Head,
    batch_probabilities,
    check_features,
    count_correct,
    make_result,
)
from .fewshot import LogisticRegression

_CANDIDATES = 512  # thresholds tried in a calibration


def margin(probabilities: Tensor) -> Tensor:
    """Largest less second largest probability, [...], of [..., K]; 1 where there is only one class."""
    if probabilities.shape[-1] < 2:
        return torch.ones_like(probabilities[..., 0])
    best = probabilities.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


@torch.no_grad()
def adaptive_ensemble(
    view: Callable[[Tensor, int], Tensor],
    queries: int,
    views: int,
    threshold: float,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Mean probabilities [Q, K] over as many views as each query needs, and that number, int64 [Q].

    view(which, v): class probabilities [n, K] of the queries `which`, int64 [n], under view v; called once a view, with the
    queries that are still uncertain, and not at all once none is. threshold: in [0, 1]; 0 uses one view, above 1 all.
    """
    _check(views, threshold)
    which = torch.arange(queries, device=device)
    used = torch.zeros_like(which)
    total = seen = torch.empty(0)
    for v in range(views):
        seen = view(which, v)
        # In float64, as thresholds are calibrated: a margin on the threshold must fall on the same side.
        total = seen.double() if v == 0 else total.index_add(0, which, seen.double())
        used[which] = v + 1
        uncertain = margin(total[which] / (v + 1)) < threshold
        which = which[uncertain.nonzero().squeeze(1)]
        if not len(which):
            break
    return (total / used[:, None]).to(seen.dtype), used


@dataclass(frozen=True)
class AdaptiveResult:
    """Accuracy with views added where needed, and with all of them everywhere.

    used: int64 [P], queries that took 1, 2, ... P views. agreed: queries decided as with all views.
    """

    adaptive: EpisodeResult
    full: EpisodeResult
    used: Tensor
    agreed: int
    threshold: float

    @property
    def mean_views(self) -> float:
        """Views a query took, on average."""
        views = torch.arange(1, len(self.used) + 1)
        return float((self.used * views).sum() / self.used.sum().clamp(min=1))

    @property
    def agreement(self) -> float:
        """Share of queries that are decided as with all views."""
        return self.agreed / max(int(self.used.sum()), 1)

    def __str__(self) -> str:
        return (
            f"{self.adaptive}; {100 * self.full.mean:.2f} % with all {len(self.used)} views, "
            f"{self.mean_views:.2f} used, {100 * self.agreement:.1f} % decided alike"
        )

    @staticmethod
    def merge(parts: "list[AdaptiveResult]") -> "AdaptiveResult":
        """One result of those of all shards."""
        return AdaptiveResult(
            EpisodeResult.merge(part.adaptive for part in parts),
            EpisodeResult.merge(part.full for part in parts),
            torch.stack([part.used for part in parts]).sum(0),
            sum(part.agreed for part in parts),
            parts[0].threshold,
        )


def evaluate_adaptive(
    support_features: Tensor,
    query_features: Tensor,
    episodes: Episodes,
    threshold: float,
    *,
    head: Head | None = None,
    batch: int = 300,
) -> AdaptiveResult:
    """evaluate_episodes with an adaptive ensemble of the P views of query_features [C, P, D], and with the full one."""
    check_features(support_features, query_features, episodes)
    head = LogisticRegression() if head is None else head
    views = query_features.shape[1]
    _check(views, threshold)
    used = torch.zeros(views, dtype=torch.int64)
    numbers, correct, all_correct, agreed = [], [], [], 0
    for part in episodes.batches(batch):
        each = batch_probabilities(support_features, query_features, part, head)
        known = each.flatten(0, 1)  # [E*N*Q, P, N]
        taken, count = adaptive_ensemble(_lookup(known), len(known), views, threshold, known.device)
        taken, full = taken.unflatten(0, each.shape[:2]), each.mean(2)
        used += (count - 1).bincount(minlength=views).cpu()
        agreed += int((taken.argmax(2) == full.argmax(2)).sum())
        numbers.append(part.number)
        correct.append(count_correct(taken, part))
        all_correct.append(count_correct(full, part))
    return AdaptiveResult(
        make_result(numbers, correct, episodes), make_result(numbers, all_correct, episodes), used, agreed, threshold
    )


def support_probabilities(
    features: Tensor, episodes: Episodes, *, head: Head | None = None, most: int = 20, batch: int = 300
) -> Tensor:
    """What to calibrate a threshold on: class probabilities [M, P, N] of support clips, under each view.

    features: [C, P, D]. Of each of the first `most` episodes every support is left out once, the head fitted to the others'
    first view, and the one left out predicted under all P views. With one shot its class is left out with it, N is one
    less, and what is predicted is as uncertain as a clip can be: good for `agreement`, which needs no right answer, and
    on the safe side. Queries are not looked at. Raises ValueError for one shot of two classes.
    """
    check_features(features, features, episodes)
    alone = episodes.k_shot == 1
    if alone and episodes.n_way < 3:
        raise ValueError(
            f"episodes must have 3 classes or two shots to leave a support out, got {episodes.n_way} and one shot"
        )
    head = LogisticRegression() if head is None else head
    seen = []
    left = most
    for part in episodes.batches(min(batch, max(most, 1))):
        support = features[part.support[:left].to(features.device)]  # [E, S, P, D]
        labels = part.support_labels[:left].to(features.device)
        left -= len(support)
        first = support[:, :, 0]
        count = support.shape[1]
        others = torch.arange(count - 1, device=features.device).expand(count, -1)
        others = others + (others >= torch.arange(count, device=features.device)[:, None])  # [S, S - 1]
        classes = labels[:, others]  # [E, S, S - 1]
        if alone:
            classes = classes - (classes > labels[:, :, None]).to(classes.dtype)
        head.fit(first[:, others].flatten(0, 1), classes.flatten(0, 1))
        seen.append(head.predict_proba(support.flatten(0, 1)))
        if left <= 0:
            break
    return torch.cat(seen)


def calibrate_threshold(
    view_probabilities: Tensor, *, agreement: float | None = None, mean_views: float | None = None
) -> float:
    """The threshold for adaptive_ensemble, from class probabilities [M, P, K] of clips under each view.

    agreement: the lowest threshold from which on at least this share of the clips is decided as with all views.
    mean_views: the highest that takes at most this many views of a clip on average. One of the two must be given.
    Raises ValueError otherwise, for shares outside [0, 1], fewer than one view, and no clips.
    """
    if (agreement is None) == (mean_views is None):
        raise ValueError(f"one of agreement and mean_views must be given, got {agreement} and {mean_views}")
    if agreement is not None and not 0 <= agreement <= 1:
        raise ValueError(f"agreement must lie in [0, 1], got {agreement}")
    if mean_views is not None and mean_views < 1:
        raise ValueError(f"mean_views must be at least 1, got {mean_views}")
    if view_probabilities.dim() != 3 or not view_probabilities.shape[0] or not view_probabilities.shape[1]:
        raise ValueError(
            f"view_probabilities must be [M, P, K], M and P at least 1, got {tuple(view_probabilities.shape)}"
        )
    clips, views, _ = view_probabilities.shape
    count = torch.arange(1, views + 1, device=view_probabilities.device)
    means = view_probabilities.double().cumsum(1) / count[:, None]
    margins, decisions = margin(means), means.argmax(2)
    # A margin stops at a threshold that equals it, so that the next number above each is where something changes.
    found = margins[:, :-1].flatten().sort().values
    found = found[torch.linspace(0, max(len(found) - 1, 0), min(len(found), _CANDIDATES)).long().to(found.device)]
    candidates = torch.cat((found.new_zeros(1), torch.nextafter(found, found.new_tensor(math.inf)))).unique()
    stops = margins >= candidates[:, None, None]  # [T, M, P]
    stops[:, :, -1] = True
    last = stops.int().argmax(2)  # the first view that stops
    if agreement is None:
        fits = (last + 1).double().mean(1) <= mean_views
        return float(candidates[fits.nonzero()[-1, 0]])
    agreed = (
        decisions.expand(len(candidates), -1, -1).gather(2, last[:, :, None])[:, :, 0] == decisions[:, -1]
    ).double()
    # The highest candidate takes all views of all clips and agrees everywhere.
    short = (agreed.mean(1) < agreement).nonzero()
    return float(candidates[short[-1, 0] + 1 if len(short) else 0])


def _lookup(known: Tensor) -> Callable[[Tensor, int], Tensor]:
    """The probabilities [Q, P, K] that are there already, as adaptive_ensemble asks for them."""
    return lambda which, v: known[which, v]


def _check(views: int, threshold: float) -> None:
    if views < 1:
        raise ValueError(f"views must be at least 1, got {views}")
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
