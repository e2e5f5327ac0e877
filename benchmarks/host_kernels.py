"""The C++ routines of the CPU beside plain copying: how much of the memory's bandwidth the gather and the stencil reach.

    python benchmarks/host_kernels.py --json out.json
    python benchmarks/host_kernels.py --clips 4 --rounds 5                # smaller, quicker

Each routine is held against its reference first. Beside each runs a copy that moves as many bytes, in the same rounds, so
that a share is of what the machine gave at that time; before each call the caches are filled with other memory.

Memory moves lines of 64 bytes, and a kept patch of a video is pieces of 16 or 48 bytes: so two shares are given, of bytes
that are wanted, and of bytes in the lines that hold them. Both count each byte read once and each byte written once. Lines
that lie apart are read more slowly than those of a copy, and a page of them is looked up for a few: "read only" is the share
of lines that a gather would have which took as long as a plain loop that reads those lines, in the same order, and does
nothing else (lines.cpp; needs a C++ compiler, CXX or g++).
"""

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from options import at_least, ratio
from report import aligned, machine_lines
from torch import Tensor
from variants import relative_error

from mmfast import sample_pack
from mmfast.adapters import FrameLayout
from mmfast_kernels.gather import gather_into, gather_tubes_ref
from mmfast_kernels.ted import Taps, ted_stencil, ted_stencil_ref

LINE = 64
CACHES = 128 << 20  # more bytes than any of them holds
TUBELET, PATCH, SIDE, FRAMES = 2, 16, 224, 16
LAYOUTS = {"interleaved": "as decoders write it, [B, F, H, W, C]", "planes": "[B, C, F, H, W]"}


@dataclass(frozen=True)
class Job:
    """One routine on one input.

    wanted: bytes read and written. moved: the same, of whole lines. read: reads those lines and no more, if it can be had.
    """

    name: str
    call: Callable[[], object]
    wanted: int
    moved: int
    read: Callable[[], object] | None = None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="host_kernels.py",
        description="The CPU's gather and stencil beside plain copying, checked. "
        "Exit codes: 0 done; 2 wrong options; 3 results differ, nothing timed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--clips", type=at_least(1), default=43, help="of 16 frames of 224 x 224")
    add("--mask-ratio", nargs="+", type=ratio, default=[0.0, 0.75, 0.9], metavar="R", help="share of tubes removed")
    add("--hidden", type=at_least(1), default=384, help="columns of each branch of the stencil")
    add("--threads", type=at_least(1), help="default: torch's")
    add("--rounds", type=at_least(2), default=15)
    add("--seed", type=at_least(0), default=0)
    add("--json", metavar="FILE", help="write everything")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = torch.device("cpu")
    result: dict[str, Any] = {"options": vars(options), "machine": harness.machine(device), "rows": []}
    print(*machine_lines(result["machine"], harness.ceilings(device, torch.float32)), sep="\n", flush=True)
    table: list[tuple[str, ...]] = [
        ("routine", "ms", "+-", "wanted GB/s", "lines GB/s", "copy GB/s", "share", "of lines", "read only")
    ]
    made: list[Callable[[], list[Job]]] = [
        partial(gathers, options, ratio, layout) for layout in LAYOUTS for ratio in options.mask_ratio
    ]
    made.append(partial(stencil, options))
    for make in made:
        try:
            jobs = make()
        except ArithmeticError as error:
            print(error, file=sys.stderr)
            return 3
        for job, row in zip(jobs, timed(jobs, options.rounds), strict=True):
            result["rows"].append(row)
            rates = (f"{row[key]:.1f}" for key in ("wanted_gb_s", "moved_gb_s", "copy_gb_s"))
            found = (row[key] for key in ("share", "share_of_lines", "share_read_only"))
            shares = ("-" if share is None else f"{share:.2f}" for share in found)
            timing = row["timing"]
            table.append((job.name, f"{timing.median:.2f}", f"{timing.spread:.0%}", *rates, *shares))
    print(*aligned(table), sep="\n")
    if options.json:
        harness.write_json(options.json, result)
    return 0


