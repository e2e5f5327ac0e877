"""The parts of run_all.py. Each checks, times, and saves after every result, so that a stop loses little."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import flops
import harness
import ops
import ops_inference
import ops_more
import ops_training
import sections_models
import sections_steps
import torch
from harness import Call
from ops import Bench, Op
from report import aligned
from section_run import Run, time_ops

Made = tuple[str, Callable[[], Op], torch.dtype]


def ceilings(run: Run) -> None:
    """Copying, matrix products at the model's shapes, and the way from pinned host memory."""
    dtype = run.dtype
    run.result |= harness.ceilings(run.device, dtype)
    rows = 33712 if run.cuda else 784
    widths = (384, 768, 1024) if run.cuda else (384,)
    if run.quick:
        rows, widths = 64, (64,)
    calls: dict[str, Call] = {}
    operations: dict[str, int] = {}
    product = flops.fastest_product(run.device, dtype)
    for D in widths:
        shapes = {"embed": (1536, D), "qkv": (D, 3 * D), "proj": (D, D), "fc1": (D, 4 * D), "fc2": (4 * D, D)}
        for what, (inner, wide) in shapes.items():
            a = torch.randn(rows, inner, device=run.device).to(dtype)
            weight = torch.randn(wide, inner, device=run.device).to(dtype)
            out = torch.empty(rows, wide, device=run.device, dtype=dtype)
            name = f"{what} {rows}x{inner}x{wide}"
            calls[name] = partial(product, a, weight, out)
            operations[name] = 2 * rows * inner * wide
    table = [("matrix product", "us", "TFLOP/s")]
    for name, timing in harness.measure(calls, run.device, rounds=5, warmup=3, what="products").items():
        rate = operations[name] / timing.median / 1e9
        run.add({"product": name, "timing": timing, "tflop_s": rate})
        table.append((name, f"{timing.median * 1e3:.1f}", f"{rate:.3g}"))
    if run.cuda:
        table.append(from_host(run))
    limits = {key: run.result[key] for key in ("copy_gb_s", "gemm_tflop_s")}
    print(*aligned(table), f"  {limits}", sep="\n", flush=True)


def from_host(run: Run) -> tuple[str, str, str]:
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=run.device)
    up = harness.measure({"up": lambda: there.copy_(host, non_blocking=True)}, run.device, rounds=5, warmup=2)["up"]
    rate = host.nbytes / up.median / 1e6
    run.add({"copy": "pinned host to device", "timing": up, "gb_s": rate})
    return "pinned host to device, 256 MiB", f"{up.median * 1e3:.0f}", f"{rate:.1f} GB/s"


# -- ops ---------------------------------------------------------------------------------------------------------------


def named(found: Callable[[], list[Op]], b: Bench, wanted: Callable[[str], bool]) -> Iterator[Made]:
    """The ops of a list, made when their turn comes: inputs and closures of one must not weigh on the others."""
    for op in found():
        if wanted(op.name):
            yield f"{op.name} {op.shape}", partial(given, op), b.dtype


def given(op: Op) -> Op:
    return op


def everything(name: str) -> bool:
    return True


def size_of(run: Run, dim: int = 384) -> Bench:
    """86 views of 392 tokens on a GPU, 2 on a CPU."""
    if run.quick:
        return Bench(run.device, run.dtype, 2, 16, 64)
    return Bench(run.device, run.dtype, 86 if run.cuda else 2, 392, dim)


def attention(run: Run) -> None:
    """Attention at the lengths that the usual ratios leave: widths of ViT-S, and of ViT-B at the usual length."""
    lengths = {392: 86, 160: 211, 1568: 21, 784: 43, 384: 88} if run.cuda else {160: 2, 392: 2}
    if run.quick:
        lengths = {16: 2}
    b = size_of(run)
    benches = [replace(b, sequences=S, n=n) for n, S in lengths.items()]
    if run.cuda and not run.quick:
        benches.append(replace(b, dim=768))
    made = ((f"attention, width {one.dim}, n {one.n}", partial(ops.attention_op, one), one.dtype) for one in benches)
    time_ops(run, made, 6.0)


