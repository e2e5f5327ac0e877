"""EVL: a frozen image model and a light temporal decoder of its last layers (Lin et al., ECCV 2022, arXiv 2208.03550)."""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import profiling
from .clip import CLIP
from .clip_config import CLIPConfig
from .clip_vision import CLIPVision
from .evl_config import EVLConfig
from .evl_decoder import Decoder, LayerFeatures
from .layers import LayerNorm, Linear
from .masks import Grid, Pack, check_mask, pack_masks, video_grid
from .vit import Mask, MaskedViT

if TYPE_CHECKING:
    from .checkpoints import LoadReport


class _Views(NamedTuple):
    """pack: None where nothing is removed. lead: leading shape of the results. cells: as LayerFeatures has them."""

    pack: Pack | None
    lead: tuple[int, ...]
    cells: Tensor | None
    grid: Grid


class EVL(nn.Module):
    """EVL on a frozen CLIP vision tower or MaskedViT: the last blocks' features go to the decoder as the backbone runs.

    video: [B, 3, F, H, W] on any strides, float and normalised already, or uint8 and normalised inside. mask: bool [B, N] or
    [B, P, N], True = removed, the same cells in every frame and equally many in every view (tube_masks), or a Pack of
    sample_pack; None keeps all. A backbone that is given is taken over, not copied: it is in eval mode and outside of autograd,
    whatever `train` says, unless freeze_backbone(False).
    """

    load_report: "LoadReport | None" = None

    def __init__(
        self,
        config: EVLConfig,
        backbone: CLIP | CLIPVision | MaskedViT | None = None,
        *,
        backbone_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = _tower(config, backbone)
        if backbone_dtype is not None:
            self.backbone.to(backbone_dtype)
        self.decoder = Decoder(config)
        self.proj = nn.Sequential(
            LayerNorm(config.width, eps=config.norm_eps),
            nn.Dropout(config.class_dropout),
            Linear(config.width, config.num_classes),
        )
        self.freeze_backbone()

    @classmethod
    def from_name(
        cls, name: str, preset: str = "paper", *, backbone_dtype: torch.dtype | None = None, **overrides: Any
    ) -> "EVL":
        """A published backbone size with random weights.   preset, overrides: as EVLConfig.preset takes them."""
        return cls(EVLConfig.preset(preset, name, **overrides), backbone_dtype=backbone_dtype)

    @classmethod
    def from_pretrained(
        cls,
        source: Any,
        backbone: Any = None,
        *,
        num_heads: int | None = None,
        decoder_num_heads: int | None = None,
        backbone_dtype: torch.dtype | None = None,
        interpolate: bool = False,
        preset: str = "paper",
        trust: bool = False,
        **overrides: Any,
    ) -> "EVL":
        """A model from a decoder's checkpoint and a backbone, or a folder of mmfast with both. In eval mode.

        source: EVL's checkpoint, path or state dict, or None for a decoder that starts anew. backbone: a CLIP's or MaskedViT's
        file, folder, state dict or module. num_heads: of the backbone where the file does not tell. interpolate: resize the
        temporal positions and tables of offsets to num_frames and to the backbone's grid, else one that does not fit is
        refused. preset: what the files do not tell. overrides: fields of EVLConfig. What was loaded stands in `load_report`.
        """
        from .checkpoints.evl import load_pretrained_evl

        model, report = load_pretrained_evl(
            source,
            backbone,
            num_heads=num_heads,
            backbone_dtype=backbone_dtype,
            interpolate=interpolate,
            preset=preset,
            trust=trust,
            decoder_num_heads=decoder_num_heads,
            **overrides,
        )
        model.load_report = report
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model.safetensors, the backbone's tensors among them, and config.json, each whole or not at all."""
        from .checkpoints.save import write_folder

        write_folder(self.state_dict(), "EVL", self.config.to_dict(), folder)

    def save_decoder(self, path: str | Path) -> None:
        """Write decoder and head in EVL's names and form of file; `from_pretrained(path, backbone=...)` reads it."""
        from .checkpoints.evl import save_decoder

        save_decoder(self, path)

    def forward(self, video: Tensor, mask: Mask = None) -> Tensor:
        """Logits: [B, K]; [B, P, K] for a [B, P, N] mask; [S, K] for a Pack."""
        return self.proj(self.encode(video, mask))

    def encode(self, video: Tensor, mask: Mask = None) -> Tensor:
        """The class query after the decoder: [B, D]; [B, P, D] for a [B, P, N] mask; [S, D] for a Pack."""
        views = self._views(video, mask)
        return self.decode(self._stream(video, views)).unflatten(0, views.lead)

    def stream(self, video: Tensor, mask: Mask = None) -> Iterator[LayerFeatures]:
        """What the decoder reads, a block at a time, as soon as it has run; constants while the backbone is frozen.

        Kept in a list, or stored and read again, it is what `decode` takes in the video's place.
        """
        return self._stream(video, self._views(video, mask))

    def decode(self, features: Iterable[LayerFeatures]) -> Tensor:
        """The class query [V, D] after as many layers as there are features; ValueError for too few or too many."""
        x: Tensor | None = None
        layers, count = self.config.num_layers, 0
        for seen in features:
            if count == layers:
                raise ValueError(f"features must be of {layers} blocks, one a layer of the decoder, got more")
            x = self.decoder.start(seen.out.shape[0]) if x is None else x
            self._check_features(seen)
            with profiling.range(f"decoder{count}"):
                x = self.decoder.layer(count, x, seen)
            count += 1
            del seen  # so that it is free while the next block runs
        if x is None or count < layers:
            raise ValueError(f"features must be of {layers} blocks, one a layer of the decoder, got {count}")
        return x

    def resize(self, num_frames: int | None = None, grid: tuple[int, int] | None = None) -> None:
        """Interpolate the temporal positions to num_frames, and the tables of offsets to another grid (h, w) of a frame.

        The parameters are new ones afterwards: make optimisers later.
        """
        frames, cells = num_frames or self.config.num_frames, grid or self.config.grid
        config = replace(self.config, num_frames=frames, grid=(cells[0], cells[1]))
        self.decoder.resize(config.num_frames, config.grid)
        self.config = config

    def freeze_backbone(self, on: bool = True) -> None:
        """Keep the backbone in eval mode and out of autograd, as a new EVL does; False trains it with the decoder."""
        self.frozen = on
        self.backbone.requires_grad_(not on)
        self.train(self.training)

    def train(self, mode: bool = True) -> "EVL":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def num_trainable(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def set_grad_checkpointing(self, enable: bool = True, what: str = "block") -> None:
        """Nothing to do while the backbone is frozen: it keeps nothing for a backward. As MaskedViT's."""
        self.backbone.set_grad_checkpointing(enable, what)

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, on px/255: what uint8 pixels are normalised with."""
        return self.config.backbone.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, on px/255: what uint8 pixels are normalised with."""
        return self.config.backbone.std

    @property
    def embed_dim(self) -> int:
        """Width of `encode`'s features."""
        return self.config.width

    def check_video(self, video: Tensor) -> Grid:
        """The token grid of a video, or an error that says what is wrong with it."""
        if isinstance(self.config.backbone, CLIPConfig):
            return video_grid(video, 3, 1, self.config.backbone.patch_size)
        return self.backbone.check_video(video)

    # -- inside ------------------------------------------------------------------------------------------------

    def _stream(self, video: Tensor, views: _Views) -> Iterator[LayerFeatures]:
        count, device = self.config.num_layers, video.device.type
        # Of less than 32 bits, the backbone runs in its own dtype under autocast too.
        wide = next(self.backbone.parameters()).dtype.itemsize >= 4
        autocast = torch.is_autocast_enabled(device) and wide
        steps: Iterator[tuple[Tensor, Tensor]] | None = None
        for _ in range(count):
            # Around each step alone: the decoder, which runs between them, is in autograd and autocast.
            grad = torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen)
            with grad, torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=autocast):
                if steps is None:
                    steps = self.backbone.stream(video, views.pack, count)
                features = self._features(next(steps), views)
            yield features
            del features

    def _features(self, block: tuple[Tensor, Tensor], views: _Views) -> LayerFeatures:
        tokens, qkv = block
        patches = views.grid[1] * views.grid[2] if views.cells is None else views.cells.shape[1]
        first = self._class_tokens
        shape = (math.prod(views.lead), views.grid[0], first + patches)
        out = tokens.view(*shape, tokens.shape[-1])
        if not self.config.temporal_cross_attention:
            return LayerFeatures(out, None, None, views.cells)
        q, k, _ = qkv.unflatten(0, shape)[:, :, first:].unbind(3)
        return LayerFeatures(out, q, k, views.cells)

    @property
    def _class_tokens(self) -> int:
        return int(isinstance(self.backbone, CLIPVision))

    def _views(self, video: Tensor, mask: Mask) -> _Views:
        grid = self.check_video(video)
        self._check_grid(grid)
        frames, cells, batch = grid[0], grid[1] * grid[2], video.shape[0]
        if mask is None:
            return _Views(None, (batch,), None, grid)
        if isinstance(mask, Pack):
            if not mask.tubes:
                raise ValueError(
                    "mask must be a Pack of tube masks (sample_pack), or the mask itself; got another Pack"
                )
            pack, lead = mask, torch.Size((mask.num_sequences,))
        else:
            check_mask(mask, batch, frames * cells, grid)
            if not torch.compiler.is_compiling():
                slots = mask.reshape(-1, frames, cells)
                if not torch.equal(slots, slots[:, :1].expand_as(slots)):
                    raise ValueError(f"mask must remove the same cells in all {frames} frames (tube_masks)")
            pack = replace(pack_masks(mask.to(self.decoder.cls_token.device)), tubes=True)
            lead = mask.shape[:-1]
        if pack.length is None:
            raise ValueError(
                "mask must keep equally many cells in every view (under torch.compile: give a sample_pack)"
            )
        kept = pack.keep_idx.view(pack.num_sequences, pack.length)[:, : pack.length // frames]
        return _Views(pack, lead, kept.contiguous(), grid)

    def _check_grid(self, grid: Grid) -> None:
        c = self.config
        if c.temporal_positions and grid[0] != c.num_frames:
            raise ValueError(
                f"video has {grid[0]} frames, the temporal positions are of {c.num_frames}; "
                f"resize(num_frames={grid[0]}) interpolates them"
            )
        if c.temporal_cross_attention and grid[1:] != c.grid:
            raise ValueError(
                f"video has a grid of {grid[1]} x {grid[2]} cells, the tables of offsets are of {c.grid[0]} x {c.grid[1]}; "
                f"resize(grid={grid[1:]}) interpolates them"
            )

    def _check_features(self, seen: LayerFeatures) -> None:
        c = self.config
        if seen.out.dim() != 4 or seen.out.shape[-1] != c.width:
            raise ValueError(f"features: out must be [V, F, L, {c.width}], got {tuple(seen.out.shape)}")
        if c.temporal_positions and seen.out.shape[1] != c.num_frames:
            raise ValueError(f"features are of {seen.out.shape[1]} frames, the temporal positions of {c.num_frames}")
        if c.temporal_cross_attention and (seen.q is None or seen.k is None):
            raise ValueError("features must have q and k, which temporal cross-attention reads")


def _tower(config: EVLConfig, given: CLIP | CLIPVision | MaskedViT | None) -> Any:
    """The backbone given, or a fresh one."""
    if isinstance(given, CLIP):
        given = given.visual
    if given is None:
        return CLIPVision(config.backbone) if isinstance(config.backbone, CLIPConfig) else MaskedViT(config.backbone)
    if not isinstance(given, (CLIPVision, MaskedViT)):
        raise TypeError(f"backbone must be a CLIP, CLIPVision or MaskedViT, got {type(given).__name__}")
    if given.config != config.backbone:
        raise ValueError("backbone must have the config that config.backbone tells; it has another")
    return given
