"""mmfast predict VIDEOS... --checkpoint PATH --out predictions.csv [--support FOLDER]"""

import argparse
from pathlib import Path
from typing import Any

from ..clip import CLIP
from ..clip_ensemble import CLIPEnsemble
from ..evl import EVL
from ..evl_ensemble import EVLEnsemble
from ..m2clip import M2CLIP
from ..multiview import Model, text_features, text_scale
from ..predict import predict
from . import common
from .features import HEADS, head_of
from .views import add_clip, add_decoder, load, prompts_of


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = common.Parser(
        "predict",
        epilog="Needs no config file: mmfast predict clips/ --checkpoint model.pth --out predictions.csv",
    )
    p.add_argument("videos", nargs="+", help="video files and folders, or one manifest (.csv, .json)")
    p.add_argument("--out", default="predictions.csv", metavar="FILE", help=".csv or .json (default: %(default)s)")
    p.add_argument("--support", metavar="FOLDER", help="class folders with a few clips each: predict their classes")
    p.add_argument(
        "--head", choices=tuple(HEADS), help="few-shot head fitted to the support (default: logistic)", default=None
    )
    p.add_argument(
        "--classes", metavar="FILE", help="class names of the checkpoint: one a line, a JSON list, or CSV `id,name`"
    )
    p.add_argument("--top-k", type=int, default=5, help="classes named in a row (default: %(default)s)")
    common.add_model(p)
    group = p.add_argument_group("masks")
    group.add_argument("--views", type=int, metavar="P", help="masked views a clip (default: 2, of a CLIP 1)")
    group.add_argument(
        "--mask-ratio", type=float, metavar="RHO", help="share of tubes removed (default: 0.75, of a CLIP 0)"
    )
    group.add_argument("--seed", type=int, default=0, help="of the masks (default: %(default)s)")
    common.add_clips(p)
    add_clip(p, "classes")
    add_decoder(p.add_argument_group("EVL"))
    common.add_work(p, batch=16)
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.head is not None and args.support is None:
        raise ValueError("--head is for --support: without it the checkpoint's own classifier predicts")
    if args.zero_shot and (args.support is not None or args.classes is None):
        raise ValueError("--zero-shot needs --classes, the names of the classes, and no --support")
    loaded = load(args)
    classes = common.read_names(args.classes) if args.classes else None
    model = _classifier(args, loaded, classes)
    whole = isinstance(loaded, CLIP | M2CLIP)  # which learnt on whole clips
    views = (1 if whole else 2) if args.views is None else args.views
    mask_ratio = (0.0 if whole else 0.75) if args.mask_ratio is None else args.mask_ratio
    if classes is None and args.support is None:
        classes = common.names_beside(Path(args.checkpoint), model.config.num_classes)
    report = predict(
        model,
        args.videos[0] if len(args.videos) == 1 else args.videos,
        args.out,
        support=args.support,
        head=head_of(args.head or "logistic") if args.support else None,
        classes=classes,
        top_k=args.top_k,
        views=views,
        mask_ratio=mask_ratio,
        seed=args.seed,
        stride=args.stride,
        resize=args.resize,
        modality=args.modality,
        precision=args.precision,
        shard_size=args.shard_size,
        batch=args.batch,
        workers=args.workers,
        retry=args.retry,
        progress=not args.quiet,
    )
    return common.tell("predict", report, args.out if report.complete else f"{args.out}.parts (others are at work)")


def _classifier(args: argparse.Namespace, loaded: Model, classes: list[str] | None) -> Any:
    if isinstance(loaded, CLIP | M2CLIP):
        if not args.zero_shot:
            return CLIPEnsemble(loaded, num_frames=args.num_frames)
        assert classes is not None
        texts = text_features(loaded, prompts_of(args, loaded, classes))
        return CLIPEnsemble(loaded, texts, text_scale(loaded), args.num_frames)
    if args.zero_shot:
        raise ValueError(
            f"--zero-shot needs a model that knows texts, a CLIP or an M2CLIP, got {type(loaded).__name__}"
        )
    return EVLEnsemble(loaded) if isinstance(loaded, EVL) else loaded
