"""MaskedAutoencoder: VideoMAE's pre-training model, with MM-CDFSL's class branch, on packed tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast_kernels.mae import decoder_tokens, masked_patch_mse
from mmfast_kernels.pool import segment_mean_norm

from . import profiling
from .config import MAEConfig, mae_from_name
from .decoder_pack import DecoderPack, decoder_pack
from .layers import Block, Constant, LayerNorm, Linear, resize_positions, run_block, set_recompute, sinusoid_positions
from .masks import Grid, Pack, check_mask
from .vit import MaskedViT

if TYPE_CHECKING:
    from .checkpoints import LoadReport


class MAEOutput(NamedTuple):
    """pred: [B, removed, C*tt*p*p], ascending ids, elements in (tt p p c) order. logits: [B, K], None without classes."""

    pred: Tensor
    logits: Tensor | None


class Decoder(nn.Module):
    """The blocks, norm and head under VideoMAE's names; the tokens go through MaskedAutoencoder.predict."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        inner = config.decoder
        self.blocks = nn.ModuleList(
            Block(
                inner.embed_dim,
                inner.num_heads,
                inner.mlp_dim,
                qkv_bias=inner.qkv_bias,
                norm_eps=inner.norm_eps,
                init_values=inner.init_values,
                gelu=inner.gelu,
            )
            for _ in range(inner.depth)
        )
        self.norm = LayerNorm(inner.embed_dim, eps=config.decoder_norm_eps)
        self.head = Linear(inner.embed_dim, config.patch_dim)


