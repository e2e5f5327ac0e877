"""Adapters of M2-CLIP (AAAI 2024): small trainable modules between the layers of a frozen transformer.

    TED         y = x + W2 conv_time(W1 x + b1) + b2 + [no class token] (W4 conv_space(W3 (x_t - x_(t-1)) + b3) + b4)
    temporal    y = x + W2 conv_time(W1 x + b1) + b2
    text        y = x + W2 gelu(W1 x + b1) + b2

Parameters have the published names. The convolutions are depthwise: three taps over the frames, and 3 x 3 over the cells
of a frame, of which removed ones contribute nothing.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast_kernels.linear import linear
from mmfast_kernels.ted import NO_SITE, Sites, Taps
from mmfast_kernels.ted_adapter import Weights, ted_adapter

from .layers import Linear
from .masks import Device, Grid, Pack

Cells = tuple[int, int]


@dataclass(frozen=True)
class FrameLayout:
    """Where the tokens of frames lie in packed rows: [view][frame][class token?, kept cells].

    Frames follow one another, cells ascend and are the same in every frame of a view (a tube mask, or none).
    rows: packed tokens in all. sites: the table that the kernels take. class_rows: int64 ids of the class tokens' rows.
    """

    num_frames: int
    grid: Cells
    sites: Sites
    class_rows: Tensor | None

    @property
    def rows(self) -> int:
        return self.sites.rows

    @property
    def class_tokens(self) -> bool:
        return self.class_rows is not None

    @staticmethod
    def dense(
        views: int, num_frames: int, grid: Cells, class_tokens: bool = True, device: Device = "cpu"
    ) -> "FrameLayout":
        """All cells of `views` views; made once for each set of arguments."""
        _check_frames(num_frames, grid)
        make = _dense if torch.compiler.is_compiling() else _cached_dense
        return make(views, num_frames, (grid[0], grid[1]), class_tokens, torch.device(device))

    @staticmethod
    def of_pack(pack: Pack, grid: Grid, class_tokens: bool = False, *, check: bool = True) -> "FrameLayout":
        """The layout of tube-masked views, kept with the pack.

        grid: (frames, h, w), over which pack.keep_idx counts; the class tokens, one a frame, are not in the pack.
        check: make sure that every view keeps the same cells in all frames, ValueError if not; on a GPU this waits for the
        device, once a pack. Without it only the first frame's cells are looked at.
        """
        if len(grid) != 3:
            raise ValueError(f"grid must be (frames, h, w), got {tuple(grid)}")
        frames, cells = grid[0], (grid[1], grid[2])
        _check_frames(frames, cells)
        key = (*grid, class_tokens)
        known: dict[tuple[int | bool, ...], FrameLayout] = (
            {} if torch.compiler.is_compiling() else pack.__dict__.setdefault("_frame_layouts", {})
        )
        if key not in known:
            if check and not torch.compiler.is_compiling():
                _check_tubes(pack, frames, cells)
            known[key] = _of_pack(pack, frames, cells, class_tokens)
        return known[key]


def _check_frames(num_frames: int, grid: Cells) -> None:
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be two positive sizes (h, w), got {tuple(grid)}")


def _check_tubes(pack: Pack, frames: int, grid: Cells) -> None:
    """ValueError unless every view of the pack has the same cells in each of the frames."""
    cells = grid[0] * grid[1]
    lengths = pack.cu_seqlens.diff()
    if bool((lengths % frames != 0).any()):
        raise ValueError(f"pack must hold {frames} frames a view, got views of {lengths.unique().tolist()} tokens")
    each = (lengths // frames).long()
    step = pack.per_token(each)
    place = torch.arange(pack.num_tokens, device=step.device) - pack.per_token(pack.cu_seqlens[:-1]).long()
    frame = place // step
    first = pack.keep_idx[(pack.per_token(pack.cu_seqlens[:-1]) + place % step).long()]
    if bool((pack.keep_idx != first + frame * cells).any()):
        raise ValueError(
            f"pack must keep the same cells in all {frames} frames of a {grid[0]} x {grid[1]} grid (a tube mask)"
        )


def _dense(views: int, num_frames: int, grid: Cells, class_tokens: bool, device: torch.device) -> FrameLayout:
    cells = torch.arange(grid[0] * grid[1], device=device)
    bounds = torch.tensor([0, len(cells)], device=device)
    table, class_rows = _table(cells, bounds, len(cells), num_frames, grid, class_tokens)
    if class_rows is not None:
        copies = torch.arange(views, device=device)[:, None] * (num_frames * table.shape[0])
        class_rows = (copies + class_rows).flatten()
    return FrameLayout(num_frames, grid, Sites(table, num_frames, views), class_rows)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # made once, it must serve training too
def _cached_dense(views: int, num_frames: int, grid: Cells, class_tokens: bool, device: torch.device) -> FrameLayout:
    return _dense(views, num_frames, grid, class_tokens, device)


def _of_pack(pack: Pack, num_frames: int, grid: Cells, class_tokens: bool) -> FrameLayout:
    each = pack.cu_seqlens.diff().long() // num_frames
    count = pack.num_tokens // num_frames
    if torch.compiler.is_compiling():
        torch._check(pack.num_tokens == count * num_frames)  # which is not to be seen of a size known at run time only
    bounds = torch.cat((each.new_zeros(1), each.cumsum(0)))
    # A view's first frame, of every view: its ids are the cells.
    view = torch.repeat_interleave(torch.arange(len(each), device=each.device), each, output_size=count)
    place = torch.arange(count, device=each.device) - bounds[view]
    cells = pack.keep_idx[pack.cu_seqlens[view] + place].long()
    table, class_rows = _table(cells, bounds, count, num_frames, grid, class_tokens)
    return FrameLayout(num_frames, grid, Sites(table, num_frames, 1), class_rows)


def _table(
    cells: Tensor,  # int64 [count]: the kept cells of every view
    bounds: Tensor,  # int64 [V + 1]: where the views begin among them
    count: int,
    num_frames: int,
    grid: Cells,
    class_tokens: bool,
) -> tuple[Tensor, Tensor | None]:
    """The table of kernels/mmfast_kernels/ted.py, and the rows of the class tokens. Never waits for the device."""
    h, w = grid
    device, views = cells.device, bounds.shape[0] - 1
    extra = int(class_tokens)
    view = torch.repeat_interleave(torch.arange(views, device=device), bounds.diff(), output_size=count)
    place = torch.arange(count, device=device) - bounds[view] + extra  # of a cell among its view's sites
    # Which place a cell has, with a border of cells that are not there.
    places = torch.full((views, (h + 2) * (w + 2)), -1, device=device)
    y, x = cells // w + 1, cells % w + 1
    places[view, y * (w + 2) + x] = place
    around = torch.stack([(y + dy) * (w + 2) + x + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)], 1)
    there = places[view[:, None], around]
    near = torch.where(there < 0, NO_SITE, there - place[:, None])
    begins = bounds + extra * torch.arange(views + 1, device=device)
    site = begins[view] + place
    table = torch.zeros((count + extra * views, 12), dtype=torch.int32, device=device)
    table[:, :9] = NO_SITE
    table[site, :9] = near.int()
    all_views = torch.repeat_interleave(
        torch.arange(views, device=device), begins.diff(), output_size=count + extra * views
    )
    step = begins.diff()
    within = torch.arange(count + extra * views, device=device) - begins[all_views]
    table[:, 9] = (num_frames * begins[all_views] + within).int()
    table[:, 10] = step[all_views].int()
    if not class_tokens:
        return table, None
    frame = torch.arange(num_frames, device=device)
    return table, (num_frames * begins[:-1, None] + frame * step[:, None]).flatten()


class _OffsetAdapter(nn.Module):
    """The parameters of TEDAdapter's branch over space."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.conv = nn.Conv3d(hidden, hidden, (1, 3, 3), padding=(0, 1, 1), groups=hidden)
        self.fc2 = Linear(hidden, dim)


