"""mmfast evaluate CLIPS --head evl: EVL's decoder, trained with a head on the supports of every episode."""

import argparse
import sys
from types import SimpleNamespace
from typing import Any

from ..checkpoints.clip import is_clip, load_pretrained_clip, open_clip_source
from ..clip import CLIP
from ..data.dataset import ClipDataset
from ..evl import EVL
from ..evl_fewshot import TEMPORAL, DecoderAdaptation, evaluate_decoded
from ..extract import PRECISIONS
from ..shards import place_in_world
from ..vit import MaskedViT
from . import common
from .features import clips_of, episodes_of
from .views import add_decoder, load_evl

Backbone = EVL | MaskedViT | CLIP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--decoder, --decoder-steps and the rest."""
    how = DecoderAdaptation()
    group = parser.add_argument_group(
        "EVL's decoder, trained on the supports of every episode (--head evl), from --decoder or from a fresh one"
    )
    add_decoder(group)
    group.add_argument("--decoder-layers", type=int, metavar="N", help="of a fresh one (default: 4, or all there are)")
    group.add_argument(
        "--decoder-temporal", nargs="*", choices=TEMPORAL, default=list(how.temporal), metavar="MODULE",
        help=f"temporal modules of a fresh one, some of {', '.join(TEMPORAL)} (default: all)",
    )  # fmt: skip
    group.add_argument("--decoder-steps", type=int, default=how.steps, help="of training (default: %(default)s)")
    group.add_argument("--decoder-lr", type=float, default=how.lr, help="the decoder's (default: %(default)s)")
    group.add_argument("--decoder-head-lr", type=float, default=how.head_lr, help="the head's (default: %(default)s)")
    group.add_argument("--decoder-dropout", type=float, default=how.dropout, help="(default: %(default)s)")
    group.add_argument(
        "--decoder-draws", type=int, default=how.draws, help="draws of masks for the supports (default: %(default)s)"
    )


def adaptation(args: argparse.Namespace) -> DecoderAdaptation:
    """What the arguments ask for."""
    return DecoderAdaptation(
        layers=args.decoder_layers,
        temporal=tuple(args.decoder_temporal),
        steps=args.decoder_steps,
        lr=args.decoder_lr,
        head_lr=args.decoder_head_lr,
        dropout=args.decoder_dropout,
        draws=args.decoder_draws,
    )


def load(args: argparse.Namespace) -> tuple[Backbone, ClipDataset]:
    """A backbone, or an EVL where there is a decoder to start from, in eval mode, and the clips as it takes them."""
    source = open_clip_source(args.checkpoint)
    model: Backbone | None = load_evl(args, source, args.num_heads)
    if isinstance(model, EVL):
        frames, *size = model.config.video_size
    elif is_clip(source):
        heads = {"vision_num_heads": args.num_heads} if args.num_heads else {}
        clip, report = load_pretrained_clip(source, **heads)
        if common.first_rank():
            sys.stderr.write(f"{args.checkpoint}: {report}\n")
        model = clip.to(common.device_of(args.device)).eval()
        frames, size = args.num_frames or 8, [clip.config.image_size] * 2
    else:
        vit = common.load_model(args)
        return vit, clips_of(args, vit)[0]
    seen: Any = SimpleNamespace(config=SimpleNamespace(num_frames=frames, frame_size=tuple(size)))
    return model, clips_of(args, seen)[0]


def score(args: argparse.Namespace, model: Backbone, clips: ClipDataset, k_shot: int) -> Any:
    """Accuracy over the episodes, those of this rank computed here."""
    labels = [r.label if r.label_name is None else r.label_name for r in clips.records]
    mine = episodes_of(args, labels, k_shot).shard(*place_in_world())
    how = adaptation(args)
    if isinstance(model, CLIP):
        how = DecoderAdaptation(**{**vars(how), "num_frames": args.num_frames})
    return evaluate_decoded(
        model, clips, mine, args.views, args.mask_ratio, args.seed, how=how, modality=args.modality,
        dtype=PRECISIONS[args.precision], progress=not args.quiet,
    ).gather()  # fmt: skip
