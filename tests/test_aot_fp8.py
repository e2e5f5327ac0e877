"""The fp8 kernels in every shipped configuration: products by the tensor cores' fp8 instructions, without spills."""

from collections.abc import Mapping
from typing import Any

import pytest
from aot import Report, compile_kernel, needs_compiler

from mmfast_kernels import tables
from mmfast_kernels.norm import geometry

pytest.importorskip("triton")
from mmfast_kernels import fp8_triton

pytestmark = [pytest.mark.aot, needs_compiler]
# What a model's layers ask for: queries, keys and values; a layer with its residual; the first of an MLP.
EPILOGUES = {"qkv": ("none", "bf16", False), "residual": ("none", "bf16", True), "gelu": ("tanh", "fp8e4nv", False)}


def shipped() -> list[Any]:
    found = []
    for arch in (89, 90):
        for small in (True, False):
            row = tables.lookup("fp8_linear", arch=arch, descriptor=arch == 90, small=small, out="bf16")
            for config in (row.config, *row.alternatives):
                if (arch, config) not in found:
                    found.append((arch, config))
    return [pytest.param(arch, config, id=f"{arch}-" + "-".join(map(str, config.values()))) for arch, config in found]


def compile_linear(arch: int, config: Mapping[str, Any], epilogue: str) -> Report:
    gelu, out, residual = EPILOGUES[epilogue]
    signature = dict.fromkeys(("scale_ptr", "weight_scale_ptr", "bias_ptr"), "*fp32")
    signature |= {"n_rows": "i32", "n_cols": "i32", "n_inner": "i32"}
    constexprs: dict[str, Any] = {"GELU": gelu, "APPROX": True}
    constexprs |= {k: v for k, v in config.items() if k in ("BM", "BN", "BK", "FLATTEN")}
    if config["kernel"] == "descriptor":
        kernel, name = fp8_triton.fp8_linear_descriptor_kernel, "residual_desc"
        bm, bn, bk = config["BM"], config["BN"], config["BK"]
        signature |= {"x_desc": f"tensordesc<fp8e4nv[{bm}, {bk}]>", "w_desc": f"tensordesc<fp8e4nv[{bn}, {bk}]>"}
        signature |= dict.fromkeys(("y_desc", name), f"tensordesc<{out}[{bm}, {bn // 2}]>")
    else:
        kernel, name = fp8_triton.fp8_linear_kernel, "residual_ptr"
        signature |= {"x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv", "y_ptr": f"*{out}", name: f"*{out}"}
        constexprs["EVEN_K"] = True
    if not residual:
        del signature[name]
        constexprs[name] = None
    if epilogue == "gelu":
        signature["out_scale_ptr"] = "*fp32"
    else:
        constexprs["out_scale_ptr"] = None
    return compile_kernel(
        kernel,
        signature,
        constexprs,
        arch=arch,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        maxnreg=config.get("maxnreg"),
        aligned=["n_cols", "n_inner"],
    )


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("arch", "config"), shipped())
def test_fp8_linear(arch: int, config: Mapping[str, Any], epilogue: str) -> None:
    report = compile_linear(arch, config, epilogue).check()
    if arch == 90:
        assert report.instructions["QGMMA"] > 0, report
        assert report.instructions["HMMA"] + report.instructions["QMMA"] == 0, report
    else:
        assert report.instructions["QMMA"] > 0, report
        assert report.instructions["HMMA"] == 0, report
    if config["kernel"] == "descriptor":
        assert report.instructions["UTMALDG"] > 0, report
        assert report.blocks_per_sm >= config["blocks_per_sm"], report
    else:
        assert report.load_bits[128] > 0, report


def rows_cases() -> list[Any]:
    found = []
    for arch, d in ((89, 384), (90, 384), (90, 768), (90, 1024)):
        row = tables.lookup("fp8_rows", d=d)
        found += [pytest.param(arch, d, c) for c in (row.config, *(row.alternatives[:1] if d == 384 else ()))]
    return found


def compile_rows(arch: int, d: int, config: Mapping[str, Any]) -> Report:
    constants = geometry(d, config)
    pointers = ("x_ptr", "branch_ptr", "weight_ptr", "bias_ptr", "total_ptr")
    signature = dict.fromkeys(pointers, "*bf16") | {"rows_ptr": "*fp8e4nv"}
    signature |= dict.fromkeys(("bound_ptr", "scale_ptr", "bound_scale_ptr"), "*fp32")
    signature |= {"x_stride": "i32", "branch_stride": "i32", "n_rows": "i32", "eps": "fp32"}
    return compile_kernel(
        fp8_triton.fp8_rows_kernel,
        signature,
        {key: value for key, value in constants.items() if key != "num_warps"},
        arch=arch,
        num_warps=constants["num_warps"],
        aligned=["x_stride", "branch_stride"],
    )


@pytest.mark.parametrize(("arch", "d", "config"), rows_cases())
def test_fp8_rows(arch: int, d: int, config: Mapping[str, Any]) -> None:
    constants, report = geometry(d, config), compile_rows(arch, d, config).check()
    assert report.load_bits[128] >= 2 * constants["ROWS"] * d // (256 * constants["num_warps"]), report
