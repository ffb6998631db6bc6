"""One loop that receives on any number of channels, for a listener and for a connection alike."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from edgeml.core import EdgemlError, Message
from edgeml.core.backlog import Backlog
from edgeml.core.carrier import Carrier, Left, Stay
from edgeml.transports.shm.channel import Channel
from edgeml.transports.shm.sockets import Lost
from edgeml.transports.shm.waiting import IN, OUT, Poller, Waiter

__all__ = ["Reactor"]

_log = logging.getLogger(__name__)

_TICK = 0.25  # seconds
_MOST_AT_ONCE = 64  # messages that are received before a handler runs again
_LINGER = 0.2  # seconds that what is still to be sent has when the loop ends


class Reactor:
    """Receives, and sends what found no room in a socket when it was to be sent.

    A listener takes nothing from a peer that leaves unread what it was sent, or each request would
    cost memory for its reply. A connection does: two that waited for each other would for ever.

    Args:
        name: of the thread.
        on_message: is given each message, one at a time.
        on_lost: is told of each channel that has been closed, and why.
        on_tick: is called four times a second.
        on_end: is called last, when all channels are closed.

    Attributes:
        backlog: of what is to be received.
    """

    def __init__(
        self,
        name: str,
        on_message: Callable[[Channel, int, Message | EdgemlError], object],
        on_lost: Callable[[Channel, Lost], None],
        on_tick: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self._name = name
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_tick = on_tick
        self._on_end = on_end
        self._poller = Poller()
        self._waiter = Waiter()
        self.backlog = Backlog()
        self._listening: tuple[int, Callable[[], Channel | None]] | None = None
        self._deaf = False  # to who connects, until the next tick
        self._channels: dict[int, Channel] = {}
        self._full: set[Channel] = set()  # whose outbox has begun to fill
        self._writing: set[Channel] = set()  # those that are waited for
        self._bell, self._listen = socket.socketpair()
        self._bell.setblocking(False)
        self._listen.setblocking(False)
        self._poller.set(self._listen.fileno(), IN, new=True)
        self._stopping = False
        self._carrier = Carrier(name, self._run_rounds, self._wake, self._end)
        self._next_tick = time.monotonic() + _TICK

    def listen(self, sock: socket.socket, accept: Callable[[], Channel | None]) -> None:
        """Call ``accept`` when somebody connects; before the start.

        When it raises an OSError, as this process has too many files open, it is called no more
        until the next tick, or the loop would do nothing else.
        """
        self._listening = sock.fileno(), accept
        self._poller.set(sock.fileno(), IN, new=True)

    def add(self, channel: Channel) -> None:
        """Receive from a channel; before the start, or in the loop's thread."""
        channel.on_full = self._note_full
        self._channels[channel.records.fd] = channel
        self._poller.set(channel.records.fd, IN, new=True)

    def start(self) -> None:
        """Run in a thread of its own, until somebody comes to carry the loop."""
        self._carrier.start()

    @property
    def channels(self) -> list[Channel]:
        """Those that are open."""
        return list(self._channels.values())

    def carry(self, stay: Stay) -> bool:
        """Run in the calling thread; see `Endpoint.carry`."""
        return self._carrier.carry(stay)

    def wake(self) -> None:
        """See `Endpoint.wake`."""
        self._carrier.wake()

    @property
    def inside(self) -> bool:
        """Whether this is the thread that runs the loop."""
        return self._carrier.here

    def strand(self) -> None:
        """Go on in a fresh thread, since this one waits in a message for what the loop brings."""
        self._carrier.strand()

    def relieve(self) -> None:
        """See `Endpoint.relieve`."""
        self._carrier.relieve()

    def stop(self) -> None:
        """End, from any thread; waits for the end, except within the loop."""
        self.stop_soon()
        self._carrier.wait(2.0)

    def stop_soon(self) -> None:
        """End, without waiting for it."""
        with self._carrier.turn:
            self._stopping = True
            if not self._carrier.in_round:
                self._carrier.relieve()  # a handler that stops its own server carries it no more
            self._carrier.wake()

    def abandon(self) -> None:
        """In a forked child, where the thread is not."""
        self._carrier.abandon()
        self._stopping = True
        for channel in self._channels.values():
            channel.abandon()
        self._channels.clear()

    def _wake(self) -> None:
        with suppress(OSError):  # it is full, so the loop will wake; or closed, so it has ended
            self._bell.send(b"!")

    def _note_full(self, channel: Channel) -> None:
        self._full.add(channel)
        if not self._carrier.here:
            self._carrier.rouse()

    def _run_rounds(self, stay: Stay) -> bool:
        if stay():
            self._run_round(True)
            while not self._stopping and stay():
                self._run_round(True)
        else:  # all that has come, as a channel gives one message a time
            most = _MOST_AT_ONCE
            while most > 0 and (came := self._run_round(False)) and not self._stopping:
                most -= came
        return self._stopping

    def _run_round(self, waiting: bool) -> int:
        """Receive once from each channel that has something; returns how many there were."""
        look = self._poller.look
        found = look(0) if not waiting or self.backlog.measured else []
        if not found:
            self.backlog.clear()
            if waiting:
                found = self._waiter.wait(look, _TICK)
        for fd, events in found:
            channel = self._channels.get(fd)
            if channel is None:
                self._other(fd)
            else:
                self._receive(channel, events)
        if self._full:
            self._write_full()
        if time.monotonic() > self._next_tick:
            self._tick()
        return len(found)

    def _other(self, fd: int) -> None:
        if self._listening is not None and fd == self._listening[0]:
            try:
                channel = self._listening[1]()
            except OSError:
                self._poller.remove(fd)
                self._deaf = True
                return
            if channel is not None:
                self.add(channel)
        elif fd == self._listen.fileno():
            self._listen.recv(4096)

    def _receive(self, channel: Channel, events: int) -> None:
        try:
            if events & OUT and channel.flush():
                self._writing.discard(channel)
                self._poller.set(channel.records.fd, IN)
            if not events & ~OUT:
                return
            got = channel.receive()
        except Lost as error:
            self.lose(channel, error)
            return
        except Exception as error:  # no memory is left for what it sends, say
            self.lose(channel, Lost(f"{type(error).__name__}: {error}", type(error).__name__))
            return
        if got is not None:
            self._carrier.hand_over(self._on_message, channel, *got)
            if not self._carrier.here:
                raise Left  # it was stranded

    def _write_full(self) -> None:
        while self._full:
            channel = self._full.pop()
            if self._channels.get(channel.records.fd) is channel and channel not in self._writing:
                self._writing.add(channel)
                both = IN if self._listening is None else 0
                self._poller.set(channel.records.fd, both | OUT)

    def _tick(self) -> None:
        self._next_tick = time.monotonic() + _TICK
        if self._deaf and self._listening is not None:
            self._deaf = False
            self._poller.set(self._listening[0], IN, new=True)
        for channel in self.channels:
            try:
                channel.tidy()
            except Lost as error:
                self.lose(channel, error)
        self._on_tick()

    def lose(self, channel: Channel, why: Lost) -> None:
        """Have no more to do with a channel; in the loop's thread."""
        self._poller.remove(channel.records.fd)
        del self._channels[channel.records.fd]
        self._writing.discard(channel)
        self._on_lost(channel, why)

    def _end(self) -> None:
        deadline = time.monotonic() + _LINGER
        left = self.channels
        while left and time.monotonic() < deadline:
            left = [channel for channel in left if not self._try_to_flush(channel)]
            if left:
                time.sleep(1e-3)
        for channel in self.channels:
            self.lose(channel, Lost("this end has been closed"))
        self._poller.close()
        self._bell.close()
        self._listen.close()
        self._on_end()

    def _try_to_flush(self, channel: Channel) -> bool:
        try:
            return channel.flush()
        except Lost:
            return True
