"""Multi-view test protocols: every view of a clip is scored, and the scores of a clip are the mean of their softmax.

    p(y | clip) = 1/V  sum_v  softmax(score_y(view v))      V parts in time times crops, perhaps each under several tube masks

A score is a logit of the class head (MaskedViT, EVL, M2CLIP), or class_scale times the cosine with a class's text (M2CLIP,
CLIP). What of it takes pixels goes into shards first, shared out over ranks and taken up again where it was killed; texts come
after.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .clip import CLIP
from .data.views import ViewClips
from .ensemble import micro_batch_size, run_in_micro_batches
from .evl import EVL
from .extract import PRECISIONS, Report, autocast, one_of, run_sharded, weights_fingerprint
from .m2clip import M2CLIP
from .m2clip_losses import class_cosines
from .masks import Grid, Pack, kept_per_slot, sample_pack
from .stored import StoredClips
from .vit import MaskedViT, video_grid

Model = MaskedViT | M2CLIP | CLIP | EVL
_CHUNK = 256  # clips scored against texts at a time


@dataclass(frozen=True)
class Accuracy:
    """Shares of the clips whose class is the first, or among the first five."""

    top1: float
    top5: float
    clips: int

    @staticmethod
    def of(scores: Tensor, labels: Tensor) -> "Accuracy":
        """scores: [C, K], any. labels: int64 [C]. ValueError for no clips."""
        if not len(labels):
            raise ValueError("scores must be of at least one clip")
        ranks = label_ranks(scores, labels)
        top1, top5 = ((ranks < k).double().mean().item() for k in (1, 5))
        return Accuracy(top1, top5, len(labels))


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before a clip's own, int64 [C]; of equal ones the first comes first; K for scores that are NaN.

    scores: [C, K]. labels: int64 [C] on the same device.
    """
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    before = (scores > own) | ((scores == own) & earlier)
    return torch.where(scores.isnan().any(1), scores.shape[1], before.sum(1))


