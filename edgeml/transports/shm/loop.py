"""One thread that receives on any number of channels, for a listener and for a connection alike."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from edgeml.core import Message, Overloaded
from edgeml.transports.shm.channel import Channel
from edgeml.transports.shm.sockets import Lost
from edgeml.transports.shm.waiting import IN, OUT, Poller, Waiter

__all__ = ["Loop"]

_log = logging.getLogger(__name__)

_TICK = 0.25  # seconds
_LINGER = 0.2  # seconds that what is still to be sent has when the loop ends


class Loop:
    """Receives, and sends what found no room in a socket when it was to be sent.

    Args:
        name: of the thread.
        on_message: is given each message; one at a time, unless `relieve` is called.
        on_lost: is told of each channel that has been closed, and why.
        on_tick: is called four times a second.
        on_end: is called last, when all channels are closed.
    """

    def __init__(
        self,
        name: str,
        on_message: Callable[[Channel, int, Message | Overloaded], object],
        on_lost: Callable[[Channel, str], None],
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
        self._listening: tuple[int, Callable[[], Channel | None]] | None = None
        self._channels: dict[int, Channel] = {}
        self._full: set[Channel] = set()  # whose outbox has begun to fill
        self._writing: set[Channel] = set()  # those that are waited for
        self._bell, self._listen = socket.socketpair()
        self._bell.setblocking(False)
        self._listen.setblocking(False)
        self._poller.set(self._listen.fileno(), IN, new=True)
        self._turn = threading.Lock()  # held to pass the loop on to another thread
        self._stopping = False
        self._ended = threading.Event()
        self._handling = False
        self._next_tick = time.monotonic() + _TICK

    def listen(self, sock: socket.socket, accept: Callable[[], Channel | None]) -> None:
        """Call ``accept`` when somebody connects; before the start."""
        self._listening = sock.fileno(), accept
        self._poller.set(sock.fileno(), IN, new=True)

    def add(self, channel: Channel) -> None:
        """Receive from a channel; before the start, or in the loop's thread."""
        channel.on_full = self._note_full
        self._channels[channel.records.fd] = channel
        self._poller.set(channel.records.fd, IN, new=True)

    def start(self) -> None:
        """Go on in a fresh thread."""
        self._handling = False
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    @property
    def channels(self) -> list[Channel]:
        """Those that are open."""
        return list(self._channels.values())

    def relieve(self) -> None:
        """Go on in a fresh thread if this one is stuck in a message."""
        with self._turn:
            if self._handling:
                self.start()

    def stop(self) -> None:
        """End, from any thread; waits for the end, except in the loop's own thread."""
        self.stop_soon()
        thread = self._thread
        if thread is threading.current_thread():
            return  # it ends when what it is at returns
        if not self._ended.wait(1.0):  # it is stuck in a message
            self.relieve()
            self._ended.wait(1.0)
        thread = self._thread
        if thread is not threading.current_thread():
            thread.join(1.0)

    def stop_soon(self) -> None:
        """End, without waiting for it."""
        self._stopping = True
        self._wake()

    def abandon(self) -> None:
        """In a forked child, where the thread is not."""
        self._turn = threading.Lock()
        self._stopping = True
        self._ended.set()
        for channel in self._channels.values():
            channel.abandon()
        self._channels.clear()

    def _wake(self) -> None:
        with suppress(OSError):  # it is full, so the loop will wake; or closed, so it has ended
            self._bell.send(b"!")

    def _note_full(self, channel: Channel) -> None:
        self._full.add(channel)
        self._wake()

    def _run(self) -> None:
        me = threading.current_thread()
        while not self._stopping:
            for fd, events in self._waiter.wait(self._poller.look, _TICK):
                channel = self._channels.get(fd)
                if channel is None:
                    self._other(fd)
                elif not self._receive(channel, events, me):
                    return
            if self._full:
                self._write_full()
            if time.monotonic() > self._next_tick:
                self._tick()
        self._end()

    def _other(self, fd: int) -> None:
        if self._listening is not None and fd == self._listening[0]:
            channel = self._listening[1]()
            if channel is not None:
                self.add(channel)
        elif fd == self._listen.fileno():
            self._listen.recv(4096)

    def _receive(self, channel: Channel, events: int, me: threading.Thread) -> bool:
        """Do what there is to do for a channel; False if another thread has the loop now."""
        try:
            if events & OUT and channel.flush():
                self._writing.discard(channel)
                self._poller.set(channel.records.fd, IN)
            if not events & ~OUT:
                return True
            got = channel.receive()
        except Lost as error:
            self._lose(channel, str(error))
            return True
        if got is None:
            return True
        self._handling = True
        try:
            self._on_message(channel, *got)
        except BaseException:  # a handler's sys.exit() ends nothing here
            _log.exception("%s: a message could not be handled", self._name)
        del got  # or the buffers live until the next one
        with self._turn:
            if self._thread is not me:
                return False
            self._handling = False
        return True

    def _write_full(self) -> None:
        while self._full:
            channel = self._full.pop()
            if self._channels.get(channel.records.fd) is channel and channel not in self._writing:
                self._writing.add(channel)
                self._poller.set(channel.records.fd, IN | OUT)

    def _tick(self) -> None:
        self._next_tick = time.monotonic() + _TICK
        for channel in self.channels:
            try:
                channel.tidy()
            except Lost as error:
                self._lose(channel, str(error))
        self._on_tick()

    def _lose(self, channel: Channel, why: str) -> None:
        self._poller.remove(channel.records.fd)
        del self._channels[channel.records.fd]
        self._writing.discard(channel)
        self._on_lost(channel, why)

    def _end(self) -> None:
        deadline = time.monotonic() + _LINGER
        left = self.channels
        while left and time.monotonic() < deadline:
            left = [channel for channel in left if not self._flushed(channel)]
            if left:
                time.sleep(1e-3)
        for channel in self.channels:
            self._lose(channel, "this end has been closed")
        self._poller.close()
        self._bell.close()
        self._listen.close()
        self._ended.set()
        self._on_end()

    def _flushed(self, channel: Channel) -> bool:
        try:
            return channel.flush()
        except Lost:
            return True
