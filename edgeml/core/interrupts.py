"""Ctrl-C that isn't lost: Python drops an exception that is raised where an object is freed."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["insisting"]

_AGAIN = 0.2  # seconds


@contextmanager
def insisting(waits: Callable[[], bool]) -> Iterator[None]:
    """Within the block, raise the KeyboardInterrupt of a Ctrl-C again until it has been heard.

    A signal's handler runs wherever the main thread is, and pyzmq for one looks for signals as it
    frees a frame: what is raised there is printed, and forgotten.

    Args:
        waits: whether the main thread is where it may go on forever, and where nothing of the
            user's is disturbed by another one.

    In other threads, and beside a handler that the program has set, this does nothing.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    main = _thread.get_ident()
    over = False
    insists = False

    def insist() -> None:
        while not over:
            time.sleep(_AGAIN)
            if not over and waits():
                signal.pthread_kill(main, signal.SIGINT)

    def interrupt(number: int, frame: object) -> None:
        nonlocal insists
        if over:  # sent just before
            return
        if not insists:
            insists = True
            _thread.start_new_thread(insist, ())  # `Thread` takes locks that may be held here
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        over = True
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
