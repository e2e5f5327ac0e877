"""Stage II of MM-CDFSL (ECCV 2024): one student, seeing RGB, learns the features of frozen teachers of several modalities.

    L = sum_m weight_m * mean((MLP_m(f_student) - f_m)^2)        f_m: features of teacher m, a constant

Student and teachers see the same tokens of their own modality's clip.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import profiling
from .layers import Linear
from .masks import Grid, Pack
from .vit import Mask, MaskedViT

MODALITIES = ("flow", "rgb", "pose")  # as published


class CrossModalTranslate(nn.Module):
    """An MLP (linear, ReLU, linear) from the student's features to those of each modality's teacher.

    Named mlp_to_<modality>.{0,2}, as published; hidden: dim unless given. Raises ValueError, or TypeError for a wrong type.
    """

    def __init__(self, dim: int = 384, modalities: Iterable[str] = MODALITIES, hidden: int | None = None) -> None:
        super().__init__()
        self.modalities = _names(modalities)
        self.dim = dim
        hidden = dim if hidden is None else hidden
        for name, value in (("dim", dim), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for modality in self.modalities:
            mlp = nn.Sequential(Linear(dim, hidden), nn.ReLU(), Linear(hidden, dim))
            self.add_module(f"mlp_to_{modality}", mlp)

    def forward(self, features: Tensor, modalities: Iterable[str] | None = None) -> dict[str, Tensor]:
        """What each modality's teacher would say, of the student's features [..., D]: [..., D] each.

        modalities: only these.
        """
        chosen = self.modalities if modalities is None else modalities
        return {modality: self.get_submodule(f"mlp_to_{modality}")(features) for modality in chosen}


class ModalityWeights(nn.Module):
    """Makes one loss of several: sum_m weight_m L_m, fixed; or with weights that are learnt.

    init: one weight for all, or one a modality; 1 for each is as published. learnable: homoscedastic uncertainty (Kendall et
    al., CVPR 2018): sum_m exp(-s_m) L_m + s_m, where s_m = log sigma_m^2 starts at -log init. A modality whose features
    the student predicts badly gets a large s_m and with it little weight; the term + s_m keeps weights from going to 0.
    """

    def __init__(
        self, modalities: Iterable[str] = MODALITIES, learnable: bool = False, init: float | Mapping[str, float] = 1.0
    ) -> None:
        super().__init__()
        self.modalities = _names(modalities)
        given = init if isinstance(init, Mapping) else dict.fromkeys(self.modalities, init)
        if set(given) != set(self.modalities):
            raise ValueError(
                f"init must have a weight for each of {', '.join(self.modalities)}, got {', '.join(given)}"
            )
        self.init = {modality: float(given[modality]) for modality in self.modalities}
        for modality, weight in self.init.items():
            if not 0 <= weight < math.inf or (learnable and weight == 0):
                least = "above" if learnable else "at least"
                raise ValueError(f"init of {modality} must be finite and {least} 0, got {weight}")
        start = [-math.log(weight) for weight in self.init.values()] if learnable else []
        self.log_variance = nn.Parameter(torch.tensor(start)) if learnable else None

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of scalars, of any of the modalities."""
        terms = []
        for modality, loss in losses.items():
            if self.log_variance is None:
                terms.append(self.init[modality] * loss)
            else:
                log_variance = self.log_variance[self.modalities.index(modality)]
                terms.append(torch.exp(-log_variance) * loss + log_variance)
        return torch.stack(terms).sum()


