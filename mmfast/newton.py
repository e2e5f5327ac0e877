"""Newton's method for softmax regression, many small problems at once.

A problem is centred, scaled to norm 1, and turned into the at most min(S, D) directions that its points span: X X^T =
U diag(l) U^T gives the coordinates f = U sqrt(l), orthogonal with squared lengths l. There, with p the probabilities,
e = p - y and nu the penalty,

    gradient  e^T f + nu w          Hessian times v  (p (f v - sum_k p_k f v_k))^T f + nu v

each step by conjugate gradients, preconditioned by the Hessian of equally weighted points, which is diagonal here:
nu + l mean_i p_ik (1 - p_ik). Gradients sum to zero over classes, so steps are kept there.

Logits enter as margins to the true class, so that p - y, the loss and the curvature keep their relative precision where
points are told apart almost surely (a small penalty, large features) and 1 - p would have none left.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 6 << 20, "cuda": 1 << 30}  # on a CPU what stays in the cache
_MOST_HALVINGS = 50
_FLOOR = 1e-290  # keeps quotients of what is exactly zero defined


def chunks(count: int, bytes_each: int, device: torch.device, most: dict[str, int] | None = None) -> Iterator[slice]:
    """Slices of at most so many bytes (CHUNK_BYTES unless given), or of one."""
    size = max(1, (most or CHUNK_BYTES)[device.type] // max(bytes_each, 1))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def span(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """centre [e, D], scale [e], f [e, S, R], back [e, S or D, R], all float64, of points [e, S, D]; R = min(S, D).

    The columns of f are orthogonal, its longest row has norm 1, and x = centre + scale f basis^T with an orthonormal basis,
    into which `unspan` takes weights. Directions in which points do not differ beyond rounding are zero in f and back.
    """
    parts = [_span(x[part]) for part in chunks(len(x), 16 * x.shape[1] * x.shape[2], x.device)]
    if len(parts) == 1:
        return parts[0]
    centre, scale, f, back = (torch.cat(t) for t in zip(*parts, strict=True))
    return centre, scale, f, back


def _span(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.to(torch.float64, copy=True)
    centre = x.mean(1)
    x -= centre[:, None]
    _, points, dim = x.shape
    wide = points <= dim
    gram = x @ x.mT if wide else x.mT @ x
    squared = (gram.diagonal(dim1=1, dim2=2) if wide else x.square().sum(2)).amax(1)
    squared = torch.where(squared > 0, squared, 1.0)
    values, vectors = torch.linalg.eigh(gram / squared[:, None, None])
    spans = values > values[:, -1:] * (max(points, 1) * 2e-16)
    vectors = vectors * spans[:, None]
    scale = squared.sqrt()
    if not wide:
        return centre, scale, x @ vectors / scale[:, None, None], vectors
    root = torch.where(spans, values, 1.0).sqrt()[:, None]
    return centre, scale, vectors * root, vectors / root


def unspan(w: Tensor, back: Tensor, x: Tensor, centre: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write the weights [e, K, D] on features that those on f, [e, K, R], stand for.   The rest: of `span`."""
    w = w @ back.mT / scale[:, None, None]
    if x.shape[1] > x.shape[2]:
        out.copy_(w)
        return
    w /= scale[:, None, None]
    for part in chunks(len(x), 16 * x.shape[1] * x.shape[2], x.device):
        moved = x[part].to(torch.float64, copy=True).sub_(centre[part, None])
        torch.bmm(w[part], moved, out=out[part])


