"""The dispatcher alone: calls by value from tests, and sources that note what it does with them."""

from __future__ import annotations

import logging
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import pytest

from edgeml.core.alarms import Alarms
from edgeml.core.carrier import Carrier
from edgeml.core.dispatch import (
    Call,
    Caller,
    Dispatcher,
    LocalCall,
    answer_with,
    require_plain,
)
from edgeml.core.errors import (
    Closed,
    DeadlineExceeded,
    EdgemlError,
    Malformed,
    NotEncodable,
    Overloaded,
    PermissionDenied,
    RemoteError,
    UnknownInterface,
)
from edgeml.core.limits import Limits
from edgeml.core.security import Role
from edgeml.core.transport import Endpoint, Peer
from edgeml.core.url import Url
from pairs import no_thread_left, took, wait_until

PATIENCE = 20.0


@contextmanager
def dispatching(started=True, **settings):
    """A dispatcher that echoes; runs in a thread of its own unless told otherwise."""
    alarms = Alarms("edgeml test alarms")
    dispatcher = Dispatcher("test", alarms, **settings)
    dispatcher.register("echo", answer_with(lambda payload, caller: payload))
    try:
        if started:
            dispatcher.start()
        yield dispatcher
    finally:
        dispatcher.close()
        alarms.close()


@pytest.fixture
def dispatcher():
    with dispatching() as made:
        yield made


def ask(dispatcher, name, payload=None, timeout=PATIENCE, caller=None) -> LocalCall:
    call = LocalCall(name, payload, timeout, caller)
    dispatcher.submit(call)
    return call


def answer_of(dispatcher, name, payload=None):
    return ask(dispatcher, name, payload).future.result(PATIENCE)


def caller_named(name: str) -> Caller:
    return Caller(name, "", Peer(name, "nowhere"))


