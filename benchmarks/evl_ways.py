"""The ways to train EVL on the same clips and weights, the check that all take the same step, and what each keeps in memory."""

import argparse
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
import torch.nn.functional as F
from evl_peers import PlainEVL, Seen
from m2clip_ways import halve
from torch import Tensor, nn
from train_variants import FP32_BAR, LEAN, OURS, SLACK, Error, Gate, Outcome, Setup, Variant

from mmfast.clip_config import CLIPConfig
from mmfast.evl import EVL
from mmfast.evl_config import EVLConfig
from mmfast.evl_decoder import LayerFeatures

PEERS = ("published", "eager", "eager, one query", "compiled")
_STYLES = {"published": "published", "eager": "strong", "eager, one query": "one_query", "compiled": "strong"}
KINDS = ("frozen", "end to end", "cached")
LEAN_OURS = {f"{OURS}, end to end, {name.removeprefix(OURS + ', ')}": what for name, what in LEAN.items()}


@dataclass(frozen=True)
class Batch:
    """video: [B, 3, F, H, W]; labels: int64 [B]."""

    video: Tensor
    labels: Tensor

    def first(self, clips: int) -> "Batch":
        return Batch(self.video[:clips], self.labels[:clips])

    @property
    def clip_bytes(self) -> int:
        return self.video[0].nbytes


@dataclass(frozen=True)
class Way:
    """One way to train. kind: of KINDS; "cached" trains on features that are there already.

    prepare: what the loss takes of a batch, outside of the step. logits: of that. probes: whose gradients are compared.
    """

    name: str
    kind: str
    module: nn.Module
    prepare: Callable[[Batch], Any]
    logits: Callable[[Any], Tensor]
    probes: Sequence[nn.Parameter]
    fused: bool

    def variant(self, batch: Batch, setup: Setup) -> Variant:
        with setup.precision():
            given = self.prepare(batch)

        def loss() -> Tensor:
            logits = self.logits(given)
            return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), batch.labels)

        return Variant(self.name, self.module, loss, self.probes, setup, self.fused)


def draw_batch(config: EVLConfig, clips: int, seed: int, device: torch.device) -> Batch:
    draw, patch = torch.Generator().manual_seed(seed), config.backbone.patch_size
    video = torch.randn(clips, 3, config.num_frames, *(patch * side for side in config.grid), generator=draw)
    return Batch(video.to(device), torch.randint(config.num_classes, (clips,), generator=draw).to(device))


