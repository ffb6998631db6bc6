"""How old what an action rests on is: the device judges it, by its own clock alone."""

from __future__ import annotations

import math
import signal
import threading
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeml import ActionClient, ActionConfig, ActionServer, Malformed, Observation, Stale
from edgeml.core.dispatch import LocalCall
from edgeml.services.action.gate import _MOST_STREAMS, Gate
from edgeml.services.action.record import Record
from edgeml.services.action.stamps import DRIFT, Clock, Stamp, age_of, pack, read
from pairs import TRANSPORTS, plain_client, process, session_of, started, wait_until

SECOND = 10**9


def config_of(transport, port=0, **kwargs) -> ActionConfig:
    keys = {"action_keys": ["move", "grip"], "observation_keys": ["joints"]}
    return ActionConfig(port, **{**keys, **kwargs}, transport=transport)


class Arm:
    """Notes what it is asked for, and can be held up."""

    def __init__(self) -> None:
        self.done: list = []
        self.free = threading.Event()
        self.free.set()
        self.busy = threading.Event()

    def observe(self, keys):
        return dict.fromkeys(keys, 1.0)

    def act(self, key, payload):
        self.busy.set()
        assert self.free.wait(30)
        self.done.append(payload)
        return {"done": payload}


@pytest.fixture
def arm():
    return Arm()


@pytest.fixture
def server(transport, arm):
    with started(ActionServer(config_of(transport), arm.observe, arm.act)) as server:
        yield server


@pytest.fixture
def client(server, transport):
    with ActionClient("127.0.0.1", server.port, config=config_of(transport)) as client:
        yield client


def stamp_of(**said) -> Stamp:
    given = {
        "number": 1,
        "seen": None,
        "elapsed": 0.0,
        "age": 0.0,
        "valid": None,
        "observation": None,
        "policy": None,
        "lease": None,
        "stream": 7,
    }
    return Stamp(**{**given, **said})


# The rule ---------------------------------------------------------------------------------------


def test_the_age_is_that_of_the_observation_by_the_devices_own_clock():
    stamp = stamp_of(observation=5 * SECOND, seen=9 * SECOND, elapsed=0.5)
    assert age_of(stamp, 10 * SECOND, 0.1) == pytest.approx(5.0)


def test_without_an_observation_it_is_what_has_passed_since_it_was_sent_at_the_earliest():
    stamp = stamp_of(seen=9 * SECOND, elapsed=0.6)
    assert age_of(stamp, 10 * SECOND, 0.1) == pytest.approx(0.4 + 0.6 * DRIFT)
    stamp = stamp_of(seen=9 * SECOND, elapsed=0.6, age=2.0)
    assert age_of(stamp, 10 * SECOND, 0.1) == pytest.approx(2.4 + 0.6 * DRIFT)


def test_of_an_observation_and_an_age_that_is_said_the_older_counts():
    said = {"observation": 9 * SECOND, "seen": 9 * SECOND, "elapsed": 1.0}
    assert age_of(stamp_of(**said, age=3.0), 10 * SECOND, 0.0) == pytest.approx(3 + DRIFT)
    assert age_of(stamp_of(**said, age=0.1), 10 * SECOND, 0.0) == pytest.approx(1.0)


def test_of_what_tells_nothing_only_the_wait_is_known():
    assert age_of(stamp_of(age=0.25), 10 * SECOND, 0.5) == 0.75


@given(
    offset=st.integers(-(10**15), 10**15),
    skew=st.floats(-DRIFT / 3, DRIFT / 3),
    ways=st.lists(
        st.tuples(st.floats(0, 5), st.floats(0, 5), st.floats(0, 30)), min_size=1, max_size=12
    ),
    late=st.floats(0, 3),
)
def test_no_action_seems_younger_than_it_is(offset, skew, ways, late):
    """Whatever the ways of answers, the clocks' difference, and how they go apart."""

    def device(now: float) -> int:  # what its clock says, when the client's says that
        return 10**16 + offset + int(now * (1 + skew) * SECOND)

    clock, now = Clock(), 100.0
    for there, back, pause in ways:
        asked, now = now, now + there + back
        seen = device(asked + there)
        clock.note(seen, int(now * SECOND), int(asked * SECOND))
        now += pause
    seen, elapsed = clock.tell(int(now * SECOND))
    arrives = device(now + late)
    age = age_of(stamp_of(seen=seen, elapsed=elapsed), arrives, 0.0)
    assert age >= late * (1 + skew) - 1e-6
    # And it seems no older than by the way of the newest answer, and that the clocks go apart.
    assert age <= (late + ways[-1][1] + ways[-1][2] * 2 * DRIFT) * (1 + skew) + 1e-6


