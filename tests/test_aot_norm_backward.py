"""The backward kernels of the norm and of the pooling in every shipped configuration, compiled for sm_80 and sm_90."""

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from aot import ARCHS, Report, compile_kernel, needs_compiler

from mmfast_kernels import norm, pool, tables

pytest.importorskip("triton")
from mmfast_kernels import norm_backward_triton, norm_triton, pool_triton

pytestmark = [pytest.mark.aot, needs_compiler]

WIDTHS = [192, 384, 768, 1024, 1280, 1408, 4096, 16384]
STREAMS = [("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32")]  # the stream's dtype and the branch's


def shipped() -> list[Any]:
    """Every configuration that a launch may take: the table's and what a tuning run would try."""
    cases = itertools.product(ARCHS, WIDTHS, (False, True), STREAMS)
    return [
        pytest.param(arch, d, gamma, types, config, id="-".join(map(str, [arch, d, gamma, *types, *config.values()])))
        for arch, d, gamma, types in cases
        for row in [tables.lookup("norm_backward", arch=arch, d=d, gamma=gamma, fp32="fp32" in types)]
        for config in (row.config, *row.alternatives)
    ]


def compile_backward(
    d: int,
    config: Mapping[str, Any],
    types: tuple[str, str],
    arch: int,
    *,
    scaled: bool = False,
    sums: bool = False,
    params: bool = True,
    dx: bool = True,
) -> Report:
    """scaled: the branch has a gamma; sums: gamma's gradient is wanted; params: the norm's parameters' are."""
    stream, branch = types
    options = norm.backward_geometry(d, "fp32" in types, config)
    num_warps = options.pop("num_warps")
    signature = {"dy_ptr": f"*{branch}", "s_ptr": f"*{stream}"}
    signature |= dict.fromkeys(("weight_ptr", "mean_ptr", "rstd_ptr", "partials_ptr"), "*fp32")
    if dx:
        signature |= {"ds_ptr": f"*{stream}", "dx_ptr": f"*{stream}"}
    if scaled:
        signature |= {"gamma_ptr": "*fp32"}
    if sums:
        signature |= {"branch_ptr": f"*{branch}"}
    if dx and (scaled or stream != branch):
        signature["dbranch_ptr"] = f"*{branch}"
    strides = ("ds_stride", "dy_stride", "s_stride", "branch_stride")
    signature |= dict.fromkeys((*strides, "n_rows"), "i32")
    constexprs: dict[str, Any] = options | {"PARAMS": params, "DGAMMA": sums, "LAST": 2 if sums else 1}
    for name in norm_backward_triton.norm_backward_kernel.arg_names:
        if name not in signature and name not in constexprs:
            constexprs[name] = None
    kernel = norm_backward_triton.norm_backward_kernel
    return compile_kernel(kernel, signature, constexprs, arch=arch, num_warps=num_warps, aligned=strides)


def check(report: Report, config: Mapping[str, Any]) -> None:
    report.check()
    assert report.blocks_per_sm >= config["programs"], report  # else some programs wait for others to end
    assert report.load_bits.keys() <= {32, 64, 128}, report
    assert report.load_bits[32] == 2, report  # a row's two statistics


@pytest.mark.parametrize(("arch", "d", "gamma", "types", "config"), shipped())
def test_norm_backward(arch: int, d: int, gamma: bool, types: tuple[str, str], config: Mapping[str, Any]) -> None:
    apart = config["apart"]
    report = compile_backward(d, config, types, arch, scaled=gamma, sums=gamma and not apart, params=not apart)
    check(report, config)
    if len(set(types)) == 1:
        assert report.load_bits[64] == 0, report
    if apart:
        check(compile_backward(d, config, types, arch, dx=False), config)


@pytest.mark.parametrize("types", STREAMS, ids="-".join)
@pytest.mark.parametrize("d", [384, 768, 1024])
def test_no_barrier_between_rows(d: int, types: tuple[str, str]) -> None:
    """Without sums to join at the end, a kernel of one warp a row has nothing to wait for."""
    config = tables.lookup("norm_backward", arch=90, d=d, gamma=False, fp32="fp32" in types).config
    report = compile_backward(d, config, types, 90, params=False).check()
    assert report.instructions["BAR"] == 0, report


@pytest.mark.parametrize("arch", ARCHS)
def test_column_sums(arch: int) -> None:
    signature = dict.fromkeys(("partials_ptr", "first_ptr", "second_ptr", "third_ptr"), "*fp32") | {"programs": "i32"}
    constexprs = {"D": 768, "ROWS": 64, "COLUMNS": 16}
    kernel = norm_backward_triton.column_sums_kernel
    report = compile_kernel(kernel, signature, constexprs, arch=arch, num_warps=4).check()
    assert report.load_bits.keys() == {128}, report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("normed", [False, True], ids=["mean", "norm"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("d", [384, 1024, 1408, 16384])
def test_token_gradients(d: int, dtype: str, normed: bool, arch: int) -> None:
    options = pool.geometry(d, tables.lookup("pool", d=d).config)
    num_warps = options.pop("num_warps")
    signature = {"dmean_ptr": "*fp32", "cu_ptr": "*i32", "dtokens_ptr": f"*{dtype}"}
    signature |= {"tokens_stride": "i32", "length": "i32", "eps": "fp32"}
    constexprs: dict[str, Any] = dict(options)
    if normed:
        signature |= {"tokens_ptr": f"*{dtype}", "weight_ptr": "*fp32"}
    else:
        constexprs |= {"tokens_ptr": None, "weight_ptr": None}
    kernel = pool_triton.token_gradients_kernel
    aligned = ("tokens_stride",)
    report = compile_kernel(kernel, signature, constexprs, arch=arch, num_warps=num_warps, aligned=aligned).check()
    assert report.load_bits[128] > 0, report
    assert report.load_bits.keys() <= {32, 128}, report  # 32: the two bounds


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("d", [384, 768, 1024, 1408])
def test_norm_forward_under_autocast(d: int, arch: int) -> None:
    """An fp32 stream, a bf16 branch and a bf16 result, with the statistics that the backward takes."""
    options = norm.geometry(d, tables.lookup("norm", d=d).config)
    num_warps = options.pop("num_warps")
    signature = dict.fromkeys(("x_ptr", "sum_ptr", "weight_ptr", "bias_ptr", "mean_ptr", "rstd_ptr"), "*fp32")
    signature |= {"branch_ptr": "*bf16", "y_ptr": "*bf16", "n_rows": "i32", "eps": "fp32"}
    aligned = ("x_stride", "branch_stride")
    signature |= dict.fromkeys(aligned, "i32")
    constexprs = options | {"gamma_ptr": None}
    kernel = norm_triton.norm_kernel
    report = compile_kernel(kernel, signature, constexprs, arch=arch, num_warps=num_warps, aligned=aligned).check()
    assert report.load_bits.keys() == {128}, report
    assert report.instructions["BAR"] == 0, report


@pytest.mark.parametrize("arch", ARCHS)
def test_pooled_means_with_statistics(arch: int) -> None:
    options = pool.mean_geometry(768, tables.lookup("pool", d=768).config)
    num_warps = options.pop("num_warps")
    pointers = ("sums", "token_weight", "token_bias", "weight", "bias", "mean", "centre", "rstd")
    signature = {f"{name}_ptr": "*fp32" for name in pointers}
    signature |= {"cu_ptr": "*i32", "y_ptr": "*bf16", "length": "i32", "eps": "fp32"}
    report = compile_kernel(pool_triton.segment_mean_kernel, signature, options, arch=arch, num_warps=num_warps).check()
    assert report.load_bits[128] > 0, report
