"""Results of many clips in numbered files, written so that a run killed anywhere can be started again.

    index-00002.json                        of rank 2: the settings, the shards it wrote, the clips that failed
    features-00002-000007.safetensors       a shard: clip ids and one row of results for each

A shard is written aside and renamed, and counts once an index names it with its size and sha256. Which clips a rank does
follows from their places in the collection alone (place % world), so the ranks need not speak to each other, and a later
run may have more or fewer of them: what any index names is not done again.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor

Label = int | str | None
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """A file of results: what its index says of it."""

    file: str
    size: int
    sha256: str
    ids: list[int]
    names: list[str]
    labels: list[Label]

    def fault(self, folder: Path, *, deep: bool) -> str | None:
        """Why the file is not the one that was written, or None.   deep: compare the content, not only the size."""
        try:
            size = (folder / self.file).stat().st_size
            if size != self.size:
                return f"{self.file} has {size} bytes, not the {self.size} that were written"
            if deep and _sha256(folder / self.file) != self.sha256:
                return f"{self.file} is corrupt: its sha256 is not the one that was written"
        except FileNotFoundError:
            return f"{self.file} is missing"
        return None


@dataclass
class Index:
    """What one rank has done."""

    settings: dict[str, Any]
    version: str
    shards: list[Shard] = field(default_factory=list)
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)  # clip id -> name, reason
    damaged: list[str] = field(default_factory=list)  # shards, of any rank, whose clips are done again

    def write(self, path: Path) -> None:
        """Write the index in one step."""
        about = {"format": FORMAT, **asdict(self)}
        about["failed"] = [{"id": i, "name": name, "reason": why} for i, (name, why) in self.failed.items()]
        write_aside(path, (json.dumps(about) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Self:
        """The index of a file. ValueError names the file and what is wrong with it."""
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise ValueError(f"{path}: has format {about['format']!r}, this version reads {FORMAT}")
            shards = [Shard(**shard) for shard in about["shards"]]
            failed = {one["id"]: (one["name"], one["reason"]) for one in about["failed"]}
            return cls(about["settings"], about["version"], shards, failed, about["damaged"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: is no index of mmfast ({type(error).__name__}: {error})") from error


def read_indexes(folder: str | os.PathLike[str]) -> dict[Path, Index]:
    """The indexes of all ranks, by file."""
    return {path: Index.read(path) for path in sorted(Path(folder).glob("index-*.json"))}


def write_aside(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file under another name, flush it to the disk, and put it in place: nobody ever sees half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def place_in_world() -> tuple[int, int]:
    """(rank, number of ranks) as torchrun (RANK, WORLD_SIZE) or SLURM (SLURM_PROCID, SLURM_NTASKS) says, else (0, 1)."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and world in os.environ:
            return checked_place(int(os.environ[rank]), int(os.environ[world]))
    return 0, 1


