"""The files of a log, and the thread that has the disk follow. It knows no items."""

from __future__ import annotations

import atexit
import errno
import logging
import math
import os
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from edgeml.core.errors import Closed, DeadlineExceeded
from edgeml.core.forks import drop_descriptors, watch_forks
from edgeml.data.files import lock_directory, sync_names
from edgeml.data.segments import RESET, STATE, Segment

__all__ = ["LogWriter", "Sync"]

_log = logging.getLogger(__name__)
_sync = getattr(os, "fdatasync", os.fsync)  # macOS has the latter alone

_SIZES = (8 << 20, 1 << 20)  # bytes of a segment; the latter where there is no room for more
_NEVER = 1 << 62  # an id that no item has
_RETRY = 1.0  # seconds until the disk is tried again, where it failed
_LAST_SYNC = 10.0  # seconds that closing may wait for the disk
_KEPT = (
    "nothing was inserted, and all that was before is in the log: free some space, or let the "
    "learner take what is there, and insert it again"
)


@dataclass(frozen=True, slots=True)
class Sync:
    """When a log has the disk follow, in the background: at the first of these.

    Until then what was inserted is in the system's memory: it survives the end of the process by
    whatever means, but not the loss of power.

    Args:
        seconds: so long after an item came (default 1).
        items: when so many have come; 1 is for each, where one wait for the disk is for all that
            came during the one before. None (default): whatever their number.
    """

    seconds: float = 1.0
    items: int | None = None

    def __post_init__(self) -> None:
        if not self.seconds > 0 or (self.items is not None and self.items < 1):
            raise ValueError(
                f"a log syncs after so many seconds, or items, above 0, not {self.seconds} and "
                f"{self.items}"
            )


