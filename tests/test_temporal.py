"""The temporal cross-attention: kernels and blocks of torch against float64, gradients included."""

import pytest
import torch
from lanes import KERNEL
from numerics import assert_close_to_truth, relative_error
from temporal_makers import CASES, Case, gradients, make, published, published_on, random_cells
from torch import Tensor

from mmfast_kernels import temporal, temporal_blocked
from mmfast_kernels.dispatch import INTERPRET
from mmfast_kernels.temporal import dscores_op, dtables_op, forward_op, temporal_cross_attention

gpu, interpret = pytest.mark.gpu, pytest.mark.interpret
# Blocks of torch on the CPU; Triton in the interpreter and on a GPU.
plain = pytest.mark.skipif(INTERPRET, reason="blocks of torch")
LANES = [
    *[pytest.param("cpu", t, id=f"blocked-{t}", marks=plain) for t in (torch.float32, torch.bfloat16)],
    *KERNEL,
]
NAMES = ("out", "dq", "dk", "dw1", "dw2")


def check(leaves: list[Tensor], dout: Tensor, grid: tuple[int, int], cells: Tensor | None) -> None:
    op = published_on(cells, grid)
    got = gradients(temporal_cross_attention, leaves, dout, grid, cells)
    ours = gradients(op, leaves, dout)
    truth = gradients(op, [t.double() for t in leaves], dout.double())
    for name, mine, theirs, exact in zip(NAMES, got, ours, truth, strict=True):
        assert mine.dtype == theirs.dtype
        assert_close_to_truth(name, mine, theirs, exact)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_close_to_truth(case: Case, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    (*leaves, dout), cells = make(case, dtype, device)
    check(leaves, dout, case.grid, cells)


@pytest.mark.parametrize("kept", [None, 9], ids=["all", "kept"])
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_strided(kept: int | None, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    """q and k as parts of one product with class tokens before the cells, tables with a step, an expanded cotangent."""
    case = Case(2, 3, (4, 4), kept, 2, 16, 32)
    (q, k, w1, w2, dout), cells = make(case, dtype, device)
    joined = torch.randn(2, 3, q.shape[2] + 1, 3, 2, 16, device=device).to(dtype)
    q, k = joined[:, :, 1:, 0], joined[:, :, 1:, 1]
    w1, w2 = w1.t().contiguous().t(), torch.stack((w2, w2), 1)[:, 1]
    check([q, k, w1, w2], dout, case.grid, cells)
    check([q, k, w1, w2], dout[..., :1].expand_as(dout), case.grid, cells)
    check([q, k.transpose(3, 4).contiguous().transpose(3, 4), w1, w2], dout[:1, :1, :1].expand_as(dout), (4, 4), cells)


@pytest.mark.parametrize("kept", [None, 9], ids=["all", "kept"])
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_scores_far_below_zero(kept: int | None, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    """A key past the last one would have the score 0, and a probability that no dtype holds."""
    case = Case(1, 3, (3, 5), kept, 2, 16, 16)
    (q, k, w1, w2, dout), cells = make(case, dtype, device)
    check([q / 8 + 8, k / 8 - 8, w1, w2], dout, case.grid, cells)


@plain
@pytest.mark.parametrize("grid", [(14, 14), (4, 13)], ids=str)
def test_equals_the_published_module(grid: tuple[int, int]) -> None:
    """At the published grid, in fp32."""
    (*leaves, dout), _ = make(Case(1, 3, grid, None, 2, 16, 24))
    got = gradients(temporal_cross_attention, leaves, dout, grid)
    want = gradients(published, leaves, dout, grid)
    for name, mine, theirs in zip(NAMES, got, want, strict=True):
        assert relative_error(mine, theirs) < 1e-5, name


@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_all_cells_given_are_as_none(device: str, dtype: torch.dtype) -> None:
    case = Case(2, 3, (4, 3), None, 2, 16, 16)
    (*leaves, dout), _ = make(case, dtype, device)
    cells = torch.arange(12, device=device, dtype=torch.int32).expand(2, -1)
    given = gradients(temporal_cross_attention, leaves, dout, case.grid, cells)
    none = gradients(temporal_cross_attention, leaves, dout, case.grid)
    for mine, theirs in zip(given, none, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_removed_cells_are_no_keys(device: str, dtype: torch.dtype) -> None:
    """A masked view equals a whole one whose removed keys no query can see: at -inf after the scaling by sqrt(d)."""
    grid, cells = (3, 4), random_cells(1, (3, 4), 7).to(device)
    (q, k, w1, w2, _), _ = make(Case(1, 3, grid, None, 1, 16, 8), dtype, device)
    q[..., 0], k[..., 0] = 8, -3000.0
    k[:, :, cells[0], :, 0] = 0
    whole = temporal_cross_attention(q, k, w1, w2, grid)[:, :, cells[0]]
    kept = temporal_cross_attention(q[:, :, cells[0]], k[:, :, cells[0]], w1, w2, grid, cells)
    torch.testing.assert_close(kept, whole)


@pytest.mark.parametrize(("views", "frames", "kept"), [(0, 3, None), (0, 2, 3), (2, 1, None), (2, 3, 0), (2, 1, 3)])
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_nothing_to_look_at(
    views: int, frames: int, kept: int | None, device: str, dtype: torch.dtype, poisoned_empty: None
) -> None:
    """No views, one frame, no cells: zeros, and so are the gradients."""
    n = 6 if kept is None else kept
    cells = None if kept is None else torch.arange(n, device=device).expand(views, n)
    q, k = (torch.randn(views, frames, n, 2, 8, device=device).to(dtype).requires_grad_() for _ in "qk")
    w1, w2 = (torch.randn(15, 4, device=device).to(dtype).requires_grad_() for _ in "12")
    out = temporal_cross_attention(q, k, w1, w2, (2, 3), cells)
    assert torch.equal(out, torch.zeros(views, frames, n, 4, dtype=dtype, device=device))
    for gradient in torch.autograd.grad(out.sum(), (q, k, w1, w2)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("kept", [None, 9], ids=["all", "kept"])
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_same_bits_every_time(kept: int | None, device: str, dtype: torch.dtype) -> None:
    case = Case(3, 3, (4, 4), kept, 2, 16, 16)
    (*leaves, dout), cells = make(case, dtype, device)
    leaves = [t.requires_grad_() for t in leaves]
    out = temporal_cross_attention(*leaves, case.grid, cells)
    once, again = (torch.autograd.grad(out, leaves, dout, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (2,), (3,), (1, 2)], ids=str)
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_only_what_asks_has_a_gradient(wanted: tuple[int, ...], device: str, dtype: torch.dtype) -> None:
    case = CASES["square"]
    (*leaves, dout), _ = make(case, dtype, device)
    every = gradients(temporal_cross_attention, leaves, dout, case.grid)[1:]
    for i in wanted:
        leaves[i] = leaves[i].requires_grad_()
    temporal_cross_attention(*leaves, case.grid).backward(dout)
    for i, (leaf, gradient) in enumerate(zip(leaves, every, strict=True)):
        assert (leaf.grad is not None) == (i in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, gradient)


def test_frozen_scores_are_not_kept() -> None:
    """Tables alone need the mean probabilities and the cells, not q and k."""
    case = CASES["kept"]
    (q, k, w1, w2, _), cells = make(case)
    out = temporal_cross_attention(q, k, w1.requires_grad_(), w2, case.grid, cells)
    kept = [t for t in out.grad_fn.saved_tensors if t is not None]
    assert [tuple(t.shape) for t in kept] == [(2, 3, 2, 9, 16), (3, 9)]


@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_tables_of_another_dtype(device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    """fp32 tables on narrow q and k, and the other way round: the products and the result are in the tables' dtype."""
    other = torch.float16 if dtype == torch.float32 else torch.float32
    case = CASES["odd"]
    (q, k, *_), _ = make(case, dtype, device)
    (_, _, w1, w2, dout), _ = make(case, other, device)
    check([q, k, w1, w2], dout, case.grid, None)


@plain
def test_autocast_takes_the_products() -> None:
    case = CASES["square"]
    (q, k, w1, w2, dout), _ = make(case)
    leaves = [t.requires_grad_() for t in (w1, w2)]
    with torch.autocast("cpu", torch.bfloat16):
        out = temporal_cross_attention(q, k, *leaves, case.grid)
    narrow = temporal_cross_attention(q, k, w1.bfloat16(), w2.bfloat16(), case.grid)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, narrow)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out, leaves, dout.bfloat16()))


@plain
@pytest.mark.parametrize("kept", [None, 4], ids=["all", "kept"])
def test_gradcheck(kept: int | None) -> None:
    case = Case(1, 3, (2, 3), kept, 2, 3, 2)
    (*leaves, _), cells = make(case, torch.float64)
    leaves = [t.requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(lambda *given: temporal_cross_attention(*given, case.grid, cells), leaves)


@plain
@pytest.mark.parametrize("kept", [None, 9], ids=["all", "kept"])
def test_steps_of_any_size(kept: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little scratch memory a step may take."""
    case = Case(3, 4, (4, 4), kept, 2, 8, 16)
    (*leaves, dout), cells = make(case)
    want = gradients(temporal_cross_attention, leaves, dout, case.grid, cells)
    monkeypatch.setattr(temporal_blocked, "SCRATCH", 1)
    got = gradients(temporal_cross_attention, leaves, dout, case.grid, cells)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@plain
@pytest.mark.parametrize("few", [0, 1 << 30], ids=["pair by pair", "all pairs"])
@pytest.mark.parametrize("kept", [None, 9], ids=["all", "kept"])
def test_few_cells_or_many(kept: int | None, few: int, monkeypatch: pytest.MonkeyPatch, poisoned_empty: None) -> None:
    """Whether pairs of frames count as small, and are taken together, or not."""
    case = Case(3, 4, (4, 4), kept, 2, 8, 16)
    monkeypatch.setattr(temporal_blocked, "FEW_SCORES", few)
    monkeypatch.setattr(temporal_blocked, "FEW_CELLS", few)
    (*leaves, dout), cells = make(case)
    check(leaves, dout, case.grid, cells)
    monkeypatch.setattr(temporal_blocked, "SCRATCH", 1)
    check(leaves, dout, case.grid, cells)


@pytest.mark.parametrize("kept", [None, 9], ids=["all", "kept"])
@pytest.mark.parametrize("lane", ["plain", pytest.param("kernel", marks=interpret)])
def test_opcheck(lane: str, kept: int | None) -> None:
    case = Case(2, 3, (4, 4), kept, 2, 16, 16)
    (q, k, w1, w2, dout), cells = make(case)
    out, probs = forward_op(q, k, w1, w2, cells, *case.grid)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward_op, (q, k, w1, w2, cells, *case.grid), test_utils=tests)
    torch.library.opcheck(dtables_op, (dout, probs, cells, *case.grid), test_utils=tests)
    torch.library.opcheck(dscores_op, (out, q, k, w1, w2, cells, *case.grid), test_utils=tests)


@pytest.mark.parametrize("lane", ["plain", pytest.param("kernel", marks=interpret)])
@pytest.mark.parametrize("kept", [None, 9], ids=["all", "kept"])
def test_compiles(lane: str, kept: int | None) -> None:
    case = Case(2, 3, (4, 4), kept, 2, 16, 16)
    (*leaves, dout), cells = make(case)
    want = gradients(temporal_cross_attention, leaves, dout, case.grid, cells)
    compiled = torch.compile(temporal_cross_attention, backend="aot_eager", fullgraph=True)
    got = gradients(compiled, leaves, dout, case.grid, cells)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_refuses_what_does_not_fit() -> None:
    (q, k, w1, w2, _), cells = make(CASES["kept"])
    grid = CASES["kept"].grid
    assert cells is not None
    for error, message, given in (
        (TypeError, "q and k take one floating dtype", (q.int(), k.int(), w1, w2, grid, cells)),
        (TypeError, "got torch.float32 and torch.float16", (q, k.half(), w1, w2, grid, cells)),
        (TypeError, "w1 and w2 take one floating dtype", (q, k, w1, w2.half(), grid, cells)),
        (ValueError, r"take \[V, F, n, H, d\]", (q[0], k[0], w1, w2, grid, cells)),
        (ValueError, r"take \[V, F, n, H, d\]", (q, k[:, :2], w1, w2, grid, cells)),
        (ValueError, r"w1 takes \[63, C\] for a grid of 4 x 5", (q, k, w1[1:], w2, grid, cells)),
        (ValueError, r"w2 takes \[63, C\]", (q, k, w1, w2[:, 1:], grid, cells)),
        (ValueError, "grid takes", (q, k, w1, w2, (0, 5), cells)),
        (ValueError, "takes n = 20 cells without cells", (q, k, w1, w2, grid, None)),
        (TypeError, "cells takes torch.int32 or torch.int64", (q, k, w1, w2, grid, cells.float())),
        (ValueError, r"cells takes \[3, 9\]", (q, k, w1, w2, grid, cells[:, 1:])),
        (ValueError, "ascending numbers from 0 to 19", (q, k, w1, w2, grid, cells.flip(1))),
        (ValueError, "ascending numbers from 0 to 19", (q, k, w1, w2, grid, cells + 20)),
    ):
        with pytest.raises(error, match=message):
            temporal_cross_attention(*given)  # type: ignore[arg-type]


@gpu
def test_published_grid_on_a_gpu() -> None:
    """ViT-B/16: more keys than a tile, and frames of all views in one."""
    case = Case(4, 8, (14, 14), None, 12, 64, 768)
    (q, k, w1, w2, dout), _ = make(case, torch.bfloat16, "cuda")
    q, k = q / 2, k / 2
    check([q, k, w1, w2], dout, case.grid, None)
    cells = random_cells(4, case.grid, 98).to("cuda")
    check([q[:, :, :98], k[:, :, :98], w1, w2], dout[:, :, :98], case.grid, cells)
    assert temporal.use_kernel(q)
