"""The variants of a training step, each a model and an optimiser of its own, and the check that all do the same step."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import progress, synchronize
from ladder import spread_weights
from peers import have_transformers, kept_ids
from torch import Tensor, nn
from train_peers import CE_WEIGHT, HuggingFaceMAE, PlainDistillation, PlainMAE

from mmfast import MaskedViT, tube_masks
from mmfast.masks import dense_pack

OURS = "mmfast"
LEAN = {f"{OURS}, lean mlp": "mlp", f"{OURS}, lean blocks": "block"}  # with what is computed again in the backward
PEERS = ("published", "transformers", "eager", "compiled")
FP32_BAR = 1e-5
SLACK = 2.0  # an error may be so many times that of the published step in the same precision
LOSS_SLACK = 1e-3  # a loss in lower precision may be this far off, relatively, where the published one errs less

Loss = Callable[[], Tensor]


@dataclass
class Setup:
    """What every variant gets: where it runs and the autocast it runs under (None is fp32)."""

    device: torch.device
    autocast: torch.dtype | None = None
    rate: float = 1.5e-4

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        with torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            yield


@dataclass
class Variant:
    """One way to take the step.

    module: whose parameters are trained. loss: the forward pass on the fixed batch. probes: a few parameters that every
    variant has, in the same order, whose gradients are compared. reconstruction: no class branch.
    """

    name: str
    module: nn.Module
    loss: Loss
    probes: Sequence[nn.Parameter]
    setup: Setup
    fused: bool = True
    reconstruction: bool = False
    optimiser: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        trained = [p for p in self.module.parameters() if p.requires_grad]
        # Released code takes torch's defaults; the others the fused step, as whoever wants speed would.
        fused = True if self.fused else None
        self.optimiser = torch.optim.AdamW(trained, lr=self.setup.rate, weight_decay=0.05, fused=fused)

    def backward(self) -> Tensor:
        """The loss; gradients are left in the parameters."""
        self.optimiser.zero_grad(set_to_none=True)
        with self.setup.precision():
            loss = self.loss()
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        self.backward()
        self.optimiser.step()

    def drop_gradients(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)

    def held_bytes(self) -> dict[str, int]:
        """What stays between steps: weights (frozen ones too), and the optimiser's state. Make one step first."""
        states = [t for state in self.optimiser.state.values() for t in state.values() if isinstance(t, Tensor)]
        return {
            "weights": sum(p.nbytes for p in self.module.parameters()),
            "optimiser": sum(t.nbytes for t in states),
        }


@dataclass(frozen=True)
class Batch:
    """Clips of one step. videos: pre-training (source, target); distillation the student's, then each teacher's."""

    videos: tuple[Tensor, ...]
    mask: Tensor  # bool [B, N], True = removed, the same for all videos
    labels: Tensor  # int64 [B]

    @property
    def keep(self) -> Tensor:
        """int64 [B, n]: ids of the tokens that stay."""
        return kept_ids(self.mask[:, None])[:, 0]


def draw_batch(
    configs: Sequence[Any], clips: int, ratio: float, classes: int, device: torch.device, **how: Any
) -> Batch:
    """Random clips for each config, one tube mask a sample for all.   how: uint8 (default False), seed (default 0)."""
    draw = torch.Generator().manual_seed(how.get("seed", 0))
    videos = []
    for config in configs:
        shape = (clips, config.in_chans, config.num_frames, *config.frame_size)
        if how.get("uint8", False):
            video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
        else:
            video = torch.randn(shape, generator=draw)
        videos.append(video.to(device))
    mask = tube_masks(clips, 1, configs[0].grid, ratio, seed=how.get("seed", 0), device=device)[:, 0]
    labels = torch.randint(0, max(classes, 1), (clips,), generator=draw).to(device)
    return Batch(tuple(videos), mask, labels)


