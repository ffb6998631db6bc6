"""Files that are replaced as a whole."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["replace"]


@contextmanager
def replace(path: Path) -> Iterator[int]:
    """Open a new file that replaces the one at ``path`` unless the block raises.

    Whatever happens (a full disk, an exception, a kill, the power), there is the old file or the
    new one, all of it on the disk. Until then the new one is ``.NAME.tmp`` beside it; what a killed
    process leaves of that, the next one to replace the same file takes over.

    Yields:
        the descriptor to write to.

    Raises:
        BlockingIOError: somebody else is replacing it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    fd = _open_alone(temporary)
    try:
        try:
            yield fd
            os.fsync(fd)
            os.replace(temporary, path)
            _sync_names(path.parent)
        except BaseException:
            if _is_at(fd, temporary):
                os.unlink(temporary)
            raise
    finally:
        # Closing would do, unless a process that was forked meanwhile has the file open too.
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _open_alone(temporary: Path) -> int:
    """Open a file, empty, that nobody else writes to; one that a killed process left will do."""
    while True:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                why = "another save to the same path is under way"
                raise BlockingIOError(errno.EAGAIN, why, str(temporary)) from None
            except OSError:  # a file system without locks
                pass
            if _is_at(fd, temporary):
                os.ftruncate(fd, 0)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # it was renamed by one who had it locked, while we waited


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _sync_names(directory: Path) -> None:
    """See the names of a directory on the disk, those of new files in it among them."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
