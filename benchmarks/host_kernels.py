"""The C++ routines of the CPU beside plain copying: how much of the memory's bandwidth the gather and the stencil reach.

    python benchmarks/host_kernels.py --json out.json
    python benchmarks/host_kernels.py --clips 4 --rounds 5                # smaller, quicker

Each routine is held against its reference first. Beside each runs a copy that moves as many bytes, in the same rounds, so
that a share is of what the machine gave at that time. Memory moves lines of 64 bytes, and a kept patch of a video is pieces of
16 or 48 bytes: so two shares are given, of bytes that are wanted, and of bytes in the lines that hold them. Both count each
byte read once and each byte written once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
TUBELET, PATCH, SIDE, FRAMES = 2, 16, 224, 16
LAYOUTS = {"interleaved": "as decoders write it, [B, F, H, W, C]", "planes": "[B, C, F, H, W]"}


@dataclass(frozen=True)
class Job:
    """One routine on one input.   wanted: bytes read and written. moved: the same, of whole lines."""

    name: str
    call: Callable[[], object]
    wanted: int
    moved: int


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
        ("routine", "ms", "+-", "wanted GB/s", "lines GB/s", "copy GB/s", "share", "of lines")
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
            shares = (f"{row[key]:.2f}" for key in ("share", "share_of_lines"))
            timing = row["timing"]
            table.append((job.name, f"{timing.median:.2f}", f"{timing.spread:.0%}", *rates, *shares))
    print(*aligned(table), sep="\n")
    if options.json:
        harness.write_json(options.json, result)
    return 0


def timed(jobs: Sequence[Job], rounds: int) -> list[dict[str, Any]]:
    """Each job and a copy of as many bytes, in the same rounds."""
    calls: dict[str, harness.Call] = {}
    for job in jobs:
        source = torch.ones(job.wanted // 2, dtype=torch.uint8)
        target = torch.zeros_like(source)
        calls[job.name] = job.call
        calls[f"copy, {job.name}"] = partial(target.copy_, source)
    timings = harness.measure(calls, torch.device("cpu"), rounds=rounds, warmup=1)
    rows = []
    for job in jobs:
        timing, copy = timings[job.name], timings[f"copy, {job.name}"]
        wanted, moved = (count / timing.median / 1e6 for count in (job.wanted, job.moved))
        most = job.wanted / copy.median / 1e6
        rows.append(
            {"routine": job.name, "timing": timing, "copy": copy, "wanted_bytes": job.wanted, "moved_bytes": job.moved}
            | {"wanted_gb_s": wanted, "moved_gb_s": moved, "copy_gb_s": most}
            | {"share": wanted / most, "share_of_lines": moved / most}
        )
    return rows


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
    lines = LINE * sum(lines_of(video, ids[clips == clip], clip) for clip in range(options.clips))
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
        jobs.append(Job(name, call, len(ids) * row + out.nbytes, lines + out.nbytes))
    return jobs


def lines_of(video: Tensor, ids: Tensor, clip: int) -> int:
    """How many lines of memory hold the pixels of these tokens of a clip."""
    stride = video.stride()
    across = SIDE // PATCH
    token = ids.numpy().astype(np.int64)
    slot, y, x = token // across**2, token // across % across, token % across
    first = clip * stride[0] + slot * TUBELET * stride[2] + y * PATCH * stride[3] + x * PATCH * stride[4]
    together = stride[1] == 1  # channels side by side: a line of a patch is one piece
    pieces = [
        c * stride[1] + dt * stride[2] + dy * stride[3]
        for c in range(1 if together else video.shape[1])
        for dt in range(TUBELET)
        for dy in range(PATCH)
    ]
    length = PATCH * stride[4]
    begin = (first[:, None] + np.array(pieces)).ravel() + video.data_ptr() % LINE
    touched = [(begin + min(at, length - 1)) // LINE for at in range(0, length + LINE - 1, LINE)]
    return len(np.unique(np.concatenate(touched)))


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
