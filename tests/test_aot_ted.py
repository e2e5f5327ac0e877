"""The TED-Adapter's kernels in every shipped configuration, compiled for sm_80 and sm_90."""

from typing import Any

import pytest
from aot import ARCHS, Report, compile_kernel, needs_compiler

from mmfast_kernels import tables, ted

pytest.importorskip("triton")
from mmfast_kernels import ted_backward_triton, ted_project_triton, ted_triton

pytestmark = [pytest.mark.aot, needs_compiler]

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
WIDTHS = [(384, 384), (192, 192), (96, 96)]
STRIDES = ("h_stride", "dout_stride")
TAPS = ("time_shift", "time_taps", "time_bias", "space_shift", "space_taps", "space_bias")


def compile_stencil(kernel: Any, name: str, widths: tuple[int, int], dtype: str, arch: int) -> Report:
    config = tables.lookup("ted_stencil", kernel=name, dtype=dtype).config
    constexprs = ted.geometry(config, SIZES[dtype], widths)
    num_warps = constexprs.pop("num_warps")
    types = {f"{tap}_ptr": "*fp32" for tap in TAPS} | {"sites_ptr": "*i32", "time_ptr": "*fp32", "space_ptr": "*fp32"}
    signature = {n: types.get(n, f"*{dtype}" if n.endswith("_ptr") else "i32") for n in kernel.arg_names}
    signature = {n: t for n, t in signature.items() if n not in constexprs}
    aligned = [n for n in STRIDES if n in signature]
    return compile_kernel(kernel, signature, constexprs, arch=arch, num_warps=num_warps, aligned=aligned).check()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("name", ["forward", "backward", "sums"])
def test_stencil(name: str, widths: tuple[int, int], dtype: str, arch: int) -> None:
    kernel = {
        "forward": ted_triton.ted_stencil_kernel,
        "backward": ted_backward_triton.ted_backward_rows_kernel,
        "sums": ted_backward_triton.ted_backward_sums_kernel,
    }[name]
    report = compile_stencil(kernel, name, widths, dtype, arch)
    # Rows and taps 16 bytes at a time; the numbers of a site are taken one by one.
    assert report.load_bits[128] >= (10 if name == "sums" else 9), report
    assert report.load_bits.keys() <= {32, 128}, report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("parameters", ["fp32", "bf16"])
def test_join(parameters: str, arch: int) -> None:
    kernel = ted_backward_triton.ted_backward_join_kernel
    constexprs = {"TIME": 384, "SPACE": 384, "PROGRAMS": 32, "COLUMNS": 16}
    signature = {n: f"*{parameters}" for n in kernel.arg_names if n.endswith("_ptr")}
    signature |= {"time_ptr": "*fp32", "space_ptr": "*fp32", "programs": "i32"}
    report = compile_kernel(kernel, signature, constexprs, arch=arch, num_warps=4).check()
    assert report.load_bits[128] > 0, report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32", "fp32"])
@pytest.mark.parametrize("stream", ["same", "fp32"])
@pytest.mark.parametrize("cells", [False, True], ids=["cells", "class-tokens"])
def test_project(cells: bool, stream: str, dtype: str, arch: int) -> None:
    constexprs = dict(tables.lookup("ted_project", arch=arch, dtype=dtype).config)
    num_warps, num_stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
    constexprs |= {"PRECISION": "tf32" if dtype == "tf32" else "ieee", "EVEN_K": True}
    kernel = ted_project_triton.ted_project_kernel
    narrow = dtype if dtype in ("bf16", "fp16") else "fp32"
    wide = narrow if stream == "same" else "fp32"
    signature = {n: f"*{narrow}" if n.endswith("_ptr") else "i32" for n in kernel.arg_names if n not in constexprs}
    signature |= {"x_ptr": f"*{wide}", "y_ptr": f"*{wide}", "cells_ptr": "*i8"}
    if not cells:
        del signature["cells_ptr"]
        constexprs["cells_ptr"] = None
    aligned = ("x_stride", "u_stride", "w_stride", "n_cols", "n_inner")
    report = compile_kernel(
        kernel, signature, constexprs, arch=arch, num_warps=num_warps, num_stages=num_stages, aligned=aligned
    )
    report.check(matrix=dtype != "fp32")
    assert report.load_bits[128] > 0, report
