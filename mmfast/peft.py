"""Parameter-efficient few-shot adaptation: TED-Adapters and a linear head trained on the supports of each episode.

    min over W, b and the adapters    C sum_i mean_v CE(softmax(W f(x_i, v) + b), y_i) + 1/2 |W|^2

That is LogisticRegression's objective with features f that may move: x_i under masked views v, drawn anew at every step. The
backbone is frozen. Training starts at that head's optimum and at the adapters the model has; fresh ones change nothing,
so with no steps at all the result is the logistic head's.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from . import profiling
from .episode_sampler import Episodes
from .episodes import (
    EpisodeResult,
    check_views,
    clips_of_episodes,
    count_correct,
    encode_clips,
    make_result,
    own_seed,
)
from .fewshot import LogisticRegression, few_threads
from .masks import sample_pack
from .optim import WarmupCosine, param_groups
from .vit import MaskedViT


@dataclass(frozen=True)
class Adaptation:
    """How adapters are trained on the supports of an episode. Raises ValueError naming the field at fault.

    hidden: inner width of the adapters; None: an eighth of the model's. before, layers: as add_adapters takes them. A model
    that has adapters keeps them and starts every episode from them. steps: of AdamW, each on all supports under
    `views` masks of its own; its lr falls from lr to 0 by a cosine. weight_decay: of the adapters. C: as LogisticRegression's.
    """

    hidden: int | None = None
    before: tuple[str, ...] = ("attn",)
    layers: tuple[int, ...] | None = None
    steps: int = 30
    lr: float = 1e-2
    weight_decay: float = 0.05
    C: float = 1.0

    def __post_init__(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden must be at least 1, or None, got {self.hidden}")
        check_training(self)


def check_training(how: Any) -> None:
    """ValueError for steps, lr, weight_decay or C of an adaptation out of range."""
    if how.steps < 0:
        raise ValueError(f"steps must be at least 0, got {how.steps}")
    for name, value, allowed in (
        ("lr", how.lr, how.lr > 0),
        ("weight_decay", how.weight_decay, how.weight_decay >= 0),
        ("C", how.C, how.C > 0),
    ):
        if not (allowed and value < float("inf")):
            raise ValueError(
                f"{name} must be finite and {'at least' if name == 'weight_decay' else 'above'} 0, got {value}"
            )


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model's adapters by name."""
    return {name: p for name, p in model.named_parameters() if ".adapter_pre_" in name}


def freeze_backbone(model: nn.Module) -> list[nn.Parameter]:
    """Leave nothing but the adapters to train; gives their parameters. ValueError for a model without adapters."""
    adapters = adapter_parameters(model)
    if not adapters:
        raise ValueError("model has no adapters, so nothing would train; call add_adapters first")
    model.requires_grad_(False)
    for p in adapters.values():
        p.requires_grad_(True)
    return list(adapters.values())


