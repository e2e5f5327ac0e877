"""Masks at the door, packs inside.

A mask is bool and True means removed, the field's meaning (VideoMAE, MM-CDFSL, Hugging Face). The engine works on a Pack:
the ids of the tokens that stay, of all views of all clips, end to end. The conversion happens here and nowhere else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast_kernels.kept import kept_ids
from mmfast_kernels.sampling import sample_keep

Grid = tuple[int, int, int]
ClipIds = Sequence[int] | Tensor | None
Device = torch.device | str


@dataclass(frozen=True)
class Pack:
    """All views of all clips, end to end: S sequences, T tokens.

    keep_idx: int32 [T], token ids over the clip's own grid, ascending within a sequence.
    cu_seqlens: int32 [S+1], where each sequence starts and ends.
    clip_of: int32 [S], the clip a sequence is a view of.
    length: tokens of every sequence when all are equal (the dense fast path), else None.
    max_length: an upper bound of the sequence lengths.
    tubes: whether every sequence is known to keep the same cells in all slots, as those of sample_pack do.
    """

    keep_idx: Tensor
    cu_seqlens: Tensor
    clip_of: Tensor
    length: int | None
    max_length: int
    tubes: bool = False

    @property
    def num_sequences(self) -> int:
        return self.clip_of.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.keep_idx.shape[0]

    @property
    def clip_idx(self) -> Tensor:
        """int32 [T]: the clip of every token."""
        return self.per_token(self.clip_of)

    def per_token(self, values: Tensor) -> Tensor:
        """Repeat a value of each sequence, [S, ...], for each of its tokens: [T, ...]. Never waits for the device."""
        if self.length is not None:
            return values.repeat_interleave(self.length, 0)
        lengths = self.cu_seqlens.diff()
        return torch.repeat_interleave(values, lengths, 0, output_size=self.num_tokens)

    def to(self, device: Device) -> "Pack":
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> "Pack":
        return self._map(lambda t: t.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Pack":
        moved = move(self.keep_idx), move(self.cu_seqlens), move(self.clip_of)
        return Pack(*moved, self.length, self.max_length, self.tubes)


torch.export.register_dataclass(Pack, serialized_type_name="mmfast.Pack")


def kept_per_slot(grid: Grid, mask_ratio: float, keep: int | None = None) -> int:
    """Cells of one slot that stay: `keep` if given, else h*w - int(mask_ratio*h*w) as VideoMAE counts."""
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"grid must be three positive sizes (t, h, w), got {tuple(grid)}")
    cells = grid[1] * grid[2]
    if keep is not None:
        if not 1 <= keep <= cells:
            raise ValueError(f"keep must lie in 1..{cells} (the cells of a {grid[1]} x {grid[2]} grid), got {keep}")
        return keep
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must lie in [0, 1), got {mask_ratio}")
    return cells - int(mask_ratio * cells)


def tube_masks(
    batch: int,
    views: int = 2,
    grid: Grid = (8, 14, 14),
    mask_ratio: float = 0.75,
    *,
    keep: int | None = None,
    seed: int = 0,
    clip_ids: ClipIds = None,
    device: Device = "cpu",
) -> Tensor:
    """Random tube masks: the same int(mask_ratio*h*w) cells removed in every slot (VideoMAE, arXiv 2203.12602, 3.2).

    keep: exact number of cells that stay in a slot, instead of mask_ratio. seed: 0 <= seed < 2**64.
    clip_ids: int64 [batch], default 0..batch-1. Each mask is a pure function of (seed, clip id, view): the same bits on
    CPU and GPU, whatever else is in the batch.

    Returns bool [batch, views, N], True = removed, N = t*h*w.
    """
    return _sample_masks(batch, views, grid, mask_ratio, keep, seed, clip_ids, device, per_slot=False)


def random_masks(
    batch: int,
    views: int = 2,
    grid: Grid = (8, 14, 14),
    mask_ratio: float = 0.75,
    *,
    keep: int | None = None,
    seed: int = 0,
    clip_ids: ClipIds = None,
    device: Device = "cpu",
) -> Tensor:
    """As tube_masks, but each slot is masked on its own (the same number of cells in each)."""
    return _sample_masks(batch, views, grid, mask_ratio, keep, seed, clip_ids, device, per_slot=True)


def running_cell_masks(
    batch: int,
    views: int = 1,
    grid: Grid = (8, 14, 14),
    mask_ratio: float = 0.5,
    *,
    seed: int = 0,
    clip_ids: ClipIds = None,
    device: Device = "cpu",
) -> Tensor:
    """The decoder's masks of VideoMAE v2 (arXiv 2303.16727, 3.2): of every 2 x 2 cell int(4*mask_ratio) tokens are left out.

    Which ones moves on around the cell with every slot, from a random start, so that all of the clip is covered evenly.
    Arguments as in tube_masks. Returns bool [batch, views, N], True = not decoded.
    """
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"grid must be three positive sizes (t, h, w), got {tuple(grid)}")
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must lie in [0, 1), got {mask_ratio}")
    start = _sample_masks(batch, views, (1, 2, 2), mask_ratio, None, seed, clip_ids, device, per_slot=False)
    slot, row, column = (torch.arange(n, device=start.device) for n in grid)
    around = torch.tensor([[0, 1], [3, 2]], device=start.device)[row % 2][:, column % 2]
    place = (around - slot[:, None, None]) % 4
    return start[:, :, place.flatten()]


def sample_pack(
    batch: int,
    views: int,
    grid: Grid,
    mask_ratio: float = 0.75,
    *,
    keep: int | None = None,
    seed: int = 0,
    clip_ids: ClipIds = None,
    device: Device = "cpu",
    per_slot: bool = False,
) -> Pack:
    """The pack of tube_masks (or random_masks, per_slot=True), straight from its parameters: nothing waits for the device."""
    keep_idx = _sample_keep(batch, views, grid, mask_ratio, keep, seed, clip_ids, device, per_slot)
    return dense_pack(keep_idx, tubes=not per_slot)


def dense_pack(keep_idx: Tensor, tubes: bool = False) -> Pack:
    """Pack of equally long views.   keep_idx: int [B, P, n], ascending.   tubes: as in Pack."""
    batch, views, length = keep_idx.shape
    device = keep_idx.device
    return Pack(
        keep_idx.reshape(-1).to(torch.int32),
        torch.arange(0, batch * views * length + 1, max(length, 1), dtype=torch.int32, device=device)[
            : batch * views + 1
        ],
        torch.arange(batch, dtype=torch.int32, device=device).repeat_interleave(views),
        length,
        length,
        tubes,
    )


def full_pack(batch: int, num_tokens: int, device: Device = "cpu") -> Pack:
    """Pack with nothing removed: one view a clip."""
    ids = torch.arange(num_tokens, dtype=torch.int32, device=device)
    return dense_pack(ids.expand(batch, 1, num_tokens), tubes=True)


def pack_masks(mask: Tensor) -> Pack:
    """Pack of given masks.   mask: bool [B, N] or [B, P, N], True = removed; views may keep different numbers of tokens.

    Reads the counts back from the device, so on a GPU it waits once; sample_pack does not. While torch.compile traces
    there are no counts: the pack then has no common length, and an empty view is not refused.
    """
    views = mask if mask.dim() == 3 else mask[:, None]
    batch, num_views, num_tokens = views.shape
    counts = views.logical_not().sum(-1).flatten()
    cu_seqlens = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32)
    clip_of = torch.arange(batch, dtype=torch.int32, device=mask.device).repeat_interleave(num_views)
    if torch.compiler.is_compiling():
        return Pack(kept_ids(views), cu_seqlens, clip_of, None, num_tokens)
    lengths = counts.tolist()
    if 0 in lengths:
        clip, view = divmod(lengths.index(0), num_views)
        raise ValueError(f"mask removes every token of clip {clip}, view {view}; each view must keep at least one")
    longest = max(lengths, default=1)
    return Pack(kept_ids(views), cu_seqlens, clip_of, longest if len(set(lengths)) <= 1 else None, longest)


def join_packs(packs: Sequence[Pack], batches: Sequence[int]) -> Pack:
    """Put packs of several groups of clips end to end.   batches: clips of each group; they are numbered through."""
    lengths = {p.length for p in packs if p.num_sequences}
    ends, clips, token, clip = [packs[0].cu_seqlens[:1]], [], 0, 0
    for pack, batch in zip(packs, batches, strict=True):
        ends.append(pack.cu_seqlens[1:] + token)
        clips.append(pack.clip_of + clip)
        token += pack.num_tokens
        clip += batch
    return Pack(
        torch.cat([p.keep_idx for p in packs]),
        torch.cat(ends),
        torch.cat(clips),
        lengths.pop() if len(lengths) == 1 else None,
        max(p.max_length for p in packs),
        all(p.tubes for p in packs),
    )


def video_grid(video: Tensor, in_chans: int, tubelet: int, patch: int) -> Grid:
    """The token grid of a video [B, in_chans, F, H, W], or an error that says what is wrong with it."""
    if not isinstance(video, Tensor):
        raise TypeError(f"video must be a tensor [B, C, F, H, W], got {type(video).__name__}")
    if video.dim() != 5:
        raise ValueError(f"video must be [B, C, F, H, W], got shape {tuple(video.shape)}")
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise TypeError(f"video must be uint8 (raw) or floating point (normalised), got {video.dtype}")
    _, channels, frames, height, width = video.shape
    if channels != in_chans:
        raise ValueError(f"video has {channels} channels in shape {tuple(video.shape)}; this model takes {in_chans}")
    if frames == 0 or frames % tubelet:
        raise ValueError(f"video has {frames} frames; they must be a positive multiple of the tubelet size {tubelet}")
    if min(height, width) == 0 or height % patch or width % patch:
        raise ValueError(f"video is {height} x {width}; both must be positive multiples of the patch size {patch}")
    return frames // tubelet, height // patch, width // patch


def check_mask(mask: Tensor, batch: int, tokens: int, grid: Grid, name: str = "mask") -> None:
    """Raise unless mask is bool [batch, tokens] or [batch, P, tokens]."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor (True = removed) or a Pack, got {got}")
    if mask.dim() not in (2, 3) or mask.shape[0] != batch or mask.shape[-1] != tokens:
        raise ValueError(
            f"{name} must be [{batch}, {tokens}] or [{batch}, P, {tokens}] for a {grid[0]} x {grid[1]} x {grid[2]} grid, "
            f"got {tuple(mask.shape)}"
        )


