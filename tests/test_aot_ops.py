"""The norm, MLP, pooling and patch kernels in every shipped configuration, compiled for sm_80 and sm_90."""

from collections.abc import Mapping
from typing import Any

import pytest
from aot import ARCHS, Report, compile_kernel, needs_compiler

from mmfast_kernels import norm, pool, tables

pytest.importorskip("triton")
from mmfast_kernels import norm_triton, patches_triton, pool_triton

pytestmark = [pytest.mark.aot, needs_compiler]

WIDTHS = [384, 768, 1024, 1408, 16384]


def configs(op: str, arch: int, case: dict[str, Any]) -> list[Mapping[str, Any]]:
    """What the table ships for a case; for sm_90 also what a tuning run would try."""
    row = tables.lookup(op, **case)
    return [row.config, *row.alternatives] if arch == 90 else [row.config]


def shipped(op: str, cases: list[dict[str, Any]]) -> list[Any]:
    found = [(case, config) for case in cases for config in configs(op, case["arch"], case)]
    return [pytest.param(c, g, id="-".join(map(str, [*c.values(), *g.values()]))) for c, g in found]


def compile_ops(kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], options: Any, arch: int) -> Report:
    constexprs = constexprs | {k: v for k, v in options.items() if k not in ("num_warps", "num_stages")}
    aligned = [n for n in signature if n.endswith("_stride") or n in ("n_cols", "n_inner")]
    return compile_kernel(
        kernel,
        signature,
        constexprs,
        arch=arch,
        num_warps=options["num_warps"],
        num_stages=options.get("num_stages", 2),
        aligned=aligned,
    )


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("d", WIDTHS)
def test_norm(d: int, arch: int) -> None:
    pointers = dict.fromkeys(("x_ptr", "branch_ptr", "sum_ptr", "y_ptr"), "*bf16")
    pointers |= dict.fromkeys(("weight_ptr", "bias_ptr"), "*fp32")
    numbers = {"x_stride": "i32", "branch_stride": "i32", "n_rows": "i32", "eps": "fp32"}
    left_out = {"gamma_ptr": None, "mean_ptr": None, "rstd_ptr": None}
    for config in configs("norm", arch, {"d": d}):
        report = compile_ops(norm_triton.norm_kernel, pointers | numbers, left_out, norm.geometry(d, config), arch)
        report.check()
        assert set(report.load_bits) == {128}, report
        assert config["num_warps"] > 1 or report.instructions["BAR"] == 0, report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_norm_without_branch(dtype: str, arch: int) -> None:
    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"), f"*{dtype}") | {
        "mean_ptr": "*fp32",
        "rstd_ptr": "*fp32",
    }
    numbers = {"x_stride": "i32", "branch_stride": "i32", "n_rows": "i32", "eps": "fp32"}
    left_out = {"branch_ptr": None, "gamma_ptr": None, "sum_ptr": None}
    config = norm.geometry(384, tables.lookup("norm", d=384).config)
    report = compile_ops(norm_triton.norm_kernel, pointers | numbers, left_out, config, arch).check()
    assert report.load_bits[128] >= 384 * config["ROWS"] * (2 if dtype == "fp16" else 4) // 512, report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("d", [384, 1408, 16384])
def test_pool(d: int, arch: int) -> None:
    config = tables.lookup("pool", d=d).config
    pointers = {"tokens_ptr": "*bf16", "cu_ptr": "*i32", "sums_ptr": "*fp32"}
    numbers = {"tokens_stride": "i32", "length": "i32", "eps": "fp32"}
    options = pool.geometry(d, config)
    report = compile_ops(pool_triton.segment_sums_kernel, pointers | numbers, {"NORM": True}, options, arch).check()
    assert report.load_bits[128] > 0, report
    assert report.load_bits.keys() <= {32, 128}, report  # 32: the two bounds
    pointers = {"sums_ptr": "*fp32", "cu_ptr": "*i32", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "y_ptr": "*bf16"}
    numbers = {"length": "i32", "eps": "fp32"}
    left_out = {
        "mean_ptr": None,
        "centre_ptr": None,
        "rstd_ptr": None,
        "token_weight_ptr": None,
        "token_bias_ptr": None,
    }
    options = pool.mean_geometry(d, config)
    report = compile_ops(pool_triton.segment_mean_kernel, pointers | numbers, left_out, options, arch).check()
    assert report.load_bits[128] > 0, report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("d", [1536, 3072, 4096, 5120])
