"""EVL: a light temporal decoder on a frozen image model, as a LightningModule."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from ..clip_config import CLIPConfig
from ..data.video_lists import write_class_names
from ..evl import EVL
from ..extract import PRECISIONS, state_fingerprint
from ..multiview import label_ranks
from .base import BASE_BATCH, Stage

DECODER = "decoder.pth"
LABELS = "labels.csv"
_BACKBONE = "loss_module.backbone."


class FitEvlStage(Stage):
    """EVL's temporal decoder and a class head learn labelled videos on a CLIP, or MaskedViT, that is frozen.

    A batch is {"train": items}, as ClipDataset's, or as CachedClips', collated. Checkpoints hold what trains, not the backbone,
    which comes from its file again; one written on other weights is refused. The model is exported with decoder and head alone
    beside it, by EVL's names, and the names of its classes. Validation shows every clip once, whole: `val_accuracy` and
    `val_top5`, in percent; it also comes at the end of a run that trainer.max_steps ends within an epoch.

    Args:
        backbone: a CLIP or MaskedViT of any known dialect; null where `decoder` is an EVL with its own.
        names: of the classes; the data's.
        decoder: a checkpoint of EVL, or a folder of one, to start from; a head of other classes starts anew.
        preset: of EVLConfig.
        num_frames: of a clip; the data's.
        size: side of the frames; the data's.
        interpolate: resize a decoder of another number of frames or another grid, which is refused else.
        overrides: fields of EVLConfig, such as {"num_layers": 2, "temporal_cross_attention": false}.
        num_heads: of the backbone, where its file does not tell.
        backbone_dtype: what the backbone is kept and computed in; as its weights are unless given.
        mask_ratio: of the tubes, that are removed in training; 0 for none, as published.
        lr, min_lr: as they are, or with scale_lr of a step of 256 clips.
        scale_lr: lr and min_lr grow with the clips of a step, in proportion.
        warmup_epochs: of the schedule, from an lr of 0.
        betas, weight_decay: of AdamW.
        decay_all: weight decay on everything that trains, as released; else not on norms, biases, positions and offsets.
        seed: of masks and dropout.
        patience: so many steps in a row that are not finite end the run.
    """

    may_keep_all = True

    def __init__(
        self,
        backbone: str | None,
        names: list[str],
        decoder: str | None = None,
        preset: str = "paper",
        num_frames: int = 8,
        size: int = 224,
        interpolate: bool = False,
        overrides: dict[str, Any] | None = None,
        num_heads: int | None = None,
        backbone_dtype: Literal["fp32", "bf16", "fp16"] | None = None,
        mask_ratio: float = 0.0,
        lr: float = 4e-4,
        min_lr: float = 0.0,
        scale_lr: bool = False,
        warmup_epochs: float = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        decay_all: bool = True,
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
            decay_all=decay_all,
            reference=False,
            mask_ratio=mask_ratio,
            seed=seed,
            patience=patience,
        )
        self.scales_lr, self.names = scale_lr, list(names)
        dtype = None if backbone_dtype is None else PRECISIONS[backbone_dtype] or torch.float32
        self.loss_module = build(
            backbone, decoder, preset, len(names), num_frames, size, interpolate, overrides, num_heads, dtype
        )
        self._weights = state_fingerprint(self.model.backbone.state_dict())
        self._seen: dict[int, int] = {}

    @property
    def model(self) -> EVL:
        """The model that is trained and scored."""
        assert isinstance(self.loss_module, EVL)
        return self.loss_module

    def losses(self, batch: Any) -> dict[str, Tensor]:
        items, mask = batch["train"], None
        if self.mask_ratio and "features" not in items:  # cached features were made under masks
            config = self.model.config
            mask = self.pack(items["clip_id"], (config.num_frames, *config.grid))
        return {"total": F.cross_entropy(self._scores(items, mask).float(), items["label"])}

    def clips_in(self, batch: Any) -> int:
        return len(batch["train"]["clip_id"])

    def export(self, state: dict[str, Tensor], folder: str | Path) -> None:
        dtype = next(self.model.backbone.parameters()).dtype
        model = EVL(self.model.config, backbone_dtype=dtype)
        prefix = "loss_module."
        model.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
        model.save_pretrained(folder)
        model.save_decoder(Path(folder) / DECODER)
        write_class_names(self.names, Path(folder) / LABELS)

    def on_train_start(self) -> None:
        if self.step_clips != BASE_BATCH and not self.scales_lr:
            rank_zero_info(
                f"a step has {self.step_clips} clips, lr {self.lr:g} is for {BASE_BATCH} as published: set data.batch_size or "
                "trainer.accumulate_grad_batches, or model.scale_lr"
            )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        trainer: Any = self.trainer
        if 0 < trainer.max_steps <= self.global_step:
            # Lightning validates before such a stop, in an epoch in which it would; but not before one by max_steps.
            trainer.should_stop, trainer.check_val_every_n_epoch = True, 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        kept = {n: t for n, t in checkpoint["state_dict"].items() if not n.startswith(_BACKBONE)}
        checkpoint["state_dict"], checkpoint["backbone"] = kept, self._weights

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("backbone", self._weights) != self._weights:
            raise ValueError(
                "ckpt_path must be a checkpoint of this very run, got one that was trained on another backbone"
            )
        frozen = {n: t for n, t in self.state_dict().items() if n.startswith(_BACKBONE)}
        own = frozen if "backbone" in checkpoint else {}
        checkpoint["state_dict"] = {**own, **checkpoint["state_dict"]}
        super().on_load_checkpoint(checkpoint)

    # -- validation ----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._seen = {}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Keep, by its place in the list, how many classes come before a clip's own."""
        if not len(batch["label"]):
            return
        ranks = label_ranks(self._scores(batch), batch["label"])
        self._seen.update(zip(batch["places"], ranks.tolist(), strict=True))

    def on_validation_epoch_end(self) -> None:
        seen, self._seen = self._seen, {}
        trainer: Any = self.trainer
        if trainer.sanity_checking:
            return
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(parts, seen)
            seen = {place: rank for part in parts for place, rank in part.items()}
        if not seen:
            return
        found = torch.tensor(list(seen.values()))
        for within, name in ((1, "val_accuracy"), (5, "val_top5")):
            self.log(name, 100 * float((found < within).double().mean()), prog_bar=within == 1)

    # -- inside ------------------------------------------------------------------------------------------------

    def _scores(self, items: Any, mask: Any = None) -> Tensor:
        """Logits [B, K] of videos, or of features that the backbone gave before."""
        if "features" in items:
            return self.model.proj(self.model.decode(items["features"]))
        if "rgb" not in items:
            raise ValueError(f"the clips have no rgb, which the backbone sees; they have {', '.join(items)}")
        return self.model(items["rgb"], mask)


