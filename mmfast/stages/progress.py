"""Lightning's progress bars for runs that trainer.max_steps ends: they say how many epochs that will be."""

import math
from typing import Any

from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar


class _UntilMaxSteps:
    """In front of a bar. max_steps counts the optimiser's steps, of which accumulated batches make one; epochs go on then."""

    trainer: Any
    validation_description: Any

    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch, as it starts: fewer where the last step comes before its end."""
        trainer = self.trainer
        batches = trainer.num_training_batches
        left = self._steps_left()
        return batches if left is None else min(batches, left * trainer.accumulate_grad_batches)

    def _get_train_description(self, current_epoch: int) -> str:
        left, batches = self._steps_left(), self.trainer.num_training_batches
        if left is None or math.isinf(batches) or batches < 1:
            text = super()._get_train_description(current_epoch)  # type: ignore[misc]  # RichProgressBar's
            return text.replace("/-2", "")  # of a run without any limit
        each = math.ceil(batches / self.trainer.accumulate_grad_batches)
        text = f"Epoch {current_epoch}/{current_epoch + max(math.ceil(left / each), 1) - 1}"
        return f"{text:{len(self.validation_description)}}"

    def _steps_left(self) -> int | None:
        """None where max_steps is not what ends the run."""
        trainer = self.trainer
        if trainer.max_epochs not in (None, -1) or trainer.max_steps < 0:
            return None
        return max(trainer.max_steps - trainer.global_step, 0)


class RichBar(_UntilMaxSteps, RichProgressBar):
    """Lightning's default where rich is installed."""


class PlainBar(_UntilMaxSteps, TQDMProgressBar):
    """Lightning's default elsewhere."""


def progress_bar() -> Any:
    """The bar that Lightning would take."""
    try:
        return RichBar()
    except ModuleNotFoundError:
        return PlainBar()
