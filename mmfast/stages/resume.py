"""Checkpoints that a killed run goes on from: when they are written, how, and what becomes of Ctrl-C."""

import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

LAST = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint aside, in the same folder, and renames it: no reader and no full disk ever leaves half of one.

    Lightning's own goes by the system's folder for temporary files and is copied from there, which can stop half-way.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with aside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        except (OSError, RuntimeError) as fault:  # torch's writer turns a full disk into a RuntimeError
            kept = f"; the one written before is untouched: {target}" if target.exists() else ""
            raise OSError(f"the checkpoint {target} could not be written ({fault}){kept}") from fault
        finally:
            aside.unlink(missing_ok=True)


class ResumePoint(Checkpoint):
    """Keeps `folder`/last.ckpt, all that is needed to go on: every so many epochs, steps or minutes, and on Ctrl-C.

    The first Ctrl-C (or SIGTERM) lets the step end, saves and ends the run, on all ranks alike; the second ends it at once.
    Within accumulated gradients nothing is saved: they would be lost.
    """

    def __init__(
        self,
        folder: str,
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("every_n_epochs", every_n_epochs),
            ("every_n_steps", every_n_steps),
            ("every_n_minutes", every_n_minutes),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, or null for never, got {value}")
        self.path = Path(folder) / LAST
        self.every_n_epochs, self.every_n_steps, self.every_n_minutes = every_n_epochs, every_n_steps, every_n_minutes
        self._asked = False
        self._saved_step = 0
        self._saved_at = time.monotonic()
        self._previous: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        asked = self._asked or trainer.received_sigterm
        late = self.every_n_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
            late = self.every_n_minutes is not None and trainer.strategy.broadcast(late)
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if asked or late or due:
            self._save(trainer)
        if asked:
            rank_zero_info(f"stopped after step {trainer.global_step}; --ckpt_path last goes on from {self.path}")
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._save(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if not isinstance(exception, KeyboardInterrupt):  # there Lightning goes on to ignore Ctrl-C
            self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def _save(self, trainer: Any) -> None:
        if trainer.fast_dev_run or trainer.global_step == self._saved_step:
            return
        trainer.save_checkpoint(self.path, weights_only=False)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()


class Export(Callback):
    """Writes the trained model with save_pretrained: at the end, or with `monitor` whenever that metric is at its highest."""

    def __init__(self, folder: str, monitor: str | None = None) -> None:
        self.folder, self.monitor, self.best = folder, monitor, -math.inf

    @property
    def state_key(self) -> str:
        return f"Export of {self.monitor}"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.monitor is None or trainer.sanity_checking or self.monitor not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.monitor])
        if value > self.best:
            self.best = value
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.monitor is None:
            self._write(trainer, pl_module)
            rank_zero_info(f"the model is in {self.folder}")

    def _write(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fast_dev_run:
            return
        state = trainer.strategy.lightning_module_state_dict()
        # Sharded parameters are gathered by all ranks, in one order.
        state = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}
        if trainer.is_global_zero:
            pl_module.export(state, self.folder)


class Faults(Callback):
    """Says at the end of an epoch which clips could not be read."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.datamodule.report_faults()
