"""The few-shot head on cached features: all episodes at once against scikit-learn's loop, checked first.

    python benchmarks/fewshot_head.py                          # 600 episodes, 5-way, 1 and 5 shots, 2,000 clips, 384 features
    python benchmarks/fewshot_head.py --episodes 60 --rounds 2 --json out.json

Both start from the same features [clips, views, dim] and end with the accuracy of every episode, mean probability over the
views. scikit-learn is called as MM-CDFSL does (lbfgs, C 1, max_iter 1000, its default tol 1e-4), and with one thread where
that is faster. Before anything is timed, probabilities are held against scikit-learn at tol 1e-10 and at its other solver.
"""

import argparse
import contextlib
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from options import at_least, device_of
from report import machine_lines
from torch import Tensor

import mmfast
from mmfast.episodes import EpisodeBatch, Episodes, batch_probabilities, evaluate_episodes
from mmfast.fewshot import LogisticRegression

ALLOWED = {"lbfgs": 1e-3, "newton-cholesky": 1e-6}  # of a probability; lbfgs at tol 1e-10 still stops that far out


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fewshot_head.py",
        description="All few-shot episodes at once against scikit-learn's loop, checked. "
        "Exit codes: 0 done; 2 wrong options; 3 results differ, nothing timed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--episodes", type=at_least(1), default=600)
    add("--clips", type=at_least(1), default=2000)
    add("--classes", type=at_least(1), default=40)
    add("--dim", type=at_least(1), default=384)
    add("--views", type=at_least(1), default=2, help="masked views of a query")
    add("--n-way", type=at_least(2), default=5)
    add("--k-shot", type=at_least(1), nargs="+", default=[1, 5])
    add("--n-query", type=at_least(1), default=15)
    add("--checked", type=at_least(1), default=20, help="episodes held against scikit-learn at tol 1e-10")
    add("--rounds", type=at_least(1), default=5, help="the best of so many counts")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of mmfast; scikit-learn has the CPU")
    add("--seed", type=at_least(0), default=0)
    add("--json", metavar="FILE", help="write everything")
    options = parser.parse_args(arguments)
    options.device = device_of(parser, options.device)
    if options.json and not Path(options.json).resolve().parent.is_dir():
        parser.error(f"{Path(options.json).resolve().parent} is no folder to write {options.json} into")
    return options


