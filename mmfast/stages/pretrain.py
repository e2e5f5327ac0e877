"""Stage I: domain-adapted, class-discriminative masked pre-training of one modality, as a LightningModule."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from ..config import MAEConfig, mae_from_name
from ..mae import MaskedAutoencoder
from ..pretrain import MaskedPretraining
from .base import Stage
from .modalities import check_modality, modality_fields

CE_WEIGHTS = {"rgb": 0.05, "flow": 0.01, "pose": 0.01}
# Fields that make another model, which weights of a file cannot be given to.
_SIZE = ("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")


class PretrainStage(Stage):
    """Masked pre-training of one modality on labelled source and unlabelled target clips.

    A batch is {"source": items, "target": items}; items as ClipDataset's, collated; target may be absent where target_weight
    is 0. The learning rates are for 256 clips of the source a step and scaled to what a step has.

    Args:
        modality: rgb, flow or pose.
        num_classes: classes of the source clips.
        name: a name of MaskedAutoencoder.from_name; MM-CDFSL's ViT-S unless given. Channels and patch follow the modality.
        overrides: fields of MAEConfig, such as {"embed_dim": 192, "num_heads": 3}.
        init: a checkpoint to start from, of any known dialect and modality; what does not fit starts anew and is said.
        target_weight: 1 is the paper's loss, 0 what was released.
        ce_weight: lambda; 0.05 for rgb, 0.01 for flow and pose unless given.
        mask_ratio: of the tokens, that are removed.
        same_mask: one mask for the source and the target clip of a sample, as released.
        lr, min_lr, warmup_lr: of a step of 256 clips.
        warmup_epochs: of trainer.max_epochs.
        betas, weight_decay: of AdamW; biases, norms and the mask token have no weight decay.
        reference: the schedule as released, whose cosine ends 2.4 % above min_lr.
        grad_checkpointing: "mlp" or "block" computes parts again in the backward, to save memory.
        seed: of masks and dropout.
        patience: so many steps in a row that are not finite end the run.
    """

    def __init__(
        self,
        modality: str = "rgb",
        num_classes: int = 0,
        name: str | None = None,
        overrides: dict[str, Any] | None = None,
        init: str | None = None,
        target_weight: float = 1.0,
        ce_weight: float | None = None,
        mask_ratio: float = 0.9,
        same_mask: bool = False,
        lr: float = 1.5e-4,
        min_lr: float = 1e-5,
        warmup_lr: float = 1e-6,
        warmup_epochs: float = 10,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        reference: bool = False,
        grad_checkpointing: str | None = None,
        seed: int = 42,
        patience: int = 10,
    ) -> None:
        super().__init__(
            lr=lr,
            min_lr=min_lr,
            warmup_lr=warmup_lr,
            warmup_epochs=warmup_epochs,
            scale_all_lrs=True,
            betas=betas,
            weight_decay=weight_decay,
            decay_all=False,
            reference=reference,
            mask_ratio=mask_ratio,
            seed=seed,
            patience=patience,
        )
        check_modality(modality)
        self.modality, self.same_mask = modality, same_mask
        model = build(modality, num_classes, name, overrides, init)
        if grad_checkpointing is not None:
            model.set_grad_checkpointing(True, grad_checkpointing)
        weight = CE_WEIGHTS[modality] if ce_weight is None else ce_weight
        self.loss_module = MaskedPretraining(model, target_weight, weight)

    def losses(self, batch: Any) -> dict[str, Tensor]:
        module, source = self.loss_module, batch["source"]
        assert isinstance(module, MaskedPretraining)
        video = self._video(source)
        mask = self.pack(source["clip_id"], module.model.encoder.check_video(video))
        labels = source["label"] if module.model.head is not None else None
        if not module.target_weight:
            return module(video, None, mask, labels)
        target = self._video(batch["target"])
        if self.same_mask:
            return module(video, target, mask, labels)
        own = self.pack(batch["target"]["clip_id"], module.model.encoder.check_video(target), stream=1)
        return module(video, target, mask, labels, target_mask=own)

    def clips_in(self, batch: Any) -> int:
        return len(batch["source"]["clip_id"])

    def export(self, state: dict[str, Tensor], folder: str | Path) -> None:
        module = self.loss_module
        assert isinstance(module, MaskedPretraining)
        model = MaskedAutoencoder(module.model.config)
        prefix = "loss_module.model."
        model.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
        model.save_pretrained(folder)

    def _video(self, items: dict[str, Tensor]) -> Tensor:
        if self.modality not in items:
            raise ValueError(
                f"the clips have no {self.modality}, the modality that is trained; they have {', '.join(items)}"
            )
        return items[self.modality]


def build(
    modality: str, num_classes: int, name: str | None, overrides: dict[str, Any] | None, init: str | None
) -> MaskedAutoencoder:
    """The model of a stage I run, from a checkpoint or new. Raises ValueError where the file's size is not the one named."""
    fields = {**modality_fields(modality), "num_classes": num_classes, "head_drop_rate": 0.5, **(overrides or {})}
    wanted: MAEConfig = mae_from_name(name or f"pretrain_mmcdfsl_small_{modality}", **fields)
    if init is None:
        return MaskedAutoencoder(wanted)
    model = MaskedAutoencoder.from_pretrained(init, **fields)
    for field in _SIZE:
        found, asked = getattr(model.config, field), getattr(wanted, field)
        if found != asked and (name is not None or field in (overrides or {})):
            raise ValueError(f"init has {field} {found}, the model asked for {asked}: {init}")
    rank_zero_info(f"{init}\n{model.load_report}")
    return model.train()
