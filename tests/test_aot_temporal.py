"""The temporal cross-attention's kernels in every shipped configuration, compiled for sm_80 and sm_90."""

from typing import Any

import pytest
from aot import ARCHS, Report, compile_kernel, needs_compiler

from mmfast_kernels import tables, temporal

pytest.importorskip("triton")
from mmfast_kernels import temporal_backward_triton, temporal_triton

pytestmark = [pytest.mark.aot, needs_compiler]

DTYPES = ["bf16", "fp16", "tf32", "fp32"]
GRIDS = [(14, 14), (16, 16), (24, 24)]  # B/16, L/14 and L/14 at 336 pixels
WIDE = {"lse_ptr": "*fp32", "sums_ptr": "*fp32", "cells_ptr": "*i32", "slots_ptr": "*i32", "starts_ptr": "*i32"}
STRIDES = ("q_view", "q_frame", "q_cell", "q_head", "k_view", "k_frame", "k_cell", "k_head")
ALIGNED = (*STRIDES, "dout_view", "dout_frame", "dout_cell", "row", "n_cols")


def compile_temporal(kernel: Any, name: str, given: dict[str, Any], dtype: str, arch: int, rows: int = 0) -> Report:
    """With the table's configuration. given: the other constants."""
    config = dict(tables.lookup("temporal", arch=arch, dtype=dtype, kernel=name, rows=rows).config)
    num_warps, num_stages = config.pop("num_warps"), config.pop("num_stages")
    constexprs = given | config | {"PRECISION": "tf32" if dtype == "tf32" else "ieee"}
    narrow = dtype if dtype in ("bf16", "fp16") else "fp32"
    signature = {n: f"*{narrow}" if n.endswith("_ptr") else "i32" for n in kernel.arg_names}
    signature |= {n: t for n, t in WIDE.items() if n in signature}
    signature = {n: t for n, t in signature.items() if n not in constexprs}
    if "scale_log2" in signature:
        signature["scale_log2"] = "fp32"
    aligned = [n for n in ALIGNED if n in signature]
    report = compile_kernel(
        kernel, signature, constexprs, arch=arch, num_warps=num_warps, num_stages=num_stages, aligned=aligned
    )
    report.check(matrix=dtype != "fp32")
    assert report.load_bits[128] > 0, report
    return report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 80])
@pytest.mark.parametrize("name", ["lse", "probs"])
def test_scores(name: str, d: int, dtype: str, arch: int) -> None:
    kernel = {"lse": temporal_triton.temporal_lse_kernel, "probs": temporal_triton.temporal_probs_kernel}[name]
    compile_temporal(kernel, name, temporal.score_geometry(d), dtype, arch)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [8, 32, 256])
@pytest.mark.parametrize("kept", [False, True], ids=["all", "kept"])
def test_tables(kept: bool, rows: int, dtype: str, arch: int) -> None:
    given = {"H": 14, "W": 14} | ({} if kept else {"cells_ptr": None})
    compile_temporal(temporal_triton.temporal_tables_kernel, "tables", given, dtype, arch, rows)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kept", [False, True], ids=["all", "kept"])
def test_dtables(kept: bool, grid: tuple[int, int], dtype: str, arch: int) -> None:
    left_out = {} if kept else {"cells_ptr": None, "slots_ptr": None, "starts_ptr": None}
    given = temporal.dtables_geometry(*grid) | left_out
    compile_temporal(temporal_backward_triton.temporal_dtables_kernel, "dtables", given, dtype, arch)
