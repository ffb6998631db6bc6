"""The clients of the three pairs for asyncio: what they ask is awaited.

They have the names, the settings and the methods of `edgeml.ActionClient`, `edgeml.InferenceClient`
and `edgeml.TrainerClient`, and stand on these: the same threads, connections and promises. What
takes time is a coroutine, and what a server publishes is an async iterator.

    async with edgeml.aio.InferenceClient(url="zmq://gpu:5557") as client:
        action = await client.call("policy", observation)

Cancelling the task that awaits a call gives the call up, as its deadline does. A client may be used
from several event loops, and outlives each.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    TypeVar,
    overload,
)

import numpy as np

from edgeml import services
from edgeml.core.client import Timing
from edgeml.core.errors import Closed
from edgeml.core.state import ServerState
from edgeml.core.streams import Subscription as _Subscription
from edgeml.services.base import ServiceClient
from edgeml.services.trainer.uploader import Delivered, OnRefused

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ActionClient", "InferenceClient", "Lease", "Subscription", "TrainerClient"]

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=ServiceClient)

_Followed = _Subscription | services.Recording
_Subscribe = Callable[[Callable[[Any], None]], _Followed]
"""Has a function called with what is published."""

_NOTHING = object()


# From threads to a loop ---------------------------------------------------------------------


def _in_thread(function: Callable[[], R]) -> Future[R]:
    """Run what may block in a thread of its own; a loop's executor could be full, or awaited."""
    future: Future[R] = Future()
    future.set_running_or_notify_cancel()  # so that nobody can cancel it

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="edgeml aio", daemon=True).start()
    return future


class _Waiter:
    """A task that waits to be woken by a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken: asyncio.Future[None] = self._loop.create_future()

    def wake(self, _: object = None) -> None:
        """From any thread; a loop that was closed meanwhile has nobody to be woken."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)

    def __await__(self) -> Generator[Any, None, None]:
        return self._woken.__await__()


async def _result(future: Future[R]) -> R:
    """Await a future of a thread's; to cancel this is to cancel that."""
    waiter = _Waiter()
    future.add_done_callback(waiter.wake)
    try:
        await waiter
    except asyncio.CancelledError:
        future.cancel()
        raise
    return future.result()


# Subscriptions ------------------------------------------------------------------------------


class _Handover:
    """What a subscription's thread has for a task, one value at a time.

    The thread waits until the next one is asked for, just as it waits for a function that takes its
    time. So a slow task skips what a slow function would, gets the newest as it does, and there is
    never more than one value here. It must not refer to the subscription that users have.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._value: object = _NOTHING
        self._waiter: _Waiter | None = None
        self.ended = False

    def give(self, value: Any) -> None:
        """Have a value taken, and return when the next one is asked for."""
        with self._changed:
            if self.ended:
                return
            self._value = value
            if self._waiter is not None:
                self._waiter.wake()
            # Without a deadline, as a task may take its time; `end` ends it.
            self._changed.wait_for(
                lambda: self.ended or (self._value is _NOTHING and self._waiter is not None)
            )

    async def take(self) -> Any:
        """Wait for a value and take it; raises StopAsyncIteration at the end."""
        with self._changed:
            if self._waiter is not None:
                raise RuntimeError("another task waits for this; make a subscription for each")
            waiter = None
            if self._value is _NOTHING and not self.ended:
                waiter = self._waiter = _Waiter()
                self._changed.notify()
        if waiter is not None:
            try:
                await waiter
            finally:
                self._waiter = None
        with self._changed:
            if self.ended:
                raise StopAsyncIteration
            value, self._value = self._value, _NOTHING
        return value

    def end(self) -> None:
        with self._changed:
            self.ended = True
            self._value = _NOTHING
            self._changed.notify()
            if self._waiter is not None:
                self._waiter.wake()


def _begin(subscribe: _Subscribe, handover: _Handover, made: list[_Followed]) -> None:
    made.append(subscribe(handover.give))
    if handover.ended:  # meanwhile
        made[0].end()


def _end(handover: _Handover, made: list[_Followed]) -> None:
    handover.end()
    for subscription in made:
        subscription.end()


class Subscription:
    """What a server publishes, as an async iterator: the current value at once.

    While the task is busy with one value, what is published meanwhile is skipped and counted,
    unless the server keeps it, and the next one that the task gets is the newest. So nothing piles
    up. It goes on when the server is restarted, and ends with `stop`, its ``async with`` block, or
    its client. One that is dropped ends as well.
    """

    def __init__(self, client: _Client[Any], subscribe: _Subscribe) -> None:
        self._client = client  # kept as long as somebody iterates over this
        self._handover = _Handover()
        self._made: list[_Followed] = []  # it, once there is one
        self._begin = functools.partial(_begin, subscribe, self._handover, self._made)
        self._beginning: Future[None] | None = None
        self._end = weakref.finalize(self, _end, self._handover, self._made)
        self._end.atexit = False  # the end of the program ends its threads

    async def _begun(self) -> None:
        if self._beginning is None:
            self._beginning = _in_thread(self._begin)
        try:
            await _result(self._beginning)
        except Exception:
            self._beginning = None  # so that it can be tried again
            raise

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """Wait for the next value.

        Raises:
            UnknownInterface: the server publishes no such thing.
            Unreachable: nobody serves there.
        """
        await self._begun()
        return await self._handover.take()

    async def __aenter__(self) -> Self:
        await self._begun()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it, and with it whoever iterates over it; quick and idempotent."""
        self._end()

    @property
    def version(self) -> tuple[int, int]:
        """``(epoch, number)`` of the newest publication received; ``(0, 0)`` before any."""
        return self._made[0].version if self._made else (0, 0)

    @property
    def received(self) -> int:
        """Publications that were received."""
        return self._made[0].received if self._made else 0

    @property
    def missed(self) -> int:
        """Publications that were skipped since the first one received."""
        return self._made[0].missed if self._made else 0


