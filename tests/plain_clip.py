"""CLIP restated in plain torch from its equations, on the state dict of mmfast's CLIP: every token, padded texts."""

import torch
from plain import part
from torch import Tensor
from torch.nn import functional as F


def frame_tokens(config, state: dict[str, Tensor], video: Tensor, mask: Tensor | None = None) -> Tensor:
    """video: float [B, 3, F, H, W], normalised. mask: bool [B, N], equal counts in every frame of every clip.

    Returns the class token and the kept cells of every frame before ln_post, [B, F, 1 + n, D].
    """
    batch, _, frames, _, _ = video.shape
    x = F.conv2d(video.transpose(1, 2).flatten(0, 1), state["conv1.weight"], None, config.patch_size)
    x = x.flatten(2).transpose(1, 2) + state["positional_embedding"][1:]
    kept = None
    if mask is not None:
        kept = (~mask.reshape(batch * frames, -1)).nonzero()[:, 1].view(batch * frames, -1)
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
    first = (state["class_embedding"] + state["positional_embedding"][0]).expand(len(x), 1, -1)
    x = _norm(torch.cat((first, x), 1), state, "ln_pre", config)
    for n in range(config.vision_depth):
        block = part(state, f"transformer.resblocks.{n}.")
        x = _block(block, x, config.vision_num_heads, config, None, lambda a, x: ted(a, x, frames, config.side, kept))
    return x.unflatten(0, (batch, frames))


def image_features(config, state: dict[str, Tensor], video: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of every frame, [B, F, E]."""
    first = frame_tokens(config, state, video, mask)[:, :, 0]
    return _norm(first, state, "ln_post", config) @ state["proj"]


def text_states(config, state: dict[str, Tensor], token_ids: Tensor) -> Tensor:
    """Every token before ln_final, padding too, [L, context, W]."""
    context = token_ids.shape[1]
    x = state["token_embedding.weight"][token_ids] + state["positional_embedding"][:context]
    ahead = torch.ones(context, context, dtype=torch.bool).triu(1)
    for n in range(config.text_depth):
        block = part(state, f"transformer.resblocks.{n}.")
        x = _block(block, x, config.text_num_heads, config, ahead, text_adapter)
    return x


def text_features(config, state: dict[str, Tensor], token_ids: Tensor) -> Tensor:
    x = _norm(text_states(config, state, token_ids), state, "ln_final", config)
    return x[torch.arange(len(x)), token_ids.argmax(-1)] @ state["text_projection"]


def ted(a: dict[str, Tensor], x: Tensor, frames: int, side: int, kept: Tensor | None) -> Tensor:
    """The adapter of M2-CLIP by its equations: x [B*F, 1 + n, D]; removed cells are 0 after projection and bias."""
    rows, count, dim = x.shape
    u = F.linear(x, a["fc1.weight"], a["fc1.bias"]).unflatten(0, (-1, frames)).permute(0, 2, 3, 1)
    h = F.conv1d(u.flatten(0, 1), a["conv.weight"], a["conv.bias"], padding=1, groups=u.shape[2])
    h = h.unflatten(0, (-1, count)).permute(0, 3, 1, 2).flatten(0, 1)
    y = x + F.linear(h, a["fc2.weight"], a["fc2.bias"])
    o = part(a, "offset_adapter.")
    cells = x[:, 1:].unflatten(0, (-1, frames))
    step = torch.cat((torch.zeros_like(cells[:, :1]), cells[:, 1:] - cells[:, :-1]), 1)
    d = F.linear(step, o["fc1.weight"], o["fc1.bias"]).flatten(0, 1)
    where = torch.arange(side * side).expand(rows, -1) if kept is None else kept
    index = where[..., None].expand(-1, -1, d.shape[-1])
    image = d.new_zeros(rows, side * side, d.shape[-1]).scatter(1, index, d)
    image = image.transpose(1, 2).unflatten(2, (side, side))
    image = F.conv2d(image, o["conv.weight"][:, :, 0], o["conv.bias"], padding=1, groups=image.shape[1])
    g = image.flatten(2).transpose(1, 2).gather(1, index)
    return torch.cat((y[:, :1], y[:, 1:] + F.linear(g, o["fc2.weight"], o["fc2.bias"])), 1)


def text_adapter(a: dict[str, Tensor], x: Tensor) -> Tensor:
    h = F.gelu(F.linear(x, a["textad_fc1.weight"], a["textad_fc1.bias"]))
    return x + F.linear(h, a["textad_fc2.weight"], a["textad_fc2.bias"])


def _norm(x: Tensor, state: dict[str, Tensor], name: str, config) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], config.norm_eps)


def _block(s: dict[str, Tensor], x: Tensor, heads: int, config, ahead: Tensor | None, adapt) -> Tensor:
    if before := part(s, "adapter_pre_attn."):
        x = adapt(before, x)
    qkv = F.linear(_norm(x, s, "norm1", config), s["attn.qkv.weight"], s["attn.qkv.bias"])
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if ahead is not None:
        scores = scores.masked_fill(ahead, float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + F.linear(out, s["attn.proj.weight"], s["attn.proj.bias"])
    if before := part(s, "adapter_pre_mlp."):
        x = adapt(before, x)
    h = F.linear(_norm(x, s, "norm2", config), s["mlp.fc1.weight"], s["mlp.fc1.bias"])
    h = h * torch.sigmoid(1.702 * h) if config.gelu == "quick" else F.gelu(h)
    return x + F.linear(h, s["mlp.fc2.weight"], s["mlp.fc2.bias"])
