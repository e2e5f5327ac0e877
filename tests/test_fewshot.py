"""Few-shot heads against scikit-learn, and where scikit-learn itself does not get there, against the optimum's equations."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as SklearnLogistic
from sklearn.linear_model import RidgeClassifier
from torch import Tensor

from mmfast import fewshot, newton
from mmfast.fewshot import LogisticRegression, Prototype, Ridge

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fewshot_head


def draw(
    n_way: int, k_shot: int, dim: int, episodes: int = 2, noise: float = 1.5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Supports [E, N*K, D] float64, their labels, and queries [E, 4*N, D] of the same classes."""
    make = torch.Generator().manual_seed(seed)
    centre = torch.randn(episodes, n_way, 1, dim, generator=make, dtype=torch.float64)

    def around(count: int) -> Tensor:
        spread = torch.randn(episodes, n_way, count, dim, generator=make, dtype=torch.float64)
        return (centre + noise * spread).flatten(1, 2)

    return around(k_shot), torch.arange(n_way).repeat_interleave(k_shot).expand(episodes, -1), around(4)


def sklearn_probabilities(x: Tensor, y: Tensor, q: Tensor, C: float = 1.0, solver: str = "newton-cholesky") -> Tensor:
    """scikit-learn's answer, an episode at a time, float64."""
    found = []
    for support, labels, query in zip(x.double().numpy(), y.numpy(), q.double().numpy(), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = SklearnLogistic(C=C, max_iter=20000, tol=1e-10, solver=solver).fit(support, labels)
        found.append(torch.from_numpy(model.predict_proba(query)))
    return torch.stack(found)


def worst(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.double() - expected).abs().max())


SHAPES = [(5, 1, 64), (5, 5, 64), (2, 3, 20), (3, 7, 4), (20, 2, 33), (7, 1, 1), (2, 1, 3), (4, 40, 6)]


@pytest.mark.parametrize(("n_way", "k_shot", "dim"), SHAPES)
def test_probabilities_are_those_of_scikit_learn(n_way: int, k_shot: int, dim: int) -> None:
    x, y, q = draw(n_way, k_shot, dim)
    got = LogisticRegression().fit(x, y).predict_proba(q)
    assert worst(got, sklearn_probabilities(x, y, q)) < 1e-6


def test_probabilities_are_those_of_lbfgs() -> None:
    """The solver that MM-CDFSL uses stops within 1e-3 of the optimum even at tol 1e-10."""
    x, y, q = draw(5, 5, 64)
    assert worst(LogisticRegression().fit(x, y).predict_proba(q), sklearn_probabilities(x, y, q, solver="lbfgs")) < 1e-3


@pytest.mark.parametrize("C", [1e-6, 1e-2, 30.0, 1e4])
@pytest.mark.parametrize(("dim", "noise"), [(64, 1.5), (3, 3.0)], ids=["separable", "overlapping"])
def test_any_strength_of_the_penalty(C: float, dim: int, noise: float) -> None:
    x, y, q = draw(5, 8, dim, noise=noise)
    assert worst(LogisticRegression(C).fit(x, y).predict_proba(q), sklearn_probabilities(x, y, q, C)) < 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-3, 100.0])
def test_any_scale_of_the_features(scale: float) -> None:
    x, y, q = draw(5, 3, 30)
    got = LogisticRegression().fit(scale * x, y).predict_proba(scale * q)
    # Features times s with C are the features with C s^2, which scikit-learn gets right.
    expected = sklearn_probabilities(x, y, q, max(scale**2, 1e-20))
    assert worst(got, expected) < 1e-5


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6, 1e9])
def test_huge_features_reach_the_optimum(scale: float) -> None:
    """W = C sum (y - p) x and sum (y - p) = 0, in extended precision: scikit-learn stops far from it here."""
    x, y, _ = draw(5, 4, 40, episodes=1)
    x = scale * x
    head = LogisticRegression().fit(x, y)
    assert bool(head.converged.all())
    points = x[0].numpy().astype(np.longdouble) - head.centre[0].numpy()
    weight = head.weight[0].numpy().astype(np.longdouble)
    margins = points @ weight.T + head.bias[0].numpy()
    own = np.eye(5, dtype=np.longdouble)[y[0].numpy()]
    margins -= (margins * own).sum(1, keepdims=True)
    others = np.exp(margins) * (1 - own)
    others /= 1 + others.sum(1, keepdims=True)
    error = own * others.sum(1, keepdims=True) - others
    assert np.linalg.norm(weight - error.T @ points) < 1e-5 * np.linalg.norm(weight)
    assert np.abs(error.sum(0)).max() < 1e-5 * np.abs(error).max()


