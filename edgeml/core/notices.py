"""Telling users of what happened: their functions are called in a thread of the library's."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

__all__ = ["Notices"]

_log = logging.getLogger(__name__)


class Notices:
    """Calls functions one after another, in the order given, in a thread that lives meanwhile.

    Whoever tells holds up nothing by it, so it may be done anywhere. An exception is logged.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._untold: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False

    def tell(self, function: Callable[..., object] | None, *arguments: Any) -> None:
        """Have a function called soon; None for nobody who is to be told."""
        if function is None:
            return
        with self._lock:
            if self._closed:
                return
            self._untold.append((function, arguments))
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                with suppress(RuntimeError):  # no more, as the program ends
                    thread.start()
                    self._thread = thread

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._untold:
                    self._thread = None
                    return
                function, arguments = self._untold.popleft()
            try:
                function(*arguments)
            except Exception:
                _log.exception("%s: %s failed", self._name, function)
            del function, arguments

    def close(self, timeout: float = 1.0) -> None:
        """Tell nothing more, and wait for a function that runs, unless this is called from it."""
        with self._lock:
            self._closed = True
            self._untold.clear()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
