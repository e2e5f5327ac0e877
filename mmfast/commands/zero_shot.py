"""mmfast evaluate LISTS... --protocol zero-shot --checkpoint PATH --labels FILE: classes known by their texts alone."""

import argparse
from dataclasses import asdict
from statistics import pstdev
from typing import Any

from ..clip import CLIP
from ..m2clip import M2CLIP
from ..multiview import ZeroShot, zero_shot
from ..vit import MaskedViT
from . import common
from .features import together
from .views import encoded, finish, lists_of, load, prompts_of, readable, view_parser


def parser() -> argparse.ArgumentParser:
    """The protocol's arguments."""
    about = "the accuracy on every list and their mean, with the adapters of M2-CLIP on and off"
    return view_parser("zero-shot", about, several=True)


def main(argv: list[str]) -> int:
    """Run the protocol."""
    args = parser().parse_args(argv)
    with together():
        model = load(args)
        if not isinstance(model, (M2CLIP, CLIP)):
            kind = "a MaskedViT" if isinstance(model, MaskedViT) else "an EVL"
            raise ValueError(f"zero-shot needs a model that knows texts, a CLIP or an M2CLIP, got {kind}")
        if args.labels is None:
            raise ValueError("zero-shot needs --labels, the names of the classes")
        names = common.read_names(args.labels)
        token_ids = prompts_of(args, model, names)
        clips, splits = lists_of(args, names)
        found, failed = encoded(args, model, clips, without_adapters=hasattr(model, "enable_adapters"))
        if common.first_rank():
            rows = [_row(way) for way in zero_shot(model, found, readable(splits, found), token_ids)]
            about = {"protocol": "zero-shot", "classes": names, "prompts": len(token_ids)}
            _say(rows, list(splits), len(names), len(token_ids))
            finish(args, rows, found, failed, about)
    return 1 if failed else 0


def _row(way: ZeroShot) -> dict[str, Any]:
    tops = [accuracy.top1 for accuracy in way.splits.values()]
    mean = {**asdict(way.mean), "top1_std": pstdev(tops)}
    splits = {name: asdict(accuracy) for name, accuracy in way.splits.items()}
    return {"vision_adapters": way.vision_adapters, "text_adapters": way.text_adapters, "mean": mean, "splits": splits}


def _say(rows: list[dict[str, Any]], splits: list[str], classes: int, prompts: int) -> None:
    common.say(f"zero-shot, {classes} classes, {prompts} prompts a class; top-1 on every split, top-1 and top-5 of all")
    widths = {name: max(len(name), 9) for name in splits}
    heads = " ".join(f"{name:>{width}}" for name, width in widths.items())
    common.say(f"{'vision':<7} {'text':<7} {heads} {'mean':>9} {'std':>6} {'top-5':>9}")
    for row in rows:
        tower = [{True: "adapted", False: "plain", None: "CLIP"}[row[f"{t}_adapters"]] for t in ("vision", "text")]
        each = " ".join(f"{100 * row['splits'][name]['top1']:>{width - 2}.2f} %" for name, width in widths.items())
        mean = row["mean"]
        common.say(
            f"{tower[0]:<7} {tower[1]:<7} {each} {100 * mean['top1']:>7.2f} % {100 * mean['top1_std']:>6.2f} "
            f"{100 * mean['top5']:>7.2f} %"
        )
