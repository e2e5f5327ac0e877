"""Features of every (clip, view) of a collection, in safetensors shards with an index, to be computed once and read often.

    feature[clip, view] = encode(clip under the mask of (seed, clip id, view))

so a feature depends neither on the batch its clip was in nor on how many ranks shared the work.
"""

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import __version__
from .ensemble import micro_batch_size, run_in_micro_batches
from .loading import Clips, Encoder, describe, loaded_batches
from .masks import kept_per_slot, sample_pack
from .shards import Label, ShardWriter, checked_place, place_in_world
from .stored import StoredClips

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# The precisions of a model after quantize_<name>, and autocast's beside them.
QUANTIZED: dict[str, torch.dtype | None] = {"int8": None, "fp8": torch.bfloat16}
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Report:
    """What a run did for its rank's part of the collection.

    done: clips done now. kept: done by an earlier run. failed: clip id -> (name, reason), of this and earlier runs.
    """

    clips: int
    done: int = 0
    kept: int = 0
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        said = [f"{self.done} of {self.clips} clips done"]
        said += [f"{self.kept} were done before"] * bool(self.kept)
        said += [f"{len(self.failed)} could not be read:"] * bool(self.failed)
        lines = [", ".join(said), *(f"  {name}: {reason}" for name, reason in list(self.failed.values())[:10])]
        return "\n".join(lines + [f"  and {len(self.failed) - 10} more"] * (len(self.failed) > 10))


