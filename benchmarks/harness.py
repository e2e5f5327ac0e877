"""Timing, memory, ceilings and the description of the machine.

CPU: wall time. GPU: CUDA events around enough back-to-back calls. Variants are interleaved round by round, in a
rotating order, so that a slow minute of the machine falls on all of them alike; medians and quartiles are kept.
"""

import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call."""

    median: float
    q1: float
    q3: float
    least: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        ordered = sorted(samples)
        if len(ordered) < 4:
            q1, q3 = ordered[0], ordered[-1]
        else:
            q1, _, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(statistics.median(ordered), q1, q3, ordered[0], len(ordered))

    def divided(self, by: float) -> "Timing":
        return Timing(self.median / by, self.q1 / by, self.q3 / by, self.least / by, self.samples)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles (of the extremes below four samples), as a share of the median."""
        return (self.q3 - self.q1) / 2 / self.median


def progress(items: Any, what: str, total: int | None = None) -> Iterator[Any]:
    """tqdm on stderr; plain iteration where tqdm is missing."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    yield from tqdm(items, desc=what, total=total, leave=False, file=sys.stderr, disable=None)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Milliseconds a call, over `repeats` calls in a row."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        synchronize(device)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) * 1e3 / repeats


def measure(
    variants: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int | None = None,
    budget: float = 20.0,
    warmup: int = 0,
    what: str = "timing",
) -> dict[str, Timing]:
    """Time the variants, interleaved.

    rounds: how often each is sampled; unless given, as often as `budget` seconds allow, between 2 and 25.
    A sample is one call on the CPU, and at least 20 ms of calls on a GPU. warmup: calls before the first sample.
    """
    samples: dict[str, list[float]] = {}
    repeats: dict[str, int] = {}
    seconds = 0.0  # of one round
    for name, call in progress(variants.items(), f"{what}, round 1", len(variants)):
        for _ in range(warmup):
            call()
        took = time_once(call, device)
        repeats[name] = max(1, round(20.0 / max(took, 1e-3))) if device.type == "cuda" else 1
        # On a GPU a lone call also times its launch, so there the first round only tells how many calls make a sample.
        samples[name] = [took] if device.type != "cuda" else []
        seconds += took * repeats[name] / 1e3
    if rounds is None:
        rounds = max(2, min(25, int(budget / seconds)))
    names = list(variants)
    for turn in progress(range(rounds - len(samples[names[0]])), what):
        shift = (turn + 1) % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(time_once(variants[name], device, repeats[name]))
    return {name: Timing.of(taken) for name, taken in samples.items()}


def replayed(sets: Mapping[str, Sequence[Call]], device: torch.device, rounds: int = 7) -> dict[str, Timing]:
    """Time short GPU calls without their launches: each name's calls, one per set of inputs, in a CUDA graph.

    Several sets that together exceed the L2 cache twice keep it from serving one call what another left there.
    A name whose calls cannot be captured is timed by `measure`. On the CPU everything is.
    """
    if device.type != "cuda":
        return measure({name: calls[0] for name, calls in sets.items()}, device, rounds=rounds, warmup=2)
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, calls in sets.items():
        for _ in range(2):
            for call in calls:
                call()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except RuntimeError:
            torch.cuda.synchronize(device)
            continue
        graphs[name] = graph
    replays: dict[str, Call] = {name: graph.replay for name, graph in graphs.items()}
    timings = measure(replays, device, rounds=rounds, warmup=3) if replays else {}
    result = {name: timing.divided(len(sets[name])) for name, timing in timings.items()}
    others = {name: calls[0] for name, calls in sets.items() if name not in result}
    return result | (measure(others, device, rounds=rounds, warmup=3) if others else {})


def peak_of(call: Call, device: torch.device) -> tuple[int, int | None]:
    """peak_memory and peak_resident of one and the same call; there is no resident set to speak of on a GPU."""
    if device.type == "cuda":
        return peak_memory(call, device), None
    peaks: list[int] = []
    resident = peak_resident(lambda: peaks.append(peak_memory(call, device)))
    return peaks[0], resident


def peak_memory(call: Call, device: torch.device) -> int:
    """Most bytes that a call holds at once beyond what was held before it.

    GPU: the caching allocator's own peak. CPU: torch's allocator reports every allocation to the profiler, in order;
    the peak of their running sum is exact for tensors, those of C++ operators included, and blind to what BLAS keeps.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    # The call's result is dropped inside, so that its release is not attributed to what follows.
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_resident(call: Call) -> int | None:
    """Most bytes by which the process's resident set grows during a call (Linux), BLAS buffers included.

    Coarser than peak_memory: pages that the process held already are not seen. None where the kernel does not tell.
    """
    import ctypes

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_kib("VmRSS")
    except (OSError, AttributeError, KeyError):
        call()
        return None
    call()
    return max(0, _status_kib("VmHWM") - before) * 1024


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines if ":" in line)[field].split()[0])


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drop what native code writes to stderr: the profiler's start and stop notices."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the machine reaches at best, measured now: copying (GB/s, read + write) and a square matrix product."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 2048
    elements = (1 << 30 if cuda else 1 << 27) // dtype.itemsize
    source = torch.ones(elements, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    for _ in range(2):
        target.copy_(source)
        torch.mm(a, b, out=out)
    copy = min(time_once(lambda: target.copy_(source), device) for _ in range(7))
    gemm = min(time_once(lambda: torch.mm(a, b, out=out), device, 3) for _ in range(5))
    return {
        "copy_gb_s": 2 * source.nbytes / copy / 1e6,
        "gemm_tflop_s": 2 * size**3 / gemm / 1e9,
        "gemm_size": float(size),
    }


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """Everything a figure has to be read with."""
    try:
        import triton

        triton_version: str | None = triton.__version__
    except ImportError:
        triton_version = None
    commit = os.environ.get("MMFAST_COMMIT") or _output_of("git", "rev-parse", "HEAD")
    dirty = _output_of("git", "status", "--porcelain", "--untracked-files=no")
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": (commit or "unknown") + ("+changes" if dirty else ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": str(device),
    }
    if device.type == "cuda":
        props = torch.cuda.get_device_properties(device)
        query = "--query-gpu=driver_version,clocks.sm,power.draw,power.limit"
        smi = _output_of("nvidia-smi", query, "--format=csv,noheader", f"--id={device.index or 0}")
        facts |= {
            "gpu": props.name,
            "gpu_memory_gib": round(props.total_memory / 2**30, 1),
            "sms": props.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver_clock_power": smi,
        }
    return facts


def write_json(path: str | Path, content: Any) -> None:
    """Write in one step: a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1, default=_plain)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file.   ValueError for a file that is none."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def _plain(value: Any) -> Any:
    if isinstance(value, Timing):
        return asdict(value)
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Path | torch.device | torch.dtype):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
