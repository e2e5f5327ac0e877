"""fp8 rows and products: rounding, bounds, what NaN becomes, refusals; against their references in float64."""

import functools

import pytest
import torch
from numerics import assert_close_to_truth, relative_error
from torch import Tensor

from mmfast_kernels import fp8, tables
from mmfast_kernels.dispatch import INTERPRET
from mmfast_kernels.fp8 import Fp8Rows, Fp8Weight, Norm, fp8_linear, fp8_linear_gelu, fp8_rows, quantize_weight
from mmfast_kernels.mlp import gelu_ref

pytestmark = [pytest.mark.interpret] if INTERPRET else []


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def norm_of(width: int) -> Norm:
    return Norm(draw(width, seed=3) + 1, draw(width, seed=4), 1e-6)


def weight_of(n: int, k: int, bias: bool = True) -> Fp8Weight:
    return quantize_weight(draw(n, k, seed=1, scale=k**-0.5), draw(n, seed=2) if bias else None)


def spacing(values: Tensor) -> Tensor:
    """Of the e4m3 numbers around each value."""
    exponent = values.abs().clamp(min=2.0**-6).log2().floor()
    return 2 ** (exponent - 3)


def assert_rounded(rows: Fp8Rows, truth: Tensor) -> None:
    """The rows are truth [T, K] (float64) rounded to e4m3 by their own scale."""
    wanted = truth / rows.scale.double()[:, None].where(rows.scale[:, None] > 0, 1)
    allowed = spacing(wanted) * 0.501
    if (
        INTERPRET
    ):  # Triton's interpreter loses a carry into the exponent, and rounds numbers below the normal ones to zero
        up = wanted.abs() / spacing(wanted) > 15.49
        allowed = torch.where(up | (wanted.abs() < 2.0**-6), wanted.abs() * 0.51 + 2.0**-9, allowed)
    assert ((rows.values.double() - wanted).abs() <= allowed).all()


def product(rows: Fp8Rows, weight: Fp8Weight, dtype: torch.dtype = torch.float64) -> Tensor:
    """What the rounded numbers give, in `dtype`."""
    bias = None if weight.bias is None else weight.bias.to(dtype)
    wide = rows.values.to(dtype), rows.scale.to(dtype), weight.values.to(dtype), weight.scale.to(dtype)
    return fp8.fp8_linear_ref(*wide, bias, None, "none", None, dtype)


