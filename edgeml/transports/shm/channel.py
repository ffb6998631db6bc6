"""One socket between two processes of a user: records, and the memory that they speak of.

Every record is at most 64 KiB, little-endian, and begins with::

    u8 kind, u8 flags, u16 returns, u32 buffers, u32 header bytes, u64 number

- ``HELLO``: 8 bytes of magic follow, with the version, a u64, how many bytes the sender lends at a
  time, and 16 bytes that name the connection. The first record in either direction.
- ``MESSAGE``: there follow *returns*, each a u32, the token of a block of the receiver's that is
  free again (with its highest bit set: not to be used again); a descriptor for each buffer; the
  header. A descriptor is u32 segment, u32 token, u64 offset, u64 size; for segment 0 the buffer's
  bytes follow the header, in order. With the flag ``FAR`` there is one descriptor only, of memory
  that holds the others, and the header after them.
- ``RETURN``: returns alone.
- ``MAP``: the number is a segment's; a u64 follows, its size. Its file descriptor comes with the
  next record, of one byte.
- ``REFUSE``: there is no reply to this number; why follows, as UTF-8, and the flags say which error
  it is (`_REFUSALS`). In place of a hello it is a refusal to talk at all.
- ``FORGET``: numbers of segments follow, each a u32, that will not be spoken of any more.

What is small goes within the record, which is cheaper than a lease. A record is written to the
socket by whoever sends it; only what finds no room there waits in an outbox.
"""

from __future__ import annotations

import mmap
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from edgeml.core import (
    DEFAULT_LIMITS,
    EdgemlError,
    Limits,
    Malformed,
    Message,
    NotEncodable,
    Overloaded,
    Peer,
    PermissionDenied,
    copy,
    own,
    root_of,
)
from edgeml.core.message import aligned
from edgeml.transports.shm.memory import (
    INLINE,
    RETIRE,
    Account,
    Allocation,
    Lease,
    Leases,
    Pool,
)
from edgeml.transports.shm.segments import Block, Segment, map_segment
from edgeml.transports.shm.sockets import Lost, Records

__all__ = ["Channel"]

_HELLO, _MESSAGE, _RETURN, _MAP, _FORGET, _REFUSE = range(6)
_FAR = 1
_REFUSALS: tuple[type[EdgemlError], ...] = (Overloaded, Malformed, PermissionDenied)

_MAGIC = b"edgeml\0\1"  # the last byte is the version of what is written above
_HEAD = struct.Struct("<BBHIIQ")
_DESCRIPTOR = struct.Struct("<IIQQ")
_SIZE = struct.Struct("<Q")

_MOST_BUFFERS = 1 << 16  # in one message
_MOST_HEADER = 1 << 30  # bytes
_MOST_RETURNS = 1 << 10  # in one record
_MOST_MAPPED = 4096  # segments of a peer
_MOST_QUEUED = 1 << 13  # records that wait for room in the socket


