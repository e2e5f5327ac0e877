"""What the protocols of labelled videos share: arguments, models, classes, clips, and what is computed of pixels."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.clip import is_clip, load_pretrained_clip, open_clip_source
from ..checkpoints.container import Source
from ..checkpoints.evl import is_evl, load_pretrained_evl
from ..checkpoints.m2clip import is_m2clip, load_pretrained_m2clip
from ..checkpoints.native import FORMAT
from ..clip import CLIP
from ..data.captions import TEMPLATE, class_prompts
from ..data.manifest import folder_manifest, read_manifest
from ..data.records import ClipRecord
from ..data.tokenizer import ClipTokenizer
from ..data.video_lists import FRAME, read_video_list
from ..data.views import ViewClips
from ..evl import EVL
from ..m2clip import M2CLIP
from ..multiview import Model, ViewScores, encode_views
from ..predict import MANIFESTS
from ..shards import write_aside
from . import common

Splits = dict[str, tuple[list[int], list[int]]]  # name -> clip ids, and their class numbers


def view_parser(protocol: str, about: str, several: bool) -> argparse.ArgumentParser:
    """The arguments of a protocol.   several: lists are splits of one collection."""
    p = common.Parser(
        "evaluate",
        epilog=f"{protocol}: {about}. Under torchrun clips are shared out; killed, the same command goes on.",
    )
    what = "list of videos (`path label` or `path n label`), folder of class folders, or manifest"
    p.add_argument("data", nargs="+" if several else 1, help=f"{what}; several are splits" if several else what)
    p.add_argument("--protocol", choices=("episodes", "multiview", "zero-shot"), help=f"{protocol} has these options")
    p.add_argument("--out", default="evaluation.json", metavar="FILE", help="JSON of the table (default: %(default)s)")
    p.add_argument("--features", metavar="FOLDER", help="where what was computed is kept (default: OUT.views)")
    group = p.add_argument_group("videos")
    group.add_argument("--root", help="folder that the paths of a list or a manifest start from")
    group.add_argument(
        "--columns", choices=("path label", "path n label", "path"), help="of a list; found unless given"
    )
    group.add_argument("--first-label", type=int, default=0, help="a list's number of the first class (default: 0)")
    group.add_argument("--frame-name", default=FRAME, help="of a list's folders of frames (default: %(default)s)")
    group = p.add_argument_group("classes")
    group.add_argument("--labels", metavar="FILE", help="names: CSV `id,name`, one a line, or a JSON list")
    group.add_argument("--vocabulary", metavar="PATH", help="CLIP's merges file or a tokenizer's folder")
    group.add_argument(
        "--prompt", action="append", metavar="TEXT", help=f"with {{}} for the name; several are averaged ({TEMPLATE!r})"
    )
    group.add_argument("--prompts", metavar="FILE", help="prompts, one a line")
    group = p.add_argument_group("views")
    group.add_argument("--crops", type=int, default=1, choices=(1, 3, 4), help="a part in time (default: 1)")
    group.add_argument("--clips", type=int, default=1, metavar="T", help="parts in time (default: 1)")
    group.add_argument("--sampling", choices=("dense", "uniform"), default="dense", help="(default: %(default)s)")
    group.add_argument("--stride", type=int, default=16, help="of dense sampling (default: %(default)s)")
    group.add_argument("--masks", type=int, default=1, metavar="P", help="tube-masked looks at a view (default: 1)")
    group.add_argument("--mask-ratio", type=float, default=0.0, metavar="RHO", help="of tubes removed (default: 0)")
    group.add_argument("--seed", type=int, default=0, help="of the masks (default: %(default)s)")
    common.add_model(p)
    group = p.add_argument_group("CLIP and M2-CLIP")
    group.add_argument("--adapters", metavar="FILE", help="M2-CLIP's adapters on the CLIP of --checkpoint")
    group.add_argument("--vision-num-heads", type=int, help="where the file cannot tell")
    group.add_argument("--text-num-heads", type=int, help="where the file cannot tell")
    group = p.add_argument_group("EVL")
    group.add_argument("--decoder", metavar="FILE", help="EVL's decoder and head on the backbone of --checkpoint")
    group.add_argument(
        "--interpolate",
        action="store_true",
        help="resize its positions and tables to --num-frames and the backbone's grid",
    )
    common.add_work(p, batch=8)
    return p


def add_clip(parser: argparse.ArgumentParser, names: str) -> None:
    """What a CLIP or M2-CLIP is loaded and told its classes with.   names: the option that has the classes' names."""
    group = parser.add_argument_group("CLIP and M2-CLIP")
    group.add_argument("--zero-shot", action="store_true", help=f"know the classes of --{names} by their texts")
    group.add_argument("--adapters", metavar="FILE", help="M2-CLIP's adapters on the CLIP of --checkpoint")
    group.add_argument("--vocabulary", metavar="PATH", help="CLIP's merges file or a tokenizer's folder")
    group.add_argument(
        "--prompt", action="append", metavar="TEXT", help=f"with {{}} for the name; several are averaged ({TEMPLATE!r})"
    )
    group.add_argument("--prompts", metavar="FILE", help="prompts, one a line")
    group.add_argument("--vision-num-heads", type=int, help="where the file cannot tell")
    group.add_argument("--text-num-heads", type=int, help="where the file cannot tell")


