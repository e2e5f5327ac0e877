"""run_all.py's sections of whole models: ladders, the grid over ratio, views and batch, latency, and clips in host memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import harness
import probes
import tiny
import torch
from harness import Call
from ladder import climb, spread_weights
from peers import kept_ids
from report import aligned, gate_lines, ladder_lines
from section_run import Run
from torch import Tensor
from variants import OURS, Case, Gate, Rungs, check, relative_error

from mmfast import MaskedViT, tube_masks

CLASSES = 204
CELLS, SLOTS = 196, 8
KEPT = {0.0: 196, 0.5: 98, 0.75: 49, 0.9: 20}  # mask ratio -> cells of 196 that stay in each slot
VIEWS = (1, 2, 4, 8)
BATCHES = (1, 4, 16, 43, 86)
MOST_TOKENS = 140_000  # of a batch in the grid: what is larger only repeats the rate
MOST_IN_GRAPHS = 40_000  # tokens of a batch that plain torch also runs as a CUDA graph: more hide its launches
SIZES = ("small", "base", "large")
# Of the grid, what is measured without --full: the batches of each model, and of its usual cases.
USUAL = ((0.75, 2), (0.9, 2))
CPU_CASES = ((0.0, 1), (0.5, 2), (0.75, 1), (0.75, 2), (0.75, 4), (0.9, 2), (0.9, 8))


def name_of(size: str) -> str:
    return f"videomae_{size}_patch16_224"


@dataclass
class Loaded:
    """A model with random weights on the device, and its weights in fp32, not cast."""

    name: str
    model: MaskedViT
    state: dict[str, Tensor]
    cells: int = CELLS
    slots: int = SLOTS
    made: Rungs | None = None  # once, without compiled ones

    @classmethod
    def of(cls, run: Run, name: str) -> "Loaded":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        grid: dict[str, Any] = {}
        if run.quick:
            tiny.register()
            name, grid = tiny.NAME, {"cells": tiny.CELLS, "slots": tiny.SLOTS}
        model = MaskedViT.from_name(name, num_classes=5 if run.quick else CLASSES)
        spread_weights(model, 0)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        model = model.eval().requires_grad_(False).to(run.device, run.dtype)
        return cls(name, model, state, **grid)

    def case(self, kept: int, views: int) -> Case:
        """kept: of 196 cells; of a tiny model's as large a share."""
        return Case(views, max(1, kept * self.cells // CELLS), self.cells, self.slots)

    def rungs(self, run: Run, video: Tensor, *, compiled: bool = False, graphs: bool = True) -> Rungs:
        """Every way there is; compiled ones on a GPU alone, as they take minutes on a CPU."""
        make = partial(Rungs, self.model, self.state, video, dtype=run.dtype, fused=True, graphs=graphs)
        if compiled and run.cuda:
            return make(compiled=True)
        if self.made is None:
            self.made = make(compiled=False)
        return self.made.on(video, graphs)

    def video(self, clips: int) -> Tensor:
        """uint8 [B, C, F, H, W] over a decoder's layout, in host memory."""
        config = self.model.config
        frames = torch.randint(
            0, 256, (clips, config.num_frames, *config.frame_size, config.in_chans), dtype=torch.uint8
        )
        return frames.permute(0, 4, 1, 2, 3)


def passed(run: Run, what: str, case: Case, gate: Gate) -> Gate | None:
    """The gate without what is wrong; None where mmfast or the published path is: then nothing can be compared."""
    for name, why in gate.crashed.items():
        if name.startswith(OURS):
            run.red(f"{what}, {name}", why)
    if not gate.red:
        return gate
    run.red(what, "; ".join(gate_lines(case, gate)))
    return None if any(name == OURS or name.startswith("published") for name in gate.red) else gate.without(gate.red)


# -- ladders -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One ladder: how many clips, how many of 196 cells are kept, views; seconds it is expected to take."""

    clips: int
    kept: int
    views: int
    compiled: bool
    seconds: float


def ladder(run: Run, name: str, plans: Sequence[Plan]) -> None:
    """All rungs, with memory, kernels and the seconds that compiling took."""
    loaded = Loaded.of(run, name)
    for plan in plans:
        case = loaded.case(plan.kept, plan.views)
        what = f"{loaded.name}, {plan.clips} clips, {case.title}"
        if not run.enough(what, plan.seconds):
            continue
        with run.guarded(what):
            climbed(run, loaded, plan, case, what)


def climbed(run: Run, loaded: Loaded, plan: Plan, case: Case, what: str) -> None:
    rungs = loaded.rungs(run, loaded.video(plan.clips).to(run.device), compiled=plan.compiled)
    calls = rungs.calls(case)
    compiled = {name: calls[name] for name in (f"strong, {mode}" for mode in rungs.compiled)}
    compile_seconds = probes.first_call_seconds(compiled, run.device)
    gate = passed(run, what, case, check(rungs, case, calls))
    if gate is None:
        return
    budget = min(15.0, max(4.0, run.left / 3))
    done = climb(rungs, case, calls, gate, rounds=2 if run.quick else None, budget=budget)
    kernels = probes.kernels_of_each({name: calls[name] for name in gate.errors}, run.device)
    row = {"model": loaded.name, "clips": plan.clips, "dtype": run.dtype} | done.as_json()
    run.add(row | {"compile_seconds": compile_seconds, "kernels": kernels})
    print(what, *ladder_lines(done), f"  first calls, s: {compile_seconds}", sep="\n", flush=True)


def ladder_small(run: Run) -> None:
    """ViT-S, resident pixels."""
    plans = [
        Plan(43, 49, 2, True, 75),
        Plan(105, 20, 2, False, 20),
        Plan(21, 196, 1, False, 20),
        Plan(43, 48, 2, False, 20),
        Plan(21, 49, 4, False, 20),
        Plan(21, 98, 2, False, 20),
    ]
    if not run.cuda:
        plans = [Plan(1, 49, 2, False, 20), Plan(1, 20, 2, False, 15), Plan(1, 196, 1, False, 40)]
    ladder(run, name_of("small"), plans[:1] if run.quick else plans)


def ladder_base(run: Run) -> None:
    """ViT-B, resident pixels."""
    plans = [Plan(43, 49, 2, True, 75), Plan(43, 20, 2, False, 20), Plan(21, 196, 1, False, 20)]
    if not run.cuda:
        plans = [Plan(1, 49, 2, False, 40)]
    ladder(run, name_of("base"), plans[:1] if run.quick else plans)


def ladder_large(run: Run) -> None:
    """ViT-L, resident pixels."""
    if not run.cuda and not run.quick:
        return run.skip("ViT-L", "too long for a CPU")
    plans = [Plan(21, 49, 2, True, 90), Plan(21, 20, 2, False, 20)]
    ladder(run, name_of("large"), plans[:1] if run.quick else plans)


# -- the grid ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    size: str
    ratio: float
    views: int
    clips: int

    @property
    def tokens(self) -> int:
        return self.clips * self.views * KEPT[self.ratio] * SLOTS


def covering(run: Run) -> list[Cell]:
    """What is measured of the grid, the cases that matter most first, one model after another.

    Every ratio and number of views of every model at one or two batches, the usual cases at all; with --full everything.
    """
    if run.quick:
        return [Cell("small", 0.5, 1, 1), Cell("small", 0.75, 2, 2)]
    if not run.cuda:
        cells = [Cell("small", ratio, views, clips) for clips in (1, 4) for ratio, views in CPU_CASES]
        return sorted(cells, key=lambda cell: ((cell.ratio, cell.views) not in USUAL, cell.tokens))
    some = {"small": (16, 86), "base": (16, 43), "large": (4,)}
    cells = []
    for size in SIZES:
        cases = [*USUAL, *((r, p) for r in KEPT for p in (VIEWS if r else (1,)) if (r, p) not in USUAL)]
        for ratio, views in cases:
            batches = BATCHES if run.full or (ratio, views) in USUAL else some[size]
            cells += [Cell(size, ratio, views, clips) for clips in batches]
    return [cell for cell in cells if cell.clips == 1 or cell.tokens <= MOST_TOKENS]


def grid_names(names: Sequence[str]) -> list[str]:
    """Of the rungs: the published path, torch's attention kernels with and without a CUDA graph, mmfast."""
    left_out = ("published, TF32", "published + SDPA", "strong, efficient")
    return [name for name in names if not name.startswith(left_out)]


def grid(run: Run) -> None:
    """Clips a second over ratio, views and batch."""
    loaded: Loaded | None = None
    size = ""
    for cell in covering(run):
        if not run.enough(str(cell), 4.0 if run.cuda else 10.0):
            continue
        if loaded is None or cell.size != size:
            loaded, size = Loaded.of(run, name_of(cell.size)), cell.size
        with run.guarded(str(cell)):
            one_cell(run, loaded, cell)


def one_cell(run: Run, loaded: Loaded, cell: Cell) -> None:
    case = loaded.case(KEPT[cell.ratio], cell.views)
    what = f"{loaded.name}, {cell.clips} clips, {case.title}"
    video = loaded.video(cell.clips).to(run.device)
    rungs = loaded.rungs(run, video, graphs=cell.tokens <= MOST_IN_GRAPHS)
    calls = rungs.calls(case)
    calls = {name: calls[name] for name in grid_names(list(calls))}
    gate = passed(run, what, case, check(rungs, case, calls))
    if gate is None:
        return
    timed = {name: call for name, call in calls.items() if name in gate.errors and name != "published, fp32"}
    rounds = 2 if run.quick or not run.cuda else 3
    timings = harness.measure(timed, run.device, rounds=rounds, warmup=2 if run.cuda else 0, what=what)
    about = {
        "model": loaded.name,
        "clips": cell.clips,
        "mask_ratio": cell.ratio,
        "case": asdict(case),
        "dtype": run.dtype,
    }
    run.add(about | {"timings": timings, "errors": dict(gate.errors), "left_out": dict(gate.crashed)})
    peer = min((t.median for name, t in timings.items() if not name.startswith(OURS)), default=float("nan"))
    own = min(t.median for name, t in timings.items() if name.startswith(OURS))
    rate = cell.clips / own * 1e3
    print(f"  {what}: mmfast {own:.4g} ms, {rate:.5g} clips/s, best peer / mmfast {peer / own:.2f}", flush=True)


# -- latency and clips in host memory ----------------------------------------------------------------------------------


def latency(run: Run) -> None:
    """Wall time of one small batch, its probabilities back in host memory; from pixels on the device, and from pinned ones."""
    plans: Iterator[tuple[str, int, int, int, bool]] = iter(
        [("small", 49, 2, 1, True)]
        + [(size, 49, 2, clips, False) for size in SIZES for clips in (1, 4) if (size, clips) != ("small", 1)]
        + [("small", kept, views, 1, False) for kept, views in ((196, 1), (20, 2), (49, 1))]
    )
    if not run.cuda:
        plans = iter([("small", 49, 2, 1, False), ("small", 20, 2, 1, False)])
    loaded, size = None, ""
    for count, (wanted, kept, views, clips, compiled) in enumerate(plans):
        if run.quick and count:
            break
        if not run.enough(f"latency, {wanted}, {clips} clips", 50 if compiled else 6):
            continue
        if loaded is None or wanted != size:
            loaded, size = Loaded.of(run, name_of(wanted)), wanted
        with run.guarded(f"latency, {wanted}, {clips} clips"):
            one_latency(run, loaded, loaded.case(kept, views), clips, compiled)


def one_latency(run: Run, loaded: Loaded, case: Case, clips: int, compiled: bool) -> None:
    what = f"latency, {loaded.name}, {clips} clips, {case.title}"
    pixels = pinned(loaded.video(clips)) if run.cuda else loaded.video(clips)
    video = pixels.to(run.device)
    rungs = loaded.rungs(run, video, compiled=compiled)
    calls = rungs.calls(case)
    gate = passed(run, what, case, check(rungs, case, calls))
    if gate is None:
        return
    wanted = [name for name in grid_names(list(gate.errors)) if name != "published, fp32"]
    done: dict[str, Call] = {name: partial(to_host, calls[name]) for name in wanted}
    if run.cuda:
        for name, model in rungs.own.items():
            ours = partial(model.ensemble, pixels, views=case.views, keep=case.kept, seed=rungs.seed)
            done[f"{name}, from pinned memory"] = partial(to_host, ours)
        done["strong, from pinned memory"] = strong_from_host(rungs, pixels, case, clips)
    rounds = 2 if run.quick else 60 if run.cuda else 5
    # Wall time, as whoever waits for the answer sees it.
    timings = harness.measure(done, torch.device("cpu"), rounds=rounds, warmup=3 if run.cuda else 1, what=what)
    run.add({"model": loaded.name, "clips": clips, "case": asdict(case), "dtype": run.dtype, "timings": timings})
    table = [("latency", "ms", "+-")]
    table += [(name, f"{t.median:.3f}", f"{t.spread:.0%}") for name, t in timings.items()]
    print(what, *aligned(table), sep="\n", flush=True)


def to_host(call: Call) -> Tensor:
    return torch.as_tensor(call()).cpu()


def pinned(video: Tensor) -> Tensor:
    return video.permute(0, 2, 3, 4, 1).contiguous().pin_memory().permute(0, 4, 1, 2, 3)


def strong_from_host(rungs: Rungs, pixels: Tensor, case: Case, batch: int) -> Callable[[], Tensor]:
    """The strong path on batches of clips sent whole, given the masks that mmfast draws."""
    clips, grid = pixels.shape[0], rungs.config.grid
    masks = tube_masks(clips, case.views, grid, keep=case.kept, seed=rungs.seed, device=rungs.device)
    keep = kept_ids(masks)

    def run() -> Tensor:
        parts = [
            rungs.plain.strong(some.to(rungs.device, non_blocking=True), ids)
            for some, ids in zip(pixels.split(batch), keep.split(batch), strict=True)
        ]
        return torch.cat(parts).cpu()

    return run


def host(run: Run) -> None:
    """From pinned uint8 clips in host memory to probabilities in host memory, wall time: whole clips, or kept tubes alone."""
    if not run.cuda:
        return run.skip("host", "needs a GPU")
    for size in ("small", "base"):
        loaded = Loaded.of(run, name_of(size))
        for kept, clips in ((49, 172), (20, 420)):
            case = loaded.case(kept, 2)
            what = f"host, {loaded.name}, {case.title}"
            if not run.enough(what, 15):
                continue
            with run.guarded(what):
                one_host(run, loaded, pinned(loaded.video(4 if run.quick else clips)), case, what)


def one_host(run: Run, loaded: Loaded, pixels: Tensor, case: Case, what: str) -> None:
    clips, batch = pixels.shape[0], 43
    rungs = Rungs(loaded.model, loaded.state, pixels[:batch].to(run.device), dtype=run.dtype, compiled=False)
    ask: dict[str, Any] = dict(views=case.views, keep=case.kept, seed=rungs.seed)

    def whole() -> Tensor:
        parts = []
        for start in range(0, clips, batch):
            some = pixels[start : start + batch].to(run.device, non_blocking=True)
            parts.append(loaded.model.ensemble(some, clip_ids=list(range(start, start + len(some))), **ask))
        return torch.cat(parts).cpu()

    calls: dict[str, Callable[[], Tensor]] = {
        "strong": strong_from_host(rungs, pixels, case, batch),
        f"{OURS}, whole clips": whole,
        OURS: lambda: loaded.model.ensemble(pixels, **ask).cpu(),
    }
    truth = calls["strong"]()
    errors = {name: relative_error(call(), truth) for name, call in calls.items()}
    if wrong := {name: error for name, error in errors.items() if not error <= 0.02}:
        return run.red(what, f"differ from the strong path: {wrong}")
    rounds = 2 if run.quick else 7
    taken = harness.measure(calls, torch.device("cpu"), rounds=rounds, warmup=2, what="host")
    run.add({"model": loaded.name, "clips": clips, "case": asdict(case), "timings": taken, "errors": errors})
    table = [("from host", "ms", "clips/s")]
    table += [(key, f"{t.median:.2f}", f"{clips / t.median * 1e3:.0f}") for key, t in taken.items()]
    print(f"{what}, {clips} clips", *aligned(table), sep="\n", flush=True)


SECTIONS: dict[str, Callable[[Run], None]] = {
    "ladder_small": ladder_small,
    "ladder_base": ladder_base,
    "ladder_large": ladder_large,
    "grid": grid,
    "latency": latency,
    "host": host,
}
