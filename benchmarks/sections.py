"""The parts of run_all.py. Each checks, times, and saves after every result, so that a stop loses little."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Call
from ladder import climb, spread_weights
from ops import Bench, Op, all_ops, attention_op
from report import aligned, gate_lines, ladder_lines
from torch import Tensor
from variants import OURS, Case, Rungs, check, relative_error

from mmfast import MaskedViT

CLASSES = 204


class Red(Exception):
    """A check that failed; nothing that hangs on it was timed."""


@dataclass
class Run:
    """One section at work: its device, its deadline, and its result file."""

    device: torch.device
    path: Path
    deadline: float
    result: dict[str, Any] = field(default_factory=lambda: {"rows": [], "skipped": [], "red": []})

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def enough(self, what: str, seconds: float) -> bool:
        """Whether there is time for it; if not, it is noted as skipped."""
        if self.left >= seconds:
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

    def add(self, row: dict[str, Any]) -> None:
        self.result["rows"].append(row)
        self.save()

    def save(self) -> None:
        harness.write_json(self.path, self.result)


def ceilings(run: Run) -> None:
    """Copying, matrix products at the model's shapes, and the way from pinned host memory."""
    dtype = torch.bfloat16 if run.cuda else torch.float32
    run.result |= harness.ceilings(run.device, dtype)
    rows = 33712 if run.cuda else 784
    calls: dict[str, Call] = {}
    flops: dict[str, int] = {}
    for D in (384, 768, 1024) if run.cuda else (384,):
        shapes = {"embed": (1536, D), "qkv": (D, 3 * D), "proj": (D, D), "fc1": (D, 4 * D), "fc2": (4 * D, D)}
        for what, (inner, wide) in shapes.items():
            a = torch.randn(rows, inner, device=run.device).to(dtype)
            weight = torch.randn(wide, inner, device=run.device).to(dtype).t()
            out = torch.empty(rows, wide, device=run.device, dtype=dtype)
            name = f"{what} {rows}x{inner}x{wide}"
            calls[name] = product(a, weight, out)
            flops[name] = 2 * rows * inner * wide
    table = [("matrix product", "us", "TFLOP/s")]
    for name, timing in harness.measure(calls, run.device, rounds=5, warmup=3, what="products").items():
        rate = flops[name] / timing.median / 1e9
        run.add({"product": name, "timing": timing, "tflop_s": rate})
        table.append((name, f"{timing.median * 1e3:.1f}", f"{rate:.3g}"))
    if run.cuda:
        host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(host, device=run.device)
        up = harness.measure({"up": lambda: there.copy_(host, non_blocking=True)}, run.device, rounds=5, warmup=2)["up"]
        run.add({"copy": "pinned host to device", "timing": up, "gb_s": host.nbytes / up.median / 1e6})
        table.append(
            ("pinned host to device, 256 MiB", f"{up.median * 1e3:.0f}", f"{host.nbytes / up.median / 1e6:.1f} GB/s")
        )
    limits = {key: run.result[key] for key in ("copy_gb_s", "gemm_tflop_s")}
    print(*aligned(table), f"  {limits}", sep="\n", flush=True)


def product(a: Tensor, weight: Tensor, out: Tensor) -> Call:
    return lambda: torch.mm(a, weight, out=out)