def pretraining(model: nn.Module, batch: Batch, setup: Setup, wanted: Sequence[str], recompute: bool) -> list[Variant]:
    """Variants of stage I. model: a MaskedAutoencoder with classes, on the CPU in fp32, whose weights all variants get."""
    from mmfast.mae import MaskedAutoencoder
    from mmfast.pretrain import MaskedPretraining

    assert isinstance(model, MaskedAutoencoder)
    config, state = model.config, model.state_dict()
    (source, target), mask, labels = batch.videos, batch.mask, batch.labels
    keep, removed = batch.keep, kept_ids(~mask[:, None])[:, 0]
    both = torch.cat((source, target))
    variants = []
    for name in ("published", "eager", "compiled"):
        if name in wanted:
            plain = PlainMAE(state, config).to(setup.device)
            taken: Callable[..., Tensor] = plain.strong
            given: tuple[Any, ...] = (both, keep, removed, labels)
            if name == "compiled":
                taken = torch.compile(plain.strong, dynamic=False)
            elif name == "published":
                taken, given = plain.published, (source, target, mask, labels)
            variants.append(
                Variant(name, plain, _bound(taken, *given), _plain_probes(plain), setup, name != "published")
            )
    if "transformers" in wanted and have_transformers():
        theirs = HuggingFaceMAE(state, config).to(setup.device)
        loss = _bound(theirs.published, source, target, mask, None)
        variants.append(Variant("transformers", theirs, loss, _hf_probes(theirs), setup, False, True))
    for name in (OURS, *LEAN) if recompute else (OURS,):
        own = MaskedAutoencoder(config)
        own.load_state_dict(state)
        own.to(setup.device).train().set_grad_checkpointing(name in LEAN, LEAN.get(name, "block"))
        pretrain = MaskedPretraining(own, target_weight=1.0, ce_weight=CE_WEIGHT)
        # As in training, where the sampler knows how many tokens stay: nothing is read back from the device.
        pack = dense_pack(keep[:, None])
        loss = _total(pretrain, source, target, pack, labels)
        variants.append(Variant(name, pretrain, loss, _own_probes(own), setup))
    return sorted(variants, key=lambda v: PEERS.index(v.name) if v.name in PEERS else len(PEERS))


def distillation(
    models: Mapping[str, MaskedViT], batch: Batch, setup: Setup, wanted: Sequence[str], recompute: bool
) -> list[Variant]:
    """Variants of stage II.   models: "student", then the teachers by modality, as many as batch.videos less one."""
    modalities = [name for name in models if name != "student"]
    started = _distiller(models)
    mlps = [tuple(_mlp(started, modality).parameters()) for modality in modalities]
    bodies = [(model.state_dict(), model.config) for model in models.values()]
    pack = dense_pack(batch.keep[:, None])
    videos = dict(zip(modalities, batch.videos[1:], strict=True))
    variants = []
    for name in ("published", "eager", "compiled"):
        if name in wanted:
            plain = PlainDistillation(bodies[0], bodies[1:], mlps).to(setup.device)
            taken: Callable[..., Tensor] = plain.strong
            given: tuple[Any, ...] = (batch.videos, batch.keep)
            if name == "compiled":
                taken = torch.compile(plain.strong, dynamic=False)
            elif name == "published":
                taken, given = plain.published, (batch.videos, batch.mask)
            loss = _bound(taken, *given)
            variants.append(Variant(name, plain, loss, _student_probes(plain), setup, name != "published"))
    for name in (OURS, *LEAN) if recompute else (OURS,):
        own: Any = copy.deepcopy(started).to(setup.device).train()
        own.set_grad_checkpointing(name in LEAN, LEAN.get(name, "block"))
        last = _mlp(own, modalities[-1])[2]
        probes = _parameters(own.student.patch_embed.proj, own.student.blocks[0].mlp.fc1, own.student.fc_norm, last)
        variants.append(Variant(name, own, _total(own, videos, pack), probes, setup))
    return variants


def _distiller(models: Mapping[str, MaskedViT]) -> nn.Module:
    """MultimodalDistillation of copies of the models, its MLPs drawn from one seed."""
    from mmfast.distill import MultimodalDistillation

    copies = {name: copy.deepcopy(model) for name, model in models.items()}
    torch.manual_seed(0)
    return MultimodalDistillation(copies.pop("student"), copies)


def _mlp(distiller: Any, modality: str) -> Any:
    return distiller.translate.get_submodule(f"mlp_to_{modality}")


def published_distillation(models: Mapping[str, MaskedViT], batch: Batch, setup: Setup) -> list[Variant]:
    """The published step: what the check compares with."""
    return distillation(models, batch, setup, ["published"], False)[:1]


def published_pretraining(model: Any, batch: Batch, setup: Setup) -> list[Variant]:
    """The published step with the class branch, and for reconstruction only: what the check compares with."""
    plain = PlainMAE(model.state_dict(), model.config).to(setup.device)
    (source, target), probes = batch.videos, _plain_probes(plain)
    losses = [_bound(plain.published, source, target, batch.mask, labels) for labels in (batch.labels, None)]
    return [
        Variant("published", plain, loss, probes, setup, False, reconstruction)
        for loss, reconstruction in zip(losses, (False, True), strict=True)
    ]


def _bound(function: Callable[..., Tensor], *args: Any) -> Loss:
    return lambda: function(*args)


def _total(module: nn.Module, *args: Any) -> Loss:
    return lambda: module(*args)["total"]


def _student_probes(plain: PlainDistillation) -> list[nn.Parameter]:
    student: Any = plain.student
    last: Any = plain.mlps[-1]
    return _parameters(student.encoder.embed, student.encoder.blocks[0].fc1, student.fc_norm, last[2])


