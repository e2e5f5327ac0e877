"""Figures of the machine code of the kernels that most of the time goes to, compiled for a GPU that need not be there.

Each case is one kernel in its shipped configuration: what it asks of a multiprocessor, how many instructions it has, and
of its inner loop (the innermost one with the most matrix instructions, else the longest) how many of each kind that counts.
"""

import functools
import os
import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aot import Report

LOOP_OPS = ("HGMMA", "HMMA", "MUFU", "LDG", "LDGSTS", "UTMALDG", "STG", "LDS", "LDSM", "STS", "STSM", "SHFL", "BAR")


def attention(n: int, arch: int = 90) -> "Report":
    from test_aot_attention import compile_attention

    from mmfast_kernels import attention_triton, tables

    config = tables.lookup("packed_attention", arch=arch, dtype="bf16", d=64, n=n).config
    return compile_attention(arch, "bf16", 64, config, tail=attention_triton.tail_width(n, config["BLOCK_N"]))


def attention_backward(kernel: str, n: int = 392) -> "Report":
    from test_aot_attention import compile_backward

    from mmfast_kernels import attention_triton, tables

    case = dict(kernel=kernel, arch=90, dtype="bf16", d=64, n=n)
    config = tables.lookup("packed_attention_backward", **case).config
    tail = attention_triton.tail_width(n, config["BLOCK_N" if kernel == "dq" else "BLOCK_M"])
    return compile_backward(kernel, 90, "bf16", 64, {**config, "TAIL": min(config["TAIL"], tail)})


def linear_gelu(mode: str, *, arch: int = 90, small: bool = False, hidden: bool = False) -> "Report":
    from test_aot_mlp_backward import compile_forward

    from mmfast_kernels import tables

    case = {"arch": arch, "dtype": "bf16", "descriptor": arch == 90, "small": small}
    return compile_forward(case, tables.lookup("linear_gelu", **case).config, mode, hidden)


def gelu_backward() -> "Report":
    from aot import compile_kernel

    from mmfast_kernels import mlp_backward_triton, tables

    config = tables.lookup("gelu_backward", arch=90, dtype="bf16").config
    signature = dict.fromkeys(("dy_ptr", "h_ptr", "dh_ptr", "act_ptr"), "*bf16")
    signature |= {"sums_ptr": "*fp32", "n_rows": "i32", "n_cols": "i32"}
    constexprs = {"MODE": "erf", "BM": config["BM"], "BN": config["BN"]}
    kernel = mlp_backward_triton.gelu_backward_kernel
    return compile_kernel(kernel, signature, constexprs, arch=90, num_warps=config["num_warps"], aligned=["n_cols"])


def norm(d: int) -> "Report":
    """The norm behind a residual addition."""
    from test_aot_ops import compile_ops

    from mmfast_kernels import norm, norm_triton, tables

    signature = dict.fromkeys(("x_ptr", "branch_ptr", "sum_ptr", "y_ptr"), "*bf16")
    signature |= dict.fromkeys(("weight_ptr", "bias_ptr"), "*fp32")
    signature |= {"x_stride": "i32", "branch_stride": "i32", "n_rows": "i32", "eps": "fp32"}
    left_out = {"gamma_ptr": None, "mean_ptr": None, "rstd_ptr": None}
    config = norm.geometry(d, tables.lookup("norm", d=d).config)
    return compile_ops(norm_triton.norm_kernel, signature, left_out, config, 90)


def standardise(d: int) -> "Report":
    from test_aot_ops import compile_ops

    from mmfast_kernels import norm, standardise_triton, tables

    signature = {"x_ptr": "*bf16", "carry_ptr": "*fp32", "y_ptr": "*bf16"}
    signature |= {"x_stride": "i32", "n_rows": "i32", "eps": "fp32"}
    config = norm.geometry(d, tables.lookup("norm", d=d).config)
    return compile_ops(standardise_triton.standardise_kernel, signature, {}, config, 90)


def norm_backward(d: int) -> "Report":
    from test_aot_norm_backward import compile_backward

    from mmfast_kernels import tables

    config = tables.lookup("norm_backward", arch=90, d=d, gamma=False, fp32=False).config
    return compile_backward(d, config, ("bf16", "bf16"), 90, params=not config["apart"])


def pool(d: int) -> "Report":
    from test_aot_ops import compile_ops

    from mmfast_kernels import pool, pool_triton, tables

    signature = {"tokens_ptr": "*bf16", "cu_ptr": "*i32", "sums_ptr": "*fp32"}
    signature |= {"tokens_stride": "i32", "length": "i32", "eps": "fp32"}
    config = pool.geometry(d, tables.lookup("pool", d=d).config)
    return compile_ops(pool_triton.segment_sums_kernel, signature, {"NORM": True}, config, 90)


def tube_embed(layout: str, arch: int = 90) -> "Report":
    from test_aot_ops import embed

    from mmfast_kernels import tables

    case = {"arch": arch, "dtype": "bf16"}
    return embed(case, tables.lookup("tube_embed", **case).config, layout, 16, 2, "u8")


def tube_embed_dweight() -> "Report":
    from test_aot_mae import dweight

    from mmfast_kernels import tables

    case = {"arch": 90, "dtype": "bf16", "d": 384}
    return dweight(case, tables.lookup("tube_embed_dweight", **case).config, "planar", 16, "u8")


