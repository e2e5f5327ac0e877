"""Gradients of linear_gelu and mlp: kernels, oneDNN in blocks of rows, and plain torch, against float64."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from numerics import assert_close_to_truth
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast_kernels.linear import onednn_takes
from mmfast_kernels.mlp import MODES, gelu_backward_op, linear_gelu, linear_gelu_hidden_op, linear_gelu_ref
from mmfast_kernels.mlp_block import mlp, mlp_ref

gpu, interpret = pytest.mark.gpu, pytest.mark.interpret
LANES = [
    pytest.param("plain", torch.float32, id="plain-fp32"),
    pytest.param("plain", torch.bfloat16, id="plain-bf16"),
    pytest.param("cpu", torch.float32, id="kernel-fp32", marks=interpret),
    pytest.param("cpu", torch.float16, id="kernel-fp16", marks=interpret),
    *(pytest.param("cuda", dtype, marks=gpu) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
]
BOTH = ["plain", pytest.param("kernel", marks=interpret)]
SHAPES = [
    (1, 8, 24),
    (37, 40, 70),
    (33, 65, 16),
]  # rows, K, N: one row; several blocks and groups, tails; K over a block


@pytest.fixture
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of a lane; "plain" takes the kernels away. Blocks of rows are small, so that there are several."""
    for module in ("mlp", "mlp_block"):
        if request.param == "plain":
            monkeypatch.setattr(f"mmfast_kernels.{module}.use_kernel", lambda *_: False)
    monkeypatch.setattr("mmfast_kernels.mlp_block.ROWS", 16)
    monkeypatch.setattr("mmfast_kernels.linear.ROWS", 16)
    return request.param if request.param == "cuda" else "cpu"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(m: int, k: int, n: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """x, w1, b1, w2, b2 of an MLP of width k and n hidden units; the first three are linear_gelu's."""
    made = [randn(m, k), randn(n, k) / math.sqrt(k) * 2, randn(n), randn(k, n, seed=1) / math.sqrt(n), randn(k, seed=1)]
    return [t.to(device, dtype) for t in made]


def gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], cotangent: Tensor, mode: str, **options: Any
) -> list[Tensor]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    return list(
        torch.autograd.grad(function(*leaves, mode, **options), [t for t in leaves if t is not None], cotangent)
    )


def check(
    op: Callable[..., Tensor],
    ref: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    cotangent: Tensor,
    mode: str,
    plain_mode: str,
    truth_mode: str,
    **options: Any,
) -> None:
    """Every gradient of op against ref's in float64, by the bar of ref's in the same dtype."""
    got = gradients(op, tensors, cotangent, mode, **options)
    plain = gradients(ref, tensors, cotangent, plain_mode)
    wide = [None if t is None else t.double() for t in tensors]
    truth = gradients(ref, wide, cotangent.double(), truth_mode)
    names = [n for n, t in zip(("x", "w1", "b1", "w2", "b2"), tensors, strict=False) if t is not None]
    for name, g, p, t in zip(names, got, plain, truth, strict=True):
        assert g.dtype == cotangent.dtype
        assert_close_to_truth(f"d{name}", g, p, t)


def forms(mode: str, lane: str, dtype: torch.dtype) -> tuple[str, str, str]:
    """mode, the form that plain torch is taken in, and that of the truth: without kernels "tanh" is the erf form."""
    if mode != "tanh":
        return mode, mode, mode
    kernel = lane != "plain"
    return mode, "tanh" if kernel and dtype == torch.float32 else "erf", "tanh" if kernel else "erf"


def cases(test: Callable[..., None]) -> Callable[..., None]:
    for mark in (
        pytest.mark.parametrize("mode", MODES),
        pytest.mark.parametrize("shape", SHAPES, ids=str),
        pytest.mark.parametrize(("lane", "dtype"), LANES, indirect=["lane"]),
    ):
        test = mark(test)
    return test