# Clients ------------------------------------------------------------------------------------


class _Connecting(Generic[C]):
    """A client that a thread makes, unless it is given up."""

    def __init__(self, make: Callable[..., C]) -> None:
        self._given_up = False
        self._close: Callable[[], None] = lambda: None
        self.future = _in_thread(lambda: make(on_connecting=self._on_connecting))

    def _on_connecting(self, close: Callable[[], None]) -> None:
        self._close = close
        if self._given_up:
            close()

    def give_up(self) -> None:
        """Make no client, or stop it; returns at once."""
        self._given_up = True
        _in_thread(self._close)
        self.future.add_done_callback(_stop_made)


def _stop_made(done: Future[C]) -> None:
    if done.exception() is None:
        _in_thread(done.result().stop)


def _takes_what(
    kind: Callable[P, C],
) -> Callable[[Callable[[Any, Callable[..., C]], None]], Callable[Concatenate[Any, P], None]]:
    """Have a constructor take what another class's does; it is given what calls that."""

    def decorate(
        init: Callable[[Any, Callable[..., C]], None],
    ) -> Callable[Concatenate[Any, P], None]:
        def construct(self: Any, /, *args: P.args, **settings: P.kwargs) -> None:
            init(self, functools.partial(kind, *args, **settings))

        functools.update_wrapper(construct, kind.__init__)  # for its signature
        return construct

    return decorate


