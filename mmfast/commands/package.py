"""mmfast package OUT --checkpoint PATH [--views P] [--mask-ratio R] [--zero-shot NAMES]"""

import argparse
from pathlib import Path

import torch

from ..clip import CLIP
from ..extract import PRECISIONS, QUANTIZED
from ..m2clip import M2CLIP
from ..multiview import Model
from ..package import KINDS, package_ensemble, package_zero_shot
from ..vit import MaskedViT
from . import common
from .views import add_clip, add_decoder, load, names_of, prompts_of


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = common.Parser("package")
    p.add_argument("out", type=Path, help="file to write, .pt2")
    common.add_model(p)
    p.add_argument("--views", type=int, help="masked views a clip (default: 2, or 1 with --zero-shot)")
    p.add_argument("--mask-ratio", type=float, help="of the cells (default: 0.75, or 0 with --zero-shot)")
    p.add_argument("--keep", type=int, metavar="CELLS", help="cells that stay, in place of --mask-ratio")
    p.add_argument("--batch", type=int, default=1, help="most clips of a call (default: %(default)s)")
    p.add_argument("--normalised", action="store_true", help="take normalised fp32 clips, not raw uint8 ones")
    p.add_argument("--labels", metavar="FILE", help="names of the classes, kept in the package; those beside the model")
    p.add_argument(
        "--kind",
        choices=KINDS,
        default=KINDS[0],
        help="aoti: compiled for this kind of machine (default); export: a graph",
    )
    p.add_argument("--force", action="store_true", help="write over what is there")
    add_clip(p, "labels")
    add_decoder(p.add_argument_group("EVL"))
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.out.exists() and not args.force:
        raise ValueError(f"out {str(args.out)!r} is there already; --force writes over it")
    if args.zero_shot and args.labels is None:
        raise ValueError("--zero-shot needs --labels, the names of the classes")
    model = load(args)
    if args.precision in QUANTIZED and not isinstance(model, MaskedViT):
        raise ValueError(f"--precision {args.precision} is of a masked ViT, got {type(model).__name__}")
    precision = PRECISIONS.get(args.precision)  # of a masked ViT in int8 or fp8, package_ensemble refuses it
    model = model.to(precision) if precision is not None else model
    args.out.parent.mkdir(parents=True, exist_ok=True)
    _write(args, model)
    load_it = "torch.export.load(path).module()" if args.kind == "export" else "torch._inductor.aoti_load_package(path)"
    common.say(f"written to {args.out}; load it by {load_it}, call it with (video, clip_ids, seed)")
    return 0


def _write(args: argparse.Namespace, model: Model) -> None:
    given = {"views": args.views, "mask_ratio": args.mask_ratio, "keep": args.keep}
    settings = {name: value for name, value in given.items() if value is not None}
    settings |= {"batch": args.batch, "kind": args.kind, "pixels": torch.float32 if args.normalised else torch.uint8}
    names = names_of(args, model)
    if not args.zero_shot:
        if isinstance(model, CLIP):
            raise ValueError("a CLIP has no classes of its own: --zero-shot and --labels say them")
        package_ensemble(model, args.out, classes=names, **settings)
        return
    if not isinstance(model, CLIP | M2CLIP):
        raise ValueError(f"--zero-shot needs a model that knows texts, a CLIP or an M2CLIP, got {type(model).__name__}")
    assert names is not None
    tokens = prompts_of(args, model, names)
    package_zero_shot(model, args.out, tokens, num_frames=args.num_frames, classes=names, **settings)
