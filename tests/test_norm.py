"""layer_norm and add_layer_norm: kernel and reference against float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_truth
from torch import Tensor

from mmfast_kernels.norm import add_layer_norm, add_layer_norm_ref, geometry, layer_norm, layer_norm_ref, norm_op

WIDTHS = [1, 8, 100, 192, 300]  # a power of two, three equal pieces of 64, one piece with a tail, several with a tail
gpu = pytest.mark.gpu
interpret = pytest.mark.interpret
LANES = [pytest.param("cpu", torch.float32, marks=interpret), pytest.param("cpu", torch.float16, marks=interpret)] + [
    pytest.param("cuda", dtype, marks=gpu) for dtype in (torch.float32, torch.float16, torch.bfloat16)
]


def inputs(d: int, rows: int = 5, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """x far from zero mean, branch, weight, bias, gamma."""
    g = torch.Generator().manual_seed(d)
    made = [
        torch.randn(rows, d, generator=g) * 2 + 3,
        torch.randn(rows, d, generator=g),
        torch.randn(d, generator=g) + 1,
        torch.randn(d, generator=g),
        torch.randn(d, generator=g),
    ]
    return [t.to(device, dtype) for t in made]


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_layer_norm_kernel(d: int, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    x, _, weight, bias, _ = inputs(d, dtype=dtype, device=device)
    truth = layer_norm_ref(*double(x, weight, bias))
    assert_close_to_truth("y", layer_norm(x, weight, bias), layer_norm_ref(x, weight, bias), truth)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "layerscale"])
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_add_layer_norm_kernel(d: int, scaled: bool, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    x, branch, weight, bias, gamma = inputs(d, dtype=dtype, device=device)
    scale = gamma if scaled else None
    got_s, got_y = add_layer_norm(x, branch, weight, bias, gamma=scale)
    plain_s, _ = add_layer_norm_ref(x, branch, weight, bias, gamma=scale)
    truth_s = x.double() + branch.double() * (gamma.double() if scaled else 1.0)
    assert_close_to_truth("s", got_s, plain_s, truth_s)
    truth_y = layer_norm_ref(*double(got_s, weight, bias))
    assert_close_to_truth("y", got_y, layer_norm_ref(got_s, weight, bias), truth_y)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [384, 768, 1024, 1280, 1408, 5000, 16384])
def test_model_widths_on_gpu(d: int) -> None:
    x, branch, weight, bias, _ = inputs(d, rows=37, dtype=torch.bfloat16, device="cuda")
    s, y = add_layer_norm(x, branch, weight.float(), bias.float())
    assert torch.equal(s, x + branch)
    truth = layer_norm_ref(*double(s, weight, bias))
    assert_close_to_truth("y", y, layer_norm_ref(s, weight, bias), truth)


@interpret
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_row_counts(rows: int, poisoned_empty: None) -> None:
    x, _, weight, bias, _ = inputs(40, rows=rows)
    truth = layer_norm_ref(*double(x, weight, bias))
    assert_close_to_truth("y", layer_norm(x, weight, bias), layer_norm_ref(x, weight, bias), truth)


@interpret
def test_leading_dimensions_and_strided_rows(poisoned_empty: None) -> None:
    x, branch, weight, bias, _ = inputs(96, rows=12)
    x, branch, weight, bias = x[:, 8:40], branch[:, 3:35], weight[::3], bias[:32]
    s, y = add_layer_norm(x.view(3, 4, 32), branch.view(3, 4, 32), weight, bias)
    truth = x.double() + branch.double()
    assert_close_to_truth("s", s, (x + branch).view(3, 4, 32), truth.view(3, 4, 32))
    truth_y = layer_norm_ref(truth, weight.double(), bias.double())
    assert_close_to_truth("y", y.view(12, 32), layer_norm_ref(x + branch, weight, bias), truth_y)


@interpret
def test_columns_that_are_not_contiguous() -> None:
    x, branch, weight, bias, _ = inputs(24, rows=24)
    s, y = add_layer_norm(x.t(), branch.t(), weight, bias)
    want_s, want_y = add_layer_norm_ref(x.t(), branch.t(), weight, bias)
    torch.testing.assert_close(s, want_s)
    torch.testing.assert_close(y, want_y)


@interpret
@pytest.mark.parametrize(
    ("x_dtype", "branch_dtype", "weight_dtype"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float32, torch.float32, torch.float16),
    ],
    ids=["fp32-weights", "autocast-branch", "fp16-weights"],
)
def test_mixed_dtypes(x_dtype: torch.dtype, branch_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, branch, weight, bias, gamma = inputs(56)
    x, branch = x.to(x_dtype), branch.to(branch_dtype)
    weight, bias, gamma = weight.to(weight_dtype), bias.to(weight_dtype), gamma.to(weight_dtype)
    s, y = add_layer_norm(x, branch, weight, bias, gamma=gamma)
    assert s.dtype == y.dtype == x_dtype
    plain_s, _ = add_layer_norm_ref(x, branch, weight, bias, gamma=gamma)
    assert_close_to_truth("s", s, plain_s, x.double() + branch.double() * gamma.double())
    truth = layer_norm_ref(*double(s, weight, bias))
    assert_close_to_truth("y", y, layer_norm_ref(s, weight, bias), truth)


@interpret
def test_statistics_for_backward(poisoned_empty: None) -> None:
    x, branch, weight, bias, _ = inputs(100)
    _, s, mean, rstd = norm_op(x, branch, None, weight, bias, 1e-6, x.dtype, True)
    truth = s.double()
    variance, centre = torch.var_mean(truth, -1, correction=0)
    assert_close_to_truth("mean", mean, s.mean(-1), centre)
    assert_close_to_truth("rstd", rstd, torch.rsqrt(s.var(-1, correction=0) + 1e-6), torch.rsqrt(variance + 1e-6))


@interpret
def test_large_offset_keeps_the_variance() -> None:
    """E[x^2] - mean^2 would lose every digit here."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) + 3000
    weight, bias = torch.ones(64), torch.zeros(64)
    truth = layer_norm_ref(*double(x, weight, bias))
    assert_close_to_truth("y", layer_norm(x, weight, bias), layer_norm_ref(x, weight, bias), truth)


