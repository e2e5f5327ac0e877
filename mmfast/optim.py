"""What the published recipes need beside a torch optimiser: parameter groups, the linear scaling rule, warm-up and cosine."""

import math
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# Path parts that wrappers put into parameter names: DDP, torch.compile, checkpoint_wrapper, FSDP1.
_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_EMBEDDINGS = ("patch_embed", "pos_embed", "cls_token", "mask_token", "reg_token")


def param_groups(
    model: nn.Module, lr: float | None = None, weight_decay: float = 0.05, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Groups for any torch optimiser: no weight decay for 1-D parameters, biases and names in no_weight_decay().

    Frozen parameters are left out. layer_decay: the lr of layer i of L is multiplied by layer_decay**(L + 1 - i); layer 0
    is the embedding, i + 1 is blocks.i, and the last, L + 1, all that follows them (norms, head, a decoder). Each group has
    name, params, weight_decay, lr_scale, and with `lr` its lr, in which lr_scale is contained already: any scheduler of
    torch keeps the ratios, one that multiplies by lr_scale itself (timm's) would do it twice. MM-CDFSL's distillation
    was released without groups: weight decay on everything that trains.

    Raises ValueError where layer_decay finds no blocks or comes without lr.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be finite and at least 0, got {weight_decay}")
    trunks: dict[str, int] = {}
    if layer_decay is not None:
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {layer_decay}")
        if lr is None:
            raise ValueError("lr must be given with layer_decay: each group gets its own")
        trunks = _trunks(model)
        if not trunks:
            raise ValueError(f"layer_decay needs a model with `blocks` that train; {type(model).__name__} has none")
    exempt = _exempt(model)
    groups: dict[str, dict[str, Any]] = {}
    for full_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = _unwrapped(full_name)
        decays = parameter.ndim > 1 and name.rpartition(".")[2] != "bias" and name not in exempt
        layer, scale = _layer(name, trunks, layer_decay)
        key = f"{layer}{'decay' if decays else 'no_decay'}"
        if key not in groups:
            own_lr = {} if lr is None else {"lr": lr * scale}
            decay = weight_decay if decays else 0.0
            groups[key] = {"name": key, "params": [], "weight_decay": decay, "lr_scale": scale, **own_lr}
        groups[key]["params"].append(parameter)
    return list(groups.values())


def scale_lr(base_lr: float, batch_size: int, base_batch: int = 256) -> float:
    """The linear scaling rule: base_lr * batch_size / base_batch.   batch_size: clips of one step on all devices together."""
    if batch_size < 1 or base_batch < 1:
        raise ValueError(f"batch_size and base_batch must be at least 1, got {batch_size} and {base_batch}")
    return base_lr * batch_size / base_batch


class WarmupCosine(LRScheduler):
    """Linear warm-up from warmup_lr to a group's lr, then half a cosine down to min_lr. Step it once an optimiser step.

    The lrs of the total_steps steps are VideoMAE's table; after the last of them the lr is min_lr exactly, and stays. Where
    a group has an lr_scale (param_groups), min_lr and warmup_lr are multiplied by it, as its lr is already.
    reference=True is the schedule that MM-CDFSL released (timm's cosine with warmup_prefix): the cosine stretches over
    total_steps counted from the end of the warm-up, so it is cut off above min_lr: by 2.4 % of the range with 10 warm-up
    epochs of 100 (its pre-training), by 0.6 % with 5 of 100 (its distillation).

    Raises ValueError naming the argument at fault.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int,
        *,
        min_lr: float,
        warmup_lr: float = 0.0,
        reference: bool = False,
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        if total_steps <= warmup_steps:
            raise ValueError(f"total_steps must be above warmup_steps {warmup_steps}, got {total_steps}")
        for name, value in (("min_lr", min_lr), ("warmup_lr", warmup_lr)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        self.total_steps, self.warmup_steps = total_steps, warmup_steps
        self.min_lr, self.warmup_lr, self.reference = min_lr, warmup_lr, reference
        self.lr_scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        _check_lrs(optimizer, self.lr_scales, min_lr)
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        step = self.last_epoch
        warming = step < self.warmup_steps
        if warming:
            # VideoMAE's last step of warm-up has the full lr, and so has the step after it; timm's has not got there yet.
            share = step / (self.warmup_steps if self.reference else max(self.warmup_steps - 1, 1))
        else:
            span = self.total_steps if self.reference else self.total_steps - self.warmup_steps
            share = (1 + math.cos(math.pi * min((step - self.warmup_steps) / span, 1.0))) / 2
        floor = self.warmup_lr if warming else self.min_lr
        return [floor * s + (lr - floor * s) * share for lr, s in zip(self.base_lrs, self.lr_scales, strict=True)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where state_dict() was taken; the optimiser's lrs too, whichever of the two is loaded first."""
        super().load_state_dict(state_dict)
        for group, lr in zip(self.optimizer.param_groups, self.get_last_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


# -- inside ------------------------------------------------------------------------------------------------------------


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _exempt(model: nn.Module) -> set[str]:
    """Full names of what any module of the model lists in no_weight_decay()."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        listed = getattr(module, "no_weight_decay", None)
        if callable(listed):
            names |= {_unwrapped(f"{prefix}.{name}".lstrip(".")) for name in listed()}
    return names


def _trunks(model: nn.Module) -> dict[str, int]:
    """Name -> number of blocks, of every transformer that trains."""
    found: dict[str, int] = {}
    with_embedding: dict[str, int] = {}
    for full_name, module in model.named_modules():
        children = dict(module.named_children())
        blocks = children.get("blocks")
        if blocks is None or not any(p.requires_grad for p in module.parameters()):
            continue
        name = _unwrapped(full_name)
        found[name] = len(blocks)  # a ModuleList or Sequential
        if "patch_embed" in children:
            with_embedding[name] = len(blocks)
    # A masked autoencoder's decoder has blocks too; it is no trunk but comes after one.
    return with_embedding or dict(list(found.items())[:1])


def _layer(name: str, trunks: dict[str, int], layer_decay: float | None) -> tuple[str, float]:
    """What the group's name starts with, and its lr_scale."""
    if layer_decay is None:
        return "", 1.0
    for trunk, depth in sorted(trunks.items(), reverse=True):  # a trunk inside another comes first
        prefix = f"{trunk}." if trunk else ""
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split(".")
        layer = int(parts[1]) + 1 if parts[0] == "blocks" else 0 if parts[0].startswith(_EMBEDDINGS) else depth + 1
        if layer <= depth:
            # With several trunks the same layer of two has two scales, and loggers want names that differ.
            own = prefix if len(trunks) > 1 else ""
            return f"{own}layer_{layer}_", layer_decay ** (depth + 1 - layer)
    return "last_", 1.0


def _check_lrs(optimizer: Optimizer, scales: list[float], min_lr: float) -> None:
    lrs = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if len(set(scales)) > 1 and len(set(lrs)) == 1:
        raise ValueError(
            f"optimizer has groups of different lr_scale but one lr {lrs[0]:g}: each group's lr must contain its lr_scale, "
            "as param_groups(model, lr=..., layer_decay=...) makes it"
        )
    for lr, scale in zip(lrs, scales, strict=True):
        if min_lr * scale > lr:
            raise ValueError(f"min_lr must not be above the optimizer's lr {lr / scale:g}, got {min_lr:g}")
