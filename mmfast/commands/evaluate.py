"""mmfast evaluate DATA --checkpoint PATH: few-shot episodes, the table and its JSON; other protocols are in modules of theirs."""

import argparse
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..adaptive import AdaptiveResult, calibrate_threshold, evaluate_adaptive, support_probabilities
from ..episodes import EpisodeResult, Episodes, evaluate_episodes, evaluate_fresh
from ..extract import PRECISIONS, QUANTIZED
from ..peft import Adaptation, evaluate_adapted
from ..shards import place_in_world, write_aside
from . import common, evl_head
from .features import (
    EVL,
    HEADS,
    TED,
    Features,
    add_episodes,
    clips_of,
    episodes_of,
    extracted,
    head_of,
    is_store,
    stored,
    together,
)

TRAINED = (TED, EVL)
PROTOCOLS = ("episodes", "multiview", "zero-shot")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = common.Parser(
        "evaluate",
        epilog="Of a distillation checkpoint the student is scored. Under torchrun clips and episodes are shared out.",
    )
    p.add_argument(
        "--protocol", choices=PROTOCOLS, default="episodes", help="multiview and zero-shot have options of their own"
    )
    p.add_argument("data", help="folder of extracted features, folder of class folders, manifest, or annotations")
    common.add_dataset(p)
    common.add_windows(p)
    p.add_argument("--k-shot", type=int, nargs="+", default=[1, 5], metavar="K", help="supports a class (default: 1 5)")
    p.add_argument("--out", default="evaluation.json", metavar="FILE", help="JSON of the table (default: %(default)s)")
    p.add_argument("--features", metavar="FOLDER", help="where extracted features are kept (default: OUT.features)")
    p.add_argument("--adaptive", action="store_true", help="also add views only for queries that are uncertain")
    p.add_argument(
        "--agreement",
        type=float,
        default=0.99,
        help="share of decisions that adaptive ensembles shall keep, calibrated on supports (default: %(default)s)",
    )
    p.add_argument(
        "--fresh", action="store_true", help="encode every episode anew under masks of its own: as published"
    )
    add_episodes(p, (*HEADS, *TRAINED))
    _add_adapters(p)
    evl_head.add_arguments(p)
    common.add_model(p, required=False)
    for add in (common.add_masks, common.add_clips, common.add_work):
        add(p)
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--protocol", nargs="?")
    protocol = scan.parse_known_args(argv)[0].protocol
    if protocol in PROTOCOLS[1:]:
        return import_module(f".{protocol.replace('-', '_')}", __package__).main(argv)
    args = parser().parse_args(argv)
    if not 0 <= args.agreement <= 1:
        raise ValueError(f"agreement must lie in [0, 1], got {args.agreement}")
    if args.adaptive and args.fresh:
        raise ValueError("adaptive ensembles read stored features; --fresh keeps none")
    if args.head in TRAINED and (args.adaptive or args.fresh):
        raise ValueError(
            f"--head {args.head} trains on the supports of every episode: it takes neither --adaptive nor --fresh"
        )
    if args.head in TRAINED and args.precision in QUANTIZED:
        raise ValueError(
            f"--head {args.head} trains on the supports of every episode: it does not take --precision {args.precision}"
        )
    if args.head != EVL and (args.decoder is not None or args.interpolate):
        raise ValueError(f"--decoder and --interpolate are of --head evl, got --head {args.head}")
    with together():
        if is_store(args.data):
            if args.head in TRAINED:
                raise ValueError(f"--head {args.head} trains on clips, and {args.data} holds features only")
            if args.fresh:
                raise ValueError(f"--fresh encodes clips anew, and {args.data} holds features only")
            found = stored(args.data, args.views)
            rows = [_row(args, found, k) for k in args.k_shot]
        else:
            if args.checkpoint is None:
                raise ValueError(
                    f"{args.data} holds no extracted features, so --checkpoint is needed to encode its clips"
                )
            if args.head == EVL:
                evl, clips = evl_head.load(args)
                return _finish(args, [_evl_row(args, evl, clips, k) for k in args.k_shot], _settings(args), {})
            model = common.load_model(args)
            clips, stride = clips_of(args, model)
            if args.fresh or args.head == TED:
                row = _fresh_row if args.fresh else _adapted_row
                return _finish(args, [row(args, model, clips, k) for k in args.k_shot], _settings(args), {})
            # What the sampler would refuse is said before hours of encoding.
            for k in args.k_shot:
                episodes_of(args, [r.label if r.label_name is None else r.label_name for r in clips.records], k)
            folder = Path(args.features or f"{args.out}.features")
            found = extracted(args, model, clips, stride, folder, args.views, args.mask_ratio)
            rows = [_row(args, found, k) for k in args.k_shot]
        return _finish(args, rows, _settings(args) | {"features": found.settings}, found.failed)


def score(
    args: argparse.Namespace, found: Features, k_shot: int, adaptive: bool
) -> tuple[EpisodeResult, AdaptiveResult | None]:
    """Accuracy over the episodes, this rank's share computed here; and of adaptive ensembles where asked for."""
    episodes = episodes_of(args, found.labels, k_shot)
    features = found.features.to(common.device_of(args.device))
    support, head = features[:, 0], head_of(args.head)
    mine = episodes.shard(*place_in_world())
    if not adaptive or features.shape[1] < 2:
        return evaluate_episodes(support, features, mine, head=head).gather(), None
    threshold = _threshold(args, features, episodes)
    part = evaluate_adaptive(support, features, mine, threshold, head=head)
    parts: list[Any] = [part]
    if torch.distributed.is_initialized():
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, part)
    result = AdaptiveResult.merge(parts)
    return result.full, result


