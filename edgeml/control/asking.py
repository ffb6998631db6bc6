"""Asking a policy for chunks, one at a time, in a thread that the control loop never waits for.

Nor does it for a lock that such a thread may hold just when something else has the processor, or
for a thread to start: both took 20 to 150 ms on a machine with more to do than processors. So what
passes between them passes by C's own queues, and threads are there before the first step.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol, TypeAlias

import numpy as np

from edgeml.control.chunks import Request
from edgeml.control.merging import Chunk
from edgeml.core.forks import watch_forks
from edgeml.core.message import copy, private
from edgeml.data.tree import copy_item

__all__ = ["Answer", "Asker", "Caller", "Source", "Worker", "ask", "copy_observation"]

_PAUSE = 0.1  # seconds after a failure, or a dead server would be asked at every tick
_MOMENT = 1.0  # seconds that closing waits for a call that is under way


class Caller(Protocol):
    """What an `InferenceClient` is to a control loop."""

    def call(self, name: str, payload: Any, timeout: float | None = None) -> Any:
        """Call a function of a server; the payload may be changed once this has returned."""


Source: TypeAlias = "Caller | Callable[[Any], Any]"
"""A policy: a client of a server that has it, or a function of an observation."""

Ask: TypeAlias = Callable[[Any, "float | None"], "tuple[Any, int | None]"]
"""Gives what a policy makes of a payload in so many seconds, and its version, if that is known."""


def ask(source: Source, interface: str) -> Ask:
    """Return how a source is asked.

    Raises:
        TypeError: it can't be.
    """
    call = getattr(source, "call", None)
    if not callable(call or source) or inspect.iscoroutinefunction(call or source):
        raise TypeError(
            "a policy is a client with a method call(name, payload, timeout), or a function of an "
            f"observation, and neither is a coroutine; {source!r} is not that"
        )
    if call is None:
        function: Any = source
        return lambda payload, timeout: (function(payload), None)
    if "timing" not in inspect.signature(call).parameters:
        return lambda payload, timeout: (call(interface, payload, timeout), None)

    def timed(payload: Any, timeout: float | None) -> tuple[Any, int | None]:
        result, timing = call(interface, payload, timeout, timing=True)
        return result, timing.version

    return timed


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of a request.

    Attributes:
        request: what was asked.
        chunk: what it made, or None.
        version: of the policy, if that is known.
        error: why there is no chunk, or None.
        seconds: that it took.
    """

    request: Request
    chunk: Chunk | None
    version: int | None
    error: BaseException | None
    seconds: float


class Worker:
    """Runs functions one after another in a thread of its own; whoever gives them never waits.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], object]) -> None:
        """Have a function run, which must not raise."""
        self._work.put(work)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work  # for the memory of what it holds is wanted again

    def close(self) -> None:
        """End it after what it has to do; not waiting long for what takes its time."""
        self._work.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(_MOMENT)


class Asker:
    """Asks, one request at a time. All methods but `close` are called by one thread.

    Args:
        ask: see `Ask`.
        key: of a result that is a dict, under which the chunk is if there is one; None for none.
        here: whether to ask in the thread that calls, and wait.

    Attributes:
        closed: whether it can't be asked any more; nor can it in a forked child.
    """

    def __init__(self, ask: Ask, key: str | None, here: bool) -> None:
        self._ask = ask
        self._key = key
        self._under_way = False
        self._answers: deque[Answer] = deque()  # one at most
        self._rests_until = 0.0
        self.closed = False
        self._worker = None if here else Worker("edgeml control")
        watch_forks(self)

    @property
    def idle(self) -> bool:
        """Whether it can be asked: nothing is under way, and nothing failed just now."""
        return not self._under_way and time.monotonic() >= self._rests_until

    def start(self, request: Request, payload: Any, timeout: float | None) -> None:
        """Ask; it must be `idle`, and have the payload for itself."""
        if self._worker is None:
            self._answers.append(self._answer(request, payload, timeout))
        else:
            self._worker.do(lambda: self._answer_in_thread(request, payload, timeout))
        self._under_way = True  # not where Ctrl-C came

    def take(self) -> Answer | None:
        """Return what has come since the last time, or None."""
        if not self._answers:
            return None
        self._under_way = False
        return self._answers.popleft()

    def rest(self, seconds: float) -> None:
        """Be asked nothing for a moment, after a failure that took so many seconds itself."""
        self._rests_until = time.monotonic() + max(0.0, _PAUSE - seconds)

    def _answer_in_thread(self, request: Request, payload: Any, timeout: float | None) -> None:
        try:
            answer = self._answer(request, payload, timeout)
        except BaseException as error:  # as a function of the user's may raise SystemExit
            answer = Answer(request, None, None, error, 0.0)
        self._answers.append(answer)

    def _answer(self, request: Request, payload: Any, timeout: float | None) -> Answer:
        began = time.monotonic()
        chunk: Chunk | None = None
        version: int | None = None
        error: Exception | None = None
        try:
            result, version = self._ask(payload, timeout)
            if isinstance(result, Mapping) and self._key in result:
                result = result[self._key]
            chunk = Chunk(result)
        except Exception as failure:
            error = failure
        return Answer(request, chunk, version, error, time.monotonic() - began)

    def close(self) -> None:
        """End the thread, but for a call that is under way, which ends by itself."""
        self.closed = True
        if self._worker is not None:
            self._worker.close()

    def abandon(self) -> None:
        """In a forked child: there is no such thread."""
        self.closed = True


def copy_observation(node: Any) -> Any:
    """Return a copy of an observation, in memory that was used before.

    That spares the page faults, which take longer than the copying; and it keeps the GIL for the
    half a millisecond that 3 MB take: beside a thread that computes, giving it up would cost 5.
    """
    if isinstance(node, dict):
        return {key: copy_observation(part) for key, part in node.items()}
    if type(node) is np.ndarray and node.flags.c_contiguous and not node.dtype.hasobject:
        memory = private(node.nbytes)
        if memory is not None:
            copy(memory, node.reshape(-1).view(np.uint8).data)
            return np.frombuffer(memory, node.dtype).reshape(node.shape)
    return copy_item(node)