def checked_place(rank: int, world: int) -> tuple[int, int]:
    """The same two numbers. Raises ValueError unless 0 <= rank < world."""
    if not 0 <= rank < world:
        raise ValueError(f"rank must lie in 0..world - 1, got rank {rank} of world {world}")
    return rank, world


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What two settings disagree in, in words."""
    found = []
    for name in [*theirs, *(n for n in ours if n not in theirs)]:
        old, new = theirs.get(name), ours.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} ({_short(old)} there, {_short(new)} now)")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


class ShardWriter:
    """One rank's part of a folder of results. A context manager: what was added is on the disk when it is left.

    folder: made if absent. kind: first word of the shards' names. settings: plain data on which all runs into the folder
    must agree. names: by clip id, of all clips in the collection's order. retry: do the clips that failed once more.
    Raises ValueError for other settings, for a clip that has another name there, and for a rank that is at work already.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        kind: str,
        settings: Mapping[str, Any],
        names: Mapping[int, str],
        *,
        version: str,
        rank: int = 0,
        world: int = 1,
        shard_size: int = 4096,
        retry: bool = False,
    ) -> None:
        self.rank, self.world = checked_place(rank, world)
        if shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {shard_size}")
        self.folder, self.kind, self.shard_size, self._names = Path(folder), kind, shard_size, names
        self._path = self.folder / f"index-{rank:05}.json"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"out must be a folder, {str(self.folder)!r} is a file")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        try:
            self._index = self._opened(json.loads(json.dumps(settings)), version)
            self.done, failed = self._survey()
        except BaseException:
            self._lock.close()
            raise
        self.failed = {} if retry else {i: why for i, why in failed.items() if i not in self.done}
        self._index.failed = {i: why for i, why in self._index.failed.items() if i in self.failed}
        self._rows: list[tuple[int, Label, dict[str, Tensor]]] = []

    def todo(self, ids: Sequence[int]) -> list[int]:
        """Places, in the collection whose clip ids are given, that are this rank's and not done yet."""
        places = range(self.rank, len(ids), self.world)
        return [p for p in places if ids[p] not in self.done and ids[p] not in self.failed]

    def add(self, clip_id: int, label: Label, **row: Tensor) -> None:
        """One clip's results, each of the same shape and dtype for every clip; a full shard is written."""
        self._rows.append((clip_id, label, row))
        if len(self._rows) >= self.shard_size:
            self.flush()

    def fail(self, clip_id: int, reason: str) -> None:
        """Note a clip that cannot be read."""
        self.failed[clip_id] = self._index.failed[clip_id] = (self._names[clip_id], reason)

    def flush(self) -> None:
        """Write what was added, and the index."""
        if self._rows:
            ids = [clip_id for clip_id, _, _ in self._rows]
            tensors = {name: torch.stack([row[name] for _, _, row in self._rows]) for name in self._rows[0][2]}
            tensors["clip_ids"] = torch.tensor(ids, dtype=torch.int64)
            data = safetensors.torch.save(tensors, {"format": "pt"})
            file = f"{self.kind}-{self.rank:05}-{self._next:06}.safetensors"
            write_aside(self.folder / file, data)
            names, labels = [self._names[i] for i in ids], [label for _, label, _ in self._rows]
            self._index.shards.append(Shard(file, len(data), hashlib.sha256(data).hexdigest(), ids, names, labels))
            self._rows = []
            self._next += 1
        self._index.write(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if not isinstance(error, OSError):  # after a full disk there is nothing more to write
                self.flush()
        finally:
            self._lock.close()

    def _locked(self) -> Any:
        lock = (self.folder / f".lock-{self.rank:05}").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise ValueError(f"{self.folder}: another process is at work there as rank {self.rank}") from error
        return lock

    def _opened(self, settings: dict[str, Any], version: str) -> Index:
        """This rank's index, written before the others are read: of two ranks that start at once, one sees the other's."""
        fresh = not self._path.exists()
        index = Index(settings, version) if fresh else Index.read(self._path)
        if fresh:
            index.write(self._path)
        try:
            for path, other in read_indexes(self.folder).items():
                if differ := differences(other.settings, settings):
                    raise ValueError(
                        f"{self.folder}: {path.name} is of a run with other settings: {'; '.join(differ)}. "
                        "Take another folder, or delete this one."
                    )
        except ValueError:
            if fresh:
                self._path.unlink()
            raise
        self._next = 1 + max((int(shard.file.split("-")[2].split(".")[0]) for shard in index.shards), default=-1)
        return index

    def _survey(self) -> tuple[set[int], dict[int, tuple[str, str]]]:
        """Clips that are done, and clips that failed; shards of this rank's clips are read through."""
        indexes = read_indexes(self.folder)
        known = {file for index in indexes.values() for file in index.damaged}
        done: set[int] = set()
        failed: dict[int, tuple[str, str]] = {}
        mine = {clip_id for place, clip_id in enumerate(self._names) if place % self.world == self.rank}
        for index in indexes.values():
            failed |= index.failed
            for shard in index.shards:
                if shard.file in known:
                    continue
                for clip_id, name in zip(shard.ids, shard.names, strict=True):
                    if self._names.get(clip_id, name) != name:
                        raise ValueError(
                            f"{self.folder}: clip {clip_id} is {name!r} there and {self._names[clip_id]!r} now; "
                            "take another folder for another collection"
                        )
                if shard.fault(self.folder, deep=not mine.isdisjoint(shard.ids)):
                    self._index.damaged.append(shard.file)
                else:
                    done.update(shard.ids)
        return done, failed


class ShardReader:
    """All ranks' shards of a folder as one.

    Clips come in the order of their ids, whatever rank did them. A damaged shard's clips are missing, and `damaged` says
    why. Raises ValueError for a folder without an index, or with indexes that do not belong together.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        indexes = read_indexes(self.folder)
        if not indexes:
            raise ValueError(f"{self.folder}: holds no results of mmfast: there is no index-*.json")
        first, *others = indexes.values()
        for path, index in indexes.items():
            if differ := differences(first.settings, index.settings):
                raise ValueError(f"{path}: is of a run with other settings than the rest: {'; '.join(differ)}")
        self.settings, self.version = first.settings, first.version
        known = {file for index in indexes.values() for file in index.damaged}
        self.damaged: dict[str, str] = {}
        self._shards: list[Shard] = []
        where: dict[int, tuple[int, int]] = {}
        for shard in (s for index in indexes.values() for s in index.shards if s.file not in known):
            if fault := shard.fault(self.folder, deep=False):
                self.damaged[shard.file] = fault
                continue
            for row, clip_id in enumerate(shard.ids):
                where.setdefault(clip_id, (len(self._shards), row))
            self._shards.append(shard)
        self._where = dict(sorted(where.items()))
        failed = {i: why for index in indexes.values() for i, why in index.failed.items() if i not in where}
        self.failed: dict[int, tuple[str, str]] = dict(sorted(failed.items()))
        self._sound = torch.zeros(len(self._shards), dtype=torch.bool)

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._where)

    def __contains__(self, clip_id: int) -> bool:
        return clip_id in self._where

    @property
    def ids(self) -> list[int]:
        """Clip ids, ascending."""
        return list(self._where)

    @property
    def names(self) -> list[str]:
        """Names of the clips, in the order of `ids`."""
        return [self._shards[shard].names[row] for shard, row in self._where.values()]

    @property
    def labels(self) -> list[Label]:
        """Labels of the clips, in the order of `ids`: a class by name, or by number, or None."""
        return [self._shards[shard].labels[row] for shard, row in self._where.values()]

    def rows(self, name: str, ids: Iterable[int]) -> Tensor:
        """The rows [n, ...] of tensor `name` of the clips asked for, in that order.

        Each shard that is needed is read once, and checked the first time. ValueError for a clip that is not there.
        """
        ids = list(ids)
        result: Tensor | None = None
        for shard, wanted in self._places(ids).items():
            values = self._read(shard, name)
            if result is None:
                result = values.new_empty(len(ids), *values.shape[1:])
            result[[out for out, _ in wanted]] = values[[row for _, row in wanted]]
        if result is not None:
            return result
        return self._read(0, name)[:0] if self._shards else torch.zeros(0)

    def fill(self, into: Mapping[str, Tensor], ids: Iterable[int]) -> None:
        """Copy the rows of the clips asked for, in that order, into tensors [n, ...] by name, of any dtype.

        Of a shard only these rows are read: for rows of megabytes, of which few are wanted at a time. ValueError as in `rows`.
        """
        for shard, wanted in self._places(ids).items():
            self._check(shard)
            with safetensors.safe_open(str(self.folder / self._shards[shard].file), "pt") as file:
                for name, rows in into.items():
                    values = file.get_slice(name)
                    for out, row in wanted:
                        rows[out] = values[row : row + 1][0]

    def share_checks(self) -> None:
        """Let processes that are started from here on, such as a loader's workers, check a shard once between them."""
        self._sound.share_memory_()

    def iterate(self, name: str, ids: Iterable[int] | None = None) -> Iterator[tuple[int, Tensor]]:
        """(clip id, its row of tensor `name`) in the order of ids, or of those given. Rows are read when asked for."""
        opened: dict[int, Any] = {}
        for clip_id in self._where if ids is None else ids:
            number, row = self._where[clip_id]
            if number not in opened:
                self._check(number)
                while len(opened) >= 64:
                    opened.pop(next(iter(opened)))
                file = safetensors.safe_open(str(self.folder / self._shards[number].file), "pt")
                opened[number] = file.__enter__().get_slice(name)
            yield clip_id, opened[number][row : row + 1][0]

    def verify(self) -> dict[str, str]:
        """Read every shard through. Returns shard -> fault, for those that are damaged."""
        faults = dict(self.damaged)
        for number, shard in enumerate(self._shards):
            fault = shard.fault(self.folder, deep=True)
            self._sound[number] = fault is None
            if fault:
                faults[shard.file] = fault
        return faults

    def _places(self, ids: Iterable[int]) -> dict[int, list[tuple[int, int]]]:
        """By number of the shard: (place among the ids, row in the shard)."""
        places: dict[int, list[tuple[int, int]]] = {}
        for out, clip_id in enumerate(ids):
            if clip_id not in self._where:
                raise ValueError(f"{self.folder}: clip {clip_id} is not there{self._why_not(clip_id)}")
            shard, row = self._where[clip_id]
            places.setdefault(shard, []).append((out, row))
        return places

    def _read(self, number: int, name: str) -> Tensor:
        self._check(number)
        with safetensors.safe_open(str(self.folder / self._shards[number].file), "pt") as file:
            return file.get_tensor(name)

    def _check(self, number: int) -> None:
        # The size every time, since a mapped file that was cut short meanwhile would end the process.
        if fault := self._shards[number].fault(self.folder, deep=not self._sound[number]):
            raise ValueError(f"{self.folder}: {fault}; run the same command again to do its clips anew")
        self._sound[number] = True

    def _why_not(self, clip_id: int) -> str:
        if clip_id in self.failed:
            return f": it could not be read ({self.failed[clip_id][1]})"
        return f"; {'; '.join(self.damaged.values())}" if self.damaged else ""
