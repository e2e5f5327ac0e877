"""Check, then time everything this machine can show, within a time budget.

    python benchmarks/run_all.py --out FOLDER                       # everything, 9 minutes: what fits, in order
    python benchmarks/run_all.py --out FOLDER --part 1/5            # a fifth of it; five parts have all that fits 9 minutes each
    python benchmarks/run_all.py --merge A B C D E --out FOLDER     # one JSON of the parts, a machine and commit
    python benchmarks/run_all.py --out FOLDER --quick               # tiny models: whether everything runs, in a minute

First the GPU tests (pytest -m gpu), the part "gate". Then every section in a process of its own, so that one that fails,
hangs or loses the GPU leaves the others alone. Every section checks what it times: a wrong provider is named and has no
time. FOLDER/results.json is written anew after every section, FOLDER/log.txt has the tests' output and what sections wrote
to stderr. Exit code 0 only if all was green.
"""

import argparse
import contextlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import harness
import results_file
import torch

HERE = Path(__file__).resolve().parent
GATE = "gate"
# In the order in which they run, with the seconds each may take at most.
LIMITS = {
    GATE: 190,
    "ceilings": 40,
    "ladder_small": 230,
    "attention": 90,
    "kernels": 160,
    "training": 190,
    "grid": 270,
    "ladder_base": 150,
    "latency": 120,
    "host": 80,
    "deployed": 80,
    "backward": 150,
    "gradients": 80,
    "ladder_large": 130,
    "ted": 80,
    "m2clip": 160,
    "evl": 170,
}
START_SECONDS = 15.0  # importing torch and mmfast and waking the GPU
LAST_WORDS = 10.0  # seconds that what was interrupted may take to end
FULL = 6  # times the seconds with --full


def part_of(text: str) -> tuple[int, int]:
    try:
        number, count = (int(piece) for piece in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be N/M, such as 1/4, got {text!r}") from None
    if not 1 <= number <= count <= len(LIMITS):
        raise argparse.ArgumentTypeError(f"must be N/M with 1 <= N <= M <= {len(LIMITS)}, got {text!r}")
    return number, count


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run_all.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, metavar="FOLDER", help="where the JSON and the log go")
    add("--minutes", type=float, default=9.0, help="for everything together (default 9)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--only", nargs="+", choices=list(LIMITS), help="what to run; the default is everything")
    what.add_argument("--part", type=part_of, metavar="N/M", help="the Nth of M parts of about equal length")
    what.add_argument(
        "--merge", nargs="+", type=Path, metavar="PATH", help="join the results of several runs, run nothing"
    )
    what.add_argument("--list", action="store_true", help="print the sections and their seconds, run nothing")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="tiny models and few rounds; times mean nothing")
    size.add_argument("--full", action="store_true", help="the whole grid, and what takes minutes on a CPU")
    add("--no-gate", action="store_true", help="skip pytest -m gpu; the sections' own checks stay")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--section", choices=list(LIMITS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    if options.out is None and not options.list:
        parser.error("--out is needed")
    return options


def chosen(options: argparse.Namespace) -> list[str]:
    """What is to run, in order."""
    if options.only:
        return [name for name in LIMITS if name in options.only]
    return list(LIMITS) if options.part is None else parts(options.part[1])[options.part[0] - 1]


def parts(count: int) -> list[list[str]]:
    """The sections dealt out to so many parts, the longest first, each to the part that has least; then swapped, two at a
    time, as long as that makes the longer of two parts shorter; then in order."""
    dealt: list[list[str]] = [[] for _ in range(count)]
    for name in sorted(LIMITS, key=lambda name: (name != GATE, -LIMITS[name])):
        min(dealt, key=seconds_of).append(name)
    while any(swapped(one, other) for one in dealt for other in dealt if seconds_of(one) > seconds_of(other)):
        pass
    return [[name for name in LIMITS if name in part] for part in dealt]


def seconds_of(part: Sequence[str]) -> float:
    return sum(LIMITS[name] + START_SECONDS for name in part)


def swapped(longer: list[str], shorter: list[str]) -> bool:
    """Swap the first two sections whose swap brings two parts closer to each other; False where there are none."""
    apart = seconds_of(longer) - seconds_of(shorter)
    for i, mine in enumerate(longer):
        for k, theirs in enumerate(shorter):
            if 0 < LIMITS[mine] - LIMITS[theirs] < apart and GATE not in (mine, theirs):
                longer[i], shorter[k] = theirs, mine
                return True
    return False


# -- a section's own process -------------------------------------------------------------------------------------------


def run_section(options: argparse.Namespace) -> int:
    """The child process: one section, within --minutes."""
    # Imported here, so that a section's broken import is that section's failure.
    from section_run import Run
    from sections import SECTIONS

    device = torch.device(options.device)
    deadline = time.monotonic() + options.minutes * 60
    run = Run(device, options.out / f"{options.section}.json", deadline, options.quick, options.full)
    run.result["machine"] = harness.machine(device)
    run.save()
    SECTIONS[options.section](run)
    run.result["machine_after"] = harness.machine(device)
    run.save()
    return 1 if run.result["red"] else 0