def test_a_sample_that_was_held_up_gives_way_to_the_next():
    clock = Clock()
    clock.note(1000 * SECOND, 52 * SECOND, 50 * SECOND)  # its answer took two seconds
    clock.note(1003 * SECOND, 53 * SECOND, 53 * SECOND)
    assert clock.tell(53 * SECOND) == (1003 * SECOND, 0.0)
    clock.note(1004 * SECOND, 57 * SECOND, 54 * SECOND)  # and so does this one's
    assert clock.tell(57 * SECOND) == (1003 * SECOND, 4.0)


def test_a_clock_that_is_another_replaces_what_was_known():
    clock = Clock()
    clock.note(1000 * SECOND, 50 * SECOND, 50 * SECOND)
    clock.note(3 * SECOND, 51 * SECOND, 51 * SECOND)  # it has started anew
    assert clock.tell(51 * SECOND) == (3 * SECOND, 0.0)
    clock.note(3 * SECOND, 52 * SECOND)  # when that was asked for is not known, so it may be late
    assert clock.tell(52 * SECOND) == (3 * SECOND, 1.0)
    clock.forget()
    assert clock.tell(52 * SECOND) == (None, 0.0)


# On the device ----------------------------------------------------------------------------------


def test_an_action_rests_on_an_observation_and_the_device_knows_how_old_that_is(client, server):
    observation = client.observe()
    assert isinstance(observation, Observation)
    values, number = observation
    assert values == {"joints": 1.0}
    assert abs(number - time.monotonic_ns()) < 20 * SECOND  # the device is this process
    time.sleep(0.05)
    began = time.monotonic()
    assert client.act("move", 1, observation=number, policy="v3") == {"done": 1}
    [executed] = server.executed()
    assert executed.observation == number
    assert (executed.key, executed.number, executed.policy) == ("move", 1, "v3")
    assert executed.age == pytest.approx(executed.at - number / SECOND, abs=1e-6)
    assert executed.age >= 0.05
    assert began <= executed.at <= time.monotonic()
    assert client.observe_async(["joints"]).result(20).values == {"joints": 1.0}


def test_an_action_that_rests_on_an_old_observation_is_refused_and_the_next_is_not(
    client, server, arm
):
    number = client.observe().id
    time.sleep(0.1)
    with pytest.raises(Stale, match=r"is 0\.\d+ s old, and is valid for 0\.050 s only"):
        client.act("move", 1, observation=number, valid=0.05)
    assert arm.done == []
    assert client.act("move", 2, observation=client.observe().id, valid=20) == {"done": 2}
    with pytest.raises(Stale):
        client.act_async("move", 3, observation=number, valid=0.05).result(20)
    assert arm.done == [2]
    assert server.stats()["actions_stale"] == 2
    assert server.stats()["actions"] == 1
    assert client.stats()["actions_stale"] == 2
    assert [each.number for each in server.executed()] == [2]


def test_an_action_that_waits_too_long_for_its_turn_never_begins(client, server, arm):
    client.act("move", 0)
    arm.busy.clear()
    arm.free.clear()
    first = client.act_async("move", 1)
    assert arm.busy.wait(20)
    late = client.act_async("grip", 2, valid=0.2)
    still = client.act_async("grip", 3, valid=60)
    time.sleep(0.25)
    arm.free.set()
    assert first.result(20) == {"done": 1}
    with pytest.raises(Stale):
        late.result(20)
    assert still.result(20) == {"done": 3}
    assert arm.done == [0, 1, 3]


def test_what_the_sender_says_of_its_age_counts(client, server, arm):
    with pytest.raises(Stale):
        client.act("move", 1, age=5.0, valid=4.0)
    client.act("move", 2, age=5.0, valid=20.0)
    client.act("move", 3, age=5.0)  # without any bound
    assert arm.done == [2, 3]
    assert all(each.age >= 5.0 for each in server.executed())


def test_the_devices_own_bound_holds_for_the_keys_that_have_one(transport, arm):
    halts: list = []
    config = config_of(transport, action_timeout={"move": 0.5}, on_action_timeout=halts.append)
    with (
        started(ActionServer(config, arm.observe, arm.act)) as server,
        ActionClient("127.0.0.1", server.port, config=config_of(transport)) as client,
    ):
        with pytest.raises(Stale):
            client.act("move", 1, age=0.6)
        client.act("grip", 2, age=0.6)
        client.act("move", 3, age=0.6, valid=60)  # what an action says itself wins
        assert arm.done == [2, 3]


def test_a_device_that_was_started_anew_takes_nothing_for_an_observation_of_before(client, arm):
    ahead = time.monotonic_ns() + 10 * SECOND
    with pytest.raises(Stale, match="ahead of the device's clock"):
        client.act("move", 1, observation=ahead, valid=5)
    assert arm.done == []


