"""Kernels of the patch embedding's backward and of masked autoencoding in every shipped configuration, compiled."""

from collections.abc import Mapping
from typing import Any

import pytest
from aot import ARCHS, Report, compile_kernel, needs_compiler

from mmfast_kernels import mae, mae_tokens, tables

pytest.importorskip("triton")
from mmfast_kernels import mae_triton, patches_backward_triton

pytestmark = [pytest.mark.aot, needs_compiler]


def compile_op(
    kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], config: Mapping[str, Any], arch: int
) -> Report:
    options = {"num_warps": config["num_warps"], "num_stages": config.get("num_stages", 2)}
    constexprs = constexprs | {k: v for k, v in config.items() if k not in options}
    aligned = [n for n in signature if n.endswith("_stride") or n == "n_cols"]
    return compile_kernel(kernel, signature, constexprs, arch=arch, aligned=aligned, **options)


DWEIGHT_CASES = [
    {"arch": arch, "dtype": dtype, "d": d}
    for arch in ARCHS
    for dtype in ("bf16", "tf32", "fp32")
    for d in (384, 1024)
    if d == 384 or (arch, dtype) == (90, "bf16")
]


def dweight(case: dict[str, Any], config: Mapping[str, Any], layout: str, patch: int, video: str) -> Report:
    dtype = "fp32" if case["dtype"] == "tf32" else case["dtype"]
    signature = {"dy_ptr": f"*{dtype}", "video_ptr": f"*{video}", "out_ptr": "*fp32"}
    signature |= dict.fromkeys(("scale_ptr", "shift_ptr"), "*fp32") | dict.fromkeys(("token_ptr", "clip_ptr"), "*i32")
    signature |= {f"{name}_stride": "i32" for name in ("dy", "b", "c", "f", "h", "w")}
    signature |= dict.fromkeys(("grid_h", "grid_w", "n_tokens", "n_cols"), "i32")
    constexprs: dict[str, Any] = {"C": 3, "TT": 2, "P": patch, "LAYOUT": layout, "UNIT_W": layout != "interleaved"}
    constexprs["PRECISION"] = "ieee" if case["dtype"] == "fp32" else "tf32"
    constexprs["c_stride" if layout == "interleaved" else "w_stride"] = 1
    if video != "u8":
        constexprs |= dict.fromkeys(("scale_ptr", "shift_ptr"))
    signature = {name: kind for name, kind in signature.items() if name not in constexprs}
    kernel = patches_backward_triton.tube_embed_dweight_kernel
    return compile_op(kernel, signature, constexprs, config, case["arch"]).check(matrix=case["dtype"] != "fp32")


@pytest.mark.parametrize("case", DWEIGHT_CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_tube_embed_dweight(case: dict[str, Any]) -> None:
    row = tables.lookup("tube_embed_dweight", **case)
    for config in [row.config, *(row.alternatives if case["arch"] == 90 else ())]:
        report = dweight(case, config, "planar", 16, "u8")
        assert report.load_bits[128] > 0, report


@pytest.mark.parametrize(
    ("layout", "patch", "video"),
    [
        ("rows", 16, "u8"),
        ("interleaved", 16, "u8"),
        ("planar", 14, "u8"),
        ("planar", 16, "bf16"),
        ("planar", 4, "fp32"),
    ],
)
def test_tube_embed_dweight_layouts(layout: str, patch: int, video: str) -> None:
    case = {"arch": 90, "dtype": "bf16", "d": 384}
    report = dweight(case, tables.lookup("tube_embed_dweight", **case).config, layout, patch, video)
    assert patch == 14 or report.load_bits.keys().isdisjoint({8}), report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("channels", "tubelet", "patch", "video", "pred"),
    [
        (3, 2, 16, "u8", "bf16"),
        (3, 2, 16, "fp32", "fp32"),
        (21, 2, 4, "u8", "bf16"),
        (2, 2, 14, "u8", "fp16"),
        (3, 8, 16, "u8", "bf16"),
        (1, 2, 16, "bf16", "bf16"),
    ],
)
def test_masked_patch_mse(
    channels: int, tubelet: int, patch: int, video: str, pred: str, backward: bool, arch: int
) -> None:
    config = tables.lookup("masked_patch_mse", cube=tubelet * patch * patch).config
    options = mae.mse_geometry(channels, tubelet * patch * patch, config)
    signature = {"pred_ptr": f"*{pred}", "video_ptr": f"*{video}", "factor": "fp32"}
    signature |= dict.fromkeys(("token_ptr", "clip_ptr"), "*i32") | dict.fromkeys(("scale_ptr", "shift_ptr"), "*fp32")
    signature |= {"g_ptr": "*fp32", "dpred_ptr": f"*{pred}"} if backward else {"loss_ptr": "*fp32"}
    signature |= {f"{name}_stride": "i32" for name in ("pred", "b", "c", "f", "h")}
    signature |= dict.fromkeys(("grid_h", "grid_w", "n_rows"), "i32")
    constexprs = {"C": channels, "TT": tubelet, "P": patch, "UNIT_W": True, "NORMALIZE": True, "w_stride": 1}
    constexprs |= {"loss_ptr": None} if backward else {"g_ptr": None, "dpred_ptr": None}
    report = compile_op(mae_triton.masked_patch_mse_kernel, signature, constexprs, options, arch).check()
    # Pixels 16 bytes at a time where a row of them has as many; predictions with neighbouring lanes on neighbours.
    assert patch != 16 or report.load_bits[128] > 0, report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("d", [192, 384, 512])
def test_decoder_tokens(d: int, arch: int) -> None:
    config = tables.lookup("decoder_tokens", d=d).config
    options = mae_tokens.geometry(d, config)
    signature = {"visible_ptr": "*bf16", "mask_ptr": "*fp32", "pos_ptr": "*fp32", "y_ptr": "*fp32"}
    signature |= {"source_ptr": "*i32", "token_ptr": "*i32"}
    signature |= dict.fromkeys(("visible_stride", "pos_stride", "n_rows"), "i32")
    report = compile_op(mae_triton.decoder_tokens_kernel, signature, {}, options, arch).check()
    assert report.load_bits[128] > 0, report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("d", [192, 512])
def test_masked_rows_sum(d: int, dtype: str, arch: int) -> None:
    config = tables.lookup("decoder_tokens", d=d).config
    signature = {"dy_ptr": f"*{dtype}", "source_ptr": "*i32", "sums_ptr": "*fp32", "dy_stride": "i32", "n_rows": "i32"}
    options = mae_tokens.geometry(d, config) | {"PARTS": config["PARTS"]}
    report = compile_op(mae_triton.masked_rows_sum_kernel, signature, {}, options, arch).check()
    assert report.load_bits[128] > 0, report