def add_decoder(group: Any) -> None:
    """--decoder and --interpolate, of load_evl."""
    group.add_argument("--decoder", metavar="FILE", help="EVL's decoder, on the backbone of --checkpoint")
    group.add_argument(
        "--interpolate",
        action="store_true",
        help="resize its positions and tables to --num-frames and the backbone's grid",
    )


# -- model, classes, clips ---------------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> Model:
    """A classifier, an EVL, an M2CLIP or a CLIP, in eval mode; its load report goes to stderr."""
    source = open_clip_source(args.checkpoint)
    heads = {"vision_num_heads": args.vision_num_heads, "text_num_heads": args.text_num_heads}
    if args.adapters is not None and (args.decoder is not None or is_evl(source)):
        raise ValueError("--adapters is of an M2CLIP; an EVL has --decoder")
    evl = load_evl(args, source, args.vision_num_heads or args.num_heads)
    model: Model
    if evl is not None:
        return evl
    if args.adapters is not None or is_m2clip(source):
        model, report = load_pretrained_m2clip(source, args.adapters, num_frames=args.num_frames, **heads)
    elif is_clip(source):
        model, report = load_pretrained_clip(source, **{name: n for name, n in heads.items() if n is not None})
    else:
        return common.load_model(args)
    if common.first_rank():
        sys.stderr.write(f"{args.checkpoint}: {report}\n")
    return model.to(common.device_of(args.device)).eval()


def load_evl(args: argparse.Namespace, source: Source, num_heads: int | None = None) -> EVL | None:
    """The EVL of --checkpoint, or --decoder on it as the backbone, as `load` gives models; None where there is no decoder.

    source: --checkpoint, opened. num_heads: of a backbone that cannot tell.
    """
    own = is_evl(source)
    if not own and args.decoder is None:
        if args.interpolate:
            raise ValueError("--interpolate is of an EVL, and there is no --decoder")
        return None
    if own and (source.config or {}).get("format") != FORMAT:
        raise ValueError(
            f"{args.checkpoint}: is EVL's decoder alone; give it as --decoder, its backbone as --checkpoint"
        )
    if own and args.decoder is not None:
        raise ValueError(f"{args.checkpoint}: is an EVL with a decoder; --decoder goes on a CLIP or a MaskedViT")
    how: dict[str, Any] = dict(interpolate=args.interpolate, num_frames=args.num_frames)
    given = (source,) if own else (args.decoder, source)
    model, report = load_pretrained_evl(*given, num_heads=None if own else num_heads, **how)
    if common.first_rank():
        where = args.checkpoint if own else f"{args.decoder} on {args.checkpoint}"
        sys.stderr.write(f"{where}: {report}\n")
    return model.to(common.device_of(args.device)).eval()


def names_of(args: argparse.Namespace, model: Model) -> list[str] | None:
    """Names of the classes: of --labels, or those that lie beside the checkpoint."""
    if args.labels is not None:
        return common.read_names(args.labels)
    if isinstance(model, CLIP):
        return None
    return common.names_beside(Path(args.checkpoint), model.config.num_classes)


def labelled(args: argparse.Namespace, path: str, names: Sequence[str] | None) -> list[ClipRecord]:
    """The clips of a list, manifest or folder of class folders, each with the number of its class.

    Raises ValueError for a clip without a class, or of a class that has no name.
    """
    by_list = args.columns is not None or not (Path(path).is_dir() or Path(path).suffix.lower() in MANIFESTS)
    if by_list:
        found = read_video_list(
            path, args.root or "", names=names or (), columns=args.columns, first_label=args.first_label,
            template=args.frame_name,
        )  # fmt: skip
        if args.columns != "path":
            return found.records
        called = [Path(record.name).parent.name for record in found.records]
    else:
        found = folder_manifest(path) if Path(path).is_dir() else read_manifest(path, args.root, check_files=False)
        called = [record.label_name or "" for record in found.records]
    if names is None:
        raise ValueError(f"{path}: its classes have names; give --labels, which says the number of each")
    number = {_key(name): i for i, name in enumerate(names)}
    for record, name in zip(found.records, called, strict=True):
        if _key(name) not in number:
            what = f"is of class {name!r}, which --labels does not name" if name else "has no class"
            raise ValueError(f"{path}: {record.name} {what}")
    return [replace(r, label=number[_key(name)]) for r, name in zip(found.records, called, strict=True)]


