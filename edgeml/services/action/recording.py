"""Following what a device carries out, from afar."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from edgeml.core.client import Client
from edgeml.core.ending import tell_left_behind
from edgeml.core.errors import Closed, EdgemlError
from edgeml.services.action.record import Executed, read_part

__all__ = ["Recording"]

_log = logging.getLogger(__name__)

_PAUSE = 0.2  # seconds between two looks


class Recording:
    """Calls a function with each action that a device has carried out, once it is over.

    It runs in a thread of its own, and asks the device five times a second. What ended in the
    meantime is kept there, so that none is lost while the connection is, but what the device keeps
    no longer, which is counted.

    Attributes:
        version: a number of this start of the device, and how many actions had ended when the
            newest that is known did.
        received: actions given to the function.
        missed: actions that the device no longer had when it was asked.
        errors: exceptions that the function raised; they are logged.
    """

    def __init__(self, client: Client, function: Callable[[Executed], object]) -> None:
        self.received = 0
        self.missed = 0
        self.errors = 0
        self._client = client
        self._function = function
        self.version = (0, 0)
        self._entered = 0.0  # when, while it runs
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edgeml recording", daemon=True)
        self._news: list[Executed] = self._ask()  # raises here what is wrong
        self._thread.start()

    def _ask(self) -> list[Executed]:
        part = read_part(self._client.call("executed", list(self.version)))
        if self.version[0] not in (0, part.started):
            _log.warning("the device was started anew; what it did last before isn't known")
        self.version = (part.started, part.ended)
        self.missed += part.missed
        if part.missed:
            _log.warning("%d actions are not recorded: the device keeps fewer", part.missed)
        return part.entries

    def _run(self) -> None:
        told = ""
        while not self._closed.is_set():
            for each in self._news:
                if self._closed.is_set():
                    return
                self._tell(each)
            pause = 0.0 if self._news else _PAUSE
            self._news = []
            self._closed.wait(pause)
            try:
                self._news = self._ask()
                told = ""
            except EdgemlError as error:
                if isinstance(error, Closed) and self._client.closed:
                    return
                if told != (told := str(error)):
                    _log.warning("what the device does is not recorded just now: %s", error)
                self._closed.wait(_PAUSE)

    def _tell(self, each: Executed) -> None:
        self.received += 1
        self._entered = time.monotonic()
        try:
            self._function(each)
        except BaseException:  # its sys.exit() ends nothing here
            _log.exception("the recorder's function failed")
            self.errors += 1
        finally:
            self._entered = 0.0

    def end(self) -> None:
        """Stop calling the function, without waiting for one that runs."""
        self._closed.set()

    def close(self) -> None:
        """Stop calling the function; idempotent. Waits for one that runs, up to a second."""
        self.end()
        if self._thread is threading.current_thread() or self._thread.ident is None:
            return
        self._thread.join(1.0)
        if self._thread.is_alive() and (since := self._entered):
            what = "the recorder's function"
            tell_left_behind(_log, what, time.monotonic() - since, self._thread.ident)
