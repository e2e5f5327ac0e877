"""mmfast predict VIDEOS... --checkpoint PATH --out predictions.csv [--support FOLDER]"""

import argparse
from pathlib import Path
from typing import Any

from ..checkpoints.clip import open_clip_source
from ..evl_ensemble import EVLEnsemble
from ..predict import predict
from . import common
from .features import HEADS, head_of
from .views import add_decoder, load_evl


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
    for add in (common.add_model, common.add_masks, common.add_clips):
        add(p)
    add_decoder(p.add_argument_group("EVL"))
    common.add_work(p, batch=16)
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.head is not None and args.support is None:
        raise ValueError("--head is for --support: without it the checkpoint's own classifier predicts")
    evl = load_evl(args, open_clip_source(args.checkpoint), args.num_heads)
    model: Any = common.load_model(args) if evl is None else EVLEnsemble(evl)
    classes = common.read_names(args.classes) if args.classes else None
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
        views=args.views,
        mask_ratio=args.mask_ratio,
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