def degenerate(name: str) -> tuple[Tensor, Tensor, Tensor]:
    x, y, q = draw(5, 4, 24)
    if name == "all supports identical":
        return x[:, :1].expand_as(x), y, q
    if name == "some identical, in one class":
        x[:, 1:4] = x[:, :1]
    if name == "some identical, in two classes":
        x[:, 5] = x[:, 0]
    if name == "on a line":
        x = x[:, :, :1] * q[:, :1]
    if name == "on a line far from zero":
        x = x[:, :, :1] * q[:, :1] + 50 * q[:, 1:2]
    if name == "in a plane":
        x = x[:, :, :2] @ q[:, :2]
    if name == "constant and repeated columns":
        x[:, :, 3:6], x[:, :, 6:] = 1.0, x[:, :, :1]
    return x, y, q


DEGENERATE = [
    "all supports identical",
    "some identical, in one class",
    "some identical, in two classes",
    "on a line",
    "on a line far from zero",
    "in a plane",
    "constant and repeated columns",
]


@pytest.mark.parametrize("name", DEGENERATE)
def test_identical_and_collinear_supports(name: str) -> None:
    x, y, q = degenerate(name)
    assert worst(LogisticRegression().fit(x, y).predict_proba(q), sklearn_probabilities(x, y, q)) < 1e-6


def test_labels_in_any_order_and_number() -> None:
    make = torch.Generator().manual_seed(1)
    x, q = (torch.randn(3, n, 6, generator=make, dtype=torch.float64) for n in (13, 5))
    extra = torch.randint(0, 3, (3, 10), generator=make)
    y = torch.cat((extra, torch.arange(3).expand(3, -1)), 1)
    assert worst(LogisticRegression().fit(x, y).predict_proba(q), sklearn_probabilities(x, y, q)) < 1e-6


def test_moving_all_features_changes_nothing() -> None:
    x, y, q = draw(5, 5, 16)
    still = LogisticRegression().fit(x, y).predict_proba(q)
    moved = LogisticRegression().fit(x + 1e6, y).predict_proba(q + 1e6)
    assert worst(moved, still) < 1e-7


def test_an_episode_is_what_it_is_alone() -> None:
    """Easy and hard episodes need different numbers of steps; none may go on for the others' sake."""
    parts = [draw(4, 3, 10, 1, noise, seed) for seed, noise in enumerate((0.01, 0.3, 1.0, 3.0, 30.0))]
    x, y, q = (torch.cat(t) for t in zip(*parts, strict=True))
    x[0], q[0] = 1e4 * x[0], 1e4 * q[0]
    together = LogisticRegression(C=100.0).fit(x, y)
    alone = [LogisticRegression(C=100.0).fit(x[e : e + 1], y[e : e + 1]) for e in range(5)]
    assert together.steps.tolist() == [int(head.steps) for head in alone]
    assert len(set(together.steps.tolist())) > 1
    each = torch.cat([head.predict_proba(q[e : e + 1]) for e, head in enumerate(alone)])
    assert worst(together.predict_proba(q), each) < 1e-12


def test_a_finished_episode_stands_still() -> None:
    """Seen with a loose tol, where another step would still be far from rounding."""
    parts = [draw(4, 3, 10, 1, noise, seed) for seed, noise in enumerate((0.3, 1.0, 3.0))]
    x, y, _ = (torch.cat(t) for t in zip(*parts, strict=True))
    together = LogisticRegression(C=100.0, tol=0.05).fit(x, y)
    assert len(set(together.steps.tolist())) > 1
    for e in range(3):
        alone = LogisticRegression(C=100.0, tol=0.05).fit(x[e : e + 1], y[e : e + 1])
        assert worst(together.weight[e], alone.weight[0]) < 1e-9


def test_a_step_is_shortened_where_it_overshoots() -> None:
    """Full steps need more than 50 in some of these episodes, features with heavy tails and next to no penalty."""
    make = torch.Generator().manual_seed(2)
    x = torch.randn(4, 25, 24, generator=make, dtype=torch.float64) ** 3
    torch.rand(4, 25, generator=make)
    y = torch.randint(0, 5, (4, 25), generator=make)
    y[:, :5] = torch.arange(5)
    head = LogisticRegression(C=1e9).fit(x, y)
    assert bool(head.converged.all())
    assert int(head.steps.max()) < 45


