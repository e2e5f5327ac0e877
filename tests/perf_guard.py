"""What must not change unseen and needs no clock: instructions of kernels and host routines, work of the models.

python tests/perf_guard.py [PART ...]             compare with tests/baselines; exits with 1 on a difference
python tests/perf_guard.py --update [PART ...]    measure, and write the baselines

PART is kernels (machine code), models (ops, operations and bytes of a layer), roofline (what benchmarks/roofline.py
counts) or native (instructions of csrc under callgrind). A figure may move by 3 %, either way. Figures hold for one
version of what makes them, the key of a baseline: a file may have several, and a version without one is not compared.
"""

import argparse
import json
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import perf_kernels
import perf_models
import perf_native
import perf_roofline

FOLDER = Path(__file__).parent / "baselines"
TOLERANCE = 0.03

Figures = dict[str, float]
Baselines = dict[str, dict[str, Figures]]  # by version, then by case


class NothingToCompare(Exception):
    """No baseline for the version here, or nothing here to measure with; says which, and what to do."""


@dataclass(frozen=True)
class Part:
    """Figures of one kind.   version: of what makes them; ImportError or OSError says what is missing here."""

    cases: Collection[str]
    version: Callable[[], str]
    measure: Callable[[str], Figures]


PARTS = {
    "kernels": Part(perf_kernels.CASES.keys(), perf_kernels.version, perf_kernels.measure),
    "models": Part(perf_models.CASES.keys(), perf_models.version, perf_models.measure),
    "roofline": Part(perf_roofline.CASES.keys(), lambda: "any", perf_roofline.measure),
    "native": Part(perf_native.CASES.keys(), perf_native.version, perf_native.measure),
}


def command(part: str) -> str:
    return f"python tests/perf_guard.py --update {part}"


def load(part: str) -> Baselines:
    path = FOLDER / f"{part}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def version_of(part: str) -> str:
    """The version whose baseline holds here."""
    try:
        return PARTS[part].version()
    except (ImportError, OSError) as error:
        raise NothingToCompare(f"{part} cannot be measured here: {error}") from error


def check(part: str, case: str) -> None:
    """AssertionError with both numbers of every figure that moved; NothingToCompare where there is no baseline."""
    version, known = version_of(part), load(part)
    if version not in known:
        raise NothingToCompare(
            f"no {part} baseline of {version!r}, only of {', '.join(known) or 'nothing'}; to make one: {command(part)}"
        )
    moved = differences(known[version].get(case), PARTS[part].measure(case))
    if moved:
        raise AssertionError("\n".join([f"{part}, {case} ({version}):", *moved, f"If that is meant: {command(part)}"]))


def differences(before: Figures | None, now: Figures) -> list[str]:
    """A line for every figure that moved by more than TOLERANCE."""
    if before is None:
        return ["  is not in the baseline"]
    lines = []
    for name in sorted({*before, *now}):
        old, new = before.get(name, 0), now.get(name, 0)
        if abs(new - old) > TOLERANCE * abs(old):
            change = f"{100 * (new - old) / old:+.1f} %" if old else "new"
            lines.append(f"  {name}: {old:,} in the baseline, {new:,} now ({change})")
    return lines


def update(part: str) -> None:
    """Measure every case, and replace the baseline of the version here; those of other versions stay."""
    version, known = version_of(part), load(part)
    known[version] = {case: PARTS[part].measure(case) for case in PARTS[part].cases}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{part}.json").write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="perf_guard.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--update", action="store_true", help="write the baselines in place of comparing")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"PART is one of {', '.join(PARTS)}, got {part!r}")
    return max(_run(part, options.update) for part in options.parts or PARTS)


def _run(part: str, updating: bool) -> int:
    """1 where a figure moved, after saying what was found."""
    said = []
    try:
        if updating:
            update(part)
        else:
            for case in PARTS[part].cases:
                try:
                    check(part, case)
                except AssertionError as moved:
                    said.append(f"{moved}\n")
        result = "written" if updating else "different" if said else "as in the baseline"
    except NothingToCompare as reason:
        result = f"skipped, {reason}"
    sys.stdout.write(f"{part}: {result}\n{''.join(said)}")
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