def weights_fingerprint(model: Encoder | nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of the state dict: equal for equal weights on any device."""
    return state_fingerprint(model.state_dict())


def state_fingerprint(state: Mapping[str, Tensor]) -> str:
    """weights_fingerprint of a state dict, or of a part of one."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def extract(
    model: Encoder,
    dataset: Clips,
    out: str | os.PathLike[str],
    *,
    views: int = 2,
    mask_ratio: float = 0.75,
    seed: int = 0,
    modality: str = "rgb",
    precision: str = "fp32",
    dtype: str = "float32",
    shard_size: int = 4096,
    batch: int = 32,
    workers: int = 0,
    rank: int | None = None,
    world: int | None = None,
    retry: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Encode every clip of `dataset` under `views` tube masks, into the folder `out`, where FeatureStore reads them.

    What an earlier run into the folder has done stays; it must agree in weights, masks and `about` (plain data: how the
    clips were made). precision: "fp32", "bf16" or "fp16" autocast, "int8" after quantize_int8, or "fp8" (bf16 autocast
    besides) after quantize_fp8; dtype: what the features are stored in. workers: threads that load clips ahead. rank,
    world: this process's part, by default from torchrun or SLURM. retry: try clips again that could not be read. A clip
    that cannot be read is skipped and reported. Holds one
    shard and a few batches.

    Raises ValueError for arguments out of range, clips that the model cannot take, and a folder of another run.
    """
    if views < 1:
        raise ValueError(f"views must be at least 1, got {views}")
    kept_per_slot(model.config.grid, mask_ratio)
    one_of("dtype", dtype, STORED)
    settings = {
        "what": "features",
        **encoding_settings(model, views, mask_ratio, seed, modality, precision),
        "dtype": dtype,
        "about": dict(about or {}),
    }
    encode = encoder(model, views, mask_ratio, seed, precision)

    def compute(ids: Tensor, video: Tensor) -> dict[str, Tensor]:
        return {"features": encode(video, ids).to(STORED[dtype])}

    return run_sharded(
        compute, model, dataset, out, "features", settings, modality=modality, shard_size=shard_size, batch=batch,
        workers=workers, rank=rank, world=world, retry=retry, progress=progress,
    )  # fmt: skip


def encoding_settings(
    model: Encoder, views: int, mask_ratio: float, seed: int, modality: str, precision: str
) -> dict[str, Any]:
    """Everything that fixes a feature but the clip's pixels, as plain data."""
    return {
        "weights": weights_fingerprint(model),
        "config": model.config.to_dict(),
        "views": views,
        "mask_ratio": mask_ratio,
        "mask_seed": seed,
        "modality": modality,
        "precision": precision,
    }


def encoder(
    model: Encoder, views: int, mask_ratio: float, seed: int, precision: str = "fp32"
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of (video [B, C, F, H, W] on any device, clip ids int64 [B]) that gives features [B, P, D] on the model's."""
    amp = amp_of(model, precision)
    device = next(iter(model.parameters())).device

    @torch.no_grad()
    def encode(video: Tensor, ids: Tensor) -> Tensor:
        grid = model.check_video(video)

        def run(clips: slice) -> Tensor:
            chosen = ids[clips]
            pack = sample_pack(len(chosen), views, grid, mask_ratio, seed=seed, clip_ids=chosen, device=device)
            with autocast(device, amp):
                return model.encode(video[clips].to(device, non_blocking=True), pack).unflatten(0, (-1, views))

        tokens = views * grid[0] * kept_per_slot(grid, mask_ratio)
        return torch.cat(run_in_micro_batches(run, len(ids), micro_batch_size(tokens, device)))

    return encode


def amp_of(model: Encoder, precision: str) -> torch.dtype | None:
    """What autocast takes for a precision. ValueError for an unknown one, and for int8 or fp8 without their
    quantize_ or the reverse."""
    amp = one_of("precision", precision, PRECISIONS | QUANTIZED)
    for kind in QUANTIZED:
        if (getattr(model, "quantized", None) == kind) != (precision == kind):
            raise ValueError(f'precision must be "{kind}" after quantize_{kind} and only then, got {precision!r}')
    return amp


def autocast(device: torch.device, amp: torch.dtype | None) -> AbstractContextManager[Any]:
    """torch.autocast on the device, or nothing for None."""
    return nullcontext() if amp is None else torch.autocast(device.type, amp)


def run_sharded(
    compute: Callable[[Tensor, Tensor], dict[str, Tensor]],
    model: Encoder,
    dataset: Clips,
    out: str | os.PathLike[str],
    kind: str,
    settings: Mapping[str, Any],
    *,
    modality: str,
    shard_size: int,
    batch: int,
    workers: int,
    rank: int | None,
    world: int | None,
    retry: bool,
    progress: bool,
) -> Report:
    """compute(ids int64 [B], video [B, C, F, H, W]) -> tensors [B, ...] of all clips of a rank, into shards of `out`."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    rank, world = place_in_world() if rank is None or world is None else checked_place(rank, world)
    ids, names, labels = describe(dataset)
    by_id = dict(zip(ids, names, strict=True))
    if len(by_id) < len(ids):
        again = next(i for i, times in Counter(ids).items() if times > 1)
        raise ValueError(f"dataset has clip id {again} twice; every clip needs an id of its own")
    writer = ShardWriter(
        out, kind, settings, by_id, version=__version__, rank=rank, world=world, shard_size=shard_size, retry=retry
    )
    training = getattr(model, "training", False)
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with writer:
            todo = writer.todo(ids)
            mine = range(rank, len(ids), world)
            report = Report(len(mine), kept=sum(ids[place] in writer.done for place in mine))
            where = f" (rank {rank} of {world})" if world > 1 else ""
            with tqdm(total=len(todo), unit="clip", desc=f"{kind}{where}", disable=not progress) as bar:
                _fill(writer, compute, model, dataset, todo, ids, labels, modality, batch, workers, bar, report)
            report.failed = {ids[p]: writer.failed[ids[p]] for p in mine if ids[p] in writer.failed}
    finally:
        if isinstance(model, nn.Module):
            model.train(training)
    return report


def _fill(
    writer: ShardWriter,
    compute: Callable[[Tensor, Tensor], dict[str, Tensor]],
    model: Encoder,
    dataset: Clips,
    todo: Sequence[int],
    ids: Sequence[int],
    labels: Sequence[Label],
    modality: str,
    batch: int,
    workers: int,
    bar: Any,
    report: Report,
) -> None:
    pending: deque[tuple[list[int], dict[str, Tensor]]] = deque()

    def store(left: int) -> None:
        # The newest batch stays on the device while the next one is launched, so that a GPU need not wait for the host.
        while len(pending) > left:
            places, results = pending.popleft()
            host = {name: tensor.cpu() for name, tensor in results.items()}
            for row, place in enumerate(places):
                writer.add(ids[place], labels[place], **{name: tensor[row] for name, tensor in host.items()})
            report.done += len(places)
            bar.update(len(places))

    try:
        for places, clips in loaded_batches(model, dataset, todo, ids, modality, workers, batch):
            if isinstance(clips, str):
                writer.fail(ids[places[0]], clips)
                bar.update()
            else:
                pending.append((places, compute(torch.tensor([ids[place] for place in places]), clips)))
                store(1)
    finally:
        store(0)


def one_of(name: str, value: str, known: Mapping[str, Any]) -> Any:
    """known[value]; ValueError that lists what is known."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


class FeatureStore(StoredClips):
    """The features of a folder that `extract` filled, by any number of ranks in any number of runs.

    Clips come in the order of their ids. A shard that is cut short, corrupt or gone is found when it is read, and named;
    `extract` into the same folder does its clips again. Raises ValueError for a folder without features.
    """

    what = "features"

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """(clip id, features [P, D]) in order, read as they are asked for."""
        return self._reader.iterate("features")

    @property
    def views(self) -> int:
        """Views of every clip."""
        return int(self.settings["views"])

    def features(self, ids: Sequence[int] | Tensor | None = None) -> Tensor:
        """Features [n, P, D] of the clips asked for, in that order; of all of them when None. ValueError for one not there."""
        chosen = self.ids if ids is None else ids.tolist() if isinstance(ids, Tensor) else ids
        return self._reader.rows("features", chosen)
