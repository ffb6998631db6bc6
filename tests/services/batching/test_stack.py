"""Payloads stacked, and results split."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeml.services.batching.stack import Stack, flatten, split


def stacked(*payloads, capacity=None, size=None):
    """Stack payloads of one layout, and return them as one value."""
    layout, _ = flatten(payloads[0])
    stack = Stack(layout, capacity or len(payloads))
    for row, payload in enumerate(payloads):
        same, leaves = flatten(payload)
        assert same == layout
        stack.write(row, leaves)
    stack.pad(len(payloads), size or len(payloads))
    return stack.tree(size or len(payloads))


def test_arrays_and_numbers_get_a_first_axis_and_all_else_becomes_a_list():
    tree = stacked(
        *(
            {
                "image": np.full((4, 3), i, np.uint8),
                "state": [0.5 * i, i, i > 0],
                "prompt": f"task {i}",
                "nested": ({"z": 1j * i}, None),
                "scalar": np.float32(i),
            }
            for i in range(3)
        )
    )
    assert tree["image"].shape == (3, 4, 3)
    assert tree["image"].dtype == np.uint8
    assert tree["image"][:, 0, 0].tolist() == [0, 1, 2]
    assert [part.dtype.name for part in tree["state"]] == ["float64", "int64", "bool"]
    assert tree["state"][1].tolist() == [0, 1, 2]
    assert tree["prompt"] == ["task 0", "task 1", "task 2"]
    assert tree["nested"][0]["z"].tolist() == [0, 1j, 2j]
    assert tree["nested"][1] == [None] * 3
    assert tree["scalar"].dtype == np.float32
    assert isinstance(tree["nested"], tuple)


def test_a_bare_array_a_bare_number_and_a_bare_string_are_payloads_as_well():
    assert stacked(np.ones(3), np.zeros(3)).shape == (2, 3)
    assert stacked(1, 2).tolist() == [1, 2]
    assert stacked("a", "b") == ["a", "b"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.zeros(3), np.zeros(4)),
        (np.zeros(3), np.zeros((3, 1))),
        (np.zeros(3), np.zeros(3, np.float32)),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": 1, "b": 1}),
        ([1], [1, 2]),
        ([1], (1,)),
        (1, 1.0),
        (1, True),
        (1, "1"),
        (1, 1 << 80),
        ({"a": 1}, [1]),
        ({1: 1}, {"1": 1}),
        (np.zeros(1, "datetime64[s]"), np.zeros(1, "datetime64[ms]")),
        (np.float32(1), np.zeros((1,), np.float32)),
    ],
)
def test_these_do_not_stack(one, other):
    assert flatten(one)[0] != flatten(other)[0]
    assert hash(flatten(one)[0]) is not None


def test_the_order_of_keys_does_not_matter():
    one, two = {"a": 1, "b": 2.0, 3: "c"}, {3: "d", "b": 5.0, "a": 4}
    assert flatten(one)[0] == flatten(two)[0]
    tree = stacked(one, two)
    assert tree["a"].tolist() == [1, 4]
    assert tree["b"].tolist() == [2.0, 5.0]
    assert tree[3] == ["c", "d"]


def test_padding_repeats_the_last_row_and_nothing_is_left_of_what_was_there():
    tree = stacked(
        {"x": np.array([1.0]), "s": "a"}, {"x": np.array([2.0]), "s": "b"}, capacity=8, size=4
    )
    assert tree["x"].tolist() == [[1.0], [2.0], [2.0], [2.0]]
    assert tree["s"] == ["a", "b", "b", "b"]


def test_rows_are_selected_and_moved():
    layout, _ = flatten({"x": 0, "s": ""})
    stack = Stack(layout, 4)
    for row in range(4):
        stack.write(row, flatten({"x": row, "s": str(row)})[1])
    part = stack.select([3, 1])
    stack.copy_row(3, 0)
    assert part.tree(2)["x"].tolist() == [3, 1]
    assert stack.tree(4)["x"].tolist() == [3, 1, 2, 3]
    assert stack.tree(4)["s"] == ["3", "1", "2", "3"]


def test_memory_is_used_again_once_nobody_looks_at_it_and_not_before():
    layout, leaves = flatten(np.zeros(1 << 16, np.uint8))

    def address(tree):
        return tree.__array_interface__["data"][0]

    stack = Stack(layout, 4)
    kept = stack.tree(4)
    first = address(kept)
    del stack
    other = Stack(layout, 4)
    other.write(0, [leaves[0] + 7])
    assert address(other.tree(4)) != first
    second = address(other.tree(4))
    del other, kept
    again = [Stack(layout, 4) for _ in range(2)]
    assert {address(stack.tree(4)) for stack in again} & {first, second}


def test_a_stack_takes_no_memory_for_rows_that_are_not_written():
    layout, leaves = flatten(np.ones(1 << 20, np.uint8))
    stack = Stack(layout, 1 << 12)  # 4 GiB, were they touched
    stack.write(0, leaves)
    assert stack.tree(1).all()


def test_what_is_nested_too_deep_is_refused():
    value = 1
    for _ in range(40):
        value = [value]
    with pytest.raises(ValueError, match="deeper than 32"):
        flatten(value)


# Results --------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "left right")


@dataclass
class Chunk:
    actions: np.ndarray
    done: list


def test_a_result_is_split_by_its_first_axis():
    result = {
        "actions": np.arange(12).reshape(4, 3),
        "value": np.arange(4.0),
        "text": ["a", "b", "c", "d"],
        "both": (np.arange(4), Pair(np.arange(4), np.arange(4))),
    }
    rows = split(result, 4, 3)
    assert len(rows) == 3
    assert rows[1]["actions"].tolist() == [3, 4, 5]
    assert rows[1]["value"] == 1.0
    assert rows[1]["text"] == "b"
    assert rows[1]["both"] == (1, {"left": 1, "right": 1})
    assert rows[0]["actions"].base is not None  # a view


def test_lists_are_rows_and_dataclasses_are_dicts():
    assert split([{"a": 1}, {"a": 2}], 2, 2) == [{"a": 1}, {"a": 2}]
    rows = split(Chunk(np.zeros((2, 1)), [False, True]), 2, 2)
    assert rows[1]["done"] is True
    assert split(np.arange(2), 2, 2) == [0, 1]


def test_arrays_of_a_device_are_fetched():
    jnp = pytest.importorskip("jax.numpy")
    rows = split({"x": jnp.arange(6).reshape(2, 3)}, 2, 2)
    assert isinstance(rows[1]["x"], np.ndarray)
    assert rows[1]["x"].tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("result", "error", "text"),
    [
        (
            {"a": np.zeros((3, 2))},
            ValueError,
            r"result\['a'\] has the shape \(3, 2\), for a batch of 4",
        ),
        ({"a": np.float32(1)}, ValueError, r"has the shape \(\)"),
        ([1, 2, 3], ValueError, "result is a list of 3 for a batch of 4 rows"),
        ({"a": ({"b": [1]},)}, ValueError, r"result\['a'\]\[0\]\['b'\] is a list of 1"),
        (None, TypeError, "result is None, for a batch of 4 rows: give an array"),
        (17, TypeError, "result is 17"),
        ({"a": "abcd"}, TypeError, r"result\['a'\] is 'abcd'"),
        # Rows, or parts of a row? Never by chance, as when there are four of them.
        ([np.zeros(4)] * 4, TypeError, "result is a list with arrays in it: give one array"),
        ([np.zeros(2)] * 3, TypeError, "result is a list with arrays in it"),
        ({"a": [{"b": np.zeros(2)}] * 4}, TypeError, r"result\['a'\] is a list with arrays"),
    ],
)
def test_what_is_no_batch_is_refused_with_its_place(result, error, text):
    with pytest.raises(error, match=text):
        split(result, 4, 4)


leaf = st.one_of(
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.none(),
    st.binary(max_size=3),
)
trees = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.tuples(inner, inner),
    ),
    max_leaves=8,
)


@given(trees)
def test_what_is_stacked_and_handed_back_is_what_came(payload):
    def give_back(tree, row):
        if isinstance(tree, dict):
            return {key: give_back(part, row) for key, part in tree.items()}
        if isinstance(tree, tuple):
            return tuple(give_back(part, row) for part in tree)
        return tree[row]

    layout, leaves = flatten(payload)
    stack = Stack(layout, 2)
    stack.write(0, leaves)
    stack.write(1, leaves)
    tree = stack.tree(2)

    def check(tree, payload):
        if isinstance(payload, dict):
            assert tree.keys() == payload.keys()
            for key in payload:
                check(tree[key], payload[key])
        elif isinstance(payload, (list, tuple)):
            assert type(tree) is type(payload)
            assert len(tree) == len(payload)
            for part, expected in zip(tree, payload, strict=True):
                check(part, expected)
        else:
            assert len(tree) == 2
            assert tree[0] == tree[1] == payload

    check(tree, payload)
