"""Alarms: things to do later, in one thread."""

from __future__ import annotations

import logging
import threading
import time
import tracemalloc
import weakref

import pytest

from edgeml.core.alarms import Alarms
from pairs import no_thread_left, took, wait_until


@pytest.fixture
def alarms():
    made = Alarms("edgeml test alarms")
    yield made
    made.close()


def test_actions_run_in_the_order_of_their_times_not_of_their_setting(alarms, monkeypatch):
    moment = time.monotonic()
    seen: list[int] = []
    done = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr("edgeml.core.alarms.time.monotonic", lambda: moment)
        for n in (3, 1, 4, 2, 0):
            alarms.after(0.02 * n + 0.01, lambda n=n: seen.append(n))
        alarms.after(0.15, done.set)
    alarms.after(0.0, lambda: None)  # wakes the thread, whose clock stood still
    assert done.wait(20)
    assert seen == [0, 1, 2, 3, 4]


def test_those_for_the_same_time_run_in_the_order_of_setting(alarms, monkeypatch):
    moment = time.monotonic()
    seen: list[int] = []
    done = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr("edgeml.core.alarms.time.monotonic", lambda: moment)
        for n in range(50):
            alarms.after(0.01, lambda n=n: seen.append(n))
        alarms.after(0.01, done.set)
    alarms.after(0.0, lambda: None)  # wakes the thread, whose clock stood still
    assert done.wait(20)
    assert seen == list(range(50))


def test_an_action_runs_at_its_time_and_not_before(alarms):
    began = time.monotonic()
    at: list[float] = []
    done = threading.Event()

    def action() -> None:
        at.append(time.monotonic() - began)
        done.set()

    alarms.after(0.1, action)
    assert done.wait(20)
    assert 0.1 <= at[0] < 3.0


def test_a_sooner_alarm_overtakes_one_that_is_being_waited_for(alarms):
    alarms.after(60, lambda: None)
    done = threading.Event()
    with took(at_most=2):
        alarms.after(0.01, done.set)
        assert done.wait(20)


def test_a_cancelled_alarm_does_not_run_and_lets_go_of_what_it_refers_to(alarms):
    class Thing:
        def touch(self) -> None:
            raise AssertionError("cancelled")

    thing = Thing()
    gone = weakref.ref(thing)
    alarm = alarms.after(0.05, thing.touch)
    del thing
    alarm.cancel()
    assert gone() is None
    done = threading.Event()
    alarms.after(0.1, done.set)
    assert done.wait(20)


def test_an_action_that_has_run_is_let_go_of(alarms):
    class Thing:
        def touch(self) -> None:
            done.set()

    done = threading.Event()
    thing = Thing()
    gone = weakref.ref(thing)
    alarm = alarms.after(0.0, thing.touch)
    del thing
    assert done.wait(20)
    alarm.cancel()  # which is allowed afterwards, and here drops the last reference
    wait_until(lambda: gone() is None)


def test_an_action_that_raises_is_logged_and_the_next_one_runs(alarms, caplog):
    done = threading.Event()
    with caplog.at_level(logging.ERROR, "edgeml"):
        alarms.after(0.0, lambda: 1 / 0)
        alarms.after(0.01, done.set)
        assert done.wait(20)
    assert "ZeroDivisionError" in caplog.text


def test_an_action_may_set_the_next_alarm(alarms):
    seen: list[int] = []
    done = threading.Event()

    def again() -> None:
        seen.append(len(seen))
        if len(seen) == 10:
            done.set()
        else:
            alarms.after(0.001, again)

    alarms.after(0.0, again)
    assert done.wait(20)
    assert seen == list(range(10))


def test_there_is_no_thread_until_one_is_needed():
    before = threading.active_count()
    alarms = Alarms("edgeml idle alarms")
    assert threading.active_count() == before
    alarms.close()


def test_closing_forgets_everything_and_ends_the_thread():
    with no_thread_left():
        alarms = Alarms("edgeml test alarms")
        ran: list[int] = []
        alarms.after(60, lambda: ran.append(1))
        with took(at_most=5):
            alarms.close()
            alarms.close()
        alarms.after(0.0, lambda: ran.append(2))
    assert ran == []  # and there is no thread that could


def test_an_action_may_close_its_own_alarms():
    with no_thread_left():
        alarms = Alarms("edgeml test alarms")
        done = threading.Event()

        def end() -> None:
            alarms.close()
            done.set()

        alarms.after(0.0, end)
        assert done.wait(20)


def test_deadlines_that_were_met_do_not_pile_up_until_their_time(alarms):
    """A client with a timeout of a day and a thousand calls a second would hold 86 million."""
    alarms.after(3600, lambda: None)  # the head of the queue stays
    tracemalloc.start()
    try:
        for _ in range(20_000):
            alarms.after(86_400, lambda: None).cancel()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 500_000  # 25 bytes for each; one that is held takes over 150


def test_alarms_are_set_from_many_threads_and_all_run(alarms):
    ran: list[int] = []

    def some(base: int) -> None:
        for n in range(100):
            alarms.after(0.001 * (n % 7), lambda n=n: ran.append(base + n))

    threads = [threading.Thread(target=some, args=(100 * k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: len(ran) == 800)
    assert sorted(ran) == list(range(800))


def test_where_no_thread_can_be_started_that_is_said_and_nothing_is_left(alarms, monkeypatch):
    """As while Python 3.12 ends the program."""

    def refuse(_) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with monkeypatch.context() as patch:
        patch.setattr("edgeml.core.alarms.threading.Thread.start", refuse)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="at interpreter shutdown"):
                alarms.after(0.0, lambda: None)
        never = Alarms("edgeml test alarms")
        with pytest.raises(RuntimeError):
            never.after(0.0, lambda: None)
        never.close()
    done = threading.Event()
    alarms.after(0.0, done.set)
    assert done.wait(20)
