"""The ways to take a training step of M2CLIP on the same clips and weights, and the check that all take the same step."""

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import harness
import torch
import train_report
from m2clip_peers import IGNORED, Clips, PlainM2CLIP, published_name
from torch import Tensor, nn
from train_variants import FP32_BAR, LEAN, OURS, SLACK, Error, Gate, Outcome, Setup, Variant

from mmfast.m2clip import M2CLIP, unique_rows
from mmfast.m2clip_config import M2CLIPConfig

PEERS = ("published", "eager", "compiled")
LOSSES = ("contrastive", "cmc", "cmlm", "vc")
_BEFORE, _MASK_ID = (320, 1455, 539), 3774  # any ids do; these are of "a video of" and of "mask" in CLIP's vocabulary


@dataclass(frozen=True)
class Way:
    """One way to take the step. towers: each tower alone, forward and backward. seen: the losses of its last pass."""

    variant: Variant
    towers: Mapping[str, Callable[[], None]]
    seen: dict[str, Tensor]


@dataclass(frozen=True)
class Work:
    """ways: to be timed. published, exact: the published step with fp32 weights, and in float64."""

    ways: list[Way]
    published: Way
    exact: Way
    clips: int
    title: str


def draw_clips(model: M2CLIP, batch: int, name_words: float, seed: int, device: torch.device) -> Clips:
    """Random clips, classes with names of 1 + Poisson tokens, captions with a fifth of the name masked."""
    config, draw = model.config, torch.Generator().manual_seed(seed)
    c = config.clip
    side = c.image_size
    video = torch.randn(batch, 3, config.num_frames, side, side, generator=draw).to(device)
    room = c.context_length - len(_BEFORE) - 2
    counts = 1 + torch.poisson(torch.full((config.num_classes,), name_words - 1), generator=draw).long()
    rows = torch.zeros(config.num_classes, c.context_length, dtype=torch.int64)
    usual = torch.tensor(_BEFORE) % (c.vocab_size - 2)
    for row, count in zip(rows, counts.clamp(max=room).tolist(), strict=True):
        name = torch.randint(1, c.vocab_size - 2, (count,), generator=draw)
        row[: count + 5] = torch.cat((torch.tensor([c.vocab_size - 2]), usual, name, torch.tensor([c.vocab_size - 1])))
    labels = torch.randint(config.num_classes, (batch,), generator=draw)
    ids, mlm_labels = rows[labels], torch.full((batch, c.context_length), IGNORED)
    for row, found in zip(ids, mlm_labels, strict=True):
        count = int(row.argmax()) - 4
        for place in (4 + torch.randperm(count, generator=draw)[: max(1, round(0.2 * count))]).tolist():
            row[place] = _MASK_ID % (c.vocab_size - 2)
            found[place] = int(torch.randint(config.num_words, (), generator=draw))
    return Clips(video, ids, labels, rows, mlm_labels)