@pytest.mark.parametrize("head", [LogisticRegression(), Ridge(), Prototype()], ids=lambda h: type(h).__name__)
def test_chunks_change_nothing(head: LogisticRegression, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, q = draw(3, 2, 9, episodes=5)
    whole = head.fit(x, y).predict_proba(q)
    monkeypatch.setattr(newton, "CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setattr(fewshot, "_SOLVE_BYTES", {"cpu": 1})
    assert worst(head.fit(x, y).predict_proba(q), whole) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_features_are_fitted_in_float64(dtype: torch.dtype) -> None:
    x, y, q = draw(5, 2, 40)
    wide = torch.randn(2, 10, 80).to(dtype)
    wide[:, :, ::2] = x.to(dtype)
    strided, queries = wide[:, :, ::2], q.to(dtype)
    got = LogisticRegression().fit(strided, y).predict_proba(queries)
    assert got.dtype == torch.float32
    assert worst(got, sklearn_probabilities(strided, y, queries)) < 1e-6


def test_one_class_is_certain() -> None:
    x, y, q = draw(1, 3, 4)
    assert worst(LogisticRegression().fit(x, y).predict_proba(q), torch.ones(2, 4, 1)) == 0


@pytest.mark.parametrize("head", [LogisticRegression(), Ridge(), Prototype()], ids=lambda h: type(h).__name__)
def test_nothing_in_nothing_out(head: LogisticRegression) -> None:
    none = head.fit(torch.zeros(0, 5, 4), torch.zeros(0, 5, dtype=torch.int64), n_way=5)
    assert none.predict_proba(torch.zeros(0, 7, 4)).shape == (0, 7, 5)
    x, y, q = draw(2, 1, 4)
    assert head.fit(x, y).predict_proba(q[:, :0]).shape == (2, 0, 2)


def test_steps_that_do_not_suffice_are_told() -> None:
    x, y, _ = draw(5, 5, 8)
    with pytest.warns(UserWarning, match=r"did not converge in 2 steps \(max_iter\) in 2 of 2 episodes"):
        head = LogisticRegression(max_iter=2).fit(x, y)
    assert head.converged.tolist() == [False, False]


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    x, y, q = draw(2, 1, 4)
    LogisticRegression().fit(x, y).predict_proba(q)
    with pytest.raises(ValueError, match="support"):
        LogisticRegression().fit(x * float("nan"), y)
    assert torch.get_num_threads() == before


def test_ridge_scores_are_those_of_scikit_learn() -> None:
    for n_way, k_shot, dim in ((5, 1, 40), (5, 8, 6), (3, 2, 6)):
        x, y, q = draw(n_way, k_shot, dim)
        got = Ridge(alpha=0.7, temperature=0.3).fit(x, y).predict_proba(q)
        for e in range(len(x)):
            score = RidgeClassifier(alpha=0.7).fit(x[e].numpy(), y[e].numpy()).decision_function(q[e].numpy())
            assert worst(got[e], (torch.from_numpy(score) / 0.3).softmax(-1)) < 1e-9


@pytest.mark.parametrize("name", DEGENERATE)
def test_ridge_takes_degenerate_supports(name: str) -> None:
    x, y, q = degenerate(name)
    got = Ridge().fit(1e3 * x, y).predict_proba(1e3 * q)
    model = RidgeClassifier(alpha=1e-6, solver="svd").fit(x[0].numpy(), y[0].numpy())
    score = torch.from_numpy(model.decision_function(q[0].numpy()))
    assert worst(got[0], score.softmax(-1)) < 1e-5


def test_prototype_is_nearest_mean() -> None:
    x, y, q = draw(4, 3, 12)
    means = x.unflatten(1, (4, 3)).mean(2)
    expected = (-torch.cdist(q, means).square() / 2.5).softmax(-1)
    assert worst(Prototype(temperature=2.5).fit(x, y).predict_proba(q), expected) < 1e-12


def test_prototype_by_cosine() -> None:
    x, y, q = draw(4, 3, 12)
    q[0, 0] = 0
    means = x.unflatten(1, (4, 3)).mean(2)
    expected = (torch.cosine_similarity(q[:, :, None], means[:, None], dim=-1) / 0.1).softmax(-1)
    assert worst(Prototype("cosine", 0.1).fit(x, y).predict_proba(q), expected) < 1e-12


X, Y, Q = draw(3, 2, 5)
FIT = [
    ("list", X.tolist(), Y, TypeError, "support must be a floating-point tensor"),
    ("integers", X.long(), Y, TypeError, "support must be a floating-point tensor"),
    ("two dims", X[0], Y, ValueError, r"support must be \[E, .., D\]"),
    ("nan", X.index_fill(0, torch.tensor([1]), float("nan")), Y, ValueError, "support must be finite.* episode 1"),
    ("float labels", X, Y.float(), TypeError, "labels must be an integer tensor"),
    ("label shape", X, Y[:, :-1], ValueError, r"labels must be \[2, 6\]"),
    ("shared labels", X, Y[0], ValueError, r"labels must be \[2, 6\]"),
    ("negative", X, Y - 1, ValueError, r"labels must lie in 0..1, got -1"),
    ("a gap", X, Y * 2, ValueError, r"labels must cover 0..4 in each episode; episode 0 has no 1"),
    ("a lack", X, torch.stack((Y[0], Y[1].clamp(max=1))), ValueError, "episode 1 has no 2"),
    ("no supports", X[:, :0], Y[:, :0], ValueError, "got no supports"),
]


@pytest.mark.parametrize(("x", "y", "error", "message"), [f[1:] for f in FIT], ids=[f[0] for f in FIT])
def test_fit_refuses(x: Tensor, y: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LogisticRegression().fit(x, y)


def test_fit_refuses_labels_beyond_n_way() -> None:
    with pytest.raises(ValueError, match=r"labels must lie in 0..1, got 2"):
        Ridge().fit(X, Y, n_way=2)
    with pytest.raises(ValueError, match="n_way must be at least 1"):
        Ridge().fit(X, Y, n_way=0)


def test_predict_refuses_what_was_not_fitted() -> None:
    with pytest.raises(ValueError, match="has not been fitted"):
        Prototype().predict_proba(Q)
    head = Prototype().fit(X, Y)
    with pytest.raises(ValueError, match=r"query must be \[2, Q, 5\]"):
        head.predict_proba(Q[:1])
    with pytest.raises(ValueError, match="query must be finite"):
        head.predict_proba(Q / 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogisticRegression(C=0), "C must be positive"),
        (lambda: LogisticRegression(tol=float("nan")), "tol must be positive"),
        (lambda: LogisticRegression(max_iter=0), "max_iter must be at least 1"),
        (lambda: Ridge(alpha=-1), "alpha must be positive"),
        (lambda: Prototype(temperature=0), "temperature must be positive"),
        (lambda: Prototype("manhattan"), "metric must be"),
    ],
)
def test_constructors_refuse(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


SIZES = "--episodes 4 --clips 60 --classes 4 --dim 6 --n-way 3 --k-shot 2 --n-query 3 --rounds 1"
BENCHMARK = [*SIZES.split(), "--device", "cpu"]


def test_benchmark_checks_and_then_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fewshot_head.harness, "ceilings", lambda *_: dict(copy_gb_s=1.0, gemm_tflop_s=1.0, gemm_size=1))
    assert fewshot_head.main([*BENCHMARK, "--json", str(tmp_path / "out.json")]) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [c["differ"] for c in row["checks"]] == [0, 0]
    assert row["speedup"] == pytest.approx(row["seconds"]["sklearn"] / row["seconds"]["mmfast"])
    assert "speed-up" in capsys.readouterr().out


def test_benchmark_times_nothing_on_a_red_gate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fewshot_head, "LogisticRegression", lambda: LogisticRegression(C=1.1))
    assert fewshot_head.main(BENCHMARK) == 3
    out, err = capsys.readouterr()
    assert (out, err[:4]) == ("", "red:")


@pytest.mark.gpu
@pytest.mark.parametrize("head", [LogisticRegression(), Ridge(), Prototype()], ids=lambda h: type(h).__name__)
@pytest.mark.parametrize(("n_way", "k_shot", "dim"), [(5, 5, 64), (5, 20, 384), (3, 50, 7)])
def test_same_on_the_gpu(head: LogisticRegression, n_way: int, k_shot: int, dim: int) -> None:
    x, y, q = draw(n_way, k_shot, dim, episodes=9)
    expected = head.fit(x, y).predict_proba(q)
    got = head.fit(x.cuda(), y.cuda()).predict_proba(q.cuda())
    assert worst(got.cpu(), expected) < 1e-8
