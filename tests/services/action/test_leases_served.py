"""Leases between real ends: taken, taken over, kept, lost and given back."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time
from contextlib import ExitStack

import pytest

from edgeml import (
    ActionClient,
    ActionConfig,
    ActionServer,
    Closed,
    Malformed,
    NotHolder,
    PermissionDenied,
    Stale,
    UnknownInterface,
    Unreachable,
)
from pairs import (
    free_port,
    make_keys,
    no_thread_left,
    plain_client,
    process,
    session_of,
    started,
    took,
    wait_until,
)

LONG = 60.0  # seconds of leases that are to end in another way than by silence
TICK = 0.02

PROCESSES = ("zmq", "grpc", "shm")


def config_of(transport, port=0, **more) -> ActionConfig:
    return ActionConfig(port, ["arm", "hand"], transport=transport, **more)


class Device:
    """Notes whose actions it carries out, from when to when."""

    def __init__(self) -> None:
        self.actions: list[tuple[str, float, float]] = []
        self.takes = 0.0
        self.go_on = threading.Event()
        self.go_on.set()

    def act(self, key, payload):
        began = time.monotonic()
        assert self.go_on.wait(30)
        time.sleep(self.takes)
        self.actions.append((payload, began, time.monotonic()))
        return payload


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def server(transport, device):
    with started(ActionServer(config_of(transport), None, device.act)) as server:
        yield server


@pytest.fixture
def connect(server):
    with ExitStack() as stack:

        def make(name, **more):
            client = ActionClient(url=server.url, config=config_of(None), task_id=name, **more)
            return stack.enter_context(client)

        yield make


# Taken and given back ---------------------------------------------------------------------------


def test_one_client_has_the_key_and_the_others_are_told_who(server, connect, device):
    policy, other = connect("policy"), connect("other")
    assert other.act("arm", "free") == "free"  # without any lease anybody may
    with policy.lease("arm") as lease:
        assert lease.held
        assert lease.since == 1
        assert policy.act("arm", "mine") == "mine"
        assert policy.act_async("arm", "mine").result(30) == "mine"
        with pytest.raises(NotHolder, match=r"^policy has the lease of 'arm'.*client\.lease"):
            other.act("arm", "not mine")
        with pytest.raises(NotHolder):
            other.act_async("arm", "not mine").result(30)
        assert other.act("hand", "another key") == "another key"
        with took(10, at_least=0.1), pytest.raises(NotHolder, match=r"policy.*for 0\.1 s: wait"):
            other.lease("arm", wait=0.1)
    assert not lease.held
    assert other.act("arm", "free") == "free"
    assert [each[0] for each in device.actions] == ["free", "mine", "mine", "another key", "free"]
    counts = server.stats()
    assert (counts["leases_granted"], counts["actions_not_holder"]) == (1, 2)


def test_who_waits_has_it_in_the_order_in_which_it_came(connect):
    first, second, third = connect("first"), connect("second"), connect("third")
    with first.lease("arm", ttl=LONG) as lease:
        waiting = second.lease("arm", wait=0, ttl=LONG)
        assert not waiting.wait(0.05)
        later = third.lease("arm", wait=0, ttl=LONG)
        assert not later.wait(0.05)
        lease.release()
        assert waiting.wait(30)
        assert not later.held
        waiting.release()
        assert later.wait(30)


def test_a_higher_priority_takes_it_at_once_and_the_loser_has_it_back_by_itself(connect):
    policy, human = connect("policy"), connect("human")
    told: list[bool] = []
    with policy.lease("arm", ttl=LONG, on_change=told.append) as lease:
        with took(5), human.lease("arm", priority=1):
            wait_until(lambda: not lease.held)  # without having asked
            with pytest.raises(NotHolder, match=r"^human has the lease of 'arm', with priority 1"):
                policy.act("arm", "late")
            assert human.act("arm", "by hand") == "by hand"
            wait_until(lambda: told == [True, False])
        assert lease.wait(30)
        assert lease.since == 2
        assert policy.act("arm", "again") == "again"
        wait_until(lambda: told == [True, False, True])


def test_who_loses_it_and_who_gets_it_need_not_ask(connect):
    """A question is kept for a second, so that twenty times half of it would be ten."""
    policy, human = connect("policy"), connect("human")
    with policy.lease("arm", ttl=LONG) as lease, took(5):
        for number in range(10):
            with human.lease("arm", priority=1, ttl=LONG):
                wait_until(lambda: not lease.held)
            assert lease.wait(30)
            assert lease.since == number + 2


def test_an_action_that_is_taken_is_a_sign_at_both_ends(server, connect):
    rule = server._device.lessor._keys["arm"].rule
    client = connect("policy")
    with client.lease("arm", ttl=LONG) as lease:
        here, there = lease._until, rule._claims[rule.holder].ends
        began = time.monotonic()
        client.act("arm")
        assert lease._until >= began + LONG > here
        assert rule._claims[rule.holder].ends >= began + LONG > there


def test_a_lease_given_back_twice_and_asked_for_twice(connect):
    client = connect("policy")
    lease = client.lease("arm")
    with pytest.raises(RuntimeError, match="release it first"):
        client.lease("arm")
    with client.lease("hand"):
        assert client.act("hand", 1) == 1
    lease.release()
    lease.release()
    with pytest.raises(Closed, match="released"):
        lease.wait(1)
    with client.lease("arm") as again:
        assert again.since == 1


def test_what_is_no_lease_is_refused(server, connect):
    client = connect("policy")
    with pytest.raises(UnknownInterface, match=r"no action 'leg'; known: 'arm', 'hand'"):
        client.lease("leg")
    for wrong in ({"ttl": 0}, {"ttl": -1}, {"ttl": 1e9}, {"priority": 1 << 40}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            client.lease("arm", **wrong)
    for wrong in ({"priority": 0.5}, {"on_change": 1}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            client.lease("arm", **wrong)
    assert client.lease("arm").held  # nothing of these is left
    nan = float("nan")
    with plain_client(server) as plain:
        for payload in (
            None,
            "arm",
            ["arm"],
            ["arm", 0],
            ["arm", True],
            ["arm", 1 << 63],
            ["arm", 1, 0.5, 1.0],
            ["arm", 1, 0, -1.0],
            ["arm", 1, 0, nan],
            ["arm", 1, 0, 1e9],
            ["arm", 1, 0, 1.0, 0, nan],
            [1, 1, 0, 1.0],
            ["arm", 1, 0, 1.0, "x"],
            ["arm", 1, 0, 1.0, 0, 0.0, "x" * 5000],
        ):
            with pytest.raises(Malformed):
                plain.call("lease", payload)
        assert plain.call("lease", ["hand", 7, 0, 1.0, 0, 0.0, "of a later version"])[0] > 0


def test_a_wrong_rate_of_actions_is_refused():
    for wrong in (0, -1, float("nan"), float("inf"), "fast", True):
        with pytest.raises(ValueError, match="action_rate"):
            ActionServer(config_of("zmq", action_rate=wrong), None, None)


def test_a_role_that_lacks_the_action_lacks_its_lease(tmp_path):
    from edgeml.cli.keygen import make_client_keys

    keys = make_keys(tmp_path)
    robot = make_client_keys(keys["server"], "hand", role="act:hand")
    config = config_of("zmq")
    with (
        started(ActionServer(config, None, lambda key, x: x, credentials=keys["server"])) as server,
        ActionClient(url=server.url, config=config, credentials=robot) as client,
    ):
        with pytest.raises(PermissionDenied, match="act:arm"):
            client.lease("arm")
        with client.lease("hand") as lease:
            assert lease.held


# Kept and lost ----------------------------------------------------------------------------------


def test_it_outlives_its_ttl_without_any_action(server, connect):
    with connect("policy").lease("arm", ttl=1.0) as lease:
        time.sleep(2.5)  # which is what is looked at, not waited for
        assert lease.held
        assert lease.since == 1
    assert server.stats()["leases_expired"] == 0


def test_it_outlives_a_connection_that_is_lost(server, connect):
    policy, other = connect("policy"), connect("other")
    told: list[bool] = []
    with policy.lease("arm", ttl=LONG, on_change=told.append) as lease:
        waiting = other.lease("arm", wait=0)
        session_of(policy).lose(Unreachable("as if it were"))
        assert policy.act("arm", "mine") == "mine"
        assert session_of(policy).why_lost is None
        assert lease.held
        assert lease.since == 1
        assert not waiting.held
    assert waiting.wait(30)
    assert told == [True]


def test_a_device_that_starts_anew_lends_it_anew(transport, device):
    config = config_of(transport, free_port())
    server = ActionServer(config, None, device.act)
    server.start(threaded=True)
    with ActionClient(config=config) as client, client.lease("arm") as lease:
        assert lease.since == 1
        server.stop()
        wait_until(lambda: not lease.held)
        with started(ActionServer(config, None, device.act)):
            assert lease.wait(30)
            assert lease.since == 2
            assert client.act("arm", "mine") == "mine"


def test_an_action_that_takes_long_holds_up_no_lease(connect, device):
    """All of it with one worker: what is asked of leases waits for no handler."""
    policy, human = connect("policy"), connect("human")
    with policy.lease("arm", ttl=2.0) as lease:
        device.go_on.clear()
        running = policy.act_async("arm", "long", timeout=60)
        try:
            time.sleep(3)  # which is what is looked at, not waited for
            assert lease.held
            assert lease.since == 1
            taking = human.lease("arm", priority=1, wait=0)
            wait_until(lambda: not lease.held)
            with pytest.raises(NotHolder, match="still running"):
                taking.require(0.3)  # never while another's action runs
        finally:
            device.go_on.set()
        assert taking.wait(30)
        assert running.result(30) == "long"
        taking.release()


def test_a_client_that_stops_gives_it_back(connect):
    policy, other = connect("policy"), connect("other")
    lease = policy.lease("arm", ttl=LONG)
    waiting = other.lease("arm", wait=0, ttl=LONG)
    with took(10):
        policy.stop()
        assert waiting.wait(30)
    assert not lease.held


def test_a_client_that_is_dropped_gives_it_back(server, connect):
    other = connect("other")
    client = ActionClient(url=server.url, config=config_of(None))
    client.lease("arm", ttl=LONG)
    waiting = other.lease("arm", wait=0)
    with pytest.warns(ResourceWarning, match="dropped without stop"):
        del client
    assert waiting.wait(30)


HOLDER = """
import sys, time
from edgeml import ActionClient, ActionConfig
config = ActionConfig(0, ["arm", "hand"])
with ActionClient(url=sys.argv[1], config=config, task_id="holder") as client:
    with client.lease("arm", ttl=float(sys.argv[2])) as lease:
        print(client.act("arm", "from afar"), flush=True)
        for line in sys.stdin:
            try:
                print(lease.held, client.act("arm", "from afar"), lease.since, flush=True)
            except Exception as error:
                print(lease.held, type(error).__name__, lease.since, flush=True)
