"""Stage II: multimodal distillation on unlabelled target clips, as a LightningModule."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch import distributed as dist

from ..distill import CrossModalTranslate, ModalityWeights, MultimodalDistillation
from ..episodes import Episodes, evaluate_episodes
from ..fewshot import LogisticRegression, Prototype, Ridge
from ..masks import sample_pack
from ..vit import MaskedViT
from .base import Stage
from .modalities import check_channels, check_modality

_HEADS = {"logistic": LogisticRegression, "prototype": Prototype, "ridge": Ridge}


class DistillStage(Stage):
    """An RGB student learns what frozen teachers of several modalities say of the same tokens.

    A batch is a data set's items in all modalities, collated, under "target". Validation scores the student, never a
    teacher, on few-shot episodes: `val_accuracy` is their mean in percent, with its `val_standard_error`. The episodes and
    masks of all validations are the same, so that their difference is the student's.

    Args:
        student: a checkpoint of stage I, or of any known dialect, on RGB.
        teachers: modality -> checkpoint. rgb may be "student": a copy of the student as it starts.
        overrides: fields of ViTConfig for student and teachers alike, such as {"norm_eps": 1.0e-5}.
        fresh_fc_norm: start the norm behind the mean anew, as the released loader does, where a file has a trained one.
        weights: modality -> weight of its loss; 1 unless given.
        learn_weights: learn them, starting from `weights`.
        mask_ratio: of the tokens, that are removed, in training and validation.
        lr: of a step of 256 clips; scaled to what a step has.
        min_lr, warmup_lr: as they are.
        warmup_epochs: of trainer.max_epochs.
        betas, weight_decay: of AdamW.
        decay_all: weight decay on norms and biases too, as released.
        reference: the schedule as released, whose cosine ends 0.6 % above min_lr.
        n_way, k_shot, n_query, episodes: of validation.
        views: masked views of a query that vote; support clips have one.
        head: the few-shot classifier.
        grad_checkpointing: "mlp" or "block" computes parts again in the backward, to save memory.
        seed: of masks, dropout and episodes.
        patience: so many steps in a row that are not finite end the run.
    """

    def __init__(
        self,
        student: str,
        teachers: dict[str, str],
        overrides: dict[str, Any] | None = None,
        fresh_fc_norm: bool = False,
        weights: dict[str, float] | None = None,
        learn_weights: bool = False,
        mask_ratio: float = 0.75,
        lr: float = 2e-3,
        min_lr: float = 5e-7,
        warmup_lr: float = 5e-7,
        warmup_epochs: float = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        decay_all: bool = False,
        reference: bool = False,
        n_way: int = 5,
        k_shot: int = 5,
        n_query: int = 15,
        episodes: int = 600,
        views: int = 2,
        head: Literal["logistic", "prototype", "ridge"] = "logistic",
        grad_checkpointing: str | None = None,
        seed: int = 42,
        patience: int = 10,
    ) -> None:
        super().__init__(
            lr=lr,
            min_lr=min_lr,
            warmup_lr=warmup_lr,
            warmup_epochs=warmup_epochs,
            scale_all_lrs=False,
            betas=betas,
            weight_decay=weight_decay,
            decay_all=decay_all,
            reference=reference,
            mask_ratio=mask_ratio,
            seed=seed,
            patience=patience,
        )
        if views < 1:
            raise ValueError(f"views must be at least 1, got {views}")
        self.episode_settings = dict(n_way=n_way, k_shot=k_shot, n_query=n_query, episodes=episodes, seed=seed)
        self.views, self.head = views, head
        own = load_encoder("rgb", student, overrides, fresh_fc_norm)
        others = {}
        for modality, source in teachers.items():
            check_modality(modality)
            if source == "student":
                if modality != "rgb":
                    raise ValueError(f"teachers: only rgb can be a copy of the student, got {modality}: student")
                others[modality] = deepcopy(own)
            else:
                others[modality] = load_encoder(modality, source, overrides, fresh_fc_norm)
        if not others:
            raise ValueError("teachers must name at least one modality")
        if grad_checkpointing is not None:
            own.set_grad_checkpointing(True, grad_checkpointing)
        shares: float | Mapping[str, float] = dict.fromkeys(others, 1.0) | (weights or {})
        mixed = ModalityWeights(others, learnable=learn_weights, init=shares)
        self.loss_module = MultimodalDistillation(own, others, CrossModalTranslate(own.embed_dim, others), mixed)
        self._seen: dict[int, Tensor] = {}

    @property
    def student(self) -> MaskedViT:
        """The model that is trained and scored."""
        module = self.loss_module
        assert isinstance(module, MultimodalDistillation)
        return module.student

    def losses(self, batch: Any) -> dict[str, Tensor]:
        items = batch["target"]
        module = self.loss_module
        assert isinstance(module, MultimodalDistillation)
        videos = {m: items[m] for m in dict.fromkeys(("rgb", *module.teachers)) if m in items}
        if "rgb" not in videos:
            raise ValueError(f"the clips have no rgb, which the student sees; they have {', '.join(items)}")
        mask = self.pack(items["clip_id"], self.student.check_video(videos["rgb"]))
        losses = module(videos, mask)
        losses.pop("features")
        return losses

    def clips_in(self, batch: Any) -> int:
        return len(batch["target"]["clip_id"])

    def export(self, state: dict[str, Tensor], folder: str | Path) -> None:
        model = MaskedViT(self.student.config)
        prefix = "loss_module.student."
        model.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
        model.save_pretrained(folder)

    # -- validation ----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._seen = {}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Keep the features of a few clips, [views, D] each, by their places in the list of clips."""
        video, ids = batch["rgb"], batch["clip_id"]
        grid = self.student.check_video(video)
        pack = sample_pack(len(ids), self.views, grid, self.mask_ratio, seed=self.seed, clip_ids=ids, device=ids.device)
        features = self.student.encode(video, pack).unflatten(0, (len(ids), self.views)).float().cpu()
        self._seen.update(zip(batch["places"], features, strict=True))

    def on_validation_epoch_end(self) -> None:
        seen, self._seen = self._seen, {}
        trainer: Any = self.trainer
        if trainer.sanity_checking or trainer.limit_val_batches not in (None, 1.0):
            return  # a part of the clips makes other episodes
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(parts, seen)
            seen = {place: features for part in parts for place, features in part.items()}
        records = trainer.datamodule.val_records
        # A clip that could not be read has no class, so that no episode draws it.
        labels = [record.label if place in seen else None for place, record in enumerate(records)]
        blank = torch.zeros(self.views, self.student.embed_dim)
        features = torch.stack([seen.get(place, blank) for place in range(len(records))]).to(self.device)
        episodes = self._episodes(labels, drop_small=len(seen) < len(records))
        part = episodes.shard(trainer.global_rank, trainer.world_size)
        result = evaluate_episodes(features[:, 0], features, part, head=_HEADS[self.head]()).gather()
        self.log("val_accuracy", 100 * result.mean, prog_bar=True)
        self.log("val_standard_error", 100 * result.standard_error)

    def on_fit_start(self) -> None:
        """Refuse classes that are too small for the episodes now, not after the first epochs."""
        trainer: Any = self.trainer
        records = getattr(trainer.datamodule, "val_records", [])
        if records:
            names = {record.label: record.label_name or str(record.label) for record in records}
            self._episodes([record.label for record in records], names=names)

    def _episodes(self, labels: list[int | None], **settings: Any) -> Episodes:
        own = self.episode_settings
        return Episodes(labels, own["n_way"], own["k_shot"], own["n_query"], own["episodes"], own["seed"], **settings)


def load_encoder(modality: str, source: str, overrides: dict[str, Any] | None, fresh_fc_norm: bool) -> MaskedViT:
    """The encoder of a checkpoint, with a norm behind the mean and no head, and say what was loaded."""
    model = MaskedViT.from_pretrained(
        source, **{"num_classes": 0, "final_norm": True, "fc_norm": True, **(overrides or {})}
    )
    check_channels(modality, model.config, source)
    if fresh_fc_norm and model.fc_norm is not None:
        model.fc_norm.reset_parameters()
    rank_zero_info(f"{modality}: {source}\n{model.load_report}")
    return model.train()
