"""TED-Adapters for tests: random layouts and parameters, and M2-CLIP's dense adapter restated in plain torch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.adapters import FrameLayout, TEDAdapter
from mmfast.masks import Pack, pack_masks
from mmfast_kernels.ted import Taps


def tube_pack(batch: int, views: int, grid: tuple[int, int, int], keep: Sequence[int], seed: int = 0) -> Pack:
    """A pack of random tubes; sequence i keeps keep[i % len(keep)] cells of a frame."""
    g = torch.Generator().manual_seed(seed)
    cells = grid[1] * grid[2]
    mask = torch.ones(batch * views, cells, dtype=torch.bool)
    for i in range(len(mask)):
        mask[i, torch.randperm(cells, generator=g)[: keep[i % len(keep)]]] = False
    return pack_masks(mask.repeat(1, grid[0]).view(batch, views, -1))


def layouts() -> dict[str, FrameLayout]:
    """Dense and packed, with and without class tokens, one frame and several."""
    grid = (3, 4, 5)
    uneven = tube_pack(2, 2, grid, [7, 1, 12])
    return {
        "dense": FrameLayout.dense(2, 3, (4, 5)),
        "dense-cells": FrameLayout.dense(2, 3, (3, 3), class_tokens=False),
        "one-frame": FrameLayout.dense(3, 1, (2, 3)),
        "one-cell": FrameLayout.dense(2, 4, (1, 1)),
        "pack": FrameLayout.of_pack(uneven, grid),
        "pack-class": FrameLayout.of_pack(uneven, grid, class_tokens=True),
        "two-frames": FrameLayout.of_pack(tube_pack(3, 1, (2, 5, 5), [9]), (2, 5, 5)),
    }


def taps(widths: tuple[int, int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Taps:
    g = torch.Generator().manual_seed(sum(widths))
    time, space = widths
    shapes = ((time,), (time, 3), (time,), (space,), (space, 9), (space,))
    return Taps(*(torch.randn(s, generator=g).to(device, dtype) for s in shapes))


def moved(layout: FrameLayout, device: str) -> FrameLayout:
    rows = layout.class_rows
    sites = layout.sites._replace(table=layout.sites.table.to(device))
    return FrameLayout(layout.num_frames, layout.grid, sites, None if rows is None else rows.to(device))


def random_adapter(dim: int, hidden: int, seed: int = 0, **options: object) -> TEDAdapter:
    """An adapter after training: nothing of it is zero."""
    torch.manual_seed(seed)
    adapter = TEDAdapter(dim, hidden, **options)  # type: ignore[arg-type]
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return adapter


def published(adapter: TEDAdapter, x: Tensor, frames: int, grid: tuple[int, int], keep: Tensor | None = None) -> Tensor:
    """M2-CLIP's adapter, out of place. x: [B*F, 1 + h*w, D].

    keep: bool [B, h*w]; what a removed position has after projection and bias is set to zero.
    """
    rows, tokens, dim = x.shape
    clips = rows // frames
    h = adapter.fc1(x).view(clips, frames, tokens, -1).permute(0, 2, 3, 1).flatten(0, 1)
    h = F.conv1d(h, adapter.conv.weight, adapter.conv.bias, padding=1, groups=h.shape[1])
    out = x + adapter.fc2(h.unflatten(0, (clips, tokens)).permute(0, 3, 1, 2).flatten(0, 1))
    offset = adapter.offset_adapter
    cells = x.view(clips, frames, tokens, dim)[:, :, 1:]
    change = cells - torch.cat((cells[:, :1], cells[:, :-1]), 1)
    d = offset.fc1(change).unflatten(2, grid).permute(0, 4, 1, 2, 3)
    if keep is not None:
        d = d * keep.view(clips, 1, 1, *grid)
    d = F.conv3d(d, offset.conv.weight, offset.conv.bias, padding=(0, 1, 1), groups=d.shape[1])
    d = offset.fc2(d.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1))
    return out + F.pad(d, (0, 0, 1, 0))
