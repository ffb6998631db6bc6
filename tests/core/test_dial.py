"""Connecting by a deadline: names whose server doesn't answer, and addresses that don't."""

import socket
import threading

import pytest

from edgeml.core.deadline import Deadline
from edgeml.core.dial import dial, look_up
from edgeml.testing.deadlines import SILENT, dropping, no_answer, resolve
from pairs import run_fresh, took, wait_until


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made.getsockname()[1]


def count_look_ups():
    return sum(thread.name == "edgeml looks up" for thread in threading.enumerate())


def test_a_name_is_looked_up_by_one_thread_however_many_ask(monkeypatch):
    with no_answer(monkeypatch):
        for _ in range(5):
            with (
                took(0.3),
                pytest.raises(TimeoutError, match=f"address of '{SILENT}' within 0.1 s"),
            ):
                look_up(SILENT, 80, Deadline(0.1))
        assert count_look_ups() == 1
    wait_until(lambda: not count_look_ups())
    monkeypatch.undo()
    resolve(monkeypatch, {SILENT: ["127.0.0.1"]})
    assert look_up(SILENT, 80, Deadline(5))[0][4] == ("127.0.0.1", 80)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fe80::1%lo"])
def test_an_address_needs_no_thread(monkeypatch, host):
    monkeypatch.setattr(threading.Thread, "start", lambda self: pytest.fail("a thread"))
    assert look_up(host, 80, Deadline(5))[0][4][1] == 80


@pytest.mark.parametrize("host", ["no.such.host.invalid.", "a" * 64 + ".b", "two words"])
def test_a_host_that_there_isnt_is_told(host):
    with pytest.raises((OSError, UnicodeError)):
        dial(host, 80, Deadline(20))


def test_an_address_that_does_not_answer_hides_no_other(monkeypatch, listening):
    hosts = [f"127.0.0.{number}" for number in (2, 3)]
    with dropping(hosts[0], listening), dropping(hosts[1], listening):
        resolve(monkeypatch, {"many.invalid": [*hosts, "127.0.0.1"]})
        with took(1.0), dial("many.invalid", listening, Deadline(10)) as made:
            assert made.getpeername() == ("127.0.0.1", listening)
            assert 8 < made.gettimeout() < 10


def test_an_address_that_refuses_costs_no_time(monkeypatch, listening):
    resolve(monkeypatch, {"many.invalid": ["127.0.0.2", "127.0.0.3", "127.0.0.1"]})
    with took(0.2), dial("many.invalid", listening, Deadline(10)) as made:
        assert made.getpeername() == ("127.0.0.1", listening)


def test_where_all_refuse_that_is_told(monkeypatch, listening):
    resolve(monkeypatch, {"many.invalid": ["127.0.0.2", "127.0.0.3"]})
    with pytest.raises(ConnectionRefusedError):
        dial("many.invalid", listening, Deadline(10))


def test_where_none_answers_the_deadline_is_kept(monkeypatch, listening):
    hosts = [f"127.0.0.{number}" for number in (2, 3, 4)]
    with (
        dropping(hosts[0], listening),
        dropping(hosts[1], listening),
        dropping(hosts[2], listening),
    ):
        resolve(monkeypatch, {"many.invalid": hosts})
        for timeout in (0.1, 0.6):
            with took(timeout + 0.2, timeout), pytest.raises(TimeoutError):
                dial("many.invalid", listening, Deadline(timeout))


def test_no_name_server_holds_up_the_end_of_a_program():
    printed, _ = run_fresh(
        """
        import socket, time
        from edgeml.core import Unreachable, Url, load_transport

        before = socket.getaddrinfo

        def look_up(host, *more, **settings):
            if host == "silent.invalid":
                time.sleep(60)
            return before(host, *more, **settings)

        socket.getaddrinfo = look_up
        for each in ("zmq", "grpc", "ws"):
            transport = load_transport(each)
            began = time.monotonic()
            try:
                transport.connect(Url(each, "silent.invalid", 5557), 0.3)
            except Unreachable as error:
                print(each)
        """,
        timeout=30,
    )
    assert printed.split() == ["zmq", "grpc", "ws"]