class Gate:
    """A handler that says when it is entered, and returns when it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.threads: list[threading.Thread] = []

    def __call__(self, call: Call) -> None:
        self.threads.append(threading.current_thread())
        self.entered.set()
        assert self.go_on.wait(60)
        call.answer(call.payload())


@contextmanager
def held_up(dispatcher, *names):
    """Have the thread of each handler busy; as the block ends they go on."""
    gate = Gate()
    dispatcher.register("hold up", gate)
    held = ask(dispatcher, "hold up", timeout=60)
    assert gate.entered.wait(PATIENCE)
    try:
        yield gate
    finally:
        gate.go_on.set()
    with suppress(EdgemlError):
        held.future.result(PATIENCE)


class Clock:
    """Stands still but for handlers that work."""

    def __init__(self, monkeypatch) -> None:
        self.now = time.monotonic()
        for module in ("call", "dispatch"):
            monkeypatch.setattr(f"edgeml.core.{module}.time", self)

    def monotonic(self) -> float:
        return self.now


class Foreign(Call):
    """A call as a server of another protocol makes it, of which much may go wrong."""

    def __init__(
        self, name="echo", payload=None, timeout=PATIENCE, source=None, nbytes=0, caller=None
    ):
        who = caller or caller_named("foreigner")
        super().__init__(name, who, time.monotonic() + timeout, nbytes, source)
        self.value = payload
        self.decoded = 0
        self.outcomes: queue.SimpleQueue = queue.SimpleQueue()
        self.refused_values = ()

    def payload(self):
        self.decoded += 1
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    def _send(self, value) -> None:
        if value in self.refused_values:
            raise NotEncodable(f"{value!r} can't be carried")
        self.outcomes.put(value)

    def _send_error(self, error) -> None:
        self.outcomes.put(error)

    def outcome(self):
        return self.outcomes.get(timeout=PATIENCE)


# Calls by value -------------------------------------------------------------------------------


def test_a_call_from_this_process_passes_values_as_they_are(dispatcher):
    payload = {"anything": object()}
    assert answer_of(dispatcher, "echo", payload) is payload


def test_a_handler_is_told_who_calls(dispatcher):
    seen = []
    dispatcher.register("who", answer_with(lambda payload, caller: seen.append(caller)))
    robot = Caller("c1", "arm", Peer("7", "somewhere"))
    ask(dispatcher, "who", caller=robot).future.result(PATIENCE)
    assert seen == [robot]
    assert str(robot) == "arm at somewhere"
    answer_of(dispatcher, "who")
    assert str(seen[1]) == "local at this process"


def test_a_handler_may_keep_its_calls_and_answer_them_together_from_another_thread(dispatcher):
    kept: queue.SimpleQueue = queue.SimpleQueue()
    dispatcher.register("predict", kept.put)

    def answer_in_batches():
        for _ in range(3):
            batch = [kept.get(timeout=PATIENCE) for _ in range(4)]
            total = sum(call.payload() for call in batch)
            for call in reversed(batch):
                assert not call.answered
                call.answer((call.payload(), total))
                assert call.answered

    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(answer_in_batches)
        calls = [ask(dispatcher, "predict", n) for n in range(12)]
        assert answer_of(dispatcher, "echo", 1) == 1  # nobody is held up by those that are kept
        results = [call.future.result(PATIENCE) for call in calls]
        answering.result(PATIENCE)
    assert results == [(n, (6, 22, 38)[n // 4]) for n in range(12)]


def test_a_call_is_answered_once(dispatcher):
    kept: queue.SimpleQueue = queue.SimpleQueue()
    dispatcher.register("keep", kept.put)
    for first in ("answer", "fail"):
        asked = ask(dispatcher, "keep")
        call = kept.get(timeout=PATIENCE)
        if first == "answer":
            call.answer(1)
        else:
            call.fail(PermissionDenied("not you"))
        for again in (lambda call=call: call.answer(2), lambda call=call: call.fail(Closed("no"))):
            with pytest.raises(RuntimeError, match="'keep' is answered twice"):
                again()
        if first == "answer":
            assert asked.future.result(0) == 1
        else:
            assert isinstance(asked.future.exception(0), PermissionDenied)


def test_of_many_threads_that_answer_a_call_one_does(dispatcher):
    kept: queue.SimpleQueue = queue.SimpleQueue()
    dispatcher.register("keep", kept.put)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            asked = ask(dispatcher, "keep")
            call = kept.get(timeout=PATIENCE)
            together = threading.Barrier(8)

            def answer(n, call=call, together=together):
                together.wait(PATIENCE)
                try:
                    call.answer(n)
                except RuntimeError:
                    return None
                return n

            (winner,) = [n for n in pool.map(answer, range(8)) if n is not None]
            assert asked.future.result(PATIENCE) == winner


def test_a_value_that_cannot_be_carried_leaves_the_call_open(dispatcher):
    dispatcher.register("plain", lambda call: call.answer("odd"))

    def try_again(call):
        with pytest.raises(NotEncodable):
            call.answer("odd")
        assert not call.answered
        call.answer("plain")

    dispatcher.register("tries again", try_again)
    call = Foreign("tries again")
    call.refused_values = ("odd",)
    dispatcher.submit(call)
    assert call.outcome() == "plain"
    call = Foreign("plain")
    call.refused_values = ("odd",)
    dispatcher.submit(call)
    error = call.outcome()
    assert isinstance(error, RemoteError)
    assert "NotEncodable: 'odd' can't be carried" in str(error)


def test_a_payload_is_decoded_in_the_thread_that_handles_it(dispatcher):
    threads = []

    class Noting(Foreign):
        def payload(self):
            threads.append(threading.current_thread())
            return super().payload()

    dispatcher.register("where", lambda call: call.answer((call.payload(), 1)))
    call = Noting("where", payload=5)
    dispatcher.submit(call)
    assert call.outcome() == (5, 1)
    assert threads[0].name == "edgeml test handlers"
    call = Noting("where", payload=Malformed("no such thing"))
    dispatcher.submit(call)
    assert isinstance(call.outcome(), Malformed)


def test_an_unknown_interface_is_told_with_those_for_users(dispatcher):
    dispatcher.register("/own", answer_with(lambda payload, caller: payload))
    with pytest.raises(UnknownInterface, match=r"there is no interface 'none'; known: echo$"):
        answer_of(dispatcher, "none")
    assert dispatcher.counts["UnknownInterface"] == 1
    assert dispatcher.names == ["echo", "/own"]


def test_an_interface_may_be_registered_and_replaced_while_calls_run(dispatcher):
    dispatcher.register("late", answer_with(lambda payload, caller: 1))
    assert answer_of(dispatcher, "late") == 1
    dispatcher.register("late", answer_with(lambda payload, caller: 2))
    assert answer_of(dispatcher, "late") == 2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"workers": 0}, "workers must be at least 1"),
        ({"rate_limit": 0}, "rate_limit must be positive or None"),
        ({"rate_limit": float("nan")}, "rate_limit must be positive or None"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, text):
    with pytest.raises(ValueError, match=text), dispatching(**settings):
        pass


def test_what_nobody_could_run_is_refused():
    async def coroutine(payload):
        return payload

    require_plain("this", print)
    for function in (None, 5, "print"):
        with pytest.raises(TypeError, match="this needs a function"):
            require_plain("this", function)
    with pytest.raises(TypeError, match="this is an `async def`"):
        require_plain("this", coroutine)


# Those that nobody waits for ------------------------------------------------------------------


def test_calls_that_nobody_waits_for_cost_nothing(dispatcher):
    entered = []
    dispatcher.register("note", lambda call: entered.append(call.payload()))
    late = [Foreign("note", timeout=-1) for _ in range(5)]
    with held_up(dispatcher):
        given_up = [ask(dispatcher, "note") for _ in range(5)]
        for call in late:
            dispatcher.submit(call)
        for call in given_up:
            assert call.future.cancel()
    assert all(isinstance(call.outcome(), DeadlineExceeded) for call in late)
    assert answer_of(dispatcher, "echo", 1) == 1
    assert entered == []
    assert not any(call.decoded for call in late)
    assert dispatcher.counts["DeadlineExceeded"] == 10
    assert dispatcher.counts["calls"] == 2


def test_a_call_that_nobody_waits_for_any_more_may_still_be_answered(dispatcher):
    kept: queue.SimpleQueue = queue.SimpleQueue()
    dispatcher.register("keep", kept.put)
    asked = ask(dispatcher, "keep")
    call = kept.get(timeout=PATIENCE)
    assert not call.expired
    asked.future.cancel()
    assert call.expired
    call.answer(1)  # which nobody gets
    assert asked.future.cancelled()


# Order ----------------------------------------------------------------------------------------


def test_calls_are_handled_in_the_order_of_their_submission(dispatcher):
    seen = []
    dispatcher.register("note", lambda call: call.answer(seen.append(call.payload())))
    with held_up(dispatcher):
        calls = [ask(dispatcher, "note", n) for n in range(200)]
    for call in calls:
        call.future.result(PATIENCE)
    assert seen == list(range(200))


def test_those_of_each_thread_are_handled_in_its_order(dispatcher):
    seen: list = []
    dispatcher.register("note", lambda call: call.answer(seen.append(call.payload())))
    together = threading.Barrier(6)

    def submit(who):
        together.wait(PATIENCE)
        for call in [ask(dispatcher, "note", (who, n)) for n in range(200)]:
            call.future.result(PATIENCE)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(submit, range(6)))
    for who in range(6):
        assert [n for by, n in seen if by == who] == list(range(200))


def test_the_newest_call_of_a_client_comes_first_where_that_is_wanted(dispatcher):
    seen = []
    dispatcher.register(
        "note", lambda call: call.answer(seen.append(call.payload())), newest_first=True
    )
    with held_up(dispatcher):
        calls = [ask(dispatcher, "note", n) for n in range(5)]
    for call in calls:
        call.future.result(PATIENCE)
    assert seen == [4, 3, 2, 1, 0]


# Those that can't make it ---------------------------------------------------------------------


def test_a_call_with_less_time_than_runs_take_is_refused_unseen_and_another_is_tried_later(
    dispatcher, monkeypatch
):
    clock = Clock(monkeypatch)
    seen = []

    def work(call):
        seen.append(call.payload())
        clock.now += 0.2
        call.answer(None)

    dispatcher.register("work", work)
    for _ in range(5):
        answer_of(dispatcher, "work")
    short = ask(dispatcher, "work", "short", timeout=0.1)
    with pytest.raises(DeadlineExceeded, match="'work' takes 200 ms of late, and the caller waits"):
        short.future.result(PATIENCE)
    assert seen == [None] * 5
    assert dispatcher.counts["refused_too_short"] == 1
    answer_of(dispatcher, "echo")
    clock.now += 5.0
    ask(dispatcher, "work", "again", timeout=0.1).future.result(PATIENCE)
    assert seen[5:] == ["again"]
    assert dispatcher.counts["answered_too_late"] == 1


def test_calls_that_come_after_too_many_others_are_refused_at_once(dispatcher, monkeypatch):
    clock = Clock(monkeypatch)

    def work(call):
        clock.now += 0.02
        call.answer(call.payload())

    dispatcher.register("work", work)
    for _ in range(5):
        answer_of(dispatcher, "work")
    with held_up(dispatcher):
        # Room for five and a half, as a clock of many hours adds up to no more than nearly 0.1.
        calls = [ask(dispatcher, "work", n, 0.11, caller_named(f"c{n}")) for n in range(7)]
        for call in calls[5:]:
            with pytest.raises(Overloaded, match="ask less often, with more time, or another"):
                call.future.result(0)
        assert dispatcher.waiting == 5
    assert [call.future.result(PATIENCE) for call in calls[:5]] == list(range(5))
    assert dispatcher.counts["refused_too_busy"] == 2
    assert dispatcher.counts["Overloaded"] == 2


def test_a_loop_goes_on_elsewhere_before_a_handler_for_which_more_wait_than_can(
    dispatcher, source, monkeypatch
):
    monkeypatch.setattr("edgeml.core.dispatch._STUCK", 60.0)  # no watch does it
    thread = handlers_thread(dispatcher)
    settle(dispatcher, source, thread)
    gate = Gate()
    dispatcher.register("slow", gate)
    late = Foreign("echo", timeout=-1, source=source)
    with held_up(dispatcher):
        dispatcher.submit(late)
    assert isinstance(late.outcome(), DeadlineExceeded)
    settle(dispatcher, source, thread)
    held = source.bring(dispatcher, "slow")
    assert gate.entered.wait(PATIENCE)
    beside = source.bring(dispatcher, "none")
    assert isinstance(beside.outcome(), UnknownInterface)  # which needs the loop and no handler
    gate.go_on.set()
    held.outcome()


# Lanes and workers ----------------------------------------------------------------------------


def test_each_lane_has_a_thread_of_its_own_and_waits_for_no_other():
    where: dict[str, set[threading.Thread]] = {}

    def note(call):
        where.setdefault(call.name, set()).add(threading.current_thread())
        call.answer(None)

    with dispatching(started=False) as dispatcher:
        dispatcher.register("observe", note)
        dispatcher.register("act", note, lane="act")
        dispatcher.register("move", note, lane="act")
        dispatcher.register("look", note, lane="camera")
        dispatcher.start()
        for _ in range(5):
            for name in ("observe", "act", "move", "look"):
                answer_of(dispatcher, name)
        assert all(len(threads) == 1 for threads in where.values())
        assert where["act"] == where["move"]
        assert len(where["observe"] | where["act"] | where["look"]) == 3
        with held_up(dispatcher):
            answer_of(dispatcher, "act")
            waiting = ask(dispatcher, "observe")
            assert dispatcher.waiting == 1
        waiting.future.result(PATIENCE)
        gate = Gate()
        dispatcher.register("act", gate, lane="act")
        busy = ask(dispatcher, "act")
        assert gate.entered.wait(PATIENCE)
        waiting = ask(dispatcher, "move")
        answer_of(dispatcher, "observe")
        answer_of(dispatcher, "look")
        assert dispatcher.waiting == 1
        gate.go_on.set()
        busy.future.result(PATIENCE)
        waiting.future.result(PATIENCE)


@pytest.mark.parametrize("workers", [2, 4])
def test_so_many_calls_are_handled_at_a_time_as_there_are_workers_and_never_more(workers):
    together = threading.Barrier(workers)
    lock = threading.Lock()
    running, most = 0, 0

    def meet(payload, caller):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(PATIENCE)
        with lock:
            running -= 1

    with dispatching(workers=workers) as dispatcher:
        dispatcher.register("meet", answer_with(meet))
        for call in [ask(dispatcher, "meet") for _ in range(10 * workers)]:
            call.future.result(PATIENCE)
    assert most == workers


def test_one_worker_is_the_thread_that_runs_it_and_with_more_it_is_one_of_them():
    for workers in (1, 3):
        threads: set[threading.Thread] = set()
        together = threading.Barrier(workers)

        def meet(payload, caller, threads=threads, together=together):
            threads.add(threading.current_thread())
            together.wait(PATIENCE)

        with dispatching(started=False, workers=workers) as dispatcher:
            dispatcher.register("meet", answer_with(meet))
            running = threading.Thread(target=dispatcher.run)
            running.start()
            for call in [ask(dispatcher, "meet") for _ in range(4 * workers)]:
                call.future.result(PATIENCE)
            dispatcher.close()
            running.join(PATIENCE)
        assert len(threads) == workers
        assert running in threads


# Limits ---------------------------------------------------------------------------------------


def test_one_call_is_always_taken_however_large(dispatcher):
    huge = Foreign(nbytes=1 << 40)
    dispatcher.submit(huge)
    assert huge.outcome() is None
    with held_up(dispatcher):  # also while another is handled
        huge, next_one = Foreign(nbytes=1 << 40), Foreign(nbytes=1)
        dispatcher.submit(huge)
        dispatcher.submit(next_one)
        assert isinstance(next_one.outcome(), Overloaded)
        assert dispatcher.waiting == 1
    assert huge.outcome() is None
    assert dispatcher.counts["Overloaded"] == 1


def test_too_much_that_waits_is_refused_with_calls_and_megabytes(dispatcher):
    with held_up(dispatcher):
        kept = [Foreign(nbytes=150_000_000) for _ in range(3)]
        over = Foreign(nbytes=150_000_000)
        for call in (*kept, over):
            dispatcher.submit(call)
        text = "calls waiting already: 3, of 450.0 MB; of this client at most 4096, or 537 MB, may"
        assert str(over.outcome()).startswith(text)
        small = Foreign(nbytes=50_000_000)  # for which there is still room
        dispatcher.submit(small)
    assert [call.outcome() for call in (*kept, small)] == [None] * 4
    with held_up(dispatcher):  # what has been handled takes up nothing
        again = [Foreign(nbytes=150_000_000) for _ in range(3)]
        for call in again:
            dispatcher.submit(call)
    assert [call.outcome() for call in again] == [None] * 3


@pytest.mark.parametrize("limits", [Limits(calls=10), Limits(calls_per_client=5)])
def test_too_many_that_wait_are_refused(limits):
    with dispatching(limits=limits) as dispatcher, held_up(dispatcher):
        calls = [ask(dispatcher, "echo", n) for n in range(8)]
        for call in calls[5:]:
            with pytest.raises(Overloaded, match=r"calls waiting already: 5, of 0\.0 MB"):
                call.future.result(PATIENCE)
    assert [call.future.result(PATIENCE) for call in calls[:5]] == list(range(5))


def test_callers_wait_their_turn_under_a_rate_limit_each_on_their_own():
    with dispatching(rate_limit=20) as dispatcher:
        one, other = caller_named("one"), caller_named("other")
        with took(at_least=0.24, at_most=5.0):
            calls = [ask(dispatcher, "echo", n, timeout=60, caller=one) for n in range(100)]
            ask(dispatcher, "echo", caller=other).future.result(PATIENCE)
            assert not calls[-1].future.done()
            for call in calls[:6]:
                call.future.result(PATIENCE)


def test_a_call_whose_turn_is_beyond_its_deadline_is_refused_at_once():
    with dispatching(rate_limit=2) as dispatcher:
        one = caller_named("one")
        calls = [ask(dispatcher, "echo", n, timeout=60, caller=one) for n in range(3)]
        for _ in range(5):
            call = ask(dispatcher, "echo", timeout=0.01, caller=one)
            with pytest.raises(
                Overloaded,  # which takes no turn
                match=r"over the rate limit of 2 calls/s: the next turn is in [01]\.\d\d s",
            ):
                call.future.result(0)
        assert [call.future.result(PATIENCE) for call in calls] == [0, 1, 2]


def test_calls_that_wait_for_their_turn_take_room_as_others_do():
    with dispatching(rate_limit=1, limits=Limits(calls_per_client=5)) as dispatcher:
        one = caller_named("one")
        assert ask(dispatcher, "echo", 0, caller=one).future.result(PATIENCE) == 0
        early = [ask(dispatcher, "echo", n, timeout=60, caller=one) for n in range(5)]
        assert dispatcher.waiting == 5
        with pytest.raises(Overloaded, match=r"calls waiting already: 5, of 0\.0 MB"):
            ask(dispatcher, "echo", timeout=60, caller=one).future.result(PATIENCE)
        dispatcher.close()
        for call in early:
            with pytest.raises(Closed):
                call.future.result(PATIENCE)


def test_clients_are_served_in_turn_however_much_one_of_them_asks(dispatcher):
    greedy, good = caller_named("greedy"), caller_named("good")
    served = []
    dispatcher.register("note", answer_with(lambda payload, caller: served.append(payload)))
    with held_up(dispatcher):
        calls = [ask(dispatcher, "note", ("greedy", n), caller=greedy) for n in range(100)]
        calls += [ask(dispatcher, "note", ("good", n), caller=good) for n in range(3)]
    for call in calls:
        call.future.result(PATIENCE)
    assert served[:6] == [(who, n) for n in range(3) for who in ("greedy", "good")]
    assert served[6:] == [("greedy", n) for n in range(3, 100)]


def test_what_one_client_has_waiting_leaves_room_for_the_others():
    limits = Limits(calls_per_client=3, bytes_per_client=1000)
    with dispatching(limits=limits) as dispatcher, held_up(dispatcher):
        greedy, good = caller_named("greedy"), caller_named("good")
        calls = [ask(dispatcher, "echo", n, caller=greedy) for n in range(5)]
        assert [call.future.done() for call in calls] == [False] * 3 + [True] * 2
        call = ask(dispatcher, "echo", "mine", caller=good)
    assert call.future.result(PATIENCE) == "mine"
    assert not dispatcher._main._connections  # what has been handled is not kept in mind
    assert not dispatcher._main._groups


def connection_of(machine: str, number: int) -> Caller:
    return Caller(f"{machine} {number}", "", Peer(f"{machine} {number}", "there", machine))


def test_who_opens_many_connections_gets_no_more_turns(dispatcher):
    served = []
    dispatcher.register("note", answer_with(lambda payload, caller: served.append(payload)))
    with held_up(dispatcher):
        calls = [
            ask(dispatcher, "note", "greedy", caller=connection_of("greedy", n)) for n in range(50)
        ]
        good = connection_of("good", 0)
        calls += [ask(dispatcher, "note", "good", caller=good) for n in range(3)]
    for call in calls:
        call.future.result(PATIENCE)
    assert served[:6] == ["greedy", "good"] * 3


def test_one_machine_leaves_room_for_the_others_and_for_its_own_other_clients():
    limits = Limits(calls=20, calls_per_client=4, bytes=1 << 20)
    with dispatching(limits=limits) as dispatcher, held_up(dispatcher):
        greedy = [connection_of("greedy", n) for n in range(6)]
        many = [ask(dispatcher, "echo", caller=each) for _ in range(5) for each in greedy]
        refused = [call for call in many if call.future.done()]
        assert len(many) - len(refused) == 10
        for call in refused:
            with pytest.raises(Overloaded, match="of one key or machine at most 10"):
                call.future.result(0)
        for caller in (connection_of("good", 0), connection_of("greedy", 99)):
            assert not ask(dispatcher, "echo", caller=caller).future.done()
        # One may send so much, but its machine no more; another's is not kept out by that.
        large = [
            Foreign(nbytes=400_000, caller=connection_of(where, n))
            for where, n in [("a", 0), ("a", 1), ("b", 0)]
        ]
        for call in large:
            dispatcher.submit(call)
        assert isinstance(large[1].outcome(), Overloaded)
        small = Foreign(nbytes=1000, caller=connection_of("a", 2))
        dispatcher.submit(small)
    for call in (large[0], large[2], small):
        assert call.outcome() is None


# Roles ----------------------------------------------------------------------------------------


def test_a_role_that_lacks_an_interface_is_refused_before_its_payload_is_looked_at(caplog):
    with dispatching() as dispatcher:
        dispatcher.register("grasp", answer_with(lambda payload, caller: payload), needs="call")
        viewer = caller_named("viewer")
        viewer.identity, viewer.role = "cam7", Role.parse("observe,call:look*")
        call = Foreign("grasp", caller=viewer)
        dispatcher.submit(call)
        error = call.outcome()
        assert isinstance(error, PermissionDenied)
        assert call.decoded == 0
        assert "cam7" in str(error)
        assert "lacks call:grasp" in str(error)
        assert dispatcher.counts["PermissionDenied"] == 1
        assert ask(dispatcher, "echo", 1, caller=viewer).future.result(PATIENCE) == 1
    assert [r.levelname for r in caplog.records if "lacks call:grasp" in r.message] == ["WARNING"]


def test_calls_of_a_key_that_is_revoked_while_they_wait_are_not_handled(dispatcher):
    gone = caller_named("gone")
    with held_up(dispatcher):
        call = ask(dispatcher, "echo", caller=gone)
        gone.revoked = True
    with pytest.raises(PermissionDenied, match="revoked"):
        call.future.result(PATIENCE)


# What handlers raise --------------------------------------------------------------------------


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


class NotYou(PermissionDenied):
    """A user's own subclass of an error that reaches the caller as it is."""


