"""Tensors on a device that is not there: torch's fake tensors for "cuda", which have shapes, dtypes and strides but no values.

Tensors on the CPU stay real. Of integers and bools on the device the values are known too, as long as they follow from other
known ones: masks, ids and counts, on which shapes depend. Reading anything else back gives ones, and 0 for a quotient, which
here is an error. An op of mmfast runs its launcher, and what that returns must be what the op's fake says.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
SHAPE_FROM_VALUES = ("aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2", "mmfast::kept_ids")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
MOST_KNOWN = 1 << 24  # elements

waits: Counter[str] = Counter()  # operators for which the host waited
disagreements: set[str] = set()  # between an op and its fake
launchers: dict[str, Callable[..., Any]] = {}  # of mmfast's ops
pinned: set[int] = set()  # addresses of storages


class Device(TorchDispatchMode):
    """What touches the device goes to fake tensors, the rest where it would have gone."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True, static_shapes=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func._schema.name
        leaves = tree_leaves((args, kwargs))
        devices = [d.type for d in leaves if isinstance(d, torch.device)]
        if not any(isinstance(t, FakeTensor) for t in leaves) and "cuda" not in devices:
            if name.startswith("mmfast::"):
                with self, Calls(), torch.no_grad():
                    return launchers[name[8:]](*args, **kwargs)
            return func(*args, **kwargs)
        values = self._from_values(func, args, kwargs, leaves)
        if name in ("aten::_local_scalar_dense", "aten::equal") or (name == "aten::_to_copy" and "cpu" in devices):
            waits[name] += 1
            return _read_back(name, args[0], kwargs) if values is None else values
        if name == "aten::copy_" and not isinstance(args[0], FakeTensor):
            waits[name] += 1
            return args[0].fill_(1) if values is None else args[0]
        if name in SHAPE_FROM_VALUES:
            waits[name] += 1
            if values is None:
                raise NotImplementedError(f"{name} of values that are not known")
            return tree_map(self._on_device, values)
        if name in INDEXING:
            args = (args[0], self._without_masks(args[1]), *args[2:])
        for t in leaves:
            if isinstance(t, Tensor) and not isinstance(t, FakeTensor) and not _may_mix(name, t):
                raise RuntimeError(f"{name}: a tensor on the CPU, {tuple(t.shape)}, among those on the device")
        own = name.startswith("mmfast::")
        args, kwargs = tree_map(lambda t: self._without_values(t, own), (args, kwargs))
        if own:
            result = self._launched(name[8:], func, args, kwargs)
        else:
            with self.fake:
                result = func(*args, **kwargs)
        if name == "aten::div":
            result.ratio = True
        if values is not None:
            for fake, value in zip(tree_leaves(result), tree_leaves(values), strict=True):
                if isinstance(fake, FakeTensor) and not hasattr(fake, "known") and _knowable(value):
                    fake.__dict__["known"] = value
        return result

    def _from_values(self, func: Any, args: Any, kwargs: Any, leaves: list[Any]) -> Any:
        """The call on known values; None where one is not known. Known values are changed in place with their tensor."""
        name = func._schema.name
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        known = all(_knowable(t) and (hasattr(t, "known") or not isinstance(t, FakeTensor)) for t in tensors)
        drawn = "empty" in name or "rand" in name
        own = name.startswith("mmfast::") and name not in ("mmfast::sample_keep", "mmfast::kept_ids")
        if not known or drawn or own:
            if func._schema.is_mutable and tensors and hasattr(tensors[0], "known"):
                del tensors[0].known
            return None
        if not tensors and not _makes_integers(name, args, kwargs):
            return None
        given, options = tree_map(_known, (args, kwargs))
        return (launchers[name[8:]] if name.startswith("mmfast::") else func)(*given, **options)

    def _launched(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        with self.fake:
            expected = func(*args, **kwargs)
        with self, Calls(), torch.no_grad():
            got = launchers[name](*args, **kwargs)
        for pair in zip(tree_leaves(got), tree_leaves(expected), strict=True):
            one, other = map(_described, pair)
            if one != other:
                disagreements.add(f"{name}: {one}, its fake says {other}")
        return got

    def _without_values(self, t: Any, keep_pinned: bool = False) -> Any:
        if not isinstance(t, Tensor) or isinstance(t, FakeTensor) or (keep_pinned and is_pinned(t)):
            return t
        with self.fake:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)

    def _on_device(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with self.fake:
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)
        fake.__dict__["known"] = value
        return fake

    def _without_masks(self, indices: Any) -> list[Any]:
        found: list[Any] = []
        for index in indices:
            if isinstance(index, FakeTensor) and index.dtype == torch.bool and hasattr(index, "known"):
                waits["a mask as index"] += 1
                found += [self._on_device(i) for i in index.known.nonzero(as_tuple=True)]
            else:
                found.append(index)
        return found


