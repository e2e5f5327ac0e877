"""M2-CLIP: adapters and four heads on a frozen CLIP, as a LightningModule."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch import distributed as dist

from ..data.captions import Captions
from ..data.video_lists import write_class_names
from ..extract import state_fingerprint
from ..m2clip import M2CLIP
from ..m2clip_config import M2CLIPConfig
from ..m2clip_losses import LossWeights
from ..masks import tube_masks
from ..multiview import label_ranks
from .base import Stage

ADAPTERS = "adapters.pth"
LABELS = "labels.csv"
_SCORES = ("", "text_")


class FitClipStage(Stage):
    """Adapters in both towers of a frozen CLIP, a class head and a head for masked words learn labelled videos.

    A batch is {"train": items}, as ClipDataset's, collated. Checkpoints hold what trains, not the CLIP, which comes from its
    file again; one written on other weights is refused. The model is exported with its adapters alone beside it, by M2-CLIP's
    names, and the names of its classes. Validation shows every clip once: `val_accuracy` and `val_top5` are of the class head,
    `val_text_accuracy` and `val_text_top5` of the cosines with the classes' prompts, in percent.

    Args:
        clip: a CLIP of any known dialect, or an M2CLIP.
        captions: names, prompts and words of the classes; the data's.
        adapters: a file with M2-CLIP's adapters to start from.
        preset: of M2CLIPConfig: where adapters stand and what the losses are.
        num_frames: of a clip; the data's.
        overrides: fields of M2CLIPConfig, such as {"vision_hidden": 128}, or of CLIPConfig, such as {"vision_num_heads": 12}.
        weights: loss -> what it counts in the total, of contrastive, cmc, vc and cmlm; the preset's unless given.
        gather: the contrastive loss is taken against the clips of all ranks.
        mask_ratio: of the tubes, that are removed in training; 0 for none, as published.
        lr, min_lr: of a step of 256 clips.
        text_lr_scale: what the adapters of the text tower have of it.
        warmup_epochs: of trainer.max_epochs, from an lr of 0.
        betas, weight_decay: of AdamW; biases have no weight decay.
        grad_checkpointing: "mlp" or "block" computes parts again in the backward, to save memory.
        seed: of masks, masked words and dropout.
        patience: so many steps in a row that are not finite end the run.
    """

    may_keep_all = True

    def __init__(
        self,
        clip: str,
        captions: Captions,
        adapters: str | None = None,
        preset: str = "paper",
        num_frames: int = 8,
        overrides: dict[str, Any] | None = None,
        weights: dict[str, float] | None = None,
        gather: bool = True,
        mask_ratio: float = 0.0,
        lr: float = 1e-3,
        min_lr: float = 0.0,
        text_lr_scale: float = 0.5,
        warmup_epochs: float = 2,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        grad_checkpointing: str | None = None,
        seed: int = 42,
        patience: int = 10,
    ) -> None:
        super().__init__(
            lr=lr,
            min_lr=min_lr,
            warmup_lr=0.0,
            warmup_epochs=warmup_epochs,
            scale_all_lrs=True,
            betas=betas,
            weight_decay=weight_decay,
            decay_all=False,
            reference=False,
            mask_ratio=mask_ratio,
            seed=seed,
            patience=patience,
        )
        if not 0 < text_lr_scale <= 1:
            raise ValueError(f"text_lr_scale must lie in (0, 1], got {text_lr_scale}")
        self.captions, self.gather, self.text_lr_scale = captions, gather, text_lr_scale
        model = build(clip, adapters, preset, captions, num_frames, overrides, weights)
        if grad_checkpointing is not None:
            model.set_grad_checkpointing(True, grad_checkpointing)
        self.loss_module = model
        self._clip = state_fingerprint({n: t for n, t in model.state_dict().items() if "adapter" not in n})
        self._seen: dict[int, list[int]] = {}

    @property
    def model(self) -> M2CLIP:
        """The model that is trained and scored."""
        assert isinstance(self.loss_module, M2CLIP)
        return self.loss_module

    def losses(self, batch: Any) -> dict[str, Tensor]:
        items, model = batch["train"], self.model
        if "rgb" not in items:
            raise ValueError(f"the clips have no rgb, which a CLIP sees; they have {', '.join(items)}")
        video, labels = items["rgb"], items["label"]
        mask = None
        if self.mask_ratio:
            side = video.shape[-1] // model.config.clip.patch_size
            seed = self.seed << 32 | self.global_step
            grid = (video.shape[2], side, side)
            mask = tube_masks(len(labels), 1, grid, self.mask_ratio, seed=seed, clip_ids=items["clip_id"])[:, 0]
        # Words are drawn from the generator that the step has seeded.
        words = self.captions.masked(labels) if model.config.weights.cmlm else (self.captions.of(labels), None)
        texts = self.captions.class_token_ids
        return model.losses(video, words[0], labels, texts, words[1], mask=mask, gather=self.gather)

    def groups(self, lr: float) -> list[dict[str, Any]]:
        return self.model.param_groups(lr, self.weight_decay, self.text_lr_scale)

    def clips_in(self, batch: Any) -> int:
        return len(batch["train"]["clip_id"])

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Pixels alone: captions are made from labels, and packed, on the host."""
        items = batch.get("train", batch)
        moved = {n: t.to(device, non_blocking=True) if n == "rgb" else t for n, t in items.items()}
        return {"train": moved} if "train" in batch else moved

    def export(self, state: dict[str, Tensor], folder: str | Path) -> None:
        model = M2CLIP(self.model.config)
        prefix = "loss_module."
        model.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
        model.save_pretrained(folder)
        model.save_adapters(Path(folder) / ADAPTERS)
        write_class_names(self.captions.names, Path(folder) / LABELS)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if "adapter" in n}
        checkpoint["clip"] = self._clip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("clip", self._clip) != self._clip:
            raise ValueError(
                "ckpt_path must be a checkpoint of this very run, got one that was trained on another CLIP"
            )
        frozen = {n: t for n, t in self.state_dict().items() if "adapter" not in n} if "clip" in checkpoint else {}
        checkpoint["state_dict"] = {**frozen, **checkpoint["state_dict"]}
        super().on_load_checkpoint(checkpoint)

    # -- validation ----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._seen = {}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Keep, by its place in the list, how many classes come before a clip's own: by the class head, and by texts."""
        video, labels = batch["rgb"], batch["label"]
        if not len(video):
            return
        encoded = self.model.encode_video(video)
        by_text = self.model.class_scores(encoded.features, self.captions.class_token_ids)
        ranks = [label_ranks(scores, labels.to(scores.device)) for scores in (encoded.class_logits, by_text)]
        self._seen.update(zip(batch["places"], torch.stack(ranks, 1).tolist(), strict=True))

    def on_validation_epoch_end(self) -> None:
        seen, self._seen = self._seen, {}
        trainer: Any = self.trainer
        if trainer.sanity_checking:
            return
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(parts, seen)
            seen = {place: ranks for part in parts for place, ranks in part.items()}
        if not seen:
            return
        found = torch.tensor(list(seen.values()))
        for column, name in enumerate(_SCORES):
            for within, called in ((1, "accuracy"), (5, "top5")):
                share = 100 * float((found[:, column] < within).double().mean())
                self.log(f"val_{name}{called}", share, prog_bar=within == 1)