def check_tubes(mask: Tensor, grid: Grid, name: str = "mask") -> None:
    """Raise unless mask [.., N] removes the same cells in every slot. Waits for the device that the mask is on."""
    slots = mask.reshape(-1, grid[0], grid[1] * grid[2])
    if not torch.equal(slots, slots[:, :1].expand_as(slots)):
        raise ValueError(
            f"{name} must remove the same cells in all {grid[0]} slots (tube_masks): the adapters run along time in each cell"
        )


def _sample_keep(
    batch: int,
    views: int,
    grid: Grid,
    mask_ratio: float,
    keep: int | None,
    seed: int,
    clip_ids: ClipIds,
    device: Device,
    per_slot: bool,
) -> Tensor:
    if batch < 0 or views < 1:
        raise ValueError(f"batch must be at least 0 and views at least 1, got {batch} and {views}")
    kept = kept_per_slot(grid, mask_ratio, keep)
    return sample_keep(clip_id_tensor(clip_ids, batch, device), views, grid, kept, seed, per_slot)


def clip_id_tensor(clip_ids: ClipIds, batch: int, device: Device) -> Tensor:
    """int64 [batch]: the ids given, or 0..batch-1."""
    if clip_ids is None:
        return torch.arange(batch, device=device)
    ids = torch.as_tensor(clip_ids)
    if ids.shape != (batch,) or ids.is_floating_point():
        raise ValueError(f"clip_ids must be {batch} integers, one a clip, got {ids.dtype} {tuple(ids.shape)}")
    return ids.to(device=device, dtype=torch.int64, non_blocking=True)


def _sample_masks(
    batch: int,
    views: int,
    grid: Grid,
    mask_ratio: float,
    keep: int | None,
    seed: int,
    clip_ids: ClipIds,
    device: Device,
    per_slot: bool,
) -> Tensor:
    keep_idx = _sample_keep(batch, views, grid, mask_ratio, keep, seed, clip_ids, device, per_slot)
    mask = torch.ones(batch, views, grid[0] * grid[1] * grid[2], dtype=torch.bool, device=keep_idx.device)
    return mask.scatter_(2, keep_idx.long(), False)
