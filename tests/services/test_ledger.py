"""The once-only rule, against a model that keeps every number instead of the newest."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edgeml import PermissionDenied
from edgeml.data.numbering import Numbering
from edgeml.services.trainer.ledger import Ledger, Upload, Verdict

ARM = Numbering(1)


def made(
    first,
    count,
    *,
    after=None,
    acknowledged=0,
    incarnation=1,
    client="arm",
    identity=None,
    numbering=ARM,
    epoch=None,
    store="demos",
):
    after = first - 1 if after is None else after
    return Upload(
        store, client, incarnation, identity, numbering, epoch, acknowledged, after, first, count
    )


def offer(ledger, first, count, **more):
    """Offer items to a ledger and, as a server does, note them as inserted."""
    upload = made(first, count, **more)
    verdict = ledger.accept(upload)
    ledger.advance(upload, verdict.mark)
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


def test_items_that_are_not_known_come_again_but_where_this_ledger_had_them():
    for ledger in (Ledger(), Ledger.restore({"clients": [], "marks": []})):
        assert offer(ledger, 101, 10, acknowledged=100) == Verdict(mark=0, gap=True)
        told = {"acknowledged": 100, "epoch": ledger.epoch}
        numbering = Numbering()  # of which the mark was forgotten, as it was long not used
        assert offer(ledger, 111, 10, numbering=numbering, **told) == Verdict(mark=100, gap=True)
        assert offer(ledger, 101, 10, numbering=numbering, **told) == Verdict(mark=110)
        other = {"acknowledged": 100, "epoch": ledger.epoch ^ 1}
        assert offer(ledger, 101, 1, numbering=Numbering(), **other) == Verdict(mark=0, gap=True)


def test_a_store_goes_on_with_another_client():
    ledger = Ledger()
    offer(ledger, 1, 10)
    assert offer(ledger, 1, 15, client="leg", incarnation=7) == Verdict(mark=15, repeated=10)
    assert offer(ledger, 1, 15) == Verdict(mark=15, repeated=15)
    assert offer(ledger, 1, 15, incarnation=2) == Verdict(mark=15, repeated=15)
    assert offer(ledger, 1, 2, store="online") == Verdict(mark=2)


def test_a_branch_goes_on_from_what_it_shares():
    ledger = Ledger()
    offer(ledger, 1, 150)
    loaded, other = ARM.branch(100), ARM.branch(100)
    assert offer(ledger, 1, 0, numbering=loaded).mark == 100
    assert offer(ledger, 101, 60, numbering=loaded) == Verdict(mark=160)
    assert offer(ledger, 91, 20, numbering=other, after=0) == Verdict(mark=110, repeated=10)
    assert offer(ledger, 151, 1) == Verdict(mark=151)  # the first goes on


def test_what_branches_share_comes_once():
    ledger = Ledger()
    offer(ledger, 1, 80)
    one, two = ARM.branch(100), ARM.branch(100)
    assert offer(ledger, 1, 0, numbering=one).mark == offer(ledger, 1, 0, numbering=two).mark == 80
    assert offer(ledger, 81, 40, numbering=one) == Verdict(mark=120)
    assert offer(ledger, 81, 30, numbering=two) == Verdict(mark=110, repeated=20)
    assert offer(ledger, 81, 30, numbering=two.branch(200)) == Verdict(mark=110, repeated=30)
    assert offer(ledger, 1, 0).mark == 100


def test_nobody_says_of_another_keys_items_that_they_are_here():
    ledger = Ledger()
    offer(ledger, 1, 10, identity="boss")
    theirs = {"identity": "other", "client": "leg", "numbering": ARM.branch(100)}
    assert offer(ledger, 1, 0, **theirs).mark == 10  # but it is known, and not sent again
    assert offer(ledger, 11, 90, **theirs).mark == 100
    assert offer(ledger, 11, 5, identity="boss") == Verdict(mark=15)


def test_what_is_durable_is_what_was_saved():
    ledger = Ledger()
    upload = made(1, 10)
    ledger.accept(upload)
    ledger.advance(upload, 4)
    assert ledger.durable(upload) is None
    state = ledger.state()
    ledger.advance(upload, 10)
    assert ledger.durable(upload) is None  # the file isn't there yet
    ledger.saved(state)
    assert ledger.durable(upload) == 4
    loaded = Ledger.restore(state)
    assert loaded.epoch != ledger.epoch
    assert loaded.accept(upload) == Verdict(mark=10, repeated=4)
    assert loaded.durable(upload) == 4
    branch = made(1, 10, numbering=ARM.branch(3))
    assert loaded.accept(branch).repeated == loaded.durable(branch) == 3


def test_marks_of_stores_that_are_not_there_are_let_go():
    ledger = Ledger()
    offer(ledger, 1, 5)
    offer(ledger, 1, 6, store="online")
    ledger = Ledger.restore(ledger.state())
    ledger.keep({"demos"})
    assert offer(ledger, 1, 5).repeated == 5
    assert offer(ledger, 1, 6, store="online").repeated == 0


def test_an_incarnation_that_was_replaced_stays_out_also_after_a_restart():
    ledger = Ledger()
    offer(ledger, 1, 3, incarnation=5)
    offer(ledger, 1, 2, incarnation=4)
    for same in (ledger, Ledger.restore(ledger.state())):
        with pytest.raises(PermissionDenied, match="'arm'"):
            offer(same, 4, 1, incarnation=5)
        assert offer(same, 3, 1, incarnation=4).mark == 3
        assert offer(same, 3, 1, incarnation=5, client="other").repeated == 1


def test_what_is_refused_counts_as_there_and_is_told_until_it_is_acknowledged():
    ledger = Ledger()
    upload = made(1, 9)
    verdict = ledger.accept(upload)
    ledger.advance(upload, 2)
    for number in (3, 4):
        ledger.refuse(upload, number, "no")
    ledger.refuse(upload, 5, "another reason")
    ledger.advance(upload, 8)
    ledger.refuse(upload, 9, "another reason")
    told = [(3, 2, "no"), (5, 1, "another reason"), (9, 1, "another reason")]
    assert ledger.refused(upload) == told
    assert offer(ledger, 1, 9) == Verdict(mark=9, repeated=9)
    assert offer(ledger, 10, 1, acknowledged=verdict.mark - 1) == Verdict(mark=10)
    assert ledger.refused(upload) == told[2:]
    assert offer(ledger, 11, 1, acknowledged=10).mark == 11
    assert ledger.refused(upload) == []


def test_accepting_alone_changes_nothing_that_counts():
    """An insert that fails is tried again."""
    ledger = Ledger()
    offer(ledger, 1, 5)
    for _ in range(2):
        assert ledger.accept(made(6, 5, acknowledged=5)) == Verdict(mark=10)
    marks = {"clients": [["arm", None, "demos", [1]]], "marks": [["demos", 1, 5, None, []]]}
    assert ledger.state() == marks


STATE = {
    "clients": [["arm", "key", "demos", [3, 1]], ["arm", "key", "online", [1]]],
    "marks": [["demos", 9, 5, "key", []], ["online", 9, 6, "key", [[2, 3, "no"]]]],
}


@pytest.mark.parametrize("state", [None, 3, [1], [["arm", "demos", 1, 5]], {}, {"clients": []}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises((LookupError, TypeError, ValueError)):
        Ledger.restore(state)


@pytest.mark.parametrize(
    "client",
    [
        ["arm", None, "demos", ["1"]],
        ["arm", None, "demos", [-1]],
        ["arm", None, "demos", [True]],
        ["arm", None, "demos", [1 << 64]],
        ["arm", None, "demos", "12"],
        ["arm", None, "demos", list(range(300))],
        ["arm", None, b"demos", [1]],
        [["arm"], None, "demos", [1]],
        ["arm", 5, "demos", [1]],
        ["arm", None, "demos"],
        ["arm", "key", "demos", [1]],  # twice
        ["arm", "other", "third", [1]],
    ],
    ids=str,
)
def test_what_is_no_client_is_refused_before_it_is_used(client):
    assert Ledger.restore(STATE).state() == STATE
    with pytest.raises((LookupError, PermissionDenied, TypeError, ValueError)):
        Ledger.restore({**STATE, "clients": [*STATE["clients"], client]})


@pytest.mark.parametrize(
    "mark",
    [
        ["demos", "1", 5, None, []],
        ["demos", 1, 5.0, None, []],
        ["demos", 1, -1, None, []],
        ["demos", True, 5, None, []],
        ["demos", 1, 1 << 64, None, []],
        [b"demos", 1, 5, None, []],
        [["demos"], 1, 5, None, []],
        ["demos", 1, 5, 7, []],
        ["demos", 1, 5, None],
        ["demos", 1, 5, None, 3],
        ["demos", 1, 5, None, [[5, 2, "no"]]],
        ["demos", 1, 5, None, [[0, 2, "no"]]],
        ["demos", 1, 5, None, [[1, 2, 3]]],
        ["demos", 1, 5, None, [[1, 2]]],
        ["demos", 9, 5, "key", []],  # twice
        ["demos", 9, 5, "other", []],
    ],
    ids=str,
)
def test_what_is_no_mark_is_refused_before_it_is_used(mark):
    with pytest.raises((LookupError, TypeError, ValueError)):
        Ledger.restore({**STATE, "marks": [*STATE["marks"], mark]})


def test_marks_that_were_saved_by_incarnations_are_read():
    ledger = Ledger.restore([["arm", "demos", 9, 5, [4]], ["leg", "demos", 8, 7, [], "key"]])
    with pytest.raises(PermissionDenied):
        offer(ledger, 6, 1, incarnation=4)
    assert offer(ledger, 1, 5, numbering=Numbering(9), incarnation=9).repeated == 5
    assert dict(ledger.owners()) == {"leg": "key"}


# Whose a client's id is -------------------------------------------------------------------------


def test_an_id_belongs_to_the_key_that_used_it_first_also_after_a_restart():
    ledger = Ledger()
    assert offer(ledger, 1, 5, identity="boss").mark == 5
    for same in (ledger, Ledger.restore(ledger.state())):
        for incarnation in (1, 2):
            with pytest.raises(PermissionDenied, match="'other'"):
                offer(same, 6, 5, identity="other", incarnation=incarnation)
        assert offer(same, 6, 1, identity="boss").mark == 6  # it was not shut out
        leg = {"client": "leg", "identity": "other"}
        with pytest.raises(PermissionDenied, match="another key"):
            offer(same, 1, 1, **leg)
        assert offer(same, 1, 1, numbering=Numbering(), **leg).mark == 1
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
    offer(ledger, 1, 5, client="nobody's", numbering=Numbering(2))
    other = {"identity": "other", "epoch": ledger.epoch}
    for k in range(40_000):
        offer(ledger, 1, 1, client=str(k), numbering=Numbering(10 + k), **other)
        if k in (10_000, 30_000):
            offer(ledger, 2, 1, client="0", numbering=Numbering(10), **other)
    assert offer(ledger, 6, 1, identity="boss").mark == 6
    assert offer(ledger, 6, 1, client="nobody's", numbering=Numbering(2)).mark == 6
    kept = [client for client, owner in ledger.owners() if owner == "other"]
    assert len(kept) <= 1 << 14
    assert {"0", "39999"} <= set(kept)
    assert "1" not in kept
    assert len(ledger.state()["marks"]) == (1 << 15) + 2
    one = {"client": "1", "numbering": Numbering(11), **other}
    assert offer(ledger, 51, 1, acknowledged=50, **one).mark == 51


def test_what_is_remembered_of_refusals_is_bounded():
    ledger = Ledger()
    uploads = [made(1, 5000, client=str(k), numbering=Numbering(k)) for k in range(30)]
    for upload in uploads:
        ledger.accept(upload)
        for number in range(1, 5001):
            ledger.refuse(upload, number, f"reason {number}")
        assert len(ledger.refused(upload)) <= 4096
    held = [ledger.refused(upload) for upload in uploads]
    assert sum(map(len, held)) <= 1 << 16
    assert held[0][-1] == (5000, 1, "reason 5000")
    for k, upload in enumerate(uploads):  # and what is told makes room
        offer(ledger, 5001, 0, acknowledged=5000, client=str(k), numbering=Numbering(k))
        assert ledger.refused(upload) == []
    ledger.refuse(uploads[29], 5001, "again")
    assert ledger.refused(uploads[29]) == [(5001, 1, "again")]


class Store:
    """An actor's: its numbering, and of each item where it was first inserted."""

    def __init__(self, numbering, items, client):
        self.numbering = numbering
        self.items = items  # (numbering's id, id), by which an item is the same in all branches
        self.client = client
        self.told = 0, None  # the newest mark that it was told, and the epoch of that


