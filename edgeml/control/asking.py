"""Asking a policy for chunks, one at a time, in a thread that the control loop never waits for."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from edgeml.control.chunks import Request
from edgeml.control.merging import Chunk
from edgeml.core.forks import watch_forks
from edgeml.core.message import copy, private
from edgeml.data.tree import copy_item

__all__ = ["Answer", "Asker", "Caller", "Source", "ask", "copy_observation"]

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


@dataclass(frozen=True, eq=False)
class _Question:
    request: Request
    payload: Any
    timeout: float | None


class Asker:
    """Has a thread that asks.

    Args:
        ask: see `Ask`.
        key: of a result that is a dict, under which the chunk is if there is one; None for none.

    Attributes:
        closed: whether it can't be asked any more; nor can it in a forked child.
    """

    def __init__(self, ask: Ask, key: str | None) -> None:
        self._ask = ask
        self._key = key
        self._changed = threading.Condition()
        self._question: _Question | None = None  # until it has been answered
        self._answer: Answer | None = None  # until it has been taken
        self._rests_until = 0.0
        self.closed = False
        self._thread: threading.Thread | None = None
        watch_forks(self)

    @property
    def idle(self) -> bool:
        """Whether it can be asked: nothing is under way, and nothing failed just now."""
        with self._changed:
            under_way = self._question is not None or self._answer is not None
        return not under_way and time.monotonic() >= self._rests_until

    def start(self, request: Request, payload: Any, timeout: float | None) -> None:
        """Ask; it must be `idle`, and have the payload for itself."""
        with self._changed:
            self._question = _Question(request, payload, timeout)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="edgeml control", daemon=True
                )
                self._thread.start()
            self._changed.notify()

    def rest(self) -> None:
        """Be asked nothing for a moment, after a failure."""
        self._rests_until = time.monotonic() + _PAUSE

    def take(self) -> Answer | None:
        """Return what has come since the last time, or None."""
        with self._changed:
            answer, self._answer = self._answer, None
        return answer

    def answer(self, request: Request, payload: Any, timeout: float | None) -> Answer:
        """Ask, and wait for the answer."""
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

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.closed or self._question is not None)
                if self.closed:
                    return
                question = self._question
            assert question is not None
            try:
                answer = self.answer(question.request, question.payload, question.timeout)
            except BaseException as error:  # as a function of the user's may raise SystemExit
                answer = Answer(question.request, None, None, error, 0.0)
            with self._changed:
                self._question, self._answer = None, answer
            del question, answer  # for the payload's memory is wanted again

    def close(self) -> None:
        """End the thread, but for a call that is under way, which ends by itself."""
        with self._changed:
            self.closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_MOMENT)

    def abandon(self) -> None:
        """In a forked child: there is no such thread."""
        self._changed = threading.Condition()
        self.closed = True
        self._thread = None


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
