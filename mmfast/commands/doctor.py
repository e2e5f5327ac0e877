"""mmfast doctor DATA [--dataset epic --root FOLDER] [--decode]"""

import argparse
from pathlib import Path

from ..data.doctor import check_records
from ..shards import write_aside
from . import common


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = common.Parser("doctor", epilog="Exit code 0: nothing is wrong; 1: some clips have faults.")
    p.add_argument("data", help="annotations, manifest (.csv, .json), folder of class folders, or folder of videos")
    common.add_dataset(p)
    p.add_argument("--modalities", nargs="+", metavar="M", help="rgb, flow, pose; by default all that DATA names")
    p.add_argument("--num-frames", type=int, default=16, help="frames of a clip (default: %(default)s)")
    p.add_argument("--stride", type=int, help="frames between two samples; by default the annotations' own")
    p.add_argument("--decode", action="store_true", help="open and decode the files too")
    p.add_argument("--workers", type=int, default=8, help="threads (default: %(default)s)")
    p.add_argument("--examples", type=int, default=3, help="clips named a kind of fault (default: %(default)s)")
    p.add_argument("--json", metavar="FILE", help="write the report as JSON too")
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    records = common.records_of(args, args.modalities or ("rgb",))
    report = check_records(
        records,
        args.modalities,
        num_frames=args.num_frames,
        stride=args.stride,
        decode=args.decode,
        workers=args.workers,
        examples=args.examples,
    )
    common.say(str(report))
    if args.json:
        write_aside(Path(args.json), common.as_json(report.as_dict()))
    return report.exit_status
