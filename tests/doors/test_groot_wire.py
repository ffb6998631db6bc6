"""What GR00T's clients and their server say to each other, byte by byte."""

from __future__ import annotations

import io
import random
import sys
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from edgeml_groot import wire
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from edgeml import Limits, Malformed, NotEncodable
from edgeml.testing.codecs import assert_same
from edgeml.testing.doors import mutate
from groot_client import pack, unpack

LIMITS = Limits()
DTYPES = [
    *("?", "i1", "u1", "<i2", ">i2", "<u4", ">u8", "<f2", "<f4", ">f4", "<f8", "<c8", ">c16"),
    *("S5", "<U3", ">U3"),
]


def observe(data: Any) -> Any:
    """What a function would be given."""
    form = wire.Form()
    request = wire.read_request(pack({"data": data}), LIMITS)
    return wire.read_action(request.data, form)


def saved(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version, allow_pickle=False)
    return file.getvalue()


def nd(array: np.ndarray) -> dict[bytes, Any]:
    said = {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape}
    return {**said, b"data": array.tobytes()}


def layouts(dtype: str):
    for shape in ((), (0,), (1,), (3,), (2, 0), (2, 3), (2, 3, 4)):
        array = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
        yield from (array, np.asfortranarray(array), array.T, array[..., ::-1] if shape else array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_come_as_numpy_saved_them(dtype):
    for array in layouts(dtype):
        for version in ((1, 0), (2, 0)):
            data = {"x": {"__ndarray_class__": True, "as_npy": saved(array, version)}}
            assert_same(observe(data)["x"], array)
        assert_same(observe({"x": nd(array)})["x"], array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_go_as_numpy_saves_them(dtype):
    for array in layouts(dtype):
        told = msgspec.msgpack.decode(wire.write({"x": array}, LIMITS))["x"]
        assert told == {"__ndarray_class__": True, "as_npy": saved(array)}
        told = msgspec.msgpack.decode(wire.write({"x": array}, LIMITS, inline=True))["x"]
        assert told == {**nd(array), b"shape": list(array.shape)}


@given(arrays_of.arrays(st.sampled_from(DTYPES), arrays_of.array_shapes(min_dims=0, min_side=0)))
@settings(max_examples=100)
def test_any_array_comes_back(array):
    back = observe(unpack_plainly(wire.write({"x": array}, LIMITS)))["x"]
    assert_same(back, array)
    assert_same(unpack(wire.write({"x": array}, LIMITS))["x"], array)


def unpack_plainly(data: bytes) -> Any:
    return msgspec.msgpack.decode(data)


def test_what_came_can_not_be_written_to():
    array = observe({"x": np.arange(1000)})["x"]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_scalars():
    for value in (np.float32(1.5), np.int64(-3), np.bool_(True), np.float64(0.1), np.str_("abc")):
        assert_same(unpack(wire.write(value, LIMITS)), np.asarray(value))
        told = msgspec.msgpack.decode(wire.write(value, LIMITS, inline=True))
        assert told == {b"nd": False, b"type": value.dtype.str, b"data": value.tobytes()}
        assert_same(observe({"x": told})["x"], value)


def test_complex_numbers_of_pythons_are_not_taken():
    with pytest.raises(Malformed, match="complex"):
        observe({"x": {b"complex": True, b"data": "1+2j"}})


def test_headers_of_other_writers():
    data = np.arange(6, dtype="<f4").tobytes()
    for header in (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }",
        "{'descr':'<f4','fortran_order':False,'shape':(2,3)}   ",
        "{'descr': '<f4', 'fortran_order': False, 'shape': ( 2, 3,)} \n",
    ):
        for width in (64, 128, 900):
            text = header.ljust(width).encode()
            npy = b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + data
            array = observe({"x": {"__ndarray_class__": True, "as_npy": npy}})["x"]
            assert_same(array, np.arange(6, dtype="<f4").reshape(2, 3))


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '<f4', 'fortran_order': 0, 'shape': (1,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1 2,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 1, }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'more': 1}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), } + 1",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1, " * 40 + "), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 900 + ",), }",
        "(" * 1000,
        "-" * 1000 + "1",
        "",
    ],
)
def test_no_header_is_evaluated(header, recwarn):
    npy = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + bytes(4)
    with pytest.raises(Malformed):
        observe({"x": {"__ndarray_class__": True, "as_npy": npy}})
    assert not recwarn.list


def test_no_memory_is_taken_for_what_an_array_claims():
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    npy = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(8)
    claims = {**nd(np.zeros(1)), b"shape": [1 << 20, 1 << 20]}
    for value in ({"__ndarray_class__": True, "as_npy": npy}, claims):
        tracemalloc.start()
        try:
            with pytest.raises(Malformed):
                observe({"x": value})
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


# Requests -----------------------------------------------------------------------------------


def test_a_request_says_as_little_as_it_likes():
    request = wire.read_request(pack({}), LIMITS)
    assert request.endpoint == "get_action"
    assert request.api_token is None
    assert wire.read_action(request.data, wire.Form()) == {}
    request = wire.read_request(pack({"more": [1], "endpoint": "ping", "api_token": "t"}), LIMITS)
    assert (request.endpoint, request.api_token) == ("ping", "t")