def _threshold(args: argparse.Namespace, features: torch.Tensor, episodes: Episodes) -> float:
    calibration = support_probabilities(features, episodes, head=head_of(args.head))
    return calibrate_threshold(calibration, agreement=args.agreement)


def as_row(result: EpisodeResult, adaptive: AdaptiveResult | None = None) -> dict[str, Any]:
    """What the JSON says of one result."""
    row: dict[str, Any] = {
        "accuracy": result.mean,
        "std": result.std,
        "standard_error": result.standard_error,
        "episodes": len(result.number),
    }
    if adaptive is not None:
        row["adaptive"] = {
            "accuracy": adaptive.adaptive.mean,
            "standard_error": adaptive.adaptive.standard_error,
            "mean_views": adaptive.mean_views,
            "queries_by_views": adaptive.used.tolist(),
            "agreement": adaptive.agreement,
            "threshold": adaptive.threshold,
        }
    return row


def _row(args: argparse.Namespace, found: Features, k_shot: int) -> dict[str, Any]:
    result, adaptive = score(args, found, k_shot, args.adaptive)
    return {"n_way": args.n_way, "k_shot": k_shot, **as_row(result, adaptive)}


def _fresh_row(args: argparse.Namespace, model: Any, clips: Any, k_shot: int) -> dict[str, Any]:
    labels = [r.label if r.label_name is None else r.label_name for r in clips.records]
    mine = episodes_of(args, labels, k_shot).shard(*place_in_world())
    result = evaluate_fresh(
        model, clips, mine, args.views, args.mask_ratio, args.seed, head=head_of(args.head), modality=args.modality,
        dtype=PRECISIONS.get(args.precision), progress=not args.quiet,
    )  # fmt: skip
    return {"n_way": args.n_way, "k_shot": k_shot, **as_row(result.gather())}


def _adapted_row(args: argparse.Namespace, model: Any, clips: Any, k_shot: int) -> dict[str, Any]:
    labels = [r.label if r.label_name is None else r.label_name for r in clips.records]
    mine = episodes_of(args, labels, k_shot).shard(*place_in_world())
    result = evaluate_adapted(
        model, clips, mine, args.views, args.mask_ratio, args.seed, how=_adaptation(args), modality=args.modality,
        dtype=PRECISIONS[args.precision], progress=not args.quiet,
    )  # fmt: skip
    return {"n_way": args.n_way, "k_shot": k_shot, **as_row(result.gather())}


def _evl_row(args: argparse.Namespace, model: evl_head.Backbone, clips: Any, k_shot: int) -> dict[str, Any]:
    return {"n_way": args.n_way, "k_shot": k_shot, **as_row(evl_head.score(args, model, clips, k_shot))}


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    how = Adaptation()
    group = parser.add_argument_group("TED-Adapters, trained on the supports of every episode (--head ted)")
    group.add_argument(
        "--adapter-hidden", type=int, metavar="A", help="inner width (default: an eighth of the model's)"
    )
    group.add_argument(
        "--adapter-before",
        nargs="+",
        choices=("attn", "mlp"),
        default=how.before,
        help=f"what they stand before (default: {' '.join(how.before)})",
    )
    group.add_argument(
        "--adapter-layers", type=int, nargs="+", metavar="N", help="in which blocks, from 0 (default: all)"
    )
    group.add_argument("--adapter-steps", type=int, default=how.steps, help="of training (default: %(default)s)")
    group.add_argument("--adapter-lr", type=float, default=how.lr, help="its learning rate (default: %(default)s)")


def _adaptation(args: argparse.Namespace) -> Adaptation:
    layers = None if args.adapter_layers is None else tuple(args.adapter_layers)
    return Adaptation(args.adapter_hidden, tuple(args.adapter_before), layers, args.adapter_steps, args.adapter_lr)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("data", "n_way", "n_query", "episodes", "episode_seed", "head", "reference", "views", "fresh")
    chosen = {name: getattr(args, name) for name in names}
    if args.head == TED:
        chosen["adaptation"] = asdict(_adaptation(args))
    if args.head == EVL:
        chosen |= {"decoder": args.decoder, "adaptation": asdict(evl_head.adaptation(args))}
    fresh = args.fresh or args.head in TRAINED
    return chosen | ({"mask_ratio": args.mask_ratio, "seed": args.seed} if fresh else {})


def _finish(
    args: argparse.Namespace, rows: list[dict[str, Any]], settings: dict[str, Any], failed: dict[int, tuple[str, str]]
) -> int:
    if common.first_rank():
        ratio = settings.get("features", settings)["mask_ratio"]
        common.say(
            f"{args.n_way}-way, {args.n_query} queries a class, {args.episodes} episodes, mask ratio {ratio}, "
            f"{args.views} views, {args.head} head"
        )
        common.say(f"{'shots':>6} {'accuracy':>10} {'std':>8} {'std error':>10}")
        for row in rows:
            common.say(
                f"{row['k_shot']:>6} {100 * row['accuracy']:>8.2f} % {100 * row['std']:>8.2f} "
                f"{100 * row['standard_error']:>10.2f}{_adaptive(row.get('adaptive'))}"
            )
        listed = [{"clip": name, "reason": reason} for name, reason in failed.values()]
        about = {"settings": settings, "results": rows, "failed": listed}
        write_aside(Path(args.out), common.as_json(about))
        if failed:
            name, reason = next(iter(failed.values()))
            common.complain("evaluate", f"{len(failed)} clips could not be read and took no part; {name}: {reason}")
    return 1 if failed else 0


def _adaptive(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return (
        f"   adaptive: {100 * row['accuracy']:.2f} % with {row['mean_views']:.2f} views, "
        f"{100 * row['agreement']:.1f} % decided alike"
    )
