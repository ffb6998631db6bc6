"""Spaces travel as plain values, and come back as they were."""

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import data_equivalence
from hypothesis import given
from hypothesis import strategies as st

from edgeml import Malformed
from edgeml.core import load_codec
from edgeml.gym import space_from_plain, space_to_plain
from edgeml.gym.spaces import action_reader, packer, unpacker
from served import EVERY_SPACE

CODEC = load_codec("msgpack")


def carried(value):
    return CODEC.decode(CODEC.encode(value))


@pytest.fixture(params=EVERY_SPACE)
def space(request):
    return EVERY_SPACE[request.param]


def test_a_space_arrives_equal_and_samples_alike(space):
    arrived = space_from_plain(carried(space_to_plain(space)))
    assert type(arrived) is type(space)
    assert arrived == space
    assert arrived.dtype == space.dtype
    assert arrived.shape == space.shape
    assert repr(arrived) == repr(space)
    space.seed(7)
    arrived.seed(7)
    for _ in range(20):
        assert data_equivalence(space.sample(), arrived.sample(), exact=True)


def test_bounds_that_are_missing_stay_missing():
    space = EVERY_SPACE["box_unbounded_ints"]
    arrived = space_from_plain(carried(space_to_plain(space)))
    assert not arrived.is_bounded("below")
    assert not arrived.is_bounded("above")
    assert spaces.Box(0, 7, (2,), np.int64).is_bounded()


def test_a_dict_keeps_the_order_of_its_keys_on_which_flattening_depends():
    arrived = space_from_plain(carried(space_to_plain(EVERY_SPACE["dict"])))
    assert list(arrived.spaces) == ["z", "a"]


def test_a_sample_arrives_as_it_was(space):
    pack, unpack = packer(space), unpacker(space)
    assert (pack is None) == (unpack is None)
    space.seed(3)
    for _ in range(20):
        sample = space.sample()
        arrived = carried(sample if pack is None else pack(sample))
        arrived = arrived if unpack is None else unpack(arrived)
        assert data_equivalence(sample, arrived, exact=True)
        assert arrived in space


def test_samples_travel_as_they_are_unless_there_is_a_graph():
    assert packer(EVERY_SPACE["tuple"]) is None
    assert packer(EVERY_SPACE["one_of"]) is None
    assert packer(spaces.Dict(g=EVERY_SPACE["graph"])) is not None


class OwnSpace(spaces.Box):
    """One that may have any meaning."""


@pytest.mark.parametrize(
    ("space", "told"),
    [
        (OwnSpace(0, 1, (2,)), r"the space is a test_spaces.OwnSpace, which can't be sent"),
        (spaces.Dict(a=spaces.Tuple([OwnSpace(0, 1, (2,))])), r"the space\['a'\]\[0\] is a"),
        (spaces.Dict({(1, 2): spaces.Discrete(2)}), r"the key \(1, 2\), a tuple"),
        (spaces.Sequence(OwnSpace(0, 1, (2,))), "the space's feature space is a"),
        (spaces.Graph(OwnSpace(0, 1, (2,)), None), "the space's node space is a"),
        (None, "the space is a builtins.NoneType"),
    ],
)
def test_a_space_that_cant_be_sent_is_refused_by_its_place(space, told):
    with pytest.raises(TypeError, match=told):
        space_to_plain(space)


def test_spaces_nested_too_deep_are_refused():
    space = spaces.Discrete(2)
    for _ in range(40):
        space = spaces.Tuple([space])
    with pytest.raises(TypeError, match="nested more than"):
        space_to_plain(space)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        | st.fixed_dictionaries(
            {
                "type": st.sampled_from(
                    ["Box", "Discrete", "Text", "Dict", "Tuple", "OneOf", "Graph"]
                )
            },
            optional=dict.fromkeys(
                ("low", "high", "dtype", "bounded", "n", "start", "spaces", "nodes"), inner
            ),
        )
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_a_forged_description_is_malformed_and_nothing_worse(plain):
    try:
        made = space_from_plain(plain)
    except Malformed:
        return
    assert isinstance(made, spaces.Space)


