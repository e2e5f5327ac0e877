"""int8 inference on the CPU: mmfast in fp32 and in int8, and torch's own dynamic quantisation, checked, then timed in turns.

    python benchmarks/int8.py --threads 1                                     # ViT-S and ViT-B, 2 views at 0.75 and full clips
    python benchmarks/int8.py --model videomae_small_patch16_224 --rounds 7 --json out.json

mmfast, mmfast fused: fp32, the latter after fuse_for_inference. torch, torch.ao: the same weights in plain torch, all views in
one batch on gathered patches, in micro-batches of mmfast's size: with oneDNN's fp32 products, and with quantize_dynamic, a scale
for every output channel, in every engine for servers that this torch has. Every variant is held against mmfast in fp32 first.
"""

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import harness
import torch
from ladder import spread_weights
from options import at_least
from peers import PlainViT, have_onednn, kept_ids
from report import aligned, machine_lines
from torch import Tensor, nn
from variants import relative_error

from mmfast import MaskedViT, tube_masks
from mmfast.ensemble import micro_batch_size
from mmfast_kernels.int8 import sums_are_exact

EXACT, INT8 = "mmfast", "mmfast int8"
MODELS = ("videomae_small_patch16_224", "videomae_base_patch16_224")
FP32_BAR = 1e-5
ENGINES = ("x86", "onednn", "fbgemm")  # qnnpack is for phones, and several times slower here
Run = Callable[[Tensor, Tensor], Tensor]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="int8.py",
        description="int8 inference on the CPU against fp32 and torch's dynamic quantisation, checked. "
        "Exit codes: 0 done; 2 wrong options; 3 results differ, nothing timed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", nargs="+", default=list(MODELS), metavar="NAME", help="architectures, with random weights")
    add("--img-size", type=at_least(16), help="default: the architecture's")
    add("--num-classes", type=at_least(2), default=100)
    add("--clips", type=at_least(1), default=2, help="in a batch")
    add("--views", type=at_least(1), default=2)
    add("--mask-ratio", type=float, default=0.75)
    add("--bar", type=float, default=0.05, help="relative error of logits that int8 may have")
    add("--rounds", type=at_least(2), default=7)
    add("--threads", type=at_least(1), help="default: torch's")
    add("--seed", type=at_least(0), default=0)
    add("--json", metavar="FILE", help="write everything")
    return parser.parse_args(arguments)


class Plain:
    """PlainViT in micro-batches of as many clips as mmfast takes."""

    def __init__(self, plain: PlainViT) -> None:
        self.plain = plain

    @torch.no_grad()
    def __call__(self, video: Tensor, masks: Tensor) -> Tensor:
        keep = kept_ids(masks)
        size = micro_batch_size(keep.shape[1] * keep.shape[2], torch.device("cpu"))
        parts = zip(video.split(size), keep.split(size), strict=True)
        return torch.cat([self.plain.strong(v, k) for v, k in parts])


def in_torch(model: MaskedViT, seen: Tensor, masks: Tensor) -> dict[str, Run]:
    """The peers. An engine that cannot run the model is left out, and said so."""
    plain = PlainViT(model.state_dict(), model.config)
    found: dict[str, Run] = {}
    for engine in ENGINES:
        if engine not in torch.backends.quantized.supported_engines:
            continue
        torch.backends.quantized.engine = engine
        made = copy.deepcopy(plain)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a deprecation
                how = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
                made.blocks = torch.ao.quantization.quantize_dynamic(made.blocks, how, dtype=torch.qint8)
                Plain(made)(seen, masks)
        except RuntimeError as error:
            print(f"torch.ao {engine} is left out: {str(error).splitlines()[0]}")
            continue
        found[f"torch.ao int8, {engine}"] = Plain(made)
    return {"torch": Plain(plain.with_onednn() if have_onednn() else plain)} | found