class FewShotAdapter:
    """A frozen copy of a model whose adapters are trained on a few clips at a time, each time from the same start."""

    def __init__(self, model: MaskedViT, how: Adaptation | None = None, seed: int = 0) -> None:
        if not isinstance(model, MaskedViT):
            raise TypeError(f"model must be a MaskedViT, got {type(model).__name__}")
        self.how = Adaptation() if how is None else how
        self.model = copy.deepcopy(model).eval()
        own = self.model.config.adapter_hidden
        if own and self.how.hidden not in (None, own):
            raise ValueError(
                f"hidden must be None or {own}, as wide as the adapters the model has, got {self.how.hidden}"
            )
        if not own:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                hidden = self.how.hidden or max(1, model.embed_dim // 8)
                self.model.add_adapters(hidden, self.how.before, self.how.layers)
        self.adapters = freeze_backbone(self.model)
        self._start = [p.detach().clone() for p in self.adapters]

    @property
    def num_parameters(self) -> int:
        """Of the adapters, which train beside the head."""
        return sum(p.numel() for p in self.adapters)

    def fit(
        self,
        video: Tensor,
        ids: Tensor,
        labels: Tensor,
        views: int = 2,
        mask_ratio: float = 0.75,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Train on clips; the adapted features are self.model's. Returns the head's fp32 weight [n_way, D] and bias [n_way].

        video: [S, C, F, H, W]. ids: int64 [S]. labels: int64 [S], each of 0..n_way-1. Masks are a function of (seed, step,
        clip id, view). dtype: bf16 or fp16 autocast.
        """
        with torch.no_grad():
            for p, start in zip(self.adapters, self._start, strict=True):
                p.copy_(start)
        weight, bias = self._first_head(video, ids, labels, views, mask_ratio, seed, dtype)
        if not self.how.steps:
            return weight, bias
        device = weight.device
        video, labels = video.to(device), labels.to(device)
        head = [nn.Parameter(weight), nn.Parameter(bias)]
        groups = [*param_groups(self.model, self.how.lr, self.how.weight_decay), self._group(head)]
        optimizer = torch.optim.AdamW(groups, self.how.lr)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        schedule = WarmupCosine(optimizer, self.how.steps, 0, min_lr=0.0)
        decay = 1 / (2 * self.how.C * len(labels))
        truth = labels.repeat_interleave(views)
        with profiling.range("adapt"), torch.enable_grad():
            for step in range(self.how.steps):
                features = self._features(video, ids, views, mask_ratio, own_seed(seed, step), dtype)
                loss = F.cross_entropy(F.linear(features, *head), truth) + decay * head[0].square().sum()
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
        return head[0].detach(), head[1].detach()

    def _first_head(
        self, video: Tensor, ids: Tensor, labels: Tensor, views: int, mask_ratio: float, seed: int, dtype: Any
    ) -> tuple[Tensor, Tensor]:
        return logistic_start(encode_clips(self.model, video, ids, views, mask_ratio, seed, dtype), labels, self.how.C)

    def _group(self, head: list[nn.Parameter]) -> dict[str, Any]:
        return {"name": "head", "params": head, "weight_decay": 0.0, "lr_scale": 1.0, "lr": self.how.lr}

    def _features(
        self, video: Tensor, ids: Tensor, views: int, mask_ratio: float, seed: int, dtype: torch.dtype | None
    ) -> Tensor:
        """fp32 [S*V, D], with a gradient."""
        grid = self.model.check_video(video)
        pack = sample_pack(len(ids), views, grid, mask_ratio, seed=seed, clip_ids=ids, device=video.device)
        with torch.autocast(video.device.type, dtype, enabled=dtype is not None):
            return self.model.encode(video, pack).float()


def evaluate_adapted(
    model: MaskedViT,
    dataset: Any,
    episodes: Episodes,
    views: int = 2,
    mask_ratio: float = 0.75,
    seed: int = 0,
    *,
    how: Adaptation | None = None,
    modality: str = "rgb",
    dtype: torch.dtype | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> EpisodeResult:
    """Accuracy on each episode of adapters and head that are trained on its supports; the model stays as it is.

    dataset: clip i is that of episodes.labels[i]; only clips will do, since features stored before know no adapters. Queries
    are seen under the masks that evaluate_fresh gives them, and each episode is a function of (seed, its number): shards
    on several ranks give the results of one. Raises ValueError for arguments out of range and a clip that cannot be read.
    """
    tuned = FewShotAdapter(model, how, seed)
    check_views(tuned.model, views, mask_ratio)

    def one(support: tuple[Tensor, Tensor, Tensor], query: tuple[Tensor, Tensor], own: int) -> Tensor:
        weight, bias = tuned.fit(*support, views, mask_ratio, own, dtype)
        queries = encode_clips(tuned.model, *query, views, mask_ratio, own, dtype)
        return F.linear(queries, weight, bias).softmax(-1).mean(1)

    return evaluate_each(one, dataset, episodes, seed, modality=modality, num_workers=num_workers, progress=progress)


# -- what every adaptation needs -----------------------------------------------------------------------------------


def logistic_start(features: Tensor, labels: Tensor, C: float = 1.0) -> tuple[Tensor, Tensor]:
    """The head that training starts from, fp32 weight [n_way, D] and bias [n_way]: LogisticRegression's optimum on all views.

    features: [S, V, D]. labels: int64 [S], each of 0..n_way-1. The V views of a clip weigh as one clip.
    """
    views = features.shape[1]
    each = labels.to(features.device).repeat_interleave(views)
    with few_threads(features.device, features.numel() * len(features)):
        fitted = LogisticRegression(C / views).fit(features.flatten(0, 1)[None], each[None])
    bias = fitted.bias[0] - fitted.weight[0] @ fitted.centre[0]
    return fitted.weight[0].float(), bias.float()


def evaluate_each(
    one: Callable[[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor], int], Tensor],
    dataset: Any,
    episodes: Episodes,
    seed: int = 0,
    *,
    modality: str = "rgb",
    num_workers: int = 0,
    progress: bool = True,
) -> EpisodeResult:
    """Accuracy on each episode of what `one` makes of it: (supports' pixels, ids, labels), (queries' pixels, ids), a seed.

    one: returns the queries' class probabilities, [N*Q, N]. The seed is a function of (seed, the episode's number).
    """
    drawn = clips_of_episodes(dataset, episodes, modality, num_workers)
    numbers, correct = [], []
    with tqdm(total=len(episodes), unit="episode", desc="adapting", disable=not progress) as bar:
        for part in episodes.batches(1):
            ids, video = next(drawn)
            shots, own = part.support.shape[1], own_seed(seed, int(part.number[0]))
            support = video[:shots], ids[:shots], part.support_labels[0]
            probabilities = one(support, (video[shots:], ids[shots:]), own)
            numbers.append(part.number)
            correct.append(count_correct(probabilities[None], part))
            bar.update()
    return make_result(numbers, correct, episodes)
