"""Inputs of the temporal cross-attention, and EVL's published module restated: logits of all heads, tables by pair."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmfast_kernels.temporal import temporal_cross_attention_ref


class Case(NamedTuple):
    views: int
    frames: int
    grid: tuple[int, int]
    kept: int | None  # of the cells, None for all
    heads: int
    d: int
    channels: int


CASES = {
    "square": Case(2, 3, (4, 4), None, 2, 16, 32),
    "odd": Case(1, 4, (3, 5), None, 3, 20, 21),
    "two-frames": Case(3, 2, (5, 2), None, 1, 8, 7),
    "one-cell": Case(2, 3, (1, 1), None, 2, 4, 3),
    "one-row": Case(1, 2, (1, 19), None, 1, 16, 16),
    "many-rows": Case(7, 3, (2, 2), None, 1, 16, 17),
    "kept": Case(3, 3, (4, 5), 9, 2, 16, 18),
    "kept-many": Case(2, 2, (6, 6), 35, 1, 16, 16),
    "kept-one": Case(2, 3, (3, 3), 1, 2, 8, 5),
}


def random_cells(views: int, grid: tuple[int, int], kept: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(grid[0] * grid[1], generator=g)[:kept].sort().values for _ in range(views)])


def make(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[list[Tensor], Tensor | None]:
    """[q, k, w1, w2, dout] and the cells."""
    g = torch.Generator().manual_seed(sum(case.grid) + case.channels)
    rows = (2 * case.grid[0] - 1) * (2 * case.grid[1] - 1)
    n = case.kept or case.grid[0] * case.grid[1]
    scores, out = (case.views, case.frames, n, case.heads, case.d), (case.views, case.frames, n, case.channels)
    made = [torch.randn(s, generator=g) for s in (scores, scores, (rows, case.channels), (rows, case.channels), out)]
    cells = None if case.kept is None else random_cells(case.views, case.grid, case.kept).to(device)
    return [t.to(device, dtype) for t in made], cells


def gradients(op: object, leaves: list[Tensor], dout: Tensor, *rest: object) -> list[Tensor]:
    """The op's result, and its gradients by all leaves."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = op(*leaves, *rest)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def published(q: Tensor, k: Tensor, w1: Tensor, w2: Tensor, grid: tuple[int, int]) -> Tensor:
    """EVL's TemporalCrossAttention on patch tokens: the softmax over keys of all logits, tables gathered by pair."""
    at = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).to(q.device)
    away = at[:, None] - at[None] + torch.tensor(grid, device=q.device) - 1
    rows = away[..., 0] * (2 * grid[1] - 1) + away[..., 1]

    def half(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
        logits = torch.einsum("ntqhd,ntkhd->ntqkh", q / q.shape[-1] ** 0.5, k)
        return torch.einsum("ntqk,qkc->ntqc", logits.softmax(-2).mean(-1).to(table.dtype), table[rows])

    before = torch.nn.functional.pad(half(q[:, 1:], k[:, :-1], w1), (0, 0, 0, 0, 1, 0))
    return before + torch.nn.functional.pad(half(q[:, :-1], k[:, 1:], w2), (0, 0, 0, 0, 0, 1))


def published_on(cells: Tensor | None, grid: tuple[int, int]) -> object:
    """published where all cells are kept; with removed ones only the reference tells."""

    def op(q: Tensor, k: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        if cells is None:
            return published(q, k, w1, w2, grid)
        return temporal_cross_attention_ref(q, k, w1, w2, grid, cells)

    return op
