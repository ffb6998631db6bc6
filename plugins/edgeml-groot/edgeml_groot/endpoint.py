"""The door itself: who asks, in which order, and what each is answered.

It does what a REP does, for each client apart: a request comes with a return address, which ends
with an empty frame, and gets one answer, before that client's next request is looked at. Unlike a
REP it answers what it can't take as well, since a client that waits for an answer waits for ever.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import time
from collections import deque
from typing import Any

from edgeml.core import (
    Dispatch,
    EdgemlError,
    Guest,
    Limits,
    Malformed,
    Overloaded,
    Peer,
    PermissionDenied,
    Url,
    find_address,
    tell_url,
)
from edgeml.core.errors import printable, text_of
from edgeml.core.gate import Gate
from edgeml.core.loops import Loop, LoopEndpoint
from edgeml.core.quota import Held, Quota
from edgeml.core.refusals import Refusals
from edgeml.core.url import is_loopback, require_no_path
from edgeml_groot import wire
from edgeml_groot.zmtp import Connection, Data, Front, frame_head

__all__ = ["GrootEndpoint"]

_log = logging.getLogger(__name__)
_numbers = itertools.count(1)  # of connections
_SCRATCH = 1 << 14
_MORE = 1  # the flag of frames that others follow
_FORGET = 600.0  # seconds without a call after which a client behind a proxy is forgotten
_LAST = 0.2  # seconds that a door which closes goes on to answer what comes, ...
_QUIET = 0.03  # ... unless nothing has come for so many
_GRACE = 0.5  # seconds that it then gives to what is still to be sent
_NO_MEMORY = wire.write_error("no memory for this request: try again later")
_STOPPED = wire.write_error("the server has been stopped")


class _Refused:
    """Requests in a row that are answered with an error, when it is their turn."""

    __slots__ = ("answer", "head", "number")

    def __init__(self, head: bytes, answer: bytes) -> None:
        self.head = head
        self.answer = answer
        self.number = 1


class _Line:
    """One client: all that comes with the same return address over one connection.

    Attributes:
        front: its return address; a REQ, which is one client, may number its requests there.
        waiting: requests that came while another one was under way, each with what its answer
            begins with, and what it takes up.
        call: what is under way.
        guest: who it is to the server, with the token that it has shown.
        going_on: whether its next request is going to be looked at.
    """

    __slots__ = ("call", "connection", "front", "going_on", "guest", "token", "waiting")

    def __init__(self, front: Front, connection: Connection) -> None:
        self.front = front
        self.connection = connection
        self.waiting: deque[tuple[bytes, Data, Held] | _Refused] = deque()
        self.call: _Call | None = None
        self.guest: Guest | None = None
        self.token: str | None = None
        self.going_on = False

    @property
    def busy(self) -> bool:
        """Whether a request has to wait."""
        return self.call is not None or bool(self.waiting)

    def leave(self) -> None:
        """Have the guest forgotten; the next request makes another."""
        guest, self.guest = self.guest, None
        if guest is not None:
            guest.leave()


class _Call:
    """A request for an action, which is answered once."""

    __slots__ = ("_endpoint", "_form", "_request", "head", "line")

    def __init__(
        self, endpoint: GrootEndpoint, line: _Line, head: bytes, request: wire.Request
    ) -> None:
        self.head = head
        self._endpoint = endpoint
        self._request = request
        self._form = wire.Form()
        self.line = line

    def payload(self) -> Any:
        return wire.read_action(self._request.data, self._form)

    def answer(self, result: Any) -> None:
        answer = wire.write_action(result, self._form, self._endpoint.limits)
        self._endpoint.settle(self, answer)

    def fail(self, error: EdgemlError) -> None:
        self._endpoint.settle(self, wire.write_error(text_of(error)))


class GrootEndpoint(LoopEndpoint):
    """Serves at one address; see `Endpoint`, and for its connections `edgeml_groot.zmtp.Host`."""

    def __init__(self, url: Url, dispatch: Dispatch, limits: Limits) -> None:
        require_no_path(url)
        self.limits = limits
        self.incoming = Quota(limits.bytes_per_client, limits.bytes, "are on their way")
        self.unread = Quota(limits.replies_per_client, limits.bytes, "of answers not read")
        self.scratch = memoryview(bytearray(_SCRATCH))
        self._dispatch = dispatch
        self._requests = Quota(limits.bytes_per_client, limits.bytes, "of requests waiting")
        self._connections: dict[Connection, dict[Front, _Line]] = {}
        self._came = 0  # messages
        self._closed = False
        self._refusals = Refusals(url, self.counts)
        self._loop = Loop(f"edgeml {url}")
        why = ("Malformed", "its handshake is not ZeroMQ's")
        self._gate = Gate(limits, self._refusals, self._loop.later, why)
        try:
            sock = self._gate.bind(url)
            self.local = is_loopback(sock.getsockname()[0])
            self._server = self._loop.start(self._listen(sock)).result()
        except BaseException:
            self._loop.close()
            raise
        self.url = tell_url(url, find_address(url), sock.getsockname()[1])

    async def _listen(self, sock: socket.socket) -> asyncio.AbstractServer:
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: Connection(self), sock=sock)

    # What connections ask -------------------------------------------------------------

    def begin(self, connection: Connection) -> Peer:
        self._connections[connection] = {}
        host, port = str(connection.address[0]), connection.address[1]
        name = f"groot://[{host}]:{port}" if ":" in host else f"groot://{host}:{port}"
        return Peer(str(next(_numbers)), name, host)

    def greet(self, connection: Connection) -> None:
        self._gate.greet(connection.address)

    def note(self, kind: str, peer: Peer, why: object) -> None:
        self._refusals.note(kind, peer.address, peer.host, why)

    def refuse(self, connection: Connection, front: Front, kind: str, why: str) -> None:
        self._came += 1
        if kind == "Malformed":
            self.note(kind, connection.peer, why)
        else:
            self.counts[kind] += 1
        self._refuse(self._line_of(connection, front), _head_of(front), wire.write_error(why))

    def receive(self, connection: Connection, front: Front, body: Data) -> None:
        self._came += 1
        line, head = self._line_of(connection, front), _head_of(front)
        if self._closed:
            self._answer(line, head, _STOPPED)
        else:
            self._connections[connection][line.front] = line
            self._put(line, head, body)
        self._tidy(line)

    def _line_of(self, connection: Connection, front: Front) -> _Line:
        lines = self._connections[connection]
        front = () if connection.alone else front
        line = lines.get(front)
        if line is None:
            line = _Line(front, connection)
            for other in [each for each in lines.values() if each.guest and each.guest.left]:
                self._tidy(other)
        return line

    def end(self, connection: Connection) -> None:
        for line in self._connections.pop(connection).values():
            line.call = None
            for waits in line.waiting:
                if not isinstance(waits, _Refused):
                    waits[2].release()
            line.waiting.clear()
            line.leave()

    # What waits -----------------------------------------------------------------------

    def _put(self, line: _Line, head: bytes, body: Data) -> None:
        """Look at a request, or have it wait for those before it."""
        connection = line.connection
        try:
            if not line.busy:
                self._look_at(line, head, body)
                return
            if connection.waiting >= self.limits.calls_per_client:
                raise Overloaded(f"{connection.waiting} requests of yours wait already")
            held = self._requests.take(connection.peer, len(body))
            try:
                line.waiting.append((head, body, held))
            except MemoryError:
                held.release()
                raise
            connection.waiting += 1
        except Overloaded as error:
            self.counts["Overloaded"] += 1
            self._refuse(line, head, wire.write_error(text_of(error)))
        except MemoryError:
            self.counts["Overloaded"] += 1
            self._refuse(line, head, _NO_MEMORY)

    def _refuse(self, line: _Line, head: bytes, answer: bytes) -> None:
        """Answer a request with an error, after those before it."""
        last = line.waiting[-1] if line.waiting else None
        if not line.busy:
            self._answer(line, head, answer)
        elif isinstance(last, _Refused) and last.head == head:
            last.number += 1  # however many come, they take up no more
        elif len(line.waiting) <= 2 * self.limits.calls_per_client:
            line.waiting.append(_Refused(head, answer))
        else:
            line.connection.cut("Overloaded", "it asks on and on, and waits for nothing")

    def _go_on_soon(self, line: _Line) -> None:
        if line.waiting and line.call is None and not line.going_on:
            line.going_on = True
            self._loop.later(0.0, self._go_on, line)

    def _go_on(self, line: _Line) -> None:
        """Look at one request that waited; then others have their turn."""
        line.going_on = False
        if not line.waiting or line.call is not None:
            return
        waits = line.waiting[0]
        if isinstance(waits, _Refused):
            self._answer(line, waits.head, waits.answer)
            waits.number -= 1
            if not waits.number:
                line.waiting.popleft()
        else:
            head, body, held = line.waiting.popleft()  # type: ignore[misc]
            line.connection.waiting -= 1
            held.release()
            self._look_at(line, head, body)
        self._go_on_soon(line)
        self._tidy(line)

    def _tidy(self, line: _Line) -> None:
        """Keep nothing of who was not let in, or has been forgotten."""
        if (line.guest is None or line.guest.left) and not line.busy:
            line.leave()
            self._connections.get(line.connection, {}).pop(line.front, None)

    # What is asked --------------------------------------------------------------------

    def _look_at(self, line: _Line, head: bytes, body: Data) -> None:
        """Answer a request, or have it answered."""
        try:
            request = wire.read_request(body, self.limits)
            guest = self._greet(line, request.api_token)
            if request.endpoint == "get_action":
                line.call = call = _Call(self, line, head, request)
                self._loop.hand_over(self._submit, guest, call, len(body))
                return
            answer = self._serve(guest, request)
        except EdgemlError as error:
            if isinstance(error, Malformed):
                self.note("Malformed", line.connection.peer, error)
            answer = wire.write_error(text_of(error))
        except Exception as error:  # a client that waits for an answer waits for ever
            _log.exception("%s: a request failed", self.url)
            answer = wire.write_error(f"{type(error).__name__}: {text_of(error)}")
        self._answer(line, head, answer)

    def _submit(self, guest: Guest, call: _Call, nbytes: int) -> None:
        try:
            guest.call(call.payload, call.answer, call.fail, nbytes=nbytes)
        except BaseException as error:  # Ctrl-C
            self.settle(call, wire.write_error(f"{type(error).__name__} in the server"))
            raise

    def _greet(self, line: _Line, token: str | None) -> Guest:
        """Return who asks, whom the server has let in with this token."""
        if line.guest is None or line.guest.left or line.token != token:
            line.leave()
            try:
                # Of the end of who came by a proxy only that is told.
                forget = _FORGET if len(line.front) > 1 else None
                line.guest = self._dispatch.enter(line.connection.peer, token=token, forget=forget)
            except PermissionDenied as error:
                raise PermissionDenied(f"Unauthorized (api_token): {text_of(error)}") from None
            line.token = token
        return line.guest

    def _serve(self, guest: Guest, request: wire.Request) -> bytes:
        """Return the answer to what needs no function."""
        asked = request.endpoint
        said: dict[str, Any] = {}
        if asked == "ping":
            state = self._dispatch.state
            said = {"status": "ok", "message": "Server is running"}
            if state.state != "ready":
                said = {"status": state.state, "message": f"Server is {state}"}
        elif asked == "reset":
            wire.read_options(request.data)
            guest.begin_episode()
        elif asked == "get_modality_config":
            metadata, contract = self._dispatch.metadata, self._dispatch.contract()
            said = wire.modality_config(metadata, contract)
        elif asked == "kill":
            raise PermissionDenied("a client can't stop this server, on which others depend")
        else:
            known = "get_action, ping, reset and get_modality_config"
            raise Malformed(f"Unknown endpoint: {printable(asked)}; this server has {known}")
        return wire.write(said, self.limits)

    # Answers --------------------------------------------------------------------------

    def settle(self, call: _Call, answer: bytes) -> None:
        """Answer a call; from any thread."""
        if not self._loop.do(self._settle, call, answer):
            self.dropped += 1

    def _settle(self, call: _Call, answer: bytes) -> None:
        line = call.line
        if line.call is not call:  # its connection has ended, or it was told that the server stops
            self.dropped += 1
            return
        line.call = None
        self._answer(line, call.head, answer)
        self._go_on_soon(line)

    def _answer(self, line: _Line, head: bytes, answer: bytes) -> None:
        connection = line.connection
        try:
            sent = connection.send(head, answer)
        except Overloaded as error:
            self.dropped += 1
            self.counts["Overloaded"] += 1
            told = wire.write_error(f"an answer is dropped: {text_of(error)}")
            sent = connection.tell(head, told)
        if not sent:
            self.dropped += 1

    # The end --------------------------------------------------------------------------

    async def _stop(self) -> None:
        """Answer all that is under way, and what still comes; nobody would answer it later."""
        self._server.close()
        self._closed = True
        until = time.monotonic() + _LAST
        for line in [each for lines in self._connections.values() for each in lines.values()]:
            left = deque[bytes]([] if line.call is None else [line.call.head])
            line.call = None
            for w in line.waiting:
                left.extend([w.head] * w.number if isinstance(w, _Refused) else [w[0]])
            line.waiting.clear()
            while left and time.monotonic() < until:
                self._answer(line, left.popleft(), _STOPPED)
            self.dropped += len(left)
        came = -1
        while self._connections and came != self._came and time.monotonic() < until:
            came = self._came
            await asyncio.sleep(_QUIET)
        for connection in list(self._connections):
            connection.close()
        while self._connections:
            await asyncio.sleep(_QUIET / 10)

    def close(self) -> None:
        self._loop.close(self._stop, _LAST + _GRACE)


def _head_of(front: Front) -> bytes:
    """What comes before the answer to who put this in front of a request."""
    return b"".join(frame_head(_MORE, len(each)) + each for each in front)
