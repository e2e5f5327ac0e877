"""Ensemble masked inference on videos: the classes of every file, and a ladder of timings that is checked first.

    python benchmarks/ensemble_masked.py                                    # draws clips, random weights
    python benchmarks/ensemble_masked.py --video clips/ --checkpoint w.pth --views 2 4 --json out.json --plot out.png

For all tokens and for every (ratio, views): the published path, its steps towards a strong baseline, and mmfast. Before
anything is timed, the probabilities of every rung are held against the published path in fp32.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import plot
import report
import torch
from clips import RENDERED, Clips, batches, have_av
from ladder import climb, spread_weights
from options import parse
from report import Ladder
from torch import Tensor
from variants import OURS, Case, Gate, Rungs, check

import mmfast
from mmfast import MaskedViT, profiling
from mmfast.masks import kept_per_slot

SECONDS = {"cpu": 12.0, "cuda": 20.0}  # for timing a case, unless --rounds says otherwise
PREDICT_BATCH = 8  # clips decoded and classified at a time


class Stop(Exception):
    """Ends the program: exit code and what to say."""

    def __init__(self, code: int, *lines: str) -> None:
        super().__init__(code, lines)
        self.code, self.lines = code, lines


def load_model(options: Namespace) -> MaskedViT:
    """The model in eval mode on its device, in fp32."""
    try:
        if options.checkpoint:
            model = MaskedViT.from_pretrained(options.checkpoint)
        else:
            model = MaskedViT.from_name(options.model, num_classes=options.num_classes)
            spread_weights(model, options.seed)
    except (ValueError, TypeError, OSError) as error:
        raise Stop(2, f"error: {error}") from None
    if model.config.num_classes == 0:
        raise Stop(2, f"error: {options.checkpoint} has no classifier, so there are no probabilities to average")
    if model.config.in_chans != 3:
        raise Stop(2, f"error: the model takes {model.config.in_chans} channels; this benchmark reads RGB video")
    height, width = model.config.frame_size
    if height != width:
        raise Stop(2, f"error: the model takes {height} x {width} frames; this benchmark makes square clips")
    return model.eval().requires_grad_(False).to(options.device)


def grid_of_cases(options: Namespace, model: MaskedViT) -> list[Case]:
    """All tokens first, then every (ratio or keep, views)."""
    grid = model.config.grid
    slots, cells = grid[0], grid[1] * grid[2]
    try:
        if options.keep:
            kept = [kept_per_slot(grid, 0.0, keep) for keep in options.keep]
        else:
            kept = [kept_per_slot(grid, ratio) for ratio in options.mask_ratio]
    except ValueError as error:
        raise Stop(2, f"error: --keep: {error}") from None
    masked = [Case(views, k, cells, slots) for k in dict.fromkeys(kept) if k < cells for views in options.views]
    return [Case(1, cells, cells, slots), *dict.fromkeys(masked)]


def source_of_clips(options: Namespace, clips: Clips) -> Iterator[Tensor]:
    if options.video:
        if not have_av():
            raise Stop(2, "error: reading video needs PyAV: pip install av")
        clips.source = "files"
        return clips.decoded(options.video)
    count = max(RENDERED, options.clips if options.device.type == "cuda" else RENDERED)
    if have_av():
        clips.source = f"{count} drawn clips, encoded as mp4 and decoded"
        return clips.written_and_read(count, options.seed)
    clips.source = f"{count} drawn clips; PyAV is not installed, so nothing was encoded or decoded"
    return clips.rendered(count, options.seed)


def classify(options: Namespace, model: MaskedViT, clips: Clips, case: Case) -> tuple[Tensor, Tensor]:
    """Probabilities of every clip under `case`, [B, K] on the CPU, and the uint8 video of the batch to be timed."""
    probs, kept_back, first = [], [], 0
    for video in batches(source_of_clips(options, clips), PREDICT_BATCH):
        ids = range(first, first + video.shape[0])
        part = model.ensemble(video, views=case.views, keep=case.kept, seed=options.seed, clip_ids=list(ids))
        probs.append(part.float().cpu())
        if first < options.clips:
            kept_back.append(video[: options.clips - first])
        first += video.shape[0]
    if not probs:
        raise Stop(2, *clips.bad, f"error: none of the {len(clips.bad)} videos could be read")
    timed = torch.cat([video.permute(0, 2, 3, 4, 1) for video in kept_back])
    return torch.cat(probs), timed.permute(0, 4, 1, 2, 3).to(options.device)


def profile(path: str, rungs: Rungs, cases: list[Case]) -> str:
    """Run mmfast once a case with ranges on; a profiler that waits for cudaProfilerStart sees just this."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    nvtx = profiling.enable()
    cuda = rungs.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    if cuda:
        torch.cuda.profiler.start()
    with harness.quiet_stderr(), record(activities=activities) as recorded:
        for case in cases:
            rungs.calls(case)[OURS]()
        harness.synchronize(rungs.device)
    if cuda:
        torch.cuda.profiler.stop()
    profiling.enable(False)
    recorded.export_chrome_trace(path)
    return f"trace in {path}" + ("" if nvtx else "; no NVTX ranges: the package nvtx is not installed")


