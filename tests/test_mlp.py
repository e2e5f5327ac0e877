"""linear_gelu: kernels and CPU path against float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_truth, relative_error
from torch import Tensor

from mmfast_kernels.mlp import MODES, launch, linear, linear_gelu, linear_gelu_op, linear_gelu_ref

gpu = pytest.mark.gpu
interpret = pytest.mark.interpret
LANES = [pytest.param("cpu", torch.float32, marks=interpret), pytest.param("cpu", torch.float16, marks=interpret)] + [
    pytest.param("cuda", dtype, marks=gpu) for dtype in (torch.float32, torch.float16, torch.bfloat16)
]
SHAPES = [(1, 8, 24), (37, 40, 70), (33, 65, 16)]  # rows, K, N: one row; tails everywhere; K just over a block
TILE = {"BM": 16, "BN": 32, "BK": 16, "num_warps": 4, "num_stages": 2}


def inputs(m: int, k: int, n: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(m + k + n)
    x, weight, bias = torch.randn(m, k, generator=g), torch.randn(n, k, generator=g), torch.randn(n, generator=g)
    return tuple(t.to(device, dtype) for t in (x, weight / math.sqrt(k) * 2, bias))


def truth_of(x: Tensor, weight: Tensor, bias: Tensor | None, mode: str) -> Tensor:
    return linear_gelu_ref(x.double(), weight.double(), None if bias is None else bias.double(), mode)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, mode: str) -> Tensor:
    """Plain torch; for "tanh" in fp32 as the formula, else the erf form that it stands for."""
    return linear_gelu_ref(x, weight, bias, "erf" if mode == "tanh" and x.dtype != torch.float32 else mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_kernel(mode: str, shape: tuple[int, int, int], device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    x, weight, bias = inputs(*shape, dtype=dtype, device=device)
    got = linear_gelu(x, weight, bias, mode)
    assert_close_to_truth("y", got, plain(x, weight, bias, mode), truth_of(x, weight, bias, mode))


@interpret
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_descriptor_kernel(mode: str, with_bias: bool) -> None:
    """The sm_90 kernel, which the interpreter takes too; 3 x 3 tiles with tails in every direction."""
    x, weight, bias = inputs(37, 40, 72)
    given = bias if with_bias else None
    tile = TILE | {"kernel": "descriptor", "blocks_per_sm": 2, "FLATTEN": True}
    h = torch.full((37, 72), float("nan"))
    for hidden in (None, h):
        y = torch.full((37, 72), float("nan"))
        launch(x, weight, given, y, hidden, mode, tile)
        assert_close_to_truth("y", y, plain(x, weight, given, mode), truth_of(x, weight, given, mode))
    wide = F.linear(x.double(), weight.double(), None if given is None else given.double())
    assert_close_to_truth("h", h, F.linear(x, weight, given), wide)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "k", "n"), [(3137, 384, 1536), (1000, 768, 3072), (200, 1024, 4096), (500, 588, 1000)])
def test_model_shapes_on_gpu(m: int, k: int, n: int, dtype: torch.dtype, mode: str) -> None:
    x, weight, bias = inputs(m, k, n, dtype=dtype, device="cuda")
    got = linear_gelu(x, weight, bias, mode)
    truth = truth_of(x, weight, bias, "erf" if mode == "tanh" else mode)
    assert relative_error(got, truth) <= 1.05 * relative_error(plain(x, weight, bias, mode), truth)


@interpret
def test_no_bias(poisoned_empty: None) -> None:
    x, weight, _ = inputs(5, 16, 24)
    assert_close_to_truth(
        "y", linear_gelu(x, weight, None), plain(x, weight, None, "erf"), truth_of(x, weight, None, "erf")
    )


@interpret
def test_leading_dimensions_strides_and_no_rows(poisoned_empty: None) -> None:
    x, weight, bias = inputs(12, 48, 20)
    x, weight = x.view(3, 4, 48)[..., 7:39], weight[:, 5:37]
    got = linear_gelu(x, weight, bias)
    assert_close_to_truth("y", got, plain(x, weight, bias, "erf"), truth_of(x, weight, bias, "erf"))
    assert_close_to_truth("none", linear_gelu(x[:0], weight, bias), got[:0], got[:0].double())


@pytest.mark.parametrize("lane", ["plain", pytest.param("kernel", marks=interpret)])
@pytest.mark.parametrize("mode", MODES)
def test_large_inputs_stay_finite(lane: str, mode: str) -> None:
    """The refit polynomial turns negative beyond |x| = 11 unless it is bounded; exp(2u) overflows beyond 44."""
    x = torch.tensor([[-1e4], [-40.0], [-12.0], [0.0], [12.0], [40.0], [1e4]])
    got = linear_gelu(x, torch.ones(1, 1), None, mode)
    torch.testing.assert_close(got, x.clamp(min=0.0), atol=1e-5, rtol=1e-6)


def test_refit_is_close_to_erf() -> None:
    h = torch.linspace(-40, 40, 160001, dtype=torch.float64)[:, None]
    one = torch.ones(1, 1, dtype=torch.float64)
    assert (linear_gelu_ref(h, one, None, "tanh") - F.gelu(h)).abs().max() < 2.6e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 8, 4), (1, 8, 24), (37, 40, 70)], ids=str)
def test_path_without_kernel(mode: str, dtype: torch.dtype, shape: tuple[int, int, int], monkeypatch: Any) -> None:
    monkeypatch.setattr("mmfast_kernels.mlp.use_kernel", lambda *_: False)
    x, weight, bias = inputs(*shape, dtype=dtype)
    form = "erf" if mode == "tanh" else mode
    got = linear_gelu(x, weight, bias, mode)
    assert got.dtype == dtype
    assert_close_to_truth("y", got, linear_gelu_ref(x, weight, bias, form), truth_of(x, weight, bias, form))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear(dtype: torch.dtype) -> None:
    x, weight, bias = inputs(10, 24, 16, dtype=dtype)
    truth = F.linear(x.double(), weight.double(), bias.double())
    assert_close_to_truth("y", linear(x, weight, bias), F.linear(x, weight, bias), truth)


@pytest.mark.parametrize("lane", ["plain", pytest.param("kernel", marks=interpret)])
@pytest.mark.parametrize("mode", ["erf", "quick"])
def test_gradients(lane: str, mode: str) -> None:
    leaves = [t.double().requires_grad_() for t in inputs(3, 5, 4)]
    cotangent = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h = F.linear(*leaves)
    want = torch.autograd.grad(F.gelu(h) if mode == "erf" else h * torch.sigmoid(1.702 * h), leaves, cotangent)
    torch.testing.assert_close(torch.autograd.grad(linear_gelu(*leaves, mode), leaves, cotangent), want)


@pytest.mark.parametrize("lane", ["plain", pytest.param("kernel", marks=interpret)])
@pytest.mark.parametrize("mode", MODES)
def test_compiles_as_one_graph(lane: str, mode: str) -> None:
    x, weight, bias = inputs(6, 16, 8)
    compiled = torch.compile(lambda *a: linear_gelu(*a, mode), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), linear_gelu(x, weight, bias, mode))


@interpret
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(with_bias: bool) -> None:
    x, weight, bias = inputs(6, 16, 8)
    torch.library.opcheck(linear_gelu_op, (x, weight, bias if with_bias else None, "erf"))


def test_autocast_takes_its_dtype() -> None:
    x, weight, bias = inputs(6, 16, 8)
    with torch.autocast("cpu", dtype=torch.float16):
        got, want = linear_gelu(x.half(), weight, bias), F.gelu(F.linear(x, weight, bias))
    assert got.dtype == torch.float16
    truth = truth_of(x.half(), weight.half(), bias.half(), "erf")
    assert_close_to_truth("y", got, want, truth)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "relu"}, ValueError, "mode takes one of .* got 'relu'"),
        ({"weight": torch.ones(4)}, ValueError, r"weight takes \[N, K\], got \(4,\)"),
        ({"x": torch.ones(3, 6)}, ValueError, r"x takes \[..., 5\] .* got \(3, 6\)"),
        ({"bias": torch.ones(1)}, ValueError, r"bias takes \[4\], got \(1,\)"),
        ({"weight": torch.ones(4, 5).half()}, TypeError, "weight takes x's floating dtype, got torch.float16"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, weight, bias = inputs(3, 5, 4)
    with pytest.raises(error, match=message):
        linear_gelu(**({"x": x, "weight": weight, "bias": bias} | change))
