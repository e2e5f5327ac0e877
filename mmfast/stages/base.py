"""What the stages share: optimiser, schedule, seeds, and steps that are not finite."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ..guard import HALVINGS, check_step, total_norm
from ..masks import Grid, Pack, sample_pack
from ..optim import WarmupCosine, param_groups, scale_lr

BASE_BATCH = 256  # clips of a step that learning rates are said for


class Stage(LightningModule):
    """A stage of training: a subclass has `loss_module`, `losses(batch)` and `export(state, folder)`.

    Every step is a pure function of weights, batch and (seed, step, rank): masks are drawn by (seed, step, clip) and dropout
    by (seed, step, rank), so that a run which goes on from a checkpoint ends as one that was never stopped.

    A step whose loss or gradients are not finite on any rank leaves weights and optimiser as they were, on all ranks alike;
    it is counted, warned of, and `patience` such steps in a row raise FloatingPointError. This is done just before
    the optimiser's step, by taking the gradients away, and not by manual optimisation: so Lightning's precision
    plugins, accumulated gradients, clipping and strategies work as always. The schedule moves on with such a step.
    Overflows under a GradScaler, gradients that are not finite under a finite loss, are its ordinary work.
    """

    loss_module: nn.Module
    may_keep_all = False  # whether a mask_ratio of 0 makes sense
    scales_lr = True  # whether lr is of a step of 256 clips, and grows with the step; else it is as given

    def __init__(
        self,
        *,
        lr: float,
        min_lr: float,
        warmup_lr: float,
        warmup_epochs: float,
        scale_all_lrs: bool,
        betas: tuple[float, float],
        weight_decay: float,
        decay_all: bool,
        reference: bool,
        mask_ratio: float,
        seed: int,
        patience: int,
    ) -> None:
        super().__init__()
        if not 0 <= seed < 2**31:
            raise ValueError(f"seed must lie in 0..2**31-1, got {seed}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs}")
        if not (0 < mask_ratio < 1 or (self.may_keep_all and mask_ratio == 0)):
            raise ValueError(f"mask_ratio must lie in (0, 1){', or be 0' * self.may_keep_all}, got {mask_ratio}")
        self.lr, self.min_lr, self.warmup_lr, self.warmup_epochs = lr, min_lr, warmup_lr, warmup_epochs
        self.scale_all_lrs, self.betas, self.weight_decay = scale_all_lrs, betas, weight_decay
        self.decay_all, self.reference, self.mask_ratio = decay_all, reference, mask_ratio
        self.seed, self.patience = seed, patience
        self.skipped = 0
        self.step_clips = 0  # of all ranks and accumulated batches; known once there is an optimiser
        # Over accumulated batches. No buffer, which DDP would overwrite by rank 0's.
        self._loss_sum: Tensor | None = None
        self._skipped_in_a_row = self._overflowed_in_a_row = 0
        self._scale: float | None = None  # the GradScaler's before a bad loss
        self.means = nn.ModuleDict()

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Scalars of a batch by name; total is the one to train on."""
        raise NotImplementedError

    def export(self, state: dict[str, Tensor], folder: str | Path) -> None:
        """Write the trained model.   state: this module's state dict, whole."""
        raise NotImplementedError

    def clips_in(self, batch: Any) -> int:
        """Clips of a batch on this rank that an epoch counts."""
        raise NotImplementedError

    def pack(self, clip_ids: Tensor, grid: Grid, stream: int = 0) -> Pack:
        """Tube masks of this step for some clips.   stream: 0, or 1 for masks of their own."""
        seed = stream << 63 | self.seed << 32 | self.global_step
        return sample_pack(
            len(clip_ids), 1, grid, self.mask_ratio, seed=seed, clip_ids=clip_ids, device=clip_ids.device
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        key = [self.seed, self.trainer.global_rank, self.global_step, batch_idx]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
        losses = self.losses(batch)
        loss = losses["total"].detach().float()
        self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss
        clips = self.clips_in(batch)
        for name, value in losses.items():
            self.log(name, value, prog_bar=name == "total", batch_size=clips)
            self._mean(name).update(torch.where(value.isfinite(), value.detach(), 0.0), value.isfinite().float())
        return losses["total"]

    def on_train_epoch_end(self) -> None:
        for name, metric in self.means.items():
            assert isinstance(metric, MeanMetric)
            self.log(f"{name}_epoch", metric.compute())
            metric.reset()

    def configure_optimizers(self) -> Any:
        trainer: Any = self.trainer
        trainer.fit_loop.setup_data()  # where max_steps is the end, nothing before has asked how long an epoch is
        planned = trainer.estimated_stepping_batches
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        # A run cut short by max_steps keeps the schedule of its epochs.
        epochs = trainer.max_epochs
        total = epochs * per_epoch if epochs and epochs > 0 else planned
        if not math.isfinite(total):
            raise ValueError(
                "trainer.max_epochs or trainer.max_steps must be given: the learning rate's cosine needs an end"
            )
        warmup = 0 if trainer.fast_dev_run else round(self.warmup_epochs * per_epoch)
        if warmup >= total:
            raise ValueError(
                f"warmup_epochs must be fewer than the epochs that are trained: got {self.warmup_epochs:g}, that is "
                f"{warmup} of {total} steps"
            )
        per_rank = getattr(trainer.train_dataloader, "batch_size", None)
        if per_rank is None:
            raise ValueError("the train data loader must have a batch_size: the learning rate is scaled by it")
        self.step_clips = batch = per_rank * trainer.world_size * trainer.accumulate_grad_batches
        size = batch if self.scales_lr else BASE_BATCH
        rest = [scale_lr(lr, size) if self.scale_all_lrs else lr for lr in (self.min_lr, self.warmup_lr)]
        lr = scale_lr(self.lr, size)
        optimizer = torch.optim.AdamW(self.groups(lr), lr=lr, betas=self.betas)
        schedule = WarmupCosine(
            optimizer, int(total), warmup, min_lr=rest[0], warmup_lr=rest[1], reference=self.reference
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """What trains, in groups for the optimiser.   lr: of the whole run, scaled."""
        if self.decay_all:
            trained = [p for p in self.loss_module.parameters() if p.requires_grad]
            return [{"params": trained, "weight_decay": self.weight_decay}]
        return param_groups(self.loss_module, weight_decay=self.weight_decay)

    # -- steps that are not finite -------------------------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        assert self._loss_sum is not None
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        bad_loss, bad_gradients, value = check_step(self._loss_sum, total_norm(gradients, self._loss_sum.device))
        self._loss_sum = None
        scaler = self._scaler
        if not bad_loss and not bad_gradients:
            self._skipped_in_a_row = self._overflowed_in_a_row = 0
            return
        if not bad_loss and scaler is not None:
            self._overflowed_in_a_row += 1
            if self._overflowed_in_a_row >= self.patience + HALVINGS:
                raise FloatingPointError(
                    f"step {self.global_step}: gradients overflowed {self._overflowed_in_a_row} times in a row, however "
                    "far the scaler lowered its scale"
                )
            return
        optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            self._scale = scaler.get_scale()
        self.skipped += 1
        self._skipped_in_a_row += 1
        where = " on another rank" if bad_loss and math.isfinite(value) else ""
        what = f"loss {value}{where}" if bad_loss else f"gradients that are not finite at loss {value}"
        rank_zero_warn(f"step {self.global_step} left out: {what} ({self.skipped} so far)", category=RuntimeWarning)
        if self._skipped_in_a_row >= self.patience:
            raise FloatingPointError(
                f"step {self.global_step} has {what}: {self._skipped_in_a_row} steps left out in a row, "
                f"{self.skipped} in all"
            )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._scale is not None:
            # The scale was not at fault.
            assert self._scaler is not None
            self._scaler.update(self._scale)
            self._scale = None
        self.log("skipped", float(self.skipped), batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped"] = [self.skipped, self._skipped_in_a_row]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own, found = self.state_dict(), checkpoint["state_dict"]
        other = sorted({n for n in own.keys() | found.keys() if _shape(own.get(n)) != _shape(found.get(n))})
        if other:
            raise ValueError(
                f"ckpt_path must be a checkpoint of this very run, got one of another stage or model: {len(other)} of its "
                f"tensors differ, {other[0]} first; weights to start from are given by model.init, model.student or "
                "model.teachers"
            )
        self.skipped, self._skipped_in_a_row = checkpoint.get("skipped", [0, 0])

    def on_train_end(self) -> None:
        if self.skipped:
            rank_zero_warn(f"{self.skipped} steps were left out: their loss or gradients were not finite")

    # -- inside ------------------------------------------------------------------------------------------------

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _mean(self, name: str) -> MeanMetric:
        if name not in self.means:
            # NaN is left out by its weight: the metric's own ways to do so wait for the device.
            self.means[name] = MeanMetric(nan_strategy="disable").to(self.device)
        metric = self.means[name]
        assert isinstance(metric, MeanMetric)
        return metric


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