class Work:
    """A model with random weights, clips, masks, and all variants on them."""

    def __init__(self, options: argparse.Namespace, name: str, full: bool) -> None:
        self.options = options
        size = {"img_size": options.img_size} if options.img_size else {}
        model = MaskedViT.from_name(name, num_classes=options.num_classes, **size).eval()
        with torch.no_grad():
            spread_weights(model, options.seed)
        c = model.config
        draw = torch.Generator().manual_seed(options.seed)
        shape = (options.clips, c.in_chans, c.num_frames, *c.frame_size)
        self.video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
        views, ratio = (1, 0.0) if full else (options.views, options.mask_ratio)
        self.masks = tube_masks(options.clips, views, c.grid, ratio, seed=options.seed)
        self.tokens = int((~self.masks[0, 0]).sum())
        self.title = f"{name}, {views} x {self.tokens} tokens"
        quantized = copy.deepcopy(model).quantize_int8()
        fused = copy.deepcopy(model).fuse_for_inference()
        self.variants: dict[str, Run] = {
            EXACT: ours(model),
            "mmfast fused": ours(fused),
            INT8: ours(quantized),
            **in_torch(model, self.video[:1], self.masks[:1]),
        }

    def errors(self) -> dict[str, dict[str, float]]:
        """Of every variant against mmfast in fp32: of logits, of probabilities, and the share of clips with the same class."""
        exact = self.variants[EXACT](self.video, self.masks)
        found = {}
        for name, run in self.variants.items():
            got = run(self.video, self.masks)
            found[name] = {
                "relative": relative_error(logits(got), logits(exact)),
                "largest": float((got - exact).abs().max()),
                "agreement": float((got.argmax(1) == exact.argmax(1)).double().mean()),
            }
        return found

    def allowed(self, name: str) -> float:
        return self.options.bar if "int8" in name else FP32_BAR


def logits(probabilities: Tensor) -> Tensor:
    """Up to a constant in each row, which is taken out."""
    return probabilities.log() - probabilities.log().mean(1, keepdim=True)


def ours(model: MaskedViT) -> Run:
    return lambda video, masks: model.ensemble(video, masks=masks)


def run_case(options: argparse.Namespace, name: str, full: bool) -> dict[str, Any] | None:
    """Figures of a case, printed; None where a variant is wrong."""
    work = Work(options, name, full)
    print(f"\n{work.title}, {options.clips} clips")
    errors = work.errors()
    red = {v: e["relative"] for v, e in errors.items() if not e["relative"] <= work.allowed(v)}
    if red:
        print(*(f"{v}: relative error {e:.2e}, allowed {work.allowed(v):.2e}" for v, e in red.items()), sep="\n")
        return None
    cpu, calls = torch.device("cpu"), {v: _call(run, work) for v, run in work.variants.items()}
    peaks = {v: harness.peak_memory(call, cpu) for v, call in calls.items()}
    times = harness.measure(calls, cpu, rounds=options.rounds, what=work.title)
    ours_ms = times[INT8].median
    table: list[tuple[str, ...]] = [("", "ms a clip", "+-", "int8 is x", "peak MiB", "logits off", "p off", "top-1")]
    for v, timing in times.items():
        e = errors[v]
        table.append(
            (v, f"{timing.median / options.clips:.1f}", f"{timing.spread:.0%}", f"{timing.median / ours_ms:.2f}",
             f"{peaks[v] / 2**20:.1f}", f"{e['relative']:.1e}", f"{e['largest']:.1e}", f"{e['agreement']:.0%}")
        )  # fmt: skip
    print(*aligned(table), sep="\n", flush=True)
    return {"tokens": work.tokens, "full": full, "errors": errors, "peaks": peaks, "times": times}


def _call(run: Run, work: Work) -> Callable[[], object]:
    return lambda: run(work.video, work.masks)


def run(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    cpu = torch.device("cpu")
    facts, limits = harness.machine(cpu), harness.ceilings(cpu, torch.float32)
    print(*machine_lines(facts, limits), sep="\n")
    print(f"int8 products of 8-bit weights exact: {sums_are_exact()}")
    cases: dict[str, Any] = {}
    for name in options.model:
        for full in (False, True):
            found = run_case(options, name, full)
            if found is None:
                print("nothing timed")
                return 3
            cases[f"{name}, {'full clip' if full else 'masked'}"] = found
    if options.json:
        content = {"machine": facts, "ceilings": limits, "options": vars(options), "cases": cases}
        harness.write_json(options.json, content)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
