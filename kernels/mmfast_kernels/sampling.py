"""Mask sampling: which tokens each view of a clip keeps.

    key(clip, view, slot, cell) = word cell % 4 of philox4x32_10(
        counter = (cell / 4, view | field << 16, low half of clip, high half), key = (low half of seed, high half))
    field = 0 for a tube mask (one draw, the same cells in every slot), slot + 1 where each slot draws on its own

In every slot the `keep` cells with the smallest (key, cell) stay. The result is a pure function of seed, clip id and
view: the same bits on CPU and GPU, whatever else is in the batch. CPU and CUDA routines in csrc/sampler.cpp and
csrc/cuda/sampler.cu; the reference restates them on int64 tensors, for any device.
"""

import torch
from torch import Tensor

from mmfast_kernels.dispatch import register
from mmfast_kernels.native import _C, address, check_ids, on_native_cuda, stream, threads

_WORD = 0xFFFFFFFF
_ROUNDS = 10


def _sample(
    clip_ids: Tensor, views: int, grid: list[int], keep: int, seed: int, per_slot: bool
) -> Tensor:  # [B, P, t*keep] int32
    slots, cells = grid[0], grid[1] * grid[2]
    cuda = on_native_cuda(clip_ids) and cells <= _C.max_cuda_cells
    if not cuda and clip_ids.device.type != "cpu":
        return sample_keep_ref(clip_ids, views, (grid[0], grid[1], grid[2]), keep, seed, per_slot)
    clip_ids = clip_ids.contiguous()
    batch = clip_ids.shape[0]
    out = torch.empty((batch, views, slots * keep), dtype=torch.int32, device=clip_ids.device)
    draw = (address(clip_ids), batch, views, slots, cells, keep, seed % 2**64, per_slot, address(out))
    if cuda:
        with torch.cuda.device(clip_ids.device):
            _C.sample_keep_cuda(*draw, stream(clip_ids.device))
    else:
        _C.sample_keep(*draw, threads())
    return out


def _sample_fake(clip_ids: Tensor, views: int, grid: list[int], keep: int, seed: int, per_slot: bool) -> Tensor:
    return clip_ids.new_empty((clip_ids.shape[0], views, grid[0] * keep), dtype=torch.int32)


# seed is symbolic, so that a compiled caller is not compiled again for every seed.
_sample_op = register(
    "sample_keep(Tensor clip_ids, int views, int[] grid, int keep, SymInt seed, bool per_slot) -> Tensor",
    _sample,
    _sample_fake,
)


def sample_keep(
    clip_ids: Tensor, views: int, grid: tuple[int, int, int], keep: int, seed: int, per_slot: bool = False
) -> Tensor:
    """Draws `views` masks for every clip and returns the ids of the tokens that stay, ascending, on the clips' device.

    clip_ids: [B] int64, any values.  views: P, 0..65535.  grid: (t, h, w), t below 65535.  keep: cells kept in each
    slot, 0..h*w.  seed: 0..2^64-1.  per_slot: False for tube masks, True for a draw of its own in every slot.
    Returns [B, P, t*keep] int32.  Raises ValueError, TypeError on anything else.
    """
    check_ids("clip_ids", clip_ids, torch.int64)
    if len(grid) != 3 or min(grid) < 1 or grid[0] >= 65535 or grid[0] * grid[1] * grid[2] >= 2**31:
        raise ValueError(f"grid: got {tuple(grid)}, takes (t, h, w), each at least 1, t below 65535, t*h*w below 2^31")
    if not 0 <= views < 65536:
        raise ValueError(f"views: got {views}, takes 0..65535")
    if not 0 <= keep <= grid[1] * grid[2]:
        raise ValueError(f"keep: got {keep}, takes 0..{grid[1] * grid[2]} (cells of the grid {tuple(grid)})")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: got {seed}, takes 0..2^64-1")
    signed = seed - 2**64 if seed >= 2**63 else seed
    return _sample_op(clip_ids, views, list(grid), keep, signed, per_slot)


def philox4x32_10(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox 4x32 with 10 rounds on int64 tensors of 32-bit words, which broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Wraps modulo 2^64, as the unsigned product does; the arithmetic shift is undone by the mask.
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32 & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            (product0 >> 32 & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def sample_keep_ref(
    clip_ids: Tensor, views: int, grid: tuple[int, int, int], keep: int, seed: int, per_slot: bool = False
) -> Tensor:
    """`sample_keep` in plain torch; seed may also be negative, standing for seed + 2^64."""
    slots, cells = grid[0], grid[1] * grid[2]
    draws = slots if per_slot else 1

    def count(n: int) -> Tensor:
        return torch.arange(n, dtype=torch.int64, device=clip_ids.device)

    field = count(draws) + 1 if per_slot else count(1)
    clip = clip_ids.view(-1, 1, 1, 1)
    place = count(views).view(-1, 1, 1) | field.view(-1, 1) << 16
    counter = (count((cells + 3) // 4), place, clip & _WORD, clip >> 32 & _WORD)
    words = philox4x32_10(counter, (seed & _WORD, seed >> 32 & _WORD))  # 4 x [B, P, draws, ceil(cells / 4)]
    keys = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., :cells]
    # Key and cell in one word below 2^63: distinct, so that the order is the same everywhere.
    cell = torch.sort(keys << 31 | count(cells)).indices[..., :keep].sort().values
    ids = cell + (count(slots) * cells).view(-1, 1)  # [B, P, slots, keep]
    return ids.flatten(-2).to(torch.int32)
