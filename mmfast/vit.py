"""MaskedViT: the video transformer of VideoMAE, run on kept tokens only, many views of many clips in one packed batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast_kernels.patches import tube_embed
from mmfast_kernels.pool import segment_mean_norm

from . import profiling
from .adapters import FrameLayout
from .clip_blocks import AdapterPlacement, place_adapters
from .config import ViTConfig, from_name
from .ensemble import ensemble
from .fused import Fusible
from .layers import (
    Block,
    Constant,
    LayerNorm,
    Linear,
    pixel_affine,
    resize_positions,
    run_block,
    set_recompute,
    sinusoid_positions,
    stream_blocks,
)
from .masks import ClipIds, Grid, Pack, check_mask, check_tubes, full_pack, join_packs, pack_masks, video_grid
from .quantize import Quantizable
from .timm_names import TimmNames, init_weights
from .vit_encoder import Encoder, joined, norm_arguments

if TYPE_CHECKING:
    from .checkpoints import LoadReport

Mask = Tensor | Pack | None


@dataclass(frozen=True)
class PackedTokens:
    """Tokens of all sequences, end to end.   tokens: [T, D], after the encoder's final norm."""

    tokens: Tensor
    pack: Pack

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [S+1]: where each sequence starts and ends."""
        return self.pack.cu_seqlens


class PatchEmbed(nn.Module):
    """Holds the weights of the patch embedding, under VideoMAE's names; MaskedViT.embed uses them."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        kernel = (config.tubelet_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_chans, config.embed_dim, kernel, kernel)


