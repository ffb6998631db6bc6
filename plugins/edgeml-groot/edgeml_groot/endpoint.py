"""The door itself: a ROUTER, and the loop that alone touches it, whichever thread carries that.

It does what a REP does, for each client apart: a request comes with a return address, which ends
with an empty frame, and gets one answer, before that client's next request is looked at. Unlike a
REP it answers what it can't take as well, since a client that waits for an answer waits for ever.
"""

from __future__ import annotations

import ctypes
import logging
import math
import secrets
import time
from collections import deque
from contextlib import suppress
from typing import Any, TypeAlias

import zmq

from edgeml.core import (
    Dispatch,
    EdgemlError,
    Endpoint,
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
from edgeml.core.carrier import Carrier, Stay
from edgeml.core.errors import printable, text_of
from edgeml.core.forks import drop_sockets, leave_to_parent, watch_forks
from edgeml.core.quota import Held, Quota
from edgeml.core.refusals import Refusals
from edgeml.core.url import is_loopback, require_no_path
from edgeml_groot import wire
from edgeml_groot.connections import Connection, Connections

__all__ = ["GrootEndpoint"]

_log = logging.getLogger(__name__)

_MOST_AT_ONCE = 64  # messages that are received before a handler runs again
_MOST_ADDRESS = 16  # frames of a return address: a proxy adds one
_LARGEST_ID = 255  # bytes of each
_MOST_ANSWERS = 1 << 12  # that one client has not read, however small
_SLACK = 1 << 26  # bytes beyond the limit of which a peer is told; if more, libzmq cuts it off
_TICK = 0.25  # seconds between two looks at those that are connected
_FORGET = 600.0  # seconds of silence after which a client behind a proxy is forgotten
_LAST = 0.2  # seconds that a door which closes goes on to answer what comes, ...
_QUIET = 0.03  # ... unless nothing has come for so many
_LINGER = 200  # ms that it then gives to what is still to be sent
_MORE_NOW = int(zmq.SNDMORE | zmq.DONTWAIT)  # a plain int: enum flags cost a microsecond
_NO_MEMORY = wire.write_error("no memory for this request: try again later")
_STOPPED = wire.write_error("the server has been stopped")

_Address: TypeAlias = "tuple[bytes, ...]"


class _Refused:
    """Requests in a row that are answered with an error, when it is their turn."""

    __slots__ = ("answer", "number")

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.number = 1


class _Line:
    """One client: all that comes with the same return address over one connection.

    Attributes:
        address: what its answers begin with.
        waiting: requests that came while another one was under way, and what each takes up.
        call: what is under way.
        guest: who it is to the server, with the token that it has shown.
        seen: when its last request came.
    """

    __slots__ = ("address", "call", "connection", "guest", "seen", "token", "waiting")

    def __init__(self, address: _Address, connection: Connection) -> None:
        self.address = address
        self.connection = connection
        self.waiting: deque[tuple[bytes, Held] | _Refused] = deque()
        self.call: _Call | None = None
        self.guest: Guest | None = None
        self.token: str | None = None
        self.seen = 0.0

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

    __slots__ = ("_endpoint", "_form", "_request", "line")

    def __init__(self, endpoint: GrootEndpoint, line: _Line, request: wire.Request) -> None:
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


class GrootEndpoint(Endpoint):
    """Serves at one address; see `Endpoint`."""

    def __init__(self, url: Url, dispatch: Dispatch, limits: Limits) -> None:
        require_no_path(url)
        self.limits = limits
        self._dispatch = dispatch
        self._ready: deque[_Line] = deque()  # whose next request can be looked at
        self._requests = Quota(limits.bytes_per_client, limits.bytes, "of requests waiting")
        self._unread = Quota(limits.replies_per_client, limits.bytes, "of answers not read")
        self._context: zmq.Context[Any] = zmq.Context()
        # libzmq names peers from where C's rand() is, which nobody has seeded, and ends the process
        # when it comes to a name that a peer has given itself.
        ctypes.CDLL(None).srand(secrets.randbits(32))
        self._router = self._open(zmq.ROUTER)
        self._router.router_mandatory = True
        self._router.sndhwm = _MOST_ANSWERS
        self._router.rcvhwm = _MOST_AT_ONCE
        self._router.maxmsgsize = largest = limits.message_bytes + _SLACK
        self._router.handshake_ivl = max(1, int(limits.handshake * 1e3))
        # A machine that vanished without a word is noticed, and what is kept for it freed.
        self._router.tcp_keepalive, self._router.tcp_keepalive_cnt = 1, 3
        self._router.tcp_keepalive_idle, self._router.tcp_keepalive_intvl = 10, 5  # seconds
        self._router.tcp_maxrt = 60_000  # ms
        self._bell, self._heard = self._open(zmq.PAIR), self._open(zmq.PAIR)
        try:
            self._connections = Connections(
                self._context, self._router, limits, largest, self._note, self._forget
            )
            self.url = self._bind(url)
        except BaseException:
            with suppress(zmq.ZMQError):
                self._router.disable_monitor()
            self._context.destroy(linger=0)
            raise
        self._connections.port = self.url.port
        self._refusals = Refusals(self.url, self.counts)
        bell = f"inproc://{secrets.token_hex(8)}"
        self._heard.bind(bell)
        self._bell.connect(bell)
        self._poller = zmq.Poller()
        for each in (self._router, self._heard, self._connections.monitor):
            self._poller.register(each, zmq.POLLIN)
        self._due = time.monotonic() + _TICK
        self._outbox: deque[tuple[_Call, bytes]] = deque()
        self._woken = False
        self._torn = False  # whether a round ended in the middle of a message
        self._closed = False
        self._carrier = Carrier(f"edgeml {self.url}", self._run_rounds, self._wake, self._end)
        self._carrier.start()
        watch_forks(self)

    def _open(self, kind: int) -> zmq.Socket[bytes]:
        made: zmq.Socket[bytes] = self._context.socket(kind)
        made.linger = 0
        return made

    def _bind(self, url: Url) -> Url:
        address = find_address(url)
        self.local = is_loopback(address)
        self._router.ipv6 = "[" in address
        try:
            self._router.bind(f"tcp://{address}:{url.port or '*'}")
        except zmq.ZMQError as error:
            reason = f"cannot serve {url}: {error}; another port, or 0, may be free"
            raise OSError(error.errno, reason) from error
        bound = self._router.get_string(zmq.LAST_ENDPOINT)
        return tell_url(url, address, int(bound.rpartition(":")[2]))

    def _note(self, kind: str, peer: Peer, why: object) -> None:
        self._refusals.note(kind, peer.address, peer.host, why)

    # The loop -------------------------------------------------------------------------

    def _run_rounds(self, stay: Stay) -> bool:
        if self._torn:
            while self._router.getsockopt(zmq.RCVMORE):
                self._router.recv()
            self._torn = False
        try:
            if stay():
                self._round()
                while not self._closed and stay():
                    self._round()
            else:
                self._look_around()
                for _ in range(_MOST_AT_ONCE):
                    if not self._receive():
                        break
        except BaseException:  # no memory, or Ctrl-C in the thread that carries this
            self._torn = True
            raise
        return self._closed and self._finish()

    def _round(self) -> None:
        """Do what there is to do, and take a message; or wait for either."""
        busy = bool(self._woken or self._outbox or self._ready or time.monotonic() >= self._due)
        if busy:
            self._look_around()
        if not self._receive() and not busy:
            left = max(0.0, self._due - time.monotonic())
            if self._connections.monitor in dict(self._poller.poll(math.ceil(left * 1e3))):
                self._connections.follow()

    def _look_around(self) -> None:
        """Do what there is to do but for new messages."""
        self._empty_outbox()
        for _ in range(len(self._ready)):
            self._go_on(self._ready.popleft())
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + _TICK
            self._connections.look()
            self._forget_the_silent()

    def _receive(self) -> bool:
        """Take a message; whether there was one."""
        try:
            routing_id = self._router.recv(zmq.DONTWAIT)
        except zmq.Again:
            return False
        frames: list[zmq.Frame] = []  # but for those that are far too many
        size = 0
        more = True
        while more:
            frame = self._router.recv(copy=False)
            more = frame.more
            length = len(frame)
            size += length + (9 if length > _LARGEST_ID else 2)
            if len(frames) < _MOST_ADDRESS + 3:
                frames.append(frame)
        self._take(routing_id, frames, size)
        return True

    def _take(self, routing_id: bytes, frames: list[zmq.Frame], size: int) -> None:
        """Take what came, or answer what is wrong with it."""
        end = next((n for n, frame in enumerate(frames) if not len(frame)), -1)
        address = (routing_id, *(frame.bytes for frame in frames[: end + 1]))
        wrong = ""
        if end < 0:
            wrong = "an empty frame in front of it, as a REQ sends"
        elif end > _MOST_ADDRESS or max(map(len, address)) > _LARGEST_ID:
            address, wrong = (routing_id, b""), "a shorter return address"
        elif end + 2 != len(frames):
            wrong = "exactly one frame after the empty one"
        connection: Connection | None
        try:
            connection = self._connections.find(int(frames[0].get(zmq.SRCFD)), address)
        except zmq.ZMQError:  # of such old ones libzmq tells nothing else
            connection, wrong = Connection(-1, ("an old client", 0)), "ZMTP 3, as of libzmq 4"
        if connection is None:
            self.dropped += 1  # who sent it has gone, and nobody reads an answer
            return
        if not connection.spoke:
            self._connections.meet(connection)
        connection.taken += size
        line = connection.lines.get(address) or _Line(address, connection)
        if wrong:
            wrong = f"a request needs {wrong}"
            self._note("Malformed", connection.peer, wrong)
            self._refuse(line, wire.write_error(wrong))
        elif self._closed:
            self._answer(line, _STOPPED)
        else:
            connection.lines[address] = line
            self._put(line, frames[-1])
            self._tidy(line)

    def _put(self, line: _Line, frame: zmq.Frame) -> None:
        """Look at a request, or have it wait for those before it."""
        line.seen = time.monotonic()
        connection = line.connection
        most = self.limits.message_bytes
        if len(frame) > most:
            wrong = f"a request of {len(frame)} bytes, and {most} are taken (Limits.message_bytes)"
            self._note("Malformed", connection.peer, wrong)
            self._refuse(line, wire.write_error(wrong))
            return
        try:
            if not line.busy:
                self._look_at(line, frame.bytes)
                return
            if connection.waiting >= self.limits.calls_per_client:
                raise Overloaded(f"{connection.waiting} requests of yours wait already")
            held = self._requests.take(connection.peer, len(frame))
            try:
                line.waiting.append((frame.bytes, held))
            except MemoryError:
                held.release()
                raise
            connection.waiting += 1
        except Overloaded as error:
            self.counts["Overloaded"] += 1
            self._refuse(line, wire.write_error(text_of(error)))
        except MemoryError:
            self.counts["Overloaded"] += 1
            self._refuse(line, _NO_MEMORY)

    def _refuse(self, line: _Line, answer: bytes) -> None:
        """Answer a request with an error, after those before it."""
        if not line.busy:
            self._answer(line, answer)
        elif line.waiting and isinstance(last := line.waiting[-1], _Refused):
            last.number += 1  # however many come, they take up no more
        else:
            line.waiting.append(_Refused(answer))

    def _go_on(self, line: _Line) -> None:
        """Look at one request that waited; then others have their turn."""
        if not line.waiting or line.call is not None:
            return
        waits = line.waiting[0]
        if isinstance(waits, _Refused):
            self._answer(line, waits.answer)
            waits.number -= 1
            if not waits.number:
                line.waiting.popleft()
        else:
            body, held = line.waiting.popleft()  # type: ignore[misc]
            line.connection.waiting -= 1
            held.release()
            self._look_at(line, body)
        if line.waiting and line.call is None:
            self._ready.append(line)
        self._tidy(line)

    # What is asked --------------------------------------------------------------------

    def _look_at(self, line: _Line, body: bytes) -> None:
        """Answer a request, or have it answered."""
        try:
            request = wire.read_request(body, self.limits)
            guest = self._greet(line, request.api_token)
            if request.endpoint == "get_action":
                line.call = call = _Call(self, line, request)
                self._carrier.hand_over(self._submit, guest, call, len(body))
                return
            answer = self._serve(guest, request)
        except EdgemlError as error:
            if isinstance(error, Malformed):
                self._note("Malformed", line.connection.peer, error)
            answer = wire.write_error(text_of(error))
        except Exception as error:  # a client that waits for an answer waits for ever
            _log.exception("%s: a request failed", self.url)
            answer = wire.write_error(f"{type(error).__name__}: {text_of(error)}")
        self._answer(line, answer)

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
                line.guest = self._dispatch.enter(line.connection.peer, token=token)
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
        with self._carrier.turn:
            if self._carrier.over:
                self.dropped += 1
            elif self._carrier.here:
                self._settle(call, answer)
            else:
                self._outbox.append((call, answer))
                self._carrier.rouse()

    def _settle(self, call: _Call, answer: bytes) -> None:
        line = call.line
        if line.call is not call:  # its connection has ended, or it was told that the server stops
            self.dropped += 1
            return
        line.call = None
        self._answer(line, answer)
        if line.waiting and line not in self._ready:
            self._ready.append(line)  # which the next round sees

    def _answer(self, line: _Line, answer: bytes) -> None:
        connection = line.connection
        held = None
        try:
            held = connection.hold(answer, self._unread)
        except Overloaded as error:
            self.dropped += 1
            self.counts["Overloaded"] += 1
            answer = wire.write_error(f"an answer is dropped: {text_of(error)}")
        try:
            for frame in line.address:
                self._router.send(frame, _MORE_NOW)
            if held is None:
                self._router.send(answer, zmq.DONTWAIT)
                return
            try:
                tracker = self._router.send(answer, zmq.DONTWAIT, copy=False, track=True)
            except RuntimeError:  # pyzmq can't start its thread any more, as the program ends
                self._router.send(answer, zmq.DONTWAIT)
            else:
                connection.sent(tracker, held)
                held = None
        except zmq.ZMQError as error:
            self.dropped += 1
            if error.errno == zmq.EAGAIN:  # too many unread ones, rather than nobody there
                self.counts["Overloaded"] += 1
            _log.debug("%s: no answer reaches %s: %s", self.url, connection.peer.address, error)
        except BaseException:  # Ctrl-C: what comes next must not be taken for the rest of this
            with suppress(zmq.ZMQError):
                self._router.send(b"", zmq.DONTWAIT)
            raise
        finally:
            if held is not None:
                held.release()

    def _empty_outbox(self) -> None:
        """Send what other threads left."""
        with self._carrier.turn:
            self._woken = False
        with suppress(zmq.Again):
            while True:
                self._heard.recv(zmq.DONTWAIT)
        while self._outbox:
            self._settle(*self._outbox.popleft())

    # Who leaves -----------------------------------------------------------------------

    def _forget(self, connection: Connection) -> None:
        """Forget all who came by a connection, which has ended."""
        for line in list(connection.lines.values()):
            self._drop(line)

    def _forget_the_silent(self) -> None:
        """Forget who came by a proxy and is heard no more: of its end only the proxy knows."""
        now = time.monotonic()
        for connection in self._connections:
            for line in list(connection.lines.values()):
                if len(line.address) > 2 and not line.busy and now - line.seen > _FORGET:
                    self._drop(line)

    def _tidy(self, line: _Line) -> None:
        """Keep nothing of who was not let in."""
        if line.guest is None and not line.busy:
            line.connection.lines.pop(line.address, None)

    def _drop(self, line: _Line) -> None:
        line.connection.lines.pop(line.address, None)
        line.call = None
        for waits in line.waiting:
            if not isinstance(waits, _Refused):
                waits[1].release()
        line.waiting.clear()
        line.leave()

    # The end --------------------------------------------------------------------------

    def _finish(self) -> bool:
        """Answer all that is under way, and what still comes; nobody would answer it later."""
        self._empty_outbox()
        lines = [line for each in self._connections for line in each.lines.values()]
        for line in lines:
            if line.call is not None:
                line.call = None
                self._answer(line, _STOPPED)
        until = time.monotonic() + _LAST
        for line in lines:
            left = sum(w.number if isinstance(w, _Refused) else 1 for w in line.waiting)
            line.waiting.clear()
            while left and time.monotonic() < until:
                self._answer(line, _STOPPED)
                left -= 1
            self.dropped += left
        while time.monotonic() < until and self._router.poll(int(_QUIET * 1e3)):
            self._receive()
        for connection in self._connections:
            self._forget(connection)
        return True

    def _end(self) -> None:
        with self._carrier.turn:
            self.dropped += len(self._outbox)
            self._outbox.clear()
            self._bell.close()
            self._heard.close()
        self._connections.close()
        self._router.close(linger=_LINGER)
        self._context.term()

    def _wake(self) -> None:
        if not self._woken:
            self._bell.send(b"")
            self._woken = True  # last: Ctrl-C may come before it, but must not undo it

    def carry(self, stay: Stay) -> bool:
        return self._carrier.carry(stay)

    def wake(self) -> None:
        self._carrier.wake()

    def relieve(self) -> None:
        self._carrier.relieve()

    def abandon(self) -> None:
        """Forget everything, in a forked child, where the loop is not."""
        leave_to_parent(self)
        if not self._carrier.over:
            drop_sockets(port=self.url.port)
        self._carrier.abandon()
        self._closed = True

    def close(self) -> None:
        with self._carrier.turn:
            self._closed = True
            if not self._carrier.in_round:
                self._carrier.relieve()  # a handler that stops its own server carries it no more
            self._carrier.wake()
        self._carrier.wait(3.0)
