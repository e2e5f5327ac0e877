"""mmfast tune [--model NAME ...] [--warm | --show | --list]"""

import argparse
import sys
from itertools import product
from typing import Any

import torch

from mmfast_kernels import tables, tuned

from .. import __version__
from ..extract import PRECISIONS
from ..shards import write_aside
from ..tune import Found, Workload, tune, warm
from . import common

MODELS = ("videomae_small_patch16_224", "videomae_base_patch16_224")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = common.Parser(
        "tune",
        epilog="Used on the same GPU with the same Triton alone; kept in MMFAST_TABLES, or the user's cache folder.",
    )
    p.add_argument(
        "--model", nargs="+", default=list(MODELS), metavar="NAME", help=f"sizes (default: {' '.join(MODELS)})"
    )
    p.add_argument("--checkpoint", metavar="PATH", help="weights whose size is meant, in place of --model")
    p.add_argument("--views", type=int, nargs="+", default=[2], metavar="P", help="(default: 2)")
    p.add_argument(
        "--mask-ratio", type=float, nargs="+", default=[0.75, 0.9], metavar="RHO", help="(default: 0.75 0.9)"
    )
    p.add_argument("--batch", type=int, nargs="+", metavar="B", help="clips at once (default: what ensemble takes)")
    p.add_argument("--train", action="store_true", help="also training steps")
    p.add_argument("--precision", choices=tuple(PRECISIONS), default="bf16", help="(default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cuda or cuda:N (default: %(default)s)")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--warm", action="store_true", help="compile what these workloads launch, and time nothing")
    what.add_argument("--show", action="store_true", help="say which tables are in use")
    what.add_argument("--list", action="store_true", help="say what would be measured")
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.show:
        return _show()
    workloads = workloads_of(args)
    if args.list:
        for workload in workloads:
            common.say(str(workload))
        for op in tables.names():
            more = max((len(row.alternatives) for row in tables.shipped(op)), default=0)
            if more:
                common.say(f"{op}: up to {more + 1} configurations a case")
        return 0
    device = common.device_of(args.device)
    if device.type != "cuda" or tuned.machine() is None:
        raise ValueError(
            f"tune measures Triton kernels on a CUDA GPU, and the device is {device}; --list and --show need none"
        )
    if torch.cuda.get_device_name(device) != torch.cuda.get_device_name(0):
        raise ValueError(f"device must be of the kind of cuda:0, whose tables are used; {device} is another")
    model = None
    if args.checkpoint is not None:
        from ..vit import MaskedViT

        model = MaskedViT.from_pretrained(args.checkpoint)
    settings: dict[str, Any] = {"model": model, "progress": not args.quiet}
    dtype = PRECISIONS[args.precision] or torch.float32
    if args.warm:
        warm(workloads, dtype, device, **settings)
        return 0
    return _write(tune(workloads, dtype, device, **settings), device)


def workloads_of(args: argparse.Namespace) -> list[Workload]:
    """What is to be measured. ValueError for numbers out of range."""
    for name in ("views", "batch"):
        for value in getattr(args, name) or ():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
    for ratio in args.mask_ratio:
        if not 0 <= ratio < 1:
            raise ValueError(f"mask_ratio must lie in [0, 1), got {ratio}")
    names = args.model if args.checkpoint is None else [args.checkpoint]
    each = product(names, args.views, args.mask_ratio, args.batch or [None])
    return [Workload(name, views, ratio, batch, args.train) for name, views, ratio, batch in each]


def _write(found: Found, device: torch.device) -> int:
    folder, machine = tuned.folder(), tuned.machine()
    assert folder is not None
    assert machine is not None
    folder.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability(device)
    made = {**machine, "arch": f"sm_{major}{minor}", "torch": torch.__version__, "mmfast": __version__}
    for op, rows in found.rows.items():
        path = folder / f"{op}.json"
        new = [row["when"] for row in rows]
        kept = [row for row in tuned.read(path)["rows"] if row["when"] not in new]
        write_aside(path, common.as_json({"made": made, "rows": rows + kept}))
        for row in rows:
            first, ran = row["timed"][0], [one for one in row["timed"] if one["config"] == row["config"]]
            gain = "as shipped" if ran[0] is first else f"{first['ms'] / ran[0]['ms']:.2f} times the shipped one"
            case = ", ".join(f"{key} {value}" for key, value in row["when"].items())
            common.say(f"{op} ({case}): {gain}, {len(row['timed'])} timed")
    for op, why in found.dropped.items():
        sys.stderr.write(f"mmfast tune: {op} left as shipped: {why}\n")
    measured = sum(len(rows) for rows in found.rows.values())
    common.say(f"{measured} cases measured, {found.won} better than shipped: {folder}")
    return 0


def _show() -> int:
    folder = tuned.folder()
    common.say(f"measured tables: {'none without a GPU and Triton' if folder is None else folder}")
    for op in tables.names():
        own = len(tuned.rows(op))
        common.say(f"{op}: {len(tables.shipped(op))} rows shipped, {own} cases measured here")
    return 0
