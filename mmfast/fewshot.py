"""Few-shot heads on frozen features: every episode at once.

    LogisticRegression   min  C sum_i CE(softmax(W x_i + b), y_i) + 1/2 |W|^2          b is not penalised: scikit-learn's scaling
    Ridge                min  sum_i |W x_i + b - t_i|^2 + alpha |W|^2                  t_i: 1 at the class, -1 elsewhere
    Prototype            softmax_k(-|q - mean_k|^2 / temperature), or the cosine to mean_k

Nothing of this changes when the features are moved (b takes it up) or rotated (|W| stays). So both regressions are solved in
the at most min(S, D) coordinates that an episode's supports span, where ridge is diagonal; newton.py has the other one.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Self

import torch
from torch import Tensor

from . import profiling
from .newton import chunks, newton, span, unspan

_SOLVE_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}  # of the many small problems that are solved together
_FEW_PRODUCTS = 4_000_000_000  # about a second of one thread


class LinearHead:
    """Class scores W (q - centre) + b of each episode, softmax over classes.

    weight float64 [E, n_way, D], bias float64 [E, n_way] and centre float64 [E, D] stand here after fit.
    """

    weight: Tensor
    bias: Tensor
    centre: Tensor

    @torch.no_grad()
    def fit(self, support: Tensor, labels: Tensor, n_way: int | None = None) -> Self:
        """Fit one classifier an episode, in float64.

        support: floating point [E, S, D]. labels: integers [E, S], in any order; every episode must have each of
        0..n_way-1, where n_way is the largest label plus one unless given. CPU or CUDA, on any strides.
        Raises ValueError naming support, labels or n_way, TypeError for a wrong type.
        """
        n_way = _check_fit(support, labels, n_way)
        episodes, supports, dim = support.shape
        self.weight = support.new_empty(episodes, n_way, dim, dtype=torch.float64)
        self.bias = support.new_empty(episodes, n_way, dtype=torch.float64)
        self.centre = support.new_empty(episodes, dim, dtype=torch.float64)
        self._start(support)
        rank = min(supports, dim) + 1
        each = 8 * (2 * supports * rank + 10 * n_way * (supports + rank))
        with profiling.range("fewshot_fit"), few_threads(support.device, episodes * supports**2 * dim):
            for part in chunks(episodes, each, support.device, _SOLVE_BYTES):
                own = torch.nn.functional.one_hot(labels[part].long(), n_way).mT.double()  # [e, n_way, S]
                self._solve(part, support[part], own.contiguous())
        return self

    @torch.no_grad()
    def predict_proba(self, query: Tensor) -> Tensor:
        """Class probabilities of queries [E, Q, D]: [E, Q, n_way], float64 for float64 queries and float32 for others.

        Raises ValueError naming query where it does not fit what was fitted, or nothing was.
        """
        episodes, dim = self._fitted()
        _check_features("query", query)
        if query.shape[0] != episodes or query.shape[2] != dim:
            raise ValueError(f"query must be [{episodes}, Q, {dim}], as support was, got {tuple(query.shape)}")
        return self._predict(query, query.shape[1], lambda part: query[part])

    @torch.no_grad()
    def predict_rows(self, features: Tensor, index: Tensor) -> Tensor:
        """predict_proba of features[index] without gathering them all.   features: [C, D]. index: int64 [E, Q]."""
        episodes, dim = self._fitted()
        _check_features("features", features[None])
        if features.shape[1] != dim:
            raise ValueError(f"features must be [C, {dim}], as support was, got {tuple(features.shape)}")
        if index.dim() != 2 or index.shape[0] != episodes:
            raise ValueError(f"index must be [{episodes}, Q], got {tuple(index.shape)}")
        count = index.shape[1]
        rows = lambda part: features.index_select(0, index[part].flatten()).unflatten(0, (-1, count))
        return self._predict(features, count, rows)

    def _fitted(self) -> tuple[int, int]:
        if not hasattr(self, "weight"):
            raise ValueError(f"{type(self).__name__} has not been fitted: call fit(support, labels) first")
        return self.weight.shape[0], self.weight.shape[2]

    def _predict(self, like: Tensor, count: int, rows: Callable[[slice], Tensor]) -> Tensor:
        episodes, n_way, dim = self.weight.shape
        if like.device != self.weight.device:
            raise ValueError(f"query must be on {self.weight.device}, as support was, got {like.device}")
        out = like.new_empty(episodes, count, n_way, dtype=torch.promote_types(like.dtype, torch.float32))
        if not out.numel():
            return out
        with profiling.range("fewshot_predict"), few_threads(like.device, out.numel() * dim):
            for part in chunks(episodes, 12 * count * (dim + n_way), like.device):
                moved = self._moved(rows(part).to(torch.float64, copy=True), self.centre[part, None])
                scores = torch.baddbmm(self.bias[part, :, None], self.weight[part], moved.mT)  # [e, n_way, Q]
                out[part] = scores.softmax(1).mT
        return out

    def _start(self, support: Tensor) -> None: ...

    def _moved(self, query: Tensor, centre: Tensor) -> Tensor:
        """Float64 queries [e, Q, D], overwritten, as the scores take them."""
        return query.sub_(centre)

    def _solve(self, part: slice, x: Tensor, own: Tensor) -> None:
        """Write weight, bias and centre of these episodes.   x: [e, S, D]. own: float64 [e, n_way, S], 1 at the class."""
        raise NotImplementedError


class LogisticRegression(LinearHead):
    """Multinomial logistic regression: scikit-learn's at its optimum, for all episodes at once.

    C: inverse strength of the penalty, as there. max_iter: Newton steps of an episode at most; a warning tells where they
    did not suffice. tol: an episode is finished by a step that moves no weight by more than this, in units in which its
    longest centred support has norm 1. With two classes the optimum is that of scikit-learn's binary form, which has one
    weight vector: that of two vectors (multi_class="multinomial" of its old versions) is had with twice the C.

    After fit also: steps int64 [E], converged bool [E]. Raises ValueError for a C, max_iter or tol out of range.
    """

    steps: Tensor
    converged: Tensor

    def __init__(self, C: float = 1.0, max_iter: int = 200, tol: float = 1e-9) -> None:
        _check_positive("C", C)
        _check_positive("tol", tol)
        if max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {max_iter}")
        self.C, self.max_iter, self.tol = C, max_iter, tol

    def fit(self, support: Tensor, labels: Tensor, n_way: int | None = None) -> Self:
        super().fit(support, labels, n_way)
        left = int(self.converged.logical_not().sum())
        if left:
            warnings.warn(
                f"logistic regression did not converge in {self.max_iter} steps (max_iter) in {left} of "
                f"{len(support)} episodes",
                stacklevel=2,
            )
        return self

    def _start(self, support: Tensor) -> None:
        self.steps = torch.zeros(len(support), dtype=torch.int64, device=support.device)
        self.converged = torch.zeros(len(support), dtype=torch.bool, device=support.device)

    def _solve(self, part: slice, x: Tensor, own: Tensor) -> None:
        centre, scale, f, back = span(x)
        n_way = own.shape[1]
        strength = self.C / 2 if n_way == 2 else self.C
        nu = (1 / strength / scale / scale).clamp(1e-250, 1e250)
        penalty = torch.cat((nu[:, None].expand(-1, f.shape[2]), torch.zeros_like(nu)[:, None]), 1)[:, None]
        f = torch.cat((f, torch.ones_like(f[:, :, :1])), 2)
        w, self.steps[part], self.converged[part] = newton(f, own, penalty, self.max_iter, self.tol)
        unspan(w[:, :, :-1], back, x, centre, scale, self.weight[part])
        self.bias[part] = w[:, :, -1]
        self.centre[part] = centre


class Ridge(LinearHead):
    """Ridge regression on targets 1 and -1, one a class: the scores of scikit-learn's RidgeClassifier, made probabilities.

    alpha: strength of the penalty; the intercept has none. temperature: the softmax is of scores / temperature.
    """

    def __init__(self, alpha: float = 1.0, temperature: float = 1.0) -> None:
        _check_positive("alpha", alpha)
        _check_positive("temperature", temperature)
        self.alpha, self.temperature = alpha, temperature

    def _solve(self, part: slice, x: Tensor, own: Tensor) -> None:
        centre, scale, f, back = span(x)
        target = 2 * own - 1
        mean = target.mean(2)
        strength = (self.alpha / scale / scale).clamp(1e-250, 1e250)
        w = (target - mean[:, :, None]) @ f / (f.square().sum(1) + strength[:, None])[:, None]
        unspan(w / self.temperature, back, x, centre, scale, self.weight[part])
        self.bias[part] = mean / self.temperature
        self.centre[part] = centre


class Prototype(LinearHead):
    """The nearest class mean.

    metric: "euclidean", softmax(-|q - mean|^2 / temperature), or "cosine", softmax(cos(q, mean) / temperature); a zero
    vector has cosine 0 with everything.
    """

    def __init__(self, metric: str = "euclidean", temperature: float = 1.0) -> None:
        if metric not in ("euclidean", "cosine"):
            raise ValueError(f'metric must be "euclidean" or "cosine", got {metric!r}')
        _check_positive("temperature", temperature)
        self.metric, self.temperature = metric, temperature

    def _solve(self, part: slice, x: Tensor, own: Tensor) -> None:
        means = own @ x.double() / own.sum(2, keepdim=True)
        if self.metric == "cosine":
            self.centre[part] = 0
            self.weight[part] = _unit(means) / self.temperature
            self.bias[part] = 0
        else:
            self.centre[part] = centre = means.mean(1)
            means = means - centre[:, None]
            self.weight[part] = means * (2 / self.temperature)
            self.bias[part] = means.square().sum(-1) / -self.temperature

    def _moved(self, query: Tensor, centre: Tensor) -> Tensor:
        return _unit(query) if self.metric == "cosine" else super()._moved(query, centre)


# -- checks and chunks -----------------------------------------------------------------------------------------


def _check_fit(support: Tensor, labels: Tensor, n_way: int | None) -> int:
    _check_features("support", support)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(
            f"labels must be an integer tensor [E, S], got {getattr(labels, 'dtype', type(labels).__name__)}"
        )
    episodes, supports, _ = support.shape
    if labels.shape != (episodes, supports):
        raise ValueError(f"labels must be [{episodes}, {supports}], one a support, got {tuple(labels.shape)}")
    if labels.device != support.device:
        raise ValueError(f"labels must be on {support.device}, as support is, got {labels.device}")
    if n_way is not None and n_way < 1:
        raise ValueError(f"n_way must be at least 1, got {n_way}")
    if not episodes:
        return n_way or 0
    if not supports:
        raise ValueError(f"labels must cover 0..n_way-1 in each episode, got no supports: {tuple(labels.shape)}")
    least, most = torch.stack(labels.aminmax()).tolist()
    n_way = most + 1 if n_way is None else n_way
    if least < 0 or most >= n_way:
        raise ValueError(f"labels must lie in 0..{n_way - 1}, got {least if least < 0 else most}")
    seen = torch.zeros(episodes, n_way, dtype=torch.int64, device=labels.device)
    seen.scatter_add_(1, labels.long(), torch.ones_like(labels, dtype=torch.int64))
    lacking = (seen == 0).nonzero()
    if len(lacking):
        episode, label = lacking[0].tolist()
        raise ValueError(f"labels must cover 0..{n_way - 1} in each episode; episode {episode} has no {label}")
    return n_way


def _check_features(name: str, features: Tensor) -> None:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = getattr(features, "dtype", type(features).__name__)
        raise TypeError(f"{name} must be a floating-point tensor [E, .., D], got {got}")
    if features.dim() != 3 or features.shape[2] < 1:
        raise ValueError(f"{name} must be [E, .., D] with D at least 1, got {tuple(features.shape)}")
    if features.numel() and not bool(torch.stack(features.aminmax()).isfinite().all()):
        episode = int(features.isfinite().logical_not().nonzero()[0, 0])
        raise ValueError(f"{name} must be finite, got NaN or infinity in episode {episode}")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _unit(x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1.0)


@contextlib.contextmanager
def few_threads(device: torch.device, products: int) -> Iterator[None]:
    """One CPU thread for work of so few products: in small pieces it is below the cost of waking another thread, and far
    below that of waiting for one that a busy machine has put off."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or products > _FEW_PRODUCTS or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
