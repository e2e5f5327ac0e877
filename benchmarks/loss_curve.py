"""Loss curves of masked pre-training: mmfast against plain torch, in fp32 and under bf16 autocast, on the same clips.

    python benchmarks/loss_curve.py --json curves.json --plot curves.png

All runs start from the same weights and see the same drawn clips in the same order under the same masks. How far curves of
one precision lie apart is to be read beside the noise: how far two runs of plain torch do that see the clips in another order.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from clips import Clips
from options import at_least, ratio
from peers import kept_ids
from report import aligned
from torch import Tensor
from train_peers import CE_WEIGHT, PlainMAE
from train_variants import Batch, Setup, Variant

import mmfast
from mmfast import tube_masks
from mmfast.data.synthetic import ACTIONS
from mmfast.mae import MaskedAutoencoder
from mmfast.masks import dense_pack
from mmfast.pretrain import MaskedPretraining

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16 autocast": torch.bfloat16}
OURS, PLAIN, OTHER = "mmfast", "plain torch", "plain torch, fp32, other order"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loss_curve.py",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=at_least(2), default=200)
    add("--batch", type=at_least(1), default=4, help="source clips of a step, and as many target clips")
    add("--clips", type=at_least(2), default=48, help="drawn clips; half are source, half target")
    add("--model", default="pretrain_videomae_small_patch16_224", help="its widths and depths")
    add("--frames", type=at_least(2), default=8)
    add("--size", type=at_least(16), default=112, help="side of a frame")
    add("--mask-ratio", type=ratio, default=0.9, help="share of tubes removed")
    add("--rate", type=float, default=3e-4, help="AdamW's, after a tenth of the steps of warm-up")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    add("--seed", type=at_least(0), default=0)
    add("--threads", type=at_least(1), help="CPU threads; default: torch's")
    add("--json", metavar="FILE", help="write curves and differences")
    add("--plot", metavar="FILE", help="draw the curves (needs matplotlib)")
    options = parser.parse_args(arguments)
    if options.clips < 2 * options.batch:
        parser.error(f"--clips must be at least twice --batch, {2 * options.batch}, got {options.clips}")
    for target in (options.json, options.plot):
        if target and not Path(target).resolve().parent.is_dir():
            parser.error(f"{Path(target).resolve().parent} is no folder to write {target} into")
    return options


def batches(options: argparse.Namespace, videos: Tensor, grid: tuple[int, int, int], seed: int) -> list[Batch]:
    """The steps' clips, masks and labels. videos: uint8 [M, C, F, H, W]; even ones are source, odd ones target."""
    draw = torch.Generator().manual_seed(seed)
    steps = []
    for step in range(options.steps):
        source, target = (
            2 * torch.randperm((options.clips + 1 - odd) // 2, generator=draw)[: options.batch] + odd for odd in (0, 1)
        )
        mask = tube_masks(
            options.batch, 1, grid, options.mask_ratio, seed=seed * options.steps + step, device=options.device
        )[:, 0]
        labels = (source % len(ACTIONS)).to(options.device)
        steps.append(Batch((videos[source.to(videos.device)], videos[target.to(videos.device)]), mask, labels))
    return steps


class Curve:
    """One run."""

    def __init__(self, ours: bool, start: MaskedAutoencoder, setup: Setup) -> None:
        self.setup = setup
        self.module: Any
        if ours:
            own = MaskedAutoencoder(start.config)
            own.load_state_dict(start.state_dict())
            self.module = MaskedPretraining(own, target_weight=1.0, ce_weight=CE_WEIGHT).to(setup.device)
        else:
            self.module = PlainMAE(start.state_dict(), start.config).to(setup.device)
        self.ours = ours

    def loss(self, batch: Batch) -> Tensor:
        (source, target), keep = batch.videos, batch.keep
        if self.ours:
            return self.module(source, target, dense_pack(keep[:, None]), batch.labels)["total"]
        removed = kept_ids(~batch.mask[:, None])[:, 0]
        return self.module.strong(torch.cat((source, target)), keep, removed, batch.labels)

    def run(self, steps: Sequence[Batch], rate: float, name: str) -> list[float]:
        """The loss of every step."""
        waiting = list(steps)
        variant = Variant(name, self.module, lambda: self.loss(waiting[0]), [], self.setup)
        warmup = max(1, len(steps) // 10)
        losses = []
        for index in harness.progress(range(len(steps)), name, len(steps)):
            for group in variant.optimiser.param_groups:
                group["lr"] = rate * min(1.0, (index + 1) / warmup)
            losses.append(variant.backward())
            variant.optimiser.step()
            del waiting[0]
        return torch.stack(losses).tolist()


def differences(curves: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """How far two curves lie apart, step by step."""
    rows = []
    for one, other in pairs:
        apart = [abs(a - b) for a, b in zip(curves[one], curves[other], strict=True)]
        last = max(1, len(apart) // 10)
        ends = [statistics.fmean(curves[name][-last:]) for name in (one, other)]
        rows.append(
            {
                "pair": [one, other],
                "max": max(apart),
                "mean": statistics.fmean(apart),
                "mean_relative": statistics.fmean(a / abs(b) for a, b in zip(apart, curves[other], strict=True)),
                "last_tenth": ends,
            }
        )
    return rows


def save_plot(
    path: str | Path, curves: Mapping[str, Sequence[float]], rows: Sequence[Mapping[str, Any]], title: str
) -> None:
    """Losses above, differences from plain torch below. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 6.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    colours = dict(zip(curves, ("#7f7f7f", "#0072b2", "#d55e00", "#cc79a7", "#009e73"), strict=False))
    for name, losses in curves.items():
        ours = name.startswith(OURS)
        style = dict(linestyle="--" if ours else "-", linewidth=1.2 if ours else 2.2, alpha=1.0 if ours else 0.65)
        top.plot(losses, color=colours[name], label=name, **({"linewidth": 0.8} if name == OTHER else style))
    for row in rows:
        one, other = row["pair"]
        # A dot a step: a difference of exactly 0 has no place on the axis.
        apart = [abs(a - b) or float("nan") for a, b in zip(curves[one], curves[other], strict=True)]
        bottom.plot(apart, ".", markersize=4, color=colours[one], label=f"{one} - {other}")
    top.set_ylabel("loss")
    bottom.set(yscale="log", ylabel="difference", xlabel="step")
    for axis in (top, bottom):
        axis.grid(alpha=0.25)
    top.legend(frameon=False, fontsize=8)
    handles, labels = bottom.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=160)


def run(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(options.seed)
    try:
        start = MaskedAutoencoder.from_name(
            options.model,
            num_frames=options.frames,
            img_size=options.size,
            num_classes=len(ACTIONS),
            head_drop_rate=0.0,
        )
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    config = start.config
    drawn = Clips(options.frames, options.size).rendered(options.clips, options.seed)
    videos = torch.stack(list(harness.progress(drawn, "drawing clips", options.clips))).to(options.device)
    orders = [batches(options, videos, config.grid, options.seed + which) for which in (0, 1)]
    curves: dict[str, list[float]] = {}
    for precision, dtype in PRECISIONS.items():
        setup = Setup(options.device, dtype)
        for who in (PLAIN, OURS):
            name = f"{who}, {precision}"
            curves[name] = Curve(who == OURS, start, setup).run(orders[0], options.rate, name)
    curves[OTHER] = Curve(False, start, Setup(options.device)).run(orders[1], options.rate, OTHER)
    exact, rounded = PRECISIONS
    pairs = [(f"{OURS}, {precision}", f"{PLAIN}, {precision}") for precision in PRECISIONS]
    pairs += [(f"{PLAIN}, {rounded}", f"{PLAIN}, {exact}"), (OTHER, f"{PLAIN}, {exact}")]
    rows = differences(curves, pairs)
    kept = orders[0][0].keep.shape[1]
    title = (
        f"{options.model} on {options.frames} frames of {options.size} px, {kept} of {config.num_tokens} tokens, "
        f"{options.batch} + {options.batch} clips a step"
    )
    table: list[tuple[str, ...]] = [("difference of the losses", "mean", "max", "mean, relative", "end", "end")]
    table += [
        (" - ".join(row["pair"]), *(f"{row[key]:.2e}" for key in ("mean", "max", "mean_relative")))
        + tuple(f"{end:.4f}" for end in row["last_tenth"])
        for row in rows
    ]
    print(title, *aligned(table), "end: means of the last tenth of the steps", sep="\n")
    if options.json:
        facts = harness.machine(options.device)
        saved = {"mmfast": mmfast.__version__, "options": vars(options), "machine": facts, "title": title}
        harness.write_json(options.json, saved | {"curves": curves, "differences": rows})
        print(f"written: {options.json}")
    if options.plot:
        try:
            save_plot(options.plot, curves, rows, title)
        except ImportError:
            print("no figure: matplotlib is not installed", file=sys.stderr)
        else:
            print(f"written: {options.plot}")
    if not all(loss == loss for losses in curves.values() for loss in losses):
        print("error: a loss is NaN", file=sys.stderr)
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