class LogWriter:
    """Keeps the files of a log, and has the disk follow.

    Args:
        directory: of the files.
        sync: when the disk follows.

    Attributes:
        latest: id of the newest item.
        synced: id up to which items are on the disk.
        wake_at: id from which on `wake` must be called for an item that was appended.
        segment: that records are appended to.
        next_number: of a segment.
        state: what each segment begins with.
        failure: of the disk, until it works again: its number and text.
    """

    segment: Segment

    def __init__(self, directory: Path, sync: Sync) -> None:
        self.latest = self.synced = 0
        self.wake_at = 1
        self.next_number = 1
        self.state = b""
        self.failure: tuple[int, str] | None = None
        self._directory, self._sync = directory, sync
        self._changed = threading.Condition()
        self._due = math.inf
        self._doomed: list[Segment] = []
        self._unsynced: list[Segment] = []  # beside the one that is appended to
        self._spare: Segment | None = None
        self._wants_spare = self._ending = self._closed = self._forked = False
        self._attempts = 0  # that failed
        self._renamed = False  # whether files were deleted, which may not be on the disk
        self._thread: threading.Thread | None = None
        taken = "another store keeps its log there"
        self._held = ExitStack()
        self._lock = self._held.enter_context(lock_directory(directory, taken))

    def start(self) -> None:
        """Have the disk follow from now on."""
        self.synced = self.latest
        self.wake_at = self.latest + 1
        watch_forks(self)
        atexit.register(self.close)
        self._thread = threading.Thread(target=self._run, name="edgeml log", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise if nothing can be appended."""
        self.check_open()
        if self.failure is not None:
            raise self.explain_failure()

    def explain_failure(self) -> OSError:
        """Return the error of the disk."""
        assert self.failure is not None
        number, what = self.failure
        text = (
            f"{what}; the disk doesn't take what is in the log already, and nothing was inserted: "
            "see to the disk, and insert it again, or close this and choose another directory"
        )
        return OSError(number, text, str(self._directory))

    def check_open(self) -> None:
        """Raise if it can't be used."""
        if self._forked:
            raise Closed(f"the log {self._directory} belongs to the process before the fork")
        if self._closed or self._ending:
            raise Closed(f"the log {self._directory} has been closed")

    def rotate(self, size: int, *, reset_to: int | None = None) -> Segment:
        """Have room for so many bytes of records; returns the segment, a new one if need be."""
        segment: Segment | None = getattr(self, "segment", None)
        if segment is not None and reset_to is None and segment.room < segment.size > 0:
            segment.room = segment.size  # the second half
            with self._changed:
                self._wants_spare = True
                self._changed.notify_all()
            if segment.has_room(size):
                return segment
        size += Segment.first + 2 * Segment.measure(len(self.state))
        with self._changed:
            new, self._spare = self._spare, None
            self._wants_spare = False
        if new is not None and (
            new.size < size or (segment is not None and new.number < segment.number)
        ):
            self.doom(new)
            new = None
        if new is None:
            sizes = sorted({max(size, each) for each in (*_SIZES, size)}, reverse=True)
            new = Segment.create(self._directory, self._take_number(), sizes, _KEPT)
        if segment is not None:
            with self._changed:
                self._unsynced.append(segment)
        if size < new.size // 2:
            new.room = new.size // 2
        self.segment = new
        if reset_to is not None:
            with self._changed:
                self.latest = self.synced = reset_to - 1
                self.wake_at = reset_to
        self.append_state(RESET if reset_to is not None else 0)
        return new

    def append_state(self, flags: int) -> None:
        """Append the state; twice, as damage may hit one."""
        state = self.state
        for _ in range(2):
            self.segment.append(STATE, self.latest + 1, 0, flags, (state,), len(state))

    def doom(self, segment: Segment) -> None:
        """Have a segment deleted."""
        with self._changed:
            self._doomed.append(segment)
            if segment in self._unsynced:
                self._unsynced.remove(segment)
            self._changed.notify_all()

    def delete_doomed(self) -> None:
        """Delete what is doomed."""
        while True:
            with self._changed:
                if not self._doomed:
                    return
                path = self._doomed.pop(0).path  # nothing refers to it then, and its space is free
                self._renamed = True
            with suppress(OSError):
                os.unlink(path)

    def wake(self) -> None:
        """Notice that items have come."""
        with self._changed:
            unsynced = self.latest - self.synced
            most = self._sync.items
            if most is not None and unsynced >= most:
                self._due = 0.0
                self.wake_at = _NEVER
            else:
                if self._due == math.inf:
                    self._due = time.monotonic() + self._sync.seconds
                self.wake_at = _NEVER if most is None else self.synced + most
            self._changed.notify_all()

    def wait_synced(self, timeout: float) -> None:
        """Wait until all items there are now are on the disk."""
        target = self.latest
        deadline = time.monotonic() + timeout
        with self._changed:
            attempts = self._attempts
            while self.synced < target:
                if self.failure is not None and self._attempts > attempts:
                    raise self.explain_failure()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded(f"the disk has not followed in {timeout} s")
                self._due = 0.0
                self._changed.notify_all()
                self._changed.wait(left)

    def end(self) -> None:
        """Let the thread finish: it sees all on the disk, and lets go of the directory."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    def close(self) -> None:
        """End, and wait for it."""
        if self._forked:
            return
        self.end()
        if self._thread is None:
            self._let_go()
        elif self._thread is not threading.current_thread():
            self._thread.join(_LAST_SYNC)

    def abandon(self) -> None:
        """Leave it to the parent, in a forked child."""
        self._forked = True
        self._changed = threading.Condition()
        self.segment.room = 0
        segments = [self.segment, *self._unsynced, *self._doomed]
        if self._spare is not None:
            segments.append(self._spare)
        drop_descriptors([self._lock, *(segment.fd for segment in segments)])

    # In the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._ending or self._doomed or self._wants_spare):
                    left = self._due - time.monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(None if left == math.inf else left)
                ending, wants_spare = self._ending, self._wants_spare
                self._wants_spare = False
                due = time.monotonic() >= self._due
            self.delete_doomed()
            if wants_spare and not ending:
                self._make_spare()
            if due or ending:
                self.sync_now()
            if ending:
                self._let_go()
                return

    def sync_now(self) -> None:
        """See all that there is on the disk."""
        with self._changed:
            self._due = math.inf
            self.wake_at = _NEVER
            target = self.latest
            segments = [*self._unsynced, self.segment]
        ends = [segment.end for segment in segments]
        try:
            if self._renamed or not all(segment.named for segment in segments):
                self._renamed = False
                sync_names(self._directory)
            for segment, end in zip(segments, ends, strict=True):
                if self.failure is not None:
                    segment.rewrite()
                _sync(segment.fd)
                segment.unsynced, segment.named = end, True
        except OSError as error:
            self._fail(error)
            return
        with self._changed:
            if self.failure is not None:
                _log.warning("the disk under the log %s works again", self._directory)
                self.failure = None
                self.segment.room = self.segment.size
            self._unsynced = [each for each in self._unsynced if each not in segments]
            self.synced = max(self.synced, min(target, self.latest))
            self.wake_at = self.synced + 1
            self._changed.notify_all()
        if self.latest > self.synced:
            self.wake()

    def _fail(self, error: OSError) -> None:
        what = error.strerror or str(error)
        if self.failure is None:
            _log.warning("the disk under the log %s fails: %s", self._directory, what)
        with self._changed:
            self.failure = (error.errno or errno.EIO, what)
            self._attempts += 1
            self.segment.room = min(self.segment.room, self.segment.end)
            self._due = time.monotonic() + _RETRY
            self._changed.notify_all()

    def _make_spare(self) -> None:
        with suppress(OSError):  # the insert that needs it says so
            spare = Segment.create(self._directory, self._take_number(), _SIZES[:1], _KEPT)
            with self._changed:
                self._spare = spare

    def _take_number(self) -> int:
        with self._changed:
            self.next_number += 1
            return self.next_number - 1

    def _let_go(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            atexit.unregister(self.close)
            segment: Segment | None = getattr(self, "segment", None)
            if segment is not None:
                segment.unmap()
            self._unsynced.clear()
            self._doomed.clear()
            spare, self._spare = self._spare, None
        if spare is not None:
            with suppress(OSError):
                os.unlink(spare.path)
        self._held.close()