def spread(model: M2CLIP, seed: int) -> None:
    """Adapters and heads at random values at which an error shows; a new adapter would be the identity."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if "adapter" in name and parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5 * (0.1 if "fc2" in name else 1.0))
            elif "adapter" in name or (parameter.dim() and name.endswith("bias")):
                parameter.add_(0.1 * noise)


def prepare(options: argparse.Namespace, setup: Setup) -> Work:
    """Every way to take the step, on the same clips and weights. Raises ValueError for a model that does not exist."""
    torch.manual_seed(options.seed)
    # Without dropout: the losses are compared.
    model = M2CLIP.from_name(options.model, options.preset, num_classes=options.classes, class_dropout=0.0).train()
    spread(model, options.seed)
    clips = draw_clips(model, options.batch, options.name_words, options.seed, setup.device)
    ways = []
    for name in PEERS:
        if name in options.peers:
            ways.append(plain_way(model, clips, setup, name, halved=True))
    for name in (OURS, *LEAN) if not options.no_recompute else (OURS,):
        ways.append(own_way(model, clips, setup, name))
    published = plain_way(model, clips, setup, "published")
    rows, _ = unique_rows(torch.cat((clips.class_token_ids, clips.token_ids)))
    lengths = rows.argmax(-1) + 1
    title = (
        f"{options.batch} clips of {model.config.num_frames} frames, {options.classes} classes, texts of "
        f"{float(lengths.float().mean()):.1f} tokens of {model.config.clip.context_length} ({int(lengths.max())} at most)"
    )
    exact = plain_way(model.double(), replace(clips, video=clips.video.double()), Setup(setup.device), "published")
    return Work(ways, published, exact, options.batch, title)


def own_way(model: M2CLIP, clips: Clips, setup: Setup, name: str) -> Way:
    own = copy.deepcopy(model).to(setup.device).train()
    own.set_grad_checkpointing(name in LEAN, LEAN.get(name, "block"))
    seen: dict[str, Tensor] = {}

    def loss() -> Tensor:
        found = own.losses(clips.video, clips.token_ids, clips.labels, clips.class_token_ids, clips.mlm_labels)
        seen.update({key: value.detach() for key, value in found.items()})
        return found["total"]

    texts, _ = unique_rows(torch.cat((clips.class_token_ids, clips.token_ids)))

    def text() -> list[Tensor]:
        return [own.clip.text.features(own.clip.text.forward_tokens(texts))]

    towers = tower_calls(own, setup, text, lambda: list(own.encode_video(clips.video)))
    return Way(Variant(name, own, loss, probes_of(own, model.config), setup), towers, seen)


def plain_way(model: M2CLIP, clips: Clips, setup: Setup, name: str, halved: bool = False) -> Way:
    """halved: frozen matrices are held in autocast's dtype, as released. Otherwise all are of the video's dtype."""
    plain = PlainM2CLIP(model.state_dict(), model.config).to(setup.device, clips.video.dtype).train()
    if halved and setup.autocast is not None:
        for module in plain.modules():
            halve(module, setup.autocast)
    strong = name != "published"
    device = setup.device
    seen: dict[str, Tensor] = {}
    host, row_of = unique_rows(torch.cat((clips.class_token_ids, clips.token_ids)))
    host = host[:, : int(host.argmax(-1).max()) + 1]
    class_rows, caption_rows = row_of.split((len(clips.class_token_ids), len(clips.token_ids)))
    if strong:
        clip, place = (clips.mlm_labels != IGNORED).nonzero().unbind(1)
        masked = caption_rows[clip] * host.shape[1] + place
        words = clips.mlm_labels[clip, place]
        given: tuple[Tensor, ...] = (host, class_rows, caption_rows, clips.labels, masked, clip, words)
        step: Callable[..., dict[str, Tensor]] = plain.strong
        if name == "compiled":
            step = torch.compile(plain.strong, dynamic=False)
    else:
        given = (clips.token_ids, clips.labels, clips.class_token_ids, clips.mlm_labels)
        step = plain.published
    there = [t.to(device) for t in given]

    def loss() -> Tensor:
        found = step(clips.video, *there)
        seen.update({key: value.detach() for key, value in found.items()})
        return found["total"]

    passes = [host.to(device)] if strong else [clips.token_ids.to(device), clips.class_token_ids.to(device)]
    text = lambda: [plain.text(ids, strong)[0] for ids in passes]
    towers = (
        {} if name == "compiled" else tower_calls(plain, setup, text, lambda: list(plain.visual(clips.video, strong)))
    )
    return Way(Variant(name, plain, loss, probes_of(plain, model.config), setup, strong), towers, seen)


def halve(module: nn.Module, dtype: torch.dtype) -> None:
    """Frozen matrices of CLIP's layers and its projections, not its norms and embeddings."""
    names: tuple[str, ...] = ("weight", "bias", "in_proj_weight", "in_proj_bias")
    if not isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention):
        names = ("proj", "text_projection")
    for name in names:
        parameter = getattr(module, name, None)
        if isinstance(parameter, nn.Parameter) and not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def tower_calls(
    module: nn.Module, setup: Setup, text: Callable[[], list[Tensor]], video: Callable[[], list[Tensor]]
) -> dict[str, Callable[[], None]]:
    def call(tower: Callable[[], list[Tensor]]) -> None:
        with setup.precision():
            total = torch.stack([out.float().square().mean() for out in tower()]).sum()
        total.backward()
        module.zero_grad(set_to_none=True)

    return {"text tower": lambda: call(text), "vision tower": lambda: call(video)}