class MultimodalDistillation(nn.Module):
    """A student on RGB, frozen teachers, and the loss between them.

    teachers: modality -> MaskedViT (or a module with its embed_dim, check_video and encode), any subset of the modalities of
    `translate`, which has those of the teachers unless given. They stay in eval mode whatever train() says, take no gradient,
    and are not in state_dict(): they never change, and come from their own files, as at the first start, when training
    goes on. A state dict that does have them (prefix "teachers.") loads them.

    A module, so that DDP and FSDP see one forward a step. The student's head gets no gradient: student.reset_classifier(0)
    removes it, else DDP needs find_unused_parameters=True. With FSDP2 shard each of student.blocks, then this whole module.
    param_groups(this) leaves the teachers out. Raises ValueError, or TypeError for a wrong type, naming the argument.
    """

    def __init__(
        self,
        student: MaskedViT,
        teachers: Mapping[str, nn.Module],
        translate: CrossModalTranslate | None = None,
        weights: ModalityWeights | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, MaskedViT):
            raise TypeError(f"student must be a MaskedViT, got {type(student).__name__}")
        if translate is None:
            if not teachers:
                raise ValueError("teachers is empty; without any, give a translate and all features at each step")
            translate = CrossModalTranslate(student.embed_dim, teachers)
        if weights is None:
            weights = ModalityWeights(translate.modalities)
        if translate.dim != student.embed_dim:
            raise ValueError(f"translate must have the student's width {student.embed_dim}, got {translate.dim}")
        for modality in teachers:
            if modality not in translate.modalities:
                raise ValueError(f"teachers has {modality!r}; translate knows {', '.join(translate.modalities)} only")
        for modality in translate.modalities:
            if modality not in weights.modalities:
                raise ValueError(
                    f"weights must know {modality!r} as translate does, got {', '.join(weights.modalities)}"
                )
        for modality, teacher in teachers.items():
            _check_teacher(modality, teacher, student)
        self.student = student
        self.teachers = nn.ModuleDict(teachers)
        self.translate = translate
        self.weights = weights
        self.teachers.requires_grad_(False).eval()
        self.register_state_dict_post_hook(_drop_teachers)
        self.register_load_state_dict_pre_hook(_keep_teachers)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teachers.eval()
        return self

    def forward(
        self, videos: Mapping[str, Tensor], mask: Mask, *, features: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The losses of one step.

        videos: modality -> [B, C, F, H, W] as its model takes it; "rgb" is the student's, and clips of a published modality
        that has no teacher are not looked at. mask: bool [B, N] or [B, P, N], True = removed, a Pack, or None; the same for
        every modality, so all must have one token grid. features: modality -> what its teacher says of these clips under
        this mask, in place of running it: neither the teacher nor its video is needed then.

        Returns scalars total and mse_<modality>, and the student's features [B, D], [B, P, D] or, for a Pack, [S, D].
        """
        features = {} if features is None else features
        self._check_names(videos, features)
        student, rgb = self.student, videos["rgb"]
        grid = _grid_of(student, "rgb", rgb)
        pack, lead = student.pack(rgb, mask)
        with profiling.range("student"):
            own = student.encode(rgb, pack).unflatten(0, lead)
        active = [m for m in self.translate.modalities if m in self.teachers or m in features]
        losses = {}
        for modality, said in self.translate(own, active).items():
            if modality in features:
                target = features[modality]
            else:
                target = self._ask(modality, videos[modality], pack, grid, len(rgb)).unflatten(0, lead)
            if target.shape != said.shape:
                raise ValueError(
                    f"features[{modality!r}] must be {tuple(said.shape)}, as the student's are, got {tuple(target.shape)}"
                )
            losses[modality] = _mse(said, target)
        named = {f"mse_{modality}": loss for modality, loss in losses.items()}
        return {"total": self.weights(losses), **named, "features": own}

    def no_weight_decay(self) -> set[str]:
        return set()

    def set_grad_checkpointing(self, enable: bool = True, what: str = "block") -> None:
        self.student.set_grad_checkpointing(enable, what)

    # -- inside ------------------------------------------------------------------------------------------------

    def _check_names(self, videos: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> None:
        known = self.translate.modalities
        for name, given, taken in (("videos", videos, {*known, *MODALITIES}), ("features", features, set(known))):
            for modality in given:
                if modality not in taken:
                    raise ValueError(f"{name} has the unknown modality {modality!r}; known are {', '.join(known)}")
        if "rgb" not in videos:
            raise ValueError(f"videos must have 'rgb', the student's modality, got {', '.join(videos) or 'none'}")
        for modality in self.teachers:
            if modality not in videos and modality not in features:
                raise ValueError(
                    f"videos has no {modality!r}, and features has none either: its teacher needs one of them"
                )
        if not self.teachers and not features:
            raise ValueError("features must be given: there are no teachers to ask")

    def _ask(self, modality: str, video: Tensor, pack: Pack, grid: Grid, clips: int) -> Tensor:
        """What a teacher says, [S, D]."""
        teacher: Any = self.teachers[modality]
        own = _grid_of(teacher, modality, video)
        if own != grid:
            raise ValueError(
                f"videos[{modality!r}] has the token grid {own}, but the mask is the student's, over {grid}: "
                "all modalities must have one grid"
            )
        if len(video) != clips:
            raise ValueError(f"videos[{modality!r}] must have {clips} clips, as videos['rgb'] has, got {len(video)}")
        with torch.no_grad(), profiling.range(f"teacher_{modality}"):
            return teacher.encode(video, pack)


def _names(modalities: Iterable[str]) -> tuple[str, ...]:
    if isinstance(modalities, str):
        raise TypeError(f"modalities must be several names, got the string {modalities!r}")
    names = tuple(modalities)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"modalities must be one or more different names, got {names}")
    return names


def _check_teacher(modality: str, teacher: nn.Module, student: MaskedViT) -> None:
    lacking = [name for name in ("embed_dim", "check_video", "encode") if not hasattr(teacher, name)]
    if lacking:
        kind = type(teacher).__name__
        raise TypeError(f"teachers[{modality!r}] must be a MaskedViT, got {kind} without {', '.join(lacking)}")
    width: Any = teacher.embed_dim
    if width != student.embed_dim:
        raise ValueError(f"teachers[{modality!r}] must have the student's width {student.embed_dim}, got {width}")
    learnt = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in learnt for parameter in teacher.parameters()):
        raise ValueError(
            f"teachers[{modality!r}] shares parameters with the student, which it would freeze; give a copy"
        )


def _grid_of(model: Any, modality: str, video: Tensor) -> Grid:
    try:
        return model.check_video(video)
    except (TypeError, ValueError) as fault:
        raise type(fault)(f"videos[{modality!r}]: {fault}") from None


def _mse(said: Tensor, target: Tensor) -> Tensor:
    """Mean squared error against a constant, in fp32 at least."""
    # Autograd refuses to save a tensor from a cache made in inference mode; torch.compile has none and no such question.
    if not torch.compiler.is_compiling() and target.is_inference():
        target = target.clone()
    dtype = torch.promote_types(said.dtype, torch.float32)
    return F.mse_loss(said.to(dtype), target.detach().to(said.device, dtype, non_blocking=True))


def _drop_teachers(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [n for n in state if n.startswith(f"{prefix}teachers.")]:
        del state[name]


def _keep_teachers(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give a state dict without teachers those that are here, so that a strict load misses none."""
    own = module.teachers.state_dict(prefix=f"{prefix}teachers.")  # type: ignore[union-attr]  # a ModuleDict
    for name, tensor in own.items():
        state.setdefault(name, tensor)