"""


@pytest.mark.parametrize("transport", PROCESSES, indirect=True)
def test_a_holder_that_is_killed_loses_it_with_its_silence(server, connect):
    other = connect("other")
    with process(HOLDER, server.url, 1.0) as holder:
        assert holder.line() == "from afar"
        with pytest.raises(NotHolder, match="holder"):
            other.lease("arm", wait=0.1)
        waiting = other.lease("arm", wait=0)
        assert not waiting.wait(0.2)
        with took(6, at_least=0.5):
            holder.signal(signal.SIGKILL)
            assert waiting.wait(30)
        assert other.act("arm", "mine") == "mine"


@pytest.mark.parametrize("transport", PROCESSES, indirect=True)
def test_a_holder_that_is_frozen_loses_it_and_knows_when_it_thaws(server, connect):
    other = connect("other")
    with process(HOLDER, server.url, 0.6) as holder:
        assert holder.line() == "from afar"
        holder.signal(signal.SIGSTOP)
        with took(6):
            waiting = other.lease("arm", wait=30)
        assert other.act("arm", "mine") == "mine"
        holder.popen.stdin.write("?\n")
        holder.popen.stdin.flush()
        holder.signal(signal.SIGCONT)
        assert holder.line() == "False NotHolder 1"
        assert waiting.held
        waiting.release()

        def has_it_back() -> bool:
            holder.popen.stdin.write("?\n")
            holder.popen.stdin.flush()
            return holder.line() == "True from afar 2"

        wait_until(has_it_back)


@pytest.mark.parametrize("transport", PROCESSES, indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_holder_that_is_told_to_end_gives_it_back(server, connect, number):
    other = connect("other")
    with process(HOLDER, server.url, LONG) as holder:
        assert holder.line() == "from afar"
        waiting = other.lease("arm", wait=0)
        holder.signal(number)
        assert waiting.wait(30)


# One writer ---------------------------------------------------------------------------------------


def test_no_two_writers_act_within_one_period_nor_at_a_time(transport, device):
    """Four workers, and three clients that take the key from each other as fast as they can."""
    config = config_of(transport, action_rate=1 / TICK)
    device.takes = 0.002
    failures: list[BaseException] = []
    over = threading.Event()

    def handed_over() -> int:
        writers = [each[0] for each in list(device.actions)]
        return sum(a != b for a, b in itertools.pairwise(writers))

    def write(url, number):
        rng = random.Random(number)
        try:
            with ActionClient(url=url, config=config_of(None), task_id=str(number)) as client:
                while not over.is_set():
                    lease = client.lease("arm", priority=rng.randrange(3), wait=0)
                    while not over.is_set() and not lease.wait(0.1):
                        pass
                    under_way = []
                    for _ in range(10):
                        under_way.append(client.act_async("arm", number))
                        time.sleep(TICK / 10)
                    for each in under_way:
                        error = each.exception(30)
                        assert error is None or isinstance(error, (NotHolder, Stale)), error
                    lease.release()
                    time.sleep(rng.random() * 4 * TICK)
        except BaseException as error:
            failures.append(error)

    with started(ActionServer(config, None, device.act, workers=4)) as server:
        threads = [threading.Thread(target=write, args=(server.url, n)) for n in range(3)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: failures or handed_over() >= 15, 60)
        finally:
            over.set()
            for thread in threads:
                thread.join(60)
    assert not failures
    actions = sorted(device.actions, key=lambda each: each[1])
    for (writer, _, ended), (following, began, _) in itertools.pairwise(actions):
        if writer != following:
            assert began >= ended
    record = [each for each in server.executed() if each.key == "arm"]
    for one, other in itertools.pairwise(record):
        if one.label != other.label:
            assert other.at >= one.at + TICK


# What is kept waiting ---------------------------------------------------------------------------


def test_questions_that_are_kept_are_nobodys_burden(server, connect, caplog):
    policy = connect("policy")
    lease = policy.lease("arm", ttl=LONG)
    others = [connect(f"other {number}") for number in range(5)]
    waiting = [each.lease("arm", wait=0, ttl=LONG) for each in others]
    for each in waiting:
        with pytest.raises(NotHolder, match="policy"):
            each.require(0.2)
    assert server.stats()["waiting"] == 0
    with took(5):
        assert server.drain(30)
    assert not any(each.held for each in waiting)
    assert "left behind" not in caplog.text
    lease.release()


def test_a_server_that_stops_has_no_question_left(transport, device, caplog):
    with no_thread_left():
        server = ActionServer(config_of(transport), None, device.act)
        server.start(threaded=True)
        with ActionClient(url=server.url, config=config_of(None)) as client:
            lease = client.lease("arm", ttl=LONG)
            with took(5):
                server.stop()
            with took(5):
                lease.release()
    assert "left behind" not in caplog.text


def test_a_client_that_goes_has_no_question_left(server, connect):
    policy = connect("policy")
    lessor = server._device.lessor
    with policy.lease("arm", ttl=LONG):
        other = connect("other")
        other.lease("arm", wait=0, ttl=LONG)
        wait_until(lambda: len(lessor._keys["arm"].kept) == 2)
        other.stop()
        wait_until(lambda: len(lessor._keys["arm"].kept) == 1)
        session_of(policy).lose(Unreachable("as if it were"))
        wait_until(lambda: session_of(policy).why_lost is None)
        for _ in range(3):
            assert len(lessor._keys["arm"].kept) <= 1
    wait_until(lambda: not lessor._keys["arm"].kept)


def test_a_question_is_kept_no_longer_than_its_caller_waits_nor_than_a_second(server):
    kept = server._device.lessor._keys["arm"].kept
    with plain_client(server) as plain:
        assert plain.call("lease", ["arm", 1, 0, 60.0, 0, 0.0])[0]
        waiting = plain.call_async("lease", ["arm", 2, 0, 60.0, 0, 60.0], timeout=0.5)
        wait_until(lambda: kept or waiting.done())
        for each in list(kept.values()):
            assert each.until <= each.call.deadline
        wait_until(lambda: waiting.done() and not kept)
        with took(5, at_least=0.9):
            assert plain.call("lease", ["arm", 2, 0, 60.0, 0, 60.0])[0] == 0
        assert not kept