def lists_of(args: argparse.Namespace, names: Sequence[str] | None) -> tuple[list[ClipRecord], Splits]:
    """All clips of DATA, and of every list of it the numbers and classes of its clips."""
    stems = [Path(path).stem for path in args.data]
    lists = {
        stem if stems.count(stem) == 1 else path: labelled(args, path, names)
        for path, stem in zip(args.data, stems, strict=True)
    }
    return joined(lists)


def joined(lists: Mapping[str, Sequence[ClipRecord]]) -> tuple[list[ClipRecord], Splits]:
    """All clips of some lists, each once, under numbers from 0 on; and of every list the numbers and classes of its clips."""
    clips: dict[tuple[str, int, int | None], ClipRecord] = {}
    splits: Splits = {}
    for name, records in lists.items():
        ids, labels = splits[name] = [], []
        for record in records:
            where = (os.fspath(record.sources["rgb"]), record.start, record.stop)
            clip = clips.setdefault(where, replace(record, clip_id=len(clips)))
            ids.append(clip.clip_id)
            assert record.label is not None
            labels.append(record.label)
    return list(clips.values()), splits


def prompts_of(args: argparse.Namespace, model: M2CLIP | CLIP, names: Sequence[str]) -> Tensor:
    """Token ids of the classes' prompts, [R, K, context]. ValueError for a vocabulary that is not the model's."""
    given = list(args.prompt or [])
    if args.prompts is not None:
        given += common.read_lines(args.prompts)
    tokenizer = ClipTokenizer.load(args.vocabulary)
    size = (model.clip.config if isinstance(model, M2CLIP) else model.config).vocab_size
    if len(tokenizer) != size:
        raise ValueError(f"vocabulary must be that of the CLIP, which has {size} tokens, got one of {len(tokenizer)}")
    return class_prompts(tokenizer, names, given or [TEMPLATE])


def encoded(
    args: argparse.Namespace, model: Model, clips: Sequence[ClipRecord], without_adapters: bool
) -> tuple[ViewScores, dict[int, tuple[str, str]]]:
    """What a model finds in the views of all clips, each rank encoding its share, and the clips that could not be read."""
    dataset = ViewClips(
        clips,
        num_frames=_frames_of(args, model),
        stride=None if args.sampling == "uniform" else args.stride,
        size=_size_of(model),
        clips=args.clips,
        crops=args.crops,
    )
    folder = Path(args.features or f"{args.out}.views")
    encode_views(
        model, dataset, folder, without_adapters=without_adapters, masks=args.masks, mask_ratio=args.mask_ratio,
        seed=args.seed, precision=args.precision, shard_size=args.shard_size, batch=args.batch, workers=args.workers,
        retry=args.retry, progress=not args.quiet,
    )  # fmt: skip
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    found = ViewScores(folder)
    return found, {clip.clip_id: found.failed[clip.clip_id] for clip in clips if clip.clip_id in found.failed}


def readable(splits: Splits, found: ViewScores) -> Splits:
    """The splits without the clips that could not be read. ValueError for a split without any other."""
    kept: Splits = {}
    for name, (ids, labels) in splits.items():
        pairs = [(i, label) for i, label in zip(ids, labels, strict=True) if i in found]
        if not pairs:
            raise ValueError(f"{name}: none of its {len(ids)} clips could be read")
        kept[name] = [i for i, _ in pairs], [label for _, label in pairs]
    return kept


def finish(
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
    found: ViewScores,
    failed: Mapping[int, tuple[str, str]],
    about: Mapping[str, Any],
) -> None:
    """Write the JSON, and say what could not be read."""
    listed = [{"clip": name, "reason": reason} for name, reason in failed.values()]
    settings = {"data": args.data, **about, "encoding": found.settings}
    write_aside(Path(args.out), common.as_json({"settings": settings, "results": rows, "failed": listed}))
    if failed:
        name, reason = next(iter(failed.values()))
        common.complain("evaluate", f"{len(failed)} clips could not be read and took no part; {name}: {reason}")


# -- inside ------------------------------------------------------------------------------------------------------------


def _key(name: str) -> str:
    """A name as folders and tables may write it alike: ApplyEyeMakeup, apply_eye_makeup, Apply Eye Makeup."""
    return "".join(c for c in name.lower() if c.isalnum())


def _frames_of(args: argparse.Namespace, model: Model) -> int:
    if isinstance(model, CLIP):
        return 8 if args.num_frames is None else args.num_frames
    if isinstance(model, EVL):
        return model.config.video_size[0]
    return model.config.num_frames


def _size_of(model: Model) -> int:
    if isinstance(model, (M2CLIP, CLIP)):
        return (model.clip if isinstance(model, M2CLIP) else model).config.image_size
    height, width = model.config.video_size[1:] if isinstance(model, EVL) else model.config.frame_size
    if height != width:
        raise ValueError(f"views are square, the model takes frames of {height} x {width}")
    return height
