"""MM-CDFSL's ablations in miniature, on the synthetic cross-domain set: pre-training, distillation, episodes, masks.

A tiny ViT is pre-trained and distilled in every way of the paper's ablation, frozen, and scored by few-shot episodes on target
classes that nothing was trained on. What is printed is what was measured, also where the paper's effect does not show.

    python benchmarks/synthetic_cdfsl.py --json results/synthetic_cdfsl.json --markdown results/synthetic_cdfsl.md
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from harness import machine, write_json
from synthetic_lab import DIFFICULTY, FIRST, RATIOS, ROWS, SECOND, Lab, Run, draw, say
from synthetic_report import markdown, plot


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="synthetic_cdfsl.") as scratch, workers(options.jobs) as pool:
        folder = Path(scratch)
        clips = draw(options, folder)
        say(f"drew {sum(clips.values())} clips in {time.perf_counter() - started:.0f} s")
        found = [row for runs in (FIRST, SECOND) for row in each(pool, partial(do_row, options, folder), runs)]
        sweep = [row for rows in each(pool, partial(do_sweep, options, folder), RATIOS) for row in rows]
        order = do_order(options, folder)
    rows = sorted(found, key=lambda row: ROWS.index(row["key"]))
    report = {
        "machine": machine(torch.device("cpu")),
        "options": {k: v for k, v in vars(options).items() if k not in ("json", "markdown", "plot")},
        "difficulty": DIFFICULTY,
        "clips": clips,
        "minutes": (time.perf_counter() - started) / 60,
        "ablation": rows,
        "sweep": sweep,
        "order": order,
    }
    text = markdown(report)
    print(text)
    if options.json:
        write_json(options.json, report)
    if options.markdown:
        aside = options.markdown.with_name(f".{options.markdown.name}")
        aside.write_text(text + "\n")
        aside.replace(options.markdown)
    if options.plot:
        plot(report, options.plot)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=4000, help="of each pre-training on rgb")
    add("--teacher-steps", type=int, default=2000, help="of each on flow and pose, which learn sooner")
    add("--distill-steps", type=int, default=3000)
    add("--batch", type=int, default=32, help="source clips of a step, and as many target clips")
    add("--source-clips", type=int, default=400, help="of each of 16 classes")
    add("--target-clips", type=int, default=300, help="of each of 10 classes, without their labels")
    add("--test-clips", type=int, default=60, help="of each of 10 classes, for the episodes")
    add("--episodes", type=int, default=600)
    add("--mask-ratio", type=float, default=0.75, help="in pre-training and distillation")
    add("--rate", type=float, default=1.5e-3, help="learning rate of pre-training")
    add("--distill-rate", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes of one thread each")
    add("--json", type=Path)
    add("--markdown", type=Path)
    add("--plot", type=Path)
    options = parser.parse_args(arguments)
    for name in ("json", "markdown", "plot"):
        path = getattr(options, name)
        if path and not path.resolve().parent.is_dir():
            parser.error(f"{path.resolve().parent} is no folder to write {path} into")
    return options


@contextmanager
def workers(jobs: int) -> Iterator[Executor | None]:
    """Processes of one thread each; None where there is but one job at a time, which this process does."""
    if jobs < 2:
        yield None
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def each(pool: Executor | None, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    return [work(item) for item in items] if pool is None else list(pool.map(work, items))


def do_row(options: argparse.Namespace, folder: Path, run: Run) -> dict[str, Any]:
    return Lab(options, folder).row(run)


def do_sweep(options: argparse.Namespace, folder: Path, ratio: float) -> list[dict[str, Any]]:
    return Lab(options, folder).sweep(SECOND[0], ratio)


def do_order(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    return Lab(options, folder).order(SECOND[0])


if __name__ == "__main__":
    sys.exit(main())
