"""An H200 that is not there, for rehearsals: all Python of the GPU's path runs, and none of its arithmetic.

Tensors: fake_tensors.py. torch.cuda: one device whose events are 400 ms apart and whose graphs capture nothing, but refuse to
wait for the device inside a capture. Triton: a launch binds its arguments, every tensor among them must be on the device, and
its grid must be one that CUDA takes; compiled kernels are made for sm_90, and must fit its shared memory. csrc: its CUDA
routines are called, and find no device. torch.compile gives the function itself. Started by rehearse.py.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import fake_tensors
import torch
from fake_tensors import DEVICE, Calls, Device
from torch._subclasses.fake_tensor import FakeTensor

SHARED = 227 * 1024
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    total_memory=140 << 30,
    multi_processor_count=132,
    L2_cache_size=60 << 20,
    shared_memory_per_block_optin=SHARED,
    max_threads_per_multi_processor=2048,
    warp_size=32,
)

launches: Counter[str] = Counter()  # by kernel
native: Counter[str] = Counter()  # by routine of csrc
_capturing = False


def seen() -> dict[str, Any]:
    """What happened so far."""
    counts = {"launches": launches, "native": native, "waits": fake_tensors.waits}
    return {**counts, "disagreements": sorted(fake_tensors.disagreements)}


def _nothing(*_: Any, **__: Any) -> None: ...


# -- torch.cuda --------------------------------------------------------------------------------------------------------


class Stream:
    cuda_stream = 0
    device = DEVICE

    def __init__(self, *_: Any, **__: Any) -> None: ...

    wait_stream = wait_event = synchronize = _nothing

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or Event()


class Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    record = synchronize = wait = _nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return 400.0  # so long that no benchmark repeats a call to fill its sample


class Generator(torch.Generator):
    """On the CPU wherever it is asked for."""

    def __new__(cls, *_: Any, **__: Any) -> "Generator":
        return super().__new__(cls)


class Graph:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    replay = reset = capture_begin = capture_end = _nothing

    def pool(self) -> tuple[int, int]:
        return (0, 0)


@contextlib.contextmanager
def _capture(*_: Any, **__: Any) -> Iterator[None]:
    global _capturing
    before = fake_tensors.waits.total()
    _capturing = True
    try:
        yield
    finally:
        _capturing = False
    if fake_tensors.waits.total() > before:
        raise RuntimeError(f"waited for the device while a graph was captured; so far {dict(fake_tensors.waits)}")


def _nowhere(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _always(value: Any) -> Any:
    return lambda *_, **__: value


_CUDA: dict[str, Any] = {
    **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), _always(True)),
    **dict.fromkeys(("_lazy_init", "init", "set_device", "synchronize", "empty_cache", "ipc_collect"), _nothing),
    **dict.fromkeys(("reset_peak_memory_stats", "set_sync_debug_mode", "manual_seed", "manual_seed_all"), _nothing),
    **dict.fromkeys(("set_rng_state", "set_rng_state_all"), _nothing),
    **dict.fromkeys(("device", "device_of", "stream"), _nowhere),
    **dict.fromkeys(("current_stream", "default_stream"), lambda *_: Stream()),
    **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_reserved"), _always(0)),
    "max_memory_allocated": _always(1 << 20),
    "memory_stats": lambda *_: Counter(),
    "mem_get_info": _always((139 << 30, 140 << 30)),
    "device_count": _always(1),
    "current_device": _always(0),
    "get_device_capability": _always((PROPERTIES.major, PROPERTIES.minor)),
    "get_device_name": _always(PROPERTIES.name),
    "get_device_properties": _always(PROPERTIES),
    "get_arch_list": _always(["sm_90"]),
    "is_current_stream_capturing": lambda: _capturing,
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": Graph,
    "graph": _capture,
}


# -- Triton and csrc ---------------------------------------------------------------------------------------------------


def _launcher(source: Any, metadata: Any) -> Any:
    def launch(x: int, y: int, z: int, *_: Any) -> None:
        if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
            raise RuntimeError(f"{metadata.name}: CUDA takes no grid of {x} x {y} x {z}")
        launches[metadata.name] += 1

    return launch


def _driver() -> Any:
    from triton.backends.compiler import GPUTarget

    properties = {"max_shared_mem": SHARED, "multiprocessor_count": PROPERTIES.multi_processor_count}
    return SimpleNamespace(
        get_current_device=_always(0),
        get_current_stream=_always(0),
        get_current_target=_always(GPUTarget("cuda", 90, 32)),
        get_active_torch_device=_always(DEVICE),
        get_device_interface=_always(torch.cuda),
        get_empty_cache_for_benchmark=lambda: torch.empty(1 << 20, dtype=torch.int32, device=DEVICE),
        clear_cache=_nothing,
        launcher_cls=_launcher,
        utils=SimpleNamespace(get_device_properties=_always(properties), load_binary=_always((1, 1, 0, 0, 1024))),
    )


def _uncompiled(source: Any, **_: Any) -> Any:
    """In place of a compiled kernel."""
    name = source.fn.__name__
    launch = _launcher(source, SimpleNamespace(name=name))
    return SimpleNamespace(run=launch, launch_metadata=_nothing, function=1, packed_metadata=(), name=name)


def _only_on_device(run: Any) -> Any:
    def checked(self: Any, *args: Any, **options: Any) -> Any:
        for value in (*args, *options.values()):
            if isinstance(value, torch.Tensor) and not value.is_cuda:
                raise ValueError(f"{self.__name__}: a pointer to a tensor on {value.device}")
        return run(self, *args, **options)

    return checked


def _without_a_device(name: str, routine: Any) -> Any:
    """A CUDA routine of csrc: takes its arguments, and has nothing to launch on."""

    def call(*args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # a wrong argument is a TypeError
            routine(*args)
        native[name] += 1

    return call


def _with_launcher(register: Any) -> Any:
    def noted(schema: str, impl: Any, fake: Any) -> Any:
        fake_tensors.launchers[schema.split("(", 1)[0]] = impl
        return register(schema, impl, fake)

    return noted


def _profile_of(profile: Any) -> Any:
    """torch's profiler without CUPTI."""
    return lambda *_, activities=None, **options: profile(activities=[torch.profiler.ProfilerActivity.CPU], **options)


