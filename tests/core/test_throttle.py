"""What a client holds back of its calls, by a clock that is a number."""

from __future__ import annotations

import itertools

from edgeml.core.errors import DeadlineExceeded, Overloaded
from edgeml.core.throttle import Throttle


def ask(throttle, rate, seconds, answers, *, since=0.0, timeout=0.1):
    """Ask at a steady rate of a server that answers so many a second; when which were sent."""
    sent, answered = [], 0
    for number in range(int(rate * seconds)):
        now = since + number / rate
        if throttle.refusal(timeout, now) is not None:
            continue
        sent.append(now)
        if answered <= (now - since) * answers:
            answered += 1
            throttle.note_answered(now)
        else:
            throttle.note_refused(timeout, now, Overloaded("busy"))
    return sent


def rate_of(sent, since):
    return sum(at >= since for at in sent) / (max(sent) - since)


def test_who_is_never_refused_sends_all():
    assert len(ask(Throttle(), 1000, 5, 1000)) == 5000


def test_who_is_refused_sends_twice_what_is_answered_and_ten_a_second():
    for answers in (0, 6, 50, 300):
        sent = ask(Throttle(), 1000, 10, answers)
        assert abs(rate_of(sent, 4.0) - (2 * answers + 10)) < 0.15 * (2 * answers + 10)


def test_where_half_is_answered_nothing_is_held_back():
    assert len(ask(Throttle(), 100, 10, 55)) > 990


def test_what_is_sent_is_spread_evenly():
    sent = [at for at in ask(Throttle(), 500, 10, 20) if at > 4.0]
    gaps = [later - at for at, later in itertools.pairwise(sent)]
    assert max(gaps) < 1.5 * min(gaps)


def test_a_server_that_can_do_more_is_soon_asked_for_it():
    throttle = Throttle()
    ask(throttle, 1000, 10, 0)
    sent = ask(throttle, 1000, 5, 1000, since=10.0)
    assert rate_of(sent, 13.0) > 990


def test_calls_that_wait_longer_than_those_refused_are_sent():
    throttle = Throttle()
    ask(throttle, 1000, 5, 0)
    assert all(throttle.refusal(0.11, 5.0) is None for _ in range(100))
    assert any(throttle.refusal(0.1, 5.0) is not None for _ in range(100))


def test_one_refusal_of_a_call_that_waited_long_is_forgotten_though_those_of_others_go_on():
    throttle = Throttle()
    throttle.note_refused(10.0, 0.0, Overloaded("busy"))
    ask(throttle, 1000, 5, 0)
    assert all(throttle.refusal(1.0, 5.0) is None for _ in range(100))


def test_what_is_held_back_is_told_what_the_last_that_was_sent_was_told():
    for kind in (Overloaded, DeadlineExceeded):
        throttle = Throttle()
        throttle.note_refused(0.1, 0.0, kind("takes 20 ms of late"))
        told = [throttle.refusal(0.1, 0.5) for _ in range(100)]
        errors = [error for error in told if error is not None]
        assert len(errors) > 50
        assert {type(error) for error in errors} == {kind}
        assert "not sent" in str(errors[0])
        assert "takes 20 ms of late" in str(errors[0])


def test_what_is_no_refusal_for_a_second_is_no_reason_any_more():
    throttle = Throttle()
    ask(throttle, 1000, 5, 0)
    assert all(throttle.refusal(0.1, 6.1) is None for _ in range(1000))