@pytest.mark.parametrize("name", ["endpoint", "api_token"])
def test_what_is_kept_of_a_client_is_short(name):
    assert getattr(wire.read_request(pack({name: "x" * 1000}), LIMITS), name) == "x" * 1000
    with pytest.raises(Malformed, match=rf"1000.*{name}"):
        wire.read_request(pack({name: "x" * 1001}), LIMITS)


@pytest.mark.parametrize(
    ("data", "observation", "paired"),
    [
        ({"state": 1}, {"state": 1}, False),
        ({"observation": {"state": 1}, "options": None}, {"state": 1}, True),
        ({"observation": {"state": 1}}, {"state": 1}, True),
        ({"observation": {}, "options": {"a": 1}}, {"options": {"a": 1}}, True),
        ({"observation": {"state": 1}, "options": {}}, {"state": 1}, True),
        # Older clients' parts may be called so.
        ({"observation": {"a": 1}, "state": 1}, {"observation": {"a": 1}, "state": 1}, False),
        ({"observation": 3}, {"observation": 3}, False),
        ({"options": {"a": 1}}, {"options": {"a": 1}}, False),
        ({}, {}, False),
    ],
)
def test_forms_are_told_apart_by_their_shape(data, observation, paired):
    form = wire.Form()
    request = wire.read_request(pack({"data": data}), LIMITS)
    assert wire.read_action(request.data, form) == observation
    assert form.paired is paired
    answer = unpack(wire.write_action({"action": 1}, form, LIMITS))
    assert answer == ([{"action": 1}, {}] if paired else {"action": 1})
    answer = unpack(wire.write_action(({"action": 1}, {"info": 2}), form, LIMITS))
    assert answer == ([{"action": 1}, {"info": 2}] if paired else {"action": 1})


def test_who_sends_arrays_as_nd_gets_them_so():
    array = np.arange(3.0)
    for data, inline in (({"x": array}, False), ({"x": {"y": [nd(array)]}}, True), ({}, False)):
        form = wire.Form()
        wire.read_action(wire.read_request(pack({"data": data}), LIMITS).data, form)
        assert form.inline is inline
        answer = msgspec.msgpack.decode(wire.write_action({"a": array}, form, LIMITS))["a"]
        assert (b"nd" in answer, "as_npy" in answer) == (inline, not inline)


def test_spoilt_requests_are_malformed_or_requests():
    rng = random.Random(14)
    observation = {"camera": np.zeros((4, 4, 3), np.uint8), "state": nd(np.arange(3.0)), "s": "a"}
    valid = [
        pack({"endpoint": "get_action", "data": observation, "api_token": "t"}),
        pack({"data": {"observation": observation, "options": {"a": [1, None]}}}),
        pack({"endpoint": "reset", "data": {"options": None}}),
    ]
    refused = 0
    for _ in range(3000):
        try:
            request = wire.read_request(mutate(rng.choice(valid), rng), LIMITS)
            wire.read_action(request.data, wire.Form())
            wire.read_options(request.data)
        except Malformed:
            refused += 1
    assert 1000 < refused < 3000


def test_an_observation_is_as_deep_and_as_much_as_the_limits_allow():
    narrow = Limits(nesting=5, nodes=50)
    wire.read_request(pack({"data": {"a": [[1]]}}), narrow)
    for data in ({"a": [[[[1]]]]}, {"a": list(range(60))}):
        with pytest.raises(Malformed):
            wire.read_request(pack({"data": data}), narrow)
        with pytest.raises(NotEncodable):
            wire.write([[data]], narrow)


# Answers ------------------------------------------------------------------------------------


class _OnADevice:
    def __array__(self, dtype=None, copy=None):
        return np.arange(3, dtype=np.float32)


def test_what_is_not_numpys_but_an_array_is_sent_as_one():
    assert_same(unpack(wire.write(_OnADevice(), LIMITS)), np.arange(3, dtype=np.float32))


def cyclic() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (object(), "object"),
        (np.array([object()]), "dtype object"),
        (np.zeros(1, [("a", "<f4")]), "dtype"),
        (np.zeros(1, "<M8[ns]"), "datetime64"),
        (np.zeros(1, "V4"), "dtype"),
        ({1: 2}, "key"),
        ({"a": {None: 2}}, "key"),
        (1 << 70, "int"),
        ("\ud800", "surrogates"),
        (cyclic(), "recursion"),
        (sys, "module"),
    ],
)
def test_what_clients_could_not_read_is_not_sent(value, why):
    for inline in (False, True):
        with pytest.raises(NotEncodable, match=why):
            wire.write({"action": value}, LIMITS, inline=inline)


def test_a_dtype_without_a_letter_of_numpys_is_not_sent():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with pytest.raises(NotEncodable, match=r"bfloat16.*astype"):
        wire.write(np.zeros(1, ml_dtypes.bfloat16), LIMITS)


def test_the_text_of_an_error_may_be_anybodys():
    assert unpack(wire.write_error("\ud800 \0 \u00e4"))["error"] == "\\ud800 \0 \u00e4"
