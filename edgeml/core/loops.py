"""An asyncio event loop for a transport: in a thread of its own, and never stuck for long.

asyncio's loops can't go on in another thread while a callback does not return, as
`Endpoint.relieve` asks of them. This one can, since between two callbacks a loop keeps all that it
knows in itself: the new thread takes it over, and the old one leaves when its callback returns.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from edgeml.core.message import Message
from edgeml.core.transport import OnRequest, Reply

__all__ = ["Loop"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


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


class Loop:
    """An event loop in a daemon thread, which ends with `close`.

    Args:
        name: the thread's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._asyncio = _Loop()
        self._asyncio.set_exception_handler(_report)
        self._inbox: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self._woken = False
        self._over = False
        self._handling = False
        self._turn = threading.RLock()  # held to do something in the loop, or to pass it on
        self._start()
        _all.add(self)

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._ident = 0
        self._thread.start()

    def _run(self) -> None:
        me = threading.current_thread()
        with self._turn:
            self._ident = threading.get_ident()
        try:
            self._asyncio.carry_on(lambda: not self._over)
        except _Relieved:
            return
        finally:
            if self._thread is me:
                self._end()

    def _end(self) -> None:
        with self._turn:
            self._over = True
            self._ident = 0
            self._inbox.clear()
        tasks = asyncio.all_tasks(self._asyncio)
        for task in tasks:
            task.cancel()
        if tasks:
            gathered = asyncio.gather(*tasks, return_exceptions=True)
            self._asyncio.carry_on(lambda: not gathered.done())
        self._asyncio.close()

    @property
    def inside(self) -> bool:
        """Whether this is the thread that runs the loop."""
        return threading.get_ident() == self._ident

    def do(self, function: Callable[..., object], *arguments: Any) -> bool:
        """Call a function in the loop: at once from within it, soon from any other thread.

        Many calls wake the loop once. False if the loop has ended.
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
        """Run a coroutine in the loop, from another thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._asyncio)

    def later(self, seconds: float, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function in so many seconds, from within the loop."""
        self._asyncio.call_later(seconds, function, *arguments)

    def pass_on(self, on_request: OnRequest, message: Message, reply: Reply) -> None:
        """Give a request to ``on_request``, from within the loop: next, and as a callback of its
        own, which `relieve` can leave behind.
        """
        self._asyncio.call_soon(self._handle, on_request, message, reply)

    def _handle(self, on_request: OnRequest, message: Message, reply: Reply) -> None:
        me = threading.get_ident()
        self._handling = True
        try:
            on_request(message, reply)
        except BaseException:  # a handler's sys.exit() ends nothing here
            _log.exception("%s: on_request failed", self._name)
        with self._turn:
            if self._ident != me:
                raise _Relieved
            self._handling = False

    def relieve(self) -> None:
        """Carry on in a new thread if ``on_request`` is running; see `Endpoint.relieve`."""
        with self._turn:
            if self._handling:
                self._handling = False
                self._start()

    def close(self, last: Callable[[], Coroutine[Any, Any, object]], patience: float = 1.0) -> None:
        """Run a last coroutine, and end the loop. Allowed from any thread, the loop's own included:
        it then ends when the callback returns.
        """

        async def finish() -> None:
            try:
                await last()
            finally:
                self._over = True

        self.do(lambda: self._asyncio.create_task(finish()))
        if self.inside:
            return
        self._thread.join(patience)
        if self._thread.is_alive() and self._handling:
            self.relieve()
            self._thread.join(patience)


    def forked(self) -> None:
        """Forget everything, in a forked child, where the thread is not."""
        self._turn = threading.RLock()  # whoever held it is not there
        self._over = True
        self._handling = False
        self._ident = 0


_all: weakref.WeakSet[Loop] = weakref.WeakSet()


def _forked() -> None:
    for loop in list(_all):
        loop.forked()


os.register_at_fork(after_in_child=_forked)


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    _log.error("%s", context["message"], exc_info=context.get("exception"))
