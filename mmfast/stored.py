"""What a folder of shards holds of clips, whatever was computed of them."""

import os

from .shards import Label, ShardReader


class StoredClips:
    """Clips of a folder whose results are called `what`, in the order of their ids. ValueError for a folder of anything else."""

    what: str

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._reader = ShardReader(folder)
        self.settings = self._reader.settings
        if self.settings.get("what") != self.what:
            raise ValueError(f"{folder}: holds {self.settings.get('what')}, not {self.what}")

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._reader)

    def __contains__(self, clip_id: int) -> bool:
        return clip_id in self._reader

    @property
    def ids(self) -> list[int]:
        """Clip ids, ascending."""
        return self._reader.ids

    @property
    def names(self) -> list[str]:
        """Names of the clips, in the order of `ids`."""
        return self._reader.names

    @property
    def labels(self) -> list[Label]:
        """Classes of the clips in the order of `ids`: by name, or by number where there are no names, or None."""
        return self._reader.labels

    @property
    def failed(self) -> dict[int, tuple[str, str]]:
        """Clips that could not be read: id -> (name, reason)."""
        return self._reader.failed

    @property
    def damaged(self) -> dict[str, str]:
        """Shards whose files are gone or cut short: name -> fault."""
        return self._reader.damaged

    def verify(self) -> dict[str, str]:
        """Read every shard through and compare with its sha256. Returns shard -> fault, for those that are damaged."""
        return self._reader.verify()
