"""What errors tell of values that a stranger sent."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from edgeml.core.arrays import restore
from edgeml.core.errors import Malformed, shown

MANY = 10**7


@pytest.mark.parametrize(
    "value",
    [
        "x" * MANY,
        b"\\" * MANY,
        bytearray(MANY),
        memoryview(bytes(MANY)),
        {"x" * MANY: [b"y" * MANY]},
        [[["x" * MANY]]],
        np.zeros(MANY, np.uint8),
        list(range(10**5)),
    ],
    ids=["str", "bytes", "bytearray", "view", "dict", "list", "array", "many"],
)
def test_no_more_is_made_of_a_value_than_is_shown(value):
    tracemalloc.start()
    try:
        text = shown(value)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert 10 < len(text) <= 100


def test_what_is_short_is_shown_whole():
    assert shown({"a": [1, "b", None, 2.5, b"c"]}) == "{'a': [1, 'b', None, 2.5, b'c']}"
    assert shown("x" * 30, 10) == "'xxxxxxxxx"


@pytest.mark.parametrize("dtype", ["f" * MANY, b"\xff" * MANY])
def test_a_long_dtype_takes_no_memory(dtype):
    tracemalloc.start()
    try:
        with pytest.raises(Malformed, match="is no dtype"):
            restore(b"", dtype, [0])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
