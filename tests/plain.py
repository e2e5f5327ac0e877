"""The published models restated in plain torch from their equations, on a MaskedViT's or MaskedAutoencoder's state dict.

Embed every token, add positions, index by the mask, softmax attention with the scores written out, mean, norm, head.
Pre-training: the decoder over visible tokens and mask tokens, in this order, and the targets from the whole clip.
"""

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def positions(num_tokens: int, dim: int) -> Tensor:
    rows = [[p / 10000 ** (2 * (j // 2) / dim) for j in range(dim)] for p in range(num_tokens)]
    return torch.tensor(
        [[math.sin(a) if j % 2 == 0 else math.cos(a) for j, a in enumerate(row)] for row in rows], dtype=torch.float64
    ).float()


def _as_it_is(block: int, half: str, x: Tensor) -> Tensor:
    return x


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def tokens(config, state: dict[str, Tensor], video: Tensor, mask: Tensor | None = None, adapt=_as_it_is) -> Tensor:
    """video: float [B, C, F, H, W], normalised.   mask: bool [B, N], equal counts.   Returns [B, n, D].

    adapt(block, half, x): what stands before the "attn" or "mlp" of a block.
    """
    p = config.patch_size
    stride = (config.tubelet_size, p, p)
    x = F.conv3d(video, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride)
    x = x.flatten(2).transpose(1, 2)
    x = x + positions(x.shape[1], config.embed_dim).to(x)
    if mask is not None:
        kept = (~mask).nonzero()[:, 1].view(len(video), -1)
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
    for i in range(config.depth):
        x = _block(config, part(state, f"blocks.{i}."), x, lambda half, x, i=i: adapt(i, half, x))
    return _norm(x, state, "norm", config.norm_eps) if config.final_norm else x


def logits(config, state: dict[str, Tensor], video: Tensor, mask: Tensor | None = None, adapt=_as_it_is) -> Tensor:
    x = tokens(config, state, video, mask, adapt)
    x = x[:, 0] if config.pool == "first" else x.mean(1)
    if config.fc_norm:
        x = _norm(x, state, "fc_norm", config.fc_norm_eps)
    return F.linear(x, state["head.weight"], state["head.bias"])


def _norm(x: Tensor, state: dict[str, Tensor], name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _block(config, s: dict[str, Tensor], x: Tensor, adapt=lambda half, x: x) -> Tensor:
    batch, n, dim = x.shape
    x = adapt("attn", x)
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
    x = adapt("mlp", x + a * s.get("gamma_1", 1))
    h = F.gelu(F.linear(_norm(x, s, "norm2", config.norm_eps), s["mlp.fc1.weight"], s["mlp.fc1.bias"]))
    return x + F.linear(h, s["mlp.fc2.weight"], s["mlp.fc2.bias"]) * s.get("gamma_2", 1)


# -- the pre-training model --------------------------------------------------------------------------------------------


def autoencoder(
    config, state: dict[str, Tensor], video: Tensor, mask: Tensor, decode_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Predictions [B, removed, C*tt*p*p] and logits [B, K] on a MaskedAutoencoder's state dict.

    video: float, normalised.   mask: bool [B, N], equal counts.   decode_mask: of its shape, True = not decoded.
    """
    batch, width = len(video), config.decoder_embed_dim
    latent = tokens(config.encoder, part(state, "encoder."), video, mask)
    removed = mask if decode_mask is None else mask & ~decode_mask
    table = positions(mask.shape[1], width).to(latent).expand(batch, -1, -1)
    visible = F.linear(latent, state["encoder_to_decoder.weight"]) + table[~mask].view(batch, -1, width)
    x = torch.cat((visible, state["mask_token"] + table[removed].view(batch, -1, width)), dim=1)
    for i in range(config.decoder_depth):
        x = _block(config.decoder, part(state, f"decoder.blocks.{i}."), x)
    x = _norm(x[:, visible.shape[1] :], state, "decoder.norm", config.norm_eps)
    pred = F.linear(x, state["decoder.head.weight"], state["decoder.head.bias"])
    if not config.num_classes:
        return pred, None
    feature = latent.mean(1)
    if config.fc_norm:
        feature = _norm(feature, state, "fc_norm", config.fc_norm_eps)
    return pred, F.linear(feature, state["head.weight"], state["head.bias"])


def patch_targets(config, video: Tensor, mask: Tensor, normalize: bool = True) -> Tensor:
    """Pixels of the removed patches, [B, removed, C*tt*p*p], each patch and channel normalised, of a normalised video."""
    mean, std = (torch.tensor(v).to(video).view(1, -1, 1, 1, 1) for v in (config.mean, config.std))
    p = config.patch_size
    pixels = rearrange(
        video * std + mean, "b c (t a) (h p) (w q) -> b (t h w) (a p q) c", a=config.tubelet_size, p=p, q=p
    )
    if normalize:
        pixels = pixels - pixels.mean(-2, keepdim=True)
        pixels = pixels / (pixels.var(-2, unbiased=True, keepdim=True).sqrt() + 1e-6)
    return pixels.flatten(-2)[mask].view(len(video), -1, p * p * config.tubelet_size * config.in_chans)
