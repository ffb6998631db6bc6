"""An asyncio event loop for a transport: in a thread of its own, and never stuck for long.

asyncio's loops can't go on in another thread while a callback does not return, as
`Endpoint.relieve` asks of them. This one can, since between two callbacks a loop keeps all that it
knows in itself: the new thread takes it over, and the old one leaves when its callback returns.

What a transport does with it::

    loop = Loop(f"edgeml {url}")
    server = loop.start(open_server()).result()        # any coroutine, from any thread
    loop.pass_on(on_request, message, reply)           # from within the loop: what a user gave
    loop.do(write, piece)                              # from any thread: replies, requests
    loop.relieve()                                     # which is all of Endpoint.relieve
    loop.close(stop_server)                            # and most of Endpoint.close

A transport whose connections carry pieces of bytes need not know any of this: see
`edgeml.core.links`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from edgeml.core.errors import Closed
from edgeml.core.forks import leave_to_parent, watch_forks

__all__ = ["Loop"]

_log = logging.getLogger(__name__)
_MOMENT = 0.1  # seconds that a handler has to return, before a loop that closes leaves it behind

T = TypeVar("T")
_Last = Callable[[], Coroutine[Any, Any, object]]


class _Relieved(SystemExit):
    """Ends a thread whose loop another one has taken over; all else a loop would swallow."""


class _Loop(asyncio.SelectorEventLoop):
    """Run by whoever calls `carry_on`, until ``stay`` says no."""

    def carry_on(self, stay: Callable[[], bool]) -> None:
        asyncio._set_running_loop(self)
        try:
            while stay():
                self._run_once()  # type: ignore[attr-defined]
        finally:
            asyncio._set_running_loop(None)

    def end(self) -> None:
        """Cancel what is under way, and close."""
        self._run_what_is_ready()  # tasks that are just being started can be cancelled then
        tasks = asyncio.all_tasks(self)
        for task in tasks:
            task.cancel()
        if tasks:
            ending = asyncio.wait(tasks, timeout=1.0)
            last = self.create_task(ending)
            self.carry_on(lambda: not last.done())
        self._run_what_is_ready()  # transports that are just being closed are closed then
        self.close()

    def _run_what_is_ready(self) -> None:
        once = [None]
        self.call_soon(once.clear)
        self.carry_on(lambda: bool(once))


class Loop:
    """An event loop in a daemon thread, which ends with `close`. Safe to use from any thread,
    but for what says "from within the loop": in its callbacks and coroutines, and in `pass_on`'s.

    Args:
        name: the thread's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._asyncio = _Loop()
        self._asyncio.set_exception_handler(_report)
        self._inbox: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self._woken = False
        self._last: asyncio.Task[None] | None = None
        self._closing = False
        self._over = False
        self._handling = False
        self._turn = threading.RLock()  # held to do something in the loop, or to pass it on
        self._start()
        watch_forks(self)

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._ident = 0
        self._thread.start()

    def _run(self) -> None:
        me = threading.current_thread()
        with self._turn:
            self._ident = threading.get_ident()
        with suppress(_Relieved):
            self._asyncio.carry_on(lambda: not self._over)
        if self._thread is me:
            with self._turn:
                self._over = True
                self._ident = 0
            self._asyncio.end()

    @property
    def inside(self) -> bool:
        """Whether this is the thread that runs the loop."""
        return threading.get_ident() == self._ident

    def do(self, function: Callable[..., object], *arguments: Any) -> bool:
        """Call a function in the loop: at once from within it, soon from any other thread.

        Many calls wake the loop once. The function must not call what a user gave, directly or as
        a future's callback, since within the loop it is called while `relieve` has to wait.

        Returns:
            False if the loop has ended; the function is not called then.
        """
        with self._turn:
            if threading.get_ident() == self._ident:
                function(*arguments)
                return True
            if self._over:
                return False
            self._inbox.append((function, arguments))
            if not self._woken:
                self._asyncio.call_soon_threadsafe(self._empty_inbox)
                self._woken = True
        return True

    def _empty_inbox(self) -> None:
        with self._turn:
            inbox, self._inbox, self._woken = self._inbox, [], False
        for function, arguments in inbox:
            try:
                function(*arguments)
            except Exception:
                _log.exception("%s: a callback failed", self._name)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the loop; what has not ended by the end of the loop is cancelled.

        Don't wait for the future from within the loop. Coroutines take their first step in the
        order in which they were given.

        Raises:
            Closed: the loop has ended.
        """
        with self._turn:
            if not self._over:
                return asyncio.run_coroutine_threadsafe(coroutine, self._asyncio)
        coroutine.close()
        raise Closed(f"{self._name} has been closed")

    def later(self, seconds: float, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function in so many seconds, from within the loop."""
        self._asyncio.call_later(seconds, function, *arguments)

    def pass_on(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call what a user gave (``on_request``, a future's callbacks), from within the loop: next,
        and as a callback of its own, which `relieve` can leave behind.
        """
        self._asyncio.call_soon(self._handle, function, arguments)

    def _handle(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        if self._over:
            return
        me = threading.get_ident()
        self._handling = True
        try:
            function(*arguments)
        except BaseException:  # a handler's sys.exit() ends nothing here
            _log.exception("%s: what a user gave failed", self._name)
        del arguments  # or the buffers live until the next one
        with self._turn:
            if self._ident != me:
                raise _Relieved
            self._handling = False

    def relieve(self) -> None:
        """Carry on in a new thread if what was passed on runs; see `Endpoint.relieve`."""
        with self._turn:
            if self._handling:
                self._handling = False
                self._start()

    def close(self, last: _Last | None = None, patience: float = 1.0) -> None:
        """Run a last coroutine for at most ``patience`` seconds, then end the loop and its thread.

        Idempotent: only the first call's coroutine is run. From within the loop this returns at
        once, and the loop ends later. Otherwise it returns when the thread has ended; one that is
        stuck in what was passed on is left behind.
        """
        with self._turn:
            first, self._closing = not self._closing, True
        if first:
            self.do(self._finish, last, patience)
        if self.inside:
            return
        self._thread.join(_MOMENT)
        if self._thread.is_alive():
            self.relieve()
            self._thread.join(patience + 1.0)

    def _finish(self, last: _Last | None, patience: float) -> None:
        async def finish() -> None:
            try:
                if last is not None:
                    await asyncio.wait_for(last(), patience)
            except asyncio.TimeoutError:
                pass
            except Exception:
                _log.exception("%s: closing failed", self._name)
            finally:
                self._over = True

        self._last = self._asyncio.create_task(finish())

    def abandon(self) -> None:
        """Forget everything, in a forked child, where the thread is not.

        The event loop stays as it is: to close it would take from the parent's what it polls.
        """
        leave_to_parent(self._asyncio)
        self._turn = threading.RLock()  # whoever held it is not there
        self._over = True
        self._handling = False
        self._ident = 0


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    _log.error("%s", context["message"], exc_info=context.get("exception"))
