"""int8 products and the passes between them: exact sums, rounding, what NaN becomes, widths, threads."""

import os
import subprocess
import sys

import pytest
import torch
from numerics import assert_close_to_truth, relative_error
from torch import Tensor

from mmfast_kernels import int8
from mmfast_kernels.int8 import Int8Product, Int8Rows, Norm, multiply, quantize_weight, to_float, to_rows

WIDTHS = [16, 48, 112, 6, 33]  # the last two are torch's


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm_of(width: int) -> Norm:
    return Norm(draw(width, seed=3) + 1, draw(width, seed=4), 1e-6)


def product_of(rows: int, width: int, inner: int = 64, bias: bool = True) -> Int8Product:
    weight = quantize_weight(draw(width, inner, seed=1), draw(width, seed=2) if bias else None)
    return multiply(to_rows(draw(rows, inner)), weight)


def reference(source: Tensor | Int8Product, residual: Tensor | None, gelu: str, norm: Norm | None, dtype: torch.dtype):
    """int8_pass_ref with every fp32 argument in `dtype`."""
    given = (source, None, None, None)
    if isinstance(source, Int8Product):
        given = (source.sums, source.row_scale, source.weight.scale, source.weight.bias)
    cast = [t if t is None or t.dtype == torch.int32 else t.to(dtype) for t in (*given, residual, *(norm or ())[:2])]
    weight, bias = cast[5:] or (None, None)
    return int8.int8_pass_ref(*cast[:5], gelu, weight, bias, norm.eps if norm else 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("gelu", ["none", "erf", "quick"])
def test_rows_are_those_of_the_reference_to_the_rounding(
    width: int, normed: bool, gelu: str, poisoned_empty: None
) -> None:
    source, residual, norm = product_of(7, width), draw(7, width, seed=5), norm_of(width) if normed else None
    total = torch.empty(7, width)
    rows = to_rows(source, residual, gelu=gelu, norm=norm, total=total)
    true_total, _, true_scale = reference(source, residual, gelu, norm, torch.float64)
    plain_total, _, plain_scale = reference(source, residual, gelu, norm, torch.float32)
    assert_close_to_truth("total", total, plain_total, true_total)
    assert_close_to_truth("scale", rows.scale, plain_scale, true_scale)
    x = true_total
    if gelu != "none":
        x = torch.nn.functional.gelu(x) if gelu == "erf" else x * torch.sigmoid(1.702 * x)
    if norm is not None:
        x = torch.nn.functional.layer_norm(x, (width,), norm.weight.double(), norm.bias.double(), norm.eps)
    assert ((x / true_scale[:, None] - rows.values).abs() <= 0.501).all()
    assert (rows.values.to(torch.int16).abs() <= 127).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_product_as_floats(width: int, poisoned_empty: None) -> None:
    source, residual = product_of(5, width), draw(5, width, seed=5)
    got = to_float(source, residual)
    truth = reference(source, residual, "none", None, torch.float64)[0]
    assert_close_to_truth("product", got, reference(source, residual, "none", None, torch.float32)[0], truth)


def test_a_linear_layer_is_within_the_rounding_of_both_sides() -> None:
    x, weight, bias = draw(50, 384), draw(96, 384, seed=1), draw(96, seed=2)
    got = to_float(multiply(to_rows(x), quantize_weight(weight, bias)))
    # Uniform rounding to steps of max / 127: about 0.3 steps on each side, with maxima near 3 standard deviations.
    assert relative_error(got, x.double() @ weight.double().t() + bias) < 0.02


def test_the_sums_are_exact() -> None:
    values = torch.full((65, 384), 127, dtype=torch.int8)
    levels = 127 if int8.sums_are_exact() else 64
    weight = int8.Int8Weight(torch.full((33, 384), -levels, dtype=torch.int8), torch.ones(33), None)
    sums = multiply(Int8Rows(values, torch.ones(65)), weight).sums
    assert torch.equal(sums, torch.full_like(sums, -127 * levels * 384))


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_no_processor_overflows(isa: str) -> None:
    code = (
        "import torch; from mmfast_kernels.int8 import *; w = quantize_weight(torch.ones(64, 384)); "
        "s = multiply(to_rows(torch.ones(64, 384)), w); print((to_float(s) - 384).abs().max().item() < 1e-3)"
    )
    settings = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    ran = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "True"


def test_a_gain_is_that_of_the_output() -> None:
    x, weight, bias, gain = draw(4, 32), draw(16, 32, seed=1), draw(16, seed=2), draw(16, seed=3)
    plain = to_float(multiply(to_rows(x), quantize_weight(weight, bias)))
    got = to_float(multiply(to_rows(x), quantize_weight(weight, bias, gain)))
    torch.testing.assert_close(got, plain * gain)


@pytest.mark.parametrize("width", [32, 33])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_with_nan_or_infinity_is_nan_after_the_product(width: int, value: float) -> None:
    x = draw(3, width)
    x[1, width // 2] = value
    got = to_float(multiply(to_rows(x), quantize_weight(draw(16, width, seed=1))))
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("gelu", ["erf", "quick"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_pass_through_gelu(gelu: str, value: float) -> None:
    x = draw(2, 32)
    x[0, 3] = value
    assert to_rows(x, gelu=gelu).scale[0].isnan()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_channel_with_nan_is_nan(value: float) -> None:
    weight = draw(16, 32, seed=1)
    weight[5, 7] = value
    got = to_float(multiply(to_rows(draw(3, 32)), quantize_weight(weight)))
    assert got[:, 5].isnan().all()
    assert got[:, :5].isfinite().all()


@pytest.mark.parametrize("width", [32, 33])
def test_zeros_and_the_smallest_numbers_are_zero(width: int) -> None:
    x = torch.zeros(3, width)
    x[1] = 1e-38
    x[2] = 3e38
    weight = draw(16, width, seed=1)
    weight[2] = 0
    got = to_float(multiply(to_rows(x), quantize_weight(weight)))
    assert (got[:2] == 0).all()
    assert (got[:, 2] == 0).all()
    torch.testing.assert_close(got[2, 3], 3e38 * weight[3].sum(), rtol=0.02, atol=0)


@pytest.mark.parametrize("width", [112, 33])
def test_no_rows_give_none(width: int) -> None:
    source = product_of(0, width)
    assert to_rows(source, gelu="erf").values.shape == (0, width)
    assert to_float(source).shape == (0, width)


def test_the_total_may_take_the_residuals_place() -> None:
    source, residual = product_of(9, 48), draw(9, 48, seed=5)
    total = torch.empty(9, 48)
    apart = to_rows(source, residual, norm=norm_of(48), total=total)
    within = to_rows(source, residual, norm=norm_of(48), total=residual)
    assert torch.equal(total, residual)
    assert torch.equal(apart.values, within.values)


def test_threads_change_nothing() -> None:
    before, source, residual = torch.get_num_threads(), product_of(2000, 112), draw(2000, 112, seed=5)
    made = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(to_rows(source, residual, gelu="erf", norm=norm_of(112)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0].values, made[1].values)
    assert torch.equal(made[0].scale, made[1].scale)


@pytest.mark.parametrize("widest", [16, 32])
def test_narrower_registers_give_the_same_to_rounding(widest: int) -> None:
    source = product_of(5, 112)
    rows = to_rows(source, gelu="erf", norm=norm_of(112))
    values, scale = torch.empty_like(rows.values), torch.empty_like(rows.scale)
    weight, bias, eps = norm_of(112)
    of = (source.sums, source.row_scale, source.weight.scale, source.weight.bias)
    int8._pass(*of, None, "erf", weight, bias, eps, None, values, scale, widest=widest)
    torch.testing.assert_close(scale, rows.scale)
    assert ((values.int() - rows.values.int()).abs() <= 1).all()


def test_the_op_is_registered_right() -> None:
    source = product_of(5, 48)
    given = (source.sums, source.row_scale, source.weight.scale, source.weight.bias, draw(5, 48), "erf", *norm_of(48))
    outs = (torch.zeros(5, 48), torch.zeros(5, 48, dtype=torch.int8), torch.zeros(5))
    torch.library.opcheck(torch.ops.mmfast.int8_pass.default, (*given, *outs))


def test_wrong_arguments_are_named() -> None:
    x = draw(4, 32)
    with pytest.raises(ValueError, match="gelu takes one of"):
        to_rows(x, gelu="tanh")
    with pytest.raises(TypeError, match="source must be fp32"):
        to_rows(x.double())
    with pytest.raises(ValueError, match="residual must be contiguous"):
        to_rows(x, draw(4, 16))
    with pytest.raises(ValueError, match="source must be contiguous"):
        to_rows(draw(32, 4).t())
    with pytest.raises(TypeError, match="weight must be fp32"):
        quantize_weight(x.half())
    with pytest.raises(ValueError, match="bias must be"):
        quantize_weight(x, draw(5))
