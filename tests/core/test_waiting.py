"""What waits, alone: whole servers and clients are played through, by a clock that is a number."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest

from edgeml.core.call import NOBODY, Call, Caller
from edgeml.core.errors import DeadlineExceeded, Overloaded
from edgeml.core.limits import DEFAULT_LIMITS
from edgeml.core.pace import OVERTAKEN, TOO_BUSY, TOO_LATE, TOO_SHORT, Pace
from edgeml.core.throttle import Throttle
from edgeml.core.transport import Peer
from edgeml.core.waiting import Lane


class What:
    """What calls are for."""

    def __init__(self, newest_first=False, took=()):
        self.newest_first = newest_first
        self.pace = Pace()
        for seconds in took:
            self.pace.add(seconds, 0.0)


class Asked(Call):
    """A call by a clock of its own."""

    def __init__(self, number, caller, now, timeout):
        super().__init__("policy", caller, now + timeout)
        self.arrived = now
        self.number = number

    def payload(self):
        raise AssertionError("what waits is not decoded")

    @property
    def expired(self):
        return False

    def _send(self, value):
        raise AssertionError("nothing is answered here")

    _send_error = _send


def client(name, group=None):
    return Caller(name, "", Peer(name, "nowhere", identity=group, host=group or "here"))


@dataclass
class Played:
    """What came of it."""

    useful: Counter = field(default_factory=Counter)
    late: int = 0
    held_back: int = 0
    reasons: Counter = field(default_factory=Counter)
    asked: int = 0
    told: list = field(default_factory=list)  # when each was refused, in parts of its time
    begun: list = field(default_factory=list)
    capacity: float = 0.0

    @property
    def share(self):
        return sum(self.useful.values()) / self.capacity

    @property
    def fairness(self):
        """The least that a client got, as a part of the average."""
        return min(self.useful.values(), default=0) * len(self.useful) / sum(self.useful.values())


def play(
    load,
    took,
    *,
    timeout=0.1,
    clients=8,
    jitter=0.0,
    newest_first=False,
    threads=1,
    seconds=20.0,
    groups=None,
    seed=0,
    weights=None,
    mean=None,
    reading=0.0,
    throttled=False,
):
    """Have clients call at a rate beyond what can be answered.

    Args:
        load: calls, as a multiple of what can be answered.
        took: seconds of a run, or a function that draws them.
        jitter: of the calls' times, as a part of the time between two of a client.
        groups: of each client.
        weights: how much each calls, as parts.
        reading: seconds that a call takes to be read, one after the other, beside the runs. Nobody
            tells the server how long it lay unread.
        throttled: whether clients hold back what is not worth sending.
    """
    rng = random.Random(seed)
    draw = took if callable(took) else lambda rng: took
    mean = mean or (sum(draw(rng) for _ in range(4000)) / 4000 if callable(took) else took)
    what = What(newest_first)
    lane = Lane(DEFAULT_LIMITS, threads)
    played = Played(capacity=seconds * threads / mean)
    rate = load * threads / mean
    weights = weights or [1 / clients] * clients
    callers = [client(f"c{n}", groups and groups[n]) for n in range(clients)]
    events = []
    order = itertools.count()
    for n in range(clients):
        played.useful[n] = 0
        step = 1 / (rate * weights[n])
        at = n / clients * step
        while at < seconds:
            moment = at + rng.uniform(-jitter, jitter) * step
            heapq.heappush(events, (max(0.0, moment), next(order), "call", n))
            at += step
    free = threads
    running = []  # when each began
    unread = deque()
    throttles = [Throttle() for _ in range(clients)]
    told = set()  # the numbers of calls of which their client knows what has become

    def refuse(call, now, why):
        if call.number not in told:
            told.add(call.number)
            throttles[call.of].note_refused(timeout, now, why)
            played.told.append((now - call.asked) / timeout)

    def drain(now):
        while lane.refused:
            call, why, reason = lane.refused.popleft()
            played.reasons[reason] += 1
            refuse(call, now, why)

    def read(now, call):
        call.arrived, call.deadline = now, now + timeout  # as the server has it
        assert lane.enter(call) is None
        queue = lane.waiting.append(call, what)
        if not free and lane.is_short(now):
            free_in = max(0.0, min(running) + what.pace.usual - now)
            lane.check(queue, now, free_in)
            drain(now)

    def begin(now):
        nonlocal free
        while free and lane.waiting:
            taken = lane.take(now)
            drain(now)
            if taken is None:
                continue
            call = taken[0]
            if what.pace.rules_out(call.deadline - now, now):
                played.reasons["barred"] += 1
                continue
            free -= 1
            running.append(now)
            played.begun.append(call)
            heapq.heappush(events, (now + draw(rng), next(order), "end", (call, now)))

    while events:
        now, _, kind, of = heapq.heappop(events)
        if kind == "call":
            played.asked += 1
            call = Asked(played.asked, callers[of], now, timeout)
            call.of, call.asked = of, now
            if throttled and throttles[of].refusal(timeout, now) is not None:
                played.held_back += 1
            elif not reading:
                read(now, call)
            else:
                heapq.heappush(events, (now + timeout, next(order), "over", call))
                unread.append(call)
                if len(unread) == 1:
                    heapq.heappush(events, (now + reading, next(order), "read", None))
        elif kind == "read":
            read(now, unread.popleft())
            if unread:
                heapq.heappush(events, (now + reading, next(order), "read", None))
        elif kind == "over":
            refuse(of, now, DeadlineExceeded("no answer"))
        else:
            call, since = of
            free += 1
            running.remove(since)
            what.pace.add(now - since, now)
            lane.ease()
            if now > call.deadline:
                played.late += 1
                lane.press()
            elif call.number not in told:
                told.add(call.number)
                throttles[call.of].note_answered(now)
                played.useful[call.of] += 1
        begin(now)
    return played


# Played through ------------------------------------------------------------------------------


def varying(mean):
    return lambda rng: rng.uniform(0.5 * mean, 1.5 * mean)


def quick_or_slow(mean):
    return lambda rng: mean * (0.2 if rng.random() < 0.5 else 1.8)


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("load", [1.1, 3.2, 20])
@pytest.mark.parametrize("kind", ["fixed", "varying"])
def test_whatever_is_asked_nearly_all_that_can_be_answered_is_answered_in_time_and_to_all_alike(
    kind, load, newest_first
):
    took = 0.02 if kind == "fixed" else varying(0.02)
    played = play(load, took, jitter=0.2, newest_first=newest_first, seconds=8)
    assert played.share > 0.93
    assert played.fairness > 0.85
    assert played.late <= 0.04 * len(played.begun)


@pytest.mark.parametrize("load", [2, 10])
def test_neither_runs_of_which_some_take_nine_times_as_long_as_others_nor_several_threads_hurt(
    load,
):
    took = quick_or_slow(0.02)
    for threads in (1, 4):
        played = play(load, took, jitter=0.2, seconds=10, threads=threads, clients=8 * threads)
        assert played.share > 0.9
        assert played.fairness > 0.7


@pytest.mark.parametrize("seconds", [0.002, 0.2])
def test_how_long_runs_take_makes_no_difference(seconds):
    for load in (1.1, 3.2, 10):
        played = play(
            load, seconds, timeout=max(0.1, 5 * seconds), jitter=0.2, seconds=300 * seconds
        )
        assert played.share > 0.95
        assert played.fairness > 0.9


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("load", [10, 30])
def test_what_a_server_cannot_even_read_in_time_is_not_sent(load, newest_first):
    """It can read, and refuse, seven for each that it answers."""
    settings = {"reading": 0.25e-3, "jitter": 0.2, "newest_first": newest_first, "seconds": 4}
    assert play(load, 0.002, **settings).share < 0.15  # soon all lie unread until they are over
    played = play(load, 0.002, throttled=True, **settings)
    assert played.share > 0.85  # what was sent before the first was refused has to be read, too
    assert played.fairness > 0.8
    assert played.asked - played.held_back < 4 * 4 / 0.002


def test_those_who_call_at_the_same_beat_all_the_time_get_equal_shares():
    played = play(3.2, 0.02, clients=8, seconds=20)
    assert played.fairness > 0.75  # each has a call waiting for part of its time only
    played = play(10, 0.02, clients=100, seconds=20)
    assert played.share > 0.95
    assert min(played.useful.values()) >= 7  # of 10


def test_who_asks_more_or_by_more_connections_gets_no_more_than_others():
    weights = [0.86] + [0.02] * 7  # those seven ask for a seventh of what there is, each
    played = play(5, 0.02, weights=weights, clients=8, seconds=20)
    assert played.share > 0.95
    modest = [played.useful[n] for n in range(1, 8)]
    assert min(modest) > 0.9 * 20 * 50 * 5 * 0.02
    groups = ["crowd"] * 9 + ["alone"]
    played = play(5, 0.02, groups=groups, clients=10, seconds=20)
    assert played.useful[9] > 0.45 * sum(played.useful.values())


def test_below_what_can_be_answered_nothing_is_refused():
    played = play(0.95, 0.02, jitter=0.2, seconds=20)
    assert played.share > 0.93
    assert not played.reasons
    assert not played.late


def test_most_of_those_that_are_refused_know_it_at_once():
    for newest_first in (False, True):
        told = sorted(play(10, 0.02, seconds=5, newest_first=newest_first).told)
        # Those that a newer one overtakes know it when that comes, 16 ms later.
        assert told[len(told) // 2] < (0.2 if newest_first else 0.05)
        assert told[len(told) * 9 // 10] < 0.3


def test_those_that_are_answered_of_one_connection_keep_their_order_unless_the_newest_is_wanted():
    played = play(3, varying(0.02), clients=3, jitter=0.2, seconds=10)
    for n in range(3):
        begun = [call.number for call in played.begun if call.of == n]
        assert begun == sorted(begun)
    ages = {}
    for newest_first in (False, True):
        # There is time for all, though not at once: so the order alone makes the difference.
        played = play(1.0, 0.02, clients=3, timeout=1.0, newest_first=newest_first, jitter=0.9)
        assert not played.reasons
        ages[newest_first] = [call.number for call in played.begun]
    assert ages[False] != ages[True]


def test_calls_without_a_deadline_wait_as_long_as_it_takes():
    played = play(3, 0.02, timeout=1e6, seconds=5)
    assert not played.reasons
    assert sum(played.useful.values()) == played.asked


# One by one ----------------------------------------------------------------------------------


def put(lane, what, name, now, timeout, *, free_in=0.0):
    call = Asked(next(NUMBERS), NOBODY if name is None else client(name), now, timeout)
    if name is not None:
        assert lane.enter(call) is None
    queue = lane.waiting.append(call, what)
    if lane.is_short(now):
        lane.check(queue, now, free_in)
    return call


NUMBERS = itertools.count(1)


def refusals(lane):
    told = {}
    while lane.refused:
        call, error, reason = lane.refused.popleft()
        told[call] = error, reason
    return told


def test_what_comes_before_a_call_decides_whether_it_is_refused_at_once():
    lane, what = Lane(DEFAULT_LIMITS), What(took=[0.02] * 10)
    kept = [put(lane, what, f"c{n}", 0.0, 0.1, free_in=0.01) for n in range(4)]
    assert not lane.refused
    late = put(lane, what, "c9", 0.0, 0.1, free_in=0.01)
    ((call, (error, reason)),) = refusals(lane).items()
    assert (call, reason, type(error)) == (late, TOO_BUSY, Overloaded)
    assert (
        "'policy' takes 20 ms of late, what comes before it 90 ms, and of the 100 ms that"
        in str(error)
    )
    assert [lane.take(0.01 + 0.02 * n)[0] for n in range(4)] == kept
    assert lane.length == lane.nbytes == 0


def test_a_call_that_had_too_little_time_from_the_start_is_told_another_thing_than_to_come_later():
    lane, what = Lane(DEFAULT_LIMITS), What(took=[0.02] * 10)
    short = put(lane, what, "c1", 0.0, 0.015)
    ((call, (error, reason)),) = refusals(lane).items()
    assert (call, reason, type(error)) == (short, TOO_SHORT, DeadlineExceeded)
    assert "the caller waits 15 ms: give it more time; it was not begun" in str(error)


def test_a_call_whose_time_is_over_is_counted_as_such():
    lane, what = Lane(DEFAULT_LIMITS), What()
    late = put(lane, what, "c1", 0.0, 0.1)
    assert lane.take(0.2) is None
    assert refusals(lane)[late][1] == TOO_LATE


def test_a_newer_call_takes_the_place_of_an_older_where_there_is_no_time_for_both():
    lane, what = Lane(DEFAULT_LIMITS), What(newest_first=True, took=[0.02] * 10)
    lane.press()
    older = put(lane, what, "c1", 0.0, 0.1)
    newer = put(lane, what, "c1", 0.05, 0.1)
    ((call, (error, reason)),) = refusals(lane).items()
    assert (call, reason, type(error)) == (older, OVERTAKEN, Overloaded)
    assert lane.take(0.06)[0] is newer
    assert lane.take(0.06) is None


def test_where_there_is_time_for_both_the_older_comes_after_the_newer():
    lane, what = Lane(DEFAULT_LIMITS), What(newest_first=True, took=[0.02] * 10)
    other = What(took=[0.02] * 10)
    older, other_call, newer = (put(lane, kind, "c1", 0.0, 1.0) for kind in (what, other, what))
    assert [lane.take(0.02 * n)[0] for n in range(3)] == [newer, older, other_call]


def test_what_no_client_asks_for_is_neither_refused_nor_counted():
    lane, what = Lane(DEFAULT_LIMITS), What(took=[0.02] * 10)
    lane.press()
    job = put(lane, what, None, 0.0, float("inf"), free_in=100.0)
    assert lane.take(50.0)[0] is job
    assert not lane.refused


@pytest.mark.parametrize("longest", [(0.06, 0.1), (1.0,)], ids=["some", "one"])
def test_of_many_runs_that_come_before_a_call_not_all_are_taken_to_be_as_the_longest(longest):
    lane, what = Lane(DEFAULT_LIMITS), What(took=[*[0.02] * 14, *longest])
    lane.press()
    for _ in range(360):
        put(lane, what, "c1", 0.0, 30.0)
    put(lane, what, "c1", 0.0, 20.0)  # 7.5 s at the most come before it
    assert not lane.refused
    hopeless = put(lane, what, "c1", 0.0, 7.0)
    assert list(refusals(lane)) == [hopeless]


# Paces ---------------------------------------------------------------------------------------


def test_a_pace_rules_nothing_out_of_which_it_knows_too_little():
    pace = Pace()
    for seconds in (30.0, 0.02, 0.02):  # the first compiled
        assert not pace.rules_out(0.001, 0.0)
        pace.add(seconds, 0.0)
    pace.add(0.02, 0.0)
    assert pace.rules_out(0.019, 0.0)
    assert not pace.rules_out(0.021, 0.0)
    assert pace.rules_out(-0.001, 1e6)


def test_one_run_that_takes_long_changes_little():
    pace = Pace()
    for _ in range(10):
        pace.add(0.02, 0.0)
    pace.add(30.0, 0.0)
    assert pace.usual == pytest.approx(0.02)
    assert not pace.rules_out(0.021, 0.0)
    call = Asked(1, client("c1"), 0.0, 20.0)
    assert pace.comfort(call) == pytest.approx(0.04)
    assert not pace.is_risky(call, 1.0, 10.0)


def test_the_more_runs_come_before_a_call_the_more_time_to_spare_it_needs_and_the_less_for_each():
    pace = Pace()
    for n in range(17):
        pace.add(0.01 if n % 2 else 0.03, 0.0)
    call = Asked(1, client("c1"), 0.0, 20.0)
    spare = []
    for runs in (1, 4, 100, 400):
        ahead = runs * pace.usual
        spare.append(next(n for n in itertools.count() if not pace.is_risky(call, n / 1e3, ahead)))
    assert spare == sorted(spare)
    assert spare[1] >= 4 * 9  # each of so few may take long
    assert 100 < spare[2] < 100 * 5
    assert spare[3] < 400 * 2


def test_a_pace_follows_runs_that_become_slower_and_quicker():
    pace = Pace()
    for _ in range(16):
        pace.add(0.02, 0.0)
    runs = 0
    while not pace.rules_out(0.1, 0.0):
        pace.add(0.2, 0.0)
        runs += 1
    assert runs <= 24
    pace.add(0.02, 0.0)
    assert not pace.rules_out(0.1, 0.0)  # at once


def test_where_all_are_refused_one_is_tried_again_after_a_while():
    pace = Pace()
    for _ in range(5):
        pace.add(0.2, 100.0)
    assert pace.rules_out(0.1, 103.9)
    assert not pace.rules_out(0.1, 104.1)
    slow = Pace()
    for _ in range(5):
        slow.add(100.0, 100.0)
    assert slow.rules_out(1.0, 159.0)
    assert not slow.rules_out(1.0, 161.0)
