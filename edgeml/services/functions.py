"""Users' functions as servers run them: versions that may be replaced, and what they are told."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from edgeml.core.dispatch import Call, LocalCall, require_plain
from edgeml.core.episode import Episode
from edgeml.services.checks import Checks

__all__ = [
    "Callback",
    "Context",
    "Function",
    "Single",
    "context_of",
    "rehearsed",
    "takes",
    "takes_context",
]


@dataclass(frozen=True)
class Context:
    """What a function is told of a call beside its payload.

    Attributes:
        name: of the interface, action, request type or store.
        client_id: what the client goes by; random unless its user chose one. Where the server asks
            for keys it is the first one's whose client used it, and else anybody may claim any.
        label: what the client calls itself, for people to read.
        identity: the name of the key that the client has shown; None where the server asks for
            none.
        deadline: until when the caller waits, on the clock `time.monotonic`.
        session: what you want to keep about this client: a dict that is empty at first, and goes
            when the client leaves, resets, or is silent for half a minute. A client that comes back
            within that, since its connection was lost, finds it as it was; after a restart of
            either side it is a new one.
        episode: the id of the client's episode; empty before its first reset.
    """

    name: str
    client_id: str
    label: str
    identity: str | None
    deadline: float
    session: dict[Any, Any]
    episode: str
    _episode: Episode = field(repr=False, compare=False)

    def on_end(self, function: Callable[[], object]) -> None:
        """Call ``function()`` in the handlers' thread once nobody needs ``session`` any more.

        That is when the client has left, was reset, is silent for half a minute, or the server
        stops, and the calls that came before have been answered. Of several the newest is called
        first. What they raise is logged.
        """
        self._episode.on_end(function)


def context_of(call: Call, name: str | None = None) -> Context:
    """Return the context of a call, with the session that it had when the call came.

    Args:
        call: it.
        name: of what it is about, where that is not its interface.
    """
    caller, episode = call.caller, call.episode
    return Context(
        call.name if name is None else name,
        caller.client_id,
        caller.label,
        caller.identity,
        call.deadline,
        episode.session,
        episode.id,
        episode,
    )


@contextmanager
def rehearsed(example: Any) -> Iterator[Call]:
    """A call that nobody made, to warm up with; its session ends with it, in this thread."""
    call = LocalCall("warm-up", example)
    try:
        yield call
    finally:
        call.episode.end(lambda function: function())


class Function(NamedTuple):
    """One version of a function: read as one, and replaced as one.

    Attributes:
        run: what the user gave.
        version: counts from 1.
        told: whether it takes a context as well.
        checks: what its calls are checked by.
    """

    run: Callable[..., Any]
    version: int
    told: bool
    checks: Checks | None = None

    @classmethod
    def make(
        cls,
        what: str,
        run: Callable[..., Any],
        version: int,
        told: bool | None = None,
        checks: Checks | None = None,
    ) -> Function:
        """Check a user's function.

        Args:
            what: it is, for errors.
            run: the function.
            version: its number.
            told: whether it takes a context; None to go by its signature: it does where it needs
                two arguments, or has one that is called ``context``.
            checks: what its calls are checked by; None for nothing.

        Raises:
            TypeError: it isn't callable, or is an ``async def``.
        """
        require_plain(what, run)
        return cls(run, version, takes_context(run, 1) if told is None else told, checks)


def takes_context(function: Callable[..., Any], given: int) -> bool:
    """Whether a function takes a `Context` after so many other arguments; see `takes`."""
    return takes(function, given, "context")


def takes(function: Callable[..., Any], given: int, name: str) -> bool:
    """Whether a function takes one argument more after so many.

    It does where it needs one more, or the one after them is called ``name``.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of some that are written in C nobody knows
        return False
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in by_position if p.default is p.empty]
    return len(needed) == given + 1 or any(p.name == name for p in by_position[given : given + 1])


class Callback:
    """A server's callback, which may take a `Context` after what it is given.

    Args:
        what: it is, for errors.
        function: the user's.
        given: how many arguments it gets beside that.

    Raises:
        TypeError: it isn't callable, or is an ``async def``.
    """

    def __init__(self, what: str, function: Callable[..., Any], given: int) -> None:
        require_plain(what, function)
        self._function = function
        self._told = takes_context(function, given)

    def __call__(self, call: Call, name: str, *arguments: Any) -> Any:
        """Call it about what has this name, for a call."""
        if self._told:
            return self._function(*arguments, context_of(call, name))
        return self._function(*arguments)


class Single:
    """A `Handler` that answers each call by a run of a function of its own.

    Attributes:
        function: the newest version.
    """

    def __init__(self, function: Function) -> None:
        self.function = function

    def __call__(self, call: Call) -> None:
        """Answer a call."""
        run, call.version, told, checks = self.function
        payload = call.payload()
        if checks is not None:
            checks.check_payload(call, payload)
        result = run(payload, context_of(call)) if told else run(payload)
        if checks is not None:
            checks.check_result(call, result)
        call.answer(result)

    def warm_up(self, example: Any, report: Callable[[float, str], None]) -> None:
        """Run the function once on an example of a payload."""
        report(0.0, "a call")
        run, _, told, _ = self.function
        with rehearsed(example) as call:
            run(example, context_of(call)) if told else run(example)
