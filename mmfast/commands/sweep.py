"""mmfast sweep DATA --checkpoint PATH --out FOLDER: accuracy against latency over mask ratios and views."""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import ViTConfig
from ..extract import encoder
from ..masks import kept_per_slot
from ..plots import save_figure
from ..shards import write_aside
from ..vit import MaskedViT
from . import common
from .evaluate import as_row, score
from .features import Features, add_episodes, clips_of, episodes_of, extracted, together

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Setting:
    """One point of the sweep. ms and gflops are of one clip; those of an adaptive ensemble are a clip's mean."""

    mask_ratio: float
    views: int
    adaptive: bool
    ms: float
    gflops: float
    published_gflops: float
    scores: dict[str, Any]

    @property
    def name(self) -> str:
        used = f", {self.scores['adaptive']['mean_views']:.2f} used (adaptive)" if self.adaptive else ""
        return f"mask ratio {self.mask_ratio:g}, {self.views} view{'s' * (self.views > 1)}{used}"

    @property
    def accuracy(self) -> float:
        return float((self.scores["adaptive"] if self.adaptive else self.scores)["accuracy"])

    @property
    def standard_error(self) -> float:
        return float((self.scores["adaptive"] if self.adaptive else self.scores)["standard_error"])

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        costs = {"ms": self.ms, "gflops": self.gflops, "published_gflops": self.published_gflops}
        about = {"mask_ratio": self.mask_ratio, "views": self.views, "adaptive": self.adaptive}
        return about | {"accuracy": self.accuracy, "standard_error": self.standard_error} | costs


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = common.Parser(
        "sweep", epilog="Features are kept in OUT: a second sweep of the same clips encodes nothing again."
    )
    p.add_argument("data", help="folder of class folders, manifest (.csv, .json), or annotations")
    common.add_dataset(p)
    common.add_windows(p)
    p.add_argument("--out", required=True, metavar="FOLDER", help="for sweep.json, sweep.png and the features")
    p.add_argument("--k-shot", type=int, default=5, metavar="K", help="supports a class (default: %(default)s)")
    p.add_argument(
        "--mask-ratios",
        type=float,
        nargs="+",
        default=[0, 0.5, 0.75, 0.9],
        metavar="RHO",
        help="(default: 0 .5 .75 .9)",
    )
    p.add_argument("--views", type=int, nargs="+", default=[1, 2, 3, 5], metavar="P", help="(default: 1 2 3 5)")
    p.add_argument("--seed", type=int, default=0, help="of the masks (default: %(default)s)")
    p.add_argument("--agreement", type=float, default=0.99, help="of adaptive ensembles (default: %(default)s)")
    p.add_argument("--max-ms", type=float, help="choose the best setting within so many milliseconds a clip")
    p.add_argument("--max-gflops", type=float, help="choose the best setting within so many GFLOPs a clip")
    p.add_argument("--timed-batch", type=int, default=1, help="clips at once when timed (default: %(default)s)")
    p.add_argument("--timed-runs", type=int, default=10, help="runs timed; the median counts (default: %(default)s)")
    add_episodes(p)
    for add in (common.add_model, common.add_clips, common.add_work):
        add(p)
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    for name, least in (("max_ms", 0), ("max_gflops", 0), ("timed_batch", 1), ("timed_runs", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    out, views = Path(args.out), sorted(set(args.views))
    if views[0] < 1:
        raise ValueError(f"views must be at least 1, got {views[0]}")
    settings: list[Setting] = []
    with together():
        model = common.load_model(args)
        for ratio in args.mask_ratios:
            kept_per_slot(model.config.grid, ratio)
        clips, stride = clips_of(args, model)
        episodes_of(args, [r.label if r.label_name is None else r.label_name for r in clips.records], args.k_shot)
        failed: dict[int, tuple[str, str]] = {}
        for ratio in sorted(set(args.mask_ratios)):
            taken = views if ratio > 0 else [1]  # with nothing removed all views are the same
            folder = out / f"features-{ratio:g}"
            found = extracted(args, model, clips, stride, folder, taken[-1], ratio)
            failed |= found.failed
            settings += _settings(args, model, found, taken, ratio)
        if common.first_rank():
            _finish(args, settings, failed, out)
    return 1 if failed else 0


def _settings(
    args: argparse.Namespace, model: MaskedViT, found: Features, views: list[int], ratio: float
) -> list[Setting]:
    settings = []
    kept = model.config.grid[0] * kept_per_slot(model.config.grid, ratio)
    single = 0.0
    for count in views:
        own = Features(found.features[:, :count], found.labels, found.failed, found.settings)
        result, adaptive = score(args, own, args.k_shot, adaptive=count > 1)
        ms = latency(model, count, ratio, args.precision, args.timed_batch, args.timed_runs)
        true, published = gflops(model.config, kept, 1)
        scores = as_row(result, adaptive)
        settings.append(Setting(ratio, count, False, ms, count * true, count * published, scores))
        if adaptive is not None:
            # Views come one after another there, each a run of its own.
            single = single or latency(model, 1, ratio, args.precision, args.timed_batch, args.timed_runs)
            used = adaptive.mean_views
            settings.append(Setting(ratio, count, True, used * single, used * true, used * published, scores))
    return settings


def latency(model: MaskedViT, views: int, mask_ratio: float, precision: str, batch: int, runs: int) -> float:
    """Median milliseconds a clip to encode a batch of uint8 clips that lie on the model's device under `views` masks."""
    c, device = model.config, next(model.parameters()).device
    draw = torch.Generator().manual_seed(0)
    shape = (batch, c.num_frames, *c.frame_size, c.in_chans)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw).permute(0, 4, 1, 2, 3)
    video = video.to(device) if c.in_chans == 3 else video.to(device, torch.float32) / 255
    encode, ids = encoder(model, views, mask_ratio, 0, precision), torch.arange(batch)
    times = []
    for number in range(runs + 3):
        start = time.perf_counter()
        encode(video, ids)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 3:  # the first compile kernels and fill caches
            times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2] / batch


