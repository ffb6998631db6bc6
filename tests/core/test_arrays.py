"""Arrays out of what a message says of them."""

from __future__ import annotations

import numpy as np
import pytest

from edgeml.core.arrays import restore
from edgeml.core.errors import Malformed


@pytest.mark.parametrize("dtype", ["<f4", ">i2", "|u1", "?", "float32", "<U3", "|S4", b"<f8"])
def test_an_array_comes_back_without_a_copy(dtype):
    text = dtype.decode() if isinstance(dtype, bytes) else dtype
    array = np.arange(6).astype(text).reshape(2, 3)
    data = array.tobytes()
    got = restore(data, dtype, [2, 3], "biufSU")
    assert got.dtype == array.dtype.newbyteorder("=")
    assert got.dtype.isnative
    np.testing.assert_array_equal(got, array)
    assert not got.flags.writeable
    assert np.shares_memory(got, np.frombuffer(data, np.uint8)) is array.dtype.isnative


@pytest.mark.parametrize("shape", [[0], (2, 0), [], [1, 1, 1]])
def test_small_shapes(shape):
    size = int(np.prod(shape))
    assert restore(b"x" * size, "u1", shape).shape == tuple(shape)


@pytest.mark.parametrize(
    "dtype",
    [
        "O",
        "|O",
        "V8",
        "i4,i4",
        "(2,)f4",
        "c8",
        "M8",
        "m8",
        "S0",
        "str",
        "S99999999999",
        "a5",
        "f4;",
        "",
        "x",
        "os",
        "object",
        4,
        None,
        ["f4"],
        "f" * 10000,
    ],
)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(Malformed):
        restore(b"\0" * 8, dtype, [1], "biufSU")


@pytest.mark.parametrize(
    "shape",
    [
        [-1],
        [1.0],
        [True],
        ["1"],
        "1",
        b"1",
        1,
        None,
        {0: 1},
        [1] * 33,
        [2],
        [1 << 40, 1 << 40],
        [1 << 62],
        [0, 1 << 61, 1 << 61, 1 << 61],
        [[1]],
    ],
)
def test_other_shapes_are_refused(shape):
    with pytest.raises(Malformed):
        restore(b"x", "u1", shape)


@pytest.mark.parametrize("data", ["text", [1], None, 5, b"", b"12"])
def test_other_data_are_refused(data):
    with pytest.raises(Malformed):
        restore(data, "u1", [1])


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        (b"\1\2", "?"),
        (b"\xff\xff\xff\xff" * 2, "<U1"),
        (b"a\0\0\0\0\0\x11\0", "<U2"),
        (b"\0\x11\0\0", ">U1"),
    ],
)
def test_elements_that_are_none_are_refused(data, dtype):
    size = len(data) // np.dtype(dtype).itemsize
    with pytest.raises(Malformed, match="elements that are none of it"):
        restore(data, dtype, [size], "bU")


def test_all_texts_and_truths_are_taken():
    assert restore("a\U0010ffff".encode("utf-32-be"), ">U2", [1], "U")[0] == "a\U0010ffff"
    assert restore(b"\0\1", "?", [2]).tolist() == [False, True]