@pytest.mark.parametrize(
    "plain",
    [
        {"type": "Space"},
        {"type": "__import__"},
        {"type": ["Box"]},
        {"type": "Box", "low": [0], "high": [1], "dtype": "object", "bounded": [[1], [1]]},
        {"type": "Box", "low": [0], "high": [1], "dtype": "float32", "bounded": [[1, 1], [1]]},
        {"type": "MultiBinary", "n": -3},
        {"type": "Text", "max_length": -1, "min_length": 0, "charset": "a"},
        {"type": "Discrete", "n": 0, "start": 0, "dtype": "int64"},
    ],
    ids=str,
)
def test_what_describes_no_space_is_malformed(plain):
    with pytest.raises(Malformed, match=r"not the description of a space|bounds"):
        space_from_plain(plain)


# Actions ----------------------------------------------------------------------------------


def test_what_a_space_contains_is_an_action_of_it(space):
    pack, read = packer(space), action_reader(space)
    space.seed(5)
    for _ in range(20):
        sample = space.sample()
        action = read(carried(sample if pack is None else pack(sample)))
        assert data_equivalence(sample, action, exact=True)


GARBAGE = [
    None,
    "up",
    b"\x00",
    1.5,
    [],
    [[1, 2], [3]],
    {},
    {"a": 1},
    {1, 2},
    (1, 2, 3),
    [None],
    10**30,
    -(10**30),
    99,
    np.zeros((7, 7)),
    np.array("up"),
    np.array([1 + 2j, 0]),
    np.array(["2020-01-01"], "M8[D]"),
    [0, [0, [0, [0]]]],
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda value: repr(value)[:30])
def test_garbage_is_refused_or_is_of_the_space(space, garbage):
    try:
        action = action_reader(space)(garbage)
    except Malformed:
        return
    # Bounds of a Box are the environment's; what is left has the space's shape and kind.
    if isinstance(space, spaces.Box):
        assert np.shape(action) == space.shape
    else:
        assert space.contains(action) or np.asarray(action) in space


@pytest.mark.parametrize(
    ("space", "action", "told"),
    [
        ("discrete", 3, r"must be of Discrete\(3\), not 3; nothing was done with it"),
        ("discrete_from", -3, "not -3"),
        ("discrete", True + 2, "not 3"),
        ("multi_binary", [0, 1, 2, 0], "not"),
        ("multi_discrete", [1, 3], "not"),
        ("box", np.zeros((3, 2)), "must be of Box"),
        ("box", np.zeros((2, 3), complex), "must be of Box"),
        ("box_uint8", np.zeros((4, 5)), r"an array of float64, shape \(4, 5\)"),
        ("dict", {"z": 1}, "the action must be of Dict"),
        ("dict", {"z": 1, "a": [0]}, r"the action\['a'\] must be of Box"),
        ("tuple", (1, {"x": "no"}), r"the action\[1\]\['x'\] must be of Box"),
        ("one_of", (2, 0), r"the action\[0\] must be of Discrete\(2\)"),
        ("one_of", (1, 0), r"the action\[1\] must be of Box"),
        ("sequence", ([0, 1], [0]), "an item of the action must be of Box"),
        ("graph", [np.zeros((2, 3), np.float32), None, np.zeros((1, 2), int)], "must be of Graph"),
    ],
)
def test_what_is_wrong_with_an_action_is_told_by_its_place(space, action, told):
    with pytest.raises(Malformed, match=told):
        action_reader(EVERY_SPACE[space])(action)


def test_numbers_beyond_the_bounds_of_a_box_are_left_to_the_environment():
    assert action_reader(EVERY_SPACE["box_scalar"])(np.float32(100)) == 100


def test_an_environment_may_change_the_action_that_it_is_given():
    sent = np.zeros((2, 3), np.float32)
    sent.flags.writeable = False
    action = action_reader(EVERY_SPACE["box"])(sent)
    action += 1
    assert (sent == 0).all()
