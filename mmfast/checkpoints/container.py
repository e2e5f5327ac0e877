"""Reads the files checkpoints come in, whatever their dialect, and runs no code that a file brings.

safetensors, torch's zip and older pickles, folders (config.json beside weights, whole or in shards; DeepSpeed's).
"""

import argparse
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

StateDict = Mapping[str, Any]

_CONTAINERS = ("model", "module", "state_dict")
_WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "checkpoint/mp_rank_00_model_states.pt",
    "mp_rank_00_model_states.pt",
)
_numpy_scalar = np.float64(0).__reduce__()[0]
# What VideoMAE's own files hold beside tensors: the command line, and numbers of numpy (under the old module name too).
_HARMLESS: list[Any] = [
    argparse.Namespace,
    _numpy_scalar,
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
]


@dataclass
class Source:
    """The tensors of one checkpoint, their names free of wrappers such as `module.`."""

    where: str
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None
    original: dict[str, str] = field(default_factory=dict)  # name -> name in the file
    notes: list[str] = field(default_factory=list)

    def written_as(self, names: list[str]) -> list[str]:
        """The names as the file has them."""
        return [self.original.get(name, name) for name in names]


def read(source: str | os.PathLike[str] | StateDict, *, trust: bool = False) -> Source:
    """Read a file, a folder or a state dict (nested as training scripts nest it) without running code from it.

    trust: unpickle whatever a torch file holds, which lets it run any code: only for files of your own.
    Raises ValueError naming the file and what is wrong with it, FileNotFoundError where there is none.
    """
    if isinstance(source, Mapping):
        return _open(source, "the state dict", None)
    if not isinstance(source, (str, os.PathLike)):
        hint = "; pass its .state_dict()" if isinstance(source, nn.Module) else ""
        raise TypeError(f"a checkpoint must be a path or a state dict, got {type(source).__name__}{hint}")
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, trust)
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {str(path)!r}; models are not downloaded, give a local path")
    config = _config_in(path.parent) if path.name in _WEIGHTS[:2] else None
    return _open(_read_file(path, trust), str(path), config)


def _read_folder(folder: Path, trust: bool) -> Source:
    config = _config_in(folder)
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return _open(_read_file(folder / name, trust), str(folder), config)
        if (folder / f"{name}.index.json").is_file():
            return _open(_read_shards(folder / f"{name}.index.json", trust), str(folder), config)
    held = sorted(p.name for p in folder.iterdir())[:10]
    raise ValueError(f"{folder}: holds none of {', '.join(_WEIGHTS)}; it holds {', '.join(held) or 'nothing'}")


def _config_in(folder: Path) -> dict[str, Any] | None:
    """config.json, and under "preprocessor" what Hugging Face keeps beside it of the pixels."""
    if not (folder / "config.json").is_file():
        return None
    config, pixels = _read_json(folder / "config.json"), folder / "preprocessor_config.json"
    return {**config, "preprocessor": _read_json(pixels)} if pixels.is_file() else config


def pixel_fields(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """mean and std, on px/255, that a Hugging Face folder's preprocessor has; nothing where there is none."""
    about = (config or {}).get("preprocessor") or {}
    mean, std = about.get("image_mean"), about.get("image_std")
    if not mean or not std:  # absent, or null
        return {}
    if about.get("do_normalize") is False:
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    # Of pixels that are multiplied by another number than 1 / 255.
    factor = round(255 * (1.0 if about.get("do_rescale") is False else about.get("rescale_factor") or 1 / 255), 9)
    return {"mean": tuple(value / factor for value in mean), "std": tuple(value / factor for value in std)}


def _read_shards(index: Path, trust: bool) -> dict[str, Any]:
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise ValueError(f"{index}: has no weight_map of tensor names to file names")
    tensors: dict[str, Any] = {}
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index}: a shard must be a file beside it, got {shard!r}")
        if not (index.parent / shard).is_file():
            raise ValueError(f"{index}: names the shard {shard}, which is missing")
        tensors.update(_tensors_in(_read_file(index.parent / shard, trust), str(index.parent / shard))[0])
    lacking = sorted(set(where) - set(tensors))
    if lacking:
        raise ValueError(f"{index}: {len(lacking)} tensors are in no shard, among them {', '.join(lacking[:3])}")
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(data).__name__}")
    return data


