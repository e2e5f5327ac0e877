"""One training step that survives a loss or gradients which are not finite."""

import math
import warnings
from collections import defaultdict
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

# From GradScaler's first scale, 2**16, so many halvings lead to 2**-24, fp16's smallest number.
HALVINGS = 40


class _Scheduler(Protocol):
    def step(self) -> Any: ...


class StepGuard:
    """Backward, clipping, optimiser and scheduler steps, and zero_grad, with steps that are not finite left out.

    scaler: a GradScaler, for fp16. scheduler: stepped here, so not by you. clip_grad: largest norm of all gradients
    together. patience: so many steps left out in a row raise FloatingPointError.

    A loss that is not finite, or without a scaler gradients that are not, leave parameters, optimiser and scaler as
    they were; the step counts in `skipped` and is warned of. The scheduler moves all the same: published schedules go
    by iterations, and so end on time. With a scaler, gradients that overflow under a finite loss are its ordinary work: it
    lowers its scale, the step counts in `overflowed`, and the scheduler waits.

    The host waits for the device once a step, after the backward, for what it must know: whether loss and gradients of
    all ranks are finite. So the backward of a bad loss runs where knowing earlier would take a second wait, and none of it
    is kept; a loss in host memory, in a single process, is looked at first and has no backward. Under torch.distributed all
    ranks decide alike, by one all_reduce of two flags. Gradients may be sharded (FSDP2).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        scaler: "torch.amp.GradScaler | None" = None,
        scheduler: _Scheduler | None = None,
        clip_grad: float | None = None,
        patience: int = 10,
    ) -> None:
        if clip_grad is not None and not clip_grad > 0:
            raise ValueError(f"clip_grad must be above 0, or None, got {clip_grad}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.optimizer, self.scaler, self.scheduler = optimizer, scaler, scheduler
        self.clip_grad, self.patience = clip_grad, patience
        self.steps = 0  # calls of step()
        self.skipped = 0
        self.overflowed = 0
        self.grad_norm: Tensor | None = None  # of the last backward, before clipping; on the device, for a logger
        self._skipped_in_a_row = 0
        self._overflowed_in_a_row = 0

    def step(self, loss: Tensor) -> bool:
        """Train on a loss of one element; gradients that lie there already are added to. True where parameters moved.

        Raises FloatingPointError after `patience` steps left out in a row, naming the step and how many were.
        """
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must be a tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"loss must have one element, got shape {tuple(loss.shape)}")
        loss = loss.reshape(())
        self.steps += 1
        if loss.device.type == "cpu" and not _several_ranks() and not math.isfinite(loss.item()):
            return self._skip(f"loss {loss.item()}")
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = total_norm([p.grad for p in parameters], loss.device)
        self.grad_norm = norm
        if self.clip_grad is not None:
            clip_grads_with_norm_(parameters, self.clip_grad, norm)
        bad_loss, bad_gradients, value = check_step(loss.detach(), norm)

        if bad_loss:
            if self.scaler is not None:
                # The scale is not at fault: back to it, which also lets unscale_ be called again.
                self.scaler.update(self.scaler.get_scale())
            return self._skip(f"loss {value}" + (" on another rank" if math.isfinite(value) else ""))
        if bad_gradients and self.scaler is not None and self.scaler.is_enabled():
            return self._overflow()
        if bad_gradients:
            return self._skip(f"gradients that are not finite at loss {value}")
        # Not scaler.step(), which would wait for the device to learn what is known by now.
        self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
        self._skipped_in_a_row = self._overflowed_in_a_row = 0
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        return True

    def state_dict(self) -> dict[str, int]:
        """The counters; optimiser, scaler and scheduler have state dicts of their own."""
        return {name.lstrip("_"): getattr(self, name) for name in _COUNTERS}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue the counters of a state_dict()."""
        missing = [name for name in _COUNTERS if name.lstrip("_") not in state_dict]
        if missing:
            raise ValueError(f"state_dict lacks {', '.join(name.lstrip('_') for name in missing)}")
        for name in _COUNTERS:
            setattr(self, name, int(state_dict[name.lstrip("_")]))

    # -- inside ------------------------------------------------------------------------------------------------

    def _skip(self, what: str) -> bool:
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        self._skipped_in_a_row += 1
        warnings.warn(f"step {self.steps} left out: {what} ({self.skipped} so far)", RuntimeWarning, stacklevel=3)
        if self.scheduler is not None:
            with warnings.catch_warnings():
                # torch warns of a schedule that moves before the optimiser ever has, which is meant here.
                warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)` before")
                self.scheduler.step()
        if self._skipped_in_a_row >= self.patience:
            raise FloatingPointError(
                f"step {self.steps} has {what}: {self._skipped_in_a_row} steps left out in a row, {self.skipped} in all"
            )
        return False

    def _overflow(self) -> bool:
        assert self.scaler is not None
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.overflowed += 1
        self._overflowed_in_a_row += 1
        if self._overflowed_in_a_row >= self.patience + HALVINGS:
            raise FloatingPointError(
                f"step {self.steps}: gradients overflowed {self._overflowed_in_a_row} times in a row, "
                f"{self.overflowed} in all, however far the scaler lowered its scale"
            )
        return False


_COUNTERS = ("steps", "skipped", "overflowed", "_skipped_in_a_row", "_overflowed_in_a_row")


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def total_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Norm of all gradients, [] on `device`; those sharded over different meshes (FSDP2), or not at all, may mix."""
    by_mesh: dict[Any, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_mesh[getattr(gradient, "device_mesh", None)].append(gradient)
    norms = [get_total_norm(group) for group in by_mesh.values()]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    if not whole:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.stack([norm.to(device, torch.float32) for norm in whole]))


def check_step(loss: Tensor, norm: Tensor) -> tuple[bool, bool, float]:
    """Whether loss and gradients are bad on any rank, and this rank's loss: the only wait for the device."""
    flags = torch.stack((loss.isfinite(), norm.isfinite())).logical_not().float()
    if _several_ranks():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    bad_loss, bad_gradients, value = torch.cat((flags, loss.float().reshape(1))).tolist()
    return bool(bad_loss), bool(bad_gradients), value
