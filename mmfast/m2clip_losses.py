"""The four losses of M2-CLIP (AAAI 2024), each a mean over clips or words that is 0, not NaN, where there are none.

contrastive = mean over both directions of KL(softmax(10 G) || softmax(scale v t^T)),   G_ij = [label_i = label_j]
cmc = cross entropy of 100 v T^T against the label          v, t, T: unit vectors of clips, their captions, all classes
cmlm = cross entropy of the masked words                    vc = cross entropy of the class logits
total = (contrastive + cmc) / 2 + vc + cmlm / 10
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

IGNORED = -100
_SHARPNESS = 10.0  # of the target distribution of the contrastive loss


@dataclass(frozen=True)
class LossWeights:
    """What each loss counts in the total."""

    contrastive: float = 0.5
    cmc: float = 0.5
    vc: float = 1.0
    cmlm: float = 0.1

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, weight in given.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be a finite weight of at least 0, got {weight}")
        if not any(given.values()):
            raise ValueError("weights must not all be 0")

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the losses of these names; one of weight 0 is left out, whatever it is."""
        terms = [weight * losses[f.name] for f in fields(self) if (weight := getattr(self, f.name)) != 0]
        return torch.stack(terms).sum()


def contrastive_loss(
    video: Tensor, text: Tensor, labels: Tensor, scale: Tensor | float = 100.0, *, gather: bool = False
) -> Tensor:
    """KL of both directions' softmax to that of clips with the same label; the mean of the two.

    video, text: [B, E], of any length; text is that of each clip's caption. labels: int [B]. gather: against the clips of all
    ranks, each of which must have B of them; the mean over ranks, which DDP's gradient is of, is then the loss of all clips.
    """
    v, t = _unit(video), _unit(text)
    all_v, all_t, all_labels = v, t, labels
    if gather and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        all_v, all_t, all_labels = _Gathered.apply(v), _Gathered.apply(t), _gathered(labels)
    same = (labels[:, None] == all_labels[None, :]).to(v.dtype)
    target = F.log_softmax(_SHARPNESS * same, -1)
    by_video, by_text = (F.log_softmax(scale * _products(a, b), -1) for a, b in ((v, all_t), (t, all_v)))
    divergence = (F.kl_div(logits, target, log_target=True, reduction="sum") for logits in (by_video, by_text))
    return sum(divergence, v.new_zeros(())) / (2 * max(len(v), 1))


def cmc_loss(
    video: Tensor, classes: Tensor, labels: Tensor, scale: Tensor | float = 100.0, *, double_softmax: bool = False
) -> Tensor:
    """Cross entropy of the clips' cosines with the classes' texts.   video: [B, E]. classes: [K, E]. labels: int64 [B].

    double_softmax: of their softmax instead, as was released: it cannot fall below log(1 + (K - 1) / e).
    """
    logits = class_cosines(video, classes, scale)
    return _cross_entropy(logits.softmax(-1) if double_softmax else logits, labels)


def class_cosines(video: Tensor, classes: Tensor, scale: Tensor | float = 100.0) -> Tensor:
    """scale * cosine of every clip with every class: fp32 [B, K]."""
    return scale * _products(_unit(video), _unit(classes))


def vc_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of class logits [B, K] against labels, int64 [B]."""
    return _cross_entropy(_wide(logits), labels)


def cmlm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of word logits [R, V] against word ids, int64 [R]; rows of label -100 do not count.

    With none that counts it is 0, and so are its gradients.
    """
    total = F.cross_entropy(_wide(logits), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_wide(x), dim=-1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    # Times 100 they are the argument of a softmax: autocast's dtype is too coarse for that.
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.t()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


def _gathered(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _Gathered(torch.autograd.Function):
    """x of all ranks, end to end; the gradient of a rank's own is the sum of what all ranks found for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _gathered(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        total = dy.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total.chunk(distributed.get_world_size())[distributed.get_rank()]
