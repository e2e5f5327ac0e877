"""Features of a frozen EVL backbone on the disk, so that its decoder trains on fixed clips without ever running it again.

    out.l [F, L, D], q.l and k.l [F, n, H, d] of each of the last blocks, cells [n] where a mask removes the others

A row a clip, in shards as `extract` writes them: taken up again where a run was killed, shared out over ranks, checked when
read. They are of the backbone alone: whatever the decoder has learnt since, they fit.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from .clip_config import CLIPConfig
from .ensemble import micro_batch_size, run_in_micro_batches
from .evl import EVL
from .evl_config import EVLConfig
from .evl_decoder import LayerFeatures
from .extract import PRECISIONS, STORED, Report, autocast, one_of, run_sharded, state_fingerprint
from .loading import Clips, describe, loaded_batches
from .masks import Grid, kept_per_slot, sample_pack
from .shards import Label, ShardReader, differences, read_indexes
from .stored import StoredClips

WHAT = "evl features"
_BESIDE = 8192  # bytes a clip, at most, of headers and index beside its features
_GIB = 2**30


def cache_features(
    model: EVL,
    dataset: Clips,
    folder: str | os.PathLike[str],
    *,
    mask_ratio: float = 0.0,
    seed: int = 0,
    dtype: str = "bfloat16",
    max_gib: float | None = None,
    modality: str = "rgb",
    precision: str = "fp32",
    shard_bytes: int = 2**28,
    batch: int = 8,
    workers: int = 0,
    rank: int | None = None,
    world: int | None = None,
    retry: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Run the backbone over every clip of `dataset` once, into `folder`, where FeatureCache reads what the decoder takes.

    mask_ratio, seed: of a tube mask drawn by (seed, clip id); 0 removes nothing. dtype: what the features are stored in.
    max_gib: of the folder at the end. shard_bytes: of a file, or one clip; memory holds three of these and two batches.
    Other options as in extract.extract. All clips must have the first one's frames and grid; another is skipped and reported.

    Raises ValueError for arguments out of range, a backbone that trains, a first clip that the model cannot take, a folder
    of another run, and, before anything is written, for a cache above max_gib or above what the disk has free.
    """
    one_of("dtype", dtype, STORED)
    amp = one_of("precision", precision, PRECISIONS)
    kept_per_slot((1, *model.config.grid), mask_ratio)
    if not model.frozen:
        raise ValueError(
            "model must have a frozen backbone: the features of one that trains are soon no longer its own"
        )
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    if max_gib is not None and not max_gib > 0:
        raise ValueError(f"max_gib must be above 0, got {max_gib}")
    there = ShardReader(folder) if read_indexes(folder) else None
    ids = describe(dataset)[0]
    todo = [p for p, i in enumerate(ids) if there is None or not (i in there or (i in there.failed and not retry))]
    grid = _first_grid(model, dataset, todo, ids, modality)
    if grid is None:  # nothing to do, or nothing that can be read
        stored = None if there is None else there.settings.get("grid")
        grid = _grid(stored or (model.config.num_frames, *model.config.grid))
    shapes = _shapes(model.config, grid, mask_ratio)
    size = {name: _bytes(shapes, of) for name, of in STORED.items()}
    if todo:
        whole = len(set(ids).union([] if there is None else there.ids))
        _check_space(Path(folder), dtype, size, whole, len(todo), max_gib)
    device = model.decoder.cls_token.device

    @torch.no_grad()
    def compute(clip_ids: Tensor, video: Tensor) -> dict[str, Tensor]:
        found = _empty(shapes, len(clip_ids), STORED[dtype], device)

        def run(part: slice) -> Tensor:
            chosen, pack = clip_ids[part], None
            if mask_ratio:
                pack = sample_pack(len(chosen), 1, grid, mask_ratio, seed=seed, clip_ids=chosen, device=device)
            with autocast(device, amp):
                for i, seen in enumerate(model.stream(video[part].to(device, non_blocking=True), pack)):
                    for name, tensor in _named(i, seen).items():
                        found[name][part] = tensor
            return chosen

        tokens = grid[0] * kept_per_slot(grid, mask_ratio)
        run_in_micro_batches(run, len(clip_ids), micro_batch_size(tokens, device))
        # The one of the three that is too narrow for what a backbone may give; the others have fp32's range.
        if dtype == "float16" and any(not bool(t.isfinite().all()) for n, t in found.items() if n != "cells"):
            raise ValueError(f"dtype float16 cannot hold the features of clips {clip_ids.tolist()}; bfloat16 can")
        return found

    settings = {
        "what": WHAT,
        **_of_backbone(model),
        "num_layers": model.config.num_layers,
        "temporal_cross_attention": model.config.temporal_cross_attention,
        "grid": list(grid),
        "mask_ratio": mask_ratio,
        "mask_seed": seed if mask_ratio else None,
        "modality": modality,
        "precision": precision,
        "dtype": dtype,
        "about": dict(about or {}),
    }
    door: Any = _Door(model, grid)
    training = model.training
    model.eval()
    try:
        report = run_sharded(
            compute, door, dataset, folder, "evl", settings, modality=modality,
            shard_size=max(1, shard_bytes // size[dtype]), batch=batch, workers=workers, rank=rank, world=world,
            retry=retry, progress=progress,
        )  # fmt: skip
    finally:
        model.train(training)
    # Their clips are done anew elsewhere, and nobody reads them: the folder must not grow with every fault.
    for index in read_indexes(folder).values():
        for file in index.damaged:
            (Path(folder) / file).unlink(missing_ok=True)
    return report


class FeatureCache(StoredClips):
    """What cache_features has put into a folder, by any number of ranks in any number of runs, for a model's decoder.

    A decoder that reads fewer of the last blocks, or no queries and keys, reads its part. mask_ratio, seed, precision, dtype,
    about: what the cache must have been made with; None for whatever it was. A shard that is cut short, corrupt or gone is
    found when it is read, and named; cache_features into the same folder does its clips again, and those alone.

    Raises ValueError for a folder without features, and for features of another backbone, of too few layers, of frames or a
    grid that the decoder does not take, or made otherwise, by name.
    """

    what = WHAT

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: EVL,
        *,
        mask_ratio: float | None = None,
        seed: int | None = None,
        precision: str | None = None,
        dtype: str | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(folder)
        if self.settings["mask_ratio"] == 0:
            seed = None  # of no mask
        asked = {"mask_ratio": mask_ratio, "mask_seed": seed, "precision": precision, "dtype": dtype, "about": about}
        ours = _of_backbone(model) | {name: value for name, value in asked.items() if value is not None}
        config = model.config
        if config.num_layers > self.settings["num_layers"]:
            ours["num_layers"] = config.num_layers
        if config.temporal_cross_attention:
            ours["temporal_cross_attention"] = True
        ours = json.loads(json.dumps(ours))
        if differ := differences({name: self.settings[name] for name in ours}, ours):
            raise ValueError(
                f"{folder}: is a cache made with other settings: {'; '.join(differ)}. Make one for this model."
            )
        self.grid = _grid(self.settings["grid"])
        try:
            model._check_grid(self.grid)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        self.dtype = STORED[self.settings["dtype"]]
        first = self.settings["num_layers"] - config.num_layers
        self._layers = range(first, first + config.num_layers)
        self._shapes = _shapes(config, self.grid, self.settings["mask_ratio"], first)

    @property
    def clip_bytes(self) -> int:
        """Bytes that `features` reads of a clip."""
        return _bytes(self._shapes, self.dtype)

    def features(
        self, ids: Sequence[int] | Tensor, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> list[LayerFeatures]:
        """What `model.stream` gives of the clips asked for, in that order; `model.decode` takes it.

        dtype: of the features; as stored when None, which the decoder takes whatever its own is. ValueError for a clip that
        is not there, and for a damaged shard.
        """
        chosen = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        found = _empty(self._shapes, len(chosen), dtype or self.dtype, "cpu")
        self._reader.fill(found, chosen)
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in found.items()}
        cells = moved.get("cells")
        return [LayerFeatures(moved[f"out.{i}"], moved.get(f"q.{i}"), moved.get(f"k.{i}"), cells) for i in self._layers]

    def share_checks(self) -> None:
        """As ShardReader's: processes started from here on check a shard once between them."""
        self._reader.share_checks()


class CachedClips(Dataset[dict[str, Any]]):
    """The clips of a cache to train on: items {"clip_id": int, "label": int, "features": list[LayerFeatures] of one view}.

    ids: which clips, in which order; all of them when None. labels: their class numbers, in that order; the cache's own when
    None, -1 where a clip has none. dtype: as FeatureCache.features takes it. A loader takes `collate_features`, and reads in
    as many worker processes as it likes. Raises ValueError for a clip that is not there, and for classes that are names.
    """

    def __init__(
        self,
        cache: FeatureCache,
        ids: Sequence[int] | None = None,
        labels: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.cache, self.dtype = cache, dtype
        self.ids = cache.ids if ids is None else list(ids)
        for clip_id in self.ids:
            if clip_id not in cache:
                cache.features([clip_id])  # says why it is not there
        if labels is None:
            own = dict(zip(cache.ids, cache.labels, strict=True))
            self.labels = [_number(clip_id, own[clip_id]) for clip_id in self.ids]
        elif len(labels) != len(self.ids):
            raise ValueError(f"labels must be one a clip, {len(self.ids)} in all, got {len(labels)}")
        else:
            self.labels = list(labels)
        cache.share_checks()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> dict[str, Any]:
        features = self.cache.features([self.ids[place]], dtype=self.dtype)
        one = [LayerFeatures._make(None if t is None else t[0] for t in layer) for layer in features]
        return {"clip_id": self.ids[place], "label": self.labels[place], "features": one}


def collate_features(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Items of CachedClips to one batch: int64 clip_id and label [B], features as `EVL.decode` takes them."""
    layers = []
    for of_layer in zip(*(item["features"] for item in items), strict=True):
        fields = ((None if given[0] is None else default_collate(list(given))) for given in zip(*of_layer, strict=True))
        layers.append(LayerFeatures._make(fields))
    numbers = {name: torch.tensor([item[name] for item in items]) for name in ("clip_id", "label")}
    return {**numbers, "features": layers}


# -- inside ------------------------------------------------------------------------------------------------------------


class _Door:
    """What loading asks of a model. Without a grid every clip may pass."""

    def __init__(self, model: EVL, grid: Grid | None) -> None:
        backbone = model.config.backbone
        self.model, self.grid = model, grid
        self.config = SimpleNamespace(in_chans=3 if isinstance(backbone, CLIPConfig) else backbone.in_chans)

    def check_video(self, video: Tensor) -> None:
        if self.grid is not None and (grid := self.model.check_video(video)) != self.grid:
            raise ValueError(f"is of {_by(grid)} cells, the clips of the cache are of {_by(self.grid)}")


def _first_grid(model: EVL, dataset: Clips, todo: Sequence[int], ids: Sequence[int], modality: str) -> Grid | None:
    """The grid of the first clip that can be read, or None. ValueError if the model cannot take it."""
    door: Any = _Door(model, None)
    for _, clip in loaded_batches(door, dataset, todo, ids, modality, 0, 1):
        if isinstance(clip, Tensor):
            grid = model.check_video(clip)
            model._check_grid(grid)
            return grid
    return None


def _grid(sizes: Sequence[int]) -> Grid:
    t, h, w = sizes
    return t, h, w


def _by(grid: Grid) -> str:
    return " x ".join(map(str, grid))


def _of_backbone(model: EVL) -> dict[str, Any]:
    """Settings that fix the backbone, and nothing of what the decoder learns."""
    return {
        "weights": state_fingerprint(model.backbone.state_dict()),
        "backbone": model.config.to_dict()["backbone"],
        "backbone_dtype": str(next(model.backbone.parameters()).dtype).removeprefix("torch."),
    }


def _named(layer: int, seen: LayerFeatures) -> dict[str, Tensor]:
    given = {f"out.{layer}": seen.out, f"q.{layer}": seen.q, f"k.{layer}": seen.k, "cells": seen.cells}
    return {name: tensor for name, tensor in given.items() if tensor is not None}


def _shapes(config: EVLConfig, grid: Grid, mask_ratio: float, first: int = 0) -> dict[str, tuple[int, ...]]:
    """By name, the shape of everything that is stored of a clip and that a decoder of this config reads."""
    backbone = config.backbone
    is_clip = isinstance(backbone, CLIPConfig)
    heads = backbone.vision_num_heads if isinstance(backbone, CLIPConfig) else backbone.num_heads
    kept = kept_per_slot(grid, mask_ratio)
    shapes: dict[str, tuple[int, ...]] = {"cells": (kept,)} if mask_ratio else {}
    for layer in range(first, first + config.num_layers):
        shapes[f"out.{layer}"] = (grid[0], is_clip + kept, config.width)
        if config.temporal_cross_attention:
            shapes[f"q.{layer}"] = shapes[f"k.{layer}"] = (grid[0], kept, heads, config.width // heads)
    return shapes


def _empty(
    shapes: Mapping[str, tuple[int, ...]], count: int, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Room for the rows of so many clips."""
    return {
        name: torch.empty(count, *shape, dtype=torch.int32 if name == "cells" else dtype, device=device)
        for name, shape in shapes.items()
    }


def _bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of a clip."""
    return sum(t.nbytes for t in _empty(shapes, 1, dtype, "meta").values())


def _check_space(
    folder: Path, dtype: str, size: Mapping[str, int], whole: int, left: int, max_gib: float | None
) -> None:
    """Raise where the cache of `whole` clips, of which `left` are not written yet, would be too large.   size: by dtype."""
    standing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(standing).free
    limits: list[tuple[int, float, str]] = [(left, free, f"{standing} has {free / _GIB:.3f} GiB free")]
    if max_gib is not None:
        limits.insert(0, (whole, max_gib * _GIB, f"max_gib is {max_gib:g}"))
    for clips, room, said in limits:
        need = {name: clips * (bytes_ + _BESIDE) for name, bytes_ in size.items()}
        if need[dtype] > room:
            fit = [f"{name} ({need[name] / _GIB:.3f} GiB)" for name in need if need[name] <= room]
            way = f"dtype {' or '.join(fit)} would fit" if fit else "no dtype would fit"
            raise ValueError(
                f"{folder}: {clips} clips of {size[dtype] / 2**20:.3f} MiB in {dtype} need {need[dtype] / _GIB:.3f} GiB, "
                f"and {said}; {way}, and so would {int(room // (size[dtype] + _BESIDE))} clips"
            )


def _number(clip_id: int, label: Label) -> int:
    if isinstance(label, str):
        raise ValueError(f"labels must be given: clip {clip_id} has the class {label!r}, which is no number")
    return -1 if label is None else label