@pytest.mark.parametrize("width", [16, 112, 384, 33])
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_rows_are_rounded_by_their_largest(width: int, branch: bool, normed: bool, poisoned_empty: None) -> None:
    x, added = draw(7, width), draw(7, width, seed=5) if branch else None
    norm = norm_of(width) if normed else None
    rows, total = fp8_rows(x, added, norm=norm)
    assert torch.equal(total, x if added is None else x + added)
    truth = total.double()
    if norm is not None:
        truth = torch.nn.functional.layer_norm(truth, (width,), norm.weight.double(), norm.bias.double(), norm.eps)
    torch.testing.assert_close(rows.scale.double(), truth.abs().amax(1) / 448, rtol=1e-5, atol=0)
    assert_rounded(rows, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_of_strided_input(dtype: torch.dtype, poisoned_empty: None) -> None:
    x = draw(5, 3, 48).to(dtype)[:, 1]
    rows, _ = fp8_rows(x)
    assert_rounded(rows, x.double())


def test_the_sum_is_rounded_to_the_streams_dtype_before_the_norm(poisoned_empty: None) -> None:
    x, branch = draw(5, 48).half() * 100, draw(5, 48, seed=5).half()
    rows, total = fp8_rows(x, branch, norm=norm_of(48))
    assert torch.equal(total, x + branch)
    plain, _ = fp8_rows(x + branch, norm=norm_of(48))
    assert torch.equal(rows.values.float(), plain.values.float())


@pytest.mark.parametrize("shape", [(1, 16, 16), (5, 48, 32), (70, 96, 112)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_a_product_is_that_of_the_rounded_numbers(
    shape: tuple[int, int, int], bias: bool, residual: bool, poisoned_empty: None
) -> None:
    m, n, k = shape
    rows, weight = fp8_rows(draw(m, k))[0], weight_of(n, k, bias)
    added = draw(m, n, seed=6) if residual else torch.zeros(m, n)
    got = fp8_linear(rows, weight, added if residual else None)
    truth = product(rows, weight) + added
    assert_close_to_truth("product", got, product(rows, weight, torch.float32) + added, truth)


def test_a_product_in_half_precision(poisoned_empty: None) -> None:
    rows, weight, residual = fp8_rows(draw(9, 32))[0], weight_of(48, 32), draw(9, 48, seed=6).half()
    got, truth = fp8_linear(rows, weight, residual), product(rows, weight) + residual
    assert got.dtype == torch.float16
    assert_close_to_truth("product", got, truth.half(), truth)
    assert fp8_linear(rows, weight, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("gelu", ["erf", "tanh", "quick"])
def test_the_hidden_rows_are_rounded_by_a_scale_that_bounds_them(gelu: str, poisoned_empty: None) -> None:
    weight = weight_of(96, 48)
    rows, _ = fp8_rows(draw(33, 48) * torch.logspace(-3, 3, 33)[:, None], before=weight)
    hidden = fp8_linear_gelu(rows, weight, gelu)
    truth = gelu_ref(product(rows, weight), gelu)
    assert (truth.abs() <= 448 * hidden.scale.double()[:, None]).all()
    assert (truth.abs().amax(1) >= hidden.scale.double() * 448 / 50).all()
    assert_rounded(hidden, truth)


def test_the_bound_holds_where_it_is_reached(poisoned_empty: None) -> None:
    x = draw(4, 64)
    weight = quantize_weight(x.repeat(4, 1))
    rows, _ = fp8_rows(x, before=weight)
    hidden = fp8_linear_gelu(rows, weight)
    truth = gelu_ref(product(rows, weight), "tanh")
    got = hidden.values.double() * hidden.scale.double()[:, None]
    assert relative_error(got, truth) < 0.04


@pytest.mark.skipif(INTERPRET, reason="the interpreter does not round to e4m3 as a GPU does")
def test_a_linear_layer_is_within_the_rounding_of_both_sides() -> None:
    x, weight, bias = draw(50, 384), draw(96, 384, seed=1), draw(96, seed=2)
    got = fp8_linear(fp8_rows(x)[0], quantize_weight(weight, bias))
    # e4m3 rounds to 4 bits: 0.026 of a number at either side.
    assert relative_error(got, x.double() @ weight.double().t() + bias) < 0.05


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("width", [32, 48])
def test_a_row_with_nan_or_infinity_is_nan_after_the_product(width: int, value: float) -> None:
    x = draw(3, width)
    x[1, width // 2] = value
    first, second = weight_of(32, width), weight_of(16, 32)
    rows, _ = fp8_rows(x, before=first)
    for got in (fp8_linear(rows, first), fp8_linear(fp8_linear_gelu(rows, first), second)):
        assert got[1].isnan().all()
        assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_channel_with_nan_is_nan(value: float) -> None:
    weight = draw(16, 32, seed=1)
    weight[5, 7] = value
    got = fp8_linear(fp8_rows(draw(3, 32))[0], quantize_weight(weight))
    assert got[:, 5].isnan().all()
    assert got[:, :5].isfinite().all()


def test_zeros_and_the_smallest_numbers_are_zero(poisoned_empty: None) -> None:
    x = torch.zeros(3, 32)
    x[1], x[2] = 1e-38, 1e30
    weight = quantize_weight(draw(16, 32, seed=1))
    got = fp8_linear(fp8_rows(x)[0], weight)
    assert (got[:2] == 0).all()
    assert got[2].isfinite().all()
    hidden = fp8_linear_gelu(fp8_rows(x, before=weight)[0], weight)
    assert (hidden.values.float()[0] == 0).all()


def test_no_rows_give_none() -> None:
    weight = weight_of(48, 32)
    rows, _ = fp8_rows(draw(0, 32), draw(0, 32), before=weight)
    assert fp8_linear(rows, weight).shape == (0, 48)
    assert fp8_linear_gelu(rows, weight).values.shape == (0, 48)


def test_a_gain_is_that_of_the_output() -> None:
    x, weight, bias, gain = draw(4, 32), draw(16, 32, seed=1), draw(16, seed=2), draw(16, seed=3)
    rows = fp8_rows(x)[0]
    got = fp8_linear(rows, quantize_weight(weight, bias, gain))
    torch.testing.assert_close(got, fp8_linear(rows, quantize_weight(weight, bias)) * gain)


def test_the_ops_are_registered_right() -> None:
    # What checks the schema multiplies the outputs, which torch has no fp8 for.
    check = functools.partial(torch.library.opcheck, test_utils="test_faketensor")
    weight, norm = weight_of(32, 48), norm_of(48)
    given = (draw(5, 48), draw(5, 48, seed=5), norm.weight, norm.bias, norm.eps, weight.bound)
    check(torch.ops.mmfast.fp8_rows.default, given)
    rows, _ = fp8_rows(given[0], before=weight)
    product = (rows.values, rows.scale, *weight[:3])
    for rest in ((None, "tanh", rows.bound, torch.float32), (draw(5, 32), "none", None, torch.float16)):
        check(torch.ops.mmfast.fp8_linear.default, (*product, *rest))


def test_wrong_arguments_are_named() -> None:
    x, weight = draw(4, 32), weight_of(16, 32)
    with pytest.raises(TypeError, match="x takes a floating dtype"):
        fp8_rows(x.int())
    with pytest.raises(ValueError, match="branch takes x's shape"):
        fp8_rows(x, draw(4, 16))
    with pytest.raises(ValueError, match="before=weight"):
        fp8_linear_gelu(fp8_rows(x)[0], weight)
    with pytest.raises(ValueError, match="gelu takes one of"):
        fp8_linear_gelu(fp8_rows(x, before=weight)[0], weight, "none")
    with pytest.raises(ValueError, match="residual takes"):
        fp8_linear(fp8_rows(x)[0], weight, draw(4, 32))
    with pytest.raises(ValueError, match=r"rows take \[T, 32\]"):
        fp8_linear(fp8_rows(draw(4, 48))[0], weight)
    with pytest.raises(ValueError, match="in multiples of 16"):
        quantize_weight(draw(16, 40))


@pytest.mark.parametrize(("arch", "refused"), [(80, True), (86, True), (89, False), (90, False)])
def test_a_gpu_without_fp8_is_refused_by_name(arch: int, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "arch_of", lambda device: arch)
    monkeypatch.setattr(fp8, "HAVE_TRITON", True)
    fault = fp8.refusal(torch.device("cuda"))
    assert (fault is not None) == refused
    assert fault is None or f"8.9 or later, cuda has {arch / 10}" in fault


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 48, 48), (300, 1152, 384), (33700, 384, 1536)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    if fault := fp8.refusal(torch.device("cuda")):
        pytest.skip(fault)
    m, n, k = shape
    weight = quantize_weight(draw(n, k, seed=1, scale=k**-0.5).cuda(), draw(n, seed=2).cuda())
    norm = Norm(*(t.cuda().to(dtype) for t in norm_of(k)[:2]), 1e-6)
    x, branch = draw(m, k).cuda().to(dtype), draw(m, k, seed=5).cuda().to(dtype)
    rows, total = fp8_rows(x, branch, norm=norm, before=weight)
    made = fp8.fp8_rows_ref(x, branch, norm.weight, norm.bias, norm.eps, weight.bound)
    assert (
        relative_error(rows.values.double() * rows.scale.double()[:, None], made[0].double() * made[1][:, None]) < 3e-3
    )
    assert torch.equal(total, made[-1])
    residual = draw(m, n, seed=6).cuda().to(dtype)
    # The tensor cores of Hopper add the terms of a product with 14 bits.
    truth = product(rows, weight)
    assert relative_error(fp8_linear(rows, weight, residual), truth + residual) < 1e-2
    hidden = fp8_linear_gelu(rows, weight)
    assert relative_error(hidden.values.double() * hidden.scale.double()[:, None], gelu_ref(truth, "erf")) < 0.04