def _read_file(path: Path, trust: bool) -> Any:
    # The content decides, not the ending: .pt, .pth, .bin and .ckpt all name several formats.
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path}: is empty")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if head.startswith(b"PK"):
        return _read_torch(path, trust, mmap=_check_archive(path))
    if head[0] == 0x80:
        return _read_torch(path, trust, mmap=False)
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors(path)
    raise ValueError(f"{path}: is neither safetensors nor a file of torch.save; it starts with {head[:24]!r}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: is damaged or cut short, or no safetensors file ({error})") from error


def _check_archive(path: Path) -> bool:
    """True for an archive of torch.save; an error that says what else it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: is damaged or cut short ({error})") from error
    if "constants.pkl" in names:
        raise ValueError(
            f"{path}: is a TorchScript archive, as OpenAI's CLIP models are; it holds no masked video transformer"
        )
    if "data.pkl" not in names:
        raise ValueError(f"{path}: is a zip archive, but not one of torch.save")
    return True


def _read_torch(path: Path, trust: bool, mmap: bool) -> Any:
    with torch.serialization.safe_globals(_HARMLESS):
        try:
            return torch.load(str(path), map_location="cpu", weights_only=not trust, mmap=mmap)
        except pickle.UnpicklingError as error:
            wanted = _wanted(path, str(error))
            if trust or not wanted:
                raise ValueError(f"{path}: is damaged or cut short ({_first_line(error)})") from error
            raise ValueError(
                f"{path}: refused, it wants more than tensors: {', '.join(wanted)}. Loading it would run that code. "
                f"If you made the file or trust who did, pass trust=True"
            ) from error
        except Exception as error:  # a damaged pickle may raise anything
            raise ValueError(
                f"{path}: is damaged or cut short ({type(error).__name__}: {_first_line(error)})"
            ) from error


def _wanted(path: Path, message: str) -> list[str]:
    # torch lists them for zip archives only; of an older file its message tells the first one.
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # an older file, or a damaged one, which may raise anything
        return re.findall(r"GLOBAL ([\w.]*\w)", message)[:1]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


def _open(loaded: Any, where: str, config: dict[str, Any] | None) -> Source:
    found, notes = _tensors_in(loaded, where)
    source = Source(where, {}, config, {}, notes)
    for name, tensor in found.items():
        clean = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if clean in source.tensors:
            raise ValueError(f"{where}: {source.original[clean]} and {name} are both {clean} once unwrapped")
        source.tensors[clean] = tensor.detach()
        source.original[clean] = name
    return source


def _tensors_in(loaded: Any, where: str, depth: int = 0) -> tuple[dict[str, Tensor], list[str]]:
    """The innermost dict of tensors, and notes on what lay beside it."""
    if isinstance(loaded, nn.Module):  # a whole pickled model, which only trust=True lets through
        loaded = loaded.state_dict()
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{where}: holds a {type(loaded).__name__}, not a dict of tensors")
    for name in _CONTAINERS:
        inner = loaded.get(name)
        if depth < 4 and inner and isinstance(inner, (Mapping, nn.Module)):
            tensors, notes = _tensors_in(inner, f"{where}[{name!r}]", depth + 1)
            beside = [str(key) for key in loaded if key != name]
            return tensors, ([f"not read, beside {name!r}: {', '.join(beside)}"] if beside else []) + notes
    tensors = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(str(key) for key in list(loaded)[:8])
        raise ValueError(f"{where}: is not a dict of tensors; its keys are {keys or 'none'}")
    others = [str(name) for name in loaded if name not in tensors]
    return tensors, [f"not tensors, so not read: {', '.join(others)}"] if others else []
