"""Stage I of MM-CDFSL (ECCV 2024): domain-adapted, class-discriminative masked pre-training of one modality."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .decoder_pack import decoder_pack
from .mae import MaskedAutoencoder
from .masks import Pack, join_packs


class MaskedPretraining(nn.Module):
    """L = reconstruction of source clips + target_weight * reconstruction of target clips + ce_weight * cross-entropy on source.

    target_weight: 1 is the paper's loss; 0 is what was released, and the target clips are then not looked at.
    ce_weight: the paper's lambda, 0.05 for RGB and 0.01 for flow and pose; not used by a model without classes.
    normalize_target: the model's config unless given. A module, so that DDP and FSDP see one forward a step.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        target_weight: float = 1.0,
        ce_weight: float = 0.05,
        normalize_target: bool | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("target_weight", target_weight), ("ce_weight", ce_weight)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        self.model = model
        self.target_weight = target_weight
        self.ce_weight = ce_weight
        self.normalize_target = normalize_target

    def forward(
        self,
        source: Tensor,
        target: Tensor | None,
        mask: Tensor | Pack,
        labels: Tensor | None = None,
        *,
        target_mask: Tensor | Pack | None = None,
    ) -> dict[str, Tensor]:
        """The losses of one step, source and target in one packed batch.

        source, target: [B, C, F, H, W] as MaskedAutoencoder takes them; target may be None where target_weight is 0.
        mask: of the source clips; target_mask: of the target clips, the same one unless given, as released.
        labels: int64 [B], classes of the source clips, needed by a model with classes.

        Returns scalars: total, source_loss, target_loss (with a target), ce and accuracy (with classes). Raises ValueError.
        """
        model = self.model
        if model.head is not None:
            labels = _check_labels(labels, len(source), model.config.num_classes)
        given = [(source, mask)]
        if self.target_weight:
            if target is None:
                raise ValueError("target must be given: target_weight is above 0")
            given.append((target, mask if target_mask is None else target_mask))
        videos = [video for video, _ in given]
        parts = [model.packs(video, removed) for video, removed in given]
        if any(plan.length is None for _, plan, _ in parts) and not torch.compiler.is_compiling():
            raise ValueError(
                "mask must remove equally many tokens in every view: the published loss is a mean over views"
            )
        grids = [model.encoder.check_video(v) for v in videos]
        if len(set(grids)) > 1:
            raise ValueError(f"target must have the source's token grid {grids[0]}, got {grids[1]}")
        visible = join_packs([part[0] for part in parts], [len(v) for v in videos])
        plan = decoder_pack(visible, grids[0][0] * grids[0][1] * grids[0][2]) if len(parts) > 1 else parts[0][1]
        x = torch.cat([model.encoder.embed(v, part[0]) for v, part in zip(videos, parts, strict=True)])
        tokens = model.encoder.encode_tokens(x, visible, grids[0])
        pred = model.predict(tokens, plan, grids[0])

        losses = {}
        preds = pred.split([own.token_idx.shape[0] for _, own, _ in parts])
        for name, video, said, (_, own, _) in zip(("source_loss", "target_loss"), videos, preds, parts, strict=False):
            losses[name] = model.patch_loss(said, video, own.token_idx, own.clip_idx, self.normalize_target)
        total = losses["source_loss"]
        if self.target_weight:
            total = total + self.target_weight * losses["target_loss"]
        if model.head is not None:
            assert labels is not None
            seen = parts[0][0]
            logits = model.classify(tokens[: seen.num_tokens], seen)
            labels = labels.to(logits.device)[seen.clip_of.long()]
            losses["ce"] = F.cross_entropy(logits.float(), labels)
            losses["accuracy"] = (logits.detach().argmax(-1) == labels).float().mean()
            total = total + self.ce_weight * losses["ce"]
        return {"total": total, **losses}


def _check_labels(labels: Tensor | None, batch: int, classes: int) -> Tensor:
    if labels is None:
        raise ValueError("labels must be given: the model has a class branch")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != (batch,):
        raise ValueError(f"labels must be [{batch}], one class a source clip, got {tuple(labels.shape)}")
    readable = labels.device.type == "cpu" and batch > 0 and not torch.compiler.is_compiling()
    if readable and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    return labels
