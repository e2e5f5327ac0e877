"""The published models restated in plain torch from their equations, on a MaskedViT's state dict.

Embed every token, add positions, index by the mask, softmax attention with the scores written out, mean, norm, head.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def positions(num_tokens: int, dim: int) -> Tensor:
    rows = [[p / 10000 ** (2 * (j // 2) / dim) for j in range(dim)] for p in range(num_tokens)]
    return torch.tensor(
        [[math.sin(a) if j % 2 == 0 else math.cos(a) for j, a in enumerate(row)] for row in rows], dtype=torch.float64
    ).float()


def tokens(config, state: dict[str, Tensor], video: Tensor, mask: Tensor | None = None) -> Tensor:
    """video: float [B, C, F, H, W], normalised.   mask: bool [B, N], equal counts.   Returns [B, n, D]."""
    p = config.patch_size
    stride = (config.tubelet_size, p, p)
    x = F.conv3d(video, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride)
    x = x.flatten(2).transpose(1, 2)
    x = x + positions(x.shape[1], config.embed_dim).to(x)
    if mask is not None:
        kept = (~mask).nonzero()[:, 1].view(len(video), -1)
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
    for i in range(config.depth):
        x = _block(config, {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"blocks.{i}.")}, x)
    return _norm(x, state, "norm", config.norm_eps) if config.final_norm else x


def logits(config, state: dict[str, Tensor], video: Tensor, mask: Tensor | None = None) -> Tensor:
    x = tokens(config, state, video, mask)
    x = x[:, 0] if config.pool == "first" else x.mean(1)
    if config.fc_norm:
        x = _norm(x, state, "fc_norm", config.fc_norm_eps)
    return F.linear(x, state["head.weight"], state["head.bias"])


def _norm(x: Tensor, state: dict[str, Tensor], name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _block(config, s: dict[str, Tensor], x: Tensor) -> Tensor:
    batch, n, dim = x.shape
    bias = None
    if config.qkv_bias == "qv":
        bias = torch.cat((s["attn.q_bias"], torch.zeros_like(s["attn.q_bias"]), s["attn.v_bias"]))
    elif config.qkv_bias == "full":
        bias = s["attn.qkv.bias"]
    qkv = F.linear(_norm(x, s, "norm1", config.norm_eps), s["attn.qkv.weight"], bias)
    q, k, v = qkv.view(batch, n, 3, config.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, n, dim)
    a = F.linear(out, s["attn.proj.weight"], s["attn.proj.bias"])
    x = x + a * s.get("gamma_1", 1)
    h = F.gelu(F.linear(_norm(x, s, "norm2", config.norm_eps), s["mlp.fc1.weight"], s["mlp.fc1.bias"]))
    return x + F.linear(h, s["mlp.fc2.weight"], s["mlp.fc2.bias"]) * s.get("gamma_2", 1)
