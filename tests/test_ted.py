"""The stencil of the TED-Adapter and the adapter's op: kernels and C++ against float64, gradients included."""

from typing import Any

import pytest
import torch
from lanes import BOTH, KERNEL
from numerics import assert_close_to_truth
from ted_makers import layouts, moved, taps
from torch import Tensor

from mmfast.adapters import FrameLayout
from mmfast_kernels import _C, ted
from mmfast_kernels.dispatch import INTERPRET
from mmfast_kernels.ted import Sites, Taps, stencil_backward_op, stencil_op, ted_stencil, ted_stencil_ref
from mmfast_kernels.ted_adapter import Weights, ted_adapter, ted_adapter_ref

gpu, interpret = pytest.mark.gpu, pytest.mark.interpret
# C++ on the CPU; Triton in the interpreter and on a GPU; CUDA C++ on a GPU.
LANES = [
    pytest.param("cpp", "cpu", torch.float32, id="cpp"),
    *[pytest.param("triton", *p.values, id=p.id, marks=p.marks) for p in KERNEL],
    *[
        pytest.param("cuda", "cuda", t, marks=gpu, id=f"cuda-{ted.tables.dtype_name(t)}")
        for t in (torch.float32, torch.float16, torch.bfloat16)
    ],
]
LAYOUTS = layouts()
# (A_t, A_s) beside every layout: whole vectors, odd widths, more than one block of columns, a single one.
WIDTHS = ((32, 16), (21, 37), (5, 1), (16, 32), (37, 21), (33, 70), (70, 130))


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one that a lane names, forced."""
    name = request.param
    if name == "cuda" and not _C.with_cuda:
        pytest.skip("built without CUDA")
    monkeypatch.setenv("MMFAST_TED", name)
    return name


def rows(layout: FrameLayout, width: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(layout.rows, width, generator=g).to(device, dtype)


def stencil_gradients(h: Tensor, parameters: Taps, sites: Sites, dout: Tensor, op: Any) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (h, *parameters)]
    out = op(leaves[0], Taps(*leaves[1:]), sites)
    return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def check_stencil(h: Tensor, parameters: Taps, sites: Sites, dout: Tensor) -> None:
    got = stencil_gradients(h, parameters, sites, dout, ted_stencil)
    plain = stencil_gradients(h, parameters, sites, dout, ted_stencil_ref)
    wide = Taps(*(t.double() for t in parameters))
    truth = stencil_gradients(h.double(), wide, sites, dout.double(), ted_stencil_ref)
    for name, mine, theirs, exact in zip(("out", "dh", *Taps._fields), got, plain, truth, strict=True):
        assert mine.dtype == theirs.dtype
        assert_close_to_truth(name, mine, theirs, exact)


@pytest.mark.parametrize(("layout", "widths"), list(zip(LAYOUTS.values(), WIDTHS, strict=True)), ids=LAYOUTS)
@pytest.mark.parametrize(("backend", "device", "dtype"), LANES, indirect=["backend"])
def test_stencil(
    layout: FrameLayout, widths: tuple[int, int], backend: str, device: str, dtype: torch.dtype, poisoned_empty: None
) -> None:
    width = sum(widths)
    h, dout = (rows(layout, width, dtype, device, seed) for seed in (1, 2))
    check_stencil(h, taps(widths, dtype, device), moved(layout, device).sites, dout)


@pytest.mark.parametrize(("backend", "device", "dtype"), LANES, indirect=["backend"])
def test_strided_rows_and_expanded_cotangent(
    backend: str, device: str, dtype: torch.dtype, poisoned_empty: None
) -> None:
    layout, widths = moved(LAYOUTS["pack-class"], device), (32, 32)
    h = rows(layout, 96, dtype, device, 1)[:, 16:80]
    dout = rows(layout, 1, dtype, device, 2).expand(-1, 64)
    check_stencil(h, taps(widths, dtype, device), layout.sites, dout)
    check_stencil(h.t().contiguous().t(), taps(widths, dtype, device), layout.sites, h.t().contiguous().t())


@pytest.mark.parametrize(("backend", "device", "dtype"), LANES, indirect=["backend"])
def test_parameters_of_another_dtype(backend: str, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    layout = moved(LAYOUTS["dense"], device)
    other = torch.float16 if dtype == torch.float32 else torch.float32
    h, dout = (rows(layout, 24, dtype, device, seed) for seed in (1, 2))
    check_stencil(h, taps((8, 16), other, device), layout.sites, dout)


@pytest.mark.parametrize(("backend", "device", "dtype"), LANES, indirect=["backend"])
def test_no_rows(backend: str, device: str, dtype: torch.dtype) -> None:
    layout = moved(FrameLayout.dense(0, 2, (2, 2)), device)
    parameters = [t.requires_grad_() for t in taps((8, 8), dtype, device)]
    h = torch.empty(0, 16, dtype=dtype, device=device, requires_grad=True)
    out = ted_stencil(h, Taps(*parameters), layout.sites)
    assert out.shape == (0, 16)
    for gradient in torch.autograd.grad(out.sum(), [h, *parameters]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(("backend", "device", "dtype"), LANES, indirect=["backend"])
def test_same_bits_every_time(backend: str, device: str, dtype: torch.dtype) -> None:
    """Whatever order programs or threads take; and what is saved is left as it was."""
    layout = moved(FrameLayout.dense(19, 2, (3, 3)), device)
    leaves = [t.requires_grad_() for t in (rows(layout, 48, dtype, device, 1), *taps((24, 24), dtype, device))]
    out = ted_stencil(leaves[0], Taps(*leaves[1:]), layout.sites)
    dout = rows(layout, 48, dtype, device, 2)
    once, again = (torch.autograd.grad(out, leaves, dout, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.skipif(INTERPRET, reason="the C++ routine")
@pytest.mark.parametrize("widest", [16, 32, 64])
@pytest.mark.parametrize("threads", [1, 3])
def test_cpp_whatever_the_registers_and_threads(
    widest: int, threads: int, monkeypatch: pytest.MonkeyPatch, poisoned_empty: None
) -> None:
    layout = FrameLayout.dense(4, 3, (7, 7))
    widths = (75, 150)
    h, dout = (rows(layout, 225, torch.float32, "cpu", seed) for seed in (1, 2))
    parameters = list(taps(widths))
    want = [stencil_op(h, parameters, *layout.sites), *stencil_backward_op(dout, h, parameters, *layout.sites, True)]
    monkeypatch.setattr(ted, "threads", lambda: threads)
    monkeypatch.setattr(ted, "WIDEST", widest)
    got = [stencil_op(h, parameters, *layout.sites), *stencil_backward_op(dout, h, parameters, *layout.sites, True)]
    for mine, theirs in zip(got, want, strict=True):
        if widest == 64:
            assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRET, reason="the C++ routine")
def test_cpp_refuses_a_table_that_is_none() -> None:
    layout = LAYOUTS["dense"]
    h, parameters = torch.zeros(layout.rows, 8), taps((4, 4))
    for word, value in ((0, 100), (4, -2), (9, 3), (10, 2), (10, 0)):
        table = layout.sites.table.clone()
        table[1, word] = value
        with pytest.raises(ValueError, match="table of sites"):
            ted_stencil(h, parameters, layout.sites._replace(table=table))


# -- the whole adapter --


def adapter_inputs(
    layout: FrameLayout, dim: int, widths: tuple[int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, Weights, Taps]:
    g = torch.Generator().manual_seed(dim)
    width = sum(widths)
    shapes = ((width, dim), (dim, width), (dim,), (dim,))
    weights = Weights(*((torch.randn(s, generator=g) * 0.2).to(device, dtype) for s in shapes))
    return rows(layout, dim, dtype, device, 3), weights, taps(widths, dtype, device)


def adapter_gradients(layout: FrameLayout, x: Tensor, weights: Weights, parameters: Taps, dy: Tensor, op: Any) -> list:
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights, *parameters)]
    y = op(leaves[0], layout.class_rows, layout.sites, Weights(*leaves[1:5]), Taps(*leaves[5:]))
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize(
    ("layout", "dim"), list(zip(LAYOUTS.values(), (24, 33, 24, 1, 40, 24, 33), strict=True)), ids=LAYOUTS
)
@pytest.mark.parametrize(("backend", "device", "dtype"), LANES, indirect=["backend"])
def test_adapter(
    layout: FrameLayout, dim: int, backend: str, device: str, dtype: torch.dtype, poisoned_empty: None
) -> None:
    layout = moved(layout, device)
    given = adapter_inputs(layout, dim, (16, 11), dtype, device)
    dy = rows(layout, dim, dtype, device, 4)
    got = adapter_gradients(layout, *given, dy, ted_adapter)
    plain = adapter_gradients(layout, *given, dy, ted_adapter_ref)
    wide = (given[0].double(), Weights(*(t.double() for t in given[1])), Taps(*(t.double() for t in given[2])))
    truth = adapter_gradients(layout, *wide, dy.double(), ted_adapter_ref)
    for name, mine, theirs, exact in zip(("y", "x", *Weights._fields, *Taps._fields), got, plain, truth, strict=True):
        assert mine.dtype == dtype
        assert_close_to_truth(name, mine, theirs, exact)


@pytest.mark.parametrize("lane", BOTH)
def test_only_what_is_wanted(lane: str, poisoned_empty: None) -> None:
    """Frozen inputs get no gradient, and those beside them are right."""
    layout = LAYOUTS["pack-class"]
    x, weights, parameters = adapter_inputs(layout, 24, (16, 16), torch.float32, "cpu")
    given = [x, *weights, *parameters]
    dy = rows(layout, 24, torch.float32, "cpu", 4)
    full = adapter_gradients(layout, x, weights, parameters, dy, ted_adapter)[1:]
    for wanted in ([0], [1], [2, 3], [4], [5, 9], [6, 10], [0, 8]):
        leaves = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(given)]
        y = ted_adapter(leaves[0], layout.class_rows, layout.sites, Weights(*leaves[1:5]), Taps(*leaves[5:]))
        y.backward(dy)
        for i, leaf in enumerate(leaves):
            if i in wanted:
                torch.testing.assert_close(leaf.grad, full[i])
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("lane", BOTH)
@pytest.mark.parametrize("backend_name", ["aot_eager", pytest.param("inductor", marks=interpret)])
def test_compiles_as_one_graph(backend_name: str, lane: str) -> None:
    layout = LAYOUTS["dense"]
    x, weights, parameters = adapter_inputs(layout, 24, (16, 16), torch.float32, "cpu")
    leaves = [t.clone().requires_grad_() for t in (x, *weights, *parameters)]
    dy = rows(layout, 24, torch.float32, "cpu", 4)

    def run(*leaves: Tensor) -> Tensor:
        return ted_adapter(leaves[0], layout.class_rows, layout.sites, Weights(*leaves[1:5]), Taps(*leaves[5:])) * 2

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend_name)
    got, want = compiled(*leaves), run(*leaves)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lane", BOTH)
def test_opcheck(lane: str) -> None:
    layout = LAYOUTS["pack"]
    h, dout = (rows(layout, 24, torch.float32, "cpu", seed) for seed in (1, 2))
    parameters = list(taps((8, 16)))
    torch.library.opcheck(stencil_op, (h, parameters, *layout.sites))
    for wants_taps in (False, True):
        torch.library.opcheck(stencil_backward_op, (dout, h, parameters, *layout.sites, wants_taps))


@interpret
def test_opcheck_of_the_product() -> None:
    from mmfast_kernels.ted_adapter import project_op

    layout = LAYOUTS["pack-class"]
    x, weights, _ = adapter_inputs(layout, 24, (8, 8), torch.float32, "cpu")
    u = rows(layout, 16, torch.float32, "cpu", 5)
    torch.library.opcheck(project_op, (x, u, weights.second, weights.bias, weights.cell_bias, layout.class_rows))


@pytest.mark.parametrize("lane", BOTH)
def test_autocast(lane: str) -> None:
    """The stream and every gradient stay fp32; products are in autocast's dtype, so the result is not fp32's."""
    layout = LAYOUTS["dense"]
    half = torch.float16 if lane == "kernel" else torch.bfloat16
    x, weights, parameters = adapter_inputs(layout, 24, (16, 16), torch.float32, "cpu")
    leaves = [t.clone().requires_grad_() for t in (x, *weights, *parameters)]
    with torch.autocast("cpu", half):
        y = ted_adapter(leaves[0], layout.class_rows, layout.sites, Weights(*leaves[1:5]), Taps(*leaves[5:]))
    wide = (Weights(*(t.double() for t in weights)), Taps(*(t.double() for t in parameters)))
    truth = ted_adapter_ref(x.double(), layout.class_rows, layout.sites, *wide)
    error = (y.detach().double() - truth).norm() / (truth - x).norm()
    assert y.dtype == torch.float32
    assert 1e-5 < float(error) < 0.02
    y.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves)


def test_float64_goes_by_torch() -> None:
    layout = LAYOUTS["pack-class"]
    x, weights, parameters = adapter_inputs(layout, 4, (2, 2), torch.float64, "cpu")
    leaves = tuple(t.requires_grad_() for t in (x, *weights, *parameters))

    def run(*leaves: Tensor) -> Tensor:
        return ted_adapter(leaves[0], layout.class_rows, layout.sites, Weights(*leaves[1:5]), Taps(*leaves[5:]))

    assert torch.autograd.gradcheck(run, leaves)


def test_no_second_derivative() -> None:
    layout = LAYOUTS["dense"]
    x, weights, parameters = adapter_inputs(layout, 8, (4, 4), torch.float32, "cpu")
    y = ted_adapter(x.requires_grad_(), layout.class_rows, layout.sites, weights, parameters)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_backend_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    h = torch.zeros(2, 2)
    assert ted.backend_of(h) == ("triton" if INTERPRET else "cpp")
    assert ted.backend_of(h.double()) == "torch"
    monkeypatch.setenv("MMFAST_TED", "torch")
    assert ted.backend_of(h) == "torch"
    monkeypatch.setenv("MMFAST_TED", "cuda")
    with pytest.raises(ValueError, match=r"MMFAST_TED=cuda does not take torch.float32 on cpu"):
        ted.backend_of(h)
    monkeypatch.setenv("MMFAST_TED", "fast")
    with pytest.raises(ValueError, match="must be one of triton, cuda, cpp, torch, got 'fast'"):
        ted.backend_of(h)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"h": torch.zeros(126, 7)}, ValueError, r"h takes \[126, 4 \+ 4\], got \(126, 7\)"),
        ({"h": torch.zeros(126, 8, dtype=torch.int32)}, TypeError, "h takes a floating dtype"),
        ({"taps": {"space_taps": torch.zeros(4, 3, 3)}}, ValueError, r"space_taps takes \[4, 9\], got \(4, 3, 3\)"),
        ({"sites": {"frames": 0}}, ValueError, "frames from 1"),
        ({"sites": {"table": torch.zeros(21, 9, dtype=torch.int32)}}, ValueError, r"takes \[U, 12\]"),
        ({"sites": {"table": torch.zeros(21, 12)}}, TypeError, "sites takes torch.int32"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    layout = LAYOUTS["dense"]
    given = {"h": torch.zeros(126, 8), "taps": taps((4, 4)), "sites": layout.sites}
    for name, value in change.items():
        given[name] = given[name]._replace(**value) if isinstance(value, dict) else value
    with pytest.raises(error, match=message):
        ted_stencil(**given)


def test_adapter_refusals() -> None:
    layout = LAYOUTS["dense"]
    x, weights, parameters = adapter_inputs(layout, 8, (4, 4), torch.float32, "cpu")
    for change, error, message in (
        ({"x": x[1:]}, ValueError, r"x takes \[126, D\]"),
        ({"x": x.int()}, TypeError, "x takes a floating dtype"),
        ({"weights": weights._replace(second=weights.second[1:])}, ValueError, r"second takes \[8, 8\]"),
        ({"class_rows": torch.zeros(6, dtype=torch.int32)}, TypeError, "class_rows takes torch.int64"),
    ):
        given = {"x": x, "class_rows": layout.class_rows, "sites": layout.sites, "weights": weights, "taps": parameters}
        with pytest.raises(error, match=message):
            ted_adapter(**(given | change))
