"""The thread of a logger: it encodes steps and writes episodes, so that a control loop need not."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeml.core.errors import Closed, DeadlineExceeded
from edgeml.core.forks import watch_forks
from edgeml.data.rlds.directory import FEATURES, Shards, write_whole
from edgeml.data.rlds.example import encode_example
from edgeml.data.rlds.layout import Layout, Step

__all__ = ["EpisodeWriter"]

_log = logging.getLogger(__name__)

_PATIENCE = 600.0  # seconds without a step or an episode done: longer than any disk takes
_TELL_EVERY = 60.0  # seconds between two warnings that it can't keep up


class EpisodeWriter:
    """Takes the steps of episodes, and writes each episode when it has ended, in their order.

    What can't be done is kept, and the error raised by the next method that is called. The one
    after that has it tried again; nothing else is done before it has succeeded.

    It refers to nothing of its logger's, so that one can be forgotten.

    Args:
        directory: of the dataset.
        shards: of the dataset, closed when the thread ends.
        layout: of its episodes.
        most: bytes of steps that may wait; whoever has more waits. One step is always taken.

    Attributes:
        turn: is held by whoever calls the logger.
        abandoned: whether this is a forked child, and the thread in its parent.
    """

    def __init__(self, directory: Path, shards: Shards, layout: Layout, most: int) -> None:
        self.turn = threading.RLock()
        self.abandoned = False
        self._directory, self._shards, self._layout, self._most = directory, shards, layout, most
        self._changed = threading.Condition()
        self._jobs: deque[tuple[Step | None, int]] = deque()  # and bytes; None ends the episode
        self._bytes = 0  # of those
        self._done = 0  # jobs
        self._error: BaseException | None = None  # of the first job, which is tried no more
        self._told = False  # somebody has been, of that error
        self._closing = False
        self._forgotten = False  # nobody will ask for errors
        self._waits, self._waited, self._told_at = 0, 0.0, 0.0
        # The thread's own: the steps of the episode under way, as they are held.
        self._rows: list[tuple[list[Any], list[Any]]] = []
        self._last: Step | None = None
        # Started now: when the interpreter ends, it is too late.
        self._thread = threading.Thread(target=self._run, name="edgeml rlds", daemon=True)
        self._thread.start()
        _writers.add(self)
        watch_forks(self)

    @property
    def closed(self) -> bool:
        """Whether nothing more is taken."""
        return self._closing or self.abandoned

    def check(self) -> None:
        """Raise what prevents more from being taken.

        Raises:
            ValueError: it is closed.
            Closed: this is a forked child.
            BaseException: of an earlier step or episode, which is kept.
        """
        self.check_process()
        with self._changed:
            if self._closing:
                raise ValueError("the logger is closed")
            if self._error is not None and self._told:
                self._error = None
                self._changed.notify_all()
                self._wait_until_done(self._done + 1)
            self._raise_error()

    def check_process(self) -> None:
        """Raise `Closed` in a forked child."""
        if self.abandoned:
            raise Closed(
                f"the logger of {self._directory} belongs to the process before the fork: "
                "make one in this process, of another directory"
            )

    def put(self, step: Step, nbytes: int) -> None:
        """Take a step; waits while too many do.

        Raises:
            BaseException: see `check`; the step is not taken then.
            DeadlineExceeded: it took too long.
        """
        with self._changed:
            waited = self._wait_for_room(nbytes)
            self._append(step, nbytes)
        if waited:
            self._tell(waited)

    def end_episode(self) -> None:
        """End the episode under way, if it has a step, and wait until it is on the disk.

        Raises:
            BaseException: it could not be written, but is kept.
            DeadlineExceeded: it took too long; it is written when that is possible.
        """
        with self._changed:
            self._append(None, 0)
            self._wait_until_done(self._done + len(self._jobs))

    def close(self) -> None:
        """End the episode under way, and the thread; may be called again.

        Raises:
            BaseException: what was left could not be written.
            DeadlineExceeded: it took too long.
        """
        if self.abandoned:
            return
        self._begin_to_close()
        with self._changed:
            self._wait(lambda: self._shards.closed)
        self._thread.join(_PATIENCE)
        with self._changed:
            self._raise_error()

    def forget(self) -> None:
        """Close without waiting, as nobody will call any more; errors are logged."""
        if self.abandoned:
            return
        self._forgotten = True
        self._begin_to_close()

    def abandon(self) -> None:
        """Leave all to the parent of this process, whose thread goes on."""
        self._changed = threading.Condition()  # another thread may have held it
        self.abandoned = True
        self._jobs.clear()
        self._rows.clear()
        self._shards.abandon()

    def stats(self) -> dict[str, float]:
        """Return counts: see `RLDSLogger.stats`."""
        with self._changed:
            return {
                "waiting_steps": sum(step is not None for step, _ in self._jobs),
                "waiting_bytes": self._bytes,
                "waits": self._waits,
                "waited": self._waited,
            }

    # Under the lock -------------------------------------------------------------------------

    def _append(self, step: Step | None, nbytes: int) -> None:
        self._jobs.append((step, nbytes))
        self._bytes += nbytes
        self._changed.notify_all()

    def _begin_to_close(self) -> None:
        with self._changed:
            if not self._closing:
                self._closing = True
                self._error = None  # whatever it was is tried once more
                self._append(None, 0)

    def _raise_error(self) -> None:
        if self._error is not None and not self._told:
            self._told = True
            raise self._error

    def _wait_for_room(self, nbytes: int) -> float:
        """Wait until a step may be taken, and return for how many seconds."""

        def is_room() -> bool:
            return not self._bytes or self._bytes + nbytes <= self._most

        if is_room():
            return 0.0
        begun = time.monotonic()
        self._wait(lambda: is_room() or self._error is not None)
        self._raise_error()
        waited = time.monotonic() - begun
        self._waits += 1
        self._waited += waited
        return waited

    def _wait_until_done(self, number: int) -> None:
        self._wait(lambda: self._done >= number or self._error is not None)
        self._raise_error()

    def _wait(self, holds: Callable[[], bool]) -> None:
        done, deadline = self._done, time.monotonic() + _PATIENCE
        while not holds():
            if self._done != done:
                done, deadline = self._done, time.monotonic() + _PATIENCE
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded(
                    f"nothing was written to {self._directory} for {_PATIENCE:g} s; does the disk "
                    "answer? What was logged is kept, and written when it does"
                )
            self._changed.wait(left)

    # Not under the lock: handlers of logging have locks of their own -------------------------

    def _tell(self, waited: float) -> None:
        now = time.monotonic()
        if self._waits > 1 and now - self._told_at < _TELL_EVERY:
            return
        self._told_at = now
        _log.warning(
            "the logger of %s can't keep up: a step has waited %.3f s to be taken, as %.0f MB are "
            "still to be encoded and written; so far %d have waited, %.1f s in all",
            self._directory,
            waited,
            self._bytes / 1e6,
            self._waits,
            self._waited,
        )

    # The thread's ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                try:
                    self._do(job[0])
                except BaseException as error:  # whatever it is, somebody else is to know
                    self._fail(error)
                    del error
                else:
                    with self._changed:
                        self._jobs.popleft()
                        # All of it if there is none: Ctrl-C may have come amid `_append`.
                        self._bytes -= job[1] if self._jobs else self._bytes
                        self._done += 1
                        self._changed.notify_all()
                del job  # or its arrays live until the next one
        finally:
            with self._changed:
                self._shards.close()
                self._changed.notify_all()

    def _next(self) -> tuple[Step | None, int] | None:
        """Wait for a job, and return it; None if there will be no more."""
        with self._changed:
            while self._error is not None or not self._jobs:
                if self._closing:
                    return None
                self._changed.wait()
            return self._jobs[0]

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error, self._told = error, self._forgotten
            self._changed.notify_all()
        if self._forgotten:
            what = "the logger of %s was not closed, and what it had left could not be written"
            _log.error(what, self._directory, exc_info=error)

    def _do(self, step: Step | None) -> None:
        if step is not None:
            self._rows.append(self._layout.pack(step))
            self._last = step
            return
        if not self._rows:
            return
        assert self._last is not None
        path = self._directory / FEATURES
        episodes = self._shards.episodes
        if not path.exists():
            write_whole(path, self._layout.encode())
        try:
            self._shards.append(encode_example(self._layout.join(self._rows, self._last)))
        finally:  # also if something came after it was counted
            if self._shards.episodes > episodes:
                self._rows, self._last = [], None


_writers: weakref.WeakSet[EpisodeWriter] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Write what loggers have left that nobody has closed."""
    writers = [writer for writer in _writers if not writer.abandoned]
    for writer in writers:
        writer.forget()
    for writer in writers:
        try:
            writer.close()
        except BaseException as error:
            _log.error("%s", error)