class TEDAdapter(nn.Module):
    """M2-CLIP's adapter of tokens in frames: their course over time, and the difference between frames over space.

    dim: width of the tokens. hidden: width inside each of the two branches. num_frames, grid: what forward takes unless
    it is told otherwise. A new adapter changes nothing: its convolutions are zero, and so are all biases.
    """

    def __init__(self, dim: int, hidden: int, *, num_frames: int = 8, grid: Cells = (14, 14)) -> None:
        super().__init__()
        _check_frames(num_frames, grid)
        self.num_frames, self.grid = num_frames, (grid[0], grid[1])
        self.fc1 = Linear(dim, hidden)
        self.conv = nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = Linear(hidden, dim)
        self.offset_adapter = _OffsetAdapter(dim, hidden)
        with torch.no_grad():
            for part in (self, self.offset_adapter):
                for parameter in (part.conv.weight, part.conv.bias, part.fc1.bias, part.fc2.bias):
                    assert isinstance(parameter, Tensor)
                    parameter.zero_()

    @classmethod
    def from_pretrained(cls, state: Mapping[str, Tensor], *, num_frames: int = 8, grid: Cells = (14, 14)) -> Self:
        """An adapter with the weights of one published adapter, `fc1.weight` to `offset_adapter.fc2.bias`."""
        adapter = cls(*_widths(state, "fc1.weight"), num_frames=num_frames, grid=grid)
        adapter.load_state_dict(dict(state))
        return adapter

    def forward(
        self,
        x: Tensor,
        num_frames: int | None = None,
        grid: Cells | None = None,
        *,
        pack: Pack | None = None,
        class_tokens: bool | None = None,
    ) -> Tensor:
        """The adapted tokens, residual included, in the shape of x.

        Without pack, x is [B*F, 1 + h*w, D], a frame's class token first (class_tokens=False: [B*F, h*w, D], or VideoMAE's
        joint tokens, [B, F*h*w, D]). With pack, x is [T, D], the packed tokens of tube-masked views, or [T + S*F, D]
        with a class token before each frame's cells. num_frames, grid: the adapter's own unless given.
        """
        frames = self.num_frames if num_frames is None else num_frames
        cells = self.grid if grid is None else grid
        _check_frames(frames, cells)
        self._check_width(x)
        if pack is not None:
            return self.run(x, self._packed_layout(x, pack, frames, cells, class_tokens))
        if x.dim() != 3:
            raise ValueError(f"x must be [B*F, tokens, D], or come with a pack, got {tuple(x.shape)}")
        with_class = class_tokens is None or class_tokens
        tokens = cells[0] * cells[1] + with_class
        joint = class_tokens is False and x.shape[1] == frames * tokens
        if not joint and (x.shape[1] != tokens or x.shape[0] % frames):
            raise ValueError(
                f"x must be [B*{frames}, {tokens}, D] for {frames} frames of {cells[0]} x {cells[1]} cells"
                f"{' and a class token' if with_class else ''}, got {tuple(x.shape)}"
            )
        views = x.shape[0] if joint else x.shape[0] // frames
        layout = FrameLayout.dense(views, frames, cells, with_class, x.device)
        return self.run(x.reshape(-1, x.shape[2]), layout).view(x.shape)

    def run(self, x: Tensor, layout: FrameLayout) -> Tensor:
        """The adapted tokens of x [layout.rows, D]: forward without its checks, for models."""
        offset = self.offset_adapter
        conv, offset_conv = self.conv, offset.conv
        assert conv.bias is not None
        assert offset_conv.bias is not None
        weights = Weights(
            torch.cat((self.fc1.weight, offset.fc1.weight)),
            torch.cat((self.fc2.weight, offset.fc2.weight), 1),
            self.fc2.bias,
            offset.fc2.bias,
        )
        taps = Taps(
            self.fc1.bias,
            conv.weight.flatten(1),
            conv.bias,
            offset.fc1.bias,
            offset_conv.weight.flatten(1),
            offset_conv.bias,
        )
        return ted_adapter(x, layout.class_rows, layout.sites, weights, taps)

    def _check_width(self, x: Tensor) -> None:
        width = self.fc1.in_features
        if x.shape[-1] != width:
            raise ValueError(f"x must have the adapter's width {width}, got {tuple(x.shape)}")

    def _packed_layout(
        self, x: Tensor, pack: Pack, frames: int, cells: Cells, class_tokens: bool | None
    ) -> FrameLayout:
        bare = pack.num_tokens
        rows = {False: bare, True: bare + pack.num_sequences * frames}
        found = [with_class for with_class in rows if x.dim() == 2 and x.shape[0] == rows[with_class]]
        if not found or (class_tokens is not None and class_tokens not in found):
            raise ValueError(
                f"x must be the pack's [{rows[False]}, D], or [{rows[True]}, D] with class tokens, got {tuple(x.shape)}"
            )
        return FrameLayout.of_pack(pack, (frames, *cells), found[0])

    def extra_repr(self) -> str:
        return f"num_frames={self.num_frames}, grid={self.grid}"