@pytest.mark.parametrize(
    ("raised", "expected", "text"),
    [
        (ValueError("no"), RemoteError, "ValueError: no"),
        (Unprintable(), RemoteError, "Unprintable"),
        (DeadlineExceeded("of the database"), RemoteError, "DeadlineExceeded: of the database"),
        (NotYou("not you"), NotYou, "not you"),
        (Overloaded("later"), Overloaded, "later"),
        (SystemExit(3), RemoteError, "SystemExit: 3"),
        (KeyboardInterrupt(), RemoteError, "KeyboardInterrupt"),
        (GeneratorExit(), RemoteError, "GeneratorExit"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_whatever_a_handler_raises_is_the_answer_and_the_next_call_works(
    dispatcher, raised, expected, text
):
    def fail(call):
        raise raised

    dispatcher.register("fail", fail)
    for _ in range(2):
        with pytest.raises(expected, match=text):
            answer_of(dispatcher, "fail")
        assert answer_of(dispatcher, "echo", 1) == 1
    assert dispatcher.counts[expected.__name__] == 2


@pytest.mark.parametrize("raised", [ValueError("late"), SystemExit(3)], ids=["error", "exit"])
def test_what_a_handler_raises_after_its_answer_is_logged_and_the_answer_stands(
    dispatcher, caplog, raised
):
    def fail(call):
        call.answer(1)
        raise raised

    dispatcher.register("fail", fail)
    assert answer_of(dispatcher, "fail") == 1
    assert answer_of(dispatcher, "echo", 2) == 2
    (record,) = caplog.records
    assert "'fail' failed after its answer" in record.getMessage()
    assert record.exc_info[1] is raised


def test_a_handler_that_fails_names_interface_detail_and_caller(dispatcher, caplog):
    def fail(call):
        call.detail = "'gripper'"
        raise ValueError("it is stuck")

    dispatcher.register("act", fail)
    robot = Caller("c1", "arm", Peer("7", "10.0.0.7"))
    with pytest.raises(RemoteError):
        ask(dispatcher, "act", caller=robot).future.result(PATIENCE)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    said = record.getMessage()
    for part in ("test", "act 'gripper'", "arm at 10.0.0.7", "ValueError: it is stuck"):
        assert part in said


def test_a_handler_that_keeps_a_call_and_fails_has_answered_it(dispatcher):
    kept = []

    def fail(call):
        kept.append(call)
        raise ValueError("no")

    dispatcher.register("fail", fail)
    with pytest.raises(RemoteError):
        answer_of(dispatcher, "fail")
    with pytest.raises(RuntimeError, match="answered twice"):
        kept[0].answer(1)


def test_a_caller_whom_no_error_reaches_hurts_nobody(dispatcher, caplog):
    class Gone(Foreign):
        def _send_error(self, error) -> None:
            super()._send_error(error)
            raise OSError("the caller has gone")

    dispatcher.register("fail", lambda call: 1 / 0)
    for name in ("none", "fail"):
        call = Gone(name)
        dispatcher.submit(call)
        assert isinstance(call.outcome(), EdgemlError)
        assert answer_of(dispatcher, "echo", 1) == 1
        assert "the caller has gone" in caplog.text
        caplog.clear()


def test_ctrl_c_in_the_main_thread_ends_the_run_and_its_caller_is_told():
    def interrupt(call):
        raise KeyboardInterrupt

    with dispatching(started=False) as dispatcher:
        dispatcher.register("interrupt", interrupt)
        call, behind = ask(dispatcher, "interrupt"), ask(dispatcher, "echo")
        with pytest.raises(KeyboardInterrupt):
            dispatcher.run()
        with pytest.raises(Closed, match="has been stopped"):
            call.future.result(PATIENCE)
        dispatcher.close()
        with pytest.raises(Closed):
            behind.future.result(PATIENCE)


def test_the_first_call_of_an_interface_is_told_once(dispatcher, caplog):
    caplog.set_level(logging.INFO)
    dispatcher.register("/own", answer_with(lambda payload, caller: payload))
    for name in ("echo", "/own", "echo"):
        answer_of(dispatcher, name)
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert told == ["test 'echo' is called for the first time, by local at this process"]


# The end --------------------------------------------------------------------------------------


def test_closing_answers_what_waits_and_waits_for_what_runs():
    with no_thread_left(), dispatching() as dispatcher, ThreadPoolExecutor(1) as pool:
        gate = Gate()
        dispatcher.register("gate", gate)
        running = ask(dispatcher, "gate", 5)
        assert gate.entered.wait(PATIENCE)
        waiting = [ask(dispatcher, "echo", n) for n in range(5)]
        closing = pool.submit(dispatcher.close)
        for call in waiting:
            with pytest.raises(Closed, match="the server has been stopped"):
                call.future.result(PATIENCE)
        assert not closing.done()
        assert not running.future.done()
        with pytest.raises(Closed):
            answer_of(dispatcher, "echo")
        gate.go_on.set()
        assert running.future.result(PATIENCE) == 5
        closing.result(PATIENCE)
        dispatcher.close()
        assert dispatcher.waiting == 0
        assert dispatcher.counts["Closed"] == 6


def test_closing_tells_those_that_were_found_to_be_too_late_as_something_else_came(monkeypatch):
    with dispatching(started=False) as dispatcher:
        clock = Clock(monkeypatch)
        late = ask(dispatcher, "echo", timeout=0.1)
        clock.now += 1.0
        dispatcher.do(lambda: None)
        assert dispatcher.waiting == 1
        dispatcher.close()
    assert isinstance(late.future.exception(0), DeadlineExceeded)


def test_closing_refuses_those_that_wait_for_their_turn():
    with dispatching(rate_limit=0.1) as dispatcher:
        one = caller_named("one")
        calls = [ask(dispatcher, "echo", n, timeout=60, caller=one) for n in range(3)]
        assert calls[0].future.result(PATIENCE) == 0
        dispatcher.close()
        calls.append(ask(dispatcher, "echo", 3, timeout=60, caller=one))
        for call in calls[1:]:
            with pytest.raises(Closed):
                call.future.result(0)


def test_closing_does_not_wait_for_ever_for_a_handler_that_does_not_return(monkeypatch, caplog):
    monkeypatch.setattr("edgeml.core.dispatch._GRACE", 0.2)
    with no_thread_left(), dispatching(workers=2) as dispatcher, held_up(dispatcher) as gate:
        with took(at_most=2.0, at_least=0.2):
            dispatcher.close()
        assert "still running" in caplog.text
        gate.go_on.set()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_handler_may_close_its_own_dispatcher(workers):
    with no_thread_left(), dispatching(workers=workers) as dispatcher:

        def close(payload, caller):
            assert dispatcher.inside
            with took(at_most=1.5):
                dispatcher.close()
            return payload

        dispatcher.register("close", answer_with(close))
        assert not dispatcher.inside
        assert answer_of(dispatcher, "close", 5) == 5
        with pytest.raises(Closed):
            answer_of(dispatcher, "echo")


def test_many_threads_may_close_it_at_once():
    with no_thread_left(), dispatching(workers=3) as dispatcher, ThreadPoolExecutor(8) as pool:
        calls = [ask(dispatcher, "echo", n) for n in range(100)]
        with took(at_most=3.0):
            for closing in [pool.submit(dispatcher.close) for _ in range(8)]:
                closing.result(PATIENCE)
        for call in calls:
            assert call.future.exception(PATIENCE) is None or isinstance(
                call.future.exception(), Closed
            )


def test_it_may_be_closed_at_once_after_its_start():
    with no_thread_left():
        for _ in range(100):
            with dispatching(workers=4) as dispatcher:
                call = ask(dispatcher, "echo", 1)
            call.future.exception(PATIENCE)


def test_one_that_never_ran_is_closed_and_answers_what_waits():
    with no_thread_left(), dispatching(started=False) as dispatcher:
        call = ask(dispatcher, "echo")
        dispatcher.close()
        with pytest.raises(Closed):
            call.future.result(0)
        dispatcher.run()  # returns at once
        dispatcher.close()


# Sources, whose loop the handlers' thread carries ---------------------------------------------


class Source(Endpoint):
    """An endpoint with a loop, whose requests are functions; notes what is done with it."""

    def __init__(self, port: int = 1) -> None:
        self.url = Url("source", "here", port)
        self.did: list[str] = []
        self.rounds: list[threading.Thread] = []  # that each request was taken in
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._ended = False
        self._carrier = Carrier(
            f"source {port}", self._run, lambda: self._inbox.put(None), lambda: None
        )
        self._carrier.start()

    def _run(self, stay) -> bool:
        waiting = stay()
        while not self._ended:
            try:
                request = self._inbox.get(waiting)
            except queue.Empty:
                break
            if request is not None:
                self.rounds.append(threading.current_thread())
                self._carrier.hand_over(request)
            if waiting and not stay():
                break
        return self._ended

    def carry(self, stay) -> bool:
        self.did.append("carry")
        return self._carrier.carry(stay)

    def wake(self) -> None:
        self.did.append("wake")
        self._carrier.wake()

    def relieve(self) -> None:
        self.did.append("relieve")
        self._carrier.relieve()

    def close(self) -> None:
        self._ended = True
        if not self._carrier.in_round:
            self._carrier.relieve()
        self._carrier.wake()
        self._carrier.wait(PATIENCE)

    def do(self, function) -> threading.Event:
        """Have a function called in the loop."""
        done = threading.Event()

        def call() -> None:
            function()
            done.set()

        self._inbox.put(call)
        return done

    def bring(self, dispatcher, name="echo", payload=None, timeout=PATIENCE) -> Foreign:
        """Have the loop submit a call."""
        call = Foreign(name, payload, timeout, source=self)
        self.do(lambda: dispatcher.submit(call))
        return call


@pytest.fixture
def source():
    with Source() as made:
        yield made


def handlers_thread(dispatcher) -> threading.Thread:
    found = []
    dispatcher.register("which", lambda call: call.answer(found.append(threading.current_thread())))
    answer_of(dispatcher, "which")
    return found[0]


def settle(dispatcher, source, thread) -> None:
    """Bring calls until the handlers' thread carries the source's loop."""
    deadline = time.monotonic() + PATIENCE
    while True:
        assert source.bring(dispatcher, payload=1).outcome() == 1
        if source.rounds[-1] is thread:
            return
        assert time.monotonic() < deadline, "its loop is never carried"


def test_the_handlers_thread_comes_to_carry_the_loop_that_brings_calls(dispatcher, source):
    thread = handlers_thread(dispatcher)
    settle(dispatcher, source, thread)
    source.rounds.clear()
    for n in range(50):
        assert source.bring(dispatcher, payload=n).outcome() == n
    assert set(source.rounds) == {thread}, "it costs a thread hop"
    assert "relieve" not in source.did


def test_calls_from_elsewhere_wake_the_thread_that_waits_in_a_loop(dispatcher, source):
    settle(dispatcher, source, handlers_thread(dispatcher))
    for n in range(3):
        with took(at_most=5.0):
            assert answer_of(dispatcher, "echo", n) == n
    assert "wake" in source.did


def test_a_loop_goes_on_elsewhere_while_a_handler_takes_long_and_comes_back(dispatcher, source):
    thread = handlers_thread(dispatcher)
    gate = Gate()
    dispatcher.register("gate", gate)
    settle(dispatcher, source, thread)
    source.rounds.clear()
    source.did.clear()
    busy = source.bring(dispatcher, "gate", 5)
    assert gate.entered.wait(PATIENCE)
    with took(at_most=5.0):
        assert source.do(lambda: None).wait(PATIENCE), "the loop waits for the handler"
    assert "relieve" in source.did
    assert source.rounds[-1] is not thread
    waiting = source.bring(dispatcher, payload=6)
    wait_until(lambda: dispatcher.waiting == 1)
    gate.go_on.set()
    assert busy.outcome() == 5
    assert waiting.outcome() == 6
    assert gate.threads == [thread]
    settle(dispatcher, source, thread)


def test_a_handler_that_is_quick_leaves_the_loop_where_it_is(dispatcher, source):
    settle(dispatcher, source, handlers_thread(dispatcher))
    source.did.clear()
    for n in range(200):
        source.bring(dispatcher, payload=n)
    assert source.bring(dispatcher, payload=-1).outcome() == -1
    assert "relieve" not in source.did


def test_calls_of_a_source_are_handled_in_their_order_whoever_carries_it(dispatcher, source):
    seen: list[int] = []

    def note(call):
        n = call.payload()
        seen.append(n)
        if n % 40 == 20:
            time.sleep(0.03)  # so that it is relieved
        call.answer(n)

    dispatcher.register("note", note)
    calls = [source.bring(dispatcher, "note", n) for n in range(200)]
    for n in range(200, 300):
        calls.append(source.bring(dispatcher, "note", n))
        if n % 3:
            calls[-1].outcome()
            calls[-1].outcomes.put(n)
    assert [call.outcome() for call in calls] == list(range(300))
    assert seen == list(range(300))


def test_handlers_of_several_sources_run_in_one_thread_and_none_waits_long(dispatcher):
    thread = handlers_thread(dispatcher)
    where = set()
    dispatcher.register("note", lambda call: call.answer(where.add(threading.current_thread())))
    with ExitStack() as stack:
        sources = [stack.enter_context(Source(port)) for port in (1, 2, 3)]
        for _ in range(20):
            with took(at_most=3.0):
                for call in [each.bring(dispatcher, "note") for each in sources]:
                    call.outcome()
        settle(dispatcher, sources[1], thread)  # the one that brings most is carried
        sources[1].rounds.clear()
        for n in range(10):
            assert sources[1].bring(dispatcher, payload=n).outcome() == n
        assert set(sources[1].rounds) == {thread}
        for other in (sources[0], sources[2]):
            assert other.bring(dispatcher, payload=7).outcome() == 7
    assert where == {thread}


def test_when_only_this_process_calls_a_loop_is_left_to_its_own_thread(dispatcher, source):
    thread = handlers_thread(dispatcher)
    settle(dispatcher, source, thread)
    for n in range(10):
        assert answer_of(dispatcher, "echo", n) == n
    source.rounds.clear()
    assert source.do(lambda: None).wait(PATIENCE)
    assert source.rounds != [thread]


def test_a_source_that_has_ended_is_let_go_of(dispatcher):
    thread = handlers_thread(dispatcher)
    with Source(1) as first:
        settle(dispatcher, first, thread)
    assert answer_of(dispatcher, "echo", 1) == 1
    with Source(2) as second:
        settle(dispatcher, second, thread)


def test_a_source_without_a_loop_is_served_all_the_same(dispatcher):
    class Plain(Endpoint):
        url = Url("plain", "here", 1)

        def close(self) -> None: ...

    plain = Plain()
    for n in range(20):
        call = Foreign(payload=n, source=plain)
        dispatcher.submit(call)
        assert call.outcome() == n
    with ThreadPoolExecutor(4) as pool:

        def submit(who):
            for n in range(200):
                call = Foreign(payload=(who, n), source=plain)
                dispatcher.submit(call)
                assert call.outcome() == (who, n)

        list(pool.map(submit, range(4)))


def test_with_workers_no_call_waits_while_one_of_them_is_idle(source):
    with dispatching(workers=2) as dispatcher:
        together = threading.Barrier(2)
        dispatcher.register("meet", answer_with(lambda *_: together.wait(PATIENCE / 2)))
        for _ in range(30):
            # One waits in the loop then, and the other for calls.
            assert source.bring(dispatcher, payload=1).outcome() == 1
            for call in [ask(dispatcher, "meet") for _ in range(2)]:
                call.future.result(PATIENCE)
            for call in [source.bring(dispatcher, "meet") for _ in range(2)]:
                assert not isinstance(call.outcome(), Exception)


def test_closing_gives_back_the_loop_and_answers_what_its_round_brought(source):
    with no_thread_left(), dispatching() as dispatcher:
        thread = handlers_thread(dispatcher)
        settle(dispatcher, source, thread)
        with took(at_most=1.5):
            dispatcher.close()
        source.rounds.clear()
        late = source.bring(dispatcher)
        assert isinstance(late.outcome(), Closed)
        assert source.rounds[0] is not thread
        assert not thread.is_alive()
        source.close()


def test_a_handler_may_close_a_dispatcher_whose_source_is_carried(source):
    with dispatching() as dispatcher:
        dispatcher.register("close", lambda call: (dispatcher.close(), call.answer(1)))
        settle(dispatcher, source, handlers_thread(dispatcher))
        closing, behind = source.bring(dispatcher, "close"), source.bring(dispatcher)
        assert closing.outcome() == 1
        assert isinstance(behind.outcome(), Closed)


def test_ctrl_c_in_a_round_ends_the_run_and_the_loop_goes_on(source):
    def interrupt():
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    with dispatching(started=False) as dispatcher:
        source.bring(dispatcher)  # so that its loop is wanted

        def end_it():
            while not interrupted.is_set():
                source.do(interrupt)
                interrupted.wait(0.01)

        interrupted = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            ending = pool.submit(end_it)
            try:
                with pytest.raises(KeyboardInterrupt):
                    dispatcher.run()
            finally:
                interrupted.set()
            ending.result(PATIENCE)
        assert source.do(lambda: None).wait(PATIENCE)
        assert source.rounds[-1] is not threading.main_thread()
