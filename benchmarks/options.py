"""Command line of ensemble_masked.py, and the checks that the others share."""

import argparse
from collections.abc import Callable, Sequence

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked. Wrong ones end the program with code 2 and one line."""
    parser = argparse.ArgumentParser(
        prog="ensemble_masked.py",
        description="Ensemble masked inference: mmfast against the published path and strong plain torch, checked. "
        "Exit codes: 0 done; 1 some videos could not be read; 2 nothing to work on; 3 results differ, nothing timed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--video", nargs="+", metavar="PATH", help="video files or folders; none: clips are drawn, encoded and decoded")
    add(
        "--checkpoint",
        metavar="FILE",
        help="weights in any dialect that mmfast reads; none: random weights from --seed",
    )
    add("--model", default="videomae_small_patch16_224", help="architecture when no checkpoint is given")
    add("--num-classes", type=at_least(1), default=204, help="classes when no checkpoint is given")
    add("--views", nargs="+", type=at_least(1), default=[2], metavar="P", help="masked views of a clip")
    add("--mask-ratio", nargs="+", type=ratio, default=[0.75, 0.9], metavar="R", help="share of tubes removed")
    add("--keep", nargs="+", type=at_least(1), metavar="K", help="tubes kept, exactly; instead of --mask-ratio")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--dtype", choices=sorted(DTYPES), help="default: bf16 on CUDA, fp32 on CPU")
    add("--clips", type=at_least(1), metavar="N", help="clips in the timed batch; default: 4 on CPU, 16 on CUDA")
    add(
        "--rounds",
        type=at_least(2),
        help="samples of each rung; default: as many as 12 s a case allow (20 s on CUDA), 2 to 25",
    )
    add("--seed", type=at_least(0), default=0, help="of masks, weights and drawn clips")
    add("--threads", type=at_least(1), help="CPU threads; default: torch's")
    add("--hf", action="store_true", help="also time transformers' VideoMAE, when installed")
    add("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes on a GPU")
    add("--json", metavar="FILE", help="write everything, with all probabilities")
    add("--plot", metavar="FILE", help="draw milliseconds against views and ratio (needs matplotlib)")
    add(
        "--profile",
        metavar="FILE",
        nargs="?",
        const="ensemble_masked.trace.json",
        help="after timing, run mmfast once more with NVTX ranges on and write a torch profiler trace",
    )
    options = parser.parse_args(arguments)
    options.device = device = device_of(parser, options.device)
    options.dtype = DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    options.clips = options.clips or (16 if device.type == "cuda" else 4)
    return options


def device_of(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device that --device names, if it is there; else the program ends with one line."""
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device must be cpu or cuda[:index], got {name!r}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda[:index], got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def at_least(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return whole


def ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1), got {value}")
    return value
