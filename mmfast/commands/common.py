"""What the commands share: arguments, models, collections, and what ends a command with which exit code.

0  done          1  a fault in the data or on the disk          2  wrong arguments          130  stopped by Ctrl-C or SIGTERM
"""

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..checkpoints import load_pretrained_vit
from ..data.annotations import DATASETS, read_annotations
from ..data.frames import CHANNELS
from ..data.manifest import folder_manifest, read_manifest
from ..data.records import AnnotationSet, ClipRecord
from ..data.video_lists import read_class_names
from ..extract import PRECISIONS, QUANTIZED, STORED, Report
from ..predict import MANIFESTS, video_records
from ..shards import place_in_world
from ..vit import MaskedViT
from . import SUMMARIES

STOPPED = 130


class Parser(argparse.ArgumentParser):
    """One clean help, and one line for a wrong argument."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(f"mmfast {name}", description=SUMMARIES[name], allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def guarded(name: str, main: Callable[[list[str]], int], argv: list[str]) -> int:
    """main(argv), with one clear line in place of a traceback for whatever a user can put right."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)  # what a scheduler sends ahead of SIGKILL
    except ValueError:  # not the main thread: whoever runs this there handles signals
        before = None
    try:
        return main(argv)
    except SystemExit as end:  # argparse: its message has been written
        return end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:
        complain(name, "stopped; the same command goes on from here")
        return STOPPED
    except ImportError as error:
        complain(name, str(error))
        return 2
    except (FileNotFoundError, ValueError, TypeError) as error:
        complain(name, str(error))
        return 2
    except OSError as error:
        complain(name, f"{error.filename or ''}{': ' * bool(error.filename)}{error.strerror or error}")
        return 1
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def say(text: str) -> None:
    """Write a line to stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def complain(name: str, text: str) -> None:
    """Write a line to stderr, under the command's name."""
    rank, world = place_in_world()
    sys.stderr.write(f"mmfast {name}{f' [rank {rank}]' * (world > 1)}: {text}\n")


def first_rank() -> bool:
    """Whether this process speaks for all."""
    return place_in_world()[0] == 0


# -- arguments ---------------------------------------------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--checkpoint and what goes with it."""
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", required=required, metavar="PATH", help="file or folder, of any known dialect")
    group.add_argument("--branch", help="of an MM-CDFSL checkpoint; by default the student of a distillation")
    group.add_argument("--classifier", metavar="HEAD", help="action, verb or noun, of an MM-CDFSL checkpoint")
    group.add_argument("--num-heads", type=int, help="attention heads, where the file cannot tell")
    group.add_argument("--num-frames", type=int, help="frames of a clip")
    group.add_argument("--img-size", type=int, help="pixels a side")
    group.add_argument("--norm-eps", type=float, help="eps of the LayerNorms")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    group.add_argument(
        "--precision",
        choices=(*PRECISIONS, *QUANTIZED),
        default="fp32",
        help="int8 (on the CPU) and fp8 (on a GPU): of a masked ViT, not for training (default: %(default)s)",
    )


def load_model(args: argparse.Namespace) -> MaskedViT:
    """The model of add_model's arguments in eval mode; its load report goes to stderr."""
    size = {"num_heads": args.num_heads, "num_frames": args.num_frames, "img_size": args.img_size}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, report = load_pretrained_vit(
            args.checkpoint, branch=args.branch, head=args.classifier, norm_eps=args.norm_eps, **size
        )
    if first_rank():
        sys.stderr.write(f"{args.checkpoint}: {report}\n" + "".join(f"{warning.message}\n" for warning in caught))
    model = model.to(device_of(args.device)).eval()
    if args.precision in QUANTIZED:
        return model.quantize_int8() if args.precision == "int8" else model.quantize_fp8()
    return model


def device_of(name: str) -> torch.device:
    """auto takes the GPU of this process where there is one. ValueError for a device that is not there."""
    if name == "auto":
        name = f"cuda:{_local_rank() % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def add_masks(parser: argparse.ArgumentParser) -> None:
    """--views, --mask-ratio, --seed."""
    group = parser.add_argument_group("masks")
    group.add_argument("--views", type=int, default=2, metavar="P", help="masked views a clip (default: %(default)s)")
    group.add_argument(
        "--mask-ratio", type=float, default=0.75, metavar="RHO", help="share of tubes removed (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=0, help="of the masks (default: %(default)s)")


def add_clips(parser: argparse.ArgumentParser) -> None:
    """How clips are cut."""
    group = parser.add_argument_group("clips")
    group.add_argument(
        "--modality", choices=("rgb", "flow", "pose"), default="rgb", help="what the model sees (default: %(default)s)"
    )
    group.add_argument("--stride", type=int, help="frames between two samples; by default spread over the clip")
    group.add_argument(
        "--resize", choices=("squash", "crop"), default="squash", help="to a square (default: %(default)s)"
    )


def add_work(parser: argparse.ArgumentParser, batch: int = 32) -> None:
    """--batch, --workers, --shard-size, --retry, --quiet."""
    group = parser.add_argument_group("work")
    group.add_argument("--batch", type=int, default=batch, help="clips at a time (default: %(default)s)")
    group.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that decode (default: %(default)s)"
    )
    group.add_argument("--shard-size", type=int, default=4096, help="clips a shard file (default: %(default)s)")
    group.add_argument("--retry", action="store_true", help="try clips again that could not be read")
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """--dataset, --root, --template and --clip-end, which say how annotations are read."""
    parser.add_argument("--dataset", choices=tuple(DATASETS), help="read DATA as this data set's annotation file")
    parser.add_argument("--root", help="folder that the paths of annotations or a manifest start from")
    parser.add_argument(
        "--template",
        action="append",
        default=[],
        metavar="MODALITY=PATH",
        help="where annotated frames lie below --root, such as rgb=frames/{video_id}/{frame:06d}.jpg; else as published",
    )
    parser.add_argument(
        "--clip-end",
        choices=("video", "annotated"),
        default="video",
        help="where annotated clips end: with the video, as published, or where they are annotated to (default: video)",
    )


