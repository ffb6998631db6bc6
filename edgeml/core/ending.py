"""What is still to be done when the program ends, by whatever of the ways that can be noticed.

SIGTERM, which `docker stop`, systemd and `kill` send, and SIGHUP, of a terminal that is closed, end
a Python program on the spot, and nothing that it holds is sent or written. So as long as something
is to be done at the end they raise KeyboardInterrupt in the main thread, as Ctrl-C does. A handler
that the program has set, or sets later, is left alone; so is a signal that it ignores (`nohup`).
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable

__all__ = ["run_at_end", "tell_left_behind"]

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

_lock = threading.Lock()
_pending: list[_Task] = []


def tell_left_behind(log: logging.Logger, what: str, seconds: float, thread: int) -> None:
    """Warn of what a user gave that doesn't return, and of where it is, as nobody waits for it.

    Args:
        log: of whoever has waited.
        what: it is.
        seconds: since when it runs.
        thread: by its ident.
    """
    frame = sys._current_frames().get(thread)
    where = "".join(traceback.format_stack(frame)).rstrip()
    text = "%s is still running after %.1f s, and is left behind, where it is at:\n%s"
    log.warning(text, what, seconds, where)


class _Task:
    """Something to do at the end, which can be cancelled."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._cancel_finalizer: Callable[[], object] = lambda: None
        self._done = False
        atexit.register(self._run)
        process = sys.modules.get("multiprocessing.process")
        if process is not None and process.parent_process() is not None:
            # A child of multiprocessing ends without atexit, before Python 3.13.
            from multiprocessing.util import Finalize

            self._cancel_finalizer = Finalize(None, self._run, exitpriority=100).cancel

    def cancel(self) -> None:
        with _lock:
            if self not in _pending:
                return
            _pending.remove(self)
            self._forget()
            if not _pending:
                _leave_signals()

    def _run(self) -> None:
        if not self._done:
            self._done = True
            self._function()

    def _forget(self) -> None:
        atexit.unregister(self._run)
        self._cancel_finalizer()


def run_at_end(function: Callable[[], object]) -> Callable[[], None]:
    """Call a function when the program ends, and have SIGTERM and SIGHUP end it as Ctrl-C does.

    Not called when it is killed, crashes or leaves by `os._exit`, nor in a process that is forked
    from this one. In a thread other than the main one the signals are left as they are, since
    Python lets only that one change them.

    Args:
        function: what to call, in the main thread. It must start no thread: Python 3.12 doesn't
            let it.

    Returns:
        What to call when that isn't needed any more.
    """
    with _lock:
        task = _Task(function)
        _pending.append(task)
        _take_signals()
    return task.cancel


def _interrupt(number: int, frame: object) -> None:
    if _pending:
        raise KeyboardInterrupt(signal.Signals(number).name)
    # What there was has been cancelled in another thread, which can't leave the signals.
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def _take_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _interrupt)


def _leave_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is _interrupt:
                signal.signal(number, signal.SIG_DFL)


# A forked child leaves all of it to its parent, or it would be done twice, and signals end it as
# they would have. One that is sent to it meanwhile waits, for an exception would be lost in these.


class _Mask(threading.local):
    before: set[signal.Signals | int] | None = None


_mask = _Mask()


def _before_fork() -> None:
    if _pending:
        _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _in_parent() -> None:
    if _mask.before is not None:
        before, _mask.before = _mask.before, None
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_child() -> None:
    global _lock
    _lock = threading.Lock()  # whoever held it is not there
    for task in _pending:
        task._forget()
    _pending.clear()
    _leave_signals()
    _in_parent()


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