def encode_views(
    model: Model,
    clips: ViewClips,
    out: str | os.PathLike[str],
    *,
    without_adapters: bool = False,
    masks: int = 1,
    mask_ratio: float = 0.0,
    seed: int = 0,
    precision: str = "fp32",
    shard_size: int = 4096,
    batch: int = 8,
    workers: int = 0,
    rank: int | None = None,
    world: int | None = None,
    retry: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Encode all views of every clip into the folder `out`, where ViewScores reads them.

    without_adapters: an M2CLIP's vision features without its adapters too. masks: looks at every view, each under a tube mask of
    mask_ratio drawn by (seed, clip id, look), alike in all views of a clip; a ratio of 0 removes nothing. batch: clips at a time.
    Other options, and what is raised, as in extract.extract.
    """
    if masks < 1:
        raise ValueError(f"masks must be at least 1, got {masks}")
    if masks > 1 and not mask_ratio:
        raise ValueError(f"masks must be 1 where mask_ratio is 0: nothing tells them apart, got {masks}")
    if without_adapters and not isinstance(model, M2CLIP):
        raise ValueError(f"without_adapters is of an M2CLIP; a {type(model).__name__} has no adapters to leave out")
    if isinstance(model, MaskedViT) and not model.config.num_classes:
        raise ValueError("the model has no classes (num_classes=0), so there is nothing to score")
    seen = model.backbone if isinstance(model, EVL) else model
    if isinstance(seen, MaskedViT) and seen.config.in_chans != 3:
        raise ValueError(f"views are of RGB; the model takes {seen.config.in_chans} channels")
    amp = one_of("precision", precision, PRECISIONS)
    device = next(iter(model.parameters())).device
    views = clips.clips * clips.crops
    shape: Any = _ViewShape(model, views)
    settings = {
        "what": "views",
        "weights": weights_fingerprint(model),
        "config": model.config.to_dict(),
        "views": {"clips": clips.clips, "crops": clips.crops, "stride": clips.stride, "size": clips.size[0]},
        "frames": clips.num_frames,
        "masks": masks,
        "mask_ratio": mask_ratio,
        "mask_seed": seed,
        "precision": precision,
        "without_adapters": without_adapters,
        "about": dict(about or {}),
    }

    @torch.no_grad()
    def compute(ids: Tensor, video: Tensor) -> dict[str, Tensor]:
        pixels = video.unflatten(2, (views, -1)).movedim(2, 1).flatten(0, 1)
        grid = shape.grid(pixels)
        of_view = ids.repeat_interleave(views)

        def run(part: slice) -> Tensor:
            chosen, look = of_view[part], pixels[part].to(device, non_blocking=True)
            pack = None
            if mask_ratio:
                pack = sample_pack(len(chosen), masks, grid, mask_ratio, seed=seed, clip_ids=chosen, device=device)
            with autocast(device, amp):
                return _look(model, look, pack).unflatten(0, (-1, masks)).float()

        tokens = masks * grid[0] * kept_per_slot(grid, mask_ratio)
        size = micro_batch_size(tokens, device)

        def all_views() -> Tensor:
            each = torch.cat(run_in_micro_batches(run, len(of_view), size))
            return each.unflatten(0, (len(ids), views)).flatten(1, 2)  # [B, V * masks, ...]

        found = _named(model, all_views())
        if without_adapters:
            assert isinstance(model, M2CLIP)
            with adapters_off(model, vision=True):
                found["features_plain"] = _named(model, all_views())["features"]
        return found

    training = model.training
    model.eval()
    try:
        return run_sharded(
            compute, shape, clips, out, "views", settings, modality="rgb", shard_size=shard_size, batch=batch,
            workers=workers, rank=rank, world=world, retry=retry, progress=progress,
        )  # fmt: skip
    finally:
        model.train(training)


class ViewScores(StoredClips):
    """What `encode_views` has put into a folder, as scores. Raises ValueError for a folder of anything else."""

    what = "views"

    def by_class(self, ids: Sequence[int]) -> Tensor:
        """Probabilities of the class head, fp32 [C, K]: of an M2CLIP, MaskedViT or EVL."""
        return self._reader.rows("probabilities", ids)

    def by_text(self, ids: Sequence[int], texts: Tensor, scale: float = 100.0, *, adapters: bool = True) -> Tensor:
        """Probabilities from cosines, fp32 [C, K'].   texts: [K', E] of the classes. adapters: of the vision tower."""
        name = "features" if adapters else "features_plain"
        return torch.cat([self._scored(name, ids[i : i + _CHUNK], texts, scale) for i in range(0, len(ids), _CHUNK)])

    def _scored(self, name: str, ids: Sequence[int], texts: Tensor, scale: float) -> Tensor:
        features = self._reader.rows(name, ids).to(texts.device)
        return (
            class_cosines(features.flatten(0, 1), texts, scale)
            .softmax(-1)
            .unflatten(0, features.shape[:2])
            .mean(1)
            .cpu()
        )


@torch.no_grad()
def text_features(model: M2CLIP | CLIP, class_token_ids: Tensor, batch: int = 512) -> Tensor:
    """Unit features of classes, fp32 [K, E]: the normalised mean of the unit features of their prompts.

    class_token_ids: [K, context], or [R, K, context] for R prompts a class. batch: texts at a time.
    """
    ids = class_token_ids if class_token_ids.dim() == 3 else class_token_ids[None]
    clip = model.clip if isinstance(model, M2CLIP) else model
    flat = ids.flatten(0, 1)
    texts = torch.cat([clip.encode_text(part).float() for part in flat.split(batch)])
    unit = torch.nn.functional.normalize(texts, dim=-1).unflatten(0, ids.shape[:2])
    return torch.nn.functional.normalize(unit.mean(0), dim=-1)


def text_scale(model: M2CLIP | CLIP) -> float:
    """What cosines are multiplied with: class_scale of an M2CLIP, a CLIP's own temperature."""
    return model.config.class_scale if isinstance(model, M2CLIP) else float(model.logit_scale.detach().exp())


@dataclass(frozen=True)
class ZeroShot:
    """Accuracy on every split with the adapters of a tower on or off; None for a CLIP, which has none."""

    vision_adapters: bool | None
    text_adapters: bool | None
    splits: dict[str, Accuracy]

    @property
    def mean(self) -> Accuracy:
        """The mean over the splits, each counting as much."""
        found = list(self.splits.values())
        top1, top5 = (sum(tops) / len(found) for tops in zip(*((a.top1, a.top5) for a in found), strict=True))
        return Accuracy(top1, top5, sum(a.clips for a in found))


def zero_shot(
    model: M2CLIP | CLIP,
    scores: ViewScores,
    splits: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    class_token_ids: Tensor,
) -> list[ZeroShot]:
    """Score classes that are known by their texts alone, on several splits.   class_token_ids: as text_features takes them.

    splits: name -> (clip ids, class numbers). An M2CLIP is scored with the adapters of either tower on and off, all four ways,
    where scores hold features without the vision tower's. Raises ValueError for a split without a clip.
    """
    for name, (ids, _) in splits.items():
        if not ids:
            raise ValueError(f"split {name} has no clip that can be read")
    scale = text_scale(model)
    ways: list[tuple[bool | None, bool | None]] = [(None, None)]
    if isinstance(model, M2CLIP):
        plain = scores.settings["without_adapters"]
        ways = [(vision, text) for vision in ((True, False) if plain else (True,)) for text in (True, False)]
    texts: dict[bool | None, Tensor] = {}
    for text in dict.fromkeys(text for _, text in ways):
        with adapters_off(model, text=text is False):
            texts[text] = text_features(model, class_token_ids)
    found = []
    for vision, text in ways:
        accuracy = {}
        for name, (ids, labels) in splits.items():
            probabilities = scores.by_text(ids, texts[text], scale, adapters=vision is not False)
            accuracy[name] = Accuracy.of(probabilities, torch.tensor(labels))
        found.append(ZeroShot(vision, text, accuracy))
    return found


@contextmanager
def adapters_off(model: Model, *, vision: bool = False, text: bool = False) -> Iterator[None]:
    """Without the adapters of a tower, for a while; they are on afterwards. Nothing for a model without any."""
    if not isinstance(model, M2CLIP) or not (vision or text):
        yield
        return
    try:
        model.enable_adapters(vision=False if vision else None, text=False if text else None)
        yield
    finally:
        model.enable_adapters(vision=True if vision else None, text=True if text else None)


# -- inside ------------------------------------------------------------------------------------------------------------


def _look(model: Model, video: Tensor, pack: Pack | None) -> Tensor:
    """All that a model finds in views: [S, K + E], class logits and features in the space of texts, where it has them."""
    if isinstance(model, (MaskedViT, EVL)):
        return model(video, pack)
    if isinstance(model, CLIP):
        return model.encode_image(video, pack).mean(-2)
    encoded = model.encode_video(video, pack)
    return torch.cat((encoded.class_logits.float(), encoded.features.float()), -1)


def _named(model: Model, found: Tensor) -> dict[str, Tensor]:
    """What is kept of `_look` at all views, [B, V, K + E]."""
    classes = 0 if isinstance(model, CLIP) else model.config.num_classes
    logits, features = found.split((classes, found.shape[-1] - classes), -1)
    kept = {"probabilities": logits.softmax(-1).mean(1)} if classes else {}
    return kept if isinstance(model, (MaskedViT, EVL)) else kept | {"features": features.contiguous()}


class _Channels:
    in_chans = 3


class _ViewShape:
    """What `run_sharded` asks of a model, where the views of a clip lie one after another in time."""

    def __init__(self, model: Model, views: int) -> None:
        self.model, self.views, self.config = model, views, _Channels()

    def grid(self, pixels: Tensor) -> Grid:
        """The grid of one view, [B, 3, F, H, W]."""
        if isinstance(self.model, (MaskedViT, EVL)):
            return self.model.check_video(pixels)
        config = self.model.config.clip if isinstance(self.model, M2CLIP) else self.model.config
        return video_grid(pixels, 3, 1, config.patch_size)

    def check_video(self, video: Tensor) -> Grid:
        return self.grid(video[:, :, : video.shape[2] // self.views])

    def parameters(self) -> Any:
        return self.model.parameters()