@cases
def test_linear_gelu(
    mode: str, shape: tuple[int, int, int], lane: str, dtype: torch.dtype, poisoned_empty: None, request: Any
) -> None:
    tensors = inputs(*shape, dtype=dtype, device=lane)[:3]
    cotangent = randn(shape[0], shape[2], seed=2).to(lane, dtype)
    kind = request.node.callspec.params["lane"]
    check(linear_gelu, linear_gelu_ref, tensors, cotangent, *forms(mode, kind, dtype))


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@cases
def test_mlp(
    mode: str,
    shape: tuple[int, int, int],
    lane: str,
    dtype: torch.dtype,
    recompute: bool,
    poisoned_empty: None,
    request: Any,
) -> None:
    tensors = inputs(*shape, dtype=dtype, device=lane)
    cotangent = randn(shape[0], shape[1], seed=2).to(lane, dtype)
    kind = request.node.callspec.params["lane"]
    check(mlp, mlp_ref, tensors, cotangent, *forms(mode, kind, dtype), recompute=recompute)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("lane", "dtype"), LANES, indirect=["lane"])
def test_mlp_forward(mode: str, lane: str, dtype: torch.dtype, poisoned_empty: None, request: Any) -> None:
    """The same value with and without a graph."""
    tensors = inputs(37, 40, 70, dtype, lane)
    _, plain_mode, truth_mode = forms(mode, request.node.callspec.params["lane"], dtype)
    plain, truth = mlp_ref(*tensors, plain_mode), mlp_ref(*(t.double() for t in tensors), truth_mode)
    assert_close_to_truth("y", mlp(*tensors, mode), plain, truth)
    tensors[0].requires_grad_()
    assert_close_to_truth("y with a graph", mlp(*tensors, mode).detach(), plain, truth)
    assert_close_to_truth("y, recomputed", mlp(*tensors, mode, recompute=True).detach(), plain, truth)


class _Products(TorchDispatchMode):
    """Notes what oneDNN is told to do behind each product."""

    def __init__(self) -> None:
        super().__init__()
        self.behind: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.behind.append(args[3])
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not onednn_takes(torch.ones(1, 1)), reason="torch without oneDNN")
@pytest.mark.parametrize("lane", ["plain"], indirect=True)
def test_the_gelu_is_part_of_the_product_where_h_is_not_kept(lane: str) -> None:
    """Without a gradient in one piece, however many rows there are; recomputed, in blocks of rows."""
    tensors = inputs(40, 8, 24)
    with _Products() as products:
        mlp(*tensors)
    assert products.behind == ["gelu", "none"]
    tensors[0].requires_grad_()
    for recompute, behind in ((True, ["gelu", "none"] * 3), (False, ["none"] * 6)):
        with _Products() as products:
            mlp(*tensors, recompute=recompute)
        assert products.behind == behind


@gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "d"), [(3137, 384), (1000, 768), (200, 1024), (501, 1408)])
def test_model_shapes_on_gpu(m: int, d: int, dtype: torch.dtype, mode: str) -> None:
    tensors = inputs(m, d, 4 * d, dtype, "cuda")
    cotangent = randn(m, d, seed=2).to("cuda", dtype)
    for recompute in (False, True):
        check(mlp, mlp_ref, tensors, cotangent, *forms(mode, "cuda", dtype), recompute=recompute)


