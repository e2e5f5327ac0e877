"""mmfast convert CHECKPOINT OUT [--to DIALECT]"""

import argparse
import io
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..checkpoints import export_config, export_mae_state, export_preprocessor, export_state, load_pretrained
from ..checkpoints.clip import open_clip_source
from ..checkpoints.evl import is_evl
from ..checkpoints.export import EXPORTS, MAE_EXPORTS
from ..config import MAEConfig, ViTConfig
from ..evl import EVL
from ..shards import write_aside
from . import common

NATIVE, DECODER = "mmfast", "evl"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = common.Parser("convert")
    p.add_argument("checkpoint", help="file or folder, of any known dialect")
    p.add_argument(
        "out",
        help="a folder for mmfast and hf_*; else a file: .safetensors, or anything else for torch.save's format",
    )
    p.add_argument(
        "--to",
        default=NATIVE,
        choices=(NATIVE, *EXPORTS, *MAE_EXPORTS, DECODER),
        metavar="DIALECT",
        help=f"{NATIVE} (default), {', '.join(EXPORTS)}; of a pre-training model {', '.join(MAE_EXPORTS)}; of an EVL {DECODER}, "
        "its decoder alone",
    )
    p.add_argument("--branch", help="of an MM-CDFSL checkpoint; by default the student of a distillation")
    p.add_argument("--classifier", metavar="HEAD", help="action, verb or noun, of an MM-CDFSL checkpoint")
    p.add_argument("--num-heads", type=int, help="attention heads, where the file cannot tell")
    p.add_argument("--backbone", metavar="PATH", help="a CLIP or MaskedViT, where CHECKPOINT is EVL's decoder alone")
    p.add_argument("--force", action="store_true", help="write over what is there")
    return p


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    out = Path(args.out)
    taken = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if taken and not args.force:
        raise ValueError(f"out {str(out)!r} is there already; --force writes over it")
    model = _loaded(args)
    config = model.config
    common.say(str(model.load_report))
    if args.to == NATIVE:
        model.save_pretrained(out)
    elif isinstance(model, EVL):
        _write_decoder(out, model, args.to)
    elif isinstance(config, MAEConfig) and args.to != DECODER:
        _write(out, export_mae_state(model.state_dict(), config, args.to), args.to, config)
    elif isinstance(config, ViTConfig) and args.to != DECODER:
        _write(out, export_state(model.state_dict(), config, args.to), args.to, config)
    else:
        raise ValueError(f"--to must be {NATIVE} for a {type(model).__name__}, got {args.to!r}")
    common.say(f"written to {out} as {args.to}")
    return 0


def _loaded(args: argparse.Namespace) -> Any:
    """The model of the arguments, with its load report."""
    if args.backbone is None:
        return load_pretrained(args.checkpoint, branch=args.branch, head=args.classifier, num_heads=args.num_heads)
    source = open_clip_source(args.checkpoint)
    if not is_evl(source):
        raise ValueError(f"backbone is for EVL's decoder alone, and {args.checkpoint} is something else")
    return EVL.from_pretrained(source, args.backbone, num_heads=args.num_heads)


def _write_decoder(out: Path, model: EVL, dialect: str) -> None:
    if dialect != DECODER:
        raise ValueError(f"--to must be {NATIVE} or {DECODER} for an EVL, got {dialect!r}")
    if out.is_dir():
        raise ValueError(f"out must be a file for {DECODER}, {str(out)!r} is a folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    model.save_decoder(out)


def _write(out: Path, state: dict[str, Tensor], dialect: str, config: ViTConfig) -> None:
    state = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    if dialect.startswith("hf_"):
        if out.is_file():
            raise ValueError(f"out must be a folder for {dialect}, {str(out)!r} is a file")
        out.mkdir(parents=True, exist_ok=True)
        write_aside(out / "model.safetensors", safetensors.torch.save(state, {"format": "pt"}))
        write_aside(out / "config.json", common.as_json(export_config(config)))
        if config.in_chans == 3:  # of flow and poses there are no pixels to normalise
            write_aside(out / "preprocessor_config.json", common.as_json(export_preprocessor(config)))
        return
    if out.is_dir():
        raise ValueError(f"out must be a file for {dialect}, {str(out)!r} is a folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        write_aside(out, safetensors.torch.save(state, {"format": "pt"}))
        return
    buffer = io.BytesIO()
    torch.save({"model": state}, buffer)
    write_aside(out, buffer.getvalue())