def test_a_stall_of_the_first_answer_is_mended_by_the_refusal_itself(client, server, arm):
    """What the client knows of the device's clock is two seconds late."""
    client._clock.forget()
    client._greeted = session_of(client)
    client._clock.note(time.monotonic_ns() - 2 * SECOND, time.monotonic_ns())
    with pytest.raises(Stale):
        client.act("move", 1, valid=1.0)
    wait_until(lambda: client._clock.tell(0)[0] > time.monotonic_ns() - SECOND)
    assert client.act("move", 2, valid=1.0) == {"done": 2}


def test_what_is_known_of_the_clock_is_asked_for_anew_after_a_pause(client, arm):
    def pause(minutes):
        """Know what was told so long ago, which is as if clocks had gone apart meanwhile."""
        then = time.monotonic_ns() - minutes * 60 * SECOND
        client._clock.forget()
        client._clock.note(then, then)
        return then

    client.act("move", 1)
    pause(60)
    client.act("move", 2, valid=1.0)  # by the old sample it might be 3.6 seconds old
    then = pause(60)
    with pytest.raises(Stale):  # this one waits for nothing, but the next knows
        client.act_async("move", 3, valid=1.0).result(20)
    wait_until(lambda: client._clock.tell(0)[0] > then)
    client.act_async("move", 4, valid=1.0).result(20)
    assert arm.done == [1, 2, 4]


def test_publications_tell_when_they_were_taken(client, server, arm):
    got: list = []
    known: list = []
    client.register_obs_callback(lambda values, taken: got.append((values, taken)))
    client.register_obs_callback(lambda values, observation_id=None: known.append(observation_id))
    before = time.monotonic_ns()
    server.publish_obs({"joints": 2.0})
    wait_until(lambda: got and known)
    assert got[0][0] == {"joints": 2.0}
    assert before <= got[0][1] <= time.monotonic_ns()
    assert known == [got[0][1]]
    server.publish_obs({"joints": 3.0}, taken=before)
    wait_until(lambda: len(got) == 2)
    assert got[1] == ({"joints": 3.0}, before)
    assert client.act("move", observation=before, valid=60) == {"done": {}}


# Order ------------------------------------------------------------------------------------------


def test_an_action_that_a_later_one_has_overtaken_is_refused(server, arm):
    with plain_client(server) as plain:

        def send(number, stream=7, key="move"):
            stamp = pack(stamp_of(number=number, stream=stream))
            return plain.call("act", [key, number, stamp])[0]

        assert send(1) == {"done": 1}
        assert send(4) == {"done": 4}
        for number in (3, 4, 1):  # one of them twice
            with pytest.raises(Stale, match="comes after this client's action 4"):
                send(number)
        assert send(2, stream=8) == {"done": 2}  # another client's
        with pytest.raises(Stale):
            send(4)
        assert send(3, key="grip") == {"done": 3}
        assert send(5) == {"done": 5}
    assert arm.done == [1, 4, 2, 3, 5]
    assert server.stats()["actions_out_of_order"] == 4
    assert [each.number for each in server.executed()] == [1, 4, 2, 3, 5]


def test_a_client_that_is_started_anew_begins_at_one(server, transport, arm):
    for n in range(3):
        config = config_of(transport, server.port)
        with ActionClient("127.0.0.1", config=config, client_id="robot") as client:
            assert client.act("move", n) == {"done": n}
            assert client.act("move", n) == {"done": n}
    assert [each.number for each in server.executed()] == [1, 2] * 3


def test_thousands_of_clients_are_remembered_no_longer_than_is_needed():
    gate, call = Gate("move", None, None, Record(10)), LocalCall("act", None)
    for stream in range(3 * _MOST_STREAMS):
        now, other = time.monotonic(), stamp_of(stream=10**6, number=stream + 1)
        gate.begin(call, stamp_of(stream=stream, number=5), now)
        gate.begin(call, other, now)  # who goes on is not forgotten
        with pytest.raises(Stale):
            gate.begin(call, other, now)
    assert len(gate._streams) <= _MOST_STREAMS


# Strangers --------------------------------------------------------------------------------------


def test_an_action_without_a_stamp_is_taken_and_answered_as_ever(server, arm):
    with plain_client(server) as plain:
        assert plain.call("act", ["move", 1]) == {"done": 1}
    [executed] = server.executed()
    assert (executed.number, executed.policy, executed.observation) == (0, None, None)
    assert 0 <= executed.age < 20


