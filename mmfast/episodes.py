"""Few-shot evaluation: episodes of N classes with K support and Q query clips each, and what a head reaches on them.

    accuracy of an episode = share of its N Q queries whose mean class probability over P masked views is largest at the truth

Clips are encoded once per (clip, view), not once per episode: the mask is a function of (seed, clip id, view), so all
episodes in which a clip is drawn look its features up. `evaluate_fresh` draws masks anew for every episode, as published.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from . import profiling
from .config import ViTConfig
from .data.dataset import collate
from .ensemble import micro_batch_size, run_in_micro_batches
from .episode_sampler import EpisodeBatch, Episodes
from .fewshot import LinearHead, LogisticRegression, few_threads
from .masks import Grid, Pack, kept_per_slot, sample_pack


class Head(Protocol):
    """A few-shot head, such as fewshot.LogisticRegression."""

    def fit(self, support: Tensor, labels: Tensor) -> Any: ...
    def predict_proba(self, query: Tensor) -> Tensor: ...


class Encoder(Protocol):
    """What is needed of a model: MaskedViT has it."""

    config: ViTConfig

    def check_video(self, video: Tensor) -> Grid: ...
    def encode(self, video: Tensor, mask: Pack) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


# -- what came out ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpisodeResult:
    """number int64 [E] and correct int64 [E]: episodes in ascending order, and how many of their `queries` queries were right."""

    number: Tensor
    correct: Tensor
    queries: int

    @property
    def accuracy(self) -> Tensor:
        """float64 [E], of each episode."""
        return self.correct.double() / self.queries

    @property
    def mean(self) -> float:
        return float(self.accuracy.mean())

    @property
    def std(self) -> float:
        """The population's, as published: over E, not E - 1."""
        return float(self.accuracy.std(correction=0))

    @property
    def standard_error(self) -> float:
        return self.std / math.sqrt(max(len(self.number), 1))

    @property
    def confidence(self) -> float:
        """Half the width of the 95 % confidence interval of the mean."""
        return 1.96 * self.standard_error

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} +- {100 * self.standard_error:.2f} % (standard error) over {len(self.number)} episodes"

    @staticmethod
    def merge(parts: Iterable["EpisodeResult"]) -> "EpisodeResult":
        """One result of those of all shards, equal to that without shards. Raises ValueError where an episode is there twice."""
        parts = list(parts)
        counts = {part.queries for part in parts}
        if len(counts) != 1:
            raise ValueError(f"parts must be results of the same episodes, got {sorted(counts)} queries an episode")
        number = torch.cat([part.number for part in parts])
        order = number.argsort()
        number = number[order]
        again = (number.diff() == 0).nonzero()
        if len(again):
            raise ValueError(f"parts must have each episode once, got {int(number[again[0]])} twice")
        return EpisodeResult(number, torch.cat([part.correct for part in parts])[order], counts.pop())

    def difference(self, other: "EpisodeResult") -> tuple[float, float]:
        """Mean and standard error of this accuracy less the other's, episode by episode. ValueError for other episodes."""
        if self.queries != other.queries or not torch.equal(self.number, other.number):
            raise ValueError("other must be a result of the same episodes")
        gained = self.accuracy - other.accuracy
        return float(gained.mean()), float(gained.std(correction=0)) / math.sqrt(max(len(gained), 1))

    def gather(self) -> "EpisodeResult":
        """The merged result of all ranks, on each of them; this one where torch.distributed is not in use."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return self
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, self)
        return self.merge(parts)


def evaluate_episodes(
    support_features: Tensor, query_features: Tensor, episodes: Episodes, *, head: Head | None = None, batch: int = 300
) -> EpisodeResult:
    """Accuracy of a head, LogisticRegression unless given, on each episode; a query's probabilities are the mean over views.

    support_features: [C, D], one view of each clip, as published; [C, V, D] takes all V views of a support clip for supports.
    query_features: [C, P, D]. Row i is clip i of episodes.labels; both on one device, where everything runs.
    batch: episodes at once. Raises ValueError for features that do not fit the episodes.
    """
    check_features(support_features, query_features, episodes)
    head = LogisticRegression() if head is None else head
    numbers, correct = [], []
    for part in episodes.batches(batch):
        with few_threads(query_features.device, part.support.numel() * support_features[0].numel()):
            probabilities = batch_probabilities(support_features, query_features, part, head).mean(2)
            correct.append(count_correct(probabilities, part))
        numbers.append(part.number)
    return make_result(numbers, correct, episodes)


def batch_probabilities(support: Tensor, query: Tensor, part: EpisodeBatch, head: Head) -> Tensor:
    """[E, N*Q, P, N]: of each query under each view, after a fit to the supports.   support, query: as in evaluate_episodes."""
    device = query.device
    supports = support[part.support.to(device)].flatten(1, -2)  # [E, N*K*V, D]
    labels = part.support_labels.to(device).repeat_interleave(supports.shape[1] // part.support.shape[1], 1)
    index, views = part.query.to(device), query.shape[1]
    head.fit(supports, labels)
    if isinstance(head, LinearHead):
        rows = index[:, :, None] * views + torch.arange(views, device=device)
        each = head.predict_rows(query.flatten(0, 1), rows.flatten(1))
    else:
        each = head.predict_proba(query[index].flatten(1, 2))
    return each.unflatten(1, (-1, views))


def count_correct(probabilities: Tensor, part: EpisodeBatch) -> Tensor:
    """int64 [E] on the CPU, of probabilities [E, N*Q, N]."""
    truth = part.query_labels.to(probabilities.device)
    return (probabilities.argmax(2) == truth).sum(1).cpu()


def make_result(numbers: list[Tensor], correct: list[Tensor], episodes: Episodes) -> EpisodeResult:
    nothing = torch.zeros(0, dtype=torch.int64)
    return EpisodeResult(
        torch.cat([nothing, *numbers]), torch.cat([nothing, *correct]), episodes.n_way * episodes.n_query
    )


def check_features(support: Tensor, query: Tensor, episodes: Episodes) -> None:
    if query.dim() != 3 or query.shape[0] != episodes.clips or query.shape[1] < 1:
        raise ValueError(f"query_features must be [{episodes.clips}, P, D], one row a label, got {tuple(query.shape)}")
    dim = query.shape[2]
    if support.dim() not in (2, 3) or support.shape[0] != episodes.clips or support.shape[-1] != dim:
        raise ValueError(
            f"support_features must be [{episodes.clips}, {dim}] or [{episodes.clips}, V, {dim}], as query_features "
            f"are, got {tuple(support.shape)}"
        )
    if support.device != query.device:
        raise ValueError(f"support_features must be on {query.device}, as query_features are, got {support.device}")


# -- features ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViewFeatures:
    """Features of every clip under P masks, each encoded once.

    features: float32 [C, P, D] on the model's device. clip_ids, labels: int64 [C], -1 for no label; clips that could not be
    read, left_out in number, have no row. encoded: how many (clip, view) the encoder was run on, C*P.
    """

    features: Tensor
    clip_ids: Tensor
    labels: Tensor
    encoded: int
    left_out: int

    def evaluate(self, episodes: Episodes, *, head: Head | None = None, batch: int = 300) -> EpisodeResult:
        """evaluate_episodes with the first view of each clip as support, all views as queries.   episodes: over `labels`."""
        return evaluate_episodes(self.features[:, 0], self.features, episodes, head=head, batch=batch)


def encode_views(
    model: Encoder,
    dataset: Any,
    views: int = 2,
    mask_ratio: float = 0.75,
    seed: int = 0,
    *,
    modality: str = "rgb",
    dtype: torch.dtype | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    progress: bool = True,
) -> ViewFeatures:
    """Encode every clip of a data set under `views` tube masks, each a function of (seed, clip id, view).

    dataset: items {"clip_id", "label", modality: [C, F, H, W]}, as ClipDataset has them. dtype: bf16 or fp16 autocast; None
    encodes in the model's own. Raises ValueError for arguments out of range and a modality that items do not have.
    """
    check_views(model, views, mask_ratio)
    device = next(iter(model.parameters())).device
    loader = DataLoader(dataset, batch_size, collate_fn=collate, num_workers=num_workers)
    features, ids, labels = [], [], []
    with evaluating(model), tqdm(total=len(dataset), unit="clip", desc="encoding", disable=not progress) as bar:
        for clips in loader:
            video, chosen = pixels_of(clips, modality), clips["clip_id"]
            if len(chosen):
                features.append(encode_clips(model, video, chosen, views, mask_ratio, seed, dtype))
            ids.append(chosen)
            labels.append(clips["label"])
            bar.update(len(chosen))
    nothing = torch.zeros(0, dtype=torch.int64)
    rows = torch.cat(features) if features else torch.zeros(0, views, model.config.embed_dim, device=device)
    all_ids = torch.cat([nothing, *ids])
    left_out = len(dataset) - len(all_ids)
    return ViewFeatures(rows, all_ids, torch.cat([nothing, *labels]), len(all_ids) * views, left_out)


def evaluate_fresh(
    model: Encoder,
    dataset: Any,
    episodes: Episodes,
    views: int = 2,
    mask_ratio: float = 0.75,
    seed: int = 0,
    *,
    head: Head | None = None,
    modality: str = "rgb",
    dtype: torch.dtype | None = None,
    num_workers: int = 0,
    batch: int = 50,
    progress: bool = True,
) -> EpisodeResult:
    """evaluate_episodes with masks drawn anew for every episode, as published: one of each support, `views` of each query.

    Expensive: every episode decodes and encodes its N (K + Q) clips again. A mask is a function of (seed, episode, clip id,
    view). dataset: as in encode_views, clip i that of episodes.labels[i]. Raises ValueError for a clip that cannot be read.
    """
    check_views(model, views, mask_ratio)
    head = LogisticRegression() if head is None else head
    drawn = clips_of_episodes(dataset, episodes, modality, num_workers)
    numbers, correct = [], []
    with evaluating(model), tqdm(total=len(episodes), unit="episode", disable=not progress) as bar:
        for part in episodes.batches(batch):
            supports, queries = [], []
            shots = part.support.shape[1]
            for number in part.number.tolist():
                ids, video = next(drawn)
                own = own_seed(seed, number)
                supports.append(encode_clips(model, video[:shots], ids[:shots], 1, mask_ratio, own, dtype)[:, 0])
                queries.append(encode_clips(model, video[shots:], ids[shots:], views, mask_ratio, own, dtype))
                bar.update()
            support, query = torch.stack(supports), torch.stack(queries)  # [E, N*K, D], [E, N*Q, P, D]
            labels = part.support_labels.to(support.device)
            each = head.fit(support, labels).predict_proba(query.flatten(1, 2)).unflatten(1, query.shape[1:3])
            numbers.append(part.number)
            correct.append(count_correct(each.mean(2), part))
    return make_result(numbers, correct, episodes)


def clips_of_episodes(
    dataset: Any, episodes: Episodes, modality: str, num_workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and pixels of the clips of each episode, supports first.   dataset: clip i is that of episodes.labels[i].

    Raises ValueError for a data set of another length, and for a clip that cannot be read.
    """
    if len(dataset) != episodes.clips:
        raise ValueError(f"dataset must have {episodes.clips} clips, one a label of episodes, got {len(dataset)}")
    rows = [torch.cat(pair).tolist() for pair in episodes]
    loader = DataLoader(dataset, batch_sampler=rows, collate_fn=collate, num_workers=num_workers)

    def drawn() -> Iterator[tuple[Tensor, Tensor]]:
        for number, wanted, clips in zip(episodes.numbers, rows, loader, strict=True):
            ids = clips["clip_id"]
            if len(ids) < len(wanted):
                raise ValueError(
                    f"dataset has {len(wanted) - len(ids)} clips of episode {number} that cannot be read; leave them out"
                )
            yield ids, pixels_of(clips, modality)

    return drawn()


