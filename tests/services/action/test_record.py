"""What a device has carried out: kept for a while, and told to who follows it."""

from __future__ import annotations

import threading
import time

import pytest

from edgeml import (
    ActionClient,
    ActionConfig,
    ActionServer,
    Executed,
    Malformed,
    RemoteError,
)
from edgeml.services.action.record import Entry, Record, read_part, rows_of
from pairs import free_port, no_thread_left, plain_client, started, stop_server, wait_until


def config_of(transport, port=0, **kwargs) -> ActionConfig:
    return ActionConfig(port, ["move", "grip"], ["joints"], transport=transport, **kwargs)


def act(key, payload):
    if payload == "fail":
        raise ValueError("it can't")
    return payload


@pytest.fixture
def server(transport):
    with started(ActionServer(config_of(transport), None, act)) as server:
        yield server


@pytest.fixture
def client(server, transport):
    config = config_of(transport, server.port)
    with ActionClient(config=config, task_id="hand", client_id="robot") as client:
        yield client


def test_the_record_has_who_did_what_when_and_what_became_of_it(client, server):
    before = time.monotonic()
    client.act("move", 1, policy="v1")
    client.act("grip", 2)
    with pytest.raises(RemoteError):
        client.act("move", "fail")
    first, second, third = server.executed()
    assert [each.index for each in (first, second, third)] == [1, 2, 3]
    assert [each.key for each in (first, second, third)] == ["move", "grip", "move"]
    assert [each.number for each in (first, second, third)] == [1, 1, 2]
    assert [each.outcome for each in (first, second, third)] == ["done", "done", "failed"]
    assert (first.client_id, first.label, first.identity) == ("robot", "hand", None)
    assert (first.policy, second.policy) == ("v1", None)
    assert before <= first.at <= second.at <= third.at <= time.monotonic()
    assert all(0 <= each.took < 20 and 0 <= each.age < 20 for each in (first, second, third))
    assert server.executed(since=2) == [third]
    assert server.executed(since=3) == server.executed(since=99) == []


def test_what_runs_is_on_the_record_as_running(transport):
    free, busy = threading.Event(), threading.Event()

    def wait(key, payload):
        busy.set()
        assert free.wait(30)

    with (
        started(ActionServer(config_of(transport), None, wait)) as server,
        ActionClient("127.0.0.1", server.port, config=config_of(transport)) as client,
    ):
        future = client.act_async("move")
        assert busy.wait(20)
        [running] = server.executed()
        assert (running.outcome, running.took) == ("running", 0.0)
        free.set()
        future.result(20)
        [done] = server.executed()
        assert done.outcome == "done"
        assert done.took > 0
        assert done.index == running.index


def test_it_keeps_the_newest(transport):
    with (
        started(ActionServer(config_of(transport), None, act, record=5)) as server,
        ActionClient("127.0.0.1", server.port, config=config_of(transport)) as client,
    ):
        for n in range(12):
            client.act("move", n)
        assert [each.index for each in server.executed()] == [8, 9, 10, 11, 12]
        assert [each.index for each in server.executed(3)] == [8, 9, 10, 11, 12]
        assert [each.index for each in server.executed(10)] == [11, 12]
    with pytest.raises(ValueError, match="record must be at least 1"):
        ActionServer(config_of(transport), None, act, record=0)


def test_who_follows_the_record_gets_each_action_once_it_is_over(client, server, transport):
    client.act("move", 0)
    got: list[Executed] = []
    with no_thread_left():
        recording = client.register_executed_callback(got.append)
        for n in range(1, 50):
            client.act("move", n)
        wait_until(lambda: len(got) == 50)
        assert got == server.executed()
        assert (recording.received, recording.missed, recording.errors) == (50, 0, 0)
        recording.close()
        recording.close()
    client.act("move", 50)
    assert len(got) == 50