def kernels(run: Run) -> None:
    """Every other op at ViT-S's size, then what changes at ViT-B's, and in fp16."""
    b = size_of(run)

    def made() -> Iterator[Made]:
        yield from named(lambda: ops.all_ops(b), b, lambda name: name != "packed_attention")
        if run.quick:
            yield "ted_stencil", lambda: ops_more.stencil_op(b, 1, 3, (3, 4), 8), b.dtype
            yield "temporal_cross_attention", lambda: ops_more.temporal_op(b, 1, 3, 3, 2, 32), b.dtype
            yield from named(lambda: ops_more.loss_ops(b, 1, 32, 1)[:1], b, everything)
            yield from named(lambda: ops_training.decoder_ops(b, 1, 64, (2, 4, 4), 4)[:1], b, everything)
            return
        clips = 21 if run.cuda else 1
        yield "ted_stencil", lambda: ops_more.stencil_op(b, clips), b.dtype
        yield "temporal_cross_attention", lambda: ops_more.temporal_op(b, clips), b.dtype
        yield from named(lambda: ops_more.loss_ops(b, 32 if run.cuda else 1)[:1], b, everything)
        yield from named(lambda: ops_training.decoder_ops(b, 32 if run.cuda else 1)[:1], b, everything)
        if run.cuda:
            wide, half = replace(b, dim=768), replace(b, dtype=torch.float16)
            yield from named(lambda: ops.all_ops(wide), wide, lambda name: name in ("add_layer_norm", "linear_gelu"))
            yield from named(lambda: ops.all_ops(half), half, lambda name: name in ("linear_gelu", "tube_embed"))

    time_ops(run, made(), 9.0 if run.cuda else 4.0)


def backward(run: Run) -> None:
    """Forward and backward of norms, attention and MLP at a training step's sizes, and MAE's loss."""
    b = size_of(run)

    def made() -> Iterator[Made]:
        yield from named(lambda: ops_more.training_ops(b), b, everything)
        yield from named(
            lambda: ops_more.loss_ops(b, *((1, 32, 1) if run.quick else (32,) if run.cuda else (1,)))[1:], b, everything
        )
        if run.cuda and not run.quick:
            for n, S in ((1568, 21), (160, 211)):
                one = replace(b, sequences=S, n=n)
                yield (
                    f"attention, forward and backward, n {n}",
                    partial(ops_more.attention_training, one),
                    b.dtype,
                )
            decoder = replace(b, sequences=21, n=1568, dim=192)
            yield from named(lambda: ops_more.norm_training(decoder), decoder, everything)
            wide = replace(b, dim=768)
            yield from named(lambda: ops_more.norm_training(wide), wide, everything)

    time_ops(run, made(), 9.0 if run.cuda else 6.0)


def deployed(run: Run) -> None:
    """What fused and quantised blocks run, int8 on a CPU and fp8 on a GPU, and what is done in host memory."""
    b = size_of(run)
    time_ops(run, named(lambda: ops_inference.inference_ops(b), b, everything), 9.0 if run.cuda else 3.0)


def gradients(run: Run) -> None:
    """Forward and backward of what `backward` has not: the decoder's tokens, embedding, pooling, and adapters' and EVL's ops."""
    b = size_of(run)
    clips = 21 if run.cuda else 1

    def made() -> Iterator[Made]:
        if run.quick:
            yield from named(lambda: ops_training.decoder_ops(b, 1, 64, (2, 4, 4), 4)[1:], b, everything)
            yield "ted_stencil", lambda: ops_training.stencil_training(b, 1, frames=3, grid=(3, 4), hidden=8), b.dtype
            sizes = {"frames": 3, "side": 3, "heads": 2, "dim": 32}
            yield "temporal_cross_attention", lambda: ops_training.temporal_training(b, 1, **sizes), b.dtype
        else:
            yield from named(lambda: ops_training.decoder_ops(b, 32 if run.cuda else 1)[1:], b, everything)
            yield "ted_stencil", lambda: ops_training.stencil_training(b, clips), b.dtype
            yield "temporal_cross_attention", lambda: ops_training.temporal_training(b, clips), b.dtype
        yield from named(lambda: ops_training.more_training_ops(b), b, everything)

    time_ops(run, made(), 9.0 if run.cuda else 4.0)


SECTIONS: dict[str, Callable[[Run], None]] = {
    "ceilings": ceilings,
    "attention": attention,
    "kernels": kernels,
    "deployed": deployed,
    "backward": backward,
    "gradients": gradients,
    **sections_models.SECTIONS,
    **sections_steps.SECTIONS,
}
