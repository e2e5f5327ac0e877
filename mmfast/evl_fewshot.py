"""Few-shot adaptation with EVL's decoder: on a frozen backbone's last blocks, trained with a head on each episode's supports.

    min over W, V, b and the decoder    C sum_i mean_v CE(softmax(W g_iv + V h_iv + b), y_i) + 1/2 |W|^2 + 1/2 |V|^2

g_iv is the pooled feature of support i under masked view v, h_iv the normed class query of the decoder over the last blocks.
W and b start at LogisticRegression's optimum on g and V at 0, so with no steps at all the result is the logistic head's. The
backbone never trains: it runs once for each (support, view), however many steps there are.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import profiling
from .clip import CLIP
from .clip_vision import CLIPVision
from .ensemble import micro_batch_size, run_in_micro_batches
from .episode_sampler import Episodes
from .episodes import EpisodeResult, own_seed
from .evl import EVL
from .evl_config import EVLConfig
from .evl_decoder import LayerFeatures
from .layers import Linear
from .masks import kept_per_slot, sample_pack
from .optim import WarmupCosine, param_groups
from .peft import check_training, evaluate_each, logistic_start
from .vit import MaskedViT

TEMPORAL = ("conv", "positions", "attention")
Seen = tuple[Tensor, list[LayerFeatures]]  # pooled features fp32 [S*V, D], and what the decoder reads


@dataclass(frozen=True)
class DecoderAdaptation:
    """How a decoder is trained on the supports of an episode. Raises ValueError naming the field at fault.

    layers, num_frames, temporal: of a fresh decoder: blocks it reads, the last four or all where there are fewer; frames, 8 of
    a CLIP and a MaskedViT's own slots; its temporal modules, some of "conv", "positions", "attention".
    steps: of AdamW, each on all supports under `views` masks; the lrs, of the decoder and of the head, fall to 0 by a cosine.
    weight_decay: of the decoder's matrices. dropout: inside its MLPs and in front of V. draws: how many times `views` masks
    are drawn for the supports; the steps go round them, and the backbone runs once for each. C: as LogisticRegression's.
    """

    layers: int | None = None
    num_frames: int | None = None
    temporal: tuple[str, ...] = TEMPORAL
    steps: int = 30
    lr: float = 1e-4
    head_lr: float = 1e-3
    weight_decay: float = 0.05
    dropout: float = 0.5
    draws: int = 1
    C: float = 1.0

    def __post_init__(self) -> None:
        check_training(self)
        if not 0 < self.head_lr < float("inf"):
            raise ValueError(f"head_lr must be finite and above 0, got {self.head_lr}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")
        for name in ("layers", "num_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {value}")
        for name in self.temporal:
            if name not in TEMPORAL:
                raise ValueError(f"temporal must be some of {', '.join(TEMPORAL)}, got {name!r}")


class FewShotDecoder:
    """A frozen copy of a backbone with a decoder that is trained on a few clips at a time, each time from the same start.

    model: a backbone, whose decoder is a fresh one drawn by seed; or an EVL, whose own decoder is the start, without its
    head. `evl` has decoder, V and b after a fit, `weight` fp32 [n_way, D] is W.
    """

    weight: Tensor

    def __init__(
        self, model: EVL | MaskedViT | CLIP | CLIPVision, how: DecoderAdaptation | None = None, seed: int = 0
    ) -> None:
        self.how = DecoderAdaptation() if how is None else how
        if not isinstance(model, (EVL, MaskedViT, CLIP, CLIPVision)):
            raise TypeError(f"model must be an EVL or its backbone, got {type(model).__name__}")
        config = _changed(model.config, self.how) if isinstance(model, EVL) else _fresh(model, self.how)
        backbone = model.backbone if isinstance(model, EVL) else model.visual if isinstance(model, CLIP) else model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.evl = EVL(config, copy.deepcopy(backbone)).eval()
        if isinstance(model, EVL):
            self.evl.decoder.load_state_dict(model.decoder.state_dict())
            self.evl.proj[0].load_state_dict(model.proj[0].state_dict())
        device = next(self.evl.backbone.parameters()).device
        self.evl.decoder.to(device)
        self.evl.proj.to(device)
        self._trained = {**_named(self.evl.decoder, "decoder"), **_named(self.evl.proj[0], "norm")}
        self._start = {name: p.detach().clone() for name, p in self._trained.items()}

    @property
    def num_parameters(self) -> int:
        """Of the decoder and its last norm, which train beside the head."""
        return sum(p.numel() for p in self._start.values())

    def fit(
        self,
        video: Tensor,
        ids: Tensor,
        labels: Tensor,
        views: int = 2,
        mask_ratio: float = 0.75,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Train on clips, from the start.

        video: [S, C, F, H, W]. ids: int64 [S]. labels: int64 [S], each of 0..n_way-1. Masks are a function of (seed, draw,
        clip id, view), those of the first draw are encode_clips' own. dtype: bf16 or fp16 autocast.
        """
        how, evl = self.how, self.evl
        with torch.no_grad():
            for name, p in self._trained.items():
                p.copy_(self._start[name])
        made = [self._seen(video, ids, views, mask_ratio, seed, dtype)]
        weight, bias = logistic_start(made[0][0].unflatten(0, (-1, views)), labels, how.C)
        evl.proj[2] = _head(evl.config.width, bias)
        self.weight = weight
        if not how.steps:
            return
        for draw in range(1, min(how.draws, how.steps)):
            made.append(self._seen(video, ids, views, mask_ratio, own_seed(seed, draw), dtype))
        self.weight = start = nn.Parameter(weight)
        truth = labels.to(weight.device).repeat_interleave(views)
        with _seeded(own_seed(seed, how.draws), weight.device), torch.enable_grad(), profiling.range("adapt"):
            evl.train()
            self._descend(start, made, truth, 1 / (2 * how.C * len(labels)), dtype)
            evl.eval()
        self.weight = self.weight.detach()

    @torch.no_grad()
    def predict_proba(
        self,
        video: Tensor,
        ids: Tensor,
        views: int = 2,
        mask_ratio: float = 0.75,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """fp32 [B, n_way], the mean over `views` masked views.   Arguments as fit takes them. ValueError before a fit."""
        if not hasattr(self, "weight"):
            raise ValueError("FewShotDecoder has not been fitted: call fit(video, ids, labels) first")

        def run(clips: slice) -> Tensor:
            seen = self._encode(video[clips], ids[clips], views, mask_ratio, seed, dtype)
            return self._logits(seen, dtype).softmax(-1).unflatten(0, (-1, views)).mean(1)

        return torch.cat(run_in_micro_batches(run, len(ids), self._micro_batch(video, views, mask_ratio)))

    # -- inside ------------------------------------------------------------------------------------------------

    def _descend(
        self, weight: nn.Parameter, made: list[Seen], truth: Tensor, decay: float, dtype: torch.dtype | None
    ) -> None:
        how, evl, last = self.how, self.evl, self.evl.proj[2]
        head = [weight, *last.parameters()]
        groups = [
            *param_groups(evl.decoder, how.lr, how.weight_decay),
            _group("norm", list(evl.proj[0].parameters()), how.lr),
            _group("head", head, how.head_lr),
        ]
        optimizer = torch.optim.AdamW(groups, how.lr)
        scaler = torch.amp.GradScaler(weight.device.type, enabled=dtype is torch.float16)
        schedule = WarmupCosine(optimizer, how.steps, 0, min_lr=0.0)
        for step in range(how.steps):
            squares = sum(p.square().sum() for p in (weight, last.get_parameter("weight")))
            loss = F.cross_entropy(self._logits(made[step % len(made)], dtype), truth) + decay * squares
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()

    def _logits(self, seen: Seen, dtype: torch.dtype | None) -> Tensor:
        """fp32 [S*V, n_way]."""
        pooled, layers = seen
        with torch.autocast(pooled.device.type, dtype, enabled=dtype is not None):
            query = self.evl.decode(layers)
        return F.linear(pooled, self.weight) + self.evl.proj(query.float())

    def _seen(
        self, video: Tensor, ids: Tensor, views: int, mask_ratio: float, seed: int, dtype: torch.dtype | None
    ) -> Seen:
        """What the head and the decoder see of clips, in micro batches; end to end."""
        blocks: list[list[LayerFeatures]] = []

        def run(clips: slice) -> Tensor:
            pooled, layers = self._encode(video[clips], ids[clips], views, mask_ratio, seed, dtype)
            blocks.append(layers)
            return pooled

        pooled = torch.cat(run_in_micro_batches(run, len(ids), self._micro_batch(video, views, mask_ratio)))
        return pooled, [_joined(parts) for parts in zip(*blocks, strict=True)]

    @torch.no_grad()
    def _encode(
        self, video: Tensor, ids: Tensor, views: int, mask_ratio: float, seed: int, dtype: torch.dtype | None
    ) -> Seen:
        evl, device = self.evl, self.evl.decoder.cls_token.device
        grid = evl.check_video(video)
        pack = sample_pack(len(ids), views, grid, mask_ratio, seed=seed, clip_ids=ids, device=device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None), profiling.range("encode_views"):
            layers = list(evl.stream(video.to(device, non_blocking=True), pack))
            return _pooled(evl.backbone, layers[-1].out).float(), layers

    def _micro_batch(self, video: Tensor, views: int, mask_ratio: float) -> int:
        grid = self.evl.check_video(video)
        return micro_batch_size(views * grid[0] * kept_per_slot(grid, mask_ratio), self.evl.decoder.cls_token.device)


def evaluate_decoded(
    model: EVL | MaskedViT | CLIP | CLIPVision,
    dataset: Any,
    episodes: Episodes,
    views: int = 2,
    mask_ratio: float = 0.75,
    seed: int = 0,
    *,
    how: DecoderAdaptation | None = None,
    modality: str = "rgb",
    dtype: torch.dtype | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> EpisodeResult:
    """Accuracy on each episode of decoder and head that are trained on its supports; the model stays as it is.

    model, how: as FewShotDecoder takes them. Other arguments, and what is raised, as in peft.evaluate_adapted, whose episodes
    see the same masks here.
    """
    if views < 1:
        raise ValueError(f"views must be at least 1, got {views}")
    tuned = FewShotDecoder(model, how, seed)
    kept_per_slot((1, *tuned.evl.config.grid), mask_ratio)

    def one(support: tuple[Tensor, Tensor, Tensor], query: tuple[Tensor, Tensor], own: int) -> Tensor:
        tuned.fit(*support, views, mask_ratio, own, dtype)
        return tuned.predict_proba(*query, views, mask_ratio, own, dtype)

    return evaluate_each(one, dataset, episodes, seed, modality=modality, num_workers=num_workers, progress=progress)


# -- inside ------------------------------------------------------------------------------------------------------------


def _fresh(model: MaskedViT | CLIP | CLIPVision, how: DecoderAdaptation) -> EVLConfig:
    depth = EVLConfig(model.config, num_layers=1).depth
    config = EVLConfig(
        model.config,
        num_layers=min(4, depth) if how.layers is None else how.layers,
        num_frames=how.num_frames,  # type: ignore[arg-type]  # None follows the backbone
        temporal_conv="conv" in how.temporal,
        temporal_positions="positions" in how.temporal,
        temporal_cross_attention="attention" in how.temporal,
    )
    return _changed(config, how)


def _changed(config: EVLConfig, how: DecoderAdaptation) -> EVLConfig:
    for name, own in (("layers", config.num_layers), ("num_frames", config.num_frames)):
        if getattr(how, name) not in (None, own):
            raise ValueError(f"{name} must be None or {own}, as in the decoder there is, got {getattr(how, name)}")
    return replace(config, mlp_dropout=how.dropout, class_dropout=how.dropout, num_classes=1)


def _named(module: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    return {f"{prefix}.{name}": p for name, p in module.named_parameters()}


def _head(width: int, bias: Tensor) -> Linear:
    """V at 0 and b."""
    head = nn.utils.skip_init(Linear, width, len(bias), device=bias.device)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(bias)
    return head


def _group(name: str, params: list[nn.Parameter], lr: float) -> dict[str, Any]:
    return {"name": name, "params": params, "weight_decay": 0.0, "lr_scale": 1.0, "lr": lr}


def _pooled(backbone: MaskedViT | CLIPVision, out: Tensor) -> Tensor:
    """The feature that the backbone itself makes of its last block, [V, D]; a CLIP's is the mean of its frames'.

    out: [V, F, L, D].
    """
    if isinstance(backbone, CLIPVision):
        return backbone.head(out[:, :, 0]).mean(1)
    tokens = out.flatten(1, 2)
    return backbone.forward_head(tokens if backbone.norm is None else backbone.norm(tokens, tokens.dtype), True)


def _joined(parts: tuple[LayerFeatures, ...]) -> LayerFeatures:
    """Views of several micro batches as one batch."""
    if len(parts) == 1:
        return parts[0]
    q, k, cells = ([t for t in tensors if t is not None] for tensors in list(zip(*parts, strict=True))[1:])
    each = (torch.cat(tensors) if tensors else None for tensors in (q, k, cells))
    return LayerFeatures(torch.cat([part.out for part in parts]), *each)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout as a function of seed alone, and nobody else's draws changed."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