def own_seed(seed: int, *numbers: int) -> int:
    """A seed that is a function of these numbers alone."""
    return int(np.random.PCG64([seed, *numbers]).random_raw())


@torch.no_grad()
def encode_clips(
    model: Encoder, video: Tensor, ids: Tensor, views: int, mask_ratio: float, seed: int, dtype: torch.dtype | None
) -> Tensor:
    """float32 [B, P, D] on the model's device: of clips under the masks of (seed, clip id, view)."""
    grid = model.check_video(video)
    device = next(iter(model.parameters())).device

    def run(clips: slice) -> Tensor:
        chosen = ids[clips]
        pack = sample_pack(len(chosen), views, grid, mask_ratio, seed=seed, clip_ids=chosen, device=device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None), profiling.range("encode_views"):
            return model.encode(video[clips].to(device, non_blocking=True), pack).unflatten(0, (-1, views)).float()

    tokens = views * grid[0] * kept_per_slot(grid, mask_ratio)
    return torch.cat(run_in_micro_batches(run, len(ids), micro_batch_size(tokens, device)))


def pixels_of(clips: Mapping[str, Tensor], modality: str) -> Tensor:
    if modality not in clips:
        raise ValueError(f"modality must be one that the data set has ({', '.join(clips)}), got {modality!r}")
    return clips[modality]


def check_views(model: Encoder, views: int, mask_ratio: float) -> None:
    if views < 1:
        raise ValueError(f"views must be at least 1, got {views}")
    kept_per_slot(model.config.grid, mask_ratio)


class evaluating:
    """The model in eval mode for a while."""

    def __init__(self, model: Any) -> None:
        self.model, self.training = model, getattr(model, "training", False)

    def __enter__(self) -> None:
        if isinstance(self.model, nn.Module):
            self.model.eval()

    def __exit__(self, *_: object) -> None:
        if isinstance(self.model, nn.Module):
            self.model.train(self.training)
