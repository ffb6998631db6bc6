"""An asyncio event loop for a transport: in a thread of its own, or carried by another.

asyncio's loops belong to a thread. This one can be carried by any, one at a time, since between two
rounds a loop keeps all that it knows in itself; `edgeml.core.carrier` says who runs it.

What a transport does with it::

    loop = Loop(f"edgeml {url}")
    server = loop.start(open_server()).result()        # any coroutine, from any thread
    loop.hand_over(on_request, message, reply)         # from within the loop
    loop.pass_on(settle, number, message)              # likewise, what may call a user's callbacks
    loop.do(write, piece)                              # from any thread: replies, requests
    loop.carry(stay); loop.wake(); loop.relieve()      # which `LoopEndpoint` passes on
    loop.close(stop_server)                            # and most of Endpoint.close

A transport whose connections carry pieces of bytes need not know any of this: see
`edgeml.core.links`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from edgeml.core.backlog import Backlog
from edgeml.core.carrier import Carrier, Left, Stay
from edgeml.core.dial import STAGGER, look_up_soon
from edgeml.core.errors import Closed
from edgeml.core.forks import drop_descriptors, leave_to_parent, watch_forks
from edgeml.core.transport import Endpoint

__all__ = ["LACKING", "Loop", "LoopEndpoint"]

_log = logging.getLogger(__name__)
LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors of accepting a connection after which asyncio tries again in a second."""

_ONCE_A = 60.0  # seconds, is such a lack told
_MOMENT = 0.1  # seconds that a callback has to return before a loop that closes leaves it behind

T = TypeVar("T")
_Last = Callable[[], Coroutine[Any, Any, object]]


def _do_nothing() -> None: ...