@interpret
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("stats", [False, True])
def test_opcheck(branch: bool, stats: bool) -> None:
    x, other, weight, bias, gamma = inputs(16)
    args: tuple[Any, ...] = (x, other, gamma) if branch else (x, None, None)
    torch.library.opcheck(norm_op, (*args, weight, bias, 1e-6, torch.float16, stats))


@pytest.mark.parametrize("lane", ["plain", pytest.param("kernel", marks=interpret)])
def test_compiles_as_one_graph(lane: str) -> None:
    x, branch, weight, bias, _ = inputs(24)

    def block(x: Tensor, branch: Tensor) -> Tensor:
        s, y = add_layer_norm(x, branch, weight, bias)
        return s + layer_norm(y, weight, bias)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, branch), block(x, branch))


def test_reference_is_torch_layer_norm() -> None:
    x, branch, weight, bias, gamma = inputs(30)
    s, y = add_layer_norm_ref(x, branch, weight, bias, 1e-5, gamma=gamma)
    torch.testing.assert_close(s, x + gamma * branch)
    torch.testing.assert_close(y, F.layer_norm(x + gamma * branch, (30,), weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference_takes_fp32_weights(dtype: torch.dtype) -> None:
    x, _, weight, bias, _ = inputs(30)
    x = x.to(dtype)
    truth = layer_norm_ref(*double(x, weight, bias))
    got = layer_norm_ref(x, weight, bias)
    assert got.dtype == dtype
    assert_close_to_truth("y", got, layer_norm_ref(x.float(), weight, bias).to(dtype), truth)


@pytest.mark.parametrize("lane", ["plain", pytest.param("kernel", marks=interpret)])
def test_gradients(lane: str) -> None:
    """An input that wants a gradient is differentiated, whatever the lane."""
    leaves = [t.double().requires_grad_() for t in inputs(12, rows=3)]
    x, branch, weight, bias, gamma = leaves
    cotangents = torch.randn(2, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(add_layer_norm(x, branch, weight, bias, gamma=gamma), leaves, cotangents.unbind())
    s = x + gamma * branch
    y = (s - s.mean(-1, keepdim=True)) * torch.rsqrt(s.var(-1, correction=0, keepdim=True) + 1e-6) * weight + bias
    for name, mine, want in zip(
        ["x", "branch", "weight", "bias", "gamma"],
        got,
        torch.autograd.grad((s, y), leaves, cotangents.unbind()),
        strict=True,
    ):
        torch.testing.assert_close(mine, want, msg=lambda m, name=name: f"{name}: {m}")


def test_wide_rows_are_covered() -> None:
    for d, num_warps in [(1, 1), (63, 1), (384, 1), (2048, 1), (2050, 8), (16384, 16)]:
        made = geometry(d, {"num_warps": num_warps, "elements": 48})
        assert made["CHUNK"].bit_count() == made["ROWS"].bit_count() == 1
        pieces = -(-d // made["CHUNK"])
        assert pieces * made["CHUNK"] < 2 * max(d, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3)}, r"weight takes \[8\], got \(3,\)"),
        ({"bias": torch.ones(1)}, r"bias takes \[8\]"),
        ({"branch": torch.ones(8)}, r"branch takes x's shape \(5, 8\), got \(8,\)"),
        ({"gamma": torch.ones(5, 8)}, r"gamma takes \[8\]"),
        ({"x": torch.ones(5, 0)}, r"x takes .* got \(5, 0\)"),
    ],
)
def test_wrong_shapes(change: dict[str, Tensor], message: str) -> None:
    names = dict(zip(["x", "branch", "weight", "bias", "gamma"], inputs(8), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**names)


def test_wrong_dtype() -> None:
    _, _, weight, bias, _ = inputs(8)
    with pytest.raises(TypeError, match="x takes a floating dtype, got torch.int64"):
        layer_norm(torch.ones(2, 8, dtype=torch.int64), weight, bias)