def mse(*, backward: bool) -> "Report":
    from test_aot_mae import compile_op

    from mmfast_kernels import mae, mae_triton, tables

    options = mae.mse_geometry(3, 512, tables.lookup("masked_patch_mse", cube=512).config)
    signature = {"pred_ptr": "*bf16", "video_ptr": "*u8", "factor": "fp32"}
    signature |= dict.fromkeys(("token_ptr", "clip_ptr"), "*i32") | dict.fromkeys(("scale_ptr", "shift_ptr"), "*fp32")
    signature |= {"g_ptr": "*fp32", "dpred_ptr": "*bf16"} if backward else {"loss_ptr": "*fp32"}
    signature |= {f"{name}_stride": "i32" for name in ("pred", "b", "c", "f", "h")}
    signature |= dict.fromkeys(("grid_h", "grid_w", "n_rows"), "i32")
    constexprs: dict[str, Any] = {"C": 3, "TT": 2, "P": 16, "UNIT_W": True, "NORMALIZE": True, "w_stride": 1}
    constexprs |= {"loss_ptr": None} if backward else {"g_ptr": None, "dpred_ptr": None}
    return compile_op(mae_triton.masked_patch_mse_kernel, signature, constexprs, options, 90)


def ted(name: str) -> "Report":
    from test_aot_ted import compile_stencil

    from mmfast_kernels import ted_backward_triton, ted_triton

    kernels = {"forward": ted_triton.ted_stencil_kernel, "backward": ted_backward_triton.ted_backward_rows_kernel}
    return compile_stencil(kernels[name], name, (384, 384), "bf16", 90)


def temporal(name: str) -> "Report":
    from test_aot_temporal import compile_temporal

    from mmfast_kernels import temporal, temporal_triton

    if name == "tables":
        given: dict[str, Any] = {"H": 14, "W": 14, "cells_ptr": None}
        return compile_temporal(temporal_triton.temporal_tables_kernel, name, given, "bf16", 90, 32)
    kernel = {"lse": temporal_triton.temporal_lse_kernel, "probs": temporal_triton.temporal_probs_kernel}[name]
    return compile_temporal(kernel, name, temporal.score_geometry(64), "bf16", 90)


CASES: dict[str, Callable[[], "Report"]] = {
    **{f"attention, n {n}, sm_90": functools.partial(attention, n) for n in (160, 392, 784, 1568)},
    "attention, n 392, sm_80": lambda: attention(392, 80),
    "attention's dq, n 392, sm_90": lambda: attention_backward("dq"),
    "attention's dk and dv, n 392, sm_90": lambda: attention_backward("dkdv"),
    "linear_gelu, sm_90": lambda: linear_gelu("erf"),
    "linear_gelu, tanh, sm_90": lambda: linear_gelu("tanh"),
    "linear_gelu, few tiles, sm_90": lambda: linear_gelu("erf", small=True),
    "linear_gelu with its hidden layer, sm_90": lambda: linear_gelu("erf", hidden=True),
    "linear_gelu, sm_80": lambda: linear_gelu("erf", arch=80),
    "gelu_backward, sm_90": gelu_backward,
    "norm, d 384, sm_90": lambda: norm(384),
    "norm, d 768, sm_90": lambda: norm(768),
    "norm_backward, d 384, sm_90": lambda: norm_backward(384),
    "standardise, d 384, sm_90": lambda: standardise(384),
    "pool, d 384, sm_90": lambda: pool(384),
    "tube_embed, planes, sm_90": lambda: tube_embed("planar"),
    "tube_embed, as decoded, sm_90": lambda: tube_embed("interleaved"),
    "tube_embed, planes, sm_80": lambda: tube_embed("planar", 80),
    "tube_embed_dweight, sm_90": tube_embed_dweight,
    "masked_patch_mse, sm_90": lambda: mse(backward=False),
    "masked_patch_mse's backward, sm_90": lambda: mse(backward=True),
    "ted_stencil, sm_90": lambda: ted("forward"),
    "ted_stencil's backward, sm_90": lambda: ted("backward"),
    "temporal scores, sm_90": lambda: temporal("lse"),
    "temporal tables, sm_90": lambda: temporal("tables"),
}


def version() -> str:
    import triton

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise OSError("kernels defined under TRITON_INTERPRET=1 cannot be compiled")
    return f"triton {triton.__version__}"


def measure(case: str) -> dict[str, float]:
    return figures(CASES[case]())


def figures(report: "Report") -> dict[str, float]:
    found: dict[str, float] = {
        "registers a thread": report.regs,
        "stack, bytes a thread": report.stack,
        "spills": report.spills,
        "shared memory, bytes": report.smem,
        "blocks a multiprocessor": report.blocks_per_sm,
        "instructions": report.instructions.total() - report.instructions["NOP"],
        **{f"loads of {bits} bits": count for bits, count in sorted(report.load_bits.items())},
        **{f"matrix products {shape}": count for shape, count in sorted(report.mma_shapes.items())},
    }
    loop = inner_loop(report.sass)
    if loop is not None:
        found["inner loop: instructions"] = loop.total()
        found |= {f"inner loop: {op}": loop[op] for op in LOOP_OPS if loop[op]}
    return found


def inner_loop(sass: str) -> Counter[str] | None:
    """The instructions, by opcode, of the innermost loop with the most matrix products, else the longest; None without one."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    spans: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)(.*)", line):
            target = re.search(r"`\((\.L_\w+)\)", found[2]) if found[1] == "BRA" else None
            if target and target[1] in labels:
                spans.append((labels[target[1]], len(opcodes) + 1))
            opcodes.append(found[1])
    innermost = [
        s for s in spans if s[1] - s[0] > 1 and not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)
    ]
    loops = [Counter(opcodes[first:last]) for first, last in innermost]
    return max(loops, key=lambda ops: (ops["HGMMA"] + ops["HMMA"], ops.total()), default=None)