class MaskedViT(TimmNames, Encoder, Quantizable, Fusible):
    """VideoMAE's ViT (arXiv 2203.12602) on masked clips.

    video: [B, C, F, H, W] on any strides, float and normalised already, or uint8 and normalised inside with config.mean and
    config.std. mask: bool [B, N] or [B, P, N], True = removed; or a Pack; None keeps every token. Token ids are t-major.
    With adapters (config.adapter_hidden, add_adapters) a mask must remove the same cells in every slot, as tube_masks do.
    """

    load_report: "LoadReport | None" = None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(config)
        rates = torch.linspace(0, config.drop_path_rate, config.depth).tolist()
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.num_heads,
                config.mlp_dim,
                qkv_bias=config.qkv_bias,
                norm_eps=config.norm_eps,
                init_values=config.init_values,
                drop_path=rate,
                gelu=config.gelu,
            )
            for rate in rates
        )
        self.norm = LayerNorm(dim, eps=config.norm_eps) if config.final_norm else None
        self.fc_norm = LayerNorm(dim, eps=config.fc_norm_eps) if config.fc_norm else None
        self.head: nn.Module = Linear(dim, config.num_classes) if config.num_classes else nn.Identity()
        self._positions = Constant(sinusoid_positions(config.num_tokens, dim))
        self._pixel_affine = pixel_affine(config.mean, config.std)
        self.grad_checkpointing = False
        self.apply(init_weights)
        self.use_adapters = True
        if config.adapter_hidden:
            place_adapters(self.blocks, dim, _placement(config))

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "MaskedViT":
        """A published size with random weights, such as "videomae_small_patch16_224".   overrides: fields of ViTConfig."""
        return cls(from_name(name, **overrides))

    @classmethod
    def from_pretrained(cls, source: str | Path | Mapping[str, Tensor], **overrides: Any) -> "MaskedViT":
        """A model from a checkpoint file, folder or state dict; the dialect is found from the keys. In eval mode.

        overrides: fields of ViTConfig. What was loaded, initialised and dropped stands in `load_report`.
        """
        from .checkpoints import load_pretrained_vit

        model, report = load_pretrained_vit(source, **overrides)
        model.load_report = report
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json, each whole or not at all."""
        from .checkpoints import save_pretrained

        save_pretrained(self, folder)

    def forward(self, video: Tensor, mask: Mask = None) -> Tensor:
        """Logits: [B, K]; [B, P, K] for a [B, P, N] mask; [S, K] for a Pack."""
        return self.head(self._dropout(self.encode(video, mask)))

    def encode(self, video: Tensor, mask: Mask = None) -> Tensor:
        """Pooled features: [B, D]; [B, P, D] for a [B, P, N] mask; [S, D] for a Pack."""
        pack, lead = self.pack(video, mask)
        return self._features(self.embed(video, pack), pack, self.check_video(video)).unflatten(0, lead)

    def forward_features(self, video: Tensor, mask: Mask = None) -> Tensor:
        """Tokens after the final norm, ascending ids: [B, n, D]; [B, P, n, D] for a [B, P, N] mask. Needs equal counts."""
        pack, lead = self.pack(video, mask)
        if pack.length is None:
            raise ValueError(
                "forward_features needs views that keep equally many tokens; use forward_packed for unequal ones"
            )
        tokens = self.encode_tokens(self.embed(video, pack), pack, self.check_video(video))
        return tokens.unflatten(0, (*lead, pack.length))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens [..., n, D] of forward_features to features [..., D] (pre_logits=True) or logits [..., K]."""
        lead, (n, dim) = tokens.shape[:-2], tokens.shape[-2:]
        flat = tokens.reshape(-1, dim)
        if self.config.pool == "first":
            pooled = tokens.reshape(-1, n, dim)[:, 0]
            pooled = pooled if self.fc_norm is None else self.fc_norm(pooled, pooled.dtype)
        else:
            weight, bias, eps = norm_arguments(self.fc_norm)
            pooled = segment_mean_norm(flat, None, length=n, weight=weight, bias=bias, eps=eps)
        pooled = pooled.reshape(*lead, dim)
        return pooled if pre_logits else self.head(self._dropout(pooled))

    def forward_packed(self, video: Tensor | Sequence[Tensor], mask: Mask | Sequence[Mask] = None) -> PackedTokens:
        """Tokens of every sequence end to end; views may keep different numbers of tokens.

        Groups of clips of different sizes or frame counts go in as a list of videos with a list of masks: one pack of all.
        """
        if isinstance(video, Tensor):
            pack, _ = self.pack(video, mask)  # type: ignore[arg-type]  # one video has one mask
            x, grid = self.embed(video, pack), self.check_video(video)
        else:
            masks = [None] * len(video) if mask is None else mask
            if not isinstance(masks, Sequence) or len(masks) != len(video):
                raise ValueError(
                    f"a list of {len(video)} videos takes a list of {len(video)} masks, got {type(mask).__name__}"
                )
            packs = [self.pack(v, m)[0] for v, m in zip(video, masks, strict=True)]
            x = torch.cat([self.embed(v, p) for v, p in zip(video, packs, strict=True)])
            pack = join_packs(packs, [len(v) for v in video])
            grid, *others = {self.check_video(v) for v in video}
            if others and self._adapts:
                raise ValueError(
                    f"videos must have one token grid, which the adapters run over, got {grid} and {others[0]}"
                )
        return PackedTokens(self.encode_tokens(x, pack, grid), pack)

    def forward_intermediates(
        self,
        video: Tensor,
        mask: Mask = None,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        intermediates_only: bool = False,
    ) -> Any:
        """timm's forward_intermediates: (final tokens, [tokens after each chosen block]), each [B, n, D].

        indices: the last so many blocks, or their numbers; None takes all. norm: apply the final norm to each.
        """
        pack, lead = self.pack(video, mask)
        if pack.length is None:
            raise ValueError("forward_intermediates needs views that keep equally many tokens")
        depth = len(self.blocks)
        chosen = (
            range(depth) if indices is None else range(depth - indices, depth) if isinstance(indices, int) else indices
        )
        wanted = {i % depth for i in chosen}
        x, layout = self.embed(video, pack), self._layout(pack, self.check_video(video))
        branch: Tensor | None = None
        taken = []
        for i, block in enumerate(self.blocks):
            x, branch = run_block(block, x, branch, pack, self.grad_checkpointing, layout)
            if i in wanted:
                taken.append(self._normed((x, branch)) if norm else joined((x, branch)))
        shape = (*lead, pack.length)
        taken = [t.unflatten(0, shape) for t in taken]
        return taken if intermediates_only else (self._normed((x, branch)).unflatten(0, shape), taken)

    def stream(self, video: Tensor, mask: Mask = None, last: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens [T, D], packed queries, keys and values [T, 3, H, d]) of each of the last blocks, as soon as it has run.

        No final norm. An iterator: what is not kept of one block is free before the next one runs.
        """
        pack, _ = self.pack(video, mask)
        layout = self._layout(pack, self.check_video(video))
        return stream_blocks(self.blocks, self.embed(video, pack), pack, layout, last, self.grad_checkpointing)

    def ensemble(
        self,
        video: Tensor,
        views: int = 2,
        mask_ratio: float = 0.75,
        *,
        keep: int | None = None,
        seed: int = 0,
        clip_ids: ClipIds = None,
        masks: Tensor | None = None,
        micro_batch: int | str | None = None,
    ) -> Tensor:
        """Ensemble masked inference (MM-CDFSL, ECCV 2024): the mean over P tube-masked views of the class probabilities.

        keep, seed, clip_ids: as in tube_masks. masks: bool [B, P, N] instead of sampled ones. micro_batch: clips run at once;
        chosen from the device when None, by its L2 cache when "l2", halved when memory runs out. A uint8 video in host
        memory with the model on a GPU sends only the pixels that some view keeps.

        Returns fp32 [B, K].
        """
        return ensemble(self, video, views, mask_ratio, keep, seed, clip_ids, masks, micro_batch)

    # What ensemble.py builds on

    def embed(self, video: Tensor, pack: Pack) -> Tensor:
        """Embed the kept tokens, positions added.   video: [B, C, F, H, W].   Returns [T, D]."""
        grid = self.check_video(video)
        return self._tube_embed(video, pack.keep_idx, pack.clip_idx, None, self._positions_of(grid))

    def embed_rows(self, rows: Tensor, row_of: Tensor, keep_idx: Tensor, grid: Grid) -> Tensor:
        """Embed from pixels gathered already.   rows: [U, C, tt, p, p]; row_of: int32 [T], the row of each token."""
        return self._tube_embed(rows, torch.zeros_like(row_of), row_of, keep_idx, self._positions_of(grid))

    def encode_tokens(self, x: Tensor, pack: Pack, grid: Grid | None = None) -> Tensor:
        """Tokens [T, D] after the blocks and the final norm, of embedded ones [T, D].   grid: of the videos, unless config's."""
        return self._normed(self._encode(x, pack, grid))

    def logits(self, x: Tensor, pack: Pack, grid: Grid | None = None) -> Tensor:
        """Logits [S, K] of embedded tokens [T, D].   grid: of the videos, unless config's."""
        return self.head(self._dropout(self._features(x, pack, grid)))

    def check_masks(self, masks: Tensor, grid: Grid) -> None:
        """Raise ValueError where the adapters cannot run under masks [.., N]."""
        if self._adapts:
            check_tubes(masks, grid)

    def check_video(self, video: Tensor) -> Grid:
        """The token grid of a video, or a ValueError that says what is wrong with it."""
        c = self.config
        return video_grid(video, c.in_chans, c.tubelet_size, c.patch_size)

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, on px/255: what a uint8 video is normalised with."""
        return self.config.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, on px/255: what a uint8 video is normalised with."""
        return self.config.std

    # Adapters

    def _to_fuse(self) -> Sequence[nn.Module]:
        self.refuse_if_quantized("fuse_for_inference")
        return list(self.blocks)

    def add_adapters(
        self, hidden: int, before: str | Sequence[str] = ("attn",), layers: Sequence[int] | None = None
    ) -> None:
        """Put fresh TED-Adapters, which change nothing yet, before "attn", "mlp" or both of the blocks `layers`, or of all.

        Raises ValueError where there are adapters already or an argument does not fit; the config says where they are.
        """
        self.refuse_if_fused("add_adapters")
        if self.config.adapter_hidden:
            raise ValueError(f"the model has adapters already, {self.config.adapter_hidden} wide")
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        places: dict[str, Any] = {"adapter_before": before, "adapter_layers": layers}
        self.config = replace(self.config, adapter_hidden=hidden, **places)
        place_adapters(self.blocks, self.embed_dim, _placement(self.config))
        like = self.patch_embed.proj.weight
        for block in self.blocks:
            for adapter in (block.adapter_pre_attn, block.adapter_pre_mlp):
                if isinstance(adapter, nn.Module):
                    adapter.to(like.device, like.dtype).train(self.training)
        self.enable_adapters()

    def enable_adapters(self, on: bool = True) -> None:
        """Whether the adapters take part; without them the model is the one they were added to."""
        self.use_adapters = on
        for block in self.blocks:
            block.use_adapters = on  # type: ignore[assignment]  # blocks are Blocks

    def set_grad_checkpointing(self, enable: bool = True, what: str = "block") -> None:
        """Keep less for the backward and compute it again there.   what: whole blocks, or the hidden layers of the "mlp" only."""
        self.grad_checkpointing = set_recompute(self.blocks, enable, what)

    # -- inside ------------------------------------------------------------------------------------------------

    def pack(self, video: Tensor, mask: Mask) -> tuple[Pack, tuple[int, ...]]:
        """The pack of a mask of any kind, and the leading shape of what is computed from it."""
        grid = self.check_video(video)
        batch, tokens = video.shape[0], grid[0] * grid[1] * grid[2]
        if mask is None:
            return full_pack(batch, tokens, self._device), (batch,)
        if isinstance(mask, Pack):
            return mask, (mask.num_sequences,)
        check_mask(mask, batch, tokens, grid)
        known = self._adapts and not torch.compiler.is_compiling()
        if known:
            self.check_masks(mask, grid)
        return replace(pack_masks(mask.to(self._device)), tubes=known), tuple(mask.shape[:-1])

    def _tube_embed(
        self, pixels: Tensor, token_idx: Tensor, clip_idx: Tensor, pos_idx: Tensor | None, positions: Tensor
    ) -> Tensor:
        weight, bias = self.patch_embed.proj.weight, self.patch_embed.proj.bias
        scale, shift = self._pixel_affine() if pixels.dtype == torch.uint8 else (None, None)
        with profiling.range("embed"):
            return tube_embed(
                pixels, weight, bias, positions, token_idx, clip_idx, pos_idx=pos_idx, scale=scale, shift=shift
            )

    def _positions_of(self, grid: Grid) -> Tensor:
        return resize_positions(self._positions(), self.config.grid, grid)

    @property
    def _adapts(self) -> bool:
        return self.config.adapter_hidden > 0 and self.use_adapters

    def _layout(self, pack: Pack, grid: Grid) -> FrameLayout | None:
        """What the adapters run on, where there are any: the frames are the slots."""
        if not self._adapts:
            return None
        if pack.length == grid[0] * grid[1] * grid[2]:
            return FrameLayout.dense(pack.num_sequences, grid[0], grid[1:], False, pack.keep_idx.device)
        capturing = pack.keep_idx.is_cuda and torch.cuda.is_current_stream_capturing()
        return FrameLayout.of_pack(pack, grid, check=not pack.tubes and not capturing)

    def _dropout(self, features: Tensor) -> Tensor:
        return F.dropout(features, self.config.head_drop_rate, self.training)

    @property
    def _device(self) -> torch.device:
        return self.patch_embed.proj.weight.device


def _placement(config: ViTConfig) -> AdapterPlacement:
    return AdapterPlacement(config.adapter_layers, config.adapter_before, config.adapter_hidden, "ted")
