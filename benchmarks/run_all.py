"""Check, then time everything this machine can show, within a time budget.

    python benchmarks/run_all.py --out FOLDER [--minutes 9] [--only ladder_small attention]

First the GPU tests (pytest -m gpu). Then every section in a process of its own, so that one that fails, hangs or
loses the GPU leaves the others alone. Every section checks what it times: a wrong provider is named and has no time.
Results go to FOLDER/<section>.json as they come, and to FOLDER/summary.json. Exit code 0 only if all was green.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import torch

HERE = Path(__file__).resolve().parent
GATE_SHARE = 0.35  # of the whole time, at most
# In the order in which they run, with the seconds each may take at most.
LIMITS = {
    "ceilings": 45,
    "ladder_small": 220,
    "training": 200,
    "attention": 75,
    "kernels": 120,
    "host": 75,
    "ladder_base": 150,
}
START_SECONDS = 15.0  # importing torch and mmfast and waking the GPU


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run_all.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the JSON files go")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together (default 9)")
    parser.add_argument(
        "--only", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="sections to run; the default is all"
    )
    parser.add_argument("--no-gate", action="store_true", help="skip pytest -m gpu; the sections' own checks stay")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--section", choices=list(LIMITS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    return options


def run_section(options: argparse.Namespace) -> int:
    """The child process: one section, within --minutes."""
    # Imported here, so that a section's broken import is that section's failure.
    from sections import SECTIONS, Run

    device = torch.device(options.device)
    deadline = time.monotonic() + options.minutes * 60
    run = Run(device, options.out / f"{options.section}.json", deadline)
    run.result["machine"] = harness.machine(device)
    run.save()
    SECTIONS[options.section](run)
    run.result["machine_after"] = harness.machine(device)
    run.save()
    return 1 if run.result["red"] else 0


def child(command: list[str], seconds: float, **options: Any) -> int:
    """Exit code of a command; past its time it is ended with everything that it started, and TimeoutExpired raised."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        return process.wait(seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def environment() -> dict[str, str]:
    """This one, with mmfast importable also where it is not installed."""
    paths = [str(HERE.parent), str(HERE.parent / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def gate(folder: Path, seconds: float) -> dict[str, Any]:
    """pytest -m gpu, its output in gate.txt."""
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--maxfail=20", "-p", "no:cacheprovider", "tests"]
    if importlib.util.find_spec("xdist") is not None:  # most of the time goes into compiling kernels
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    with open(folder / "gate.txt", "w") as output:
        try:
            code = child(command, seconds, cwd=HERE.parent, stdout=output, stderr=output, env=environment())
        except subprocess.TimeoutExpired:
            return {"state": "red", "why": f"not done within {seconds:.0f} s", "seconds": seconds}
    lines = (folder / "gate.txt").read_text().strip().splitlines()
    said = lines[-1] if lines else "no output"
    return {"state": "green" if code == 0 else "red", "why": said, "seconds": time.monotonic() - began}


def start(name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run a section in a child and say how it went."""
    began = time.monotonic()
    command = [sys.executable, str(HERE / "run_all.py"), "--section", name, "--out", str(options.out)]
    command += ["--device", options.device, "--minutes", f"{(seconds - START_SECONDS) / 60:.3f}"]
    log = options.out / f"{name}.err.txt"
    with open(log, "w") as errors:
        try:
            code = child(command, seconds, stderr=errors, env=environment())
        except subprocess.TimeoutExpired:
            return {"state": "stopped", "why": f"not done within {seconds:.0f} s", "seconds": seconds}
    took = time.monotonic() - began
    if code == 0:
        return {"state": "green", "why": "", "seconds": took}
    if code == 1 and '"red": []' not in (options.out / f"{name}.json").read_text():
        return {"state": "red", "why": "a check failed; see its JSON", "seconds": took}
    said = log.read_text().strip().splitlines()
    return {"state": "failed", "why": said[-1] if said else f"exit code {code}", "seconds": took}


def main() -> int:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.section:
        return run_section(options)
    deadline = time.monotonic() + options.minutes * 60
    device = torch.device(options.device)
    summary: dict[str, Any] = {"machine": harness.machine(device), "minutes": options.minutes, "sections": {}}
    if device.type != "cuda" or options.no_gate:
        why = "no GPU" if device.type != "cuda" else "--no-gate"
        summary["gate"] = {"state": "skipped", "why": why, "seconds": 0.0}
    else:
        print("gate: pytest -m gpu", flush=True)
        summary["gate"] = gate(options.out, options.minutes * 60 * GATE_SHARE)
    print(f"gate {summary['gate']['state']}: {summary['gate']['why']}", flush=True)
    for name in options.only:
        left = deadline - time.monotonic()
        seconds = min(left, LIMITS[name] + START_SECONDS)
        if seconds < 2 * START_SECONDS:
            summary["sections"][name] = {"state": "skipped", "why": f"{max(left, 0):.0f} s left", "seconds": 0.0}
            continue
        print(f"\n{name}", flush=True)
        try:
            summary["sections"][name] = start(name, options, seconds)
        except Exception as error:  # one section must not take the rest with it
            summary["sections"][name] = {"state": "failed", "why": repr(error), "seconds": 0.0}
        harness.write_json(options.out / "summary.json", summary)
    harness.write_json(options.out / "summary.json", summary)
    print("\nsection          state     seconds  remark")
    states = {"gate": summary["gate"], **summary["sections"]}
    for name, state in states.items():
        print(f"{name:15}  {state['state']:8}  {state['seconds']:7.0f}  {state['why']}")
    print(f"results in {options.out}")
    return 0 if all(state["state"] in ("green", "skipped") for state in states.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
