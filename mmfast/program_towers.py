"""Towers in torch's own operators alone: tube-masked views, TED-Adapters, folded blocks. See programs.py.

Every frame, or time slot, of a view keeps the same k cells: tokens are [S, F, first + k, D], a class token first in CLIP's
frames, in whatever shape their attention has. Masks are drawn by the sampler's reference: the same bits on every device.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast_kernels.gather import gather_tubes_ref
from mmfast_kernels.norm import layer_norm_ref
from mmfast_kernels.sampling import sample_keep_ref

from .adapters import TEDAdapter
from .clip_vision import CLIPVision
from .fused import FusedBlock, FusedBlocks
from .layers import LayerNorm
from .masks import Grid, kept_per_slot
from .vit import MaskedViT


class Cut(NamedTuple):
    """The tokens of S views.   ids: int64 [S * F * k], over the grid. clips: int64, their clips. cells: int64 [S, k].
    near: int64 [S, k, 9], the place among its view's cells of each cell around, k for one that is not there."""

    ids: Tensor
    clips: Tensor
    cells: Tensor
    near: Tensor


class Views(nn.Module):
    """Which tokens a clip's views keep.   whole: all of them."""

    def __init__(self, grid: Grid, views: int, mask_ratio: float, keep: int | None) -> None:
        super().__init__()
        self.grid, self.views, self.kept = grid, views, kept_per_slot(grid, mask_ratio, keep)

    def forward(self, clip_ids: Tensor, seed: Tensor) -> Cut:
        slots, h, w = self.grid
        batch, device = clip_ids.shape[0], clip_ids.device
        if self.kept == h * w:
            cells = torch.arange(h * w, device=device).expand(batch * self.views, -1)
        else:
            # The reference takes a seed on the device as it takes a number.
            drawn = sample_keep_ref(clip_ids, self.views, self.grid, self.kept, seed)  # type: ignore[arg-type]  # a seed that is a tensor
            cells = drawn.flatten(0, 1)[:, : self.kept].long()
        ids = cells[:, None] + (torch.arange(slots, device=device) * (h * w))[:, None]
        clips = torch.arange(batch, device=device).repeat_interleave(self.views * slots * self.kept)
        return Cut(ids.flatten(), clips, cells, self._near(cells))

    def _near(self, cells: Tensor) -> Tensor:
        _, h, w = self.grid
        count = cells.shape[1]
        places = (cells // w + 1) * (w + 2) + cells % w + 1  # in a grid with a border
        numbers = torch.arange(count, device=cells.device).expand(places.shape)
        table = torch.full((cells.shape[0], (h + 2) * (w + 2)), count, device=cells.device).scatter(1, places, numbers)
        around = [dy * (w + 2) + dx for dy, dx in itertools.product((-1, 0, 1), repeat=2)]
        nearby = places[:, :, None] + torch.tensor(around, device=cells.device)
        return table.gather(1, nearby.flatten(1)).unflatten(1, (count, 9))


# -- towers ------------------------------------------------------------------------------------------------------------


class AdapterProgram(nn.Module):
    """A TED-Adapter, its two products joined as TEDAdapter.run joins them.   slots: frames of a view. first: class tokens."""

    first: Tensor
    second: Tensor
    bias: Tensor
    cell_bias: Tensor
    time_taps: Tensor
    space_taps: Tensor

    def __init__(self, adapter: TEDAdapter, slots: int, class_tokens: int) -> None:
        super().__init__()
        offset = adapter.offset_adapter
        conv, around = adapter.conv, offset.conv
        self.slots, self.class_tokens, self.widths = slots, class_tokens, (conv.out_channels, around.out_channels)
        made = {
            "first": torch.cat((adapter.fc1.weight, offset.fc1.weight)),
            "second": torch.cat((adapter.fc2.weight, offset.fc2.weight), 1),
            "bias": adapter.fc2.bias,
            "cell_bias": offset.fc2.bias,
            # Of each branch the shift, the taps and the bias, a row each: taps of fp32 as the stencil's reference has them.
            "time_taps": self._rows(adapter.fc1.bias, conv),
            "space_taps": self._rows(offset.fc1.bias, around),
        }
        for name, tensor in made.items():
            self.register_buffer(name, tensor.detach().clone(), persistent=False)

    @staticmethod
    def _rows(shift: Tensor, conv: nn.Conv1d | nn.Conv3d) -> Tensor:
        assert conv.bias is not None
        taps = torch.cat((shift[None], conv.weight.flatten(1).t(), conv.bias[None]))
        return taps.to(torch.promote_types(taps.dtype, torch.float32))

    def forward(self, x: Tensor, near: Tensor) -> Tensor:
        """x, of any shape [.., n, D], adapted, residual included."""
        tokens = x.shape[1] if self.class_tokens else x.shape[1] // self.slots
        y = x.reshape(-1, self.slots, tokens, x.shape[2])
        time, space = F.linear(y, self.first).to(self.time_taps.dtype).split(self.widths, -1)
        shift, *taps, bias = self.time_taps.unbind()
        padded = F.pad(time + shift, (0, 0, 0, 0, 1, 1))
        u = bias + sum(padded[:, k : k + self.slots] * tap for k, tap in enumerate(taps))
        cells, before = tokens - self.class_tokens, (0, 0, self.class_tokens, 0)
        if not cells:  # class tokens alone, which have the branch over time only
            made = F.linear(u.to(x.dtype), self.second[:, : self.widths[0]], self.bias)
            return x + made.view(x.shape)
        o = F.pad(self._around(space[:, :, self.class_tokens :], near), before)
        made = F.linear(torch.cat((u, o), -1).to(x.dtype), self.second, self.bias)
        return x + (made + F.pad(self.cell_bias.expand(cells, -1), before)).view(x.shape)

    def _around(self, space: Tensor, near: Tensor) -> Tensor:
        """What space [S, F, k, A] makes of the changes from frame to frame, cell by cell."""
        shift, *taps, bias = self.space_taps.unbind()
        change = space - torch.cat((space[:, :1], space[:, :-1]), 1) + shift
        count = change.shape[2] + 1
        rows = F.pad(change, (0, 0, 0, 1)).flatten(
            0, 2
        )  # behind the cells a row of zeros, for those that are not there
        start = torch.arange(near.shape[0] * self.slots, device=near.device) * count
        places = start.view(-1, self.slots, 1, 1) + near[:, None]
        return bias + sum(rows[places[..., k]] * tap for k, tap in enumerate(taps))


class BlockProgram(nn.Module):
    """A folded block, attention within x's second dimension."""

    before_attn: AdapterProgram | None
    before_mlp: AdapterProgram | None

    def __init__(self, block: FusedBlock, slots: int, class_tokens: int) -> None:
        super().__init__()
        own = block._block[0]
        self.heads, self.gelu, self.eps = own.attn.num_heads, block.gelu, (own.norm1.eps, own.norm2.eps)
        self.qkv, self.proj, self.fc1, self.fc2 = block.qkv, block.proj, block.fc1, block.fc2
        for name, adapter in (("before_attn", own.adapter_pre_attn), ("before_mlp", own.adapter_pre_mlp)):
            if own.runs(adapter) and not isinstance(adapter, TEDAdapter):
                raise ValueError(f"a package takes TED-Adapters in its blocks, got a {type(adapter).__name__}")
            runs = isinstance(adapter, TEDAdapter) and own.runs(adapter)
            self.register_module(name, AdapterProgram(adapter, slots, class_tokens) if runs else None)  # type: ignore[arg-type]  # then it is one

    def forward(self, x: Tensor, near: Tensor, first_only: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """x [G, n, D] after the block, its queries and keys [G, n, H, d].   first_only: the first token of each, [G, 1, D]."""
        if self.before_attn is not None:
            x = self.before_attn(x, near)
        h = F.layer_norm(x, x.shape[-1:], eps=self.eps[0])
        weight, bias, dim = self.qkv.weight, self.qkv.bias, x.shape[-1]
        if first_only:
            x, seen = x[:, :1], h[:, :1]
            k, v = F.linear(h, weight[dim:], bias[dim:]).unflatten(-1, (2, self.heads, -1)).unbind(2)
            q = F.linear(seen, weight[:dim], bias[:dim]).unflatten(-1, (self.heads, -1))
        else:
            q, k, v = F.linear(h, weight, bias).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + F.linear(out.transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias)
        if self.before_mlp is not None:
            x = self.before_mlp(x, near)
        h = F.linear(F.layer_norm(x, x.shape[-1:], eps=self.eps[1]), self.fc1.weight, self.fc1.bias)
        return x + F.linear(gelu_of(h, self.gelu), self.fc2.weight, self.fc2.bias), q, k


class Tower(nn.Module):
    """A MaskedViT's embedding and blocks, over all tokens of a view together, or a CLIP vision tower's, over each frame's."""

    positions: Tensor
    affine: Tensor
    class_token: Tensor | None

    def __init__(self, model: MaskedViT | CLIPVision, grid: Grid) -> None:
        super().__init__()
        c = model.config
        self.ln_pre: LayerNorm | None = None
        if isinstance(model, CLIPVision):
            self.tubelet, blocks = 1, list(model.transformer.resblocks[: model.transformer.depth])
            self.patches: nn.Module = model.conv1
            self.ln_pre = model.ln_pre
            table = model.positional_embedding
            first = (model.class_embedding + table[0]).detach().clone()
            positions = model._positions_of(grid).repeat(grid[0], 1)
        else:
            assert isinstance(model, MaskedViT)
            self.tubelet, blocks = model.config.tubelet_size, list(model.blocks)
            self.patches, first, positions = model.patch_embed.proj, None, model._positions_of(grid)
        self.slots, self.patch = grid[0], c.patch_size
        self.register_buffer("class_token", first, persistent=False)
        self.register_buffer("positions", positions.detach().clone(), persistent=False)
        self.register_buffer("affine", model._pixel_affine().clone(), persistent=False)
        with torch.no_grad():
            fused = FusedBlocks(blocks, None)
            self.blocks = nn.ModuleList(BlockProgram(b, grid[0], self.first) for b in fused.blocks)  # type: ignore[arg-type]  # FusedBlocks

    @property
    def first(self) -> int:
        """Class tokens of a frame."""
        return int(self.class_token is not None)

    def embed(self, video: Tensor, cut: Cut) -> Tensor:
        """[S, F * k, D], or of CLIP [S * F, 1 + k, D]."""
        weight, bias = self.patches.weight, self.patches.bias
        assert isinstance(weight, Tensor)
        scale, shift = self.affine if video.dtype == torch.uint8 else (None, None)
        wide = torch.promote_types(weight.dtype, torch.float32)
        rows = gather_tubes_ref(video, cut.ids, cut.clips, self.tubelet, self.patch, scale, shift, wide)
        x = F.linear(rows.to(weight.dtype), weight.flatten(1), bias)  # type: ignore[arg-type]  # a bias, or None
        x = (x + self.positions[cut.ids]).to(weight.dtype)
        kept = cut.cells.shape[1]
        if self.class_token is None or self.ln_pre is None:
            return x.unflatten(0, (-1, self.slots * kept))
        x = x.unflatten(0, (-1, kept))
        x = torch.cat((self.class_token.to(x.dtype).expand(x.shape[0], 1, -1), x), 1)
        return norm_of(self.ln_pre, x)


def norm_of(norm: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(norm, LayerNorm)
    return layer_norm_ref(x, norm.weight, norm.bias, norm.eps)


def gelu_of(h: Tensor, form: str) -> Tensor:
    return h * torch.sigmoid(1.702 * h) if form == "quick" else F.gelu(h)
