"""CLIP's vision tower on video: every frame is a sequence of its own, a class token and the cells that are kept."""

from collections.abc import Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast_kernels.linear import linear
from mmfast_kernels.patches import tube_embed

from . import profiling
from .adapters import FrameLayout
from .clip_blocks import AdapterPlacement, Transformer, normal
from .clip_config import CLIPConfig
from .layers import LayerNorm, pixel_affine, stream_blocks
from .masks import Grid, Pack, check_mask, full_pack, pack_masks, video_grid
from .vit import Mask, PackedTokens


class Frames(NamedTuple):
    """The views of a video, cut into frames.

    views: one sequence a view, token ids over the (F, h, w) grid.
    frames: one sequence a frame, rows of the table of positions: 0, the class token, then 1 + cell. clip_of as in views.
    place: int64 [T], where each token of `views` lies in `frames`; None where every frame keeps equally many.
    layout: what adapters over frames run on, where there are any.
    """

    views: Pack
    frames: Pack
    place: Tensor | None
    layout: FrameLayout | None = None


class CLIPVision(nn.Module):
    """The ViT of CLIP (2103.00020) over the frames of clips, tube-masked or whole.

    video: [B, 3, F, H, W] on any strides, float and normalised already, or uint8 and normalised inside. mask: bool [B, N] or
    [B, P, N] over the (F, h, w) grid, True = removed, that keeps a cell in every frame; or a Pack; None keeps every cell.
    adapters: blocks with adapters; those over frames need every frame of a view to keep the same cells.
    """

    def __init__(self, config: CLIPConfig, adapters: AdapterPlacement | None = None) -> None:
        super().__init__()
        self.config = config
        dim, std = config.vision_width, config.vision_width**-0.5
        self.conv1 = nn.Conv2d(3, dim, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = normal(dim, std=std)
        self.positional_embedding = normal(1 + config.side**2, dim, std=std)
        self.ln_pre = LayerNorm(dim, eps=config.norm_eps)
        self.transformer = Transformer(
            dim,
            config.vision_depth,
            config.vision_num_heads,
            config.hidden("vision"),
            norm_eps=config.norm_eps,
            gelu=config.gelu,
            adapters=adapters,
        )
        self.over_frames = adapters is not None and adapters.kind == "ted"
        self.ln_post = LayerNorm(dim, eps=config.norm_eps)
        self.proj = normal(dim, config.embed_dim, std=std)
        self._pixel_affine = pixel_affine(config.mean, config.std)

    def forward(self, video: Tensor, mask: Mask = None) -> Tensor:
        """Frame features in the common space: [B, F, E]; [B, P, F, E] for a [B, P, N] mask, [S, F, E] for a Pack."""
        return self.project(self.head(self.forward_frames(video, mask)))

    def forward_frames(self, video: Tensor, mask: Mask = None) -> Tensor:
        """The class token of every frame, before ln_post: [B, F, D], [B, P, F, D] or [S, F, D] as in forward."""
        cut, lead = self.cut(video, mask)
        x, branch = self._encode(video, cut, cut.frames.cu_seqlens[:-1])
        return (x + branch).unflatten(0, (*lead, video.shape[2]))

    def forward_tokens(self, video: Tensor, mask: Mask = None) -> PackedTokens:
        """Every token, before ln_post: one sequence a frame, views one after another, the class token first."""
        cut, _ = self.cut(video, mask)
        x, branch = self._encode(video, cut)
        return PackedTokens(x + branch, cut.frames)

    def stream(self, video: Tensor, mask: Mask = None, last: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """As MaskedViT's: of tokens as forward_tokens gives them."""
        cut, _ = self.cut(video, mask)
        transformer = self.transformer
        x = self._embedded(video, cut)
        blocks, recompute = transformer.resblocks[: transformer.depth], transformer.grad_checkpointing
        return stream_blocks(blocks, x, cut.frames, cut.layout, last, recompute)

    def head(self, features: Tensor) -> Tensor:
        """ln_post of class tokens [..., D], or of a mean of them."""
        return self.ln_post(features, features.dtype)

    def project(self, features: Tensor) -> Tensor:
        """Features [..., D] of `head` in the common space, [..., E]."""
        return linear(features, self.proj.t())

    def cut(self, video: Tensor, mask: Mask) -> tuple[Frames, tuple[int, ...]]:
        """The frames of a mask of any kind, and the leading shape of what is computed from it."""
        grid = video_grid(video, 3, 1, self.config.patch_size)
        frames, cells, batch = grid[0], grid[1] * grid[2], video.shape[0]
        device = self.proj.device
        over_frames = self.over_frames and self.transformer.use_adapters
        if mask is None:
            layout = FrameLayout.dense(batch, frames, (grid[1], grid[2]), True, device) if over_frames else None
            return cut_frames(full_pack(batch, frames * cells, device), grid, cells)._replace(layout=layout), (batch,)
        if isinstance(mask, Pack):
            lead: tuple[int, ...] = (mask.num_sequences,)
            cut, checked = cut_frames(mask, grid, _common_count(mask, grid)), False
        else:
            check_mask(mask, batch, frames * cells, grid)
            removed = mask.reshape(-1, frames, cells)
            checked = not torch.compiler.is_compiling()
            kept = _kept_in_each(removed, over_frames) if checked else None
            cut, lead = cut_frames(pack_masks(mask.to(device)), grid, kept), tuple(mask.shape[:-1])
        if over_frames:
            cut = cut._replace(layout=FrameLayout.of_pack(cut.views, grid, True, check=not checked))
        return cut, lead

    def fuse_for_inference(self, gelu: str | None = None) -> Self:
        """As MaskedViT's, of all blocks but the last."""
        self.transformer.fuse_for_inference(gelu)
        return self

    def unfuse(self) -> Self:
        """Undo fuse_for_inference. Returns the model."""
        self.transformer.unfuse()
        return self

    def set_grad_checkpointing(self, enable: bool = True, what: str = "block") -> None:
        """As MaskedViT's."""
        self.transformer.set_grad_checkpointing(enable, what)

    # -- inside ------------------------------------------------------------------------------------------------

    def _encode(self, video: Tensor, cut: Frames, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transformer(self._embedded(video, cut), cut.frames, cut.layout, rows)

    def _embedded(self, video: Tensor, cut: Frames) -> Tensor:
        x = self._embed(video, cut, video_grid(video, 3, 1, self.config.patch_size))
        return self.ln_pre(x, x.dtype)

    def _embed(self, video: Tensor, cut: Frames, grid: Grid) -> Tensor:
        """Tokens with positions, class tokens in their places: [T + S*F, D]."""
        positions = self._positions_of(grid)
        scale, shift = self._pixel_affine() if video.dtype == torch.uint8 else (None, None)
        ids, clip_idx = cut.views.keep_idx, cut.views.clip_idx
        with profiling.range("embed"):
            weight = self.conv1.weight.unsqueeze(2)
            where = ids % (grid[1] * grid[2])
            x = tube_embed(video, weight, None, positions, ids, clip_idx, pos_idx=where, scale=scale, shift=shift)
            first = (self.class_embedding + self.positional_embedding[0]).to(x.dtype)
            sequences, length = cut.frames.num_sequences, cut.frames.length
            if cut.place is None and length is not None:
                cells = x.unflatten(0, (sequences, length - 1))
                return torch.cat((first.expand(sequences, 1, -1), cells), 1).flatten(0, 1)
            assert cut.place is not None
            rows = x.new_zeros(cut.frames.num_tokens, x.shape[1]).index_copy(0, cut.place, x)
            return rows.index_copy(0, cut.frames.cu_seqlens[:-1].long(), first.expand(sequences, -1))

    def _positions_of(self, grid: Grid) -> Tensor:
        """Positions of the cells of a frame; of another size than the learned one, bicubically resized."""
        side, table = self.config.side, self.positional_embedding[1:]
        if grid[1:] == (side, side):
            return table
        image = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(image, size=grid[1:], mode="bicubic", align_corners=False)
        return resized.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


def cut_frames(views: Pack, grid: Grid, kept: int | None) -> Frames:
    """Cut views over an (F, h, w) grid into frames.   kept: cells every frame keeps, or None where they differ."""
    frames, cells = grid[0], grid[1] * grid[2]
    device, count = views.keep_idx.device, views.num_sequences * frames
    clip_of = views.clip_of.repeat_interleave(frames)
    where = views.keep_idx % cells
    if kept is not None:
        length = kept + 1
        starts = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)
        rows = F.pad(where.view(count, kept) + 1, (1, 0)).flatten()
        return Frames(views, Pack(rows, starts, clip_of, length, length), None)
    view = views.per_token(torch.arange(views.num_sequences, device=device))
    frame = view * frames + views.keep_idx // cells
    starts = torch.searchsorted(frame, torch.arange(count + 1, device=device))
    starts = (starts + torch.arange(count + 1, device=device)).to(torch.int32)
    place = torch.arange(views.num_tokens, device=device) + frame + 1
    rows = where.new_zeros(views.num_tokens + count).index_copy(0, place, where + 1)
    return Frames(views, Pack(rows, starts, clip_of, None, min(cells, views.max_length) + 1), place)


def _kept_in_each(removed: Tensor, same_cells: bool) -> int | None:
    """Cells each frame of a mask [S, F, h*w] keeps, None where they differ."""
    counts = removed.logical_not().sum(-1).flatten().tolist()
    if 0 in counts:
        view, frame = divmod(counts.index(0), removed.shape[1])
        raise ValueError(f"mask removes every cell of frame {frame}, view {view}; each frame must keep at least one")
    if same_cells and not torch.equal(removed, removed[:, :1].expand_as(removed)):
        raise ValueError(
            "mask must remove the same cells in every frame (tube_masks): the adapters run along time in each cell"
        )
    return counts[0] if len(set(counts)) == 1 else None


def _common_count(pack: Pack, grid: Grid) -> int | None:
    """Cells each frame of a Pack keeps, where they are equal and knowing it makes no device wait."""
    if pack.tubes and pack.length and pack.length % grid[0] == 0:
        return pack.length // grid[0]
    if torch.compiler.is_compiling() or pack.keep_idx.device.type != "cpu" or pack.length is None:
        return None
    if pack.length == 0 or pack.length % grid[0]:
        return None
    frame = pack.keep_idx.view(-1, grid[0], pack.length // grid[0]) // (grid[1] * grid[2])
    own = torch.arange(grid[0])[:, None]
    return pack.length // grid[0] if bool((frame == own).all()) else None