def test_one_that_hangs_holds_up_no_other(transport):
    free = threading.Event()

    def wait(key, payload):
        assert key == "move" or free.wait(30)

    got: list[Executed] = []
    server = ActionServer(config_of(transport), None, wait, workers=3)
    with (
        started(server),
        ActionClient("127.0.0.1", server.port, config=config_of(transport)) as client,
    ):
        client.register_executed_callback(got.append)
        hangs = client.act_async("grip")
        wait_until(lambda: server.executed())
        client.act("move")
        wait_until(lambda: [each.key for each in got] == ["move"])
        free.set()
        hangs.result(20)
        wait_until(lambda: [each.key for each in got] == ["move", "grip"])
        assert [each.index for each in got] == [2, 1]


def test_what_a_recorder_comes_too_late_for_is_counted(transport):
    got: list[Executed] = []
    hold, held = threading.Event(), threading.Event()

    def record(each):
        got.append(each)
        held.set()
        assert hold.wait(30)

    with (
        started(ActionServer(config_of(transport), None, act, record=10)) as server,
        ActionClient("127.0.0.1", server.port, config=config_of(transport)) as client,
    ):
        client.act("move", 0)
        recording = client.register_executed_callback(record)
        assert held.wait(20)
        for n in range(100):
            client.act("move", n)
        hold.set()
        wait_until(lambda: recording.received + recording.missed == 101)
        assert recording.received == 11
        assert recording.missed == 90
        assert [each.index for each in got] == [1, *range(92, 102)]


def test_a_recorder_that_raises_goes_on(client, server):
    recording = client.register_executed_callback(lambda each: 1 / 0)
    client.act("move", 1)
    client.act("move", 2)
    wait_until(lambda: recording.received == 2)
    wait_until(lambda: recording.errors == 2)


def test_a_recorder_goes_on_with_a_device_that_is_started_anew(transport, caplog):
    config = config_of(transport, free_port())
    got: list[Executed] = []
    with started(ActionServer(config, None, act)) as first:
        client = ActionClient("127.0.0.1", config=config)
        with client:
            client.register_executed_callback(got.append)
            client.act("move", 1)
            client.act("move", 2)
            wait_until(lambda: len(got) == 2)
            stop_server(first, client)
            with started(ActionServer(config, None, act)):
                wait_until(lambda: acts(client))
                wait_until(lambda: len(got) == 3)
                assert [each.index for each in got] == [1, 2, 1]
    assert "the device was started anew" in caplog.text


def acts(client) -> bool:
    try:
        return client.act("move", 3) == 3
    except ConnectionError:
        return False


def test_a_long_record_comes_in_parts():
    record = Record(5000)
    for n in range(4000):
        entry = Entry("move", "c", "", None, n, None, None, 0.0, 0.0)
        record.end(record.begin(entry), "done")
    got: list[Executed] = []
    started = ended = 0
    while part := record.part(started, ended):
        assert part.missed == 0
        assert len(part.entries) <= 500
        started, ended = part.started, part.ended
        got += part.entries
        if not part.entries:
            break
    assert [each.number for each in got] == list(range(4000))
    assert read_part([*part[:3], rows_of(got)]).entries == got


def test_a_record_that_is_none_is_malformed(server):
    row = rows_of([Executed(1, "k", "c", "l", None, 1, None, None, 0.0, 0.0, 0.0, "done")])[0]
    assert read_part([1, 1, 0, [row]]).entries[0].key == "k"
    for answer in (None, [], [1, 1, 0], [1, 1, 0, [5]], [1, 1, 0, [row[:-1]]], [1, 1, "0", []]):
        with pytest.raises(Malformed):
            read_part(answer)
    with plain_client(server) as plain:
        for payload in (None, 5, [], [1], [1, "2"], [True, 1], {}):
            with pytest.raises(Malformed):
                plain.call("executed", payload)
        with pytest.raises(Malformed, match="bytes, and 4096 are taken"):
            plain.call("executed", [0, 0, b"x" * 100_000])
        for payload in ([1, 5], [-5, -5], [0, 1 << 70]):  # of another start: from the beginning
            assert plain.call("executed", payload)[1:] == [0, 0, []]