class TemporalAdapter(nn.Module):
    """TEDAdapter's branch over time alone, on one vector a frame: M2-CLIP's t_adapter. A new one changes nothing."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.conv = nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = Linear(hidden, dim)
        with torch.no_grad():
            for parameter in (self.conv.weight, self.conv.bias, self.fc1.bias, self.fc2.bias):
                assert isinstance(parameter, Tensor)
                parameter.zero_()

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """x: [B*F, D], rows (b f). Returns the same shape."""
        if num_frames < 1 or x.dim() != 2 or x.shape[0] % num_frames:
            raise ValueError(f"x must be [B*{num_frames}, D], got {tuple(x.shape)}")
        h = self.fc1(x).unflatten(0, (-1, num_frames))
        out = F.pad(h, (0, 0, 1, 1)).unfold(1, 3, 1) * self.conv.weight[:, 0]
        assert self.conv.bias is not None
        return x + self.fc2((out.sum(-1) + self.conv.bias).flatten(0, 1))


class TextAdapter(nn.Module):
    """x + W2 gelu(W1 x + b1) + b2: M2-CLIP's adapter of text tokens. A new one is not the identity."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.textad_fc1 = Linear(dim, hidden)
        self.textad_fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D]. Returns the same shape."""
        return x + linear(F.gelu(self.textad_fc1(x)), self.textad_fc2.weight, self.textad_fc2.bias)


def _widths(state: Mapping[str, Tensor], key: str) -> tuple[int, int]:
    """(dim, hidden) of an adapter's state."""
    if key not in state:
        raise ValueError(f"state must be of one adapter and hold {key!r}, got {sorted(state)}")
    hidden, dim = state[key].shape
    return dim, hidden
