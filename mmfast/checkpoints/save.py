"""Writes mmfast's own folders."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from ..config import MAEConfig, ViTConfig
from .native import FORMAT, VERSION


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write model.safetensors and config.json, each written aside and then put in place, so that no reader sees half.

    model: a MaskedViT or MaskedAutoencoder; which one, its `config` tells.   folder: made if absent; ValueError if a file.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, ViTConfig):
        raise TypeError(f"model must have a ViTConfig as config, got {type(config).__name__}")
    kind = "MaskedAutoencoder" if isinstance(config, MAEConfig) else "MaskedViT"
    write_folder(model.state_dict(), kind, config.to_dict(), folder)


def write_folder(
    state: Mapping[str, Tensor], kind: str, config: Mapping[str, Any], folder: str | os.PathLike[str]
) -> None:
    """What save_pretrained writes, for a model of this kind and config."""
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"folder must be a folder, {str(target)!r} is a file")
    target.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    about = {"format": FORMAT, "version": VERSION, "model": kind, "config": config}
    text = json.dumps(about, indent=2) + "\n"
    _put(target / "model.safetensors", lambda path: safetensors.torch.save_file(state, path, {"format": "pt"}))
    _put(target / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def _put(path: Path, write: Callable[[Path], Any]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # the user's own; safetensors would leave a file no one else can read
        write(aside)
        aside.chmod(mode)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