def test_means_of_hidden_layers(d: int, arch: int) -> None:
    config = tables.lookup("pool", d=d).config
    signature = {"tokens_ptr": "*bf16", "sums_ptr": "*fp32", "tokens_stride": "i32", "length": "i32", "eps": "fp32"}
    report = compile_ops(
        pool_triton.segment_sums_kernel, signature, {"NORM": False, "cu_ptr": None}, pool.geometry(d, config), arch
    )
    assert report.check().load_bits.keys() == {128}, report
    signature = {"sums_ptr": "*fp32", "y_ptr": "*bf16", "mean_ptr": "*fp32", "length": "i32", "eps": "fp32"}
    names = ("cu", "token_weight", "token_bias", "weight", "bias", "centre", "rstd")
    left_out = {f"{name}_ptr": None for name in names}
    report = compile_ops(pool_triton.segment_mean_kernel, signature, left_out, pool.mean_geometry(d, config), arch)
    assert report.check().load_bits.keys() == {128}, report


@pytest.mark.parametrize("arch", ARCHS)
def test_ensemble(arch: int) -> None:
    signature = {"logits_ptr": "*bf16", "probs_ptr": "*fp32", "clip_stride": "i32", "view_stride": "i32"}
    signature |= {"n_views": "i32", "n_classes": "i32"}
    compile_ops(pool_triton.ensemble_kernel, signature, {"BLOCK": 1024}, {"num_warps": 4}, arch).check()


EMBED_CASES = [{"arch": arch, "dtype": dtype} for arch in ARCHS for dtype in ("bf16", "tf32", "fp32")]


def embed(case: dict[str, Any], config: Mapping[str, Any], layout: str, patch: int, tubelet: int, video: str) -> Report:
    dtype = "fp32" if case["dtype"] == "tf32" else case["dtype"]
    signature = {"video_ptr": f"*{video}", "weight_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"}
    signature |= dict.fromkeys(("scale_ptr", "shift_ptr", "pos_ptr"), "*fp32")
    signature |= dict.fromkeys(("token_ptr", "clip_ptr", "pos_idx_ptr"), "*i32")
    signature |= {f"{name}_stride": "i32" for name in ("b", "c", "f", "h", "w", "pos")}
    signature |= dict.fromkeys(("grid_h", "grid_w", "n_tokens", "n_cols"), "i32")
    constexprs: dict[str, Any] = {
        "C": 3,
        "TT": tubelet,
        "P": patch,
        "LAYOUT": layout,
        "UNIT_W": layout != "interleaved",
    }
    constexprs["PRECISION"] = "ieee" if case["dtype"] == "fp32" else "tf32"
    for name in ("w_stride", "c_stride"):
        if (name == "c_stride") == (layout == "interleaved"):
            constexprs[name] = 1
            del signature[name]
    if video != "u8":
        constexprs |= dict.fromkeys(("scale_ptr", "shift_ptr"))
        del signature["scale_ptr"], signature["shift_ptr"]
    kernel = patches_triton.tube_embed_kernel
    return compile_ops(kernel, signature, constexprs, config, case["arch"]).check(matrix=case["dtype"] != "fp32")


@pytest.mark.parametrize(("case", "config"), shipped("tube_embed", EMBED_CASES))
def test_tube_embed(case: dict[str, Any], config: Mapping[str, Any]) -> None:
    report = embed(case, config, "planar", 16, 2, "u8")
    assert report.load_bits[128] > 0, report


@pytest.mark.parametrize(
    ("layout", "patch", "tubelet", "video"),
    [("rows", 16, 2, "u8"), ("interleaved", 16, 2, "u8"), ("planar", 14, 1, "u8"), ("planar", 16, 2, "bf16")],
)
def test_tube_embed_layouts(layout: str, patch: int, tubelet: int, video: str) -> None:
    case = {"arch": 90, "dtype": "bf16"}
    report = embed(case, tables.lookup("tube_embed", **case).config, layout, patch, tubelet, video)
    assert patch == 14 or report.load_bits.keys().isdisjoint({8}), report
