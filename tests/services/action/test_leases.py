"""Who may act on a key: the rule, against a model that goes through time tick by tick."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edgeml import NotHolder, Overloaded
from edgeml.services.action.leases import Leases, Writer

POLICY, OTHER, HUMAN, ANYBODY = Writer("p", 1), Writer("o", 2), Writer("h", 3), Writer("a")


def leases(**more) -> Leases:
    return Leases("arm", **more)


def claim(desk, writer, now, priority=0, ttl=10) -> None:
    desk.claim(writer, writer.client_id, priority, ttl, now)


def act(desk, writer, now, took=0) -> bool:
    """Act, if that may be."""
    try:
        desk.begin(writer, now)
    except NotHolder:
        return False
    desk.end(writer, now + took)
    return True


def test_whoever_comes_first_has_it_and_equals_wait_in_the_order_in_which_they_came():
    desk = leases()
    claim(desk, POLICY, 0)
    claim(desk, OTHER, 1)
    claim(desk, HUMAN, 2)
    assert desk.holder == POLICY
    assert act(desk, POLICY, 3)
    assert not act(desk, OTHER, 3)
    desk.give_back(POLICY, 4)
    assert desk.holder == OTHER
    claim(desk, POLICY, 5)
    desk.give_back(OTHER, 6)
    assert desk.holder == HUMAN
    desk.give_back(HUMAN, 7)
    assert desk.holder == POLICY


def test_a_higher_priority_takes_it_and_the_loser_is_the_first_to_have_it_back():
    desk = leases()
    claim(desk, POLICY, 0)
    first = desk.grant_of(POLICY)
    claim(desk, OTHER, 1)
    claim(desk, HUMAN, 2, priority=1)
    assert desk.holder == HUMAN
    assert desk.grant_of(POLICY) == 0
    assert not act(desk, POLICY, 3)
    desk.give_back(HUMAN, 4)
    assert desk.holder == POLICY
    assert desk.grant_of(POLICY) > first
    assert (desk.counts["leases_granted"], desk.counts["leases_taken"]) == (3, 1)
    assert not desk.counts["leases_expired"]


def test_it_ends_with_the_silence_of_its_holder_and_actions_are_signs_too():
    desk = leases()
    claim(desk, POLICY, 0, ttl=10)
    claim(desk, OTHER, 1, ttl=100)
    assert act(desk, POLICY, 8)
    claim(desk, POLICY, 9)
    assert act(desk, POLICY, 18)
    assert desk.due <= 28
    desk.settle(27)
    assert desk.due == 28
    assert desk.holder == POLICY
    desk.settle(28)
    assert desk.holder == OTHER
    assert not act(desk, POLICY, 29)  # also where nobody else has it
    desk.give_back(OTHER, 30)
    assert not act(desk, POLICY, 31)
    claim(desk, POLICY, 32)
    assert act(desk, POLICY, 32)


def test_the_next_writer_waits_for_a_period_and_for_the_end_of_what_runs():
    desk = leases(period=20)
    claim(desk, POLICY, 0, ttl=1000)
    desk.begin(POLICY, 100)
    claim(desk, HUMAN, 101, priority=1, ttl=1000)
    assert desk.holder is None  # at once
    desk.settle(125)
    assert not act(desk, HUMAN, 125)
    desk.end(POLICY, 130)
    assert desk.holder == HUMAN  # it has been longer than a period
    assert act(desk, HUMAN, 131)
    desk.give_back(HUMAN, 132)
    assert desk.holder is None
    assert desk.due == 151
    desk.settle(150)
    assert desk.holder is None
    assert not act(desk, POLICY, 150)
    assert act(desk, POLICY, 151)


def test_who_holds_it_again_without_another_having_acted_need_not_wait():
    desk = leases(period=20)
    claim(desk, POLICY, 0)
    assert act(desk, POLICY, 1)
    claim(desk, HUMAN, 2, priority=1)
    desk.give_back(HUMAN, 3)
    assert desk.holder == POLICY


def test_without_a_lease_anybody_acts_but_for_a_period_after_one_and_while_one_is_asked_for():
    desk = leases(period=20)
    others = Writer("b")
    desk.begin(ANYBODY, 0)
    assert act(desk, others, 1)
    claim(desk, POLICY, 2)
    assert not act(desk, others, 3)  # or they could hold it up for ever
    desk.end(ANYBODY, 4)
    assert desk.holder is None
    claim(desk, POLICY, 11, ttl=100)
    desk.settle(12)
    assert desk.due == 21
    assert act(desk, POLICY, 21)
    assert not act(desk, ANYBODY, 22)
    desk.give_back(POLICY, 23)
    assert not act(desk, ANYBODY, 40)
    assert act(desk, ANYBODY, 41)
    assert act(desk, others, 41)


def test_a_refusal_says_who_is_in_the_way():
    desk = leases()
    claim(desk, POLICY, 0)
    claim(desk, HUMAN, 1, priority=7)
    with pytest.raises(NotHolder, match=r"h has the lease of 'arm', with priority 7"):
        desk.begin(POLICY, 2)
    with pytest.raises(NotHolder, match=r"client\.lease"):
        desk.begin(ANYBODY, 2)
    desk.give_back(HUMAN, 3)
    desk.begin(POLICY, 4)
    claim(desk, HUMAN, 5, priority=7)
    assert "still running" in desk.tell(HUMAN)
    desk.give_back(POLICY, 6)
    with pytest.raises(NotHolder, match="lost the lease"):
        leases().begin(POLICY, 2)


def test_grants_are_numbered_from_where_they_are_told_to_be():
    desk = leases(first=100)
    claim(desk, POLICY, 0)
    assert desk.grant_of(POLICY) == 100


def test_so_many_may_wait_and_a_higher_priority_always_may():
    desk = leases()
    for number in range(1, 65):
        claim(desk, Writer("c", number), number, ttl=1000)
    with pytest.raises(Overloaded, match="64"):
        claim(desk, OTHER, 65)
    claim(desk, Writer("c", 64), 66)  # who is there may stay
    claim(desk, HUMAN, 67, priority=1)
    assert desk.holder == HUMAN
    desk.give_back(Writer("c", 64), 68)
    with pytest.raises(Overloaded):
        claim(desk, OTHER, 69)


class LeasesAreKept(RuleBasedStateMachine):
    """Time is in whole ticks, and the model goes through each of them."""

    writers = st.integers(1, 4).map(lambda number: Writer("c", number))
    anybody = st.integers(0, 1).map(lambda number: Writer(f"d{number}"))

    @initialize(period=st.integers(0, 4))
    def begin(self, period):
        self.period = period
        self.rule = leases(period=period, first=1000)
        self.now = 0
        # Of the model: claims in the order of their coming, who has it, and each action.
        self.claims: list[dict] = []
        self.holder: Writer | None = None
        self.grants: list[Writer] = []
        self.actions: list[dict] = []

    # The model ----------------------------------------------------------------------------

    def first_claim(self):
        highest = max((each["priority"] for each in self.claims), default=None)
        return next((each for each in self.claims if each["priority"] == highest), None)

    def leaves_room(self, writer):
        """Whether each action of the others that matters is over, and a period old."""
        others = [
            each
            for each in self.actions
            if each["writer"] != writer and (each["writer"].token or writer.token)
        ]
        return all(
            each["ended"] is not None and self.now >= each["began"] + self.period for each in others
        )

    def step(self):
        self.claims = [each for each in self.claims if self.now < each["seen"] + each["ttl"]]
        first = self.first_claim()
        if self.holder is not None and (first is None or first["writer"] != self.holder):
            self.holder = None
        if self.holder is None and first is not None and self.leaves_room(first["writer"]):
            self.holder = first["writer"]
            self.grants.append(self.holder)

    def may_act(self, writer):
        if writer.token:
            return self.holder == writer
        return not self.claims and self.leaves_room(writer)

    # What happens -------------------------------------------------------------------------

    @rule(ticks=st.integers(1, 12), settled=st.booleans())
    def time_passes(self, ticks, settled):
        before = self.holder
        for _ in range(ticks):
            due = self.rule.due
            self.now += 1
            self.step()
            if self.holder != before:
                assert due <= self.now, "nobody would have looked"
            if settled:
                self.rule.settle(self.now)
            before = self.holder if settled else before
            if not settled and self.holder != before:
                break
        self.rule.settle(self.now)

    @rule(writer=writers, priority=st.integers(0, 2), ttl=st.integers(1, 15))
    def somebody_claims_it(self, writer, priority, ttl):
        self.rule.claim(writer, "a name", priority, ttl, self.now)
        for each in self.claims:
            if each["writer"] == writer:
                each.update(ttl=ttl, seen=self.now)
                break
        else:
            self.claims.append(
                {"writer": writer, "priority": priority, "ttl": ttl, "seen": self.now}
            )
        self.step()

    @rule(writer=writers)
    def somebody_gives_it_back(self, writer):
        self.rule.give_back(writer, self.now)
        self.claims = [each for each in self.claims if each["writer"] != writer]
        self.step()

    @rule(writer=st.one_of(writers, anybody))
    def somebody_acts(self, writer):
        if self.may_act(writer):
            self.rule.begin(writer, self.now)
            self.actions.append({"writer": writer, "began": self.now, "ended": None})
            for each in self.claims:
                if each["writer"] == writer:
                    each["seen"] = self.now
        else:
            with pytest.raises(NotHolder):
                self.rule.begin(writer, self.now)

    @precondition(lambda self: any(each["ended"] is None for each in self.actions))
    @rule(data=st.data())
    def an_action_ends(self, data):
        each = data.draw(st.sampled_from([e for e in self.actions if e["ended"] is None]))
        each["ended"] = self.now
        self.rule.end(each["writer"], self.now)
        self.step()

    # What holds ---------------------------------------------------------------------------

    @invariant()
    def the_rule_says_what_the_model_does(self):
        assert self.rule.holder == self.holder
        assert self.rule.grant == 999 + len(self.grants)
        if self.holder is not None:
            assert self.rule.grant_of(self.holder) == self.rule.grant
        assert self.rule.due > self.now or self.rule.due == math.inf

    @invariant()
    def there_is_one_writer(self):
        for index, one in enumerate(self.actions):
            for other in self.actions[index + 1 :]:
                if one["writer"] == other["writer"]:
                    continue
                if not (one["writer"].token or other["writer"].token):
                    continue
                assert one["ended"] is not None
                assert one["ended"] <= other["began"]
                assert other["began"] >= one["began"] + self.period


LeasesAreKept.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLeasesAreKept = LeasesAreKept.TestCase