def run(options: Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = load_model(options)
    cases = grid_of_cases(options, model)
    config = model.config
    clips = Clips(config.num_frames, config.frame_size[0])
    facts = harness.machine(options.device)
    exact_state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to(options.dtype)
    shown = cases[1] if len(cases) > 1 else cases[0]
    probs, video = classify(options, model, clips, shown)
    model_name = options.checkpoint or f"{options.model}, random weights"
    rungs = Rungs(
        model,
        exact_state,
        video,
        seed=options.seed,
        dtype=options.dtype,
        hugging_face=options.hf,
        compiled=not options.no_compile,
    )
    checked: list[tuple[Case, dict[str, harness.Call], Gate]] = []
    for case in cases:
        calls = rungs.calls(case)
        gate = check(rungs, case, calls)
        if gate.red:
            raise Stop(3, *report.gate_lines(case, gate))
        checked.append((case, calls, gate))
    limits = harness.ceilings(options.device, options.dtype)
    print(*report.machine_lines(facts, limits), sep="\n")
    print(f"{model_name}; {options.dtype}; {clips.source}; {video.shape[0]} clips timed; seed {options.seed}\n")
    ladders = []
    for case, calls, gate in checked:
        ladders.append(climb(rungs, case, calls, gate, rounds=options.rounds, budget=SECONDS[options.device.type]))
        print(*report.ladder_lines(ladders[-1]), "", sep="\n", flush=True)
    print(f"classes, {shown.title}" + ("" if options.checkpoint else " (random weights: they mean nothing)"))
    print(*report.prediction_lines(clips.names, probs), sep="\n")
    if options.json:
        harness.write_json(options.json, as_json(options, facts, limits, ladders, clips, probs, shown))
        print(f"written: {options.json}")
    if options.plot:
        save_plot(options, ladders, facts, model_name)
    if options.profile:
        print(profile(options.profile, rungs, cases))
    if clips.bad:
        print(f"{len(clips.bad)} videos could not be read:", *(f"  {line}" for line in clips.bad), sep="\n")
    return 1 if clips.bad else 0


def save_plot(options: Namespace, ladders: list[Ladder], facts: dict[str, Any], model_name: str) -> None:
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    dtype = str(options.dtype).removeprefix("torch.")
    try:
        plot.save(options.plot, ladders, f"{model_name}, {dtype}, {ladders[0].rows[0].clips} clips, {where}")
    except ImportError:
        print("no figure: matplotlib is not installed", file=sys.stderr)
    else:
        print(f"written: {options.plot}")


def as_json(
    options: Namespace,
    facts: dict[str, Any],
    limits: dict[str, float],
    ladders: list[Ladder],
    clips: Clips,
    probs: Tensor,
    shown: Case,
) -> dict[str, Any]:
    return {
        "mmfast": mmfast.__version__,
        "options": vars(options),
        "machine": facts,
        "ceilings": limits,
        "clips": clips.source,
        "ladders": [ladder.as_json() for ladder in ladders],
        "predicted_with": shown.title,
        "files": [
            {"name": name, "class": int(row.argmax()), "probabilities": row.tolist()}
            for name, row in zip(clips.names, probs, strict=True)
        ],
        "unreadable": clips.bad,
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    for target in (options.json, options.plot, options.profile):
        if target and not Path(target).resolve().parent.is_dir():
            print(f"error: {Path(target).resolve().parent} is no folder to write {target} into", file=sys.stderr)
            return 2
    try:
        return run(options)
    except Stop as stop:
        print(*stop.lines, sep="\n", file=sys.stderr)
        return stop.code


if __name__ == "__main__":
    sys.exit(main())
