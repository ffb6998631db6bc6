"""What shm says over its sockets, for tests that speak by hand; see its module `channel`."""

import struct

from edgeml.transports.shm import channel

HEAD = struct.Struct("<BBHIIQ")
HELLO = HEAD.pack(0, 0, 0, 0, 0, 0) + channel._MAGIC + struct.pack("<Q", 1 << 30) + b"stranger" * 2
MESSAGE, RETURN, MAP, FORGET = 1, 2, 3, 4


def record(descriptors=(), header=b"", rest=b"", *, flags=0, count=None, size=None, returns=()):
    count = len(descriptors) if count is None else count
    return (
        HEAD.pack(MESSAGE, flags, len(returns), count, len(header) if size is None else size, 1)
        + struct.pack(f"<{len(returns)}I", *returns)
        + b"".join(struct.pack("<IIQQ", *each) for each in descriptors)
        + header
        + rest
    )
