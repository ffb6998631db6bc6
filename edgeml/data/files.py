"""Files that are replaced as a whole, and what errors of writing say."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["KEPT", "explain_errors", "lock_directory", "replace", "sync_names"]

KEPT = "the file that was there, if any, is as it was"
"""What `explain_errors` says of a file that is being replaced."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def explain_errors(path: Path, needed: int, kept: str) -> Iterator[None]:
    """Have the system's errors in a block that writes say which file, and what is left.

    Args:
        path: of the file.
        needed: bytes that it is to have more, or at least, told where there is no room.
        kept: says what is there all the same.
    """
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        if error.errno in _FULL:
            what += f": at least {needed:,} bytes are needed"
        raise OSError(error.errno, f"{what}; {kept}", str(path)) from error


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
        FileNotFoundError, NotADirectoryError: its directory is none; the text names it.
        OSError: what the system says; the text names the file and says that the old one is intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    fd = _open_alone(temporary)
    try:
        try:
            yield fd
            with explain_errors(path, os.fstat(fd).st_size, KEPT):
                os.fsync(fd)
                os.replace(temporary, path)
                sync_names(path.parent)
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
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except (FileNotFoundError, NotADirectoryError) as error:
            what = "No such directory, make it first"
            raise OSError(error.errno, what, str(temporary.parent)) from None
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


@contextmanager
def lock_directory(directory: Path, taken: str) -> Iterator[int]:
    """Have a directory alone, which is made if need be, by the file ``lock`` in it.

    Args:
        directory: which.
        taken: says who has it, if somebody has.

    Yields:
        the descriptor of that file, which a forked child must let go of.

    Raises:
        BlockingIOError: somebody else has it, in this process or another.
        OSError: what the system says.
    """
    with explain_errors(directory, 0, "choose a directory that can be written to"):
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            why = f"{taken}, in this process or another: close it first"
            raise BlockingIOError(errno.EAGAIN, why, str(directory)) from None
        except OSError:  # a file system without locks
            pass
        yield fd
    finally:
        # Closing would do, unless a process that was forked meanwhile has the file open too.
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def sync_names(directory: Path) -> None:
    """See the names of a directory on the disk, those of new files in it among them."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
