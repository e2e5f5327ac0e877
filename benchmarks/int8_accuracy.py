"""What int8 costs in accuracy, and where it comes from: random weights, layer by layer, and a small model that was trained.

    python benchmarks/int8_accuracy.py                                    # ViT-S, then 800 steps of training: minutes
    python benchmarks/int8_accuracy.py --model videomae_base_patch16_224 --steps 0 --json out.json

Random weights: features and probabilities of masked clips against fp32. The same is then computed in plain torch with one kind
of layer rounded at a time, its weights, what goes into it, or both; the sum of all must be what mmfast's int8 gives.
Trained: synthetic_cdfsl.py's encoder of optical flow after fewer steps, its few-shot episodes in fp32 and in int8, and how
often the two decide alike.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import synthetic_cdfsl
import torch
from ladder import spread_weights
from options import at_least
from peers import PlainViT, kept_ids, sdpa
from report import aligned
from synthetic_lab import FIRST, Lab, draw
from torch import Tensor
from variants import relative_error

from mmfast import MaskedViT, tube_masks
from mmfast.episodes import Episodes
from mmfast.fewshot import LogisticRegression

LAYERS = ("qkv", "proj", "fc1", "fc2")
LEVELS = 127
TRAINED = next(run for run in FIRST if run.key == "flow")  # the one that learns soonest


@dataclass(frozen=True)
class Precision:
    """rounded: every row of a matrix as this precision holds it. quantize: the model changed into it."""

    name: str
    rounded: Callable[[Tensor], Tensor]
    quantize: Callable[[MaskedViT], MaskedViT]


def parse(arguments: Sequence[str] | None, name: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"{name}_accuracy.py",
        description=f"What {name} costs in accuracy, and which layers it comes from.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="videomae_small_patch16_224", help="architecture with random weights")
    add("--checkpoint", metavar="FILE", help="weights in any dialect that mmfast reads, in place of random ones")
    add("--img-size", type=at_least(16), help="default: the architecture's")
    add("--num-classes", type=at_least(1), default=100)
    add("--clips", type=at_least(1), default=4)
    add("--views", type=at_least(1), default=2)
    add("--mask-ratio", type=float, default=0.75)
    add("--steps", type=at_least(0), default=800, help="of training the small model; 0 leaves it out")
    add("--source-clips", type=at_least(1), default=60, help="of each of 16 classes to train on")
    add("--test-clips", type=at_least(20), default=30, help="of each of 10 classes, for the episodes")
    add("--episodes", type=at_least(1), default=300)
    add("--threads", type=at_least(1), help="default: torch's")
    add("--seed", type=at_least(0), default=0)
    add("--json", metavar="FILE", help="write everything")
    return parser.parse_args(arguments)


# -- by layers, in plain torch -----------------------------------------------------------------------------------------


def rounded(x: Tensor) -> Tensor:
    """Every row of x as int8 with its own scale holds it."""
    step = x.abs().amax(-1, keepdim=True) / LEVELS
    return (x / step.where(step > 0, 1)).round() * step


@contextmanager
def rounding(
    plain: PlainViT, layers: Sequence[str], weights: bool, rows: bool, rounded: Callable[[Tensor], Tensor] = rounded
) -> Iterator[None]:
    """The blocks' layers of these names with rounded weights, rounded inputs, or both."""
    chosen = [getattr(block, layer) for block in plain.blocks for layer in layers]
    kept = [layer.weight.data for layer in chosen]
    hooks = []
    for layer in chosen:
        if weights:
            layer.weight.data = rounded(layer.weight.data)
        if rows:
            hooks.append(layer.register_forward_pre_hook(lambda _, given: (rounded(given[0]),)))
    try:
        yield
    finally:
        for layer, weight in zip(chosen, kept, strict=True):
            layer.weight.data = weight
        for hook in hooks:
            hook.remove()


Outcome = tuple[Tensor, Tensor]  # features and probabilities


def by_layers(
    model: MaskedViT, video: Tensor, masks: Tensor, rounded: Callable[[Tensor], Tensor]
) -> list[dict[str, Any]]:
    """Relative error of the features with one kind of layer rounded at a time, and with all."""
    plain, keep = PlainViT(model.state_dict(), model.config), kept_ids(masks)
    exact = features_of(plain, video, keep)
    rows = []
    for layer in (*LAYERS, "all"):
        layers = LAYERS if layer == "all" else (layer,)
        row: dict[str, Any] = {"layer": layer}
        for what, weights, activations in (("weights", True, False), ("rows", False, True), ("both", True, True)):
            with rounding(plain, layers, weights, activations, rounded):
                row[what] = relative_error(features_of(plain, video, keep), exact)
        rows.append(row)
    return rows


def features_of(plain: PlainViT, video: Tensor, keep: Tensor) -> Tensor:
    """What the head gets, [S, D]."""
    seen: list[Tensor] = []
    hook = plain.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        plain.strong(video, keep, sdpa)
    finally:
        hook.remove()
    return seen[0]