DEEP = [-1e4, -40.0, -13.0, -11.5, -6.01, -5.99, -2.0, -0.5, 0.0, 0.5, 2.0, 5.99, 6.01, 11.5, 13.0, 40.0, 1e4]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lane", BOTH, indirect=True)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_deep_values(mode: str, lane: str, request: Any) -> None:
    """Beyond |h| = 6 the refit form's argument is linear, beyond 11 its polynomial would turn; exp overflows beyond 44."""
    x = torch.tensor(DEEP)[:, None]
    kind = request.node.callspec.params["lane"]
    tensors = [x, torch.ones(1, 1), torch.zeros(1), torch.ones(1, 1), torch.zeros(1)]
    for op, ref, given in ((linear_gelu, linear_gelu_ref, tensors[:3]), (mlp, mlp_ref, tensors)):
        leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        (got,) = torch.autograd.grad(op(leaf, *given[1:], mode).sum(), leaf)
        truth_mode = forms(mode, kind, torch.float32)[2]
        (truth,) = torch.autograd.grad(ref(wide, *(t.double() for t in given[1:]), truth_mode).sum(), wide)
        torch.testing.assert_close(got.double(), truth, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("sums", [False, True])
@interpret
def test_gelu_backward_op(act: bool, sums: bool, poisoned_empty: None) -> None:
    """Each of its results is there when asked for, and right."""
    dy, h = randn(45, 70), randn(45, 70, seed=1).requires_grad_()
    a = torch.nn.functional.gelu(h)
    (dh,) = torch.autograd.grad(a, h, dy)
    want = [dh, *([a.detach()] if act else []), *([dh.sum(0)] if sums else [])]
    got = gelu_backward_op(dy, h.detach(), "erf", act, sums)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("lane", BOTH, indirect=True)
def test_layouts(lane: str, recompute: bool, poisoned_empty: None) -> None:
    """Strided x [3, 7, K] and weights, and cotangents expanded or of another layout."""
    x, w1, b1, w2, b2 = inputs(42, 48, 20)
    tensors = [x.view(6, 7, 48)[::2, :, 5:21], w1[:, 5:21], randn(40)[::2], randn(20, 9, seed=3).t(), None]
    for cotangent in (torch.ones(()).expand(3, 7, 9), randn(9, 7, 3).permute(2, 1, 0), randn(3, 7, 18)[..., ::2]):
        check(mlp, mlp_ref, tensors, cotangent, "erf", "erf", "erf", recompute=recompute)
    for cotangent in (torch.ones(()).expand(3, 7, 20), randn(20, 7, 3).permute(2, 1, 0)):
        check(linear_gelu, linear_gelu_ref, tensors[:3], cotangent, "erf", "erf", "erf")


@pytest.mark.parametrize("lane", BOTH, indirect=True)
def test_no_biases_and_no_rows(lane: str, poisoned_empty: None) -> None:
    x, w1, b1, w2, b2 = inputs(20, 8, 24)
    check(mlp, mlp_ref, [x, w1, None, w2, None], randn(20, 8), "erf", "erf", "erf")
    check(linear_gelu, linear_gelu_ref, [x, w1, None], randn(20, 24), "erf", "erf", "erf")
    for recompute in (False, True):
        for grad in gradients(mlp, [x[:0], w1, b1, w2, b2], randn(0, 8), "erf", recompute=recompute):
            assert not grad.any()
    for grad in gradients(linear_gelu, [x[:0], w1, b1], randn(0, 24), "erf"):
        assert not grad.any()


@pytest.mark.parametrize("lane", BOTH, indirect=True)
def test_one_gradient_at_a_time(lane: str) -> None:
    tensors = inputs(20, 8, 24)
    for op, given, cotangent in ((mlp, tensors, randn(20, 8)), (linear_gelu, tensors[:3], randn(20, 24))):
        want = gradients(op, given, cotangent, "erf")
        for i in range(len(given)):
            leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate(given)]
            (got,) = torch.autograd.grad(op(*leaves), leaves[i], cotangent)
            torch.testing.assert_close(got, want[i], rtol=0, atol=0)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("lane", BOTH, indirect=True)