class _Client(Generic[C]):
    """What the three clients have in common; an async context manager that connects and stops."""

    def __init__(self, make: Callable[..., C]) -> None:
        self._make = make
        self._connecting: _Connecting[C] | None = None
        self._stopped = False
        self._subscriptions: weakref.WeakSet[Subscription] = weakref.WeakSet()

    async def connect(self) -> Self:
        """Connect, which ``async with`` does as well, and return this client.

        Cancelling it gives it up.

        Raises:
            What the constructor of the client of the same name in `edgeml` raises.
        """
        if self._stopped:
            raise Closed("this client has been stopped")
        if self._connecting is None:
            self._connecting = _Connecting(self._make)
        connecting = self._connecting
        try:
            await _result(connecting.future)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                connecting.give_up()
            if self._connecting is connecting:
                self._connecting = None  # so that it can be tried again
            raise
        return self

    async def stop(self) -> None:
        """Close the connection, end every subscription and every thread; idempotent.

        What is under way raises Closed. A cancelled one goes on without its task.
        """
        self._stopped = True
        for subscription in list(self._subscriptions):
            subscription.stop()
        connecting = self._connecting
        if connecting is None:
            return
        if not connecting.future.done():
            connecting.give_up()
        elif connecting.future.exception() is None:
            await _result(_in_thread(connecting.future.result().stop))

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    @property
    def _sync(self) -> C:
        """The client that it stands on."""
        if self._connecting is None or not self._connecting.future.done():
            raise Closed("this client isn't connected; use `async with`, or await its connect()")
        return self._connecting.future.result()

    def _subscription(self, subscribe: _Subscribe) -> Subscription:
        if self._stopped:
            raise Closed("this client has been stopped")
        made = Subscription(self, subscribe)
        self._subscriptions.add(made)
        return made

    @property
    def client_id(self) -> str:
        """This client's identity."""
        return self._sync.client_id

    async def state(self, timeout: float | None = None) -> ServerState:
        """Ask the server what it is at; see `edgeml.ServerState`."""
        sync = self._sync
        return await _result(_in_thread(lambda: sync.state(timeout)))

    def stats(self) -> dict[str, Any]:
        """Counts since the start, as those of the client of the same name in `edgeml`."""
        return self._sync.stats()

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """An array to be filled and sent; see `edgeml.ActionClient.empty`."""
        return self._sync.empty(shape, dtype)


class ActionClient(_Client[services.ActionClient]):
    """`edgeml.ActionClient` for asyncio; it takes the same, and connects when it is told to."""

    @_takes_what(services.ActionClient)
    def __init__(self, make: Callable[..., services.ActionClient]) -> None:
        super().__init__(make)

    async def obs(self, keys: Sequence[str] | None = None, timeout: float | None = None) -> Any:
        """Return the observations of these names, or all; see `edgeml.ActionClient.obs`."""
        return await _result(self._sync.obs_async(keys, timeout))

    async def observe(
        self, keys: Sequence[str] | None = None, timeout: float | None = None
    ) -> services.Observation:
        """Return observations with their id; see `edgeml.ActionClient.observe`."""
        return await _result(self._sync.observe_async(keys, timeout))

    async def act(
        self,
        key: str,
        payload: Any = None,
        timeout: float | None = None,
        *,
        observation: int | None = None,
        age: float = 0.0,
        valid: float | None = None,
        policy: str | None = None,
    ) -> Any:
        """Carry out an action, and return what it gives; see `edgeml.ActionClient.act`.

        A call that is given up may have been carried out all the same.
        """
        said: dict[str, Any] = {"observation": observation, "age": age, "valid": valid}
        return await _result(self._sync.act_async(key, payload, timeout, policy=policy, **said))

    def lease(
        self, key: str, *, priority: int = 0, ttl: float = 1.0, wait: float | None = None
    ) -> Lease:
        """Ask for the right to act on a key alone: ``async with client.lease("arm") as lease``.

        It takes what `edgeml.ActionClient.lease` does, and entering it raises what that raises.
        """
        sync = self._sync
        return Lease(lambda: sync.lease(key, priority=priority, ttl=ttl, wait=0), wait)

    def observations(self) -> Subscription:
        """What the device publishes, as an async iterator; see `Subscription`."""
        return self._subscription(self._sync.register_obs_callback)

    def stamped_observations(self) -> Subscription:
        """What the device publishes, each as an `edgeml.Observation`, which has its id."""
        sync = self._sync

        def subscribe(function: Callable[[Any], None]) -> _Subscription:
            def receive(values: Any, observation_id: int) -> None:
                function(services.Observation(values, observation_id))

            return sync.register_obs_callback(receive)

        return self._subscription(subscribe)

    def executed(self) -> Subscription:
        """What the device has carried out, as an async iterator of `edgeml.Executed`.

        First what it has on record now, and then each action once it is over. None is skipped: a
        task that is busy gets them later, as long as the device keeps them.
        """
        return self._subscription(self._sync.register_executed_callback)


