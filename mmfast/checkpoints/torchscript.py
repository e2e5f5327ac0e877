"""The tensors of a TorchScript archive, as OpenAI's CLIP models are, read without running or even loading its code.

The archive is a zip: data.pkl pickles the tree of modules, data/N holds the bytes of storage N, code/ the programme. The
unpickler here knows tensors and makes a plain namespace of any class of the archive's own.
"""

import collections
import io
import os
import pickle
import zipfile
from typing import Any

import torch
from torch import Tensor

# What torch.jit.save writes beside tensors: lists of numbers, and the types of containers.
_PLAIN = {"build_intlist", "build_doublelist", "build_boollist", "build_tensorlist"}
_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in (
        ("Float", torch.float32),
        ("Double", torch.float64),
        ("Half", torch.float16),
        ("BFloat16", torch.bfloat16),
        ("Long", torch.int64),
        ("Int", torch.int32),
        ("Short", torch.int16),
        ("Char", torch.int8),
        ("Byte", torch.uint8),
        ("Bool", torch.bool),
    )
}


class _Module:
    """Stands in for a class of the archive; unpickling fills its attributes."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self.archive, self.root = archive, root
        self.storages: dict[str, torch.UntypedStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return torch._utils._rebuild_tensor_v2
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch.jit._pickle" and name in _PLAIN:
            return lambda values: values
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return lambda value, tag: value
        raise pickle.UnpicklingError(f"it wants {module}.{name}")

    def persistent_load(self, pid: Any) -> torch.TypedStorage:
        _, dtype, key, _, _ = pid
        if key not in self.storages:
            held = bytearray(self.archive.read(f"{self.root}data/{key}"))
            self.storages[key] = (
                torch.frombuffer(held, dtype=torch.uint8).untyped_storage() if held else torch.UntypedStorage(0)
            )
        return torch.storage.TypedStorage(wrap_storage=self.storages[key], dtype=dtype, _internal=True)


def is_torchscript(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an archive of torch.jit.save."""
    if not os.path.isfile(path) or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist())


def read_torchscript(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Parameters and buffers by their names in the module's tree. ValueError for a damaged archive or what is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
            root = _Unpickler(archive, pickled.removesuffix("data.pkl")).load()
    except Exception as error:  # a damaged pickle may raise anything
        reason = (str(error).strip().splitlines() or ["no message"])[0][:200]
        raise ValueError(f"{path}: is a damaged TorchScript archive ({type(error).__name__}: {reason})") from error
    tensors: dict[str, Tensor] = {}
    _collect(root, "", tensors)
    return tensors


def _collect(module: Any, prefix: str, tensors: dict[str, Tensor]) -> None:
    for name, value in vars(module).items() if isinstance(module, _Module) else ():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value.detach()
        else:
            _collect(value, f"{prefix}{name}.", tensors)
