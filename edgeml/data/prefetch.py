"""Batches drawn ahead, in the background, while the one before is being used."""

from __future__ import annotations

import atexit
import functools
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from edgeml.extras import load_jax

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Prefetch", "on_device"]

T = TypeVar("T")

_LOOK = 0.1  # seconds after which the thread looks whether anybody still wants its batches
_PATIENCE = 5.0  # seconds for a thread to end, which first has to return from a user's function

_threads: weakref.WeakKeyDictionary[threading.Thread, threading.Event] = weakref.WeakKeyDictionary()


class Prefetch(Iterator[T], Generic[T]):
    """An endless iterator over what ``sample()`` gives, called ahead in a thread of its own.

    ::

        with store.prefetch(256, device=jax.devices()[0]) as batches:
            for batch in batches:
                state = update(state, batch)

    ``depth`` batches are ready and one more is being drawn, so a batch may be that much older than
    the newest item. An error of ``sample`` is raised when its turn comes, and ends the iterator.

    Args:
        sample: gives a batch.
        device: a JAX device, or sharding, for `on_device`; None leaves the batches as they are.
        depth: how many batches are kept ready (default 2).
    """

    def __init__(self, sample: Callable[[], T], *, device: Any = None, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if device is not None:
            draw = sample

            def sample() -> T:
                return on_device(draw(), device)

        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=_work, args=(sample, self._ready, self._closed), name="edgeml prefetch"
        )
        self._thread.daemon = True
        self._thread.start()
        _threads[self._thread] = self._closed
        atexit.unregister(_end_all)
        atexit.register(_end_all)  # anew, to run before what JAX has registered
        weakref.finalize(self, self._closed.set)  # one that was forgotten ends, too

    def __next__(self) -> T:
        """Return the next batch, waiting for it if need be.

        Raises:
            whatever ``sample`` raised.
            StopIteration: it is closed, or an error has ended it.
        """
        while not self._closed.is_set():
            try:
                batch, error = self._ready.get(timeout=_LOOK)
            except queue.Empty:
                continue
            if error is not None:
                self.close()
                raise error
            return batch  # type: ignore[return-value]
        raise StopIteration

    def close(self) -> None:
        """End the iterator, and wait up to 5 s for its thread, which may be drawing."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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


def _work(sample: Callable[[], Any], ready: queue.Queue[Any], closed: threading.Event) -> None:
    """Draw until nobody wants any more; refers to no iterator, so that one can be forgotten."""
    while not closed.is_set():
        try:
            made: tuple[Any, BaseException | None] = (sample(), None)
        except BaseException as error:  # whatever it is, somebody is waiting
            made = (None, error)
        while not closed.is_set():
            try:
                ready.put(made, timeout=_LOOK)
                break
            except queue.Full:
                continue
        if made[1] is not None:
            return
        del made