def build(
    backbone: str | None,
    decoder: str | None,
    preset: str,
    num_classes: int,
    num_frames: int,
    size: int,
    interpolate: bool,
    overrides: dict[str, Any] | None,
    num_heads: int | None,
    backbone_dtype: torch.dtype | None,
) -> EVL:
    """The model of a run in training mode, of the frames and grid of its clips. Raises ValueError for a decoder of others."""
    given = dict(overrides or {})
    taken = {"num_classes": "the classes", "num_frames": "data.num_frames", "grid": "data.size", "backbone": "backbone"}
    for name in given.keys() & taken.keys():
        raise ValueError(f"overrides must not hold {name}, which follows {taken[name]}")
    if backbone is None and decoder is None:
        raise ValueError(
            "model.backbone must be given, a CLIP or a MaskedViT, or model.decoder with a backbone of its own"
        )
    model = EVL.from_pretrained(
        decoder,
        backbone,
        num_heads=num_heads,
        backbone_dtype=backbone_dtype,
        interpolate=interpolate,
        preset=preset,
        num_classes=num_classes,
        **given,
    )
    about = model.config.backbone
    slots = num_frames if isinstance(about, CLIPConfig) else num_frames // about.tubelet_size
    grid = (size // about.patch_size, size // about.patch_size)
    own = model.config
    for name, value, used in (
        ("num_frames", slots, own.temporal_positions),
        ("grid", grid, own.temporal_cross_attention),
    ):
        if decoder is not None and used and not interpolate and value != getattr(own, name):
            raise ValueError(
                f"{decoder}: is a decoder of {name} {getattr(own, name)}, the clips have {value}; "
                "model.interpolate true resizes it"
            )
    if (slots, grid) != (own.num_frames, own.grid):  # a fresh decoder's tables are all 0, of whatever size
        model.resize(slots, grid)
    rank_zero_info(f"{backbone or decoder}\n{model.load_report}")
    total = sum(p.numel() for p in model.parameters())
    rank_zero_info(f"{model.num_trainable() / 1e6:.2f} M of {total / 1e6:.2f} M numbers train")
    return model.train()