class Deliveries(RuleBasedStateMachine):
    """Actors send as `docs/wire.md` says; a network repeats, holds back and drops what they send.

    The model is the obvious one: all items that are there, and all that are said to be lost. An
    upload is taken where all before it are there (or lost), and of it what isn't there.
    """

    @initialize()
    def begin(self) -> None:
        self.ledger = Ledger()
        self.saved = None  # a checkpoint: marks, and the contents
        self.there = []  # items, as they came
        self.skipped = set()
        self.incarnation = dict.fromkeys("ab", 1)
        self.stores = [Store(Numbering(), [], client) for client in "ab"]
        self.sent = []  # everything that was ever sent, to come at any time and again

    clients = st.sampled_from("ab")

    @rule(data=st.data(), n=st.integers(1, 5))
    def make(self, data, n) -> None:
        store = data.draw(st.sampled_from(self.stores))
        known = store.numbering.id
        store.items += [(known, len(store.items) + k) for k in range(1, n + 1)]

    @rule(data=st.data(), client=clients, back=st.integers(0, 4))
    def load(self, data, client, back) -> None:
        """A store is saved, and loaded by whoever, maybe from a while ago."""
        store = data.draw(st.sampled_from(self.stores))
        at = max(0, len(store.items) - back)
        self.stores.append(Store(store.numbering.branch(at), store.items[:at], client))

    @rule(
        data=st.data(),
        start=st.integers(0, 6),
        n=st.integers(0, 6),
        gone=st.sampled_from([0, 0, 2]),
    )
    def send(self, data, start, n, gone) -> None:
        """Send some items from a bit after the mark on, those just before maybe overwritten."""
        store = data.draw(st.sampled_from(self.stores))
        told, epoch = store.told
        after = min(told + start, len(store.items))
        first = min(after + 1 + gone, len(store.items) + 1)
        count = min(n, len(store.items) + 1 - first)
        upload = made(
            first,
            count,
            after=after,
            acknowledged=told,
            client=store.client,
            incarnation=self.incarnation[store.client],
            numbering=store.numbering,
            epoch=epoch,
        )
        self.sent.append((store, list(store.items), upload))

    @rule(data=st.data())
    def arrive(self, data) -> None:
        if not self.sent:
            return
        store, items, upload = data.draw(st.sampled_from(self.sent))
        there = set(self.there) | self.skipped
        try:
            verdict = self.ledger.accept(upload)
        except PermissionDenied:
            assert upload.incarnation < self.incarnation[upload.client]
            return
        sent = items[upload.first - 1 : upload.first - 1 + upload.count]
        before = set(items[: upload.after])
        if verdict.gap:
            assert not before <= there
        else:
            assert before <= there
            new = [item for item in sent if item not in there]
            assert sent[verdict.repeated :] == new
            if new:
                lost = set(items[upload.after : upload.first - 1]) - there
                assert verdict.lost == len(lost)
                self.skipped |= lost
                self.there += new
                self.ledger.advance(upload, verdict.mark)
        there = set(self.there) | self.skipped
        assert set(items[: verdict.mark]) <= there
        assert verdict.mark >= len(items) or items[verdict.mark] not in there
        if store.told[1] != self.ledger.epoch or store.told[0] < verdict.mark:
            store.told = verdict.mark, self.ledger.epoch

    @rule(client=clients)
    def replace(self, client) -> None:
        """A newer client with the same id; what the old one has sent may come until it is seen."""
        self.incarnation[client] += 1
        self.sent = [each for each in self.sent if each[2].client != client]

    @rule()
    def save(self) -> None:
        self.saved = self.ledger.state(), list(self.there), set(self.skipped)
        self.ledger.saved(self.saved[0])

    @rule(saves=st.booleans())
    def restart(self, saves) -> None:
        """The server comes back from its checkpoint, or anew."""
        if self.saved is None or not saves:
            self.ledger, self.there, self.skipped, self.saved = Ledger(), [], set(), None
            return
        state, there, skipped = self.saved
        self.ledger = Ledger.restore(state)
        self.there, self.skipped = list(there), set(skipped)

    @invariant()
    def each_once_and_in_order(self) -> None:
        if not hasattr(self, "there"):
            return
        assert len(set(self.there)) == len(self.there)
        for store in self.stores:
            mine = [item for item in self.there if item[0] == store.numbering.id]
            assert mine == sorted(mine)


TestDeliveries = Deliveries.TestCase
TestDeliveries.settings = settings(max_examples=150, stateful_step_count=60)
