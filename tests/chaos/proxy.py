"""A TCP proxy whose faults are switched on and off while it runs, in a process of its own.

A process's role (`zygote`): `main(orders, options)`. Its orders:

- ``set``: any fields of `Weather`, the others as they are; ``calm`` sets all of them back.
- ``target``: the port that it leads to; None refuses connections, as a machine does without a
  server.
- ``cut``: all connections end in order (FIN). ``reset``: they are reset (RST), amid whatever is
  under way. ``half-open``: the server's end is reset, and the client is told nothing.
- ``counts``: answered with what has passed.

Options: ``seed``, and ``history``, a file in which a `witness` tells, which does nothing else here.

A packet that is lost shows, above TCP, as a stall of what comes after it: that is what is done.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

from . import witness
from .history import Writer

_KEPT = 1 << 20  # bytes of one direction that are held at most; more is left unread
_RETRANSMISSION = (0.2, 0.6)  # seconds that a lost packet costs
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() resets


@dataclass
class Weather:
    """What the network is like; each way, unless it says otherwise.

    Attributes:
        delay: seconds that each piece takes.
        jitter: up to so many seconds more, by chance; the order stays.
        loss: the probability that a piece stalls, as after a lost packet.
        bandwidth: bytes a second; 0 for any number.
        piece: bytes that are passed on at a time, at most.
        dark: which way nothing passes: "" (none), "up" (to the server), "down", "both".
    """

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    bandwidth: float = 0.0
    piece: int = 1 << 16
    dark: str = ""


class _Way:
    """One direction of a connection."""

    def __init__(self, proxy: Proxy, name: str, source: socket.socket, sink: socket.socket) -> None:
        self._proxy, self._name = proxy, name
        self._source, self._sink = source, sink
        self._waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._held = 0
        self._room = asyncio.Condition()
        self._due = 0.0  # of the newest piece

    async def run(self) -> None:
        await _all(self._read(), self._write())

    async def _read(self) -> None:
        loop, weather = asyncio.get_running_loop(), self._proxy.weather
        piece = b"..."
        while piece:
            await self._proxy.light(self._name)
            try:
                piece = await loop.sock_recv(self._source, weather.piece)
            except OSError:
                piece = b""
            now = loop.time()
            due = max(self._due, now) if weather.bandwidth else now
            if weather.bandwidth:
                due += len(piece) / weather.bandwidth
            due += weather.delay + weather.jitter * self._proxy.rng.random()
            if self._proxy.rng.random() < weather.loss:
                due += self._proxy.rng.uniform(*_RETRANSMISSION)
            self._due = max(self._due, due)
            self._waiting.put_nowait((self._due, piece))
            async with self._room:
                self._held += len(piece)
                await self._room.wait_for(lambda: self._held < _KEPT)

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, piece = await self._waiting.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            await self._proxy.light(self._name)
            if not piece:
                with suppress(OSError):
                    self._sink.shutdown(socket.SHUT_WR)
                return
            await loop.sock_sendall(self._sink, piece)
            self._proxy.counts[self._name] += len(piece)
            self._proxy.counts["pieces"] += 1
            async with self._room:
                self._held -= len(piece)
                self._room.notify_all()


class Proxy:
    """Leads from a port of its own to another."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.weather = Weather()
        self.counts = {"up": 0, "down": 0, "pieces": 0, "connections": 0}
        # Bound and not listening, it keeps the port when connections are refused.
        self._place = self._bind(0)
        self.port: int = self._place.getsockname()[1]
        self._listener: socket.socket | None = None
        self._accepting = False
        self._target: int | None = None
        self._pairs: dict[asyncio.Task[None], tuple[socket.socket, socket.socket]] = {}
        self._orphans: list[socket.socket] = []  # whose peers were taken from them
        self._changed = asyncio.Condition()

    @staticmethod
    def _bind(port: int) -> socket.socket:
        made = socket.socket()
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("127.0.0.1", port))
        return made

    async def light(self, way: str) -> None:
        """Wait while nothing passes that way."""
        if self.weather.dark in (way, "both"):
            async with self._changed:
                await self._changed.wait_for(lambda: self.weather.dark not in (way, "both"))

    async def obey(self, order: dict[str, Any]) -> Any:
        what = order.pop("do")
        if what == "set":
            known = {field.name for field in fields(Weather)}
            assert set(order) <= known, order
            for name, value in order.items():
                setattr(self.weather, name, value)
        elif what == "calm":
            for name, value in asdict(Weather()).items():
                setattr(self.weather, name, value)
            self._let_go_of_orphans()
        elif what == "target":
            self._lead_to(order["port"])
        elif what == "cut":
            self._end_all(reset=False)
        elif what == "reset":
            self._end_all(reset=True)
        elif what == "half-open":
            for task, (client, server) in [*self._pairs.items()]:
                self._orphans.append(client)
                self._pairs[task] = (server, server)
                _linger(server)
                task.cancel()
        elif what == "counts":
            return {**self.counts, "open": len(self._pairs), "orphans": len(self._orphans)}
        else:
            raise ValueError(f"no such order: {what!r}")
        self._accept_or_not()
        async with self._changed:
            self._changed.notify_all()
        return None

    def _lead_to(self, port: int | None) -> None:
        self._target = port
        if port is None and self._listener is not None:
            self._accept_or_not()
            self._listener.close()
            self._listener = None
        elif port is not None and self._listener is None:
            self._listener = self._bind(self.port)
            self._listener.listen(1024)

    def _accept_or_not(self) -> None:
        """Accept connections but in the dark, where the kernel takes them and nobody answers."""
        accept = self._target is not None and self.weather.dark not in ("up", "both")
        if self._listener is None or accept == self._accepting:
            return
        self._accepting = accept
        loop = asyncio.get_running_loop()
        if accept:
            loop.add_reader(self._listener, self._accept, self._listener)
        else:
            loop.remove_reader(self._listener)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(BlockingIOError, ConnectionAbortedError):
            client, _ = listener.accept()
            client.setblocking(False)
            task = asyncio.ensure_future(self._serve(client))
            self._pairs[task] = (client, client)
            task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        for end in self._pairs.pop(task):  # only now, as the loop watched them
            end.close()

    async def _serve(self, client: socket.socket) -> None:
        self.counts["connections"] += 1
        server = socket.socket()
        server.setblocking(False)
        task = asyncio.current_task()
        assert task is not None
        self._pairs[task] = (client, server)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.get_running_loop().sock_connect(server, ("127.0.0.1", self._target))
            up, down = _Way(self, "up", client, server), _Way(self, "down", server, client)
            await _all(up.run(), down.run())
        except OSError:
            _linger(client)
            _linger(server)

    def _end_all(self, reset: bool) -> None:
        for task, ends in [*self._pairs.items()]:
            for end in ends:
                if reset:
                    _linger(end)
            task.cancel()
        self._let_go_of_orphans()

    def _let_go_of_orphans(self) -> None:
        while self._orphans:
            _reset(self._orphans.pop())


async def _all(*parts: Coroutine[Any, Any, None]) -> None:
    """Run all; as soon as one fails, end the others, and raise that."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _linger(end: socket.socket) -> None:
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def _reset(end: socket.socket) -> None:
    _linger(end)
    end.close()


def main(orders: socket.socket, options: dict[str, Any]) -> None:
    """Obey orders until they end; the first answer is the port."""
    if "history" in options:
        witness.watch(Writer(options["history"]))
    asyncio.run(_main(orders, options["seed"]))


async def _main(orders: socket.socket, seed: int) -> None:
    proxy = Proxy(seed)
    loop = asyncio.get_running_loop()
    orders.setblocking(False)
    await loop.sock_sendall(orders, json.dumps(proxy.port).encode())
    while packet := await loop.sock_recv(orders, 1 << 16):
        answer = await proxy.obey(json.loads(packet))
        await loop.sock_sendall(orders, json.dumps(answer).encode())
