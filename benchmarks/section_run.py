"""One section of run_all.py at work: its device, deadline and result file, and how it times an op."""

import contextlib
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import torch
from ops import Op
from probes import kernels_of
from report import aligned
from variants import OURS

OP_HEADER = ("op", "provider", "us", "+-", "GB/s", "TFLOP/s", "x mmfast")


@dataclass
class Run:
    """quick: tiny models and few rounds, to see that everything runs. full: every case, however long it takes."""

    device: torch.device
    path: Path
    deadline: float
    quick: bool = False
    full: bool = False
    result: dict[str, Any] = field(default_factory=lambda: {"rows": [], "skipped": [], "red": []})

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def enough(self, what: str, seconds: float) -> bool:
        """Whether there is time for it; if not, it is noted as skipped."""
        if self.quick or self.left >= seconds:
            return True
        self.skip(what, f"needs about {seconds:.0f} s, {max(self.left, 0):.0f} s left")
        return False

    def skip(self, what: str, why: str) -> None:
        self.result["skipped"].append(f"{what}: {why}")
        print(f"  skipped {what}: {why}", flush=True)
        self.save()

    def red(self, what: str, why: str) -> None:
        self.result["red"].append(f"{what}: {why}")
        print(f"  RED {what}: {why}", flush=True)
        self.save()

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """What fails in here is noted, and the section goes on."""
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            self.skip(what, str(error).splitlines()[0])
        except Exception as error:  # of whatever it dies: the others are still to be measured
            traceback.print_exc()
            self.red(what, f"{type(error).__name__}: {(str(error) or ' ').splitlines()[0]}")
        finally:
            if self.cuda:
                torch.cuda.empty_cache()

    def add(self, row: dict[str, Any]) -> None:
        self.result["rows"].append(row)
        self.save()

    def save(self) -> None:
        harness.write_json(self.path, self.result)


def time_op(run: Run, op: Op, dtype: torch.dtype) -> list[tuple[str, ...]]:
    """Check an op's providers, time those that passed, and return their lines."""
    began = time.perf_counter()
    errors, raised = op.check()
    compiling = time.perf_counter() - began
    allowed = op.allowed(errors)
    for name, why in raised.items():
        # Torch's kernels refuse some shapes and machines; ours must not.
        (run.red if name.startswith(OURS) else run.skip)(f"{op.name} {op.shape} by {name}", why)
    for name, error in errors.items():
        if not error <= allowed:
            # A peer may take a cheaper formula, such as another GELU; mmfast may not.
            say = run.red if name.startswith(OURS) or error != error else run.skip
            say(f"{op.name} {op.shape} by {name}", f"relative error {error:.2e}, allowed {allowed:.2e}; not timed")
    good = {name: op.providers[name] for name, error in errors.items() if error <= allowed}
    # Enough sets of inputs to pass twice through a 60 MB cache, but no more than eight.
    count = min(8, max(2, -(-120_000_000 // op.bytes))) if run.cuda else 1
    inputs = [op.make() for _ in range(count)]
    sets = {name: [lambda c=call, i=i: c(*i) for i in inputs] for name, call in good.items()}
    lines: list[tuple[str, ...]] = []
    with torch.no_grad():
        timings = harness.replayed(sets, run.device, rounds=2 if run.quick else 7)
        kernels = {name: kernels_of(calls[0], run.device, 4) for name, calls in sets.items()}
    ours = timings[OURS].median if OURS in timings else float("nan")
    for name, timing in timings.items():
        rates = {"gb_s": op.bytes / timing.median / 1e6, "tflop_s": op.flops / timing.median / 1e9}
        known = {"op": op.name, "shape": op.shape, "dtype": dtype, "provider": name, "error": errors[name]}
        known |= {"check_seconds": compiling, "kernels": kernels[name]}
        run.add(known | {"timing": timing, "bytes": op.bytes, "flops": op.flops} | rates)
        lines.append(
            (
                f"{op.name} {op.shape}",
                name,
                f"{timing.median * 1e3:.1f}",
                f"{timing.spread:.0%}",
                f"{rates['gb_s']:.0f}",
                f"{rates['tflop_s']:.3g}",
                f"{timing.median / ours:.2f}",
            )
        )
    return lines


def time_ops(run: Run, made: Iterable[tuple[str, Callable[[], Op], torch.dtype]], seconds: float) -> None:
    """Ops, each made when its turn comes.   made: a name, what makes it, its dtype. seconds: that one is expected to take."""
    for what, make, dtype in made:
        if not run.enough(what, seconds):
            continue
        with run.guarded(what):
            print(*aligned([OP_HEADER, *time_op(run, make(), dtype)]), sep="\n", flush=True)