# -- the two models ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def with_given_weights(options: argparse.Namespace, precision: Precision) -> dict[str, Any]:
    if options.checkpoint:
        model = MaskedViT.from_pretrained(options.checkpoint)
    else:
        size = {"img_size": options.img_size} if options.img_size else {}
        model = MaskedViT.from_name(options.model, num_classes=options.num_classes, **size).eval()
        spread_weights(model, options.seed)
    c = model.config
    draw_pixels = torch.Generator().manual_seed(options.seed)
    shape = (options.clips, c.in_chans, c.num_frames, *c.frame_size)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw_pixels)
    masks = tube_masks(options.clips, options.views, c.grid, options.mask_ratio, seed=options.seed)

    def outcome() -> Outcome:
        return model.encode(video, masks), model.ensemble(video, masks=masks)

    (features, probs), layers = outcome(), by_layers(model, video, masks, precision.rounded)
    precision.quantize(model)
    got_features, got_probs = outcome()
    return {
        "model": options.checkpoint or options.model,
        "features": relative_error(got_features, features),
        "probabilities": float((got_probs - probs).abs().max()),
        "largest_probability": float(probs.max()),
        "top1_agreement": float((got_probs.argmax(1) == probs.argmax(1)).double().mean()),
        "layers": layers,
    }


def trained(options: argparse.Namespace, precision: Precision) -> dict[str, Any]:
    sizes = {"steps": options.steps, "source_clips": options.source_clips, "test_clips": options.test_clips}
    own = synthetic_cdfsl.parse(["--jobs", "1", "--episodes", str(options.episodes), "--seed", str(options.seed)])
    vars(own).update(sizes, teacher_steps=options.steps, target_clips=options.source_clips)
    with tempfile.TemporaryDirectory(prefix="int8_accuracy.") as scratch:
        draw(own, Path(scratch))
        lab = Lab(own, Path(scratch))
        lab.row(TRAINED)
        return compared(lab, options, precision) | sizes


def compared(lab: Lab, options: argparse.Namespace, precision: Precision) -> dict[str, Any]:
    """The trained encoder's episodes in fp32 and in the other precision."""
    model = lab.load(TRAINED)
    exact = lab.features(model, TRAINED.modality, options.views, options.mask_ratio)
    near = lab.features(precision.quantize(copy.deepcopy(model)), TRAINED.modality, options.views, options.mask_ratio)
    found: dict[str, Any] = {"features": relative_error(near, exact), "shots": {}}
    for shots in (1, 5):
        episodes = lab.episodes(shots, options.seed)
        of_exact, of_near = (predictions(features, episodes) for features in (exact, near))
        truth = torch.arange(episodes.n_way).repeat_interleave(episodes.n_query)
        found["shots"][str(shots)] = {
            "fp32": float((of_exact == truth).double().mean()),
            precision.name: float((of_near == truth).double().mean()),
            "agreement": float((of_exact == of_near).double().mean()),
            "queries": of_exact.numel(),
        }
    return found


def predictions(features: Tensor, episodes: Episodes) -> Tensor:
    """Classes [E, Q] of the queries of all episodes; supports are seen under their first view."""
    drawn = list(episodes)
    support, query = (torch.stack([torch.as_tensor(part[i]) for part in drawn]) for i in (0, 1))
    labels = torch.arange(episodes.n_way).repeat_interleave(episodes.k_shot).expand(len(drawn), -1)
    head = LogisticRegression().fit(features[support][:, :, 0], labels)
    each = head.predict_proba(features[query].flatten(1, 2)).unflatten(1, (query.shape[1], -1))
    return each.mean(2).argmax(-1)


# -- what is printed ---------------------------------------------------------------------------------------------------


def tell(given: dict[str, Any], name: str) -> None:
    table: list[tuple[str, ...]] = [("features off, rounded:", "weights", "rows", "both")]
    for row in given["layers"]:
        table.append((row["layer"], *(f"{row[what]:.2e}" for what in ("weights", "rows", "both"))))
    print(f"{given['model']}: relative error of features in {name} {given['features']:.2e}")
    print(
        f"probabilities off by {given['probabilities']:.2e} at most (the largest is {given['largest_probability']:.2f}), "
        f"the same class in {given['top1_agreement']:.1%} of the clips"
    )
    print(*aligned(table), sep="\n")


def tell_trained(found: dict[str, Any], name: str) -> None:
    print(f"trained for {found['steps']} steps: relative error of features in {name} {found['features']:.2e}")
    for shots, row in found["shots"].items():
        print(
            f"{shots}-shot: fp32 {row['fp32']:.2%}, {name} {row[name]:.2%}, the same decision in {row['agreement']:.2%} "
            f"of {row['queries']} queries"
        )


INT8 = Precision("int8", rounded, MaskedViT.quantize_int8)


def main(arguments: Sequence[str] | None = None, precision: Precision = INT8) -> int:
    options = parse(arguments, precision.name)
    if options.threads:
        torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"machine": harness.machine(torch.device("cpu")), "options": vars(options)}
    report["given"] = with_given_weights(options, precision)
    tell(report["given"], precision.name)
    if options.steps:
        report["trained"] = trained(options, precision)
        tell_trained(report["trained"], precision.name)
    if options.json:
        harness.write_json(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
