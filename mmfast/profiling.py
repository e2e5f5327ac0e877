"""Named ranges for Nsight Systems and the torch profiler; free of cost unless switched on.

enable() makes range("attention") an NVTX range in the domain "mmfast" (package nvtx) and a record_function("mmfast::attention").
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_enabled = False
_domain = None
_OFF = nullcontext()


def enable(on: bool = True) -> bool:
    """Switch ranges on or off. Returns whether NVTX is among them: False when the package nvtx is not installed."""
    global _enabled, _domain
    _enabled = on
    if on and _domain is None:
        try:
            import nvtx
        except ImportError:
            return False
        _domain = nvtx.get_domain("mmfast")
    return _domain is not None


def range(name: str) -> AbstractContextManager[None]:
    """A range called `name` around the block."""
    if not _enabled or torch.compiler.is_compiling():
        return _OFF
    return _range(name)


@contextmanager
def _range(name: str) -> Iterator[None]:
    if _domain is not None:
        _domain.push_range(_domain.get_event_attributes(message=name))
    try:
        with torch.profiler.record_function(f"mmfast::{name}"):
            yield
    finally:
        if _domain is not None:
            _domain.pop_range()
