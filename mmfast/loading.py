"""Clips of a collection, decoded ahead of the model, in batches of one shape; those that cannot be used come with a reason."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .config import ViTConfig
from .masks import Grid, Pack
from .shards import Label


class Encoder(Protocol):
    """What extract and predict need of a model: MaskedViT has it."""

    config: ViTConfig

    def check_video(self, video: Tensor) -> Grid: ...
    def encode(self, video: Tensor, mask: Pack) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Tensor]: ...


class Clips(Protocol):
    """A collection: item i is a dict with the pixels [C, F, H, W] of each modality.

    Its `records` (ClipRecord), if it has them, give clip ids, names and labels before anything is decoded; without them
    clip i has id i.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, place: int, /) -> Any: ...


def describe(dataset: Clips) -> tuple[list[int], list[str], list[Label]]:
    """Clip ids, names and labels (a class by name where it has one) of a collection, in its order."""
    records = getattr(dataset, "records", None)
    if records is None:
        return list(range(len(dataset))), [f"clip {i}" for i in range(len(dataset))], [None] * len(dataset)
    labels = [r.label if r.label_name is None else r.label_name for r in records]
    return [r.clip_id for r in records], [r.name for r in records], labels


def loaded_batches(
    model: Encoder,
    dataset: Clips,
    todo: Sequence[int],
    ids: Sequence[int],
    modality: str,
    workers: int,
    batch: int,
) -> Iterator[tuple[list[int], Tensor | str]]:
    """(places, their clips [B, C, F, H, W]) of clips of one shape; ([place], reason) of one that cannot be used."""
    for group in _batches(_loaded(dataset, todo, modality, ids, workers, batch), batch):
        alike: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for place, clip in group:
            fault = clip if isinstance(clip, str) else _misfit(model, clip)
            if isinstance(clip, str) or fault:
                yield [place], str(fault)
            else:
                alike.setdefault(tuple(clip.shape), []).append((place, clip))
        for members in alike.values():
            yield [place for place, _ in members], _stacked([clip for _, clip in members])


def _loaded(
    dataset: Clips, todo: Sequence[int], modality: str, ids: Sequence[int], workers: int, batch: int
) -> Iterator[tuple[int, Tensor | str]]:
    """(place, pixels or why there are none) in order; at most `workers` and a batch of clips ahead of the one in use."""

    def load(place: int) -> Any:
        try:
            item = dataset[place]
        except (ValueError, OSError, EOFError, RuntimeError) as error:
            return f"{getattr(error, 'reason', None) or error or type(error).__name__}"
        return "cannot be read" if item is None else item

    def pixels(place: int, item: Any) -> Tensor | str:
        if isinstance(item, str):
            return item
        if "skipped" in item:  # a ClipDataset with on_broken="skip" keeps the reason to itself
            return "cannot be read; the dataset skipped it"
        if modality not in item:
            raise ValueError(f"the dataset's items have no {modality!r}; they have {', '.join(map(str, item))}")
        if int(item.get("clip_id", ids[place])) != ids[place]:
            raise ValueError(f"item {place} of the dataset has clip id {int(item['clip_id'])}, expected {ids[place]}")
        return item[modality]

    if not workers:
        yield from ((place, pixels(place, load(place))) for place in todo)
        return
    ahead: deque[tuple[int, Future[Any]]] = deque()
    left = iter(todo)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="mmfast-load")
    try:
        while True:
            while len(ahead) < workers + batch and (place := next(left, None)) is not None:
                ahead.append((place, pool.submit(load, place)))
            if not ahead:
                return
            place, future = ahead.popleft()
            yield place, pixels(place, future.result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(items: Iterator[tuple[int, Tensor | str]], size: int) -> Iterator[list[tuple[int, Tensor | str]]]:
    group: list[tuple[int, Tensor | str]] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _stacked(clips: list[Tensor]) -> Tensor:
    """torch.stack that keeps the order in memory: a decoder's [F, H, W, C] buffers are copied as they lie."""
    order = sorted(range(clips[0].dim()), key=clips[0].stride, reverse=True)
    back = [1 + order.index(dim) for dim in range(len(order))]
    return torch.stack([clip.permute(order) for clip in clips]).permute(0, *back)


def _misfit(model: Encoder, clip: Tensor) -> str | None:
    """Why the model cannot take this clip. One of another number of channels is no fault of the clip: ValueError."""
    if clip.dim() == 4 and clip.shape[0] != model.config.in_chans:
        raise ValueError(f"the clips have {clip.shape[0]} channels, this model takes {model.config.in_chans}")
    try:
        model.check_video(clip[None])
    except (TypeError, ValueError) as error:
        return str(error)
    return None