class Channel:
    """Sends from any thread without waiting, and receives in one at a time.

    Args:
        records: the socket.
        pool: whose memory is lent to the peer.
        account: counts what is lent and held; else `join` one once the peer has said hello.
        limits: what a message of the peer may have; they are a server's.

    Attributes:
        connection: names the connection; None until the peer has said hello.
        peer: the same as a listener tells it, once it has.
        lost: set once nothing more can be sent.
        began: when this was made, by `time.monotonic`.
        copied: messages that were copied, since too much of the peer's memory is held here.
        on_full: called when the outbox, which was empty, no longer is.
    """

    def __init__(
        self,
        records: Records,
        pool: Pool,
        account: Account | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.records = records
        self.began = time.monotonic()
        self.connection: bytes | None = None
        self.peer: Peer | None = None
        self.lost = False
        self.copied = 0
        self.on_full: Callable[[Channel], None] = lambda _: None
        self._pool = pool
        self._limits = limits
        self._most_queued = min(_MOST_QUEUED, limits.replies_per_client // INLINE)
        self.account: Account | None = None
        self._lock = threading.Lock()
        self._outbox: deque[tuple[bytes, Segment | None]] = deque()
        # What the peer has of ours:
        self._known: set[int] = set()  # segments
        self._generation = pool.generation
        self._lent: dict[int, int] = {}  # how often, by token
        # What we have of the peer's:
        self._maps: dict[int, mmap.mmap] = {}
        self._leases = Leases()
        self._lendable = 0  # bytes that it lends at a time
        self._expected: tuple[int, int, bool, float] | None = None  # a segment, mapped next

        if account is not None:
            self.join(account)

    def join(self, account: Account) -> None:
        """Count what is lent and held together with the connection's other sockets."""
        account.leases.add(self._leases)
        self.account = account

    # Sending ------------------------------------------------------------------------------

    def greet(self, connection: bytes) -> None:
        """Say hello."""
        with self._lock:
            head = _HEAD.pack(_HELLO, 0, 0, 0, 0, 0)
            self._post(head + _MAGIC + _SIZE.pack(self._pool.limit) + connection)

    def refuse(self, number: int, why: EdgemlError) -> None:
        """Tell that a request will have no reply, or in place of a hello, that nothing will.

        Raises:
            Lost, Overloaded: as `send` does.
        """
        flags = next(at for at, kind in enumerate(_REFUSALS) if isinstance(why, kind))
        with self._lock:
            self._check_queue()
            self._post(_HEAD.pack(_REFUSE, flags, 0, 0, 0, number) + str(why).encode()[:1000])

    def send(self, number: int, message: Message) -> None:
        """Send a message; its buffers may be changed when this returns, or raises.

        Raises:
            Lost: the peer has gone.
            Overloaded: the peer has too much that it does not read, or does not give back.
            NotEncodable: this is more than can be lent.
        """
        header, buffers = message.header, message.buffers
        flags, count, size = 0, len(buffers), len(header)
        table, body = b"", header
        blocks: list[Block] = []  # that will be the peer's
        try:
            if count:
                if count > _MOST_BUFFERS:
                    raise NotEncodable(
                        f"a message of {count} arrays; shm carries {_MOST_BUFFERS}: "
                        "stack the small ones into one"
                    )
                if size + sum(map(len, buffers)) + count * _DESCRIPTOR.size <= INLINE:
                    table = b"".join([_DESCRIPTOR.pack(0, 0, 0, len(each)) for each in buffers])
                    body = b"".join((header, *buffers))
                else:
                    table = self._place(buffers, blocks)
            if len(table) + len(body) > INLINE:
                if size > _MOST_HEADER:
                    raise NotEncodable(f"a header of {size} bytes; shm carries {_MOST_HEADER}")
                table, body = self._place([memoryview(table + header)], blocks), b""
                flags = _FAR
            with self._lock:
                self._check_queue()
                if self.lost:
                    raise Lost("the connection has been closed")
                if blocks:
                    self._lend(blocks)
                    blocks = []
                returns = self._take_returns() if self._leases.ended else b""
                head = _HEAD.pack(_MESSAGE, flags, len(returns) >> 2, count, size, number)
                self._post(b"".join((head, returns, table, body)))
        finally:
            for block in blocks:
                self._pool.drop(block)

    def _place(self, buffers: Sequence[memoryview], blocks: list[Block]) -> bytes:
        """See that buffers lie in our memory; returns descriptors, and adds blocks that have one
        user more, which will be the peer.
        """
        allocations = []
        total = 0
        for buffer in buffers:
            allocation = self._find_allocation(buffer)
            allocations.append(allocation)
            if allocation is None:
                total += aligned(buffer)
        new = None
        if total:
            account = self._require_account()
            if total > account.limit:
                raise NotEncodable(f"a message of {total} bytes; {account.told}")
            new = self._pool.take(total)
            blocks.append(new)
        at = 0
        table = []
        for buffer, allocation in zip(buffers, allocations, strict=True):
            size = len(buffer)
            if not size:
                table.append(_DESCRIPTOR.pack(0, 0, 0, 0))
                continue
            if allocation is not None:
                block, offset = allocation
                if block not in blocks:
                    self._pool.keep(block)
                    blocks.append(block)
            else:
                assert new is not None
                block, offset = new, at
                copy(new.view[at : at + size], buffer)
                at += aligned(buffer)
            place = block.offset + offset
            table.append(_DESCRIPTOR.pack(block.segment.number, block.token, place, size))
        return b"".join(table)

    def _find_allocation(self, buffer: memoryview) -> tuple[Block, int] | None:
        """Where a buffer lies in our memory, if it does."""
        if not self._pool.has_allocations:
            return None
        root = root_of(buffer)
        if type(root) is not Allocation or root.pool is not self._pool or not len(buffer):
            return None
        array = np.frombuffer(buffer, np.uint8)
        return root.block, array.__array_interface__["data"][0] - root.address

    def _lend(self, blocks: list[Block]) -> None:
        """Give a message's blocks to the peer, and their segments if it doesn't know them."""
        self._require_account().lend(blocks)
        for block in blocks:
            segment = block.segment
            if segment.number not in self._known:
                head = _HEAD.pack(_MAP, 0, 0, len(segment.blocks), 0, segment.number)
                self._post(head + _SIZE.pack(segment.size))
                self._post(b"\0", segment)
                self._known.add(segment.number)
        for block in blocks:  # only now, since what is raised above leaves them to the sender
            self._lent[block.token] = self._lent.get(block.token, 0) + 1

    def _require_account(self) -> Account:
        if self.account is None:
            raise Lost("nothing can be lent to a peer that has not said hello")
        return self.account

    def _take_returns(self) -> bytes:
        """The tokens to give back with the next record."""
        ended = self._leases.ended
        count = min(len(ended), _MOST_RETURNS)
        return struct.pack(f"<{count}I", *(ended.popleft() for _ in range(count)))

    def _check_queue(self) -> None:
        if len(self._outbox) >= self._most_queued:
            raise Overloaded(f"the peer has left {self._most_queued} messages unread")

    def _post(self, record: bytes, segment: Segment | None = None) -> None:
        if self.lost:
            raise Lost("the connection has been closed")
        if not self._outbox and self.records.send(record, segment.fd if segment else None):
            return
        self._outbox.append((record, segment))
        if len(self._outbox) == 1:
            self.on_full(self)

    def half_said(self, now: float) -> tuple[str, float]:
        """Of what the peer has begun to say and hasn't finished: what, and for how many seconds."""
        if self.connection is None:
            return "its hello", now - self.began
        if self._expected is not None:
            return "its memory", now - self._expected[3]
        return "", 0.0

    @property
    def full(self) -> bool:
        """Whether something waits for room in the socket."""
        return bool(self._outbox)

    def flush(self) -> bool:
        """Send what waits in the outbox; False if some of it still waits."""
        with self._lock:
            while self._outbox and not self.lost:
                record, segment = self._outbox[0]
                if not self.records.send(record, segment.fd if segment else None):
                    return False
                self._outbox.popleft()
        return True

    def tidy(self) -> None:
        """Give back what is due where no message has taken it along, and what isn't used."""
        if not self._leases.ended and self._generation == self._pool.generation:
            return
        with self._lock:
            if self.lost or self._outbox:
                return
            while self._leases.ended:
                returns = self._take_returns()
                self._post(_HEAD.pack(_RETURN, 0, len(returns) >> 2, 0, 0, 0) + returns)
            self._generation = self._pool.generation
            gone = self._known.difference(self._pool.segments)
            self._known -= gone
            while gone:
                some = [gone.pop() for _ in range(min(len(gone), _MOST_RETURNS))]
                numbers = struct.pack(f"<{len(some)}I", *some)
                self._post(_HEAD.pack(_FORGET, 0, 0, len(some), 0, 0) + numbers)

    # Receiving ----------------------------------------------------------------------------

    def receive(self) -> tuple[int, Message | EdgemlError] | None:
        """Take one record; returns the number and the message, or why there is none.

        Never waits. A request that is larger than a server's limits is refused here.

        Raises:
            Lost: the peer has gone, or has sent what no peer of ours sends.
        """
        try:
            if self._expected is not None:
                self._map()
                return None
            data = self.records.receive()
            if data is None:
                return None
            kind, flags, returns, count, size, number = _HEAD.unpack_from(data)
            at = _HEAD.size
            if kind == _REFUSE:
                return number, _REFUSALS[flags](data[at:].decode(errors="replace"))
            if self.connection is None:
                if kind != _HELLO or data[at:-24] != _MAGIC:
                    why = "the peer is of another version of edgeml, or none of ours"
                    raise Lost(why, "Malformed")
                self._lendable = _SIZE.unpack_from(data, len(data) - 24)[0]
                self.connection = data[-16:]
                return None
            if returns:
                self._take_back(struct.unpack_from(f"<{returns}I", data, at))
                at += 4 * returns
            if kind == _MESSAGE:
                copied = self.copied
                message = self._read_message(data, at, flags, count, size)
                if self.copied != copied:  # the peer is short of what it may lend
                    self.tidy()
                return number, message
            if kind == _MAP:
                if len(self._maps) >= _MOST_MAPPED or number in self._maps:
                    raise ValueError("too many segments, or one that is known")
                size = _SIZE.unpack_from(data, at)[0]
                self._expected = number, size, count == 1, time.monotonic()
            elif kind == _FORGET:
                for gone in struct.unpack_from(f"<{count}I", data, at):
                    self._maps.pop(gone, None)
            elif kind != _RETURN:
                raise ValueError(f"a record of kind {kind}")
        except (struct.error, LookupError, ValueError, OSError, EdgemlError) as error:
            raise Lost(f"{type(error).__name__}: {error}", "Malformed") from error
        return None

    def _map(self) -> None:
        fd = self.records.receive_fd()
        if fd is not None and self._expected is not None:
            number, size, whole, _ = self._expected
            self._expected = None
            self._maps[number] = map_segment(fd, size, whole=whole)

    def _read_message(
        self, data: bytes, at: int, flags: int, count: int, size: int
    ) -> Message | Malformed:
        if not count and not flags:
            if len(data) != at + size:
                raise ValueError("a header of another length")
            return Message(data[at:])
        if count > _MOST_BUFFERS or size > _MOST_HEADER:
            raise ValueError("too many buffers, or too large a header")
        roots: dict[tuple[int, int], tuple[memoryview, Lease]] = {}
        if flags & _FAR:
            place = _DESCRIPTOR.unpack_from(data, at)
            if place[3] != count * _DESCRIPTOR.size + size:  # before that much is copied
                raise ValueError("a far header of another length")
            data = bytes(self._read_buffer(roots, *place))
            roots.clear()
            at = 0
        split = at + count * _DESCRIPTOR.size
        end = split + size
        if len(data) < end:
            raise ValueError("a record that is cut short")
        buffers = []
        for descriptor in _DESCRIPTOR.iter_unpack(data[at:split]):
            if descriptor[0]:
                buffers.append(self._read_buffer(roots, *descriptor))
            else:
                buffers.append(memoryview(data)[end : end + descriptor[3]])
                end += descriptor[3]
        if len(data) != end:
            raise ValueError("a record of another length than it says")
        message = Message(data[split : split + size], buffers)
        limits = self._limits
        if count > limits.buffers:
            return Malformed(f"a message of {count} arrays; this server takes {limits.buffers}")
        if message.nbytes > limits.message_bytes:
            took = f"this server takes {limits.message_bytes}"
            return Malformed(f"a message of {message.nbytes} bytes; {took}")
        if roots and self.records.foreign:
            return own(message)  # or its sender could change it while it is looked at
        if roots and self.account is not None and self.account.holds_much(self._lendable):
            self.copied += 1
            message = own(message)
        return message

    def _read_buffer(
        self,
        roots: dict[tuple[int, int], tuple[memoryview, Lease]],
        number: int,
        token: int,
        offset: int,
        size: int,
    ) -> memoryview:
        memory = self._maps[number]
        if offset + size > len(memory):
            raise ValueError("a buffer beyond its segment")
        found = roots.get((number, token))
        if found is None:
            found = roots[number, token] = self._leases.begin(memory, token)
        root, lease = found
        lease.size += size
        return root[offset : offset + size]

    def _take_back(self, tokens: tuple[int, ...]) -> None:
        with self._lock:
            for token in tokens:
                retire = bool(token & RETIRE)
                token &= ~RETIRE
                left = self._lent.pop(token) - 1  # a KeyError if it has none of it
                if left:
                    self._lent[token] = left
                block = self._pool.blocks.get(token)
                if block is not None:  # else this end has been closed
                    self._require_account().give_back(block)
                    self._pool.drop(block, retire=retire)

    # The end ------------------------------------------------------------------------------

    def end(self) -> None:
        """Send and receive no more; wakes whoever waits, who can still read what has come."""
        self.lost = True
        self.records.shutdown()

    def close(self) -> int:
        """Free everything; returns how many messages were never sent. Idempotent.

        What the peer has of our memory may be read for as long as it likes, so it is retired.
        """
        with self._lock:
            self.lost = True
            self.records.close()
            lent, self._lent = self._lent, {}
            unsent = sum(1 for _, segment in self._outbox if segment is None)
            self._outbox.clear()
            self._maps.clear()
        for token, times in lent.items():
            block = self._pool.blocks.get(token)
            if block is not None:
                self._require_account().give_back(block, times)
                self._pool.drop(block, times, retire=True)
        return unsent

    def abandon(self) -> None:
        """In a forked child: close the child's copy, or the peer would not learn of the end."""
        self._lock = threading.Lock()  # whoever held it is not there
        self.lost = True
        self.records.forget()
