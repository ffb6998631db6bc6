"""Lets in the benchmarks of vla-eval's harness: ``doors=["vla-eval://0.0.0.0:8000"]``.

A connection is a client, and answers come in the order of what was asked. The client says hello and
is told what the policy takes and gives; each observation is answered with an action of the same
number; the start of an episode, and its end, begin a new session. An error is told and closes
nothing, but for a client that isn't let in.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import secrets
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
from edgeml_websocket.doors import Visit, WebSocketDoor

from edgeml.core import Door, EdgemlError, Malformed, Overloaded, RemoteError, hookimpl
from edgeml.core.errors import NotReady, printable
from edgeml.core.state import ServerState
from edgeml_vla_eval.codec import Data, Received, read, read_as, read_payload, write, write_action
from edgeml_vla_eval.specs import describe

__all__ = ["PROTOCOL_VERSION", "VlaEvalDoor"]

PROTOCOL_VERSION = 1
"""Of the protocol that is spoken here."""

_log = logging.getLogger(__name__)

_LONGEST_LABEL = _LONGEST_ID = 200  # characters
_LONGEST_REASON = 120  # bytes; WebSocket has room for 123
_POLICY_VIOLATION, _TRY_AGAIN_LATER = 1008, 1013


class VlaEvalDoor(WebSocketDoor):
    """``vla-eval://host:port``: for benchmarks that run in vla-eval's harness."""

    name: ClassVar[str] = "vla-eval"
    health: ClassVar[str] = "/health"

    def report(self) -> dict[str, str]:
        """See `Door.report`."""
        return {**super().report(), "vla-eval's protocol": str(PROTOCOL_VERSION)}

    def answer_health(self, state: ServerState) -> tuple[int, str, bytes]:
        """See `WebSocketDoor.answer_health`."""
        ready = state.state == "ready"
        told: dict[str, Any] = {"status": "ok"}
        if not ready:
            told = {"status": state.state, "progress": state.progress, "detail": state.detail}
        return 200 if ready else 503, "application/json", json.dumps(told).encode() + b"\n"

    def welcome(self, visit: Visit) -> None:
        """See `WebSocketDoor.welcome`. A connection the client tries again, and nothing later."""
        state = visit.dispatch.state
        if state.state != "ready":
            raise NotReady(f"the server is {state}")

    async def talk(self, visit: Visit) -> None:
        """See `WebSocketDoor.talk`."""
        while await _exchange(visit):
            pass  # nothing of a message is kept while the next one is waited for


class _Hello(msgspec.Struct):
    """What is made of a client's greeting."""

    harness_version: str = ""
    benchmark: str = ""


class _Recording(msgspec.Struct):
    eid: str | None = None


class _Error(msgspec.Struct):
    error: str = ""


class _Start(msgspec.Struct):
    """What is made of the start of an episode."""

    recording: _Recording | None = None


async def _exchange(visit: Visit) -> bool:
    """Receive a message, and send what answers it; False if the client is not let in."""
    data = await visit.receive()
    seq, asked = 0, "message"
    try:
        received = read(data)
        seq, asked = received.seq, printable(received.type, 40)
        if not visit.guests:
            label = _label(received)
            try:
                visit.enter(_token(visit.headers), label)
            except EdgemlError as error:
                await _turn_away(visit, received, error)
                return False
        answer = await _answer(visit, received, data)
    except EdgemlError as error:
        if asked != "observation":  # which made a call
            visit.note(error)
        answer = _tell(error, asked, seq)
    if answer is not None:
        await visit.send(answer)
    return True


async def _turn_away(visit: Visit, first: Received, error: EdgemlError) -> None:
    """Say why a client isn't let in, and close.

    Of an answer to its hello that is none, the client shows nothing but that; of the reason for
    which a connection was closed, it shows all.
    """
    if first.type != "hello":
        await visit.send(_tell(error, first.type, first.seq))
    code = _TRY_AGAIN_LATER if isinstance(error, Overloaded) else _POLICY_VIOLATION
    reason = f"{type(error).__name__}: {error}".encode()[:_LONGEST_REASON].decode(errors="ignore")
    await visit.close(code, reason)


def _label(first: Received) -> str:
    """What the client calls itself, where the first thing that it says is hello."""
    if first.type != "hello":
        return ""
    hello = read_as(_Hello, first)
    return f"vla-eval {hello.harness_version} {hello.benchmark}".strip()[:_LONGEST_LABEL]


def _token(headers: Mapping[str, str]) -> str | None:
    """What a client shows: ``Bearer TOKEN``, or the password of ``ws://anybody:TOKEN@host``."""
    scheme, _, shown = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            shown = base64.b64decode(shown, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    elif scheme.lower() != "bearer":
        return None
    return shown.strip() or None


async def _answer(visit: Visit, received: Received, data: Data | str) -> bytes | None:
    """Do what a message asks for, and return the answer, if there is one."""
    assert not isinstance(data, str)
    (guest,) = visit.guests
    match received.type:
        case "observation":
            return await visit.call(
                guest,
                lambda: read_payload(data, received, visit.limits),
                lambda result: write_action(result, received.seq),
                len(data),
            )
        case "hello":
            return _greet(visit, received.seq)
        case "episode_start":
            recording = read_as(_Start, received).recording
            episode = (recording.eid if recording else None) or secrets.token_hex(8)
            if len(episode) > _LONGEST_ID:
                raise Malformed(f"an episode's id has at most {_LONGEST_ID} characters")
            guest.begin_episode(episode)
        case "episode_end":
            guest.begin_episode()
        case "error":
            told = printable(read_as(_Error, received).error)
            _log.info("%s tells of an error: %s", visit.peer.address, told)
        case other:
            raise Malformed(
                f"nothing is to be done for a message of type {printable(other, 40)!r}: clients "
                "send hello, observation, episode_start, episode_end and error"
            )
    return None


def _greet(visit: Visit, seq: int) -> bytes:
    dispatch = visit.dispatch
    told = {
        "harness_version": "edgeml",
        "model_server": dispatch.interface,
        "capabilities": {},
        **describe(dispatch.contract()),
        **dispatch.metadata,
        "protocol_version": PROTOCOL_VERSION,
    }
    return write("hello", told, seq)


def _tell(error: EdgemlError, asked: str, seq: int) -> bytes:
    if isinstance(error, RemoteError):
        why = f"{error.type_name}: {error.message}"
    else:
        why = f"{type(error).__name__}: {error}"
    text = f"{asked}_failed: {why}".encode(errors="replace").decode()
    return write("error", {"error": text}, seq)


@hookimpl
def edgeml_door() -> type[Door]:
    """Answer the plugin hook."""
    return VlaEvalDoor
