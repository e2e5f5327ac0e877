"""What EVL is measured against: the published model, restated in plain torch from its equations.

    y = out + conv_time(out) + position_t + TCA(q, k)
    x = x + attention(LN1 x; LN3 y)         x = x + MLP(LN2 x)         logits = W LN(x) + b

`published` does it as released, but out of place, as the released code has no backward through its backbone: every block's
tokens, q, k, v and attention output are kept and the last few are read; attention is two einsums with the heads last and its
probabilities in memory; temporal cross-attention gathers its tables by pair, [n, n, D]; one query attends to keys and values
of every token. `strong` is what a careful engineer writes without new kernels: a block at a time, torch's fused attention, the
tables taken by offset (the mean probabilities scattered into [n, offsets], then one product), convolutions over channels last.
With `one_query` keys and values are absorbed into the query, as in mmfast. Nothing here runs code of mmfast.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from m2clip_peers import Norm, wide
from peers import sdpa
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmfast.clip_config import CLIPConfig
    from mmfast.evl_config import EVLConfig

_UNUSED = ("ln_post.", "proj", "_pixel_affine")  # of the backbone, by the decoder


class Seen(NamedTuple):
    """Of one block: out [V, F, L, D], q and k [V, F, L, H, d], a class token first in every frame."""

    out: Tensor
    q: Tensor
    k: Tensor


class MLP(nn.Module):
    """QuickGELU between two layers, under mmfast's names."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))


def spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with its probabilities in memory, heads last.   [N, L, H, d]."""
    scores = torch.einsum("nqhc,nkhc->nqkh", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("nqkh,nkhc->nqhc", scores.softmax(2), v)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)


class Block(nn.Module):
    """One block of CLIP's vision tower."""

    def __init__(self, dim: int, hidden: int, heads: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(dim, eps=eps), Norm(dim, eps=eps)
        self.attn, self.mlp = Attention(dim, heads), MLP(dim, hidden)

    def published(self, x: Tensor) -> dict[str, Tensor]:
        """x: [N, L, D]. Returns all that the released block returns."""
        a, h = self.attn, self.norm1(x)
        parts = zip(a.qkv.weight.chunk(3), a.qkv.bias.chunk(3), strict=True)
        q, k, v = (F.linear(h, weight, bias).unflatten(-1, (a.heads, -1)) for weight, bias in parts)
        mixed = a.proj(spelled(q, k, v).flatten(2))
        x = x + mixed
        return {"q": q, "k": k, "v": v, "attn_out": mixed, "out": x + self.mlp(self.norm2(x))}

    def strong(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.attn
        q, k, v = a.qkv(self.norm1(x)).unflatten(-1, (3, a.heads, -1)).unbind(2)
        mixed = sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        x = x + a.proj(mixed.flatten(2))
        return x + self.mlp(self.norm2(x)), q, k


class Blocks(nn.Module):
    def __init__(self, c: "CLIPConfig") -> None:
        super().__init__()
        hidden = round(c.vision_mlp_ratio * c.vision_width)
        made = [Block(c.vision_width, hidden, c.vision_num_heads, c.norm_eps) for _ in range(c.vision_depth)]
        self.resblocks = nn.ModuleList(made)


class Backbone(nn.Module):
    """CLIP's vision tower over frames, up to its last block."""

    def __init__(self, c: "CLIPConfig") -> None:
        super().__init__()
        dim, patch = c.vision_width, c.patch_size
        self.conv1 = nn.Conv2d(3, dim, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(dim))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + c.side**2, dim))
        self.ln_pre = Norm(dim, eps=c.norm_eps)
        self.transformer = Blocks(c)

    def embed(self, video: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> [B*F, L, D]; patches by one product."""
        weight, patch = self.conv1.weight, self.conv1.kernel_size[0]
        x = video.transpose(1, 2).flatten(0, 1).unflatten(-1, (-1, patch)).unflatten(2, (-1, patch))
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = F.linear(x.to(weight.dtype), weight.flatten(1))
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        return self.ln_pre(torch.cat((first, x), 1) + self.positional_embedding.to(x.dtype))


class QueryAttention(nn.Module):
    def __init__(self, dim: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, dim)

    def published(self, x: Tensor, z: Tensor) -> Tensor:
        """x: [V, 1, D], z: [V, J, D]."""
        q, k, v = (
            layer(t).unflatten(-1, (self.heads, -1))
            for layer, t in ((self.q_proj, x), (self.k_proj, z), (self.v_proj, z))
        )
        return self.out_proj(spelled(q, k, v).flatten(2))

    def strong(self, x: Tensor, z: Tensor) -> Tensor:
        split = (self.heads, -1)
        q = self.q_proj(x).unflatten(-1, split).transpose(1, 2)
        both = F.linear(
            z, torch.cat((self.k_proj.weight, self.v_proj.weight)), torch.cat((self.k_proj.bias, self.v_proj.bias))
        )
        k, v = (t.unflatten(-1, split).transpose(1, 2) for t in both.chunk(2, -1))
        return self.out_proj(sdpa(q, k, v).transpose(1, 2).flatten(2))

    def one_query(self, x: Tensor, z: Tensor) -> Tensor:
        split = (self.heads, -1)
        w_k, w_v = (layer.weight.unflatten(0, split) for layer in (self.k_proj, self.v_proj))
        q = self.q_proj(x)[:, 0].unflatten(-1, split)
        turned = torch.einsum("vhd,hdc->vhc", q * q.shape[-1] ** -0.5, w_k)
        weights = wide(turned @ z.transpose(1, 2)).softmax(-1).to(z.dtype)
        mixed = torch.einsum("vhc,hdc->vhd", weights @ z, w_v).flatten(1)
        return self.out_proj(mixed + self.v_proj.bias)[:, None]


class Layer(nn.Module):
    def __init__(self, config: "EVLConfig") -> None:
        super().__init__()
        dim = config.width
        self.norm1, self.norm2, self.norm3 = (Norm(dim, eps=config.norm_eps) for _ in range(3))
        self.attn = QueryAttention(dim, config.decoder_dim, config.decoder_num_heads)
        self.mlp = MLP(dim, config.decoder_mlp_dim)


class Tables(nn.Module):
    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.zeros(rows, dim)) for _ in range(2))


class Decoder(nn.Module):
    """The decoder under the names of its checkpoints."""

    where: Tensor

    def __init__(self, config: "EVLConfig") -> None:
        super().__init__()
        dim, layers, (h, w) = config.width, range(config.num_layers), config.grid
        self.cls_token = nn.Parameter(torch.zeros(dim))
        self.decoder_layers = nn.ModuleList(Layer(config) for _ in layers)
        self.temporal_conv = nn.ModuleList(nn.Conv1d(dim, dim, 3, padding=1, groups=dim) for _ in layers)
        tables = (torch.zeros(config.num_frames, dim) for _ in layers)
        self.temporal_pos_embed = nn.ParameterList(nn.Parameter(t) for t in tables)
        self.cross_attention = nn.ModuleList(Tables((2 * h - 1) * (2 * w - 1), dim) for _ in layers)
        y, x = torch.arange(h * w) // w, torch.arange(h * w) % w
        where = (y[:, None] - y + h - 1) * (2 * w - 1) + x[:, None] - x + w - 1
        self.register_buffer("where", where, persistent=False)

    def run(self, features: Iterable[Seen], way: str) -> Tensor:
        """The class query, [V, D].   way: "published", "strong" or "one_query"."""
        published = way == "published"
        x: Tensor | None = None
        for i, seen in enumerate(features):
            # As released: whatever the backbone's precision, the decoder reads fp32.
            seen = Seen(*(wide(t) for t in seen)) if published else seen
            x = self.cls_token.expand(len(seen.out), 1, -1) if x is None else x
            y = self.published_temporal(i, seen) if published else self.strong_temporal(i, seen)
            layer = self.decoder_layers[i]
            assert isinstance(layer, Layer)
            x = x + getattr(layer.attn, way)(layer.norm1(x), layer.norm3(y.flatten(1, 2)))
            x = x + layer.mlp(layer.norm2(x))
        assert x is not None
        return x[:, 0]

    def published_temporal(self, i: int, seen: Seen) -> Tensor:
        out, conv, tables = seen.out, self.temporal_conv[i], self.cross_attention[i]
        assert isinstance(tables, Tables)
        views, _, length, _ = out.shape
        h = conv(out.permute(0, 2, 3, 1).contiguous().flatten(0, 1))
        y = out + h.unflatten(0, (views, length)).permute(0, 3, 1, 2)
        y = y + self.temporal_pos_embed[i][:, None]
        q, k = seen.q[:, :, 1:], seen.k[:, :, 1:]
        before = self.taken_by_pair(q[:, 1:], k[:, :-1], tables.w1)
        after = self.taken_by_pair(q[:, :-1], k[:, 1:], tables.w2)
        made = F.pad(before, (0, 0, 0, 0, 1, 0)) + F.pad(after, (0, 0, 0, 0, 0, 1))
        return y + F.pad(made, (0, 0, 1, 0))

    def taken_by_pair(self, q: Tensor, k: Tensor, table: Tensor) -> Tensor:
        scores = torch.einsum("vfqhd,vfkhd->vfqkh", q * q.shape[-1] ** -0.5, k)
        return torch.einsum("vfqk,qkc->vfqc", scores.softmax(3).mean(-1), table[self.where])

    def strong_temporal(self, i: int, seen: Seen) -> Tensor:
        out, conv, tables = seen.out, self.temporal_conv[i], self.cross_attention[i]
        assert isinstance(conv, nn.Conv1d)
        assert isinstance(tables, Tables)
        image = out.to(torch.promote_types(out.dtype, self.cls_token.dtype)).permute(0, 3, 1, 2)
        weight = conv.weight[..., None]  # over images of frames x tokens that lie in memory as they are
        h = F.conv2d(image, weight, conv.bias, padding=(1, 0), groups=image.shape[1])
        y = out + h.permute(0, 2, 3, 1) + self.temporal_pos_embed[i][:, None]
        q, k = (t[:, :, 1:].transpose(2, 3) for t in (seen.q, seen.k))
        before = self.taken_by_offset(q[:, 1:], k[:, :-1], tables.w1)
        after = self.taken_by_offset(q[:, :-1], k[:, 1:], tables.w2)
        made = F.pad(before, (0, 0, 0, 0, 1, 0)) + F.pad(after, (0, 0, 0, 0, 0, 1))
        return y + F.pad(made, (0, 0, 1, 0))

    def taken_by_offset(self, q: Tensor, k: Tensor, table: Tensor) -> Tensor:
        """q, k: [V, F-1, H, n, d]. No two keys of a query have one offset, so nothing is added up."""
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        a = wide(scores).softmax(-1).mean(2)
        places = self.where.expand(a.shape)
        return a.new_zeros(*a.shape[:-1], len(table)).scatter(-1, places, a) @ table


class PlainEVL(nn.Module):
    """EVL on CLIP's tower with every temporal module, from the state dict of mmfast's. Without dropout."""

    def __init__(self, state: dict[str, Tensor], config: "EVLConfig") -> None:
        super().__init__()
        self.count = config.num_layers
        self.backbone, self.decoder = Backbone(cast("CLIPConfig", config.backbone)), Decoder(config)
        head = nn.Linear(config.width, config.num_classes)
        self.proj = nn.Sequential(Norm(config.width, eps=config.norm_eps), nn.Identity(), head)
        unused = tuple(f"backbone.{name}" for name in _UNUSED)
        self.load_state_dict({name: value for name, value in state.items() if not name.startswith(unused)})

    def freeze(self) -> "PlainEVL":
        self.backbone.requires_grad_(False)
        return self

    def features(self, video: Tensor, way: str) -> Iterator[Seen]:
        """Of the last blocks; under `published` of all at first."""
        grad = torch.is_grad_enabled() and self.backbone.class_embedding.requires_grad
        shape = (video.shape[0], video.shape[2])
        with torch.set_grad_enabled(grad):
            x = self.backbone.embed(video)
        kept: list[dict[str, Tensor]] = []
        blocks = self.backbone.transformer.resblocks
        for n, block in enumerate(blocks):
            assert isinstance(block, Block)
            with torch.set_grad_enabled(grad):
                if way == "published":
                    kept.append(block.published(x))
                    x = kept[-1]["out"]
                    continue
                x, q, k = block.strong(x)
            if n >= len(blocks) - self.count:
                yield Seen(*(t.unflatten(0, shape) for t in (x, q, k)))
        for made in kept[-self.count :]:
            yield Seen(*(made[name].unflatten(0, shape) for name in ("out", "q", "k")))

    def forward(self, video: Tensor, way: str) -> Tensor:
        """Logits [B, K]."""
        return self.logits(self.features(video, way), way)

    def logits(self, features: Iterable[Seen], way: str) -> Tensor:
        return self.proj(self.decoder.run(features, way))
