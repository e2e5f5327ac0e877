"""mmfast extract DATA --checkpoint PATH --out FOLDER"""

import argparse

from ..data.windows import cut_windows
from ..extract import extract
from ..predict import clips_for
from . import common


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = common.Parser(
        "extract",
        epilog="Under torchrun or srun every process takes its share. Killed or stopped, the same command goes on.",
    )
    p.add_argument("data", help="folder of class folders, folder of videos, manifest (.csv, .json), or annotations")
    p.add_argument("--out", required=True, metavar="FOLDER", help="where shards and index go")
    common.add_dataset(p)
    common.add_windows(p)
    common.add_stored(p)
    for add in (common.add_model, common.add_masks, common.add_clips, common.add_work):
        add(p)
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    records = common.records_of(args, (args.modality,))
    records = cut_windows(records, args.windows, args.modality)
    stride = common.stride_of(records, args.stride)
    model = common.load_model(args)
    clips = clips_for(model.config, records, args.modality, stride=stride, resize=args.resize)
    report = extract(
        model,
        clips,
        args.out,
        views=args.views,
        mask_ratio=args.mask_ratio,
        seed=args.seed,
        modality=args.modality,
        precision=args.precision,
        dtype=args.dtype,
        shard_size=args.shard_size,
        batch=args.batch,
        workers=args.workers,
        retry=args.retry,
        about=common.cut_of(args, stride),
        progress=not args.quiet,
    )
    return common.tell("extract", report, args.out)
