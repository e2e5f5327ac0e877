"""mmfast package OUT --checkpoint PATH [--views P] [--mask-ratio R]"""

import argparse
from pathlib import Path

import torch

from ..extract import PRECISIONS
from ..package import KINDS, package_ensemble
from . import common


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = common.Parser("package")
    p.add_argument("out", type=Path, help="file to write, .pt2")
    common.add_model(p)
    p.add_argument("--views", type=int, default=2, help="masked views a clip (default: %(default)s)")
    p.add_argument("--mask-ratio", type=float, default=0.75, help="of the cells (default: %(default)s)")
    p.add_argument("--keep", type=int, metavar="CELLS", help="cells that stay, in place of --mask-ratio")
    p.add_argument("--batch", type=int, default=1, help="most clips of a call (default: %(default)s)")
    p.add_argument("--normalised", action="store_true", help="take normalised fp32 clips, not raw uint8 ones")
    p.add_argument(
        "--kind",
        choices=KINDS,
        default=KINDS[0],
        help="aoti: compiled for this kind of machine (default); export: a graph",
    )
    p.add_argument("--force", action="store_true", help="write over what is there")
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.out.exists() and not args.force:
        raise ValueError(f"out {str(args.out)!r} is there already; --force writes over it")
    model = common.load_model(args)
    precision = PRECISIONS.get(args.precision)  # int8 is refused by package_ensemble
    model = model.to(precision) if precision is not None else model
    args.out.parent.mkdir(parents=True, exist_ok=True)
    package_ensemble(
        model,
        args.out,
        views=args.views,
        mask_ratio=args.mask_ratio,
        keep=args.keep,
        batch=args.batch,
        pixels=torch.float32 if args.normalised else torch.uint8,
        kind=args.kind,
    )
    load = "torch.export.load(path).module()" if args.kind == "export" else "torch._inductor.aoti_load_package(path)"
    common.say(f"written to {args.out}; load it by {load}, call it with (video, clip_ids, seed)")
    return 0
