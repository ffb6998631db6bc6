"""The once-only rule, against a model that keeps every number instead of the newest."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edgeml import PermissionDenied
from edgeml.services.trainer.ledger import Ledger, Verdict


def offer(
    ledger, first, count, *, after=None, acknowledged=0, incarnation=1, client="arm", identity=None
):
    """Offer items to a ledger and, as a server does, note them as inserted."""
    after = first - 1 if after is None else after
    verdict = ledger.accept(
        client,
        incarnation,
        "demos",
        identity=identity,
        acknowledged=acknowledged,
        after=after,
        first=first,
        count=count,
    )
    ledger.advance(client, "demos", verdict.mark)
    return verdict


def test_what_is_new_of_an_upload_and_how_far_it_brings():
    ledger = Ledger()
    assert offer(ledger, 1, 10) == Verdict(mark=10)
    assert offer(ledger, 1, 10) == Verdict(mark=10, repeated=10)
    assert offer(ledger, 6, 10, after=5) == Verdict(mark=15, repeated=5)
    assert offer(ledger, 20, 2, after=15) == Verdict(mark=21, lost=4)
    assert offer(ledger, 30, 2) == Verdict(mark=21, gap=True)
    assert offer(ledger, 22, 0) == Verdict(mark=21)
    assert offer(ledger, 23, 1, after=19) == Verdict(mark=23, lost=1)  # 20 and 21 are there


def test_a_client_that_is_not_known_goes_on_from_what_it_was_told():
    assert offer(Ledger(), 101, 10, acknowledged=100) == Verdict(mark=110)
    assert offer(Ledger(), 111, 10, acknowledged=100) == Verdict(mark=100, gap=True)
    # But what was restored has nothing of it.
    assert offer(Ledger.restore([]), 101, 10, acknowledged=100) == Verdict(mark=0, gap=True)


def test_an_incarnation_that_was_replaced_stays_out_also_after_a_restart():
    ledger = Ledger()
    offer(ledger, 1, 3, incarnation=5)
    offer(ledger, 1, 2, incarnation=4)
    for same in (ledger, Ledger.restore(ledger.state())):
        with pytest.raises(PermissionDenied, match="'arm'"):
            offer(same, 4, 1, incarnation=5)
        assert offer(same, 3, 1, incarnation=4).mark == 3
        assert offer(same, 3, 1, incarnation=5, client="other").gap


def test_what_is_refused_counts_as_there_and_is_told_until_it_is_acknowledged():
    ledger = Ledger()
    verdict = ledger.accept("arm", 1, "demos", acknowledged=0, after=0, first=1, count=9)
    ledger.advance("arm", "demos", 2)
    for number in (3, 4):
        ledger.refuse("arm", "demos", number, "no")
    ledger.refuse("arm", "demos", 5, "another reason")
    ledger.advance("arm", "demos", 8)
    ledger.refuse("arm", "demos", 9, "another reason")
    told = [(3, 2, "no"), (5, 1, "another reason"), (9, 1, "another reason")]
    assert ledger.refused("arm", "demos") == told
    assert offer(ledger, 1, 9) == Verdict(mark=9, repeated=9)
    assert offer(ledger, 10, 1, acknowledged=verdict.mark - 1) == Verdict(mark=10)
    assert ledger.refused("arm", "demos") == told[2:]
    assert offer(ledger, 11, 1, acknowledged=10).mark == 11
    assert ledger.refused("arm", "demos") == []


def test_a_new_incarnation_is_told_nothing_of_the_one_before():
    ledger = Ledger()
    ledger.accept("arm", 1, "demos", acknowledged=0, after=0, first=1, count=1)
    ledger.refuse("arm", "demos", 1, "no")
    offer(ledger, 1, 1, incarnation=2)
    assert ledger.refused("arm", "demos") == []


def test_accepting_alone_changes_nothing_that_counts():
    """An insert that fails is tried again."""
    ledger = Ledger()
    offer(ledger, 1, 5)
    for _ in range(2):
        verdict = ledger.accept("arm", 1, "demos", acknowledged=5, after=5, first=6, count=5)
        assert verdict == Verdict(mark=10)
    assert ledger.state() == [["arm", "demos", 1, 5, []]]


@pytest.mark.parametrize("state", [None, 3, [1], [["arm", "demos", 1, 5]], [[1, 2, 3, 4, 5]], {}])
def test_what_is_no_state_is_refused(state):
    if state == {}:
        assert Ledger.restore(state).state() == []
        return
    with pytest.raises((TypeError, ValueError)):
        Ledger.restore(state)


@pytest.mark.parametrize(
    "mark",
    [
        ["arm", "demos", "1", 5, []],
        ["arm", "demos", 1, 5.0, []],
        ["arm", "demos", 1, -1, []],
        ["arm", "demos", True, 5, []],
        ["arm", "demos", 1, 1 << 64, []],
        ["arm", "demos", 1, 5, ["1"]],
        ["arm", "demos", 1, 5, "12"],
        ["arm", "demos", 1, 5, list(range(300))],
        ["arm", b"demos", 1, 5, []],
        [["arm"], "demos", 1, 5, []],
        ["arm", "demos", 1, 5, [], None],
        ["arm", "demos", 1, 5, [], "key", "key"],
    ],
    ids=str,
)
def test_what_is_no_mark_is_refused_before_it_is_used(mark):
    assert Ledger.restore([["arm", "demos", 1, 5, []]])
    with pytest.raises((TypeError, ValueError)):
        Ledger.restore([mark])


@pytest.mark.parametrize(
    "second",
    [
        ["arm", "demos", 1, 6, [], "key"],
        ["arm", "online", 1, 6, []],
        ["arm", "online", 1, 6, [], "other"],
    ],
    ids=str,
)
def test_marks_that_contradict_each_other_are_refused(second):
    first = ["arm", "demos", 1, 5, [], "key"]
    assert Ledger.restore([first, ["arm", "online", 1, 6, [], "key"]])
    with pytest.raises(ValueError, match=r"contradicts|belongs"):
        Ledger.restore([first, second])


# Whose a client's id is -------------------------------------------------------------------------


def test_an_id_belongs_to_the_key_that_used_it_first_also_after_a_restart():
    ledger = Ledger()
    assert offer(ledger, 1, 5, identity="boss").mark == 5
    for same in (ledger, Ledger.restore(ledger.state())):
        for incarnation in (1, 2):
            with pytest.raises(PermissionDenied, match="'other'"):
                offer(same, 6, 5, identity="other", incarnation=incarnation)
        assert offer(same, 6, 1, identity="boss").mark == 6  # it was not shut out
        assert offer(same, 1, 1, identity="other", client="leg").mark == 1
        assert dict(same.owners()) == {"arm": "boss", "leg": "other"}


def test_an_id_from_when_no_keys_were_asked_for_is_the_first_ones_who_shows_one():
    ledger = Ledger()
    offer(ledger, 1, 5)
    assert dict(ledger.owners()) == {}
    assert offer(ledger, 6, 1, identity="boss").mark == 6
    with pytest.raises(PermissionDenied):
        offer(ledger, 7, 1, identity="other")
    assert offer(ledger, 7, 1).mark == 7  # keys are asked for no more


def test_one_key_makes_nobody_elses_marks_be_forgotten():
    ledger = Ledger()
    offer(ledger, 1, 5, identity="boss")
    offer(ledger, 1, 5, client="nobody's")
    for k in range(20_000):
        offer(ledger, 1, 1, client=str(k), identity="other")
        if k == 10_000:
            offer(ledger, 2, 1, client="0", identity="other")
    assert offer(ledger, 6, 1, identity="boss").mark == 6
    assert offer(ledger, 6, 1, client="nobody's").mark == 6
    kept = [client for client, owner in ledger.owners() if owner == "other"]
    assert len(kept) <= 1 << 14
    assert {"0", "19999"} <= set(kept)
    assert "1" not in kept
    assert offer(ledger, 51, 1, client="1", identity="other", acknowledged=50).mark == 51


def test_what_is_remembered_of_refusals_is_bounded():
    ledger = Ledger()
    for client in range(30):
        name = str(client)
        ledger.accept(name, 1, "demos", acknowledged=0, after=0, first=1, count=5000)
        for number in range(1, 5001):
            ledger.refuse(name, "demos", number, f"reason {number}")
        assert len(ledger.refused(name, "demos")) <= 4096
    held = [ledger.refused(str(client), "demos") for client in range(30)]
    assert sum(map(len, held)) <= 1 << 16
    assert held[0][-1] == (5000, 1, "reason 5000")
    for client in range(30):  # and what is told makes room
        offer(ledger, 5001, 0, acknowledged=5000, client=str(client))
        assert ledger.refused(str(client), "demos") == []
    ledger.refuse("29", "demos", 5001, "again")
    assert ledger.refused("29", "demos") == [(5001, 1, "again")]


class Deliveries(RuleBasedStateMachine):
    """Actors send as `docs/wire.md` says; a network repeats, holds back and drops what they send.

    The model is the obvious one: for each actor's store all the numbers that are there. An upload
    is taken where all before it are there (or said to be lost), and of it what isn't there.
    """

    @initialize()
    def begin(self) -> None:
        self.ledger = Ledger()
        self.saved = Ledger().state(), {}, {}  # a checkpoint: marks, and the stores' contents
        self.there = defaultdict(list)  # (client, incarnation) -> numbers, as they came
        self.skipped = defaultdict(set)  # ... that it has said to be lost
        self.incarnation = dict.fromkeys("ab", 1)
        self.told = defaultdict(int)  # the newest mark that an actor was told
        self.made = defaultdict(int)  # how many items it has made
        self.sent = []  # everything that was ever sent, to come at any time and again
        self.epoch = 0

    clients = st.sampled_from("ab")

    @rule(client=clients, n=st.integers(1, 5))
    def make(self, client, n) -> None:
        self.made[client, self.incarnation[client]] += n

    @rule(client=clients, start=st.integers(0, 6), n=st.integers(0, 6), gone=st.integers(0, 3))
    def send(self, client, start, n, gone) -> None:
        """Send some items from a bit after the mark on, those just before maybe overwritten."""
        me = client, self.incarnation[client]
        after = min(self.told[me] + start, self.made[me])
        first = min(after + 1 + gone, self.made[me] + 1)
        count = min(n, self.made[me] + 1 - first)
        self.sent.append((*me, self.told[me], after, first, count, self.epoch))

    @rule(data=st.data())
    def arrive(self, data) -> None:
        if not self.sent:
            return
        upload = data.draw(st.sampled_from(self.sent))
        client, incarnation, told, after, first, count, epoch = upload
        me = client, incarnation
        if epoch != self.epoch:
            return  # of a connection to the server before
        there = set(self.there[me]) | self.skipped[me]
        try:
            verdict = self.ledger.accept(
                client,
                incarnation,
                "s",
                acknowledged=told,
                after=after,
                first=first,
                count=count,
            )
        except PermissionDenied:
            assert incarnation < self.incarnation[client]
            return
        numbers = range(first, first + count)
        if verdict.gap:
            assert not set(range(1, after + 1)) <= there
        else:
            assert set(range(1, after + 1)) <= there
            new = [n for n in numbers if n not in there]
            assert list(numbers[verdict.repeated :]) == new
            if new:
                lost = set(range(after + 1, first)) - there
                assert verdict.lost == len(lost)
                self.skipped[me] |= lost
                self.there[me] += new
                self.ledger.advance(client, "s", verdict.mark)
        assert verdict.mark == max(self.there[me], default=0)
        self.told[me] = max(self.told[me], verdict.mark)

    @rule(client=clients)
    def replace(self, client) -> None:
        """A newer client with the same id; what the old one has sent may come until it is seen."""
        self.incarnation[client] += 1
        self.sent = [upload for upload in self.sent if upload[0] != client]

    @rule()
    def save(self) -> None:
        there = {me: list(numbers) for me, numbers in self.there.items()}
        skipped = {me: set(numbers) for me, numbers in self.skipped.items()}
        self.saved = self.ledger.state(), there, skipped

    @rule()
    def restart(self) -> None:
        """The server comes back from its checkpoint, and tells each actor how far it is."""
        state, there, skipped = self.saved
        self.ledger = Ledger.restore(state)
        self.epoch += 1
        self.there = defaultdict(list, {me: list(n) for me, n in there.items()})
        self.skipped = defaultdict(set, {me: set(n) for me, n in skipped.items()})
        for me in list(self.told):
            self.told[me] = max(self.there[me], default=0)

    @invariant()
    def each_once_and_in_order(self) -> None:
        if not hasattr(self, "there"):
            return
        for me, numbers in self.there.items():
            assert numbers == sorted(set(numbers))
            assert set(range(1, max(numbers, default=0) + 1)) == set(numbers) | self.skipped[me]


TestDeliveries = Deliveries.TestCase
TestDeliveries.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
