"""EVL's decoder (Lin et al., ECCV 2022): one class query that reads features of a frozen backbone, layer by layer.

    y = out + conv_time(out) + position_t + TCA(q, k)
    x = x + attention(LN1 x; keys and values LN3 y)          x = x + MLP(LN2 x)

out [F, L, D], q and k are of one block of the backbone, over all tokens of all frames. A single query makes keys and values
unnecessary: with z = LN3 y, and per head W_q, W_k, W_v and softmax weights a_j,

    q . (W_k z_j + b_k) = (W_k^T q) . z_j + q . b_k          sum_j a_j (W_v z_j + b_v) = W_v (sum_j a_j z_j) + b_v
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast_kernels.mlp import linear_gelu
from mmfast_kernels.temporal import temporal_cross_attention

from .evl_config import EVLConfig
from .layers import LayerNorm, Linear


class LayerFeatures(NamedTuple):
    """What the decoder reads of one block of the backbone, of V views.

    out: [V, F, L, D], after the block; a class token, where there is one, stands first in its frame.
    q, k: [V, F, n, H, d], of the patches alone, n = L or L - 1; None for a decoder without temporal cross-attention.
    cells: int32 [V, n], which cells of the (h, w) grid the patches are, ascending; None: all of them.
    """

    out: Tensor
    q: Tensor | None
    k: Tensor | None
    cells: Tensor | None = None


class QueryAttention(nn.Module):
    """Attention of one query per view over all tokens of the view, without a key or a value in memory."""

    def __init__(self, dim: int, inner: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, inner) for _ in range(3))
        self.out_proj = Linear(inner, dim)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x: [V, D]. z: [V, J, D]. Returns [V, D]."""
        split = (self.num_heads, -1)
        w_k, w_v = (layer.weight.unflatten(0, split) for layer in (self.k_proj, self.v_proj))
        q = self.q_proj(x).unflatten(-1, split)
        q = q * q.shape[-1] ** -0.5
        turned = torch.bmm(q.transpose(0, 1), w_k).transpose(0, 1)
        # Equal for all j, so that it changes nothing; but with it the bias of the keys takes part, its gradient is 0.
        same = (q * self.k_proj.bias.unflatten(0, split)).sum(-1, keepdim=True)
        scores = torch.bmm(turned, z.transpose(1, 2)) + same
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(z.dtype)
        pooled = torch.bmm(weights, z)
        heads = torch.bmm(pooled.transpose(0, 1), w_v.transpose(1, 2)).transpose(0, 1).flatten(1)
        return self.out_proj(heads + self.v_proj.bias)


class QueryMlp(nn.Module):
    """fc2(dropout(quick_gelu(fc1(x))))."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)
        self.dropout = dropout
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        h = linear_gelu(x, self.fc1.weight, self.fc1.bias, "quick")
        return self.fc2(F.dropout(h, self.dropout, self.training))


class DecoderLayer(nn.Module):
    """One pre-norm layer of the query."""

    def __init__(self, config: EVLConfig) -> None:
        super().__init__()
        dim = config.width
        self.norm1, self.norm2, self.norm3 = (LayerNorm(dim, eps=config.norm_eps) for _ in range(3))
        self.attn = QueryAttention(dim, config.decoder_dim, config.decoder_num_heads)
        self.mlp = QueryMlp(dim, config.decoder_mlp_dim, config.mlp_dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x: [V, D], the query. y: [V, J, D], what it reads. Returns [V, D]."""
        x = x + self.attn(self.norm1(x), self.norm3(y))
        return x + self.mlp(self.norm2(x))


class OffsetTables(nn.Module):
    """What a cell takes from the previous (w1) and the next frame (w2) at every offset: [(2h-1)(2w-1), D] each."""

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        rows = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.w1, self.w2 = (nn.Parameter(torch.zeros(rows, dim)) for _ in range(2))