def _not_compiled(model: Any = None, **_: Any) -> Any:
    return (lambda function: function) if model is None else model


@contextlib.contextmanager
def rehearsed(compiled: bool = False) -> Iterator[None]:
    """Believe in the H200. mmfast must not have been imported before. compiled: compile what is launched, as on a GPU."""
    import triton
    from torch._dynamo.trace_rules import get_torch_obj_rule_map
    from triton.runtime.jit import JITFunction

    from mmfast_kernels import _C, dispatch

    get_torch_obj_rule_map()  # of torch as it is: it wants every function to be there once
    found = fake_tensors.address(torch.Tensor.data_ptr)
    replaced: list[tuple[Any, str, Any]] = [
        (torch.version, "cuda", "13.0"),
        (torch.backends.cudnn, "is_available", _always(True)),
        (torch, "compile", _not_compiled),
        (torch, "Generator", Generator),
        (torch.profiler, "profile", _profile_of(torch.profiler.profile)),
        (torch.cuda.profiler, "start", _nothing),
        (torch.cuda.profiler, "stop", _nothing),
        (torch.nn.Module, "_apply", fake_tensors.move_module),
        (torch.Tensor, "pin_memory", fake_tensors.pin),
        (torch.Tensor, "is_pinned", fake_tensors.is_pinned),
        (torch.Tensor, "record_stream", _nothing),
        (torch.Tensor, "data_ptr", found),
        (FakeTensor, "data_ptr", found),
        (FakeTensor, "tolist", lambda t: t.cpu().tolist()),
        (triton.runtime.driver, "_active", _driver()),
        (JITFunction, "run", _only_on_device(JITFunction.run)),
        (dispatch, "register", _with_launcher(dispatch.register)),
        *((torch.cuda, name, value) for name, value in _CUDA.items() if hasattr(torch.cuda, name)),
        *((_C, n, _without_a_device(n, getattr(_C, n))) for n in dir(_C) if n.endswith("_cuda") and n != "with_cuda"),
    ]
    with contextlib.ExitStack() as stack:
        for where, name, value in replaced:
            stack.enter_context(mock.patch.object(where, name, value, create=True))
        if not compiled:
            stack.enter_context(mock.patch("triton.compiler.compile", _uncompiled))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(Device())
        stack.enter_context(Calls())
        yield
