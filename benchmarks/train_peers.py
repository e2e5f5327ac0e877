"""What a training step of mmfast is measured against: the published steps, restated in plain torch from their equations.

    latent = norm(blocks(embed(visible) + pos))
    pred   = head(norm(blocks(cat[to_decoder(latent) + pos, mask_token + pos])))      over the removed tokens
    loss   = sum over source and target of MSE(pred, normalised pixels) + 0.05 cross-entropy(head(fc_norm(mean latent)))

    distillation: sum over modalities m of MSE(mlp_m(student(rgb)), teacher_m(m)), features fc_norm(mean tokens)

`published` does it as released: every token is embedded, visible ones are picked by a boolean mask, the scores are
materialised, targets of the whole clip are made and then picked, source and target are two passes. `strong` is what a
careful engineer writes without new kernels: visible patches are gathered first, source and target are one batch,
targets of removed patches only, attention is scaled_dot_product_attention. Nothing here runs code of mmfast.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import peers
import torch
import torch.nn.functional as F
from peers import Attention, materialised_attention, sdpa, sinusoid
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmfast.config import MAEConfig, ViTConfig

CE_WEIGHT = 0.05
EPS = 1e-6  # beside the deviation of a patch


class Qkv(nn.Module):
    """One product for q, k and v; no bias on k."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.q_bias = nn.Parameter(torch.empty(dim))
        self.v_bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias)))


class Block(peers.Block):
    def __init__(self, dim: int, hidden: int, heads: int, eps: float) -> None:
        super().__init__(dim, hidden, heads, eps)
        self.qkv = Qkv(dim)  # type: ignore[assignment]  # in place of a Linear


