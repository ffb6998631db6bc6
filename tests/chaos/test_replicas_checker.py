"""The checker of replicas, by histories that are told here."""

from collections import Counter

import pytest

from chaos.replicas_checker import NEW_WITHIN, check

URL = "zmq://127.0.0.1:1"
LOST = f"the connection to {URL} was lost; it had been asked, so this may have been carried out"


class History:
    """Of two replicas, 1 and 2, and a client that calls them."""

    def __init__(self):
        self.events, self.calls = [], 0
        for pid in (1, 2):
            self.tell("made", 0.0, who="replica", life=pid)

    def tell(self, e, t, who="harness", life=0, **more):
        self.events.append({"who": who, "life": life, "e": e, "t": t, **more})

    def ask(self, t, by=(1,), timeout=2.0):
        """A call that is begun by these replicas a moment later; returns its name."""
        self.calls += 1
        call = f"call-{self.calls}"
        self.tell("ask", t, who="caller0", life=1, call=call, timeout=timeout)
        for pid in by:
            self.tell("begin", t + 0.01, who="replica", life=pid, call=call)
        return call

    def answer(self, t, by=1, begun=(1,), after=0.03, of=None):
        call = self.ask(t, begun)
        self.tell(*("answer", t + after, "caller0", 1), call=call, its_call=of or call, its_pid=by)
        return call

    def fail(self, t, begun=(1,), after=0.5, error="Unreachable", text=LOST, unharmed=False):
        call = self.ask(t, begun)
        self.tell(
            *("fail", t + after, "caller0", 1),
            **{"call": call, "error": error, "text": text, "unharmed": unharmed},
        )

    def kill(self, t, pid=1, new=3, after=2.0, alone=True):
        """One is killed, and another takes calls later."""
        self.tell("kill", t, pid=pid, url=URL, since=t - 0.001, alone=alone)
        if new:
            self.tell("made", t + after - 0.1, who="replica", life=new)
            self.answer(t + after, by=new, begun=(new,))

    def found(self, **more):
        self.events.sort(key=lambda event: event["t"])
        return [text.partition(":")[0] for text in check(self.events, **more)]


@pytest.fixture
def history():
    return History()


def test_nothing_is_wrong_where_all_is_well(history):
    history.tell("settled", 0.5, pids=[1, 2])
    for n in range(10):
        history.answer(1 + n / 10, by=1 + n % 2, begun=(1 + n % 2,))
    history.fail(2.99)
    history.fail(2.98, begun=())
    history.kill(3.0)
    seen = Counter()
    assert history.found(seen=seen) == []
    assert (seen["calls"], seen["kills"], seen["settled"]) == (13, 1, 1)
    assert (seen["calls failed, begun"], seen["calls failed, unread"]) == (1, 1)


def test_nothing_that_was_asked_is_no_success(history):
    assert history.found() == ["nothing"]


def test_a_call_ends_once_and_in_time(history):
    history.ask(1.0)
    assert history.found() == ["never"]
    history = History()
    history.answer(1.0, after=2.2)
    assert history.found() == []
    history.answer(5.0, after=2.3)
    assert history.found() == ["late"]
    history.tell("waited", 6.0, "caller0", 1, since=5.9, seconds=0.1)
    assert history.found() == []


def test_no_call_is_carried_out_twice(history):
    history.answer(1.0, by=2, begun=(1, 2))
    assert history.found() == ["twice"]


def test_an_answer_is_of_the_one_that_carried_the_call_out(history):
    history.answer(1.0, by=2, begun=(1,))
    history.answer(2.0, of="another")
    history.answer(3.0, begun=())
    assert history.found() == ["answer"] * 3


@pytest.mark.parametrize(
    ("how", "wrong"),
    [
        ({}, False),
        ({"begun": ()}, False),
        ({"begun": (2,)}, True),  # it lives
        ({"text": "nobody answers"}, True),
        ({"text": LOST.replace(URL, "zmq://127.0.0.1:2")}, True),
        ({"error": "DeadlineExceeded"}, True),
        ({"unharmed": True}, True),
        ({"after": 0.005}, True),  # before the kill
    ],
)
def test_a_call_may_fail_that_was_under_way_in_one_that_was_killed(history, how, wrong):
    history.fail(1.0, **how)
    history.kill(1.01)
    assert history.found() == ["failed"] * wrong


def test_a_call_may_fail_that_was_sent_before_the_client_could_know(history):
    history.kill(1.0)
    history.fail(1.4, begun=(), after=0.1)
    seen = Counter()
    assert history.found(seen=seen) == []
    assert seen["calls failed, sent to one that was no more"] == 1
    history.fail(1.6, begun=(), after=0.1)
    assert history.found() == ["failed"]


def test_no_call_fails_where_none_was_killed(history):
    history.answer(0.5)
    history.fail(1.0)
    history.kill(3.0)
    assert history.found() == ["failed"]


def test_who_was_kept_waiting_by_the_machine_may_be_taken_to_be_gone(history):
    history.fail(1.0, text="no heartbeat; it had been asked, so this may have been carried out")
    history.tell("waited", 1.4, "replica", 2, since=0.9, seconds=0.5)
    assert history.found() == ["failed"]
    history.tell("waited", 0.8, "replica", 2, since=0.2, seconds=0.6)
    seen = Counter()
    assert history.found(seen=seen) == []
    assert seen["calls failed, the machine's doing"] == 1


def test_another_takes_calls_in_time(history):
    history.answer(0.5)
    history.kill(1.0, after=NEW_WITHIN - 0.1)
    assert history.found() == []
    history.kill(20.0, after=NEW_WITHIN + 0.1, new=4)
    assert history.found() == ["new"]
    assert history.found(late=1.0) == []
    history = History()
    history.answer(0.5)
    history.kill(1.0, new=None)
    assert history.found() == ["new"]
    history.tell("change", 1.1)
    history.events = [e for e in history.events if e["e"] != "kill"]
    history.kill(1.0, new=None, alone=False)
    assert history.found() == []


def test_who_was_ended_takes_no_calls(history):
    history.answer(0.5)
    history.tell("settled", 1.0, pids=[2])
    history.answer(0.995)  # asked before
    assert history.found() == []
    history.answer(1.1)
    assert history.found() == ["settled"]
    history.tell("change", 1.05)
    assert history.found() == []


@pytest.mark.parametrize("what", ["died", "stuck", "traceback", "unsettled"])
def test_what_went_wrong_by_itself_is_told(history, what):
    history.answer(0.5)
    history.tell(what, 1.0, of="caller0", why="no answer")
    assert history.found() == [what]


def test_what_nobody_asked_is_not_carried_out(history):
    history.answer(0.5)
    history.tell("begin", 1.0, who="replica", life=1, call="made up")
    assert history.found() == ["carried out"]