def make_model(options: argparse.Namespace) -> EVL:
    """Without dropout, as losses are compared, and with every temporal module away from the zeros it starts at."""
    torch.manual_seed(options.seed)
    shape = {"num_classes": options.classes, "num_layers": options.layers, "num_frames": options.frames}
    model = EVL(
        EVLConfig.preset("paper", CLIPConfig.from_name(options.model), mlp_dropout=0.0, class_dropout=0.0, **shape)
    )
    draw = torch.Generator().manual_seed(options.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if "cross_attention" in name:
                parameter.copy_(noise)
            elif "temporal" in name or name.endswith("bias") or name == "decoder.cls_token":
                parameter.add_(0.1 * noise)
    return model


def probes_of(module: nn.Module, kind: str) -> list[nn.Parameter]:
    """Decoder and head, then the backbone where it trains, in the order of their names.

    The bias of the decoder's keys shifts all scores of a query alike: its gradient is zero.
    """
    named = {name: p for name, p in module.named_parameters() if not name.endswith("k_proj.bias")}
    unread = ("backbone.proj", "backbone.ln_post")
    names = sorted(name for name in named if not name.startswith("backbone."))
    if kind == "end to end":
        names += sorted(name for name in named if name.startswith("backbone.") and not name.startswith(unread))
    return [named[name] for name in names]


def prepare(options: argparse.Namespace, setup: Setup) -> tuple[list[Way], EVL]:
    """Every way that was asked for, and the model whose weights all of them have."""
    model = make_model(options)
    return [*plain_ways(model, setup, options.peers), *own_ways(model, setup, not options.no_recompute)], model


def plain_ways(model: EVL, setup: Setup, wanted: Sequence[str], dtype: torch.dtype = torch.float32) -> list[Way]:
    """Of plain torch; those of a kind share their weights.   dtype: of all weights, frozen ones aside under autocast."""
    frozen = PlainEVL(model.state_dict(), model.config).to(setup.device, dtype).freeze()
    if setup.autocast is not None:
        for module in frozen.backbone.modules():
            halve(module, setup.autocast)
    ways = []
    for name in (name for name in PEERS if name in wanted):
        style, fused = _STYLES[name], name != "published"
        whole, decoder = plain_calls(frozen, style, name == "compiled")
        ways.append(Way(name, "frozen", frozen, lambda batch: batch.video, whole, probes_of(frozen, "frozen"), fused))
        only = nn.ModuleDict({"decoder": frozen.decoder, "proj": frozen.proj})
        held = plain_cache(frozen, style)
        ways.append(Way(f"{name}, cached", "cached", only, held, decoder, probes_of(frozen, "cached"), fused))
    names = [name for name in ("published", "eager") if name in wanted]
    if names:
        trained = PlainEVL(model.state_dict(), model.config).to(setup.device, dtype)
    for name in names:
        whole, _ = plain_calls(trained, _STYLES[name], False)
        probes = probes_of(trained, "end to end")
        ways.append(
            Way(
                f"{name}, end to end", "end to end", trained, lambda batch: batch.video, whole, probes,
                name != "published",
            )
        )  # fmt: skip
    return ways


def plain_calls(
    plain: PlainEVL, style: str, compiled: bool
) -> tuple[Callable[[Tensor], Tensor], Callable[[Sequence[Seen]], Tensor]]:
    """Logits of a video, and of features."""

    def whole(video: Tensor) -> Tensor:
        return plain(video, style)

    def decoder(features: Sequence[Seen]) -> Tensor:
        return plain.logits(features, style)

    if not compiled:
        return whole, decoder
    return torch.compile(whole, dynamic=False), torch.compile(decoder, dynamic=False)


def plain_cache(plain: PlainEVL, style: str) -> Callable[[Batch], list[Seen]]:
    def made(batch: Batch) -> list[Seen]:
        with torch.no_grad():
            return [Seen(*(t.contiguous() for t in seen)) for seen in plain.features(batch.video, style)]

    return made


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def own_ways(model: EVL, setup: Setup, recompute: bool) -> list[Way]:
    frozen = copy.deepcopy(model).to(setup.device).train()
    if setup.autocast is not None:
        frozen.backbone.to(setup.autocast)
    trained = copy.deepcopy(model).to(setup.device).train()
    trained.freeze_backbone(False)

    def video_of(batch: Batch) -> Tensor:
        return batch.video

    def features_of(batch: Batch) -> list[LayerFeatures]:
        """As a cache on disk would give them."""
        with torch.no_grad():
            streamed = frozen.stream(batch.video)
            return [LayerFeatures(out, contiguous(q), contiguous(k)) for out, q, k, _ in streamed]

    def decoded(features: Iterable[LayerFeatures]) -> Tensor:
        return frozen.proj(frozen.decode(features))

    def whole(lean: str | None = None) -> Callable[[Tensor], Tensor]:
        def logits(video: Tensor) -> Tensor:
            trained.set_grad_checkpointing(lean is not None, lean or "block")
            return trained(video)

        return logits

    only = nn.ModuleDict({"decoder": frozen.decoder, "proj": frozen.proj})
    probes = probes_of(trained, "end to end")
    ways = [
        Way(OURS, "frozen", frozen, video_of, frozen, probes_of(frozen, "frozen"), True),
        Way(f"{OURS}, cached", "cached", only, features_of, decoded, probes_of(frozen, "cached"), True),
        Way(f"{OURS}, end to end", "end to end", trained, video_of, whole(), probes, True),
    ]
    if recompute:
        ways += [
            Way(name, "end to end", trained, video_of, whole(what), probes, True) for name, what in LEAN_OURS.items()
        ]
    return ways


# -- the check ---------------------------------------------------------------------------------------------------------


def check(ways: Sequence[Way], model: EVL, batch: Batch, setup: Setup) -> Gate:
    """Hold the loss and the gradients of all that trains against the published model in float64, trained end to end.

    A relative error may be 1e-5, or twice the largest of the published ways in the same precision (under autocast also 1 % of a
    loss: a scalar's error may vanish by chance). Under autocast mmfast is held in fp32 too. A peer
    that crashes is left out and named; mmfast crashing is an error like any other.
    """
    exact = PlainEVL(model.state_dict(), model.config).to(setup.device, torch.float64)
    doubled = Batch(batch.video.double(), batch.labels)
    call, _ = plain_calls(exact, "published", False)
    probes = probes_of(exact, "end to end")
    truth = Outcome.of(
        Way("exact", "end to end", exact, lambda b: b.video, call, probes, False).variant(doubled, Setup(setup.device))
    )
    del exact, call, probes
    if setup.autocast is not None:
        exactly = Setup(setup.device)
        gate = held_against(own_ways(model, exactly, False), model, batch, exactly, truth)
        if gate.red:
            return gate
    return held_against(ways, model, batch, setup, truth)


def held_against(ways: Sequence[Way], model: EVL, batch: Batch, setup: Setup, truth: Outcome) -> Gate:
    base = Error(0.0, 0.0)
    for way in plain_ways(model, setup, ["published"]):
        own = compared(Outcome.of(way.variant(batch, setup)), truth)
        base = Error(max(base.loss, own.loss), max(base.gradient, own.gradient))
    floor = FP32_BAR if setup.autocast is None else 0.01
    allowed = Error(max(floor, SLACK * base.loss), max(FP32_BAR, SLACK * base.gradient))
    outcomes: dict[str, Outcome] = {}
    crashed: dict[str, str] = {}
    for way in harness.progress(ways, "checking", len(ways)):
        try:
            outcomes[way.name] = Outcome.of(way.variant(batch, setup))
            harness.synchronize(setup.device)
        except Exception as error:  # a peer that cannot run here is reported, of whatever it dies
            if way.name.startswith(OURS):
                raise
            crashed[way.name] = f"{type(error).__name__}: {(str(error) or ' ').splitlines()[0]}"
    return Gate(outcomes, {name: compared(found, truth) for name, found in outcomes.items()}, allowed, crashed)


def compared(found: Outcome, truth: Outcome) -> Error:
    """Of decoder and head alone where the backbone is frozen."""
    return found.error(Outcome(truth.loss, truth.gradients[: len(found.gradients)], truth.norm))


# -- memory ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Peak bytes of a training step: weights, optimiser state, all that the step allocates, and the clips."""

    peaks: Mapping[int, int]

    @property
    def clip_bytes(self) -> float:
        """What one more clip takes."""
        (few, less), (many, more) = sorted(self.peaks.items())
        return (more - less) / (many - few)

    @property
    def fixed_bytes(self) -> float:
        few, peak = min(self.peaks.items())
        return peak - few * self.clip_bytes

    def most(self, budget: float) -> int:
        """Clips that fit into so many bytes, by these two figures."""
        return max(0, int((budget - self.fixed_bytes) // self.clip_bytes))


def peak_of_step(way: Way, batch: Batch, setup: Setup) -> int:
    """As Memory has it."""
    variant = way.variant(batch, setup)
    variant.step()
    variant.drop_gradients()
    step = harness.peak_memory(variant.step, setup.device)
    variant.drop_gradients()
    held = variant.held_bytes()
    return step + held["weights"] + held["optimiser"] + batch.video.nbytes


def memory_of(way: Way, batch: Batch, batches: Sequence[int], setup: Setup) -> Memory:
    """batches: two numbers of clips, `batch` has at least as many."""
    return Memory({clips: peak_of_step(way, batch.first(clips), setup) for clips in batches})
