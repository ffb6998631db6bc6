"""Batches drawn ahead, in the background, while the one before is being used."""

from __future__ import annotations

import atexit
import functools
import queue
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeAlias, TypeVar

from edgeml.core.errors import Closed
from edgeml.core.forks import watch_forks
from edgeml.core.owned import ClosedAtExit
from edgeml.extras import load_jax

__all__ = ["Prefetch", "on_device"]

T = TypeVar("T")

_LOOK = 0.1  # seconds after which a thread looks whether anybody still wants its batches
_PATIENCE = 5.0  # seconds for the threads to end, which first return from a user's function

# A batch, or the error that came in its place.
_Outcome: TypeAlias = "tuple[Any, BaseException | None]"
_Queue: TypeAlias = "queue.Queue[_Outcome]"

_threads: weakref.WeakKeyDictionary[threading.Thread, threading.Event] = weakref.WeakKeyDictionary()


class Prefetch(ClosedAtExit, Iterator[T], Generic[T]):
    """An endless iterator over what ``sample()`` gives, called ahead in a thread of its own.

    ::

        with store.prefetch(256, device=jax.devices()[0]) as batches:
            for batch in batches:
                state = update(state, batch)

    ``depth`` batches are ready and one more is being drawn, so a batch may be that much older than
    the newest item. With a device, another thread puts one batch there while the next is drawn,
    and up to two more are on their way: so a batch takes as long as the slower of the two, not
    both. An error of ``sample`` is raised when its turn comes, and ends the iterator.

    Close it, or use it in a ``with``; one that is dropped open ends too, with a ResourceWarning.
    It belongs to the process that made it: in a forked child, `next` raises Closed.

    Args:
        sample: gives a batch.
        device: a JAX device, or sharding, for `on_device`; None leaves the batches as they are.
        depth: how many batches are kept ready (default 2).
    """

    def __init__(self, sample: Callable[[], T], *, device: Any = None, depth: int = 2) -> None:
        self._abandoned = False
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._ready: _Queue = queue.Queue(max(1, depth))
        if depth < 1:
            self._closed.set()
            raise ValueError(f"depth must be at least 1, got {depth}")
        watch_forks(self)
        atexit.unregister(_end_all)
        atexit.register(_end_all)  # anew, to run before what JAX has registered
        if device is None:
            self._start(_draw, sample, self._ready)
        else:
            drawn: _Queue = queue.Queue(1)
            self._start(_draw, sample, drawn)
            self._start(_place, device, drawn, self._ready)

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run a thread that refers to nothing that would keep this iterator from being dropped."""
        thread = threading.Thread(
            target=work, args=(*arguments, self._closed), name="edgeml prefetch", daemon=True
        )
        thread.start()
        self._threads.append(thread)
        _threads[thread] = self._closed

    def __next__(self) -> T:
        """Return the next batch, waiting for it if need be.

        Raises:
            whatever ``sample`` raised.
            StopIteration: it is closed, or an error has ended it.
            Closed: this process was forked from the one that made it.
        """
        if self._abandoned:
            raise Closed(
                "these batches are drawn in the process before the fork: make the iterator in the "
                "process that uses it"
            )
        outcome = _take(self._ready, self._closed)
        if outcome is None:
            raise StopIteration
        batch, error = outcome
        if error is not None:
            self.close()
            raise error
        return batch  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the iterator, and wait up to 5 s for its threads, which may be at work."""
        if self._abandoned:
            return
        self._closed.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_PATIENCE)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled or copied.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "a prefetching iterator can't be pickled or copied, as it has a thread: make it in the "
            "process that uses it"
        )

    def abandon(self) -> None:
        """Leave all to the parent, in a forked child: neither threads nor batches are there."""
        self._abandoned = True

    def __del__(self) -> None:
        if not self._abandoned and not self._closed.is_set():
            self._closed.set()
            warnings.warn(
                "a prefetching iterator was dropped before it was closed: close() it, or use it "
                "in a with statement",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def _leave(self) -> None:
        self.close()


def on_device(batch: T, device: Any) -> T:
    """Return a batch with its arrays put on a JAX device, or placed by a sharding.

    They are copies, on a CPU too, and made when this returns, so that the numpy arrays may be used
    again. A batch of several arrays takes a half to a third of the time of `jax.device_put`; each
    new structure, and set of shapes, is compiled first. What has 64 bits gets 32, as everywhere in
    JAX, unless ``jax_enable_x64`` is set.
    """
    jax = load_jax()
    # JAX goes on to read large arrays after the call.
    placed: T = jax.block_until_ready(_placing(device)(batch))
    return placed


@functools.cache
def _placing(device: Any) -> Callable[[Any], Any]:
    jax = load_jax()
    place = jax.sharding.SingleDeviceSharding(device) if isinstance(device, jax.Device) else device
    copied: Callable[[Any], Any] = jax.jit(lambda batch: batch, out_shardings=place)
    return copied


def _end_all() -> None:
    """End all threads: one that Python cuts off within JAX takes the process down with it."""
    for closed in list(_threads.values()):
        closed.set()
    for thread in list(_threads):
        thread.join(_PATIENCE)


# The threads. What they hold they let go of when the iterator is closed, or dropped.


def _draw(sample: Callable[[], Any], to: _Queue, closed: threading.Event) -> None:
    """Draw batches until nobody wants any more."""
    error = None
    while error is None and not closed.is_set():
        batch = None
        try:
            batch = sample()
        except BaseException as why:  # whatever it is, somebody is waiting
            error = why
        _give((batch, error), to, closed)


def _place(device: Any, source: _Queue, to: _Queue, closed: threading.Event) -> None:
    """Put batches on a device until nobody wants any more."""
    error = None
    while error is None and (outcome := _take(source, closed)) is not None:
        batch, error = outcome
        outcome = None
        if error is None:
            try:
                batch = on_device(batch, device)
            except BaseException as why:
                error = why
        _give((batch, error), to, closed)
        batch = None


def _give(outcome: _Outcome, to: _Queue, closed: threading.Event) -> None:
    """Put into a queue as soon as there is space, unless all is over before."""
    while not closed.is_set():
        try:
            return to.put(outcome, timeout=_LOOK)
        except queue.Full:
            continue


def _take(source: _Queue, closed: threading.Event) -> _Outcome | None:
    """Take from a queue as soon as there is something; None when all is over."""
    while not closed.is_set():
        try:
            return source.get(timeout=_LOOK)
        except queue.Empty:
            continue
    return None
