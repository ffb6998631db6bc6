"""A dataset's directory: which files hold how many episodes, and how that is written safely.

`dataset_info.json` says how many episodes each shard (a TFRecord file) holds, and what it doesn't
count isn't there. It is replaced as a whole, after the episode is on the disk.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeml.core.errors import ConfigMismatch, Malformed
from edgeml.data.files import KEPT, explain_errors, replace
from edgeml.data.rlds.tfrecord import FRAMING, frame_record, is_torn, read_records

__all__ = ["FEATURES", "INFO", "Shards", "Split", "read_splits", "write_whole"]

_log = logging.getLogger(__name__)

INFO = "dataset_info.json"
FEATURES = "features.json"
_MODULE = "edgeml.data.rlds"
_SPLIT = "train"
# tfds's own template has the number of shards in every name, so that one more would rename all.
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"
_TFDS_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_MOST = 99_999  # shards; with more tfds expects six digits in the names of all
_KEPT = (
    "the episodes logged before are as they were, and the one that was to be written is kept until "
    "the logger is closed: the next call tries again"
)
_DAMAGED = (
    "Nothing was changed. Move the directory away, to log into a new one and read what is whole "
    "in the old one; or restore it from a backup"
)


@dataclass(frozen=True)
class Split:
    """One of the splits of a dataset, such as "train".

    Attributes:
        shards: for each file, its path and how many examples of it count.
    """

    name: str
    shards: list[tuple[Path, int]]

    def read(self) -> Iterator[tuple[Path, int, bytes]]:
        """Yield the path, offset and data of each record that counts.

        Raises:
            FileNotFoundError: a shard is missing.
            Malformed: a shard has fewer records than it should, or damaged ones.
        """
        for path, count in self.shards:
            found = 0
            if count:
                for offset, data in read_records(path):
                    yield path, offset, data
                    found += 1
                    if found == count:
                        break
            if found < count:
                raise Malformed(f"{path} has {found} episodes, but {INFO} counts {count}")


def read_splits(directory: Path) -> dict[str, Split]:
    """Return the splits of a dataset by their names.

    Raises:
        FileNotFoundError: there is no dataset.
        Malformed: `dataset_info.json` is not what tfds writes.
        TypeError: the dataset is not kept as TFRecords.
    """
    path = directory / INFO
    try:
        info = json.loads(path.read_bytes())
        kept = info.get("fileFormat", "tfrecord")
        found = [_read_split(directory, info["name"], part) for part in info.get("splits", [])]
        by_name = {split.name: split for split in found}
    except FileNotFoundError:
        if not directory.is_dir():
            raise FileNotFoundError(
                f"no dataset in {directory}: there is no such directory"
            ) from None
        raise FileNotFoundError(
            f"no dataset in {directory}: it has no {INFO}, which is written with the first episode"
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Malformed(f"{path}: not what tensorflow_datasets writes: {error!r}") from None
    if kept != "tfrecord":
        raise TypeError(f"{path}: files of the format {kept!r} are not read, only tfrecord")
    return by_name


def _read_split(directory: Path, dataset: str, part: Any) -> Split:
    counts = [int(count) for count in part.get("shardLengths", [])]
    if any(count < 0 for count in counts):
        raise ValueError("a negative number of examples")
    total = len(counts)
    template = part.get("filepathTemplate") or _TFDS_TEMPLATE
    digits = max(5, len(str(total)))
    shards = []
    for index, count in enumerate(counts):
        fields = {
            "DATASET": dataset,
            "SPLIT": part["name"],
            "FILEFORMAT": "tfrecord",
            "SHARD_INDEX": f"{index:0{digits}}",
            "NUM_SHARDS": f"{total:0{digits}}",
            "SHARD_X_OF_Y": f"{index:0{digits}}-of-{total:0{digits}}",
        }
        # Not by str.format, whose templates can reach into objects.
        name = re.sub(r"\{(\w+)\}", lambda match, fields=fields: fields[match[1]], template)
        if name.startswith("/") or ".." in Path(name).parts:
            raise ValueError(f"the shard {name} would not be in the dataset's directory")
        shards.append((directory / name, count))
    return Split(part["name"], shards)


class Shards:
    """The episodes of a directory that is being written, by one process at a time.

    What a crash has left behind is put right when the directory is opened: whole episodes that
    are not counted yet are counted, and one that was being written is cut off, with a warning.
    Anything else that is not as it was written is left as it is, and raises.

    Args:
        directory: made if need be.
        name: the dataset's.
        max_shard_bytes: a shard that would become larger is left, and a new one begun.

    Raises:
        BlockingIOError: someone else has it open.
        ConfigMismatch: it has a dataset of another name, or one that wasn't written by this class.
        FileNotFoundError: a shard is missing.
        Malformed: it has fewer episodes than are counted, or a damaged one, as far as is looked:
            from the last shard that is counted on.
    """

    def __init__(self, directory: Path, name: str, max_shard_bytes: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._name, self._max = directory, name, max_shard_bytes
        self._fd = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._counts = self._read_counts()
            self._sizes = [0] * len(self._counts)
            self._recover()
        except BlockingIOError as error:
            os.close(self._fd)
            raise BlockingIOError(
                error.errno, f"another logger is writing to {directory}; close it first"
            ) from None
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def episodes(self) -> int:
        """How many there are."""
        return sum(self._counts)

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._fd < 0

    def close(self) -> None:
        """Let others open the directory; may be called twice."""
        if self._fd >= 0:
            # Closing would do, unless a process that was forked meanwhile has it open, too.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            self.abandon()

    def abandon(self) -> None:
        """Close it in a forked child, whose parent goes on to have it open."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def append(self, data: bytes) -> None:
        """Add one episode. When this returns it is on the disk, and counted.

        Raises:
            OSError: it could not be written; what was there before is as it was. The text names the
                file, and what was needed.
            ValueError: there are as many shards as tfds can number.
        """
        if self.closed:
            raise ValueError("it is closed")
        index = max(0, len(self._counts) - 1)
        size = self._sizes[index] if self._sizes else 0
        if size and size + len(data) + FRAMING > self._max:
            index, size = index + 1, 0
        if index >= _MOST:
            raise ValueError(f"{_MOST} shards is all that fit; give a larger max_shard_bytes")
        path = self._path(index)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            counts = [*self._counts[:index], *(self._counts[index:] or [0])]
            sizes = [*self._sizes[:index], *(self._sizes[index:] or [0])]
            try:
                with explain_errors(path, len(data) + FRAMING, _KEPT):
                    os.ftruncate(fd, size)  # should what is below have been interrupted, too
                    os.lseek(fd, size, os.SEEK_SET)
                    for piece in frame_record(data):
                        _write(fd, piece)
                    os.fsync(fd)
                counts[index] += 1
                sizes[index] = size + len(data) + FRAMING
                self._commit(counts, sizes)
            finally:  # not only in the end: Ctrl-C most likely comes in a sync
                if self._read_counts() == counts:
                    self._counts, self._sizes = counts, sizes
                else:
                    os.ftruncate(fd, size)
        finally:
            os.close(fd)

    def _path(self, index: int) -> Path:
        return self._directory / f"{self._name}-{_SPLIT}.tfrecord-{index:05}"

    def _read_counts(self) -> list[int]:
        path = self._directory / INFO
        if not path.exists():
            return []
        info = read_splits(self._directory)
        content = json.loads(path.read_bytes())
        if content.get("moduleName") != _MODULE or list(info) != [_SPLIT]:
            raise ConfigMismatch(f"{self._directory} has a dataset that was not logged by edgeml")
        if content["name"] != self._name:
            raise ConfigMismatch(
                f"the dataset in {self._directory} is named {content['name']!r}, not {self._name!r}"
            )
        return [count for _, count in info[_SPLIT].shards]

    def _recover(self) -> None:
        """Find out how long the shards are, and put right what a crash may have left.

        As an episode is on the disk before the next is begun, that is no more than a torn record
        at the end of the last shard. Nothing is changed before all else is found to be whole.
        """
        counts, sizes = list(self._counts), list(self._sizes)
        first = max(0, len(counts) - 1)
        for index in range(first):
            sizes[index] = self._path(index).stat().st_size  # complete before the next was begun
        total = max(len(counts), self._count_files())
        torn = 0
        for index in range(first, total):
            path, last = self._path(index), index == total - 1
            counted = counts[index] if index < len(counts) else 0
            if not path.exists():
                why = f"{INFO} counts it" if index < len(counts) else "there are later ones"
                raise FileNotFoundError(f"{path} is missing, but {why}. {_DAMAGED}")
            count, size = 0, 0
            try:
                for offset, data in read_records(path):
                    count, size = count + 1, offset + len(data) + FRAMING
            except Malformed as error:
                if count < counted or not last or not is_torn(path, size):
                    raise Malformed(f"{error}. {_DAMAGED}") from None
                torn = path.stat().st_size - size
            least = counted if last else max(counted, 1)
            if count < least:
                raise Malformed(f"{path} has {count} episodes, but it had {least}. {_DAMAGED}")
            if count:  # or a crash came before anything was in it
                counts[index:], sizes[index:] = [count], [size]
        if torn:
            _log.warning(
                "%s: cut off %d bytes at its end, of an episode whose writing a crash broke off",
                path,
                torn,
            )
            os.truncate(path, size)
        if counts != self._counts:
            self._commit(counts, sizes)
        self._counts, self._sizes = counts, sizes

    def _count_files(self) -> int:
        """Return how many shards there are, by the last one's name."""
        prefix = self._path(0).name.removesuffix("00000")
        found = [path.name.removeprefix(prefix) for path in self._directory.glob(f"{prefix}*")]
        # Not those of tfds, which end in "-of-00001".
        return max((int(name) + 1 for name in found if re.fullmatch(r"[0-9]{5}", name)), default=0)

    def _commit(self, counts: list[int], sizes: list[int]) -> None:
        split = {
            "name": _SPLIT,
            "filepathTemplate": _TEMPLATE,
            "shardLengths": [str(count) for count in counts],
            "numBytes": str(sum(sizes)),
        }
        info = {
            "name": self._name,
            "version": "1.0.0",
            "fileFormat": "tfrecord",
            "moduleName": _MODULE,
            "splits": [split],
        }
        write_whole(self._directory / INFO, json.dumps(info, indent=2).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that, whatever happens, either the old one or the new one is there."""
    # This also puts the name of a new shard beside it on the disk.
    with replace(path) as fd, explain_errors(path, len(content), KEPT):
        _write(fd, content)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
