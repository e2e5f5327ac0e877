"""What ran behind a call: its kernels, how long its first call took, and the call as a CUDA graph."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from harness import Call, quiet_stderr, synchronize


class Replayed:
    """A call as a CUDA graph, captured the first time it is called; every call gives the same tensor, filled anew."""

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self.call, self.device = call, device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Any = None

    def __call__(self) -> Any:
        if self.graph is None:
            self.capture()
        assert self.graph is not None
        self.graph.replay()
        return self.output

    def capture(self) -> None:
        stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.call()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.output = self.call()
        self.graph = graph


def kernels_of(call: Call, device: torch.device, most: int = 8) -> list[dict[str, Any]]:
    """The kernels of one call (on a CPU torch's operators), those that take longest first: name, calls, microseconds.

    Empty where the profiler cannot run.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    try:
        synchronize(device)
        with quiet_stderr(), profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
            call()
            synchronize(device)
        events = recorded.key_averages()
    except (RuntimeError, AssertionError):  # the latter where CUPTI is missing
        return []
    found = []
    for event in events:
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent > 0:
            found.append({"name": event.key[:120], "calls": int(event.count), "us": round(float(spent), 1)})
    return sorted(found, key=lambda one: -one["us"])[:most]


def kernels_of_each(calls: Mapping[str, Call], device: torch.device, most: int = 8) -> dict[str, list[dict[str, Any]]]:
    """kernels_of every call, by name."""
    return {name: kernels_of(call, device, most) for name, call in calls.items()}


def first_call_seconds(calls: Mapping[str, Call], device: torch.device) -> dict[str, float | None]:
    """How long the first call takes, which compiles and tunes; None for a call that fails."""
    taken: dict[str, float | None] = {}
    for name, call in calls.items():
        began = time.perf_counter()
        try:
            call()
            synchronize(device)
        except Exception:  # the check that follows says why
            taken[name] = None
        else:
            taken[name] = time.perf_counter() - began
    return taken