def newton(f: Tensor, own: Tensor, penalty: Tensor, max_iter: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [e, K, R] that minimise sum CE + 1/2 penalty w^2, steps taken [e], converged [e].

    f: [e, S, R]. own: [e, K, S], 1 at the true class. penalty: [e, 1, R]. An episode's result does not depend on which
    others are solved with it: a finished one stands still, and is dropped as soon as half of them are finished.
    """
    episodes, classes, _ = own.shape
    result = f.new_zeros(episodes, classes, f.shape[2])
    steps = torch.full((episodes,), max_iter, device=f.device)
    place = torch.arange(episodes, device=f.device)
    squared = f.square().sum(1)[:, None]  # [e, 1, R]
    w, done = torch.zeros_like(result), torch.zeros(episodes, dtype=torch.bool, device=f.device)
    for step in range(1, max_iter + 1):
        margins = _to_margins(w @ f.mT, own)
        value, p, error, curvature = _softmax_loss(margins, own)
        gradient = torch.baddbmm(penalty * w, error, f)
        scaling = 1 / (penalty + squared * curvature.mean(2, keepdim=True)).clamp(min=_FLOOR)
        d, dz = _direction(f, own, penalty, p, gradient, scaling, done, tol)
        rate, slope = _rate(margins, _to_margins(dz, own), own, w, d, penalty, value, gradient)
        w = w + rate[:, None, None] * d  # d is 0 where an episode is done
        small = d.abs().amax((1, 2)) <= tol * w.abs().amax((1, 2)).clamp(min=1.0)
        # Where even the full step gains less than the loss is rounded by, no further one can tell up from down.
        finished = done | (rate == 1) & (small | (-slope <= 2e-16 * value))
        steps[place] = torch.where(finished & ~done, step, steps[place])
        done = finished
        going = len(place) - int(done.sum())
        if going == 0:
            break
        if 2 * going <= len(place):
            result[place] = w
            left = done.logical_not().nonzero().squeeze(1)
            place, w, f, own, penalty, squared, done = (
                t.index_select(0, left) for t in (place, w, f, own, penalty, squared, done)
            )
    result[place] = w
    converged = torch.ones(episodes, dtype=torch.bool, device=f.device).index_copy(0, place, done)
    return result, steps, converged


def _to_margins(z: Tensor, own: Tensor) -> Tensor:
    """Logits [e, K, S] less that of the true class, which becomes 0 exactly."""
    return z - (z * own).sum(1, keepdim=True)


def _exponentials(margins: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """exp(margin - top) of the other classes, their sum, that of the true class, and the cross-entropy [e, S]."""
    top = margins.amax(1, keepdim=True)
    others = (margins - top).exp_() * (1 - own)
    sums = others.sum(1, keepdim=True)
    return others, sums, (-top).exp(), (top + (sums + (-top).expm1()).log1p()).squeeze(1)


def _softmax_loss(margins: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum CE [e], p, p - y and p (1 - p), all [e, K, S] and with full relative precision."""
    others, sums, true, loss = _exponentials(margins, own)
    total = sums + true
    others /= total
    missing = own * (sums / total)
    p = others + own * (true / total)
    curvature = p * (missing + (1 - own) * (1 - others))
    return loss.sum(1), p, others - missing, curvature


def _direction(
    f: Tensor, own: Tensor, penalty: Tensor, p: Tensor, gradient: Tensor, scaling: Tensor, done: Tensor, tol: float
) -> tuple[Tensor, Tensor]:
    """Newton's step d [e, K, R] by conjugate gradients, and d f^T.

    Solved the more exactly the smaller the step is, so that the error squares from one to the next.
    """

    def conditioned(r: Tensor) -> Tensor:
        s = scaling * r
        return s - s.mean(1, keepdim=True)

    d, r = torch.zeros_like(gradient), -gradient
    s = conditioned(r)
    rs = (r * s).sum((1, 2))
    reach = s.abs().amax((1, 2)).clamp(min=_FLOOR)
    accuracy = torch.maximum(reach, 0.1 * tol / reach).clamp(max=0.1)
    goal = accuracy.square() * rs
    going = ~done & (rs > 0)
    v, vz = s, s @ f.mT
    dz = torch.zeros_like(vz)
    every = 4 if f.is_cuda else 1  # a GPU waits for the host's look at the residuals
    most = 4 * own.shape[1] * f.shape[2] + 20
    for turn in range(1, most + 1):
        u = _to_margins(vz, own)
        h = torch.baddbmm(penalty * v, p * (u - (p * u).sum(1, keepdim=True)), f)
        vh = (v * h).sum((1, 2))
        going = going & (vh > 0)
        a = torch.where(going, rs / vh, 0.0)[:, None, None]
        d = torch.addcmul(d, a, v)
        dz = torch.addcmul(dz, a, vz)
        r = torch.addcmul(r, a, h, value=-1)
        s = conditioned(r)
        before, rs = rs, (r * s).sum((1, 2))
        going = going & (rs > goal)
        if turn % every == 0 and not bool(going.any()):
            break
        v = torch.addcmul(s, torch.where(going, rs / before, 0.0)[:, None, None], v)
        vz = v @ f.mT
    return d, dz


def _rate(
    margins: Tensor,
    moved: Tensor,
    own: Tensor,
    w: Tensor,
    d: Tensor,
    penalty: Tensor,
    value: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, Tensor]:
    """How much of step d to take, [e]: 1, or halved until the objective falls enough; and its slope along d."""
    slope = (gradient * d).sum((1, 2))
    weighted = penalty * d
    linear, square = (weighted * w).sum((1, 2)), (weighted * d).sum((1, 2))
    rounding = 1e-14 * (value + (penalty * w * w).sum((1, 2)))
    rate = torch.ones_like(value)
    for _ in range(_MOST_HALVINGS):
        loss = _exponentials(torch.addcmul(margins, rate[:, None, None], moved), own)[3].sum(1)
        gain = value - loss - rate * linear - 0.5 * rate * rate * square
        worse = gain < -1e-4 * rate * slope - rounding
        if not bool(worse.any()):
            break
        rate = torch.where(worse, rate / 2, rate)
    return rate, slope