def child(command: list[str], seconds: float, **options: Any) -> int:
    """Exit code of a command; past its time it is interrupted, so that it says where it was, then ended with everything that
    it started, and TimeoutExpired raised."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        return process.wait(seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def environment() -> dict[str, str]:
    """This one, with mmfast importable also where it is not installed."""
    paths = [str(HERE.parent), str(HERE.parent / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def state_of(state: str, why: str, began: float) -> dict[str, Any]:
    return {"state": state, "why": why, "seconds": round(time.monotonic() - began, 1)}


def gate(options: argparse.Namespace, seconds: float, log: IO[str]) -> dict[str, Any]:
    """pytest -m gpu."""
    began = time.monotonic()
    # -v: of a run that is stopped, the log says what had passed. Left out: what compiles all that the sections compile again.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--maxfail=20", "--durations=15", "tests"]
    command += ["-p", "no:cacheprovider", "--deselect", "tests/test_run_all.py::test_every_section_runs_on_a_gpu"]
    if importlib.util.find_spec("xdist") is not None:  # most of the time goes into compiling kernels
        command += ["-n", str(min(14, os.cpu_count() or 1))]
    with tempfile.TemporaryFile("w+") as output:
        try:
            code = child(command, seconds, cwd=HERE.parent, stdout=output, stderr=output, env=environment())
        except subprocess.TimeoutExpired:
            code = None
        output.seek(0)
        said = output.read()
    log.write(f"== {GATE} ==\n{said}\n")
    log.flush()
    if code is None:
        return state_of("red", f"not done within {seconds:.0f} s", began)
    lines = said.strip().splitlines()
    return state_of("green" if code == 0 else "red", lines[-1] if lines else "no output", began)


def start(
    name: str, options: argparse.Namespace, seconds: float, folder: Path, log: IO[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a section in a child; how it went, and what it has found."""
    began = time.monotonic()
    command = [sys.executable, str(HERE / "run_all.py"), "--section", name, "--out", str(folder)]
    command += ["--device", options.device, "--minutes", f"{max(1.0, seconds - START_SECONDS) / 60:.3f}"]
    command += ["--quick"] * options.quick + ["--full"] * options.full
    with tempfile.TemporaryFile("w+") as errors:
        try:
            code = child(command, seconds, stderr=errors, env=environment())
        except subprocess.TimeoutExpired:
            code = None
        errors.seek(0)
        said = errors.read().strip()
    log.write(f"== {name} ==\n{said}\n")
    log.flush()
    file = folder / f"{name}.json"
    content = harness.read_json(file) if file.exists() else {}
    if code is None:
        return state_of("stopped", f"not done within {seconds:.0f} s", began), content
    if code == 1 and content.get("red"):
        return state_of("red", content["red"][0], began), content
    if code == 0:
        return state_of("green", "", began), content
    lines = said.splitlines()
    return state_of("failed", lines[-1] if lines else f"exit code {code}", began), content


# -- all of them -------------------------------------------------------------------------------------------------------


def run_all(options: argparse.Namespace, result: dict[str, Any], log: IO[str], work: Path) -> None:
    deadline = time.monotonic() + options.minutes * 60
    cuda = torch.device(options.device).type == "cuda"
    for name in chosen(options):
        left = deadline - time.monotonic()
        seconds = min(left, LIMITS[name] * (FULL if options.full else 1) + START_SECONDS)
        print(f"\n{name}", flush=True)
        if name == GATE and (not cuda or options.no_gate):
            result["gate"] = {"state": "skipped", "why": "--no-gate" if cuda else "no GPU", "seconds": 0.0}
        elif name == GATE:
            result["gate"] = gate(options, seconds, log)
        elif seconds < 2 * START_SECONDS:
            result["sections"][name] = {"state": "skipped", "why": f"{max(left, 0):.0f} s left", "seconds": 0.0}
        else:
            try:
                state, content = start(name, options, seconds, work, log)
            except Exception as error:  # one section must not take the rest with it
                state, content = {"state": "failed", "why": repr(error), "seconds": 0.0}, {}
            results_file.add_section(result, name, content, state)
        harness.write_json(options.out / results_file.FILE, result)


def table(states: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["section          state     seconds  remark"]
    for name, state in states.items():
        lines.append(f"{name:15}  {state['state']:8}  {state['seconds']:7.0f}  {state['why']}")
    return lines


def merge(options: argparse.Namespace) -> int:
    try:
        found = results_file.merged(results_file.read(options.merge))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for result in found:
        path = options.out / results_file.file_name(result)
        harness.write_json(path, result)
        print(*table({**({GATE: result["gate"]} if result["gate"] else {}), **result["sections"]}), sep="\n")
        print(f"written: {path}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        for name, seconds in LIMITS.items():
            print(f"{name:15}  {seconds:4} s")
        return 0
    if options.merge:
        return merge(options)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.section:
        return run_section(options)
    import mmfast

    facts = harness.machine(torch.device(options.device))
    command = shlex.join(["python", "benchmarks/run_all.py", *(sys.argv[1:] if arguments is None else arguments)])
    result = results_file.empty(facts, mmfast=mmfast.__version__, options=vars(options), command=command)
    if options.quick:
        result["quick"] = True
    with tempfile.TemporaryDirectory(prefix="mmfast-run-") as work, open(options.out / "log.txt", "w") as log:
        run_all(options, result, log, Path(work))
    states = {**({GATE: result["gate"]} if result["gate"] else {}), **result["sections"]}
    print("", *table(states), f"results in {options.out / results_file.FILE}", sep="\n")
    return 0 if all(state["state"] in ("green", "skipped") for state in states.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
