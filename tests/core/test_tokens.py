"""What is found before it is decoded, and the plain values that come before there is a session."""

import tracemalloc
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeml import Malformed
from edgeml.core import tokens
from edgeml.testing.stopwatch import Stopwatch

pack = msgspec.msgpack.encode


def plain(data: bytes, most: int = 4096) -> Any:
    """What comes before there is a session: plain values, of which maps have keys of text."""
    tokens.check(data, nodes=most, nesting=32, keys=tokens.TEXT)
    try:
        return msgspec.msgpack.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Malformed(str(error)) from None


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = {"k": value} if level % 2 else [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 1, -1, 2**64 - 1, 1.5, "käfer", "x" * 70_000, b"\x00", bytes(70_000)),
        *([], {}, [1, [2.5, {"a": None}]], {"": 0, "a": {"b": [b"x"] * 20}}, nested(32)),
        *([0.5] * 4000, ["ab"] * 300, [1, 300, 70_000, -1] * 100, {str(n): n for n in range(2000)}),
    ],
    ids=lambda value: f"{value!r:.30}",
)
def test_plain_values_are_taken(value: Any) -> None:
    assert plain(pack(value)) == value


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])) | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc"), inner),
)  # fmt: skip


@settings(max_examples=50)
@given(VALUES)
def test_any_plain_value_is_taken(value: Any) -> None:
    assert plain(pack(value)) == value


@settings(max_examples=50)
@given(VALUES, st.binary(max_size=9), st.data())
def test_any_damaged_one_is_a_value_or_malformed(value: Any, piece: bytes, data: Any) -> None:
    whole = pack(value)
    at = data.draw(st.integers(0, len(whole)))
    for damaged in (whole[:at], whole[:at] + piece + whole[at + len(piece) :], whole + piece):
        with suppress(Malformed):
            plain(damaged)


def large(head: bytes, n: int, item: bytes, claimed: int | None = None) -> bytes:
    return head + (n if claimed is None else claimed).to_bytes(4, "big") + item * n


HOSTILE = {
    "nothing": b"",
    "something after it": b"\x01\x01",
    "no token": b"\xc1",
    "no token in a list": b"\x91\xc1",
    "cut short in its head": b"\xdd\x00",
    "cut short in an ext's head": b"\xc7",
    "cut short in a number": b"\xcf\x00",
    "no utf-8": b"\xa1\xff",
    "a timestamp": pack(msgspec.msgpack.Ext(-1, bytes(4))),
    "an ext": pack(msgspec.msgpack.Ext(5, b"\x90")),
    "an int as key": pack({1: 2}),
    "bin as key": pack({b"a": 2}),
    "nil as key": pack({None: 2}),
    "a list as key": b"\x81\x90\x01",
    "33 deep": pack(nested(33)),
    "100,000 deep": b"\x91" * 100_000,
    "100,000 maps deep": b"\x81\xa0" * 100_000,
    "a number more than are taken": pack([0] * 4093),
    "a million empty maps": large(b"\xdd", 1_000_000, b"\x80"),
    "a million numbers": large(b"\xdd", 1_000_000, b"\x01"),
    "a map of a million": large(b"\xdf", 1_000_000, b"\xa0\x01"),
    "a list that says 4 billion": large(b"\xdd", 100_000, b"\x01", 2**32 - 1),
    "lists that say 4 billion in each other": b"\xdd\xff\xff\xff\xff" * 30,
    "a map that says 4 billion": large(b"\xdf", 1, b"\xa0\x01", 2**32 - 1),
    "bin of 4 billion": b"\xc6\xff\xff\xff\xff\x01",
    "a str of 4 billion": b"\xdb\xff\xff\xff\xff\x01",
    "keys with equal hashes": large(b"\xdf", 20_000, b"\xcb" + bytes(8) + b"\x01"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_others_are_refused_at_once_and_in_little_memory(name: str) -> None:
    watch = Stopwatch()
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            plain(HOSTILE[name])
        assert tracemalloc.get_traced_memory()[1] < 50_000
    finally:
        tracemalloc.stop()
    assert watch.seconds < 1


def test_how_much_is_taken_may_be_said() -> None:
    assert plain(pack([0] * 6), 10) == [0] * 6
    with pytest.raises(Malformed, match="more values"):
        plain(pack([0] * 7), 10)
    assert plain(pack({"a": [], "b": 1}), 11) == {"a": [], "b": 1}
    with pytest.raises(Malformed, match="more values"):
        plain(pack({"a": [], "b": 1}), 10)


def test_numbers_of_one_kind_are_passed_over_all_at_once() -> None:
    """Nor does one of another kind among them, or after them, go unseen."""
    for n in (7, 8, 9, 100):
        for last in (pack(msgspec.msgpack.Ext(5, b"\x90")), b"\x81\x01\x01"):
            for item in (b"\x01", b"\xcb" + bytes(8), b"\xa2ab"):
                for middle in (item * n + last, last + item * n, item * n + last + item * n):
                    count = (n if middle.count(item) < 2 * n else 2 * n) + 1
                    with pytest.raises(Malformed):
                        plain(large(b"\xdd", 1, middle, count))


def test_exts_are_taken_where_they_are_named() -> None:
    def check(data: bytes, nodes: int = 100) -> None:
        exts = {1: False, 5: True}
        tokens.check(data, nodes=nodes, nesting=2, keys=tokens.TEXT_OR_INT, exts=exts)

    ext = msgspec.msgpack.Ext
    check(pack({1: ext(1, b"\xc1\xc1"), "a": ext(5, pack([1, 2]))}))
    check(pack(ext(5, pack([1, 2]))), 6)
    for data in (ext(2, b""), ext(5, b"\x01"), ext(5, b""), ext(5, pack({})), {None: 1}):
        with pytest.raises(Malformed):
            check(pack(data))
    with pytest.raises(Malformed, match="nested more than 2 deep"):
        check(pack([[ext(5, pack([1]))]]))
    with pytest.raises(Malformed, match="more values"):
        check(pack(ext(5, pack([1, 2]))), 5)