def build(
    clip: str,
    adapters: str | None,
    preset: str,
    captions: Captions,
    num_frames: int,
    overrides: dict[str, Any] | None,
    weights: dict[str, float] | None,
) -> M2CLIP:
    """The model of a run in training mode, with what no loss reaches frozen. Raises ValueError for another vocabulary."""
    given = dict(overrides or {})
    if weights is not None:
        known = asdict(M2CLIPConfig.preset(preset).weights)
        wrong = [name for name in weights if name not in known]
        if wrong:
            raise ValueError(f"weights must be of {', '.join(known)}, got {wrong[0]!r}")
        given["weights"] = LossWeights(**{**known, **weights})
    words = len(captions.words or {})
    model = M2CLIP.from_pretrained(
        clip,
        num_frames,
        adapters=adapters,
        preset=preset,
        **{"num_classes": len(captions), "num_words": words, **given},
    )
    size = model.config.clip.vocab_size
    if len(captions.tokenizer) != size:
        raise ValueError(
            f"data.vocabulary must be that of the CLIP, which has {size} tokens, got one of {len(captions.tokenizer)}"
        )
    _freeze_idle(model)
    rank_zero_info(f"{clip}\n{model.load_report}")
    total = sum(p.numel() for p in model.parameters())
    rank_zero_info(f"{model.num_trainable() / 1e6:.2f} M of {total / 1e6:.2f} M numbers train")
    return model.train()


def _freeze_idle(model: M2CLIP) -> None:
    """Take away what no loss that counts reaches: it would get no gradient, for which DDP would wait."""
    weights = model.config.weights
    idle: list[str] = []
    if not weights.cmlm:
        idle += ["mlm_adapter.", f"clip.text.transformer.resblocks.{model.config.clip.text_depth}."]
    if not weights.vc:
        idle.append("adapter_fc.")
    if not (weights.contrastive or weights.cmc or weights.cmlm):
        idle += ["t_adapter.", "clip.text."]
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(idle)):
            parameter.requires_grad_(False)
