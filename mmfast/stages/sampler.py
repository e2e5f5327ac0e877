"""Which clips a step sees, as a function of (seed, epoch, step, rank): so a run that was killed goes on within an epoch."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from ..data.dataset import ClipDataset

Key = tuple[tuple[int, int], ...]  # of each data set: the pass over it, and the place in it


class EpochSampler(DistributedSampler):
    """Shuffled places in one or more data sets that are read side by side; an epoch is one pass over the first.

    sizes: clips of each data set. The others go on from epoch to epoch, each pass in an order of its own. batch_size: clips
    of each data set on one rank; what is left over behind the last whole step of an epoch waits for another epoch. The global
    batch does not depend on the number of ranks: each takes its part of it. `start`: (epoch, step) to begin at.

    Yields a key for `Drawn`. Raises ValueError where a data set is empty or the first has less than one step's clips.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
    ) -> None:
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"the {name} data set has no clips")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        name, clips = next(iter(sizes.items()))
        self.steps = clips // (batch_size * world)
        if self.steps == 0:
            raise ValueError(
                f"the {name} data set has {clips} clips, one step takes batch_size {batch_size} on each of {world} ranks"
            )
        self.sizes = dict(sizes)
        self.batch_size, self.rank, self.world, self.seed = batch_size, rank, world, seed
        self.epoch = 0
        self.start = (0, 0)

    def __len__(self) -> int:
        """Clips of a whole epoch on this rank."""
        return self.steps * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Key]:
        # Lightning makes the first iterator before it says which epoch it is.
        epoch, first = self.start if self.epoch <= self.start[0] else (self.epoch, 0)
        for step in range(first, self.steps):
            place = (step * self.world + self.rank) * self.batch_size
            yield from (self._key(epoch, place + i) for i in range(self.batch_size))

    def _key(self, epoch: int, place: int) -> Key:
        total = epoch * self.steps * self.world * self.batch_size + place
        key = []
        for stream, size in enumerate(self.sizes.values()):
            turn, at = divmod(total, size) if stream else (epoch, place)
            key.append((turn, int(self._order(stream, size, turn)[at])))
        return tuple(key)

    def _order(self, stream: int, size: int, turn: int) -> np.ndarray:
        orders: dict[int, tuple[int, np.ndarray]] = self.__dict__.setdefault("_orders", {})
        if stream not in orders or orders[stream][0] != turn:
            orders[stream] = turn, np.random.default_rng([self.seed, stream, turn]).permutation(size)
        return orders[stream][1]


class Drawn(Dataset):
    """The items an EpochSampler's keys name: {name: item} of each data set.

    An item is a pure function of (seed, pass, place), in any worker: each pass sees another crop. A ClipDataset is given a
    seed of the pass; for any other the random states of torch, numpy and Python are seeded, and put back afterwards.
    """

    def __init__(self, datasets: Mapping[str, Any], seed: int = 0) -> None:
        self.datasets, self.seed = dict(datasets), seed

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(dataset) for name, dataset in self.datasets.items()}

    def __getitem__(self, key: Key) -> dict[str, Any]:
        items = {}
        for stream, ((name, dataset), (turn, place)) in enumerate(zip(self.datasets.items(), key, strict=True)):
            if isinstance(dataset, ClipDataset):
                # Not set_epoch: it is one for all workers, which may be in different passes over a short data set.
                dataset.seed = int(np.random.SeedSequence([self.seed, stream, turn]).generate_state(1, np.uint64)[0])
            with seeded(self.seed, stream, turn, place):
                items[name] = dataset[place]
        return items


class RankPlaces(DistributedSampler):
    """Every world-th place of a data set, from `rank` on; equally many on each rank, so that the last may be there again."""

    def __init__(self, size: int, rank: int = 0, world: int = 1) -> None:
        self.places = [min(first + rank, size - 1) for first in range(0, size, world)]

    def __len__(self) -> int:
        return len(self.places)

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: every epoch is in order."""

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)


class Placed(Dataset):
    """Items with their places: {"place": int, "item": item}, drawn alike in every pass."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> dict[str, Any]:
        with seeded(0, place):
            return {"place": place, "item": self.dataset[place]}


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the CPU generators of torch, numpy and Python by a key of integers, and put their states back afterwards."""
    words = np.random.SeedSequence([abs(k) for k in key]).generate_state(3, np.uint64)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(int(words[0] >> np.uint64(1)))
    np.random.seed(int(words[1] & np.uint64(0xFFFFFFFF)))
    random.seed(int(words[2]))
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