def gflops(config: ViTConfig, kept: int, views: int) -> tuple[float, float]:
    """(all matrix products, what MM-CDFSL's table counts) of one clip under `views` masks that keep `kept` tokens.

    A multiply and an add are two operations. The table leaves attention out and embeds the full grid for every view.
    """
    dim, patch = config.embed_dim, config.in_chans * config.tubelet_size * config.patch_size**2
    blocks = config.depth * kept * (8 * dim * dim + 4 * dim * config.mlp_dim)
    attention = config.depth * 4 * kept * kept * dim
    true = 2 * kept * patch * dim + blocks + attention
    published = 2 * config.num_tokens * patch * dim + blocks
    return views * true / 1e9, views * published / 1e9


def choose(settings: list[Setting], max_ms: float | None, max_gflops: float | None) -> Setting | None:
    """The most accurate setting within the budgets, the faster of equals; None where none fits."""
    fits = [
        s for s in settings if (max_ms is None or s.ms <= max_ms) and (max_gflops is None or s.gflops <= max_gflops)
    ]
    return max(fits, key=lambda s: (s.accuracy, -s.ms), default=None)


def _finish(args: argparse.Namespace, settings: list[Setting], failed: dict[int, tuple[str, str]], out: Path) -> None:
    best = choose(settings, args.max_ms, args.max_gflops)
    common.say(f"{'ratio':>6} {'views':>6} {'ms a clip':>10} {'GFLOPs':>8} {'accuracy':>10} {'std error':>10}")
    for s in settings:
        used = f"{s.scores['adaptive']['mean_views']:.2f}*" if s.adaptive else str(s.views)
        mark = "  <- best" if s is best else ""
        common.say(
            f"{s.mask_ratio:>6g} {used:>6} {s.ms:>10.2f} {s.gflops:>8.3g} {100 * s.accuracy:>8.2f} % "
            f"{100 * s.standard_error:>10.2f}{mark}"
        )
    if any(s.adaptive for s in settings):
        common.say("* views a query took, where another was added only for the uncertain ones")
    budget = {"max_ms": args.max_ms, "max_gflops": args.max_gflops}
    about = {
        "protocol": {name: getattr(args, name) for name in ("n_way", "k_shot", "n_query", "episodes", "head")},
        "timed": {"batch": args.timed_batch, "device": args.device, "precision": args.precision},
        "budget": budget,
        "best": best.as_dict() if best else None,
        "settings": [s.as_dict() for s in settings],
        "failed": [{"clip": name, "reason": reason} for name, reason in failed.values()],
    }
    write_aside(out / "sweep.json", common.as_json(about))
    if best is None:
        common.complain(
            "sweep", f"no setting fits the budget ({', '.join(f'{k} {v:g}' for k, v in budget.items() if v)})"
        )
    else:
        common.say(f"best: {best.name}: {100 * best.accuracy:.2f} %, {best.ms:.2f} ms, {best.gflops:.3g} GFLOPs a clip")
    if failed:
        name, reason = next(iter(failed.values()))
        common.complain("sweep", f"{len(failed)} clips could not be read and took no part; {name}: {reason}")
    try:
        save_figure(figure(settings, best), out / "sweep.png")
    except ImportError:
        common.complain("sweep", "no figure without matplotlib: pip install 'mmfast[plot]'")


def figure(settings: list[Setting], best: Setting | None = None) -> "Figure":
    """Accuracy against latency: a line a mask ratio, a point a number of views; hollow points are adaptive."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = drawn.subplots()
    for number, ratio in enumerate(sorted({s.mask_ratio for s in settings})):
        colour = f"C{number}"
        for adaptive in (False, True):
            points = sorted(
                (s for s in settings if s.mask_ratio == ratio and s.adaptive == adaptive), key=lambda s: s.ms
            )
            if not points:
                continue
            axis.errorbar(
                [s.ms for s in points],
                [100 * s.accuracy for s in points],
                [100 * s.standard_error for s in points],
                color=colour,
                marker="o",
                markerfacecolor="white" if adaptive else colour,
                linestyle=":" if adaptive else "-",
                linewidth=1.2,
                capsize=2,
                elinewidth=0.7,
                label=f"mask ratio {ratio:g}{', adaptive' * adaptive}",
            )
            for s in points if not adaptive else ():
                axis.annotate(f"P={s.views}", (s.ms, 100 * s.accuracy), (4, 5), textcoords="offset points", fontsize=7)
    if best is not None:
        axis.plot(best.ms, 100 * best.accuracy, "*", color="black", markersize=12, zorder=5, label="best in the budget")
    axis.set(xlabel="milliseconds a clip", ylabel="accuracy (%)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return drawn
