"""A lease as its client keeps it, by a device whose answers come when and as a test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from edgeml import Closed, Malformed, NotReady, UnknownInterface
from edgeml.services.action.lease import Lease
from pairs import no_thread_left, wait_until


class Device:
    """In the place of a client of one; calls ``answer(number, question)`` for what it says."""

    timeout = 30.0

    def __init__(self, answer: Callable) -> None:
        self.sessions = SimpleNamespace(closed=False)
        self.questions: list = []
        self.ended: list = []
        self._answer = answer

    def call_async(self, name, question, timeout) -> Future:
        assert name == "lease"
        self.questions.append(question)
        future: Future = Future()

        def settle():
            try:
                said = self._answer(len(self.questions), question)
                if said is not None:
                    future.set_result(said)
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=settle, daemon=True).start()
        return future

    def call(self, name, question, timeout):
        self.ended.append(question)
        return [0, ""]


@contextmanager
def lease_of(answer, ttl=60.0, told=None):
    device = Device(answer)
    with no_thread_left():
        lease = Lease(device, "arm", 0, ttl, told, lambda: None)
        try:
            yield device, lease
        finally:
            lease.release()
    assert [each[3] for each in device.ended] == [0.0]  # given back


def test_an_answer_that_comes_too_late_counts_for_nothing_and_is_asked_for_anew():
    late, in_time = threading.Event(), threading.Event()

    def answer(number, question):
        if number == 1:
            assert late.wait(30)
            time.sleep(0.3)
            return [5, ""]
        return [5, ""] if in_time.wait(30) and number == 2 else None

    with lease_of(answer, ttl=0.2) as (device, lease):
        late.set()
        wait_until(lambda: len(device.questions) == 2)
        assert not lease.held
        assert lease.since == 0
        assert device.questions[1][4:] == [5, 0.0]  # known, and not to be kept
        in_time.set()
        wait_until(lambda: len(device.questions) == 3)
        assert lease.since <= 1


def test_each_time_that_it_comes_back_counts_also_unseen():
    told: list = []
    go_on = [threading.Event() for _ in range(4)]

    def answer(number, question):
        assert go_on[min(number, 4) - 1].wait(30)
        return {1: [5, ""], 2: [7, ""], 3: [0, "human has it"]}.get(number)

    with lease_of(answer, told=told.append) as (_, lease):
        go_on[0].set()
        wait_until(lambda: (lease.held, lease.since) == (True, 1))
        go_on[1].set()  # another took it and gave it back, and no question was there
        wait_until(lambda: (lease.held, lease.since) == (True, 2))
        go_on[2].set()
        wait_until(lambda: not lease.held)
        wait_until(lambda: told == [True, False, True, False])
        go_on[3].set()


def test_it_ends_by_its_own_clock_where_no_answer_comes():
    told: list = []
    with lease_of(lambda number, _: [5, ""] if number == 1 else None, 1.0, told.append) as (
        _,
        lease,
    ):
        wait_until(lambda: told == [True, False])
        assert not lease.held
        lease.note_action(time.monotonic())  # too late: the next answer tells what is so
        assert not lease.held


def test_a_device_that_keeps_no_question_is_not_asked_all_day():
    with lease_of(lambda number, question: [5, ""]) as (device, lease):
        wait_until(lambda: lease.held)
        before = len(device.questions)
        time.sleep(0.5)  # which is what is looked at, not waited for
        assert len(device.questions) - before <= 30
        assert device.questions[-1][5] == 1.0  # seconds, of a lease of sixty


def test_what_passes_is_tried_again_and_what_does_not_is_raised():
    def answer(number, question):
        if number < 4:
            raise NotReady("loading")
        return [5, ""]

    with lease_of(answer) as (_, lease):
        lease.require()
        assert lease.since == 1

    def refuse(number, question):
        raise UnknownInterface("no such action")

    with lease_of(refuse) as (_, lease), pytest.raises(UnknownInterface):
        lease.wait()
    for wrong in ("yes", [True], [1, 2], {}):
        with (
            lease_of(lambda number, question, wrong=wrong: wrong) as (_, lease),
            pytest.raises(Malformed),
        ):
            lease.wait()


def test_a_client_that_was_stopped_is_waited_for_no_longer():
    with lease_of(lambda number, question: [0, "human has it"]) as (device, lease):
        assert not lease.wait(0.1)
        device.sessions.closed = True
        with pytest.raises(Closed):
            lease.wait(30)