class _Loop(asyncio.SelectorEventLoop):
    """Run by whoever calls `carry_on`, a round at a time."""

    lack_told = float("-inf")  # when

    def __init__(self) -> None:
        super().__init__()
        self.backlog = Backlog()

    def carry_on(self, stay: Stay) -> None:
        """Run at least one round, which waits for nothing where ``stay()`` is false."""
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            self._look()
            if not stay():
                self.call_soon(_do_nothing)
            self._run_once()  # type: ignore[attr-defined]
            while stay():
                self._look()
                self._run_once()  # type: ignore[attr-defined]
        finally:
            asyncio._set_running_loop(before)

    def _look(self) -> None:
        """See whether anything is left to do, where somebody wants to know."""
        if self.backlog.measured and not (
            self._ready or self._selector.select(0)  # type: ignore[attr-defined]
        ):
            self.backlog.clear()

    async def getaddrinfo(
        self,
        host: Any,
        port: Any,
        *,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> Any:
        """As asyncio does, but in no executor: the program's end would wait for a name server."""
        return await asyncio.wrap_future(look_up_soon(host, port, family, type, proto, flags))

    async def create_connection(self, *arguments: Any, **settings: Any) -> Any:
        """As asyncio does, but an address that doesn't answer holds up no other of the host's."""
        if settings.get("sock") is None:
            settings.setdefault("happy_eyeballs_delay", STAGGER)
        return await super().create_connection(*arguments, **settings)

    async def _accept_connection2(
        self, factory: Any, conn: socket.socket, extra: Any, tls: Any, server: Any, *more: Any
    ) -> None:
        """As asyncio does, but for a connection whose server has closed meanwhile: asyncio would
        keep it open, and the peer would wait for a server that is no more.
        """
        if server.sockets:
            accept = super()._accept_connection2  # type: ignore[misc]
            await accept(factory, conn, extra, tls, server, *more)
        else:
            conn.close()

    def polled(self) -> list[int]:
        """The descriptors that it waits for."""
        return [] if self.is_closed() else list(self._selector.get_map())  # type: ignore[attr-defined]

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
        # What was to close a connection may have been cancelled before its first step. Others have
        # been closed behind what they sent, and are only still referred to.
        for transport in list(self._transports.values()):  # type: ignore[attr-defined]
            if transport._loop is not None:
                transport.abort()
        self._run_what_is_ready()  # transports that are just being closed are closed then
        self.close()

    def _run_what_is_ready(self) -> None:
        self.carry_on(lambda: False)


class Loop:
    """An event loop in a daemon thread, which ends with `close`. Safe to use from any thread,
    but for what says "from within the loop": in its callbacks and coroutines.

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
        self._finished = False
        self._in_callback = False
        self._carrier = Carrier(name, self._run_rounds, self._wake, self._asyncio.end)
        self._carrier.start()
        watch_forks(self)

    def _run_rounds(self, stay: Stay) -> bool:
        self._asyncio.carry_on(lambda: not self._finished and stay())
        return self._finished

    def _wake(self) -> None:
        self._asyncio.call_soon_threadsafe(_do_nothing)

    @property
    def inside(self) -> bool:
        """Whether this is the thread that runs the loop."""
        return self._carrier.here

    def carry(self, stay: Stay) -> bool:
        """Run the loop in the calling thread; see `Endpoint.carry`."""
        return self._carrier.carry(stay)

    def wake(self) -> None:
        """See `Endpoint.wake`."""
        self._carrier.wake()

    def relieve(self) -> None:
        """See `Endpoint.relieve`."""
        self._carrier.relieve()

    @property
    def behind(self) -> float:
        """See `Endpoint.behind`."""
        return self._asyncio.backlog.seconds

    def do(self, function: Callable[..., object], *arguments: Any) -> bool:
        """Call a function in the loop: at once from within it, soon from any other thread.

        Many calls wake the loop once. The function must not call what a user gave, directly or as
        a future's callback, since within the loop it is called while `relieve` has to wait.

        Returns:
            False if the loop has ended; the function is not called then.
        """
        with self._carrier.turn:
            if self._finished or self._carrier.over:
                return False
            if self._carrier.here:
                function(*arguments)
                return True
            self._inbox.append((function, arguments))
            if not self._woken:
                self._asyncio.call_soon_threadsafe(self._empty_inbox)
                self._woken = True
            self._carrier.relieve()
        return True

    def _empty_inbox(self) -> None:
        with self._carrier.turn:
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
        with self._carrier.turn:
            if not (self._finished or self._carrier.over):
                future = asyncio.run_coroutine_threadsafe(coroutine, self._asyncio)
                if not self._carrier.here:
                    self._carrier.relieve()
                return future
        coroutine.close()
        raise Closed(f"{self._name} has been closed")

    def later(self, seconds: float, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function in so many seconds, from within the loop."""
        self._asyncio.call_later(seconds, function, *arguments)

    def hand_over(self, on_request: Callable[..., object], *arguments: Any) -> None:
        """Give a request to ``on_request``, from within the loop, which outlives what that does."""
        if not self._finished:
            self._carrier.hand_over(on_request, *arguments)

    def pass_on(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call what may call a user's callbacks, from within the loop: next, and as a callback of
        its own, which `strand` can leave behind.
        """
        self._asyncio.call_soon(self._handle, function, arguments)

    def _handle(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        if self._finished:
            return
        self._in_callback = True
        try:
            function(*arguments)
        except BaseException:  # a callback's sys.exit() ends nothing here
            _log.exception("%s: what a user gave failed", self._name)
        del arguments  # or the buffers live until the next one
        with self._carrier.turn:
            if not self._carrier.here:
                raise Left
            self._in_callback = False

    def strand(self) -> None:
        """Go on in a fresh thread, if this one is in a callback that was passed on.

        For a callback that waits for what the loop brings, or that does not return.
        """
        with self._carrier.turn:
            if self._in_callback:
                self._in_callback = False
                self._carrier.strand()

    def close(self, last: _Last | None = None, patience: float = 1.0) -> None:
        """Run a last coroutine for at most ``patience`` seconds, then end the loop and its thread.

        Idempotent: only the first call's coroutine is run. From within the loop this returns at
        once, and the loop ends later. Otherwise it returns when the thread has ended.
        """
        with self._carrier.turn:
            first, self._closing = not self._closing, True
            if not self._carrier.in_round:
                self._carrier.relieve()  # whoever calls this carries it no more
            if first:
                self.do(self._finish, last, patience)
        if not self._carrier.wait(_MOMENT):
            if not self._carrier.in_round:
                self.strand()
            self._carrier.wait(patience + 2.0)

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
                self._finished = True

        self._last = self._asyncio.create_task(finish())

    def abandon(self) -> None:
        """Forget everything, in a forked child, where the thread is not.

        The event loop stays as it is: to close it would take from the parent's what it polls. Only
        the sockets that it polls are let go of.
        """
        leave_to_parent(self._asyncio)
        drop_descriptors(self._asyncio.polled())
        self._carrier.abandon()
        self._finished = True


class LoopEndpoint(Endpoint):
    """An end whose loop, which it has as ``_loop``, is carried as `Endpoint.carry` says."""

    _loop: Loop

    @property
    def behind(self) -> float:
        """See `Endpoint.behind`."""
        return self._loop.behind

    def carry(self, stay: Stay) -> bool:
        """See `Endpoint.carry`."""
        return self._loop.carry(stay)

    def wake(self) -> None:
        """See `Endpoint.wake`."""
        self._loop.wake()

    def relieve(self) -> None:
        """See `Endpoint.relieve`."""
        self._loop.relieve()


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    if isinstance(loop, _Loop) and isinstance(error, OSError) and error.errno in LACKING:
        if loop.time() - loop.lack_told > _ONCE_A:
            loop.lack_told = loop.time()
            _log.error("%s: %s; told once a minute", context["message"], error)
        return
    _log.error("%s", context["message"], exc_info=error)
