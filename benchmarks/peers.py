"""What mmfast is measured against: the published VideoMAE classifier, restated in plain torch from its equations.

    x = conv3d(video) + pos                      pos[i, j] = sin or cos(i / 10000^(2*(j//2)/D))
    x = x + proj(attention(LN(x)))               attention = softmax(q k^T / sqrt(d)) v
    x = x + fc2(gelu(fc1(LN(x))))                exact erf GELU
    probabilities = mean over views of softmax(head(LN(mean over kept tokens)))

`published` does it as released: every token is embedded, the kept ones are picked by a boolean mask, the scores are
materialised, and the P views run one after another. `strong` is what a careful engineer writes without new kernels:
kept patches are gathered first, all views are one batch, attention is scaled_dot_product_attention.
Nothing here runs code of mmfast, so that it can be held against it.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmfast.config import ViTConfig

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sinusoid(num_tokens: int, dim: int) -> Tensor:
    """VideoMAE's fixed positions over the flattened token index, fp32 [num_tokens, dim]."""
    column = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(num_tokens, dtype=torch.float64)[:, None] / 10000.0 ** (2 * (column // 2) / dim)
    return torch.where(column.long() % 2 == 0, angle.sin(), angle.cos()).float()


def materialised_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The released attention: the whole score matrix is written. q, k, v: [S, H, n, d]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.softmax(dim=-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's fused attention, the backend of its choice (or of a surrounding sdpa_kernel)."""
    return F.scaled_dot_product_attention(q, k, v)


class OneDnnLinear(nn.Linear):
    """nn.Linear through oneDNN, which torch carries but does not choose for fp32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def have_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Block(nn.Module):
    def __init__(self, dim: int, hidden: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        S, n, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(S, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(attention(q, k, v).transpose(1, 2).reshape(S, n, D))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class PlainViT(nn.Module):
    """The masked classifier in plain torch.

    state: state_dict of MaskedViT (VideoMAE's fine-tuning names). config: its ViTConfig.
    Raises ValueError for a config that the published model does not have, and for a state that does not fit it.
    """

    def __init__(self, state: Mapping[str, Tensor], config: "ViTConfig") -> None:
        super().__init__()
        for field, value in (("pool", "mean"), ("gelu", "erf"), ("init_values", 0.0)):
            if getattr(config, field) != value:
                raise ValueError(f"the published model has {field} {value!r}, this one {getattr(config, field)!r}")
        D, tt, p = config.embed_dim, config.tubelet_size, config.patch_size
        self.tubelet, self.patch = tt, p
        self.grid = tuple(config.grid)
        with torch.device("meta"):  # drawing weights only to overwrite them takes seconds
            self.embed = nn.Conv3d(config.in_chans, D, (tt, p, p), stride=(tt, p, p))
            self.blocks = nn.ModuleList(
                Block(D, config.mlp_dim, config.num_heads, config.norm_eps) for _ in range(config.depth)
            )
            self.norm = nn.LayerNorm(D, eps=config.norm_eps) if config.final_norm else nn.Identity()
            self.fc_norm = nn.LayerNorm(D, eps=config.fc_norm_eps) if config.fc_norm else nn.Identity()
            self.head = nn.Linear(D, config.num_classes)
        self.to_empty(device="cpu")
        self.pos: Tensor
        self.mean: Tensor
        self.std: Tensor
        t, h, w = self.grid
        self.register_buffer("pos", sinusoid(t * h * w, D))
        self.register_buffer("mean", torch.as_tensor(config.mean, dtype=torch.float32).view(-1, 1, 1, 1))
        self.register_buffer("std", torch.as_tensor(config.std, dtype=torch.float32).view(-1, 1, 1, 1))
        self.load(state)
        self.eval().requires_grad_(False)

    def load(self, state: Mapping[str, Tensor]) -> None:
        renamed: dict[str, Tensor] = {}
        for name, value in state.items():
            if name.endswith("attn.q_bias"):
                v_bias = state[name.replace("q_bias", "v_bias")]
                renamed[name.replace("attn.q_bias", "qkv.bias")] = torch.cat((value, torch.zeros_like(value), v_bias))
            elif not name.endswith("v_bias"):
                short = name.replace("patch_embed.proj.", "embed.").replace(".attn.", ".").replace(".mlp.", ".")
                renamed[short] = value
        wanted = {name for name, _ in self.named_parameters()}
        if wanted != set(renamed):
            raise ValueError(f"state: unused {sorted(set(renamed) - wanted)}, missing {sorted(wanted - set(renamed))}")
        self.load_state_dict(renamed, strict=False)

    def with_onednn(self) -> "PlainViT":
        """This model, its Linear layers from now on through oneDNN."""
        for module in self.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
        return self

    def normalise(self, video: Tensor) -> Tensor:
        """uint8 [..., C, F, H, W] -> normalised in the model's dtype; a float video is only cast."""
        if video.dtype == torch.uint8:
            video = (video.float() / 255 - self.mean) / self.std
        return video.to(self.head.weight.dtype)

    def encode(self, x: Tensor, attention: Attention) -> Tensor:
        """Embedded tokens [S, n, D] -> class probabilities [S, K], fp32."""
        for block in self.blocks:
            x = block(x, attention)
        return self.head(self.fc_norm(self.norm(x).mean(dim=1))).float().softmax(dim=-1)

    @torch.no_grad()
    def published(self, video: Tensor, masks: Tensor, attention: Attention = materialised_attention) -> Tensor:
        """As released.  video: uint8 or float [B, C, F, H, W].  masks: bool [B, P, N], True = removed.  -> [B, K]."""
        pixels = self.normalise(video)
        probs = []
        for mask in masks.unbind(dim=1):
            x = self.embed(pixels).flatten(2).transpose(1, 2)
            x = x + self.pos.type_as(x)
            probs.append(self.encode(x[~mask].reshape(x.shape[0], -1, x.shape[-1]), attention))
        return torch.stack(probs).mean(dim=0)

    @torch.no_grad()
    def strong(self, video: Tensor, keep: Tensor, attention: Attention = sdpa) -> Tensor:
        """Gathered and batched.  video: uint8 or float [B, C, F, H, W].  keep: int64 [B, P, n].  -> [B, K]."""
        (B, P, n), (t, h, w), tt, p = keep.shape, self.grid, self.tubelet, self.patch
        patches = video.reshape(B, -1, t, tt, h, p, w, p).permute(0, 2, 4, 6, 1, 3, 5, 7)
        flat = keep.reshape(B, P * n)
        clip = torch.arange(B, device=keep.device)[:, None]
        kept = patches[clip, flat // (h * w), flat // w % h, flat % w]
        x = F.linear(self.normalise(kept).flatten(2), self.embed.weight.flatten(1), self.embed.bias)
        x = x + self.pos.type_as(x)[flat]
        return self.encode(x.reshape(B * P, n, -1), attention).reshape(B, P, -1).mean(dim=1)


def kept_ids(masks: Tensor) -> Tensor:
    """bool [B, P, N] with equal counts, True = removed -> int64 [B, P, n] ascending ids of the tokens that stay."""
    counts = (~masks).sum(dim=-1)
    if int(counts.min()) != int(counts.max()):
        raise ValueError(f"masks: every view must keep the same number of tokens, got {counts.unique().tolist()}")
    return torch.argsort(masks.to(torch.uint8), dim=-1, stable=True)[..., : int(counts.min())]


def have_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def transformers_fields(config: "ViTConfig") -> dict[str, Any]:
    """The encoder of a ViTConfig or MAEConfig as arguments of transformers' VideoMAEConfig."""
    height, width = config.frame_size
    if height != width:
        raise ValueError(f"transformers takes square frames, this model {height} x {width}")
    return dict(
        image_size=height,
        patch_size=config.patch_size,
        num_channels=config.in_chans,
        num_frames=config.num_frames,
        tubelet_size=config.tubelet_size,
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_dim,
        layer_norm_eps=config.norm_eps,
        attn_implementation="sdpa",
    )


class HuggingFace:
    """transformers' VideoMAEForVideoClassification with the same weights: embeds all, then picks by a boolean mask."""

    def __init__(self, plain: PlainViT, config: "ViTConfig") -> None:
        import transformers

        if config.final_norm or not config.fc_norm:
            raise ValueError("transformers' classifier has fc_norm and no final norm; this model differs")
        fields = transformers_fields(config) | {"num_labels": config.num_classes}
        weight = plain.head.weight
        self.plain = plain
        self.model = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**fields))
        self.model.fc_norm = nn.LayerNorm(config.embed_dim, eps=config.fc_norm_eps)
        self.model.load_state_dict(self.renamed(plain))
        self.model.eval().requires_grad_(False).to(device=weight.device, dtype=weight.dtype)

    @staticmethod
    def renamed(plain: PlainViT) -> dict[str, Tensor]:
        names = {"proj": "attention.output.dense", "fc1": "intermediate.dense", "fc2": "output.dense"}
        names |= {"norm1": "layernorm_before", "norm2": "layernorm_after"}
        state: dict[str, Tensor] = {}
        for name, value in plain.named_parameters():
            top, _, rest = name.partition(".")
            if top == "embed":
                state[f"videomae.embeddings.patch_embeddings.projection.{rest}"] = value
            elif top == "blocks":
                layer, part, kind = rest.split(".")
                prefix = f"videomae.encoder.layer.{layer}."
                if part == "qkv":
                    for which, piece in zip(("query", "key", "value"), value.detach().chunk(3), strict=True):
                        state[f"{prefix}attention.attention.{which}.{kind}"] = piece
                else:
                    state[f"{prefix}{names[part]}.{kind}"] = value
            else:
                state[name.replace("head.", "classifier.")] = value
        return state

    @torch.no_grad()
    def published(self, video: Tensor, masks: Tensor) -> Tensor:
        """P passes, one a view.  video: uint8 or float [B, C, F, H, W].  masks: bool [B, P, N].  -> [B, K]."""
        pixels = self.plain.normalise(video).transpose(1, 2)
        probs = []
        for mask in masks.unbind(dim=1):
            logits = self.model(pixels, bool_masked_pos=mask).logits
            probs.append(logits.float().softmax(dim=-1))
        return torch.stack(probs).mean(dim=0)
