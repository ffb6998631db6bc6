"""A policy's contract by itself: what it refuses to be, what it checks, how two of them differ."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import timeit
from collections import namedtuple

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeml.core import Malformed
from edgeml.services.contract import Feature, PolicyContract, differences

JOINTS = ("shoulder", "elbow", "wrist")


def contract(**changes):
    parts = {
        "observation": {
            "front": Feature((480, 640, 3), np.uint8, names=("red", "green", "blue"), kind="image"),
            "state": Feature(3, "float32", names=JOINTS, units="rad", kind="state"),
            "task": Feature((), str, kind="text"),
        },
        "action": Feature((50, 3), "float32", names=JOINTS, units="rad", kind="action"),
        "rate": 50.0,
        "horizon": 50,
        "identity": "sha256:1f2e",
        "metadata": {"robot": "so100", "normalization": {"state": [0.0, 1.0]}},
    }
    return PolicyContract(**{**parts, **changes})


def payload(**changes):
    parts = {
        "front": np.zeros((480, 640, 3), np.uint8),
        "state": np.zeros(3, np.float32),
        "task": "pick",
    }
    return {**parts, **changes}


# Features -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kept"),
    [((), ()), (7, (7,)), ([2, None], (2, None)), (None, (None,)), ((np.int64(3),), (3,))],
)
def test_a_shape_may_be_given_as_numpy_takes_it(shape, kept):
    assert Feature(shape, "uint8").shape == kept


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *((np.float32, "float32"), (np.dtype(">f4"), "float32"), (float, "float64")),
        *((bool, "bool"), (str, "str"), ("bfloat16", "bfloat16"), (ml_dtypes.bfloat16, "bfloat16")),
    ],
)
def test_a_dtype_is_kept_by_its_name(dtype, name):
    assert Feature((), dtype).dtype == name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"shape": -1}, "shape is lengths"),
        ({"shape": (2.5,)}, "shape is lengths"),
        ({"shape": (True,)}, "shape is lengths"),
        ({"shape": "7"}, "shape is lengths"),
        ({"shape": (2**63,)}, "shape is lengths"),
        ({"shape": (1,) * 33}, "33 axes"),
        ({"dtype": "float31"}, "float31"),
        ({"dtype": "f4"}, "'f4'"),
        ({"dtype": None}, "None"),
        ({"dtype": np.dtype([("x", "f4")])}, "void"),
        ({"dtype": object}, "object"),
        ({"dtype": dict}, "dtype is a name"),
        ({"names": ("a", "b")}, r"names has 2 entries.*\(3,\)"),
        ({"names": ("a", "b", "a")}, "'a' 2 times"),
        ({"names": "abc"}, "names must be a list"),
        ({"names": ("a", "b", 3)}, "names is text"),
        ({"names": ("a", "b", "")}, "names is text"),
        ({"names": ("a", "b", "\ud800")}, "not valid Unicode"),
        ({"names": ("a", "b", "c" * 201)}, "200 characters"),
        ({"shape": (), "names": ("a",)}, r"names has 1 entries.*\(\)"),
        ({"shape": (None,), "names": ("a",)}, r"names has 1 entries.*\(None,\)"),
        ({"units": ("rad",)}, "units has 1 entries"),
        ({"units": ""}, "units is text"),
        ({"units": 3}, "units must be a list"),
        ({"kind": "camera"}, "'image'.*not 'camera'"),
        ({"kind": ["image"]}, "kind is one of"),
        ({"kind": "text"}, "dtype 'str', not 'float32'"),
        ({"dtype": "str"}, r"a text has shape \(\)"),
        ({"shape": (), "dtype": "str", "units": "m"}, "no units"),
        ({"shape": (), "dtype": "str", "kind": "state"}, "'state' has numbers"),
        ({"kind": "image"}, "height and width"),
        ({"kind": "depth"}, "height and width"),
        ({"shape": (3, 480, 640), "kind": "image"}, "height x width x channels.*channels first"),
    ],
)
def test_a_feature_that_contradicts_itself_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        Feature(**{"shape": (3,), "dtype": "float32", **arguments})


@pytest.mark.parametrize(
    ("feature", "value"),
    [
        (Feature((), "float32"), 1.5),
        (Feature((), "float32"), 1),
        (Feature((), "float32"), np.float32(1.5)),
        (Feature((), "float32"), np.array(1.5, np.float32)),
        (Feature((), "int64"), -3),
        (Feature((), "uint8"), 255),
        (Feature((), "bool"), True),
        (Feature((), "bool"), np.True_),
        (Feature((), "complex64"), 1 + 2j),
        (Feature((), "bfloat16"), 1.5),
        (Feature((), "int4"), -8),
        (Feature((), str), ""),
        (Feature((2, None), "float32"), np.zeros((2, 0), np.float32)),
        (Feature((None, None, 3), "uint8", kind="image"), np.zeros((8, 9, 3), np.uint8)),
        (Feature(2, "bfloat16"), np.zeros(2, ml_dtypes.bfloat16)),
        (Feature(2, "float32"), np.zeros(2, ">f4")),
    ],
)
def test_what_fits_a_feature(feature, value):
    assert feature.fault(value) is None
    PolicyContract({"x": feature}).check_observation({"x": value})
    PolicyContract(feature).check_observation(value)


@pytest.mark.parametrize(
    ("feature", "value", "said"),
    [
        (Feature((), "float32"), np.float64(1.5), "got shape () float64"),
        (Feature((), "float32"), "1.5", "got str"),
        (Feature((), "float32"), None, "got NoneType"),
        (Feature((), "float32"), True, "got bool True"),
        (Feature((), "float32"), 1j, "got complex 1j"),
        (Feature((), "int64"), 1.0, "got float 1.0"),
        (Feature((), "int64"), True, "got bool True"),
        (Feature((), "uint8"), 256, "got int 256"),
        (Feature((), "uint8"), -1, "got int -1"),
        (Feature((), "int4"), 8, "got int 8"),
        (Feature((), "bool"), 1, "got int 1"),
        (Feature((), str), b"pick", "expected text (str), got bytes"),
        (Feature((), str), np.zeros(2), "expected text (str), got shape (2,)"),
        (Feature(1, "float32"), 1.5, "give it as an array: np.asarray(value, 'float32')"),
        (Feature(2, "float32"), [1.0, 2.0], "got a list of 2 (give it as an array"),
        (Feature(2, "float32"), np.zeros(3, "f4"), "expected shape (2,) float32, got shape (3,)"),
        (Feature(2, "float32"), np.zeros(2), "got shape (2,) float64"),
        (Feature(2, "float32"), np.zeros((2, 1), "f4"), "got shape (2, 1)"),
        (Feature((None, 3), "uint8"), np.zeros((4, 1), "u1"), "expected shape (None, 3) uint8"),
        (Feature(2, "bfloat16"), np.zeros(2, "f2"), "got shape (2,) float16"),
        (Feature(2, "float32"), {"x": 1}, "got a dict of ['x']"),
    ],
)
def test_what_does_not_fit_a_feature(feature, value, said):
    assert said in feature.fault(value)
    with pytest.raises(ValueError, match="observation: expected"):
        PolicyContract(feature).check_observation(value)
    with pytest.raises(ValueError, match=r"observation\['x'\]: expected"):
        PolicyContract({"x": feature}).check_observation({"x": value})


def test_arrays_of_other_libraries_are_known_by_their_shape_and_dtype():
    class Tensor:  # as torch has it
        shape = (2,)
        dtype = "torch.float32"

    assert Feature(2, "float32").fault(Tensor()) is None
    assert "got shape (2,) float32" in Feature(2, "float64").fault(Tensor())


# Contracts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rate": 0}, "rate is control steps per second"),
        ({"rate": -50.0}, "not -50.0"),
        ({"rate": float("nan")}, "not nan"),
        ({"rate": float("inf")}, "not inf"),
        ({"rate": "50"}, "not '50'"),
        ({"rate": True}, "not True"),
        ({"horizon": 0}, "horizon is a number"),
        ({"horizon": 2.5}, "horizon is a number"),
        ({"horizon": True}, "horizon is a number"),
        ({"horizon": 50, "action": Feature(3, "float32")}, r"action has 50 control steps.*\(3,\)"),
        ({"horizon": 50, "action": Feature((), "float32")}, r"first axis.*\(\)"),
        (
            {"horizon": 5, "action": {"gripper": Feature((50, 1), "float32")}},
            r"action\['gripper'\] has 5 control steps",
        ),
        ({"identity": ""}, "identity is text"),
        ({"identity": 7}, "identity is text"),
        ({"metadata": [1]}, "metadata is a dict"),
        ({"metadata": {"x": np.zeros(2)}}, r"metadata\['x'\] is None, a bool"),
        ({"metadata": {"x": [2**64]}}, r"metadata\['x'\]\[0\]"),
        ({"metadata": {3: 1}}, "a key of metadata is text"),
        ({"metadata": {"x": "\ud800"}}, "not valid Unicode"),
        ({"observation": [Feature(3, "float32")]}, "observation is a Feature or a dict"),
        ({"observation": {"state": (3,)}}, r"observation\['state'\] is a Feature or a dict"),
        ({"observation": {3: Feature(3, "float32")}}, "a key of observation is text"),
    ],
)
def test_a_contract_that_contradicts_itself_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        contract(**changes)


def test_what_is_too_deep_or_too_much_is_refused():
    deep = Feature(3, "float32")
    for _ in range(17):
        deep = {"x": deep}
    with pytest.raises(ValueError, match="deeper than 16"):
        PolicyContract(deep)
    with pytest.raises(ValueError, match="over 4096 features"):
        PolicyContract({str(i): Feature((), "float32") for i in range(4097)})
    cycle = {}
    cycle["x"] = cycle
    with pytest.raises(ValueError, match="deeper than 16"):
        PolicyContract(metadata=cycle)


def test_a_contract_is_a_value_of_its_own():
    observation = {"state": Feature(3, "float32")}
    metadata = {"tags": ["a"]}
    made = PolicyContract(observation, metadata=metadata)
    observation.clear()
    metadata["tags"].append("b")
    assert made == PolicyContract({"state": Feature((3,), np.float32)}, metadata={"tags": ("a",)})
    made.check_observation({"state": np.zeros(3, np.float32)})
    assert pickle.loads(pickle.dumps(made)) == made
    assert dataclasses.replace(made, rate=10).rate == 10.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.rate = 3


# Checks ---------------------------------------------------------------------------------------


def test_what_fits_a_contract_may_have_more():
    contract().check_observation(payload(wrist=np.zeros(3), note=None))
    contract().check_action(np.zeros((50, 3), np.float32))
    two = {"arm": Feature((50, 3), "float32"), "gripper": Feature((50,), "float32")}
    result = {"arm": np.zeros((50, 3), "f4"), "gripper": np.zeros(50, "f4"), "value": 0.3}
    contract(action=two).check_action(result)
    contract(action=two).check_action(namedtuple("Result", result)(**result))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": np.zeros(4, "f4")}, r"^observation\['state'\]: expected shape \(3,\) float32"),
        ({"state": np.zeros(3)}, r"^observation\['state'\]: .*got shape \(3,\) float64$"),
        ({"front": np.zeros((480, 640), "u1")}, r"^observation\['front'\]"),
        ({"task": 3}, r"^observation\['task'\]: expected text"),
        ({"task": 3, "state": None}, r"observation\['state'\].*; observation\['task'\]"),
    ],
)
def test_what_does_not_fit_is_named_with_all_that_is_wrong(changes, said):
    with pytest.raises(ValueError, match=said):
        contract().check_observation(payload(**changes))


def test_a_missing_camera_is_named_and_so_is_what_is_there():
    wrong = payload()
    wrong["camera"] = wrong.pop("front")
    with pytest.raises(ValueError, match=r"\['front'\]: missing, expected .*'camera', 'state'"):
        contract().check_observation(wrong)


@pytest.mark.parametrize("value", [None, 3, "text", np.zeros(3), [1, 2], (), {}])
def test_what_is_no_dict_of_features_is_refused(value):
    with pytest.raises(ValueError, match="observation"):
        contract().check_observation(value)


def test_nested_observations_are_checked_as_the_payload_is_nested():
    nested = PolicyContract(
        {"images": {"front": Feature((4, 4, 3), "uint8", kind="image")}, "prompt": Feature((), str)}
    )
    image = np.zeros((4, 4, 3), np.uint8)
    nested.check_observation({"images": {"front": image, "wrist": image}, "prompt": "pick"})
    for wrong, said in [
        ({"images": {"front": image[0]}, "prompt": "pick"}, r"\['images'\]\['front'\]: expected"),
        ({"images": {}, "prompt": "pick"}, r"\['images'\]\['front'\]: missing"),
        ({"images": image, "prompt": "pick"}, r"\['images'\]: expected a dict of \['front'\]"),
        ({"prompt": "pick"}, r"\['images'\]: missing, expected a dict of \['front'\]"),
    ]:
        with pytest.raises(ValueError, match=said):
            nested.check_observation(wrong)


def test_a_chunk_has_as_many_steps_as_the_horizon():
    for steps in (50, None):
        made = contract(action=Feature((steps, 3), "float32"))
        made.check_action(np.zeros((50, 3), np.float32))
        with pytest.raises(ValueError, match=r"action: expected shape \(50, 3\)"):
            made.check_action(np.zeros((49, 3), np.float32))
    open_ended = PolicyContract(action=Feature((None, 3), "float32"))
    for steps in (1, 50):
        open_ended.check_action(np.zeros((steps, 3), np.float32))


def test_what_is_not_stated_is_not_checked():
    for value in (None, 3, {"x": 1}):
        PolicyContract().check_observation(value)
        PolicyContract().check_action(value)


def test_an_error_lists_no_more_than_people_read():
    many = PolicyContract({str(i): Feature((), "float32") for i in range(1000)})
    with pytest.raises(ValueError, match="and 980 more") as raised:
        many.check_observation({str(i): None for i in range(1000)})
    assert len(str(raised.value)) < 5000


def test_a_check_that_succeeds_takes_microseconds():
    made, sent = contract(), payload(other=1)
    took = min(timeit.repeat(lambda: made.check_observation(sent), number=2000, repeat=20)) / 2000
    assert took < 20e-6  # it is 1 µs; each call of a server may pay it


# The plain form -------------------------------------------------------------------------------


def test_the_plain_form_is_read_back():
    for made in (
        contract(),
        PolicyContract(),
        PolicyContract({"dtype": {"shape": Feature((), "str")}}),  # whatever keys are called
        PolicyContract(Feature((None, 2), "bool", units=("m", "rad")), {"a": {}}),
    ):
        plain = made.to_plain()
        assert PolicyContract.from_plain(plain) == made
        assert PolicyContract.from_plain(json.loads(json.dumps(plain))) == made
        assert PolicyContract.from_plain(msgspec.msgpack.decode(msgspec.msgpack.encode(plain))) == (
            made
        )
    assert contract().to_plain()["observation"]["state"] == {
        "shape": [3],
        "dtype": "float32",
        "names": list(JOINTS),
        "units": "rad",
        "kind": "state",
    }
    assert PolicyContract().to_plain() == {}


FEATURE = {"shape": [3], "dtype": "float32"}


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        (None, "is a map"),
        ([], "is a map"),
        ({"observations": {}}, "no field 'observations'.*newer edgeml"),
        ({3: 4}, "no field 3"),
        ({"_chunk": None}, "no field '_chunk'"),
        ({"observation": 3}, "observation of a contract is a map"),
        ({"observation": {"x": [3]}}, r"observation\['x'\] of a contract is a map"),
        ({"observation": {"x": {"dtype": "float32"}}}, "has shape and dtype"),
        ({"observation": {"x": {**FEATURE, "limits": [0, 1]}}}, r"\['x'\].*no field 'limits'"),
        ({"observation": {"x": {**FEATURE, "names": ["a"]}}}, "names has 1 entries"),
        ({"observation": {"x": {**FEATURE, "names": 7}}}, "names must be a list"),
        ({"observation": {"x": {**FEATURE, "shape": {"a": 1}}}}, "shape is lengths"),
        ({"observation": {"x": {"shape": [3], "dtype": "__import__('os')"}}}, "dtype is a name"),
        ({"observation": {7: FEATURE}}, "a key of observation is text"),
        ({"rate": "fast"}, "rate is"),
        ({"rate": [50]}, "rate is"),
        ({"horizon": {}}, "horizon is"),
        ({"metadata": None}, "metadata is"),
        ({"metadata": {"x": b"y"}}, "metadata"),
    ],
)
def test_a_forged_plain_form_is_malformed(plain, said):
    with pytest.raises(Malformed, match=said):
        PolicyContract.from_plain(plain)


def test_a_plain_form_as_deep_as_can_be_is_malformed_and_quick():
    plain = {}
    for _ in range(900):
        plain = {"x": plain}
    for key in ("observation", "action", "metadata"):
        with pytest.raises(Malformed, match="deeper than 16"):
            PolicyContract.from_plain({key: plain})
    twice = {
        "shape": [100_000],
        "dtype": "float32",
        "names": [str(i) for i in range(99_999)] + ["0"],
    }
    with pytest.raises(Malformed, match="'0' 2 times"):
        PolicyContract.from_plain({"observation": twice})


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["observation", "action", "rate", "shape", "dtype", "names", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(plain_values)
def test_whatever_comes_is_a_contract_or_malformed(plain):
    try:
        made = PolicyContract.from_plain(plain)
    except Malformed:
        return
    assert PolicyContract.from_plain(made.to_plain()).to_plain() == made.to_plain()


# Comparing ------------------------------------------------------------------------------------

STATE = contract().observation["state"]
FRONT = contract().observation["front"]


def with_state(**changes):
    return {**contract().observation, "state": dataclasses.replace(STATE, **changes)}


def test_what_is_alike_does_not_differ():
    assert differences(contract(), contract()) == []
    assert differences(PolicyContract(), contract()) == []
    assert differences(PolicyContract(rate=50), contract()) == []
    assert differences(PolicyContract(metadata={"robot": "so100"}), contract()) == []
    assert differences(PolicyContract(action=contract().action), contract()) == []
    unsaid = with_state(names=None, units=None, kind=None)
    assert differences(contract(observation=unsaid), contract()) == []
    each = with_state(units=("rad", "rad", "rad"))
    assert differences(contract(observation=each), contract()) == []
    assert differences(contract(), contract(observation=each)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"observation": with_state(names=("elbow", "shoulder", "wrist"))},
            r"observation\['state'\]: the order of names: at 0 expected 'elbow', the server has "
            r"'shoulder'",
        ),
        (
            {"observation": with_state(names=("shoulder", "elbow", "hand"))},
            r"observation\['state'\]: names: at 2 expected 'hand', the server has 'wrist'",
        ),
        (
            {"observation": with_state(shape=(4,), names=None)},
            r"observation\['state'\]: expected shape \(4,\), the server has \(3,\)",
        ),
        (
            {"observation": with_state(dtype="float64")},
            r"observation\['state'\]: dtype: expected 'float64', the server has 'float32'",
        ),
        (
            {"observation": with_state(units="deg")},
            r"observation\['state'\]: units: expected 'deg', the server has 'rad'",
        ),
        (
            {"observation": with_state(units=("rad", "rad", "m"))},
            r"units: expected \('rad', 'rad', 'm'\), the server has \('rad', 'rad', 'rad'\)",
        ),
        ({"observation": with_state(kind="audio")}, "kind: expected 'audio'"),
        (
            {"observation": {**contract().observation, "wrist": FRONT}},
            r"observation\['wrist'\]: expected shape \(480, 640, 3\) uint8, the server has only "
            r"'front', 'state', 'task'",
        ),
        (
            {"observation": {"state": STATE, "front": FRONT}},
            r"observation\['task'\]: the policy needs text \(str\), and the client states none",
        ),
        ({"observation": STATE}, r"observation: expected shape .*the server has a dict of"),
        ({"action": {"arm": contract().action}}, r"action: expected a dict of \['arm'\]"),
        ({"action": Feature((50, 4), "float32")}, r"action: expected shape \(50, 4\)"),
        ({"rate": 30}, r"rate: expected 30.0, the server has 50.0"),
        ({"horizon": 16, "action": None}, "horizon: expected 16, the server has 50"),
        ({"identity": "sha256:00"}, "identity: expected 'sha256:00'"),
        ({"metadata": {"robot": "koch"}}, r"metadata\['robot'\]: expected 'koch'"),
        ({"metadata": {"fps": 3}}, r"metadata\['fps'\]: expected 3, the server doesn't say"),
    ],
)
def test_what_differs_is_named_with_both_sides(changes, said):
    (found,) = differences(contract(**changes), contract())
    assert re.search(said, found), found


def test_what_the_server_does_not_say_differs_from_what_is_expected():
    found = differences(contract(), PolicyContract())
    for what in ("observation", "action", "rate", "horizon", "identity", "metadata"):
        assert any(line.startswith(what) for line in found), what
    vague = contract(observation=with_state(names=None, units=None, kind=None))
    assert [line.split(": ")[1] for line in differences(contract(), vague)] == [
        "names",
        "units",
        "kind",
    ]


def test_an_axis_of_any_length_takes_what_is_sent_and_promises_nothing():
    any_size = Feature((None, None, 3), "uint8", kind="image")
    one_size = Feature((480, 640, 3), "uint8", kind="image")
    assert differences(PolicyContract(one_size), PolicyContract(any_size)) == []
    assert differences(PolicyContract(any_size), PolicyContract(one_size)) == []
    chunk, any_chunk = Feature((50, 3), "float32"), Feature((None, 3), "float32")
    assert differences(PolicyContract(action=any_chunk), PolicyContract(action=chunk)) == []
    assert differences(PolicyContract(action=chunk), PolicyContract(action=any_chunk)) == [
        "action: expected shape (50, 3), the server has (None, 3)"
    ]
    within = PolicyContract(action=any_chunk, horizon=50)
    assert differences(PolicyContract(action=chunk), within) == []


def test_a_result_may_have_more_than_is_expected_of_it():
    arm, value = Feature((3,), "float32"), Feature((), "float32")
    more = PolicyContract(action={"arm": arm, "value": value})
    assert differences(PolicyContract(action={"arm": arm}), more) == []
    assert differences(more, PolicyContract(action={"arm": arm})) == [
        "action['value']: expected shape () float32, the server has only 'arm'"
    ]


def test_a_contract_is_described_without_anything_that_moves_a_terminal():
    lines = contract(metadata={"\x1b[2J": "\x1b[2J"}).describe()
    assert "50 Hz, 50 control steps at a time, sha256:1f2e" in lines
    assert "observation['state']: shape (3,) float32, state, shoulder elbow wrist, in rad" in lines
    assert "observation['task']: text (str)" in lines
    assert all(line.isprintable() for line in lines)
    evil = Feature(1, "float32", names=("\x1b[2J",), units="\n")
    assert all(line.isprintable() for line in PolicyContract({"\x07": evil}).describe())