class Decoder(nn.Module):
    """EVL's decoder under the names of its checkpoints. `start` gives the query, `layer` takes it one layer on."""

    def __init__(self, config: EVLConfig) -> None:
        super().__init__()
        dim, layers = config.width, range(config.num_layers)
        self.grid = config.grid
        self.cls_token = nn.Parameter(torch.zeros(dim))
        if not config.zero_query:
            nn.init.normal_(self.cls_token, std=0.02)
        self.decoder_layers = nn.ModuleList(DecoderLayer(config) for _ in layers)
        self.temporal_conv: nn.ModuleList | None = None
        self.temporal_pos_embed: nn.ParameterList | None = None
        self.cross_attention: nn.ModuleList | None = None
        if config.temporal_conv:
            self.temporal_conv = nn.ModuleList(nn.Conv1d(dim, dim, 3, padding=1, groups=dim) for _ in layers)
        if config.temporal_positions:
            tables = (torch.zeros(config.num_frames, dim) for _ in layers)
            self.temporal_pos_embed = nn.ParameterList(nn.Parameter(t) for t in tables)
        if config.temporal_cross_attention:
            self.cross_attention = nn.ModuleList(OffsetTables(config.grid, dim) for _ in layers)

    def no_weight_decay(self) -> set[str]:
        """What stands for a place: positions in time, and the tables of offsets."""
        places = ("temporal_pos_embed.", "cross_attention.")
        return {name for name, _ in self.named_parameters() if name.startswith(places)}

    def start(self, views: int) -> Tensor:
        """The query of every view before the first layer, [V, D]."""
        return self.cls_token.expand(views, -1)

    def layer(self, i: int, x: Tensor, features: LayerFeatures) -> Tensor:
        """The query after layer i.   x: [V, D]. features: of the block that layer i reads. Returns [V, D]."""
        layer = self.decoder_layers[i]
        return layer(x, self.temporal(i, features).flatten(1, 2))

    def temporal(self, i: int, features: LayerFeatures) -> Tensor:
        """What layer i reads: the features with what the temporal modules add, [V, F, L, D], never in their place."""
        out = features.out.to(torch.promote_types(features.out.dtype, self.cls_token.dtype))
        y = out
        if self.temporal_conv is not None:
            y = out + self._over_time(i, out)
        if self.temporal_pos_embed is not None:
            y = y + self.temporal_pos_embed[i][:, None].to(y.dtype)
        if self.cross_attention is None or features.q is None or features.k is None:
            return y
        tables = self.cross_attention[i]
        assert isinstance(tables, OffsetTables)
        taken = temporal_cross_attention(features.q, features.k, tables.w1, tables.w2, self.grid, features.cells)
        return y + F.pad(taken.to(y.dtype), (0, 0, y.shape[2] - taken.shape[2], 0))

    def resize(self, num_frames: int, grid: tuple[int, int]) -> None:
        """Interpolate the temporal positions to so many frames, and the tables of offsets to another grid."""
        if self.temporal_pos_embed is not None and len(self.temporal_pos_embed[0]) != num_frames:
            for i, table in enumerate(self.temporal_pos_embed):
                rows = table.detach().float().t()[None]
                resized = F.interpolate(rows, size=num_frames, mode="linear", align_corners=False)[0].t()
                self.temporal_pos_embed[i] = nn.Parameter(resized.to(table.dtype).contiguous(), table.requires_grad)
        if self.cross_attention is not None and grid != self.grid:
            old, new = (tuple(2 * side - 1 for side in sides) for sides in (self.grid, grid))
            for tables, name in itertools.product(self.cross_attention, ("w1", "w2")):
                table = getattr(tables, name)
                image = table.detach().float().view(1, *old, -1).permute(0, 3, 1, 2)
                resized = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
                rows = resized.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype).contiguous()
                setattr(tables, name, nn.Parameter(rows, table.requires_grad))
        self.grid = grid

    def _over_time(self, i: int, out: Tensor) -> Tensor:
        """The depthwise convolution over frames, as one over images of F x L that lie in memory as `out` does."""
        assert self.temporal_conv is not None
        conv = self.temporal_conv[i]
        assert isinstance(conv, nn.Conv1d)
        assert conv.bias is not None
        image = out.permute(0, 3, 1, 2)
        weight = conv.weight.unsqueeze(-1).to(out.dtype)
        y = F.conv2d(image, weight, conv.bias.to(out.dtype), padding=(1, 0), groups=out.shape[-1])
        return y.permute(0, 2, 3, 1)
