"""Features for evaluate and sweep: those of a folder that `extract` filled, or of a collection, extracted now."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import ClipDataset
from ..data.windows import cut_windows
from ..episodes import Episodes
from ..extract import FeatureStore, extract
from ..predict import clips_for
from ..shards import Label, place_in_world
from ..vit import MaskedViT
from . import common

HEADS = ("logistic", "prototype", "ridge")
TED, EVL = "ted", "evl"  # train adapters or a decoder with the head, so they need the clips themselves


@dataclass
class Features:
    """features: float32 [C, P, D]; labels of the C clips; failed: clips that could not be read; settings as extracted."""

    features: Tensor
    labels: list[Label]
    failed: dict[int, tuple[str, str]]
    settings: dict[str, Any]


def add_episodes(parser: argparse.ArgumentParser, heads: tuple[str, ...] = HEADS) -> None:
    """--n-way and the rest of the protocol.   heads: to choose from."""
    group = parser.add_argument_group("episodes (by default the paper's)")
    group.add_argument("--n-way", type=int, default=5, metavar="N", help="classes (default: %(default)s)")
    group.add_argument("--n-query", type=int, default=15, metavar="Q", help="queries a class (default: %(default)s)")
    group.add_argument("--episodes", type=int, default=600, help="(default: %(default)s)")
    group.add_argument("--episode-seed", type=int, default=0, help="which episodes are drawn (default: %(default)s)")
    group.add_argument("--head", choices=heads, default="logistic", help="(default: %(default)s)")
    group.add_argument("--drop-small", action="store_true", help="leave out classes with too few clips")
    group.add_argument("--reference", action="store_true", help="draw episodes as the published sampler walks")


def episodes_of(args: argparse.Namespace, labels: list[Label], k_shot: int) -> Episodes:
    """The whole run's episodes of add_episodes' arguments."""
    return Episodes(
        labels, args.n_way, k_shot, args.n_query, args.episodes, args.episode_seed,
        drop_small=args.drop_small, reference=args.reference,
    )  # fmt: skip


def head_of(name: str) -> Any:
    """A few-shot head by name."""
    from ..fewshot import LogisticRegression, Prototype, Ridge

    return {"logistic": LogisticRegression, "prototype": Prototype, "ridge": Ridge}[name]()


def is_store(data: str) -> bool:
    """Whether the folder was filled by `extract`."""
    return any(Path(data).glob("index-*.json"))


def stored(folder: str | Path, views: int | None) -> Features:
    """The first `views` views (None: all) of a folder's features. ValueError where it has fewer."""
    store = FeatureStore(folder)
    if not len(store):
        raise ValueError(f"{folder}: holds no clip")
    if views is not None and not 1 <= views <= store.views:
        raise ValueError(f"views must lie in 1..{store.views}, which {folder} has, got {views}")
    return Features(store.features()[:, :views].float(), store.labels, store.failed, store.settings)


def clips_of(args: argparse.Namespace, model: MaskedViT) -> tuple[ClipDataset, int | None]:
    """The labelled clips of DATA, and their stride."""
    records = common.records_of(args, (args.modality,))
    records = cut_windows(records, args.windows, args.modality)
    if all(record.label is None for record in records):
        raise ValueError(f"{args.data}: its clips have no labels; episodes need classes")
    stride = common.stride_of(records, args.stride)
    return clips_for(model.config, records, args.modality, stride=stride, resize=args.resize), stride


def extracted(
    args: argparse.Namespace,
    model: MaskedViT,
    clips: ClipDataset,
    stride: int | None,
    out: Path,
    views: int,
    ratio: float,
) -> Features:
    """Features of all clips, each rank encoding its share, in the folder `out`; what it has already is not done again."""
    extract(
        model, clips, out, views=views, mask_ratio=ratio, seed=args.seed, modality=args.modality,
        precision=args.precision, shard_size=args.shard_size, batch=args.batch, workers=args.workers, retry=args.retry,
        about=common.cut_of(args, stride), progress=not args.quiet,
    )  # fmt: skip
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return stored(out, views)


@contextmanager
def together() -> Iterator[None]:
    """torch.distributed (gloo) over the processes that torchrun or SLURM started, so that results can be gathered."""
    rank, world = place_in_world()
    if world == 1:
        yield
        return
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise ValueError(
            f"{world} processes need MASTER_ADDR and MASTER_PORT to meet, as torchrun sets them; or extract with all of "
            "them and evaluate the folder with one"
        )
    # Extraction may take a rank hours longer than another.
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(days=7))
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