def probes_of(module: nn.Module, config: M2CLIPConfig) -> list[nn.Parameter]:
    """All that trains and has a gradient, in the order of the published names.

    Before the last MLP the branch over space changes cells only, of which nothing is read: its gradient is zero.
    """
    without = f"visual.transformer.resblocks.{config.clip.vision_depth - 1}.adapter_pre_mlp.offset_adapter."
    named = {published_name(name): p for name, p in module.named_parameters() if p.requires_grad}
    return [named[name] for name in sorted(named) if not name.startswith(without)]


# -- the check ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """What was found about the ways. losses: of every way that ran, each loss's relative error. wrong: what to complain of."""

    gate: Gate
    losses: dict[str, dict[str, float]]
    wrong: list[str]


def check(ways: Sequence[Way], base: Way, exact: Way, truth: Outcome) -> Check:
    """Hold losses and gradients against the published step in float64 (`exact`, whose outcome is `truth`).

    base: the published step with fp32 weights, in the ways' precision. A relative error may be 1e-5, or twice that of base;
    under autocast also 1 % of a loss, whose error may vanish by chance. A peer that crashes is left out and named; mmfast
    crashing is an error like any other.
    """
    own = Outcome.of(base.variant).error(truth)
    floor = FP32_BAR if base.variant.setup.autocast is None else 0.01
    allowed = Error(max(floor, SLACK * own.loss), max(FP32_BAR, SLACK * own.gradient))
    own_losses = loss_errors(base, exact)
    outcomes: dict[str, Outcome] = {}
    crashed: dict[str, str] = {}
    losses: dict[str, dict[str, float]] = {}
    for way in harness.progress(ways, "checking", len(ways)):
        name = way.variant.name
        try:
            outcomes[name] = Outcome.of(way.variant)
            harness.synchronize(way.variant.setup.device)
        except Exception as error:  # a peer that cannot run here is reported, of whatever it dies
            if name.startswith(OURS):
                raise
            crashed[name] = f"{type(error).__name__}: {(str(error) or ' ').splitlines()[0]}"
        else:
            losses[name] = loss_errors(way, exact)
    gate = Gate(outcomes, {name: outcome.error(truth) for name, outcome in outcomes.items()}, allowed, crashed)
    wrong = train_report.red_lines(gate)[1:]  # without its heading
    for name, found in losses.items():
        for loss, off in found.items():
            most = max(floor, SLACK * own_losses[loss])
            if not off <= most:
                wrong.append(f"  {name}: relative error of {loss} {off:.2e}, allowed {most:.2e}")
    return Check(gate, losses, wrong)


def loss_errors(way: Way, exact: Way) -> dict[str, float]:
    return {name: abs(float(way.seen[name]) / float(exact.seen[name]) - 1) for name in LOSSES}


def checked(work: Work, setup: Setup) -> list[Check]:
    """mmfast in fp32, where errors are small, then every way under the autocast that is timed."""
    truth = Outcome.of(work.exact.variant)
    found = []
    if setup.autocast is not None:
        own, used = [way for way in work.ways if way.variant.name.startswith(OURS)], setup.autocast
        setup.autocast = None  # of all ways: they share it
        found.append(check(own, work.published, work.exact, truth))
        setup.autocast = used
    return [*found, check(work.ways, work.published, work.exact, truth)]