def test_without_a_stamp_the_devices_bound_counts_from_its_arrival(transport, arm):
    config = config_of(transport, action_timeout=0.3, on_action_timeout=lambda: None)
    with (
        started(ActionServer(config, arm.observe, arm.act)) as server,
        plain_client(server) as plain,
    ):
        arm.free.clear()
        first = plain.call_async("act", ["move", 1])
        assert arm.busy.wait(20)
        late = plain.call_async("act", ["grip", 2])
        time.sleep(0.4)
        arm.free.set()
        first.result(20)
        with pytest.raises(Stale):
            late.result(20)
        assert arm.done == [1]


GOOD = [1, None, 0.0, 0.0, None, None, None, None, 7]
WRONG = {
    0: [True, 0.5, "1", None, -1, 1 << 63, []],
    1: [-1, 1.5, "now", 1 << 63, True],
    2: [-0.5, math.nan, math.inf, "1", None, 1e300],
    3: [-0.5, math.nan, math.inf, "1", None],
    4: [-0.5, math.nan, math.inf, "1", True],
    5: [-1, 0.5, 1 << 63, "1"],
    6: ["x" * 201, 5, b"v1"],
    7: [-1, "token", 0.5],
    8: [-1, None, 1 << 63],
}


def test_stamps_that_are_wrong_are_malformed_and_nothing_is_carried_out(server, arm):
    encode = msgspec.msgpack.encode
    wrong = [[*GOOD[:i], value, *GOOD[i + 1 :]] for i, values in WRONG.items() for value in values]
    bodies = [
        *map(encode, wrong),
        *(encode(GOOD)[:n] for n in range(len(encode(GOOD)))),
        *(encode(value) for value in ({}, None, 5, "stamp", GOOD[:8])),
        b"\x91" * 50_000,  # nested too deep
        b"\xdd\xff\xff\xff\xff",  # claims to be long
        b"\xc1",
    ]
    with plain_client(server) as plain:
        for body in bodies:
            with pytest.raises(Malformed):
                plain.call("act", ["move", {}, body])
        for stamp in (None, GOOD, "stamp", 5, {}):
            with pytest.raises(Malformed):
                plain.call("act", ["move", {}, stamp])
        assert arm.done == []
        assert server.executed() == []
        later = encode([*GOOD, "of a later version", [1]])
        result, clock, halts = plain.call("act", ["move", 1, later, "and more"])
        assert (result, halts) == ({"done": 1}, 0)
        assert abs(clock - time.monotonic_ns()) < 20 * SECOND


@given(st.binary(max_size=40))
def test_no_bytes_fail_in_another_way(data):
    try:
        _, _, stamp = read(["move", {}, data])
    except Malformed:
        return
    assert isinstance(stamp, Stamp)
    assert math.isfinite(age_of(stamp, time.monotonic_ns(), 0.0))


def test_what_is_no_age_is_told_before_anything_is_sent(client, arm):
    for wrong in (
        *({"age": value} for value in (-1, math.nan, math.inf, True)),
        *({"valid": value} for value in (-1, math.nan, True)),
        *({"policy": value} for value in (5, "x" * 201)),
    ):
        for send in (client.act, client.act_async):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                send("move", 1, **wrong)
    for wrong in (0.5, "x", -1, 1 << 70, True, client.observe()):
        for send in (client.act, client.act_async):
            with pytest.raises(ValueError, match="observation is the id that an Observation has"):
                send("move", 1, observation=wrong)
    assert arm.done == []
    assert client.act("move", 1, valid=math.inf) == {"done": 1}


DEVICE = """
import signal
from edgeml import ActionConfig, ActionServer
done = []
config = ActionConfig(0, ["move"], ["joints"])
server = ActionServer(config, lambda keys: {"joints": done}, lambda key, n: done.append(n))
server.start(threaded=True)
print(server.port, flush=True)
signal.pause()
"""


@pytest.mark.parametrize("transport", [each for each in TRANSPORTS if each != "inproc"])
def test_a_device_that_was_frozen_takes_nothing_of_what_came_meanwhile(transport):
    program = DEVICE.replace('["joints"])', f'["joints"], transport="{transport}")')
    with process(program) as device:
        config = ActionConfig(int(device.line()), ["move"], ["joints"], transport=transport)
        with ActionClient("localhost", config=config) as client:
            client.act("move", 0, valid=30)
            device.signal(signal.SIGSTOP)
            late = [client.act_async("move", n, valid=0.3, timeout=20) for n in range(1, 4)]
            time.sleep(0.5)
            device.signal(signal.SIGCONT)
            for each in late:
                with pytest.raises(Stale):
                    each.result(20)
            client.act("move", 4, valid=30)
            assert client.obs() == {"joints": [0, 4]}