def add_windows(parser: argparse.ArgumentParser) -> None:
    """--windows, of the commands whose clips are to be the samples of classes."""
    parser.add_argument(
        "--windows",
        type=int,
        default=1,
        metavar="W",
        help="cut every clip into W that share no frame; videos without labels are then a class each (default: 1)",
    )


def add_stored(parser: argparse.ArgumentParser) -> None:
    """--dtype of stored features."""
    parser.add_argument(
        "--dtype", choices=tuple(STORED), default="float32", help="features are stored in (default: %(default)s)"
    )


def records_of(args: argparse.Namespace, modalities: Sequence[str] = ("rgb",)) -> Sequence[ClipRecord]:
    """The clips of add_dataset's arguments: of annotations, a manifest, class folders, or a folder of videos."""
    path = Path(args.data)
    if args.dataset is not None:
        options: dict[str, Any] = {"modalities": tuple(modalities), "clip_end": args.clip_end}
        if args.template:
            options["templates"] = dict(_template(text) for text in args.template)
        return read_annotations(args.dataset, path, args.root or "", **options)
    for name, given in (("template", args.template), ("clip-end", args.clip_end != "video")):
        if given:
            raise ValueError(f"--{name} is for annotations, which --dataset names")
    if path.suffix.lower() in MANIFESTS:
        return read_manifest(path, args.root, check_files=False)
    if args.root is not None:
        raise ValueError("root is for annotations and manifests; DATA is neither")
    if path.is_dir() and _has_class_folders(path):
        return folder_manifest(path)
    return video_records(path)


def _template(text: str) -> tuple[str, str]:
    modality, equals, path = text.partition("=")
    if not equals or modality not in CHANNELS:
        raise ValueError(f"template must be MODALITY=PATH, MODALITY one of {', '.join(CHANNELS)}, got {text!r}")
    return modality, path


def _has_class_folders(folder: Path) -> bool:
    try:
        folder_manifest(folder)
    except ValueError:
        return False
    return True


def stride_of(records: Sequence[ClipRecord], given: int | None) -> int | None:
    """The stride asked for, or the annotations' own."""
    return given if given is not None or not isinstance(records, AnnotationSet) else records.stride


def cut_of(args: argparse.Namespace, stride: int | None) -> dict[str, Any]:
    """How clips were cut, as features remember it."""
    about = {"stride": stride, "resize": args.resize}
    return about if args.windows == 1 else about | {"windows": args.windows}


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank."""
    return [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def read_names(path: str) -> list[str]:
    """Names of classes: a CSV table `id,name`, a JSON list, or one a line."""
    if path.endswith(".csv"):
        return read_class_names(path)
    if path.endswith(".json"):
        names = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(names, list):
            raise ValueError(f"{path}: must hold a JSON list of names, got {type(names).__name__}")
        return [str(name) for name in names]
    return read_lines(path)


def names_beside(checkpoint: Path, count: int) -> list[str] | None:
    """The names of `count` classes beside the weights: labels.csv, as fit-clip leaves it, or Hugging Face's config.json."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if (folder / "labels.csv").is_file():
        names = read_class_names(folder / "labels.csv")
        return names if len(names) == count else None
    if not (folder / "config.json").is_file():
        return None
    given = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label") or {}
    if len(given) != count or all(str(name).startswith("LABEL_") for name in given.values()):
        return None
    return [given.get(str(k), str(k)) for k in range(count)]


# -- results -----------------------------------------------------------------------------------------------------------


def tell(name: str, report: Report, where: str) -> int:
    """Say what became of the clips. 1 where some could not be read."""
    complain(name, f"{where}: {report}")
    return 1 if report.failed else 0


def as_json(value: Any) -> bytes:
    """Indented JSON text."""
    return (json.dumps(value, indent=2) + "\n").encode()