class MaskedAutoencoder(nn.Module):
    """VideoMAE (arXiv 2203.12602): encode the visible tokens, decode the removed ones, compare with their pixels.

    video: [B, C, F, H, W] on any strides, float and normalised already, or uint8 and normalised inside. mask: bool [B, N] or
    [B, P, N], True = removed, equally many in each; or a Pack of the visible tokens. Each must remove at least one token.
    decode_mask: of mask's shape, True = not decoded (VideoMAE v2's dual masking, arXiv 2303.16727): the decoder then
    neither sees nor predicts those removed tokens. With classes, logits come from the visible tokens (MM-CDFSL, stage I).
    While torch.compile traces, a mask that is not a Pack has no counts: unequal and empty removals are not refused then.
    """

    load_report: "LoadReport | None" = None

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = MaskedViT(config.encoder)
        self.encoder_to_decoder = Linear(config.embed_dim, config.decoder_embed_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_embed_dim))
        self.decoder = Decoder(config)
        classes = config.num_classes > 0
        self.fc_norm = LayerNorm(config.embed_dim, eps=config.fc_norm_eps) if classes and config.fc_norm else None
        self.head = Linear(config.embed_dim, config.num_classes) if classes else None
        self._positions = Constant(sinusoid_positions(config.num_tokens, config.decoder_embed_dim))
        mean, std = torch.tensor(config.mean), torch.tensor(config.std)
        # What makes a pixel of a uint8 or of a normalised video one of 0..1 again.
        self._bytes_to_pixels = Constant(torch.stack((torch.full_like(std, 1 / 255), torch.zeros_like(mean))))
        self._floats_to_pixels = Constant(torch.stack((std, mean)))
        self.grad_checkpointing = False
        self.apply(_init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "MaskedAutoencoder":
        """A published size with random weights: "pretrain_videomae_small_patch16_224".   overrides: fields of MAEConfig."""
        return cls(mae_from_name(name, **overrides))

    @classmethod
    def from_pretrained(cls, source: str | Path | Mapping[str, Tensor], **overrides: Any) -> "MaskedAutoencoder":
        """A model from a pre-training checkpoint: file, folder or state dict of VideoMAE, MM-CDFSL, Hugging Face or mmfast.

        overrides: fields of MAEConfig; with other in_chans or patch_size the patch embedding and the decoder's head start
        anew. What was loaded, initialised and dropped stands in `load_report`. In eval mode.
        """
        from .checkpoints import load_pretrained_mae

        model, report = load_pretrained_mae(source, **overrides)
        model.load_report = report
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json, each whole or not at all."""
        from .checkpoints import save_pretrained

        save_pretrained(self, folder)

    def forward(self, video: Tensor, mask: Tensor | Pack, decode_mask: Tensor | None = None) -> MAEOutput:
        """Predictions for the removed tokens, and logits. [B, P, ...] for a [B, P, N] mask, [S, ...] for a Pack.

        Raises ValueError where views have different numbers of removed tokens to predict.
        """
        visible, plan, lead = self.packs(video, mask, decode_mask)
        if plan.length is None and not torch.compiler.is_compiling():
            raise ValueError(
                "mask and decode_mask must leave equally many removed tokens to decode in every view: pred is one tensor"
            )
        tokens = self.encode(video, visible)
        pred = self.predict(tokens, plan, self.encoder.check_video(video))
        pred = pred.view(*lead, -1 if plan.length is None else plan.length, pred.shape[1])
        return MAEOutput(pred, None if self.head is None else self.classify(tokens, visible).unflatten(0, lead))

    def reconstruction_loss(
        self,
        video: Tensor,
        mask: Tensor | Pack,
        normalize_target: bool | None = None,
        decode_mask: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error against the pixels of the decoded tokens, each patch and channel normalised or raw: fp32 [].

        normalize_target: config.normalize_target unless given. The targets are never written to memory. Raises ValueError
        where views remove different numbers of tokens (without a decode_mask), since the published loss has no such mean.
        """
        visible, plan, _ = self.packs(video, mask, decode_mask)
        if plan.length is None and decode_mask is None and not torch.compiler.is_compiling():
            raise ValueError(
                "mask must remove equally many tokens in every view: the published loss is a mean over views"
            )
        pred = self.predict(self.encode(video, visible), plan, self.encoder.check_video(video))
        return self.patch_loss(pred, video, plan.token_idx, plan.clip_idx, normalize_target)

    # What the losses of several videos in one pack build on

    def packs(
        self, video: Tensor, mask: Tensor | Pack, decode_mask: Tensor | None = None
    ) -> tuple[Pack, DecoderPack, tuple[int, ...]]:
        """The visible tokens, what the decoder runs on, and the leading shape of what is predicted."""
        grid = self.encoder.check_video(video)
        tokens = grid[0] * grid[1] * grid[2]
        if mask is None:
            raise ValueError("mask must be given: a masked autoencoder predicts the tokens it removes")
        if decode_mask is not None:
            check_mask(decode_mask, video.shape[0], tokens, grid, name="decode_mask")
            if isinstance(mask, Tensor) and decode_mask.shape != mask.shape:
                raise ValueError(
                    f"decode_mask must have the mask's shape {tuple(mask.shape)}, got {tuple(decode_mask.shape)}"
                )
            decode_mask = decode_mask.reshape(-1, tokens).to(self.mask_token.device)
        visible, lead = self.encoder.pack(video, mask)
        if decode_mask is not None and decode_mask.shape[0] != visible.num_sequences:
            raise ValueError(
                f"decode_mask must have one row a view, {visible.num_sequences}, got {decode_mask.shape[0]}"
            )
        plan = decoder_pack(visible, tokens, decode_mask)
        if plan.length == 0 and visible.num_sequences:
            raise ValueError("mask must remove at least one token that is decoded in every view, it removes none")
        return visible, plan, lead

    def encode(self, video: Tensor, visible: Pack) -> Tensor:
        """Visible tokens after the encoder's norm, [Tv, D]."""
        with profiling.range("encoder"):
            x = self.encoder.embed(video, visible)
            return self.encoder.encode_tokens(x, visible, self.encoder.check_video(video))

    def predict(self, tokens: Tensor, plan: DecoderPack, grid: Grid) -> Tensor:
        """Predictions [M, C*tt*p*p] for the removed tokens of a DecoderPack.   tokens: [Tv, D], of `encode`."""
        with profiling.range("decoder"):
            positions = resize_positions(self._positions(), self.config.grid, grid)
            visible = self.encoder_to_decoder(tokens)
            x = decoder_tokens(
                visible, self.mask_token.flatten(), positions, plan.source, plan.pack.keep_idx, plan.place
            )
            branch: Tensor | None = None
            for block in self.decoder.blocks:
                x, branch = run_block(block, x, branch, plan.pack, self.grad_checkpointing)
            assert branch is not None
            x = self.decoder.norm.add(x, branch)[1]
            if plan.length is not None and plan.pack.length is not None:
                x = x.unflatten(0, (-1, plan.pack.length))[:, plan.pack.length - plan.length :].flatten(0, 1)
            else:
                x = x.index_select(0, plan.rows)
            return self.decoder.head(x)

    def classify(self, tokens: Tensor, visible: Pack) -> Tensor:
        """Logits [S, K] from the visible tokens [Tv, D] of `encode`."""
        if self.head is None:
            raise ValueError("this model has no class branch; build it with num_classes above 0")
        norm = self.fc_norm
        pooled = segment_mean_norm(
            tokens,
            visible.cu_seqlens if visible.length is None else None,
            length=visible.length,
            weight=None if norm is None else norm.weight,
            bias=None if norm is None else norm.bias,
            eps=1e-6 if norm is None else norm.eps,
        )
        return self.head(F.dropout(pooled, self.config.head_drop_rate, self.training))

    def patch_loss(
        self, pred: Tensor, video: Tensor, token_idx: Tensor, clip_idx: Tensor, normalize_target: bool | None = None
    ) -> Tensor:
        """Mean squared error of pred [M, C*tt*p*p] against the pixels of tokens token_idx [M] of clips clip_idx [M]."""
        config = self.config
        normalize = config.normalize_target if normalize_target is None else normalize_target
        scale, shift = (self._bytes_to_pixels if video.dtype == torch.uint8 else self._floats_to_pixels)()
        sizes = dict(tubelet=config.tubelet_size, patch=config.patch_size)
        with profiling.range("loss"):
            return masked_patch_mse(
                pred, video, token_idx, clip_idx, scale=scale, shift=shift, normalize=normalize, **sizes
            )

    def get_num_layers(self) -> int:
        return len(self.encoder.blocks)

    def no_weight_decay(self) -> set[str]:
        return {"mask_token"}

    def set_grad_checkpointing(self, enable: bool = True, what: str = "block") -> None:
        """As MaskedViT's, of encoder and decoder."""
        self.encoder.set_grad_checkpointing(enable, what)
        self.grad_checkpointing = set_recompute(self.decoder.blocks, enable, what)


def _init_weights(module: nn.Module) -> None:
    """VideoMAE's: Xavier for every linear layer."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
