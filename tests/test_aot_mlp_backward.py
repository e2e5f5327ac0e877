"""linear_gelu's kernels with and without their second output, and GELU's backward, in every shipped configuration."""

from collections.abc import Mapping
from typing import Any

import pytest
from aot import ARCHS, Report, compile_kernel, needs_compiler

from mmfast_kernels import tables

pytest.importorskip("triton")
from mmfast_kernels import mlp_backward_triton, mlp_triton
from mmfast_kernels.mlp import MODES

pytestmark = [pytest.mark.aot, needs_compiler]


def configs(op: str, arch: int, case: dict[str, Any]) -> list[Mapping[str, Any]]:
    """What the table ships for a case; for sm_90 also what a tuning run would try."""
    row = tables.lookup(op, **case)
    return [row.config, *row.alternatives] if arch == 90 else [row.config]


def shipped(op: str, cases: list[dict[str, Any]]) -> list[Any]:
    found = [(case, config) for case in cases for config in configs(op, case["arch"], case)]
    return [pytest.param(c, g, id="-".join(map(str, [*c.values(), *g.values()]))) for c, g in found]


FORWARD_CASES = [
    {"arch": arch, "dtype": dtype, "descriptor": arch == 90, "small": small}
    for arch in ARCHS
    for dtype in ("bf16", "tf32", "fp32")
    for small in (True, False)
    if not (small and dtype != "bf16")
] + [{"arch": 90, "dtype": "fp16", "descriptor": True, "small": False}]


def compile_forward(case: dict[str, Any], config: Mapping[str, Any], mode: str, hidden: bool) -> Report:
    dtype = "fp32" if case["dtype"] == "tf32" else case["dtype"]
    signature = {"bias_ptr": f"*{dtype}", "n_rows": "i32", "n_cols": "i32", "n_inner": "i32"}
    constexprs: dict[str, Any] = {"APPROX": dtype != "fp32", "MODE": mode}
    options = ("kernel", "blocks_per_sm", "num_warps", "num_stages")
    constexprs |= {k: v for k, v in config.items() if k not in options}
    if config["kernel"] == "descriptor":
        kernel, name = mlp_triton.linear_gelu_descriptor_kernel, "h_desc"
        bm, bn, bk = config["BM"], config["BN"], config["BK"]
        blocks = {"x_desc": (bm, bk), "w_desc": (bn, bk), "y_desc": (bm, bn // 2), "h_desc": (bm, bn // 2)}
        signature |= {name: f"tensordesc<{dtype}[{m}, {n}]>" for name, (m, n) in blocks.items()}
    else:
        kernel, name = mlp_triton.linear_gelu_kernel, "h_ptr"
        signature |= dict.fromkeys(("x_ptr", "w_ptr", "y_ptr", "h_ptr"), f"*{dtype}")
        signature |= {"x_stride": "i32", "w_stride": "i32"}
        constexprs |= {"PRECISION": "ieee" if case["dtype"] == "fp32" else "tf32", "EVEN_K": True}
    if not hidden:
        del signature[name]
        constexprs[name] = None
    return compile_kernel(
        kernel,
        signature,
        constexprs,
        arch=case["arch"],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        aligned=[n for n in signature if n in ("x_stride", "w_stride", "n_cols", "n_inner")],
    )


@pytest.mark.parametrize("hidden", [False, True], ids=["y", "y-and-h"])
@pytest.mark.parametrize(("case", "config"), shipped("linear_gelu", FORWARD_CASES))
def test_linear_gelu(case: dict[str, Any], config: Mapping[str, Any], hidden: bool) -> None:
    default = config == tables.lookup("linear_gelu", **case).config
    for mode in ("erf", "tanh") if default and case["dtype"] == "bf16" else ("erf",):  # erf needs the most registers
        report = compile_forward(case, config, mode, hidden).check(matrix=case["dtype"] != "fp32")
        if config["kernel"] == "descriptor":
            assert report.instructions["UTMALDG"] > 0, report
            assert report.blocks_per_sm >= config["blocks_per_sm"], report
        else:
            assert report.load_bits[128] > 0, report


BACKWARD_CASES = [{"arch": arch, "dtype": dtype} for arch in ARCHS for dtype in ("bf16", "fp16", "fp32")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "config"), shipped("gelu_backward", BACKWARD_CASES))
def test_gelu_backward(case: dict[str, Any], config: Mapping[str, Any], mode: str) -> None:
    signature = dict.fromkeys(("dy_ptr", "h_ptr", "dh_ptr", "act_ptr"), f"*{case['dtype']}")
    signature |= {"sums_ptr": "*fp32", "n_rows": "i32", "n_cols": "i32"}
    report = compile_kernel(
        mlp_backward_triton.gelu_backward_kernel,
        signature,
        {"MODE": mode, "BM": config["BM"], "BN": config["BN"]},
        arch=case["arch"],
        num_warps=config["num_warps"],
        aligned=["n_cols"],
    ).check()
    assert set(report.load_bits) == {128}, report
    assert report.blocks_per_sm >= config["blocks_per_sm"], report