def draw_features(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """float32 [C, P, D] and labels [C]: classes that overlap, so that accuracy is neither chance nor one."""
    make = torch.Generator().manual_seed(options.seed)
    labels = torch.arange(options.clips) % options.classes
    centre = torch.randn(options.classes, 1, options.dim, generator=make)[labels]
    clip = 0.35 * centre + torch.randn(options.clips, 1, options.dim, generator=make)
    return clip + 0.5 * torch.randn(options.clips, options.views, options.dim, generator=make), labels


def sklearn_probabilities(
    features: np.ndarray, part: EpisodeBatch, tol: float, solver: str = "lbfgs", dtype: Any = np.float32
) -> Tensor:
    """[E, N*Q, P, N], an episode and a view at a time, as MM-CDFSL does it."""
    from sklearn.linear_model import LogisticRegression as Sklearn

    found = []
    for support, labels, query in zip(
        part.support.numpy(), part.support_labels.numpy(), part.query.numpy(), strict=True
    ):
        head = Sklearn(C=1.0, max_iter=1000 if dtype == np.float32 else 100_000, tol=tol, solver=solver)
        head.fit(features[support, 0].astype(dtype), labels)
        each = [head.predict_proba(features[query, v].astype(dtype)) for v in range(features.shape[1])]
        found.append(np.stack(each, 1))
    return torch.from_numpy(np.stack(found))


@dataclass(frozen=True)
class Check:
    """Against scikit-learn, over so many episodes: the largest difference of a probability, and decisions that differ."""

    against: str
    episodes: int
    difference: float
    allowed: float
    decisions: int
    differ: int

    @property
    def red(self) -> bool:
        return not self.difference <= self.allowed or self.differ > 0


def check(features: Tensor, episodes: Episodes, count: int, device: torch.device) -> list[Check]:
    there, checks = features.to(device), []
    for solver, allowed in ALLOWED.items():
        # Its dense Hessian of all weights takes seconds an episode.
        part = next(iter(episodes.batches(count if solver == "lbfgs" else min(count, 3))))
        own = batch_probabilities(there[:, 0], there, part, LogisticRegression()).cpu().double()
        theirs = sklearn_probabilities(features.numpy(), part, 1e-10, solver, np.float64)
        ours, mine = theirs.mean(2), own.mean(2)
        # Decisions are compared where scikit-learn's own error cannot turn them.
        best = ours.topk(2, -1).values
        differ = (ours.argmax(-1) != mine.argmax(-1)) & (best[..., 0] - best[..., 1] > 2 * allowed)
        worst = float((theirs - own).abs().max())
        checks.append(Check(solver, len(part.number), worst, allowed, differ.numel(), int(differ.sum())))
    return checks


def sklearn_accuracy(features: np.ndarray, episodes: Episodes, tol: float = 1e-4) -> Tensor:
    part = next(iter(episodes.batches(len(episodes))))
    guess = sklearn_probabilities(features, part, tol).mean(2).argmax(2)
    return (guess == part.query_labels).double().mean(1)


def threads_for_sklearn(features: np.ndarray, episodes: Episodes) -> int | None:
    """1 where scikit-learn's loop is faster with one thread than with its own choice (None)."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # it has no types

    took: dict[int | None, float] = {}
    few = episodes.shard(0, max(1, len(episodes) // 20))
    for _ in range(2):
        for limit in (None, 1):
            with threadpool_limits(limit):
                began = time.perf_counter()
                sklearn_accuracy(features, few)
                took[limit] = min(took.get(limit, 1e9), time.perf_counter() - began)
    return min(took, key=lambda limit: took[limit])


def measure(options: argparse.Namespace, features: Tensor, episodes: Episodes) -> dict[str, Any]:
    """Seconds of all episodes, each the best of the rounds, interleaved."""
    from threadpoolctl import threadpool_limits

    plain, there = features.numpy(), features.to(options.device)
    limit = threads_for_sklearn(plain, episodes)
    best = {"mmfast": float("inf"), "sklearn": float("inf")}
    accuracy = {}
    for _ in harness.progress(range(options.rounds), "timing"):
        for _ in range(3):
            harness.synchronize(options.device)
            began = time.perf_counter()
            accuracy["mmfast"] = evaluate_episodes(there[:, 0], there, episodes).mean
            best["mmfast"] = min(best["mmfast"], time.perf_counter() - began)
        with threadpool_limits(limit) if limit else contextlib.nullcontext():
            began = time.perf_counter()
            accuracy["sklearn"] = float(sklearn_accuracy(plain, episodes).mean())
            best["sklearn"] = min(best["sklearn"], time.perf_counter() - began)
    return {
        "seconds": best,
        "accuracy": accuracy,
        "speedup": best["sklearn"] / best["mmfast"],
        "sklearn_threads": limit or "its own choice",
    }


def run(options: argparse.Namespace) -> int:
    warnings.simplefilter("ignore")  # scikit-learn's on convergence; what it answers is checked
    facts = harness.machine(options.device)
    features, labels = draw_features(options)
    rows = []
    for k_shot in options.k_shot:
        try:
            episodes = Episodes(labels, options.n_way, k_shot, options.n_query, options.episodes, options.seed)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        checks = check(features, episodes, min(options.checked, options.episodes), options.device)
        if any(c.red for c in checks):
            for c in checks:
                print(f"red: {k_shot} shots, {c}", file=sys.stderr)
            return 3
        rows.append({"k_shot": k_shot, "checks": [asdict(c) for c in checks], **measure(options, features, episodes)})
    import sklearn

    limits = harness.ceilings(options.device, torch.float64)
    title = (
        f"few-shot head: {options.episodes} episodes, {options.n_way}-way, {options.n_query} queries a class, "
        f"{options.views} views, {options.clips} clips, {options.dim} features; scikit-learn {sklearn.__version__}"
    )
    print(*machine_lines(facts, limits), title, sep="\n")
    print("shots   mmfast s   scikit-learn s   speed-up   accuracy   scikit-learn's   largest difference at tol 1e-10")
    for row in rows:
        seconds, accuracy = row["seconds"], row["accuracy"]
        apart = ", ".join(f"{c['difference']:.0e} ({c['against']})" for c in row["checks"])
        print(
            f"{row['k_shot']:5d} {seconds['mmfast']:10.3f} {seconds['sklearn']:16.2f} {row['speedup']:9.1f}x "
            f"{accuracy['mmfast']:10.4f} {accuracy['sklearn']:16.4f}   {apart}"
        )
    if options.json:
        saved = {"mmfast": mmfast.__version__, "options": vars(options), "machine": facts, "ceilings": limits}
        harness.write_json(options.json, saved | {"title": title, "rows": rows})
        print(f"written: {options.json}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
