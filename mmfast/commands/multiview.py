"""mmfast evaluate LIST --protocol multiview --checkpoint PATH: top-1 and top-5 over crops and parts in time."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..clip import CLIP
from ..evl import EVL
from ..m2clip import M2CLIP
from ..multiview import Accuracy, Model, ViewScores, text_features, text_scale
from . import common
from .features import together
from .views import encoded, finish, lists_of, load, names_of, prompts_of, readable, view_parser

KINDS = {"class": "class head", "text": "class texts"}


def parser() -> argparse.ArgumentParser:
    """The protocol's arguments."""
    p = view_parser("multiview", "the mean of a model's scores over crops and parts in time", several=False)
    p.add_argument("--scores", nargs="+", choices=tuple(KINDS), help="by default all that the model and --labels allow")
    return p


def main(argv: list[str]) -> int:
    """Run the protocol."""
    args = parser().parse_args(argv)
    with together():
        model = load(args)
        names = names_of(args, model)
        kinds = _kinds(args, model, names)
        classes = _classes(model, names)
        clips, splits = lists_of(args, names)
        for _, labels in splits.values():
            if max(labels) >= classes:
                raise ValueError(f"label {max(labels)} stands in the data, the model has {classes} classes")
        token_ids = None  # made before hours of encoding, lest the vocabulary be refused behind them
        if "text" in kinds and names is not None and isinstance(model, (M2CLIP, CLIP)):
            token_ids = prompts_of(args, model, names)
        found, failed = encoded(args, model, clips, without_adapters=False)
        if common.first_rank():
            ((ids, labels),) = readable(splits, found).values()
            rows = []
            for kind in kinds:
                if kind == "class":
                    probabilities = found.by_class(ids)
                else:
                    assert token_ids is not None
                    assert isinstance(model, (M2CLIP, CLIP))
                    probabilities = found.by_text(ids, text_features(model, token_ids), text_scale(model))
                rows.append({"scores": kind, **asdict(Accuracy.of(probabilities, torch.tensor(labels)))})
            _say(args, found, rows)
            finish(args, rows, found, failed, {"protocol": "multiview"})
    return 1 if failed else 0


def _kinds(args: argparse.Namespace, model: Model, names: Sequence[str] | None) -> list[str]:
    able = {
        "class": not isinstance(model, CLIP) and model.config.num_classes > 0,
        "text": isinstance(model, (M2CLIP, CLIP)) and names is not None,
    }
    kinds = list(dict.fromkeys(args.scores or [kind for kind in KINDS if able[kind]]))
    if "class" in kinds and not able["class"]:
        raise ValueError(f"--scores class: this {type(model).__name__} has no class head")
    if "text" in kinds and not isinstance(model, (M2CLIP, CLIP)):
        raise ValueError(f"--scores text: {'an EVL' if isinstance(model, EVL) else 'a MaskedViT'} knows no texts")
    if not kinds or ("text" in kinds and names is None):
        raise ValueError("scores by the texts of classes need --labels, their names")
    return kinds


def _classes(model: Model, names: Sequence[str] | None) -> int:
    """How many classes are scored. ValueError where the head has others than there are names."""
    classes = len(names or ()) if isinstance(model, CLIP) else model.config.num_classes
    if names is not None and len(names) != classes:
        raise ValueError(f"--labels must name the {classes} classes of the model's head, got {len(names)} names")
    return classes


def _say(args: argparse.Namespace, found: ViewScores, rows: list[dict[str, Any]]) -> None:
    masks = f", {args.masks} masks of ratio {args.mask_ratio:g}" if args.mask_ratio else ""
    common.say(
        f"{args.crops} crops x {args.clips} parts of {found.settings['frames']} frames{masks}, {rows[0]['clips']} clips"
    )
    common.say(f"{'scores':<12} {'top-1':>9} {'top-5':>9}")
    for row in rows:
        common.say(f"{KINDS[row['scores']]:<12} {100 * row['top1']:>7.2f} % {100 * row['top5']:>7.2f} %")
