"""MessagePack looked at before it is decoded: nothing is made of what a sender merely claims.

A decoder makes objects as it goes, and fills dicts while their keys still come. So what could take
too much memory or time (too many values, too deep, keys made to collide) is to be found before,
by a walk over the tokens that makes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgeml.core.errors import Malformed

__all__ = ["HEAVY", "MANY", "TEXT", "TEXT_OR_BYTES", "TEXT_OR_INT", "Keys", "check"]

_RAW, _EXT, _LIST, _MAP = range(4)
# What a token's first byte says: its whole size where that is fixed (0 where not) ...
# (0xC1 begins no token; that, too, is left to the decoder.)
_SIZES = [1] * 128 + [0] * 32 + list(range(1, 33)) + [1, 1, 1, 1] + [0] * 6 + [5, 9]
_SIZES += [2, 3, 5, 9, 2, 3, 5, 9] + [0] * 12 + [1] * 32
# ... or else its kind, the width of the count that follows, and the count where none follows.
_HEADS = (
    {0x80 | n: (_MAP, 0, n) for n in range(16)}
    | {0x90 | n: (_LIST, 0, n) for n in range(16)}
    | {0xC4 + n: (_RAW, 1 << n, 0) for n in range(3)}
    | {0xC7 + n: (_EXT, 1 << n, 0) for n in range(3)}
    | {0xD4 + n: (_EXT, 0, 1 << n) for n in range(5)}
    | {0xD9 + n: (_RAW, 1 << n, 0) for n in range(3)}
    | {0xDC + n: (_LIST, 2 << n, 0) for n in range(2)}
    | {0xDE + n: (_MAP, 2 << n, 0) for n in range(2)}
)
_STRS = {*range(0xA0, 0xC0), 0xD9, 0xDA, 0xDB}
_BYTES = {0xC4, 0xC5, 0xC6}
_INTS = {*range(128), *range(0xCC, 0xD4), *range(0xE0, 256)}


_TOO_MUCH = "more values than are taken in one message"


class Keys:
    """What may be a map's key.

    Args:
        called: what they are, for people.
        tags: first bytes of the tokens that may be keys.
    """

    __slots__ = ("called", "sizes")

    def __init__(self, called: str, tags: set[int]) -> None:
        self.called = called
        self.sizes = [size if tag in tags else -1 for tag, size in enumerate(_SIZES)]


TEXT = Keys("a str", _STRS)
TEXT_OR_INT = Keys("a str or an int", _STRS | _INTS)
TEXT_OR_BYTES = Keys("a str or bytes", _STRS | _BYTES)

MANY = 4096
"""In a map of more pairs than this all keys are str, whose hashes nobody can choose: ints can be
made such that each new one meets all that are there (43,000 of them took 8 s)."""

HEAVY = 4
"""What a list, a map or an ext counts: it takes some hundred bytes, and a number some thirty."""


def check(
    data: bytes | bytearray | memoryview,
    *,
    nodes: int,
    nesting: int,
    keys: Keys,
    exts: Mapping[int, bool] | None = None,
) -> None:
    """Refuse bytes that would decode to too much, or to what is not allowed.

    Takes time in proportion to the nodes, and hardly any memory. Whether the sizes add up and the
    texts are UTF-8 is left to the decoder, which meets what is wrong with them where this did.

    Args:
        data: one MessagePack object.
        nodes: at most so many, where each value and each key counts one, and lists, maps and exts
            count `HEAVY`.
        nesting: at most so many lists, maps, and exts that hold a list, in each other.
        keys: of maps.
        exts: the types of ext that are allowed, and of each whether it holds exactly one list.

    Raises:
        Malformed: it breaks a rule.
    """
    try:
        _walk(data, nodes, nesting, keys, exts or {})
    except IndexError:
        raise Malformed("it ends too early") from None


def _walk(
    data: bytes | bytearray | memoryview,
    nodes: int,
    nesting: int,
    keys: Keys,
    exts: Mapping[int, bool],
) -> None:
    stack: list[tuple[int, tuple[list[int], list[int]]]] = []
    values, keyed, many = (_SIZES, _SIZES), (_SIZES, keys.sizes), (_SIZES, TEXT.sizes)
    left, sizes, at = 1, values, 0
    nodes -= 1
    while True:
        while left:
            left -= 1  # in a map, 2 tokens for each pair: odd from here on is a key
            tag = data[at]
            size = sizes[left & 1][tag]
            if size > 0:
                at += size
                continue
            if size < 0:
                called = TEXT.called if sizes is many else keys.called
                raise Malformed(f"a key that is not {called}")
            kind, width, count = _HEADS[tag]
            at += 1
            if width:
                count = int.from_bytes(data[at : at + width], "big")
                at += width
            if kind == _RAW:
                at += count
                continue
            nodes -= HEAVY - 1
            if nodes < 0:
                raise Malformed(_TOO_MUCH)
            if kind == _EXT:
                code = data[at]
                at += 1
                if code not in exts:
                    raise Malformed(f"unknown ext {code}")
                if not exts[code]:
                    at += count
                    continue
                kind, width, count = _HEADS.get(data[at], (_RAW, 0, 0))
                if kind != _LIST:
                    raise Malformed("a tuple or set that is no array")
                at += 1
                if width:
                    count = int.from_bytes(data[at : at + width], "big")
                    at += width
            if len(stack) == nesting:
                raise Malformed(f"nested more than {nesting} deep")
            stack.append((left, sizes))
            if kind == _MAP:
                left, sizes = count * 2, keyed if count <= MANY else many
            else:
                left, sizes = count, values
            nodes -= left
            if nodes < 0:
                raise Malformed(_TOO_MUCH)
            if left > 8 and kind == _LIST:
                # Numbers of one kind are so many and so small that each step counts.
                tag = data[at]
                size = _SIZES[tag]
                if size and bytes(data[at : at + left * size : size]).count(tag) == left:
                    at += left * size
                    left = 0
        if not stack:
            return
        left, sizes = stack.pop()