def _plain_probes(plain: PlainMAE) -> list[nn.Parameter]:
    encoder: Any = plain.encoder
    first: Any = plain.decoder_blocks[0]
    modules = encoder.embed, encoder.blocks[0].fc1, plain.to_decoder, first.proj, plain.decoder_head
    return [*_parameters(*modules), plain.mask_token]


def _own_probes(model: Any) -> list[nn.Parameter]:
    encoder: Any = model.encoder
    first: Any = model.decoder.blocks[0]
    modules = encoder.patch_embed.proj, encoder.blocks[0].mlp.fc1, model.encoder_to_decoder, first.attn.proj
    return [*_parameters(*modules, model.decoder.head), model.mask_token]


def _hf_probes(theirs: HuggingFaceMAE) -> list[nn.Parameter]:
    model: Any = theirs.model
    body, first = model.videomae, model.decoder.decoder_layers[0]
    layer = body.encoder.layer[0]
    modules = body.embeddings.patch_embeddings.projection, layer.intermediate.dense
    return [
        *_parameters(*modules, model.encoder_to_decoder, first.attention.output.dense, model.decoder.head),
        model.mask_token,
    ]


def _parameters(*modules: Any) -> list[nn.Parameter]:
    return [module.weight for module in modules]


# -- the check ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One backward pass.   gradients: of the probes, on the CPU.   norm: of all gradients together."""

    loss: float
    gradients: tuple[Tensor, ...]
    norm: float

    @classmethod
    def of(cls, variant: Variant) -> "Outcome":
        loss = float(variant.backward())
        probes = tuple(_gradient(p).float().cpu().flatten() for p in variant.probes)
        grads = [p.grad for p in variant.module.parameters() if p.grad is not None]
        norm = float(torch.stack([g.float().norm() for g in grads]).norm())
        variant.drop_gradients()
        return cls(loss, probes, norm)

    def error(self, truth: "Outcome") -> "Error":
        gradients = [
            float((g.double() - t.double()).norm() / t.double().norm())
            for g, t in zip(self.gradients, truth.gradients, strict=True)
        ]
        worst = float("nan") if any(e != e for e in gradients) else max(gradients)
        return Error(abs(self.loss - truth.loss) / abs(truth.loss), worst)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a parameter that is trained has no gradient")
    return parameter.grad


@dataclass(frozen=True)
class Error:
    """Relative, against the published step in fp32. gradient: the worst of the probes."""

    loss: float
    gradient: float

    def within(self, allowed: "Error") -> bool:
        # Written so that a NaN is outside.
        return self.loss <= allowed.loss and self.gradient <= allowed.gradient


@dataclass(frozen=True)
class Gate:
    """What the check found. outcomes and errors of the variants that ran; crashed: the others, with the reason."""

    outcomes: Mapping[str, Outcome]
    errors: Mapping[str, Error]
    allowed: Error
    crashed: Mapping[str, str]

    @property
    def red(self) -> list[str]:
        return [name for name, error in self.errors.items() if not error.within(self.allowed)]


def check(variants: Sequence[Variant], published: Sequence[Variant]) -> Gate:
    """Take every variant's loss and gradients once and compare them with the published step in fp32 (TF32 off).

    published: the published step under the variants' autocast; one that is `reconstruction` is what such variants are
    compared with. fp32: relative error at most 1e-5. Lower precision: at most twice that of the published step in the
    same precision (and 1e-3 for the loss, a scalar whose error may vanish by chance). A peer that crashes is left out
    and named; mmfast crashing is an error like any other.
    """
    truths, allowed = {}, Error(FP32_BAR, FP32_BAR)
    wanted = {variant.reconstruction for variant in variants} | {False}
    for base in published:
        if base.reconstruction not in wanted:
            continue
        under = base.setup
        base.setup = Setup(under.device, None)
        truths[base.reconstruction] = Outcome.of(base)
        base.setup = under
        if under.autocast is not None:
            own = Outcome.of(base).error(truths[base.reconstruction])
            loss = max(allowed.loss, SLACK * own.loss, LOSS_SLACK)
            allowed = Error(loss, max(allowed.gradient, SLACK * own.gradient))
    outcomes: dict[str, Outcome] = {}
    crashed: dict[str, str] = {}
    for variant in progress(variants, "checking", len(variants)):
        try:
            outcomes[variant.name] = Outcome.of(variant)
            synchronize(variant.setup.device)
        except Exception as error:  # a peer that cannot run here is reported, of whatever it dies
            if variant.name.startswith(OURS):
                raise
            crashed[variant.name] = f"{type(error).__name__}: {(str(error) or ' ').splitlines()[0]}"
    errors = {v.name: outcomes[v.name].error(truths[v.reconstruction]) for v in variants if v.name in outcomes}
    return Gate(outcomes, errors, allowed, crashed)


def spread(model: nn.Module, seed: int = 0) -> None:
    """Random weights at which an error shows; see ladder.spread_weights."""
    spread_weights(model, seed)
