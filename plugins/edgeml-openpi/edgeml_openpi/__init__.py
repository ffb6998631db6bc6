"""A door for openpi's clients: ``openpi://host:port``.

They come by WebSocket, and are told apart by the path that they ask for:

- `/v1/realtime/robot/openpi`: vLLM-Omni's dialect. The first message is the policy's configuration;
  a request names an endpoint, and may name a session; errors are messages.
- any other: openpi's own. The first message is metadata; then observations are answered in order,
  and an error, as a text, is the end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from edgeml_websocket.doors import Visit, WebSocketDoor

from edgeml.core import Door, EdgemlError, Guest, Limits, Malformed, RemoteError, hookimpl
from edgeml.core.errors import printable
from edgeml.core.state import ServerState
from edgeml_openpi.codec import Data, check_message, read, read_checked, read_words, write
from edgeml_openpi.config import configure

__all__ = ["OpenpiDoor"]

_REALTIME = "/v1/realtime/robot/openpi"
_FAILED = 1011  # of close codes: the server met what it didn't expect
_LOOK = 0.05  # seconds from one look at whether a server has loaded to the next
_LAST = 20  # lines of a traceback that a client is told
_MOST_TEXT = 8000  # characters of them
_LONGEST_ID = 200  # characters
_DEFAULT = "default"  # what a session is called that has no name


class OpenpiDoor(WebSocketDoor):
    """See the module."""

    name: ClassVar[str] = "openpi"
    health: ClassVar[str] = "/healthz"

    def answer_health(self, state: ServerState) -> tuple[int, str, bytes]:
        """See `WebSocketDoor.answer_health`."""
        ready = state.state == "ready"
        text = "OK\n" if ready else f"{state}\n"
        return 200 if ready else 503, "text/plain; charset=utf-8", text.encode()

    def welcome(self, visit: Visit) -> None:
        """Let the client in now: openpi's has no words for a refusal later."""
        scheme, _, key = visit.headers.get("authorization", "").partition(" ")
        token = key.strip() if scheme.lower() in ("api-key", "bearer") else None
        visit.enter(token, label=visit.headers.get("user-agent", ""))

    async def talk(self, visit: Visit) -> None:
        """See `WebSocketDoor.talk`."""
        # openpi's server listens once it has loaded, and its client waits for the first message
        # as long as that takes.
        while visit.dispatch.state.state in ("starting", "loading"):
            await asyncio.sleep(_LOOK)
        if visit.path.rstrip("/") == _REALTIME:
            await _talk_of_sessions(visit)
        else:
            await _talk(visit)


async def _talk(visit: Visit) -> None:
    """Speak openpi's own dialect."""
    (guest,) = visit.guests
    await visit.send(write(dict(visit.dispatch.metadata)))
    previous: float | None = None
    while True:
        began = time.monotonic()  # as openpi's server counts, which waits here
        message = await visit.receive()
        timed = _Timed(message, visit.limits, previous)
        try:
            answer = await visit.call(guest, timed.decode, timed.encode, len(message))
        except EdgemlError as error:
            await visit.send(_tell(error))
            await visit.close(_FAILED, "the frame before this says what failed")
            return
        del message, timed  # or they live until the next one comes
        await visit.send(answer)
        del answer
        previous = time.monotonic() - began


class _Timed:
    """A call that is timed, which its answer tells.

    Args:
        message: the observation.
        limits: what it may hold.
        previous: seconds from one answer to the one before, which the client's own time is in.
    """

    def __init__(self, message: Data | str, limits: Limits, previous: float | None) -> None:
        self._message = message
        self._limits = limits
        self._previous = previous
        self._began = 0.0

    def decode(self) -> Any:
        """Return the observation; what is timed begins."""
        message, self._message = self._message, b""  # it may take long now
        observation = read(message, self._limits)
        self._began = time.monotonic()
        return observation

    def encode(self, result: Any) -> bytes:
        """Return the message of what the function returned."""
        timing = {"infer_ms": (time.monotonic() - self._began) * 1000}
        if self._previous is not None:
            timing["prev_total_ms"] = self._previous * 1000
        answer = dict(result) if isinstance(result, Mapping) else {"actions": result}
        answer["server_timing"] = timing
        return write(answer)


def _tell(error: EdgemlError) -> str:
    """Return what a developer wants to see of an error: the end of the traceback, if it has one."""
    if isinstance(error, RemoteError) and error.traceback:
        lines = error.traceback.rstrip().splitlines()[-_LAST:]
        return "\n".join(lines)[-_MOST_TEXT:]
    return _name(error)[:_MOST_TEXT]


def _name(error: EdgemlError) -> str:
    if isinstance(error, RemoteError):
        return f"{error.type_name}: {error.message}"
    return f"{type(error).__name__}: {error}"


# The second dialect -----------------------------------------------------------------------


async def _talk_of_sessions(visit: Visit) -> None:
    """Speak vLLM-Omni's dialect."""
    dispatch = visit.dispatch
    await visit.send(write(configure(dispatch.contract(), dispatch.metadata)))
    session = _Session(visit.guests[0])
    while True:
        message = await visit.receive()
        try:
            answer = await _answer(visit, session, message)
        except EdgemlError as error:
            answer = write({"type": "error", "message": _name(error)[:_MOST_TEXT]})
        del message  # or it lives until the next one comes
        await visit.send(answer)
        del answer


async def _answer(visit: Visit, session: _Session, message: Data | str) -> bytes:
    try:
        data = check_message(message, visit.limits)
        asked = read_words(data, ("endpoint", "session_id"))
        endpoint = asked.get("endpoint", "infer")
        if endpoint not in ("infer", "reset"):
            raise Malformed(f"no endpoint {printable(endpoint, 40)!r}: there are infer and reset")
    except Malformed as error:
        visit.note(error)
        raise
    if endpoint == "reset":
        session.reset()
        return write({"status": "reset successful"})
    session.go_on(asked.get("session_id"))
    return await visit.call(session.guest, lambda: _observation(data), write, len(data))


def _observation(data: Data) -> Any:
    """Return what of a request is the observation's, and not the protocol's."""
    observation = read_checked(data)
    if not isinstance(observation, dict):
        raise Malformed(f"an observation is a map, not {type(observation).__name__}")
    observation.pop("endpoint", None)
    observation.pop("session_id", None)
    return observation


class _Session:
    """What a connection's requests belong to: one session at a time, which another's name ends."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self._name: str | None = None

    def go_on(self, name: str | None) -> None:
        """Go on with the session of a name; without one with that which was named last."""
        chosen = name[:_LONGEST_ID] if name else self._name or _DEFAULT
        if chosen != self._name:
            self.guest.begin_episode(chosen)
            self._name = chosen

    def reset(self) -> None:
        """End the session."""
        self.guest.begin_episode()
        self._name = None


@hookimpl
def edgeml_door() -> type[Door]:
    """Answer the plugin hook."""
    return OpenpiDoor
