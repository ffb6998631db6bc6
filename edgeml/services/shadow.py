"""A shadow: a candidate is asked what the real server was, and its answers are only compared.

What must hold is that nobody waits for it. A caller takes the one place that there is, without
waiting, or goes on at once where the candidate is busy or away: then nothing is copied, either. All
else happens in a thread of the shadow's own, over a connection of its own. An observation is handed
over when its real answer is there, so that the candidate's copy of it is never on the way before
the real one, and one server or link that carries both is asked one thing at a time.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol

import numpy as np

from edgeml.core.codec import Codec
from edgeml.core.errors import Closed, NotReady, Unreachable, text_of
from edgeml.core.forks import watch_forks
from edgeml.core.message import Message
from edgeml.services.base import checked

__all__ = ["OnShadow", "Shadow", "compare"]

_log = logging.getLogger(__name__)

OnShadow = Callable[[str, Any, Any, Any], object]
"""Is called with an interface's name, a payload, the real answer and the candidate's."""

_IMPATIENCE = 0.05  # seconds; the first pause before the candidate is tried again
_PATIENCE = 2.0  # seconds; the longest
_MOST_LEAVES = 1000  # of which differences are kept, as answers' keys may be any
_NUMBERS = frozenset({bool, int, float, complex})


class Candidate(Protocol):
    """What is known here of the client that asks the candidate."""

    def reset(self, episode: str | None = None) -> str: ...

    def call(self, name: str, payload: Any) -> Any: ...

    def stop(self) -> None: ...


class _Question(NamedTuple):
    """Something to ask, as it was when the real server had answered it."""

    name: str
    episode: str | None
    payload: Message
    answer: Message


class _Difference(NamedTuple):
    """How far answers were apart in one place, over all that were compared."""

    answers: int
    greatest: float
    total: float
    last: float


class Shadow:
    """Asks a candidate, and compares; no method of it ever waits.

    Args:
        make: makes the client that asks the candidate, and raises where that can't be; it passes
            ``on_connecting`` on to `Client`.
        codec: keeps payloads and answers.
        on_shadow: is called with each pair of answers, in the shadow's thread.
    """

    def __init__(
        self, make: Callable[..., Candidate], codec: Codec, on_shadow: OnShadow | None
    ) -> None:
        self._make = make
        self._codec = codec
        self._on_shadow = on_shadow
        self._stopped = False
        self._close: Callable[[], object] = lambda: None
        self._place = threading.Lock()
        """Is held by whoever asks, until that is answered; and as long as the candidate is away."""
        self._place.acquire()
        self._questions: SimpleQueue[_Question | None] = SimpleQueue()  # put never waits
        self._episode: str | None = None
        self._counting = threading.Lock()  # of what callers count, too: the next two
        self._skipped = 0
        self._failed = Counter[str]()
        self._asked = self._answered = self._structures = self._left_out = 0
        self._differences: dict[str, _Difference] = {}
        self._connected = False
        self._error: str | None = None
        self._pause = _IMPATIENCE
        watch_forks(self)
        threading.Thread(target=self._run, name="edgeml shadow", daemon=True).start()

    def abandon(self) -> None:
        """Leave the candidate to the process before the fork, as its thread is there."""
        self._stopped, self._connected = True, False
        self._error = "Closed: the shadow belongs to the process before the fork"
        self._counting, self._place = threading.Lock(), threading.Lock()
        self._place.acquire()

    # What callers do ------------------------------------------------------------------------

    def begin_episode(self, episode: str) -> None:
        """Have the candidate begin an episode before it is asked anything more."""
        self._episode = episode

    def ask(self, name: str, payload: Any, answer: Any) -> None:
        """Ask the candidate what the real server has just answered, if it is free."""
        kept = self._keep(payload)
        if kept is not None:
            self._hand_over(name, kept, answer)

    def follow(self, asked: Future[Any], name: str, payload: Any) -> Future[Any]:
        """Ask the candidate once the real server has answered, if the candidate is free now.

        Returns:
            A future as the one given: what it gives has been kept before anybody could change it.
        """
        kept = self._keep(payload)
        if kept is None:
            return asked

        def leave(done: Future[Any]) -> None:
            if done.cancelled() or done.exception() is not None:
                self._place.release()

        def hand_over(answer: Any) -> Any:
            self._hand_over(name, kept, answer)
            return answer

        asked.add_done_callback(leave)  # first, so that it is free once the caller knows
        return checked(asked, hand_over)

    def _keep(self, payload: Any) -> Message | None:
        """Take the place and keep a payload as it is now, if the place is free."""
        if not self._place.acquire(blocking=False):
            with self._counting:
                self._skipped += 1
            return None
        return self._encode(payload)

    def _hand_over(self, name: str, payload: Message, answer: Any) -> None:
        kept = self._encode(answer)
        if kept is not None:
            self._questions.put(_Question(name, self._episode, payload, kept))

    def _encode(self, value: Any) -> Message | None:
        """Keep what a value is now; give the place back where that can't be."""
        try:
            return self._codec.encode_owned(value)
        except Exception as error:  # no memory, say, which is the shadow's affair alone
            self._count_failed(error)
            self._place.release()
            return None

    def stats(self) -> dict[str, Any]:
        """Counts since the start, as `InferenceClient.stats` describes them."""
        return {
            "connected": self._connected,
            "asked": self._asked,
            "answered": self._answered,
            "failed": dict(self._failed),
            "skipped": self._skipped,
            "last_error": self._error,
            "different_structure": self._structures,
            "differences": {
                path: {"max": each.greatest, "mean": each.total / each.answers, "last": each.last}
                for path, each in self._differences.copy().items()
            },
            "leaves_left_out": self._left_out,
        }

    def stop(self) -> None:
        """End it; returns at once, and a thread of its own parts from the candidate."""
        if self._stopped:
            return
        self._stopped = True
        self._questions.put(None)
        with suppress(RuntimeError):  # the interpreter shuts down, which ends it as well
            threading.Thread(
                target=lambda: self._close(), name="edgeml ends a shadow", daemon=True
            ).start()

    def _count_failed(self, error: Exception) -> None:
        with self._counting:
            self._failed[type(error).__name__] += 1

    # What its thread does -------------------------------------------------------------------

    def _on_connecting(self, close: Callable[[], object]) -> None:
        self._close = close
        if self._stopped:  # meanwhile
            close()

    def _run(self) -> None:
        while not self._stopped:
            try:
                candidate = self._make(on_connecting=self._on_connecting)
            except Exception as error:  # whatever it is, it is to hurt nobody
                self._note(error)
            else:
                try:
                    self._serve(candidate)
                finally:
                    self._connected = False
                    candidate.stop()
            if not self._stopped:
                with suppress(Empty):
                    self._questions.get(timeout=self._pause)
                self._pause = min(2 * self._pause, _PATIENCE)

    def _serve(self, candidate: Candidate) -> None:
        """Ask the candidate until it is gone, or this is stopped; nobody has the place then."""
        episode: str | None = None
        self._place.release()
        self._connected = True
        while True:
            question = self._questions.get()
            if question is None:
                return
            self._asked += 1
            try:
                if question.episode is not None and question.episode != episode:
                    episode = candidate.reset(question.episode)
                payload = self._codec.decode(question.payload)
                answer = candidate.call(question.name, payload)
                real = self._codec.decode(question.answer)
                self._compare(question.name, real, answer)
            except Exception as error:
                if self._stopped:
                    return
                self._count_failed(error)
                self._note(error)
                if isinstance(error, (Closed, NotReady, Unreachable)):
                    return
                self._place.release()
            else:
                self._pause = _IMPATIENCE
                if self._error is not None:
                    self._error = None
                    _log.info("the shadow's candidate answers")
                if self._on_shadow is not None:
                    self._call_user(self._on_shadow, question.name, payload, real, answer)
                self._place.release()
                self._answered += 1  # now that it is free again
            # Or what they lie in would be kept until something is asked again.
            del question
            payload = real = answer = None

    def _call_user(self, function: OnShadow, *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception:
            _log.exception("on_shadow failed")

    def _note(self, error: Exception) -> None:
        """Say why nothing comes of it, once as long as it stays the same."""
        told = f"{type(error).__name__}: {text_of(error)}"
        if told != self._error and not self._stopped:
            self._error = told
            _log.warning("the shadow's candidate does not answer: %s", told)

    def _compare(self, name: str, real: Any, answer: Any) -> None:
        try:
            found = list(compare(real, answer))
        except _DifferentStructureError:
            self._structures += 1
            return
        for place, greatest, mean in found:
            path = name + place
            known = self._differences.get(path)
            if known is None:
                if len(self._differences) >= _MOST_LEAVES:
                    self._left_out += 1
                    continue
                known = _Difference(0, 0.0, 0.0, 0.0)
            self._differences[path] = _Difference(
                known.answers + 1, max(known.greatest, greatest), known.total + mean, greatest
            )


# Comparing ----------------------------------------------------------------------------------


class _DifferentStructureError(Exception):
    """Two answers have not the same keys, lengths or shapes."""


def compare(real: Any, candidate: Any, path: str = "") -> Iterator[tuple[str, float, float]]:
    """Tell, for each leaf of two answers, how far they are apart.

    Numbers, arrays of them and lists of them are apart by their absolute difference, in float64;
    infinitely where one alone is NaN. What is no number is 0.0 apart where it is equal, else 1.0.

    Yields:
        Its path, such as ``"['actions'][0]"``, the greatest difference and the mean one.

    Raises:
        _DifferentStructureError: they have other keys, lengths or shapes.
    """
    real, candidate = _joined(real), _joined(candidate)
    kind = _container(real)
    if kind is not _container(candidate):
        raise _DifferentStructureError
    if kind is dict:
        if real.keys() != candidate.keys():
            raise _DifferentStructureError
        for key, value in real.items():
            yield from compare(value, candidate[key], f"{path}[{key!r}]")
    elif kind is list:
        if len(real) != len(candidate):
            raise _DifferentStructureError
        for index, (ours, theirs) in enumerate(zip(real, candidate, strict=True)):
            yield from compare(ours, theirs, f"{path}[{index}]")
    else:
        yield path, *_distance(real, candidate)


def _container(value: Any) -> type | None:
    return dict if isinstance(value, dict) else list if isinstance(value, (list, tuple)) else None


def _joined(value: Any) -> Any:
    """A command may be a list of numbers, which is one leaf then, and takes a fraction of time."""
    if isinstance(value, (list, tuple)) and value and _NUMBERS.issuperset(map(type, value)):
        return np.asarray(value)
    return value


def _distance(real: Any, candidate: Any) -> tuple[float, float]:
    """The greatest and the mean absolute difference."""
    array = isinstance(real, np.ndarray) or isinstance(candidate, np.ndarray)
    if not array and not (_is_number(real) and _is_number(candidate)):
        unequal = float(bool(real != candidate))
        return unequal, unequal
    ours, theirs = np.atleast_1d(real), np.atleast_1d(candidate)
    if ours.shape != theirs.shape:
        raise _DifferentStructureError
    if ours.size == 0:
        return 0.0, 0.0
    if not (_has_numbers(ours) and _has_numbers(theirs)):
        unequal = float(not np.array_equal(ours, theirs))
        return unequal, unequal
    wide = np.complex128 if "c" in ours.dtype.kind + theirs.dtype.kind else np.float64
    ours, theirs = ours.astype(wide), theirs.astype(wide)
    with np.errstate(all="ignore"):
        apart = np.abs(ours - theirs)
        apart[(ours == theirs) | (np.isnan(ours) & np.isnan(theirs))] = 0.0  # infinities, too
        apart[np.isnan(apart)] = np.inf
        return float(apart.max()), float(apart.mean())


def _is_number(value: Any) -> bool:
    return type(value) in _NUMBERS or isinstance(value, np.generic)


def _has_numbers(array: np.ndarray[Any, Any]) -> bool:
    """Whether they are numbers or booleans, the types of ml_dtypes included."""
    kind = array.dtype.kind
    return kind in "biufc" or (kind == "V" and array.dtype.type is not np.void)