class Lease:
    """The right to act on one key, alone; to be entered with ``async with``, and left to give back.

    See `edgeml.ActionClient.lease`, and `ActionClient.lease` here.
    """

    def __init__(self, ask: Callable[[], services.Lease], wait: float | None) -> None:
        self._ask = ask
        self._wait = wait
        self._lease: services.Lease | None = None

    @property
    def held(self) -> bool:
        """Whether this client has it now, as far as it knows; the device decides."""
        return self._lease is not None and self._lease.held

    @property
    def since(self) -> int:
        """Counts how many times it was had, from 1; 0 before the first."""
        return 0 if self._lease is None else self._lease.since

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is held, and return whether it is; see `edgeml.Lease.wait`."""
        if self._lease is None:
            raise Closed("this lease wasn't asked for; use `async with`")
        lease = self._lease
        return await _result(_in_thread(lambda: lease.wait(timeout)))

    async def release(self) -> None:
        """Give it back, and ask for it no more; idempotent."""
        if self._lease is not None:
            await _result(_in_thread(self._lease.release))

    async def __aenter__(self) -> Self:
        lease = self._lease = self._ask()
        try:
            if self._wait is None or self._wait > 0:
                await _result(_in_thread(lambda: lease.require(self._wait)))
        except BaseException:
            await self.release()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.release()


class InferenceClient(_Client[services.InferenceClient]):
    """`edgeml.InferenceClient` for asyncio; it takes the same, and connects when it is told to."""

    @_takes_what(services.InferenceClient)
    def __init__(self, make: Callable[..., services.InferenceClient]) -> None:
        super().__init__(make)

    async def interfaces(self) -> list[str]:
        """The names that can be called, sorted."""
        return await _result(_in_thread(self._sync.interfaces))

    async def contract(self, name: str) -> services.PolicyContract | None:
        """Return what an interface takes and gives; see `edgeml.InferenceClient.contract`."""
        sync = self._sync
        return await _result(_in_thread(lambda: sync.contract(name)))

    async def reset(self, episode: str | None = None, timeout: float | None = None) -> str:
        """Begin an episode; see `edgeml.InferenceClient.reset`."""
        return await _result(self._sync.reset_async(episode, timeout))

    @overload
    async def call(
        self,
        name: str,
        payload: Any,
        timeout: float | None = None,
        *,
        timing: Literal[False] = False,
    ) -> Any: ...

    @overload
    async def call(
        self, name: str, payload: Any, timeout: float | None = None, *, timing: Literal[True]
    ) -> tuple[Any, Timing]: ...

    async def call(
        self, name: str, payload: Any, timeout: float | None = None, *, timing: bool = False
    ) -> Any:
        """Call a function of the server; see `edgeml.InferenceClient.call`.

        The payload's arrays may be changed once this waits.
        """
        future = self._sync.call_async(name, payload, timeout)
        result = await _result(future)
        return (result, future.timing) if timing else result  # type: ignore[attr-defined]


class TrainerClient(_Client[services.TrainerClient]):
    """`edgeml.TrainerClient` for asyncio; it takes the same, and connects when it is told to."""

    @_takes_what(services.TrainerClient)
    def __init__(self, make: Callable[..., services.TrainerClient]) -> None:
        super().__init__(make)

    @property
    def lost(self) -> int:
        """Items that a store had overwritten before they could be sent."""
        return self._sync.lost

    async def update(
        self, timeout: float | None = None, on_refused: OnRefused = "skip"
    ) -> Delivered:
        """Send what the learner doesn't have yet; see `edgeml.TrainerClient.update`.

        An update that is under way goes on when its task is cancelled.
        """
        return await _result(self._sync.update_async(timeout, on_refused))

    def start_async_update(self, interval: float = 10) -> None:
        """Update every so often; see `edgeml.TrainerClient.start_async_update`."""
        self._sync.start_async_update(interval)

    async def request(self, type: str, payload: Any = None, timeout: float | None = None) -> Any:
        """Ask the learner something; see `edgeml.TrainerClient.request`."""
        return await _result(self._sync.request_async(type, payload, timeout))

    def networks(self) -> Subscription:
        """The weights that the learner publishes, as an async iterator; see `Subscription`."""
        return self._subscription(self._sync.recv_network_callback)