def _described(t: Tensor) -> str:
    strides = [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1 and t.numel()]
    return f"{t.dtype} {tuple(t.shape)} by {strides} on {t.device}"


def _knowable(t: Any) -> bool:
    """Not for pixels, whose values nothing depends on."""
    if not isinstance(t, Tensor):
        return True
    return not t.is_floating_point() and t.numel() <= (1 << 16 if t.dtype == torch.uint8 else MOST_KNOWN)


def _known(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.__dict__["known"] if isinstance(x, FakeTensor) else x


def _makes_integers(name: str, args: Any, options: Any) -> bool:
    dtype = options.get("dtype")
    if dtype is not None:
        return not dtype.is_floating_point and dtype != torch.uint8
    return name == "aten::arange" and all(isinstance(x, int) for x in args)


def _read_back(name: str, t: Tensor, options: Any) -> Any:
    if name == "aten::equal":
        return True
    if name == "aten::_to_copy":
        host = torch.ones(t.shape, dtype=options.get("dtype") or t.dtype)
        host.__dict__["read_back"] = True
        return host
    if t.dtype == torch.bool:
        return True
    return (0.0 if hasattr(t, "ratio") else 1.0) if t.is_floating_point() else 1


def _may_mix(name: str, t: Tensor) -> bool:
    """As torch itself: scalars, and what moves or is only looked at. mmfast's kernels also read pinned memory."""
    if name.startswith("mmfast::") and is_pinned(t):
        return True
    return (
        t.dim() == 0 or name.endswith("_like") or "new_" in name or name in ("aten::_to_copy", "aten::copy_", *INDEXING)
    )


class Calls(TorchFunctionMode):
    """What never gets as far as an operator: "cuda" is "cuda:0"; data given as lists; pinned memory; comparisons."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_with_index, (args, dict(kwargs or {})))
        if kwargs.pop("pin_memory", None):
            return pin(func(*args, **kwargs))
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            return func(*args, **{k: v for k, v in kwargs.items() if k != "device"}).to(DEVICE)
        if func is Tensor.new_tensor and args[0].is_cuda:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(DEVICE)
        if func in (torch.equal, torch.allclose, Tensor.equal, Tensor.allclose) and any(map(_unreal, args[:2])):
            return args[0].shape == args[1].shape
        if func is Tensor.__getitem__ and args[0].is_cuda:
            args = (args[0], _with_tensors(args[1]))
        return func(*args, **kwargs)


def _unreal(t: Any) -> bool:
    return isinstance(t, FakeTensor) or hasattr(t, "read_back")


def _with_index(x: Any) -> Any:
    if isinstance(x, str):
        return DEVICE if x == "cuda" else x
    return DEVICE if isinstance(x, torch.device) and x.type == "cuda" and x.index is None else x


def _with_tensors(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_with_tensors(i) for i in index)
    return torch.tensor(index).to(DEVICE) if isinstance(index, list) else index


def pin(t: Tensor, *_: Any) -> Tensor:
    """In place of Tensor.pin_memory."""
    if t.is_cuda:
        raise RuntimeError("cannot pin a tensor on the device")
    t = t.clone(memory_format=torch.preserve_format)
    pinned.add(t.untyped_storage().data_ptr())
    return t


def is_pinned(t: Tensor, *_: Any) -> bool:
    return not t.is_cuda and t.untyped_storage().data_ptr() in pinned


def address(original: Callable[[Tensor], int]) -> Callable[[Tensor], int]:
    """In place of Tensor.data_ptr: aligned as the caching allocator's, so that kernels are specialised as on a GPU."""

    def data_ptr(t: Tensor) -> int:
        if not isinstance(t, FakeTensor):
            return original(t)
        return (1 << 40) + int(t.storage_offset()) * t.element_size() if t.numel() else 0

    return data_ptr


def move_module(self: Any, move: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """In place of nn.Module._apply: a fake tensor cannot become the data of a real parameter."""
    for child in self.children() if recurse else ():
        child._apply(move)
    with torch.no_grad():
        for name, p in list(self._parameters.items()):
            if p is not None and (moved := move(p)) is not p:
                self._parameters[name] = torch.nn.Parameter(moved, p.requires_grad)
                if p.grad is not None:
                    self._parameters[name].grad = move(p.grad)
        for name, b in list(self._buffers.items()):
            self._buffers[name] = None if b is None else move(b)
    return self