def time_op(run: Run, op: Op, dtype: torch.dtype) -> list[tuple[str, ...]]:
    """Check an op's providers, time those that passed, and return their lines."""
    errors, raised = op.check()
    allowed = op.allowed(errors)
    for name, why in raised.items():
        # Torch's kernels refuse some shapes and machines; ours must not.
        (run.red if name.startswith(OURS) else run.skip)(f"{op.name} {op.shape} by {name}", why)
    for name, error in errors.items():
        if not error <= allowed:
            run.red(f"{op.name} {op.shape} by {name}", f"relative error {error:.2e}, allowed {allowed:.2e}; not timed")
    good = {name: op.providers[name] for name, error in errors.items() if error <= allowed}
    # Enough sets of inputs to pass twice through a 60 MB cache, but no more than eight.
    count = min(8, max(2, -(-120_000_000 // op.bytes))) if run.cuda else 1
    inputs = [op.make() for _ in range(count)]
    sets = {name: [lambda c=call, i=i: c(*i) for i in inputs] for name, call in good.items()}
    lines: list[tuple[str, ...]] = []
    with torch.no_grad():
        timings = harness.replayed(sets, run.device)
    for name, timing in timings.items():
        rates = {"gb_s": op.bytes / timing.median / 1e6, "tflop_s": op.flops / timing.median / 1e9}
        known = {"op": op.name, "shape": op.shape, "dtype": dtype, "provider": name, "error": errors[name]}
        run.add(known | {"timing": timing, "bytes": op.bytes, "flops": op.flops} | rates)
        best = timings[OURS].median if OURS in timings else timing.median
        lines.append(
            (
                f"{op.name} {op.shape}",
                name,
                f"{timing.median * 1e3:.1f}",
                f"{timing.spread:.0%}",
                f"{rates['gb_s']:.0f}",
                f"{rates['tflop_s']:.3g}",
                f"{timing.median / best:.2f}",
            )
        )
    return lines


OP_HEADER = ("op", "provider", "us", "+-", "GB/s", "TFLOP/s", "x mmfast")


def time_ops(run: Run, made: list[tuple[Callable[[], list[Op]], torch.dtype, float]]) -> None:
    for make, dtype, seconds in made:
        for op in make():
            if not run.enough(f"{op.name} {op.shape}", seconds):
                continue
            try:
                print(*aligned([OP_HEADER, *time_op(run, op, dtype)]), sep="\n", flush=True)
            except torch.cuda.OutOfMemoryError as error:
                run.red(f"{op.name} {op.shape}", str(error))


def attention(run: Run) -> None:
    """Attention of width-384 views at the lengths that the usual ratios leave, against torch's kernels."""
    if not run.cuda:
        sizes, dtype = {160: 2, 392: 2}, torch.float32
    else:
        sizes, dtype = {392: 86, 160: 211, 1568: 21, 784: 43, 384: 88}, torch.bfloat16
    made = [(bench_of(run, dtype, S, n, attention_op), dtype, 6.0) for n, S in sizes.items()]
    time_ops(run, made)


def bench_of(run: Run, dtype: torch.dtype, S: int, n: int, one: Callable[[Bench], Op]) -> Callable[[], list[Op]]:
    return lambda: [one(Bench(run.device, dtype, S, n, 384))]


def kernels(run: Run) -> None:
    """Every op at ViT-S's size, then what changes at ViT-B's."""
    if not run.cuda:
        small = Bench(run.device, torch.float32, 2, 392, 384)
        return time_ops(run, [(lambda: all_ops(small), small.dtype, 4.0)])
    small = Bench(run.device, torch.bfloat16, 86, 392, 384)
    wide = replace(small, dim=768)
    half = replace(small, dtype=torch.float16)
    skip = "packed_attention"
    time_ops(
        run,
        [
            (lambda: [op for op in all_ops(small) if op.name != skip], small.dtype, 12.0),
            (lambda: [op for op in all_ops(wide) if op.name in ("add_layer_norm", "linear_gelu")], wide.dtype, 12.0),
            (lambda: [op for op in all_ops(half) if op.name in ("linear_gelu", "tube_embed")], half.dtype, 12.0),
        ],
    )


@dataclass(frozen=True)
class Plan:
    """One ladder: how many clips, how many of 196 tubes are kept, views; seconds it is expected to take."""

    clips: int
    kept: int
    views: int
    compiled: bool
    seconds: float


def ladder(run: Run, name: str, plans: list[Plan]) -> None:
    dtype = torch.bfloat16 if run.cuda else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = MaskedViT.from_name(name, num_classes=CLASSES)
    spread_weights(model, 0)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model = model.eval().requires_grad_(False).to(run.device, dtype)
    for plan in plans:
        case = Case(plan.views, plan.kept, 196, 8)
        what = f"{name}, {plan.clips} clips, {case.title}"
        if not run.enough(what, plan.seconds):
            continue
        video = random_video(plan.clips).to(run.device)
        rungs = Rungs(model, state, video, dtype=dtype, compiled=plan.compiled)
        calls = rungs.calls(case)
        gate = check(rungs, case, calls)
        if gate.red:
            run.red(what, "; ".join(gate_lines(case, gate)))
            # A peer that is wrong is dropped; without our own or the published path there is nothing to compare.
            if any(red == OURS or red.startswith("published") for red in gate.red):
                continue
            gate = gate.without(gate.red)
        done = climb(rungs, case, calls, gate, budget=min(15.0, max(4.0, run.left / 3)))
        run.add({"model": name, "clips": plan.clips, "dtype": dtype} | done.as_json())
        print(what, *ladder_lines(done), sep="\n", flush=True)


def random_video(clips: int) -> Tensor:
    """uint8 [B, 3, 16, 224, 224] over a decoder's layout."""
    frames = torch.randint(0, 256, (clips, 16, 224, 224, 3), dtype=torch.uint8)
    return frames.permute(0, 4, 1, 2, 3)


def ladder_small(run: Run) -> None:
    """ViT-S, resident pixels."""
    if not run.cuda:
        return ladder(run, "videomae_small_patch16_224", [Plan(1, 49, 2, False, 20), Plan(1, 20, 2, False, 15)])
    plans = [
        Plan(43, 49, 2, True, 60),
        Plan(4, 49, 2, True, 45),
        Plan(105, 20, 2, False, 20),
        Plan(21, 49, 4, False, 20),
        Plan(43, 48, 2, False, 20),
        Plan(21, 196, 1, False, 20),
    ]
    ladder(run, "videomae_small_patch16_224", plans)


def ladder_base(run: Run) -> None:
    """ViT-B, resident pixels."""
    if not run.cuda:
        return run.skip("ViT-B", "too long for a CPU")
    ladder(run, "videomae_base_patch16_224", [Plan(43, 49, 2, True, 60), Plan(43, 20, 2, False, 20)])


def host(run: Run) -> None:
    """From pinned uint8 clips in host memory to probabilities in host memory, wall time."""
    if not run.cuda:
        return run.skip("host", "needs a GPU")
    dtype = torch.bfloat16
    for name in ("videomae_small_patch16_224", "videomae_base_patch16_224"):
        model = MaskedViT.from_name(name, num_classes=CLASSES)
        spread_weights(model, 0)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        model = model.eval().requires_grad_(False).to(run.device, dtype)
        for kept, clips in ((49, 172), (20, 420)):
            if not run.enough(f"host, {name}, {kept} tubes", 15):
                continue
            case = Case(2, kept, 196, 8)
            frames = random_video(clips).permute(0, 2, 3, 4, 1).contiguous().pin_memory()
            pixels = frames.permute(0, 4, 1, 2, 3)
            rungs = Rungs(model, state, pixels[:43].to(run.device), dtype=dtype, compiled=False)
            calls = from_host(rungs, pixels, case)
            here = check_host(calls)
            if not here <= 0.02:
                run.red(f"host, {name}", f"mmfast and the strong path differ by {here:.2e}")
                continue
            taken = harness.measure(calls, torch.device("cpu"), rounds=7, warmup=2, what="host")
            run.add({"model": name, "clips": clips, "case": asdict(case), "timings": taken})
            table = [("from host", "ms", "clips/s")]
            table += [(key, f"{t.median:.2f}", f"{clips / t.median * 1e3:.0f}") for key, t in taken.items()]
            print(f"{name}, {clips} clips, {case.title}", *aligned(table), sep="\n", flush=True)


def from_host(rungs: Rungs, pixels: Tensor, case: Case) -> dict[str, Call]:
    """mmfast, and the strong path on batches of 43 clips sent whole."""
    from peers import kept_ids

    from mmfast import tube_masks

    clips = pixels.shape[0]
    keep = kept_ids(tube_masks(clips, case.views, rungs.config.grid, keep=case.kept, device=rungs.device))

    def strong() -> Tensor:
        parts = [
            rungs.plain.strong(some.to(rungs.device, non_blocking=True), ids)
            for some, ids in zip(pixels.split(43), keep.split(43), strict=True)
        ]
        return torch.cat(parts).cpu()

    def ours() -> Tensor:
        return rungs.model.ensemble(pixels, views=case.views, keep=case.kept).cpu()

    return {"strong": strong, OURS: ours}


def check_host(calls: dict[str, Call]) -> float:
    """Relative difference of the two paths' probabilities."""
    strong, ours = (torch.as_tensor(call()) for call in calls.values())
    return relative_error(ours, strong)


def training(run: Run) -> None:
    """Whole steps of pre-training and distillation, forward to optimiser."""
    import train_report
    from train_step import MODELS, parse, prepare
    from train_variants import PEERS, Setup
    from train_variants import check as check_step

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    setup = Setup(run.device, torch.bfloat16 if run.cuda else None)
    sizes = (
        {"pretrain": (32, 90.0), "distill": (32, 60.0)} if run.cuda else {"pretrain": (1, 40.0), "distill": (1, 30.0)}
    )
    for mode, (batch, seconds) in sizes.items():
        if not run.enough(f"{mode} step", seconds):
            continue
        # torch.compile takes minutes on a CPU.
        peers = [name for name in PEERS if run.cuda or name != "compiled"]
        options = parse(["--mode", mode, "--batch", str(batch), "--device", str(run.device), "--peers", *peers])
        work = prepare(options, setup)
        gate = check_step(work.variants, work.published)
        if gate.red:
            run.red(f"{mode} step", "; ".join(train_report.red_lines(gate)))
            continue
        work.published.clear()
        rows = train_report.rows_of(work.variants, gate, work.clips, None, min(15.0, max(4.0, run.left / 4)))
        run.add({"mode": mode, "model": MODELS[mode], "batch": batch} | train_report.as_json(rows, gate))
        print(f"{mode}, {work.title}", *train_report.table_lines(rows, gate), sep="\n", flush=True)


SECTIONS: dict[str, Callable[[Run], None]] = {
    "ceilings": ceilings,
    "ladder_small": ladder_small,
    "attention": attention,
    "kernels": kernels,
    "training": training,
    "host": host,
    "ladder_base": ladder_base,
}