def test_again_gives_the_same_bits(lane: str, recompute: bool) -> None:
    leaves = [t.requires_grad_() for t in inputs(37, 40, 70)]
    y, cotangent = mlp(*leaves, recompute=recompute), randn(37, 40, seed=2)
    first = torch.autograd.grad(y, leaves, cotangent, retain_graph=True)
    for again in (y, mlp(*leaves, recompute=recompute)):
        second = torch.autograd.grad(again, leaves, cotangent)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def bytes_kept(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> int:
    """Of the distinct memory that function's graph keeps, what is not a parameter."""
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    leaves = [t.clone().requires_grad_() for t in tensors]
    with saved_tensors_hooks(note, lambda t: t):
        y = function(*leaves)
    del y
    return sum(size for at, size in kept.items() if at not in {t.untyped_storage().data_ptr() for t in leaves[1:]})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lane", BOTH, indirect=True)
def test_memory_kept(lane: str, mode: str) -> None:
    """x and the hidden layer, five times x; x alone with recompute. Plain torch: nine."""
    tensors = inputs(64, 16, 64)
    x_bytes = tensors[0].nbytes
    assert bytes_kept(functools.partial(mlp, mode=mode), tensors) == 5 * x_bytes
    assert bytes_kept(functools.partial(mlp, mode=mode, recompute=True), tensors) == x_bytes
    assert bytes_kept(mlp_ref, tensors) == 9 * x_bytes


def test_recompute_keeps_x_alone_without_the_fast_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmfast_kernels.mlp_block.use_kernel", lambda *_: False)
    tensors = [t.double() for t in inputs(64, 16, 64)]
    assert bytes_kept(functools.partial(mlp, recompute=True), tensors) == tensors[0].nbytes


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("lane", BOTH, indirect=True)
def test_autocast(lane: str, recompute: bool) -> None:
    """Products in autocast's dtype, gradients in the parameters'."""
    tensors = inputs(20, 16, 24)
    half = [t.half() for t in tensors]
    plain = gradients(mlp_ref, half, randn(20, 16).half(), "erf")
    truth = gradients(mlp_ref, [t.double() for t in half], randn(20, 16).half().double(), "erf")
    leaves = [t.requires_grad_() for t in tensors]
    with torch.autocast("cpu", dtype=torch.float16):
        y = mlp(*leaves, recompute=recompute)
    assert y.dtype == torch.float16
    got = torch.autograd.grad(y, leaves, randn(20, 16).half())
    assert {g.dtype for g in got} == {torch.float32}
    for name, g, p, t in zip(("x", "w1", "b1", "w2", "b2"), got, plain, truth, strict=True):
        assert_close_to_truth(f"d{name}", g, p, t)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("lane", BOTH, indirect=True)
def test_compiles_as_one_graph(lane: str, recompute: bool, backend: str) -> None:
    if backend == "inductor" and recompute:
        pytest.skip("one of the two is enough for a slow backend")
    tensors = inputs(20, 16, 24)

    def step(*leaves: Tensor) -> Tensor:
        return mlp(*leaves, recompute=recompute) + linear_gelu(*leaves[:3])[:, :16]

    leaves = [t.requires_grad_() for t in tensors]
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    cotangent = randn(20, 16)
    got = torch.autograd.grad(compiled(*leaves), leaves, cotangent)
    torch.testing.assert_close(got, torch.autograd.grad(step(*leaves), leaves, cotangent), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lane", BOTH, indirect=True)
def test_second_derivatives(lane: str, mode: str, recompute: bool, request: Any) -> None:
    """A backward under create_graph=True returns gradients that can be differentiated, not constants."""
    tensors, truth_mode = inputs(20, 8, 24), forms(mode, request.node.callspec.params["lane"], torch.float32)[2]

    def penalty(function: Callable[..., Tensor], given: Sequence[Tensor], **options: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in given]
        y = function(*leaves, **options)
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        total = torch.stack([g.square().sum() for g in grads]).sum()
        return list(torch.autograd.grad(total, leaves))

    for op, ref, given, options in (
        (mlp, mlp_ref, tensors, {"recompute": recompute}),
        (linear_gelu, linear_gelu_ref, tensors[:3], {}),
    ):
        got = penalty(op, given, mode=mode, **options)
        plain = penalty(ref, given, mode=truth_mode)
        truth = penalty(ref, [t.double() for t in given], mode=truth_mode)
        for i, (g, p, t) in enumerate(zip(got, plain, truth, strict=True)):
            assert_close_to_truth(f"second derivative {i}", g, p, t)


@interpret
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(with_bias: bool) -> None:
    x, w1, b1, *_ = inputs(6, 16, 8)
    torch.library.opcheck(linear_gelu_hidden_op, (x, w1, b1 if with_bias else None, "erf"))
    torch.library.opcheck(gelu_backward_op, (randn(6, 8), randn(6, 8), "erf", with_bias, True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "relu"}, ValueError, "mlp: mode takes one of .* got 'relu'"),
        ({"x": torch.ones(3, 6)}, ValueError, r"x takes \[..., 5\] for w1 \(4, 5\), got \(3, 6\)"),
        ({"b1": torch.ones(1)}, ValueError, r"b1 takes \[4\], got \(1,\)"),
        ({"w2": torch.ones(5, 3)}, ValueError, r"w2 takes \[E, 4\] for w1 \(4, 5\), got \(5, 3\)"),
        ({"b2": torch.ones(1)}, ValueError, r"b2 takes \[5\], got \(1,\)"),
        ({"w2": torch.ones(5, 4).half()}, TypeError, "w2 takes x's floating dtype, got torch.float16"),
        ({"x": torch.ones(3, 5).int()}, TypeError, "x takes a floating dtype, got torch.int32"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, w1, b1, w2, b2 = inputs(3, 5, 4)
    with pytest.raises(error, match=message):
        mlp(**({"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2} | change))