class Encoder(nn.Module):
    """VideoMAE's encoder, with its final norm. config: a ViTConfig or MAEConfig of the published family."""

    def __init__(self, config: "ViTConfig") -> None:
        super().__init__()
        for field, value in (("gelu", "erf"), ("init_values", 0.0), ("final_norm", True), ("qkv_bias", "qv")):
            if getattr(config, field) != value:
                raise ValueError(f"the published model has {field} {value!r}, this one {getattr(config, field)!r}")
        D, tt, p = config.embed_dim, config.tubelet_size, config.patch_size
        self.tubelet, self.patch, self.grid = tt, p, tuple(config.grid)
        self.embed = nn.Conv3d(config.in_chans, D, (tt, p, p), stride=(tt, p, p))
        self.blocks = nn.ModuleList(
            Block(D, config.mlp_dim, config.num_heads, config.norm_eps) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.pos: Tensor
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("pos", sinusoid(config.num_tokens, D), persistent=False)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(config, name), dtype=torch.float32).view(-1, 1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def normalise(self, video: Tensor) -> Tensor:
        return (video.float() / 255 - self.mean) / self.std if video.dtype == torch.uint8 else video

    def pixels(self, video: Tensor) -> Tensor:
        """What the targets are made of: the clip before normalisation."""
        return video.float() / 255 if video.dtype == torch.uint8 else video * self.std + self.mean

    def published(self, video: Tensor, mask: Tensor, attention: Attention = materialised_attention) -> Tensor:
        """[B, n, D].   video: normalised [B, C, F, H, W].   mask: bool [B, N], True = removed."""
        x = self.embed(video).flatten(2).transpose(1, 2)
        x = x + self.pos.type_as(x)
        x = x[~mask].reshape(x.shape[0], -1, x.shape[-1])
        for block in self.blocks:
            x = block(x, attention)
        return self.norm(x)

    def strong(self, video: Tensor, keep: Tensor) -> Tensor:
        """[B, n, D].   video: uint8 or normalised.   keep: int64 [B, n]."""
        patches = self.normalise(self.gather(video, keep)).flatten(2)
        x = F.linear(patches, self.embed.weight.flatten(1), self.embed.bias)
        x = x + self.pos.type_as(x)[keep]
        for block in self.blocks:
            x = block(x, sdpa)
        return self.norm(x)

    def gather(self, video: Tensor, ids: Tensor) -> Tensor:
        """Patches [B, n, C, tt, p, p] of tokens ids [B, n]."""
        (t, h, w), tt, p, B = self.grid, self.tubelet, self.patch, video.shape[0]
        patches = video.reshape(B, -1, t, tt, h, p, w, p).permute(0, 2, 4, 6, 1, 3, 5, 7)
        clip = torch.arange(B, device=ids.device)[:, None]
        return patches[clip, ids // (h * w), ids // w % h, ids % w]


class PlainMAE(nn.Module):
    """The pre-training model with the weights of a MaskedAutoencoder.   state: its state_dict; config: its MAEConfig."""

    def __init__(self, state: Mapping[str, Tensor], config: "MAEConfig") -> None:
        super().__init__()
        D, d = config.embed_dim, config.decoder_embed_dim
        self.config = config
        self.encoder = Encoder(config)
        self.to_decoder = nn.Linear(D, d, bias=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, d))
        hidden, heads = config.decoder.mlp_dim, config.decoder_num_heads
        self.decoder_blocks = nn.ModuleList(
            Block(d, hidden, heads, config.norm_eps) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.decoder_head = nn.Linear(d, config.patch_dim)
        classes = config.num_classes
        self.fc_norm = nn.LayerNorm(D, eps=config.fc_norm_eps) if classes and config.fc_norm else nn.Identity()
        self.head = nn.Linear(D, classes) if classes else None
        self.decoder_pos: Tensor
        self.register_buffer("decoder_pos", sinusoid(config.num_tokens, d), persistent=False)
        load(self, state, {"encoder_to_decoder.": "to_decoder.", "decoder.": "decoder_"})

    def decode(self, latent: Tensor, visible_pos: Tensor, removed_pos: Tensor, attention: Attention) -> Tensor:
        """Predictions [B, removed, K]; positions [B, *, d]."""
        latent = self.to_decoder(latent)
        x = torch.cat((latent + visible_pos, self.mask_token + removed_pos), dim=1)
        for block in self.decoder_blocks:
            x = block(x, attention)
        return self.decoder_head(self.decoder_norm(x[:, -removed_pos.shape[1] :]))

    def class_loss(self, latent: Tensor, labels: Tensor | None) -> Tensor | float:
        if self.head is None or labels is None:
            return 0.0
        return CE_WEIGHT * F.cross_entropy(self.head(self.fc_norm(latent.mean(1))).float(), labels)

    def normalised(self, patches: Tensor) -> Tensor:
        """Targets [..., s*C] of patches [..., s, C]."""
        if self.config.normalize_target:
            mean, var = patches.mean(-2, keepdim=True), patches.var(-2, unbiased=True, keepdim=True)
            patches = (patches - mean) / (var.sqrt() + EPS)
        return patches.flatten(-2)

    @torch.no_grad()
    def published_targets(self, video: Tensor, mask: Tensor) -> Tensor:
        (t, h, w), tt, p, B = self.encoder.grid, self.encoder.tubelet, self.encoder.patch, video.shape[0]
        pixels = self.encoder.pixels(video).reshape(B, -1, t, tt, h, p, w, p).permute(0, 2, 4, 6, 3, 5, 7, 1)
        targets = self.normalised(pixels.reshape(B, t * h * w, tt * p * p, -1))
        return targets[mask].reshape(B, -1, targets.shape[-1])

    def published(self, source: Tensor, target: Tensor, mask: Tensor, labels: Tensor | None) -> Tensor:
        """As released, with the paper's loss.   source, target: [B, C, F, H, W].   mask: bool [B, N].   labels: [B]."""
        losses = []
        for video, known in ((source, labels), (target, None)):
            targets = self.published_targets(video, mask)
            latent = self.encoder.published(self.encoder.normalise(video), mask)
            pos = self.decoder_pos.type_as(video.float()).expand(video.shape[0], -1, -1)
            width = pos.shape[-1]
            visible_pos = pos[~mask].reshape(video.shape[0], -1, width)
            removed_pos = pos[mask].reshape(video.shape[0], -1, width)
            pred = self.decode(latent, visible_pos, removed_pos, materialised_attention)
            losses.append(F.mse_loss(pred.float(), targets) + self.class_loss(latent, known))
        return losses[0] + losses[1]

    def strong(self, both: Tensor, keep: Tensor, removed: Tensor, labels: Tensor | None) -> Tensor:
        """both: [2B, C, F, H, W], source and target.   keep, removed: int64 [B, n], ids of visible and removed tokens."""
        keep, removed = keep.repeat(2, 1), removed.repeat(2, 1)
        latent = self.encoder.strong(both, keep)
        pred = self.decode(latent, self.decoder_pos[keep], self.decoder_pos[removed], sdpa)
        with torch.no_grad():
            patches = self.encoder.pixels(self.encoder.gather(both, removed)).flatten(3).transpose(2, 3)
            targets = self.normalised(patches)
        loss = 2 * F.mse_loss(pred.float(), targets)  # both halves are equally large: the sum of their means
        return loss + self.class_loss(latent[: both.shape[0] // 2], labels)


class PlainDistillation(nn.Module):
    """A student, its frozen teachers, and one MLP a teacher, all in plain torch.

    student, teachers: (state_dict, ViTConfig) of each MaskedViT. mlps: for each teacher the weights and biases of its
    two layers. heads of the student are left out: features are fc_norm(mean of the tokens).
    """

    def __init__(
        self,
        student: tuple[Mapping[str, Tensor], "ViTConfig"],
        teachers: Sequence[tuple[Mapping[str, Tensor], "ViTConfig"]],
        mlps: Sequence[Sequence[Tensor]],
    ) -> None:
        super().__init__()
        self.student = Features(*student)
        self.teachers = nn.ModuleList(Features(*teacher) for teacher in teachers).requires_grad_(False)
        self.mlps = nn.ModuleList()
        for w1, b1, w2, b2 in mlps:
            mlp = nn.Sequential(nn.Linear(*w1.shape[::-1]), nn.ReLU(), nn.Linear(*w2.shape[::-1]))
            mlp.load_state_dict({"0.weight": w1, "0.bias": b1, "2.weight": w2, "2.bias": b2})
            self.mlps.append(mlp)

    def published(self, videos: Sequence[Tensor], mask: Tensor) -> Tensor:
        """videos: the student's, then each teacher's, [B, C, F, H, W].   mask: bool [B, N], the same for all."""
        own = self.student.published(videos[0], mask)
        with torch.no_grad():
            wanted = [teacher.published(v, mask) for teacher, v in self.asked(videos)]
        return self.loss(own, wanted)

    def strong(self, videos: Sequence[Tensor], keep: Tensor) -> Tensor:
        """keep: int64 [B, n], ids of the visible tokens."""
        own = self.student.strong(videos[0], keep)
        with torch.no_grad():
            wanted = [teacher.strong(v, keep) for teacher, v in self.asked(videos)]
        return self.loss(own, wanted)

    def asked(self, videos: Sequence[Tensor]) -> "list[tuple[Features, Tensor]]":
        return list(zip(self.teachers, videos[1:], strict=True))  # type: ignore[arg-type]  # each one Features

    def loss(self, own: Tensor, wanted: Sequence[Tensor]) -> Tensor:
        parts = [F.mse_loss(mlp(own).float(), f.float()) for mlp, f in zip(self.mlps, wanted, strict=True)]
        return torch.stack(parts).sum()


class Features(nn.Module):
    """fc_norm(mean of the tokens) of a MaskedViT, [B, D]."""

    def __init__(self, state: Mapping[str, Tensor], config: "ViTConfig") -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.fc_norm = nn.LayerNorm(config.embed_dim, eps=config.fc_norm_eps)
        body = {f"encoder.{name}": value for name, value in state.items() if not name.startswith(("head.", "fc_norm."))}
        load(self, body | {name: value for name, value in state.items() if name.startswith("fc_norm.")})

    def published(self, video: Tensor, mask: Tensor) -> Tensor:
        return self.fc_norm(self.encoder.published(self.encoder.normalise(video), mask).mean(1))

    def strong(self, video: Tensor, keep: Tensor) -> Tensor:
        return self.fc_norm(self.encoder.strong(video, keep).mean(1))


def load(model: nn.Module, state: Mapping[str, Tensor], prefixes: Mapping[str, str] | None = None) -> None:
    """Load weights under mmfast's names into a peer. Raises RuntimeError where a name or shape is missing or left over."""
    renamed = {}
    for name, value in state.items():
        for old, new in (prefixes or {}).items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        name = name.replace("patch_embed.proj.", "embed.").replace(".mlp.", ".")
        name = name.replace(".attn.q_bias", ".qkv.q_bias").replace(".attn.v_bias", ".qkv.v_bias")
        renamed[name.replace(".attn.", ".")] = value
    model.load_state_dict(renamed)


class HuggingFaceMAE(nn.Module):
    """transformers' VideoMAEForPreTraining with the same weights: reconstruction only, source and target as two passes."""

    def __init__(self, state: Mapping[str, Tensor], config: "MAEConfig") -> None:
        import transformers

        super().__init__()
        fields = peers.transformers_fields(config) | dict(
            decoder_hidden_size=config.decoder_embed_dim,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_num_heads,
            decoder_intermediate_size=config.decoder.mlp_dim,
            norm_pix_loss=config.normalize_target,
            use_mean_pooling=False,
        )
        self.model = transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig(**fields))
        self.model.decoder.norm.eps = config.norm_eps
        self.plain = [Encoder(config)]  # in a list: its weights are not part of this model
        self.model.load_state_dict(hf_names(state))

    def published(self, source: Tensor, target: Tensor, mask: Tensor, labels: Tensor | None) -> Tensor:
        losses = []
        for video in (source, target):
            pixels = self.plain[0].to(video.device).normalise(video).transpose(1, 2)
            losses.append(self.model(pixels, bool_masked_pos=mask).loss)
        return losses[0] + losses[1]


def hf_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A MaskedAutoencoder's state in transformers' names, without the class branch."""
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        side, _, rest = name.partition(".")
        if name in ("mask_token", "encoder_to_decoder.weight"):
            renamed[name] = value
        elif side not in ("encoder", "decoder"):
            continue
        elif rest.startswith("patch_embed.proj."):
            renamed[rest.replace("patch_embed.proj.", "videomae.embeddings.patch_embeddings.projection.")] = value
        elif rest.startswith("blocks."):
            _, layer, rest = rest.split(".", 2)
            prefix = f"videomae.encoder.layer.{layer}." if side == "encoder" else f"decoder.decoder_layers.{layer}."
            if rest == "attn.qkv.weight":
                for which, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    renamed[f"{prefix}attention.attention.{which}.weight"] = piece
            elif rest == "attn.q_bias":
                renamed[f"{prefix}attention.attention.query.bias"] = value
                renamed[f"{prefix}attention.attention.key.bias"] = torch.zeros_like(value)
            elif rest == "attn.v_bias":
                renamed[f"{prefix}attention.attention.value.bias"] = value
            else:
                part, kind = rest.rsplit(".", 1)
                renamed[f"{prefix}{names[part]}.{kind}"] = value
        else:
            renamed[rest.replace("norm.", "videomae.layernorm.") if side == "encoder" else name] = value
    return renamed
