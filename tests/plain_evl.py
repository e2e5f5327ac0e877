"""EVL restated in plain torch from its equations, on the state dict of mmfast's EVL: keys and values, gathered tables."""

import plain
import plain_clip
import torch
from plain import part
from torch import Tensor
from torch.nn import functional as F

Layer = dict[str, Tensor]


def clip_layers(config, state: dict[str, Tensor], video: Tensor, kept: Tensor | None = None) -> list[Layer]:
    """Of every block of CLIP's vision tower: out [B, F, L, D], q and k [B, F, L, H, d].   kept: int64 [B, n], cells."""
    batch, _, frames, _, _ = video.shape
    x = F.conv2d(video.transpose(1, 2).flatten(0, 1), state["conv1.weight"], None, config.patch_size)
    x = x.flatten(2).transpose(1, 2) + state["positional_embedding"][1:]
    if kept is not None:
        x = x.gather(1, kept.repeat_interleave(frames, 0)[..., None].expand(-1, -1, x.shape[-1]))
    first = (state["class_embedding"] + state["positional_embedding"][0]).expand(len(x), 1, -1)
    x = plain_clip._norm(torch.cat((first, x), 1), state, "ln_pre", config)
    layers = []
    for n in range(config.vision_depth):
        block = part(state, f"transformer.resblocks.{n}.")
        h = plain_clip._norm(x, block, "norm1", config)
        bias = block["attn.qkv.bias"]
        x = plain_clip._block(block, x, config.vision_num_heads, config, None, None)
        layers.append(_layer(x, h, block["attn.qkv.weight"], bias, config.vision_num_heads, (batch, frames)))
    return layers


def vit_layers(config, state: dict[str, Tensor], video: Tensor) -> list[Layer]:
    """Of every block of a MaskedViT, its slots as frames."""
    p = config.patch_size
    embed = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv3d(video, *embed, (config.tubelet_size, p, p)).flatten(2).transpose(1, 2)
    x = x + plain.positions(x.shape[1], config.embed_dim).to(x)
    layers = []
    for n in range(config.depth):
        block = part(state, f"blocks.{n}.")
        h = F.layer_norm(x, x.shape[-1:], block["norm1.weight"], block["norm1.bias"], config.norm_eps)
        bias = torch.cat((block["attn.q_bias"], torch.zeros_like(block["attn.q_bias"]), block["attn.v_bias"]))
        x = plain._block(config, block, x)
        shape = (len(video), config.grid[0])
        split = [t.reshape(*shape, -1, t.shape[-1]) for t in (x, h)]
        layers.append(_layer(*split, block["attn.qkv.weight"], bias, config.num_heads, None))
    return layers


def _layer(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, heads: int, lead: tuple[int, int] | None) -> Layer:
    q, k, _ = (t.unflatten(-1, (heads, -1)) for t in F.linear(h, weight, bias).chunk(3, -1))
    named = {"out": x, "q": q, "k": k}
    return named if lead is None else {name: t.unflatten(0, lead) for name, t in named.items()}


def offsets(grid: tuple[int, int], cells: Tensor) -> Tensor:
    """Row of the table for every query and key, [V, n, n].   cells: int64 [V, n]."""
    y, x = cells // grid[1], cells % grid[1]
    dy, dx = (t[:, :, None] - t[:, None, :] for t in (y, x))
    return (dy + grid[0] - 1) * (2 * grid[1] - 1) + dx + grid[1] - 1


def cross_attention(q: Tensor, k: Tensor, w1: Tensor, w2: Tensor, where: Tensor) -> Tensor:
    """q, k: [V, F, n, H, d], patches alone. where: [V, n, n] of `offsets`. Returns [V, F, n, D]."""

    def half(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        scores = torch.einsum("vfqhd,vfkhd->vfhqk", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("vfqk,vqkc->vfqc", scores.softmax(-1).mean(2), w[where])

    made = q.new_zeros(*q.shape[:3], w1.shape[1])
    made[:, 1:] = made[:, 1:] + half(q[:, 1:], k[:, :-1], w1)
    made[:, :-1] = made[:, :-1] + half(q[:, :-1], k[:, 1:], w2)
    return made


def query(config, state: dict[str, Tensor], layers: list[Layer], kept: Tensor | None = None) -> Tensor:
    """The class query after the decoder, [V, D].   layers: of the last blocks, as many as the decoder has."""
    views, frames, length, _ = layers[0]["out"].shape
    x = state["decoder.cls_token"].expand(views, 1, -1)
    cells = torch.arange(config.grid[0] * config.grid[1]).expand(views, -1) if kept is None else kept
    first = length - cells.shape[1]
    for i, seen in enumerate(layers):
        out = seen["out"]
        y = out
        if config.temporal_conv:
            conv = part(state, f"decoder.temporal_conv.{i}.")
            h = out.permute(0, 2, 3, 1).flatten(0, 1)
            h = F.conv1d(h, conv["weight"], conv["bias"], padding=1, groups=h.shape[1])
            y = y + h.unflatten(0, (views, length)).permute(0, 3, 1, 2)
        if config.temporal_positions:
            y = y + state[f"decoder.temporal_pos_embed.{i}"][:, None]
        if config.temporal_cross_attention:
            tables = part(state, f"decoder.cross_attention.{i}.")
            q, k = seen["q"][:, :, first:], seen["k"][:, :, first:]
            made = cross_attention(q, k, tables["w1"], tables["w2"], offsets(config.grid, cells))
            y = y + torch.cat((made.new_zeros(views, frames, first, made.shape[-1]), made), 2)
        x = _decoder_layer(config, part(state, f"decoder.decoder_layers.{i}."), x, y.flatten(1, 2))
    return x[:, 0]


def logits(config, state: dict[str, Tensor], layers: list[Layer], kept: Tensor | None = None) -> Tensor:
    x = query(config, state, layers, kept)
    x = _norm(x, part(state, "proj.0."), "", config.norm_eps)
    return F.linear(x, state["proj.2.weight"], state["proj.2.bias"])


def _decoder_layer(config, s: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    z = _norm(y, s, "norm3.", config.norm_eps)
    inputs = {"q": _norm(x, s, "norm1.", config.norm_eps), "k": z, "v": z}
    q, k, v = (
        F.linear(t, s[f"attn.{n}_proj.weight"], s[f"attn.{n}_proj.bias"])
        .unflatten(-1, (config.decoder_num_heads, -1))
        .transpose(1, 2)
        for n, t in inputs.items()
    )
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    x = x + F.linear(mixed, s["attn.out_proj.weight"], s["attn.out_proj.bias"])
    h = F.linear(_norm(x, s, "norm2.", config.norm_eps), s["mlp.fc1.weight"], s["mlp.fc1.bias"])
    return x + F.linear(h * torch.sigmoid(1.702 * h), s["mlp.fc2.weight"], s["mlp.fc2.bias"])


def _norm(x: Tensor, s: dict[str, Tensor], name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{name}weight"], s[f"{name}bias"], eps)
