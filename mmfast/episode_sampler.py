"""Which clips an episode is made of: N classes, K support and Q query clips of each."""

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class EpisodeBatch:
    """number int64 [E]: of each episode. support [E, N*K] and query [E, N*Q]: int64 clip indices, class by class."""

    number: Tensor
    support: Tensor
    query: Tensor
    n_way: int

    @property
    def support_labels(self) -> Tensor:
        """int64 [E, N*K]: 0..N-1, the class within the episode."""
        return self._labels(self.support)

    @property
    def query_labels(self) -> Tensor:
        """int64 [E, N*Q]: 0..N-1, the class within the episode."""
        return self._labels(self.query)

    def _labels(self, clips: Tensor) -> Tensor:
        each = clips.shape[1] // self.n_way
        return torch.arange(self.n_way).repeat_interleave(each).expand(clips.shape[0], -1)


class Episodes:
    """Episodes over labelled clips, each a function of (seed, its number) alone, whoever else works on the rest.

    labels: the class of each clip, a whole number or a name; -1 or None for none, and such clips are not drawn. Iterating
    gives (support [N*K], query [N*Q]) of each episode, int64 indices of clips, class by class, no clip twice.
    names: of numbered classes, for messages. drop_small leaves classes of fewer than K + Q clips out; else they are refused.
    reference: clips are taken as in the published sampler: every class walks through a shuffled list of its clips in steps of
    K + Q, shuffled again when the next step would overrun it. Numbers depend on seed, not on any library's version.

    Raises ValueError for numbers out of range, classes with too few clips, by name, and fewer than n_way classes.
    """

    def __init__(
        self,
        labels: Sequence[Hashable] | Tensor | np.ndarray,
        n_way: int = 5,
        k_shot: int = 1,
        n_query: int = 15,
        episodes: int = 600,
        seed: int = 0,
        *,
        names: Mapping[int, str] | Sequence[str] | None = None,
        drop_small: bool = False,
        reference: bool = False,
    ) -> None:
        for name, value, least in (
            ("n_way", n_way, 1),
            ("k_shot", k_shot, 1),
            ("n_query", n_query, 1),
            ("episodes", episodes, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.n_way, self.k_shot, self.n_query = n_way, k_shot, n_query
        self.episodes, self.seed, self.reference = episodes, seed, reference
        given = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else list(labels)
        self.clips = len(given)
        members: dict[Any, list[int]] = {}
        for clip, label in enumerate(given):
            if label is not None and label != -1:
                members.setdefault(label, []).append(clip)
        ordered = sorted(members, key=lambda c: (isinstance(c, str), c))
        need = k_shot + n_query
        small = [label for label in ordered if len(members[label]) < need]
        self.dropped = {_name(label, names): len(members[label]) for label in small}
        if small and not drop_small:
            listed = ", ".join(f"{name} ({count})" for name, count in self.dropped.items())
            raise ValueError(
                f"labels must have at least k_shot + n_query = {need} clips of each class; too few in {listed}. "
                "Lower k_shot or n_query, or leave these classes out with drop_small"
            )
        self.classes = [label for label in ordered if len(members[label]) >= need]
        if len(self.classes) < n_way:
            raise ValueError(
                f"labels must have at least n_way = {n_way} classes of {need} clips or more, got {len(self.classes)}"
            )
        self._members = [np.array(members[label]) for label in self.classes]
        self.numbers = range(episodes)
        self._walk: list[np.ndarray] | None = None

    def __len__(self) -> int:
        """Episodes of this shard."""
        return len(self.numbers)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches(1):
            yield batch.support[0], batch.query[0]

    def shard(self, rank: int, world: int) -> Self:
        """Every world-th episode, from rank on: each is in exactly one shard, and what it is does not change."""
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in 0..world-1, got rank {rank} of world {world}")
        part = copy.copy(self)
        part.numbers = self.numbers[rank::world]
        return part

    def batches(self, size: int) -> Iterator[EpisodeBatch]:
        """The episodes of this shard, `size` at a time."""
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        for start in range(0, len(self.numbers), size):
            numbers = self.numbers[start : start + size]
            drawn = torch.from_numpy(np.stack([self._draw(number) for number in numbers]))  # [E, N, K + Q]
            support, query = drawn.split((self.k_shot, self.n_query), 2)
            yield EpisodeBatch(torch.tensor(numbers), support.flatten(1), query.flatten(1), self.n_way)

    def _draw(self, number: int) -> np.ndarray:
        """int64 [N, K + Q]."""
        if self.reference:
            if self._walk is None:
                self._walk = self._walk_through()
            return self._walk[number]
        bits = np.random.PCG64([self.seed, number])
        chosen = _shuffled(np.arange(len(self.classes)), bits)[: self.n_way]
        need = self.k_shot + self.n_query
        return np.stack([_shuffled(self._members[c], bits)[:need] for c in chosen])

    def _walk_through(self) -> list[np.ndarray]:
        bits = np.random.PCG64([self.seed])
        need = self.k_shot + self.n_query
        order = [_shuffled(clips, bits) for clips in self._members]
        at = [0] * len(order)
        walk = []
        for _ in range(self.episodes):
            drawn = []
            for c in _shuffled(np.arange(len(order)), bits)[: self.n_way]:
                drawn.append(order[c][at[c] : at[c] + need])
                at[c] += need
                if at[c] + need > len(order[c]):
                    order[c], at[c] = _shuffled(order[c], bits), 0
            walk.append(np.stack(drawn))
        return walk


def _shuffled(items: np.ndarray, bits: np.random.PCG64) -> np.ndarray:
    # Raw words, because numpy keeps those the same in every version, and its permutations not.
    return items[np.argsort(bits.random_raw(len(items)), kind="stable")]


def _name(label: Any, names: Mapping[int, str] | Sequence[str] | None) -> str:
    if names is None or isinstance(label, str):
        return str(label)
    known = label in names if isinstance(names, Mapping) else 0 <= label < len(names)
    return str(names[label]) if known else str(label)
