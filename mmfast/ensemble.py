"""Ensemble masked inference: P masked views of every clip in one packed batch, probabilities averaged over the views.

    p(y | clip) = 1/P  sum_v  softmax(head(pool(encoder(clip under mask v))))        MM-CDFSL, ECCV 2024

Knows nothing of the model but the protocol below, so it sits under vit.py.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from mmfast_kernels.gather import gather_tubes, union_rows
from mmfast_kernels.pool import ensemble_probs

from . import profiling
from .config import ViTConfig
from .graphs import replay
from .masks import ClipIds, Grid, Pack, clip_id_tensor, kept_per_slot, pack_masks, sample_pack

CPU_TOKENS = 1024  # of one micro-batch: a block's activations then stay in the last-level cache
TILE = 128  # rows of a GEMM tile
L2 = "l2"  # a micro-batch by the size of the GPU's L2 cache
L2_SHARE = 7 / 8  # the rest is for weights


class Encoder(Protocol):
    """What ensemble needs of a model."""

    config: ViTConfig

    def parameters(self) -> Any: ...
    def check_video(self, video: Tensor) -> Grid: ...
    def embed(self, video: Tensor, pack: Pack) -> Tensor: ...
    def embed_rows(self, rows: Tensor, row_of: Tensor, keep_idx: Tensor, grid: Grid) -> Tensor: ...
    def logits(self, x: Tensor, pack: Pack, grid: Grid) -> Tensor: ...
    def check_masks(self, masks: Tensor, grid: Grid) -> None: ...


@torch.no_grad()
def ensemble(
    model: Encoder,
    video: Tensor,
    views: int,
    mask_ratio: float,
    keep: int | None,
    seed: int,
    clip_ids: ClipIds,
    masks: Tensor | None,
    micro_batch: int | str | None,
) -> Tensor:
    """MaskedViT.ensemble on any model that has the Encoder protocol.   Returns fp32 [B, K]."""
    grid = model.check_video(video)
    batch = video.shape[0]
    if model.config.num_classes == 0:
        raise ValueError("ensemble needs a classifier, and this model has num_classes=0; call reset_classifier first")
    if views < 1:
        raise ValueError(f"views must be at least 1, got {views}")
    if micro_batch is not None and micro_batch != L2 and (isinstance(micro_batch, str) or micro_batch < 1):
        raise ValueError(f'micro_batch must be at least 1, or "{L2}", got {micro_batch!r}')
    weight = next(iter(model.parameters()))
    device = weight.device
    from_host = video.device.type == "cpu" and device.type == "cuda"
    place = video.device if from_host else device
    if masks is not None:
        views = _views_of(masks, batch, grid)
        model.check_masks(masks, grid)
        masks = masks.to(place)
    ids = clip_id_tensor(clip_ids, batch, place)

    def pack_of(clips: slice) -> Pack:
        if masks is not None:
            return pack_masks(masks[clips])
        chosen = ids[clips]
        return sample_pack(len(chosen), views, grid, mask_ratio, keep=keep, seed=seed, clip_ids=chosen, device=place)

    def run(clips: slice) -> Tensor:
        pack = pack_of(clips)
        if from_host:
            pixels, row_of, pack = upload_kept(model.config, video[clips], pack, views, device)
        else:
            pixels, row_of = video[clips].to(device), None

        def forward(pixels: Tensor, row_of: Tensor | None, pack: Pack) -> Tensor:
            if row_of is None:
                x = model.embed(pixels, pack)
            else:
                x = model.embed_rows(pixels, row_of, pack.keep_idx, grid)
            return ensemble_probs(model.logits(x, pack, grid).unflatten(0, (-1, views)))

        return replay(model, forward, pixels, row_of, pack)

    tokens = views * (math.prod(grid) if masks is not None else grid[0] * kept_per_slot(grid, mask_ratio, keep))
    if isinstance(micro_batch, str):
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        size = micro_batch_size(tokens, device, token_bytes(model.config, dtype))
    else:
        size = micro_batch or micro_batch_size(tokens, device)
    parts = run_in_micro_batches(run, batch, size)
    return torch.cat(parts) if parts else torch.zeros(0, model.config.num_classes, device=device)


def run_in_micro_batches(run: Callable[[slice], Tensor], batch: int, size: int) -> list[Tensor]:
    """run(slice) over all clips, `size` at a time. Out of memory halves the size, says so once, and goes on."""
    parts, start, warned = [], 0, False
    while start < batch:
        try:
            with profiling.range("micro_batch"):
                parts.append(run(slice(start, min(start + size, batch))))
            start += size
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if size == 1 or not _is_out_of_memory(error):
                raise
            size = (size + 1) // 2
        else:
            continue
        # Out of the except block, so that the failed call's tensors are released before memory is asked for again.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not warned:
            warnings.warn(f"out of memory: ensemble goes on with micro-batches of {size} clips", stacklevel=3)
            warned = True
    return parts


def micro_batch_size(tokens_per_clip: int, device: torch.device, bytes_per_token: int | None = None) -> int:
    """Clips to run at once: on a GPU about two full waves of GEMM tiles, and of those sizes the one that wastes least.

    bytes_per_token: of activations, which are then to fit the GPU's L2 cache, whatever that leaves of the waves.
    """
    if device.type != "cuda":
        return max(1, CPU_TOKENS // tokens_per_clip)
    about = torch.cuda.get_device_properties(device)
    if bytes_per_token is None:
        return wave_aware_size(tokens_per_clip, about.multi_processor_count)
    tokens = int(about.L2_cache_size * L2_SHARE) // bytes_per_token
    return wave_aware_size(tokens_per_clip, about.multi_processor_count, tokens)


def token_bytes(config: ViTConfig, dtype: torch.dtype) -> int:
    """What a block holds of a token: the stream; queries, keys and values; the hidden layer."""
    return (4 * config.embed_dim + config.mlp_dim) * dtype.itemsize


def wave_aware_size(tokens_per_clip: int, processors: int, tokens: int | None = None) -> int:
    """The clips, near `tokens` or two waves of 128-row tiles over the multiprocessors, that leave the fewest of them idle."""
    most = max(1, (2 * processors * TILE if tokens is None else tokens) // tokens_per_clip)

    def busy(clips: int) -> float:
        tiles = math.ceil(clips * tokens_per_clip / TILE)
        return tiles / (math.ceil(tiles / processors) * processors)

    return max(range(max(1, most // 2), most + 1), key=lambda clips: (round(busy(clips), 2), clips))


def upload_kept(
    config: ViTConfig, video: Tensor, pack: Pack, views: int, device: torch.device
) -> tuple[Tensor, Tensor, Pack]:
    """Send only the pixels that some view keeps, from host memory to the GPU.

    The union of a clip's views is gathered into pinned memory and copied on a side stream, so that the copy of one
    micro-batch runs under the compute of the one before; torch's pinned allocator keeps a buffer until its copy is done.

    Returns rows [U, C, tt, p, p] of video's dtype, row_of int32 [T], and the pack, all on `device`.
    """
    tubelet, patch = config.tubelet_size, config.patch_size
    with profiling.range("gather"):
        union_idx, union_clip, row_of = union_rows(pack.keep_idx, pack.cu_seqlens, views)
        rows = gather_tubes(video, union_idx, union_clip, tubelet, patch, pin=True)
        rows = rows.view(-1, config.in_chans, tubelet, patch, patch)
        row_of = row_of.pin_memory()
    compute = torch.cuda.current_stream(device)
    copy = _copy_stream(device)
    with profiling.range("upload"), torch.cuda.stream(copy):
        on_device = [t.to(device, non_blocking=True) for t in (rows, row_of)]
        moved = pack.pin_memory().to(device)
    compute.wait_stream(copy)
    for t in (*on_device, moved.keep_idx, moved.cu_seqlens, moved.clip_of):
        t.record_stream(compute)
    return on_device[0], on_device[1], moved


_copy_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)
    return _copy_streams[device]


def _views_of(masks: Tensor, batch: int, grid: Grid) -> int:
    tokens = math.prod(grid)
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        raise TypeError(
            f"masks must be a bool tensor (True = removed), got {getattr(masks, 'dtype', type(masks).__name__)}"
        )
    if masks.dim() != 3 or masks.shape[0] != batch or masks.shape[2] != tokens or masks.shape[1] < 1:
        raise ValueError(f"masks must be [{batch}, P, {tokens}], got {tuple(masks.shape)}")
    return masks.shape[1]


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