def timed(jobs: Sequence[Job], rounds: int) -> list[dict[str, Any]]:
    """Each job, a copy of as many bytes and the reading alone, in the same rounds."""
    calls: dict[str, harness.Call] = {}
    for job in jobs:
        source = torch.ones(job.wanted // 2, dtype=torch.uint8)
        target = torch.zeros_like(source)
        calls[job.name] = job.call
        calls[f"copy, {job.name}"] = partial(target.copy_, source)
        if job.read is not None:
            calls[f"read, {job.name}"] = job.read
    timings = cold(calls, rounds)
    rows = []
    for job in jobs:
        timing, copy, read = timings[job.name], timings[f"copy, {job.name}"], timings.get(f"read, {job.name}")
        wanted, moved = (count / timing.median / 1e6 for count in (job.wanted, job.moved))
        most = job.wanted / copy.median / 1e6
        rows.append(
            {"routine": job.name, "timing": timing, "copy": copy, "wanted_bytes": job.wanted, "moved_bytes": job.moved}
            | {"wanted_gb_s": wanted, "moved_gb_s": moved, "copy_gb_s": most}
            | {"share": wanted / most, "share_of_lines": moved / most, "read": read}
            | {"share_read_only": None if read is None else job.moved / read.median / 1e6 / most}
        )
    return rows


def cold(calls: dict[str, harness.Call], rounds: int) -> dict[str, harness.Timing]:
    """Interleaved as by harness.measure, but each call finds caches full of something else.

    Calls of a round read and write the same pixels, which would else still be there for the next.
    """
    others, names = torch.ones(CACHES // 8, dtype=torch.int64), list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            others.sum()
            samples[name].append(harness.time_once(calls[name], others.device))
    return {name: harness.Timing.of(taken[1:]) for name, taken in samples.items()}  # the first warmed up


# -- the routines ------------------------------------------------------------------------------------------------------


def gathers(options: argparse.Namespace, ratio: float, layout: str) -> list[Job]:
    """Kept tokens of uint8 clips as they are, and normalised to fp32."""
    pixels = torch.randint(0, 256, (options.clips, FRAMES, SIDE, SIDE, 3), dtype=torch.uint8)
    video = pixels.permute(0, 4, 1, 2, 3)
    if layout == "planes":
        video = video.contiguous()
    grid = (FRAMES // TUBELET, SIDE // PATCH, SIDE // PATCH)
    pack = sample_pack(options.clips, 1, grid, ratio, seed=options.seed)
    assert pack.length is not None
    ids = pack.keep_idx
    clips = torch.arange(options.clips, dtype=torch.int32).repeat_interleave(pack.length)
    lines = np.concatenate([lines_of(video, ids[clips == clip], clip) for clip in range(options.clips)])
    read = reading(video, lines)
    row = 3 * TUBELET * PATCH * PATCH
    jobs = []
    for dtype in (torch.uint8, torch.float32):
        affine = [None, None] if dtype == torch.uint8 else [torch.rand(3), torch.rand(3)]
        out = torch.empty(len(ids), row, dtype=dtype)
        call = partial(gather_into, out, video, ids, clips, TUBELET, PATCH, affine[0], affine[1])
        name = f"gather {layout}, ratio {ratio:g}, to {'uint8' if dtype == torch.uint8 else 'fp32'}"
        call()
        part = slice(0, pack.length)  # the first clip: the reference unfolds whole videos
        truth = gather_tubes_ref(video, ids[part], clips[part], TUBELET, PATCH, affine[0], affine[1], dtype)
        if not torch.allclose(out[part].float(), truth.float(), rtol=1e-6, atol=1e-6):
            raise ArithmeticError(f"{name}: differs from its reference; nothing timed")
        jobs.append(Job(name, call, len(ids) * row + out.nbytes, LINE * len(lines) + out.nbytes, read))
    return jobs


def lines_of(video: Tensor, ids: Tensor, clip: int) -> np.ndarray:
    """The lines of memory that hold the pixels of these tokens of a clip, each once, in the order of the tokens.

    They are counted from the line in which the video begins.
    """
    stride = video.stride()
    across = SIDE // PATCH
    token = ids.numpy().astype(np.int64)
    slot, y, x = token // across**2, token // across % across, token % across
    first = clip * stride[0] + slot * TUBELET * stride[2] + y * PATCH * stride[3] + x * PATCH * stride[4]
    together = stride[1] == 1  # channels side by side: a line of a patch is one piece
    pieces = [
        c * stride[1] + dt * stride[2] + dy * stride[3]
        for c in range(1 if together else video.shape[1])
        for dy in range(PATCH)
        for dt in range(TUBELET)
    ]
    length = PATCH * stride[4]
    begin = (first[:, None] + np.array(pieces)).ravel() + video.data_ptr() % LINE
    touched = np.stack([(begin + min(at, length - 1)) // LINE for at in range(0, length + LINE - 1, LINE)], 1).ravel()
    lines, seen_at = np.unique(touched, return_index=True)
    return lines[np.argsort(seen_at)].astype(np.int32)


def reading(video: Tensor, lines: np.ndarray) -> Callable[[], object] | None:
    """A call that reads these lines of the video and does nothing else."""
    library = compiled()
    if library is None:
        return None
    begin = video.data_ptr() // LINE * LINE

    def call(_keep: object = video) -> None:
        library.read_lines(begin, lines.ctypes.data, len(lines), torch.get_num_threads())

    return call


@cache
def compiled() -> ctypes.CDLL | None:
    """lines.cpp, or None and a word on stderr where it does not compile."""
    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lines.so"
        command = [os.environ.get("CXX", "g++"), "-O3", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        command += [f"-I{here.parent / 'csrc'}", str(here / "lines.cpp"), "-ldl", "-o", str(out)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"nothing under 'read only', {command[0]}: {getattr(error, 'stderr', error)}", file=sys.stderr)
            return None
        library = ctypes.CDLL(str(out))
    library.read_lines.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.read_lines.restype = ctypes.c_uint64
    return library


def stencil(options: argparse.Namespace) -> list[Job]:
    """A TED-Adapter's, over 4 clips of 8 frames of 197 tokens."""
    layout = FrameLayout.dense(4, 8, (14, 14))
    wide = options.hidden
    taps = Taps(*(torch.randn(shape) for shape in ((wide,), (wide, 3), (wide,), (wide,), (wide, 9), (wide,))))
    h = torch.randn(layout.sites.rows, 2 * wide)
    error = relative_error(
        ted_stencil(h, taps, layout.sites),
        ted_stencil_ref(h.double(), Taps(*(t.double() for t in taps)), layout.sites),
    )
    if not error <= 1e-6:
        raise ArithmeticError(f"stencil: relative error {error:.2e}, allowed 1e-6; nothing timed")
    moved = 2 * h.nbytes
    return [Job(f"stencil {h.shape[0]} x {h.shape[1]}", partial(ted_stencil, h, taps, layout.sites), moved, moved)]


if __name__ == "__main__":
    sys.exit(main())
