"""When an actor uploads: when told to, every so often, and at the end."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

from edgeml.core.client import Client
from edgeml.core.deadline import Deadline
from edgeml.core.ending import run_at_end
from edgeml.core.errors import Closed, EdgemlError, Overloaded
from edgeml.core.forks import watch_forks
from edgeml.data import DataStoreBase
from edgeml.services.trainer.uploader import Delivered, OnRefused, Uploader

__all__ = ["Updates"]

_log = logging.getLogger(__name__)

_LAST_UPDATE = 2.0  # seconds that stopping may spend on what hasn't been sent
_MOMENT = 0.5  # seconds that it waits for threads, whose calls have been given up
_MOST_WAITING = 1 << 12  # asynchronous updates


class _Asked(NamedTuple):
    """An update that somebody has a future of."""

    future: Future[Delivered]
    timeout: float | None
    on_refused: OnRefused


class Updates:
    """Sends what is in a client's stores. It knows nothing of the object that the user holds.

    Args:
        name: the client's, for the log.
        client: by which items are sent; closed by `close`.
        stores: by the learner's names for them.
        incarnation: of the client.
    """

    def __init__(
        self, name: str, client: Client, stores: Mapping[str, DataStoreBase], incarnation: int
    ) -> None:
        self._name = name
        self._client = client
        self._uploaders = [Uploader(n, store, client, incarnation) for n, store in stores.items()]
        self._turn = threading.Lock()
        self._stopping = threading.Event()
        self._closed = threading.Event()
        self._closer = 0  # the thread that closes
        self._beginning = threading.Lock()  # to close
        self._thread: threading.Thread | None = None  # of updates every so often
        self._asked: deque[_Asked] = deque()  # that wait for their turn
        self._asking = threading.Lock()  # for changes of these, and of their thread
        self._answering: threading.Thread | None = None  # which ends when none wait
        self._forget_end: Callable[[], None] = lambda: None
        self._failure = ""  # of the last update, if it failed
        watch_forks(self)

    def count(self) -> dict[str, dict[str, Any]]:
        """Tell of each store what became of its items."""
        return {uploader.name: uploader.count() for uploader in self._uploaders}

    def update(self, timeout: float | None, on_refused: OnRefused = "skip") -> Delivered:
        """See `TrainerClient.update`."""
        with self._turn:
            return self._update(timeout, on_refused)

    def update_later(self, timeout: float | None, on_refused: OnRefused) -> Future[Delivered]:
        """See `TrainerClient.update_async`."""
        asked = _Asked(Future(), timeout, on_refused)
        with self._asking:
            if self._stopping.is_set():
                raise Closed("this client has been closed")
            if len(self._asked) >= _MOST_WAITING:
                raise Overloaded(f"{_MOST_WAITING} updates wait for their turn already")
            self._asked.append(asked)
            if self._answering is None:
                thread = threading.Thread(
                    target=self._answer_asked, name="edgeml updates asked for", daemon=True
                )
                thread.start()
                self._answering = thread
        return asked.future

    def _answer_asked(self) -> None:
        while True:
            with self._asking:
                if not self._asked:
                    self._answering = None
                    return
                asked = self._asked.popleft()
            if not asked.future.set_running_or_notify_cancel():
                continue
            try:
                arrived = self.update(asked.timeout, asked.on_refused)
            except BaseException as error:
                asked.future.set_exception(error)
            else:
                asked.future.set_result(arrived)
            del asked  # the future may refer to a lot

    def _update(
        self,
        timeout: float | None,
        on_refused: OnRefused = "skip",
        deadline: Deadline | None = None,
        one_by_one: bool = False,
    ) -> Delivered:
        try:
            each = [
                uploader.update(timeout, on_refused, deadline, one_by_one)
                for uploader in self._uploaders
            ]
        except BaseException as error:
            self._failure = str(error) or type(error).__name__
            raise
        self._failure = ""
        return Delivered(sum(one.applied for one in each), sum(one.durable for one in each))

    def start(self, interval: float) -> None:
        """See `TrainerClient.start_async_update`."""
        if not interval > 0:
            raise ValueError(f"interval must be positive, not {interval}")
        if self._thread is not None:
            raise RuntimeError("updates are running already")
        self._thread = threading.Thread(
            target=self._keep_updating, args=(interval,), name="edgeml updates", daemon=True
        )
        self._thread.start()
        self._forget_end = run_at_end(self.end)

    def _keep_updating(self, interval: float) -> None:
        failures = 0
        while not self._stopping.wait(interval):
            try:
                self.update(None)
                if failures:
                    _log.warning("updates of %r go on after %d failures", self._name, failures)
                failures = 0
            except Exception as error:  # of a user's own store, too
                failures += 1
                if failures == 1 and not self._stopping.is_set():
                    known = isinstance(error, EdgemlError)
                    text = "an update of %r failed, and will be repeated: %s"
                    _log.warning(text, self._name, error, exc_info=not known)

    def end(self) -> None:
        """Do as `close`, at the end of the program, when Python 3.12 lets no thread be started.

        What is under way at the same time needs threads of some transports; blocking calls need
        none. A connection that was lost is lost, since a new one has a thread.
        """
        self.close(one_by_one=True)

    def close(self, one_by_one: bool = False) -> None:
        """Send what is left, if `start` was called, say what isn't, and close the client.

        Whoever calls this second waits for the first.
        """
        me = threading.get_ident()
        with self._beginning:
            first = not self._stopping.is_set()
            if first:
                self._stopping.set()
                self._closer = me
        if first:
            try:
                self._finish(one_by_one)
            finally:
                self._closed.set()
        elif me != self._closer:  # or it would wait for itself
            self._closed.wait(_LAST_UPDATE + 2 * _MOMENT)

    def _finish(self, one_by_one: bool) -> None:
        me = threading.current_thread()
        with self._asking:
            waiting = [each for each in self._asked if each.future.set_running_or_notify_cancel()]
            self._asked.clear()
            answering = self._answering
        thread = self._thread
        if thread is me:  # by a store, or a handler of the log
            thread = None
        try:
            if thread is not None or waiting:
                self._update_at_last(one_by_one, waiting)
        finally:
            self._tell_unsent()
            for uploader in self._uploaders:
                uploader.close()
            self._client.close()
            deadline = Deadline(_MOMENT)
            for each in (thread, answering):
                if each is not None and each is not me:
                    each.join(deadline.left)
            self._forget_end()  # only now, since the program may end meanwhile

    def _update_at_last(self, one_by_one: bool, waiting: list[_Asked]) -> None:
        """Send what is left; it is the update of those that wait for one."""
        deadline = Deadline(_LAST_UPDATE)
        arrived = Delivered(0, 0)
        failure: Exception | None = None
        if self._turn.acquire(timeout=_LAST_UPDATE):
            try:
                arrived = self._update(None, "skip", deadline, one_by_one)
            except Exception as error:
                failure = error
                if not isinstance(error, EdgemlError):
                    _log.warning("the last update of %r failed", self._name, exc_info=True)
            finally:
                self._turn.release()
        else:
            failure = Closed("this client has been closed")
        for each in waiting:
            if failure is None:
                each.future.set_result(arrived)
                arrived = Delivered(0, 0)  # all of it has been told
            else:
                each.future.set_exception(failure)

    def _tell_unsent(self) -> None:
        unsent = sum(uploader.unsent for uploader in self._uploaders)
        if not unsent:
            return
        why = self._failure or "update() was not called for them"
        if self._turn.locked():
            why = "an update is under way, and gets no answer in time"
        text = "up to %d items of %r were not sent, or not known to have arrived: %s"
        _log.warning(text, unsent, self._name, why)

    def abandon(self) -> None:
        """Leave all of it to the parent, in a forked child."""
        # As nobody gives them back.
        self._turn, self._beginning, self._asking = (threading.Lock() for _ in range(3))
        self._thread = self._answering = None
        self._asked.clear()
        self._stopping.set()
        self._closed.set()
