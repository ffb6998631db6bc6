"""The batcher in a dispatcher, with calls from this process."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import numpy as np
import pytest

from edgeml.core.alarms import Alarms
from edgeml.core.dispatch import Caller, Dispatcher, LocalCall, answer_with
from edgeml.core.errors import (
    Closed,
    DeadlineExceeded,
    Malformed,
    NotEncodable,
    Overloaded,
    RemoteError,
)
from edgeml.core.transport import Peer
from edgeml.services.batching import Batcher, Batching
from edgeml.services.checks import Checks
from edgeml.services.contract import PolicyContract
from edgeml.services.functions import Function
from pairs import took, wait_until

PATIENCE = 20.0


class Policy:
    """A batch function that notes what it is given, and may be held up."""

    def __init__(self, answer=lambda batch: batch * 2) -> None:
        self.answer = answer
        self.batches: list = []
        self.threads: set[int] = set()
        self.entered: queue.SimpleQueue = queue.SimpleQueue()
        self.go_on = threading.Semaphore(0)
        self.held = False

    def __call__(self, batch, *contexts):
        self.batches.append(np.array(batch) if isinstance(batch, np.ndarray) else batch)
        self.threads.add(threading.get_ident())
        self.entered.put(None)
        if self.held:
            assert self.go_on.acquire(timeout=60)
        return self.answer(batch, *contexts)

    @property
    def sizes(self):
        return [len(batch) for batch in self.batches]


@contextmanager
def batching(
    function,
    *,
    settings=None,
    workers=1,
    rate_limit=None,
    told=False,
    checks=None,
    newest_first=False,
):
    """A dispatcher that serves ``function`` as "policy", in batches."""
    alarms = Alarms("edgeml test alarms")
    dispatcher = Dispatcher("test", alarms, workers, rate_limit)
    dispatcher.register("echo", answer_with(lambda payload, caller: payload))
    settings = settings or Batching(max_size=8, sizes="any")
    made = Function.make("policy", function, 1, told, checks)
    dispatcher.register("policy", Batcher(made, settings, newest_first))
    try:
        dispatcher.start()
        yield dispatcher
    finally:
        if isinstance(function, Policy):
            function.held = False
            function.go_on.release(1000)
        dispatcher.close()
        alarms.close()


def caller_named(name):
    return Caller(name, "", Peer(name, "nowhere"))


def ask(dispatcher, payload, timeout=PATIENCE, caller=None, name="policy"):
    call = LocalCall(name, payload, timeout, caller or caller_named(f"client of {payload!r:.20}"))
    dispatcher.submit(call)
    return call.future


def results(futures):
    return [future.result(PATIENCE) for future in futures]


@contextmanager
def busy(dispatcher, policy):
    """Have a first batch, of one call, under way meanwhile."""
    policy.held = True
    first = ask(dispatcher, 0)
    policy.entered.get(timeout=PATIENCE)
    yield
    policy.held = False
    policy.go_on.release()
    assert first.result(PATIENCE) == 0


# Batches --------------------------------------------------------------------------------------


def test_what_came_while_a_batch_ran_is_the_next():
    policy = Policy()
    with batching(policy) as dispatcher:
        with busy(dispatcher, policy):
            futures = [ask(dispatcher, n) for n in range(1, 6)]
        assert results(futures) == [2, 4, 6, 8, 10]
        assert [batch.tolist() for batch in policy.batches] == [[0], [1, 2, 3, 4, 5]]
        assert len(policy.threads) == 1
        assert dispatcher.counts["calls"] == 6


def test_batches_are_no_larger_than_they_may_be_and_padded_to_the_sizes_given():
    policy = Policy()
    with batching(policy, settings=Batching(max_size=6)) as dispatcher:
        with busy(dispatcher, policy):
            futures = [ask(dispatcher, n) for n in range(1, 10)]
        assert results(futures) == [2 * n for n in range(1, 10)]
    assert [batch.tolist() for batch in policy.batches] == [[0], [1, 2, 3, 4, 5, 6], [7, 8, 9, 9]]
    assert Batching(max_size=6).all_sizes() == [1, 2, 4, 6]
    assert Batching(max_size=8).all_sizes() == [1, 2, 4, 8]
    assert Batching(max_size=1).all_sizes() == [1]
    assert Batching(max_size=8, sizes=[8, 3, 3]).all_sizes() == [3, 8]


def test_calls_that_do_not_stack_form_batches_of_their_own():
    policy = Policy(answer=lambda batch: {"n": batch["n"]})
    with batching(policy) as dispatcher:
        policy.held = True
        first = ask(dispatcher, {"n": 0})
        policy.entered.get(timeout=PATIENCE)
        futures = [
            ask(dispatcher, {"n": n, "x": np.zeros(2 + n % 2), **({"p": 1} if n == 4 else {})})
            for n in range(1, 6)
        ]
        policy.held = False
        policy.go_on.release()
        assert [each["n"] for each in results([first, *futures])] == [0, 1, 2, 3, 4, 5]
    assert [batch["n"].tolist() for batch in policy.batches] == [[0], [1, 3, 5], [2], [4]]


def test_a_lone_client_waits_for_nobody():
    with batching(Policy()) as dispatcher:
        caller = caller_named("alone")
        for n in range(50):
            with took(at_most=2.0):
                assert ask(dispatcher, n, caller=caller).result(PATIENCE) == 2 * n


def test_a_call_waits_for_others_if_it_is_told_to_and_no_longer_than_that():
    policy = Policy()
    settings = Batching(max_size=4, max_delay=0.3, sizes="any")
    with (
        batching(policy, settings=settings) as dispatcher,
        took(at_least=0.28, at_most=5.0),
    ):
        assert ask(dispatcher, 1).result(PATIENCE) == 2
    settings = Batching(max_size=4, max_delay=60.0, sizes="any")
    with batching(policy, settings=settings) as dispatcher:  # none is waited for once it is full
        assert results([ask(dispatcher, n) for n in range(4)]) == [0, 2, 4, 6]
    assert policy.sizes == [1, 4]


def test_one_client_that_asks_for_much_gets_full_batches():
    policy = Policy()
    caller = caller_named("greedy")
    with batching(policy) as dispatcher:
        with busy(dispatcher, policy):
            futures = [ask(dispatcher, n, caller=caller) for n in range(20)]
        assert results(futures) == [2 * n for n in range(20)]
    assert policy.sizes == [1, 8, 8, 4]


def test_a_client_that_asks_for_much_starves_nobody():
    policy = Policy()
    greedy = caller_named("greedy")
    with batching(policy) as dispatcher:
        with busy(dispatcher, policy):
            many = [ask(dispatcher, n, caller=greedy) for n in range(100)]
            few = [ask(dispatcher, 1000 + n) for n in range(3)]
        results(many + few)
    assert set(policy.batches[1].tolist()) == {0, 1, 2, 3, 4, 1000, 1001, 1002}


def test_another_interface_is_not_starved_by_batches():
    policy = Policy(answer=lambda batch: time.sleep(0.005) or batch)
    with batching(policy) as dispatcher:
        callers = [caller_named(str(n)) for n in range(8)]
        ended = threading.Event()

        def flood(caller):
            while not ended.is_set():
                ask(dispatcher, 1, caller=caller).result(PATIENCE)

        threads = [threading.Thread(target=flood, args=(caller,)) for caller in callers]
        for thread in threads:
            thread.start()
        try:
            for n in range(20):
                with took(at_most=5.0):
                    assert ask(dispatcher, n, name="echo").result(PATIENCE) == n
        finally:
            ended.set()
            for thread in threads:
                thread.join()


def test_clients_in_step_are_answered_together_where_a_batch_costs_the_same_at_any_size():
    # Without, there are two groups that take turns; a busy machine may keep one of them from it.
    assert any(_usual_batch_of_six() == 6 for _ in range(3))


def _usual_batch_of_six():
    policy = Policy(answer=lambda batch: time.sleep(0.02) or batch)
    with batching(policy) as dispatcher:
        ended = time.monotonic() + 2.0

        def loop(n):
            caller = caller_named(str(n))
            while time.monotonic() < ended:
                assert ask(dispatcher, n, caller=caller).result(PATIENCE) == n

        threads = [threading.Thread(target=loop, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    later = policy.sizes[len(policy.sizes) // 2 :]
    return np.median(later)


# Contexts, and checks ---------------------------------------------------------------------------


def test_a_function_is_told_of_each_call_and_not_of_padding():
    def answer(batch, contexts):
        return [
            f"{n} of {who.client_id}, {len(contexts)} in {len(batch)}"
            for n, who in zip(batch, contexts, strict=False)
        ] + [None] * (len(batch) - len(contexts))

    policy = Policy(answer)
    with batching(
        policy,
        settings=Batching(max_size=4, max_delay=0.2),
        told=True,
    ) as dispatcher:
        futures = [ask(dispatcher, n, caller=caller_named(f"c{n}")) for n in range(3)]
        assert results(futures) == [f"{n} of c{n}, 3 in 4" for n in range(3)]


class Superstitious(Checks):
    """Refuses 13, and what comes of 11."""

    def __init__(self):
        super().__init__("policy", PolicyContract(), "all", WeakKeyDictionary())

    def check_payload(self, call, payload):
        if payload == 13:
            raise Malformed("13 is no observation")

    def check_result(self, call, result):
        if result == 22:
            raise ValueError("22 is no action")


def test_a_payload_that_is_refused_is_its_callers_alone():
    policy = Policy()
    with batching(policy, checks=Superstitious()) as dispatcher:
        with busy(dispatcher, policy):
            futures = [ask(dispatcher, n) for n in (12, 13, 14)]
        assert futures[0].result(PATIENCE) == 24
        assert futures[2].result(PATIENCE) == 28
        with pytest.raises(Malformed, match="13 is no observation"):
            futures[1].result(PATIENCE)
        assert dispatcher.waiting == 0
    assert policy.batches[1].tolist() == [12, 14]


def test_a_row_of_a_result_that_does_not_fit_is_its_callers_alone():
    policy = Policy()
    with batching(policy, checks=Superstitious()) as dispatcher:
        with busy(dispatcher, policy):
            futures = [ask(dispatcher, n) for n in (10, 11, 12)]
        assert futures[0].result(PATIENCE) == 20
        assert futures[2].result(PATIENCE) == 24
        with pytest.raises(RemoteError, match="22 is no action"):
            futures[1].result(PATIENCE)


# What goes wrong --------------------------------------------------------------------------------


def test_of_a_batch_that_fails_the_culprit_alone_gets_the_error():
    def answer(batch):
        if 13 in batch:
            raise ZeroDivisionError("thirteen")
        return batch * 2

    policy = Policy(answer)
    with batching(policy, settings=Batching(max_size=16)) as dispatcher:
        with busy(dispatcher, policy):
            futures = [ask(dispatcher, n) for n in range(1, 17)]
        for n, future in enumerate(futures, 1):
            if n == 13:
                with pytest.raises(RemoteError, match="thirteen") as raised:
                    future.result(PATIENCE)
                assert raised.value.type_name == "ZeroDivisionError"
                assert "in answer" in raised.value.traceback
            else:
                assert future.result(PATIENCE) == 2 * n
    assert len(policy.batches) == 2 + 2 * 4  # the first two, and two halves four times
    assert set(policy.sizes) <= {1, 2, 4, 8, 16}


def test_a_function_that_always_fails_fails_each_call_and_the_next_is_served():
    policy = Policy(lambda batch: 1 / 0)
    with batching(policy) as dispatcher:
        futures = [ask(dispatcher, n) for n in range(8)]
        for future in futures:
            with pytest.raises(RemoteError, match="division by zero") as caught:
                future.result(PATIENCE)
            # Told once, though it failed in each half that was tried.
            assert caught.value.traceback.count("ZeroDivisionError") == 1
        policy.answer = lambda batch: batch
        assert ask(dispatcher, 5).result(PATIENCE) == 5


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda batch: batch[1:], "the first axis must have the length"),
        (lambda batch: {"a": np.zeros((len(batch) + 1, 3))}, r"result\['a'\] has the shape"),
        (lambda batch: [1], "a list of 1"),
        (lambda batch: None, "result is None"),
        (lambda batch: {"a": 1.0}, r"result\['a'\] is 1.0"),
    ],
)
def test_a_result_that_is_no_batch_is_told_to_all_and_runs_once(answer, text):
    policy = Policy(answer)
    with batching(policy) as dispatcher:
        policy.held = True
        ask(dispatcher, 0)
        policy.entered.get(timeout=PATIENCE)
        futures = [ask(dispatcher, n) for n in range(1, 4)]
        policy.held = False
        policy.go_on.release()
        for future in futures:
            with pytest.raises(RemoteError, match=text):
                future.result(PATIENCE)
    assert policy.sizes == [1, 3]


def test_a_row_that_can_not_be_carried_is_its_callers_alone():
    class Picky(LocalCall):
        __slots__ = ()

        def _send(self, value):
            raise NotEncodable("not this")

    policy = Policy()
    with batching(policy) as dispatcher:
        with busy(dispatcher, policy):
            good = ask(dispatcher, 1)
            picky = Picky("policy", 2, caller=caller_named("picky"))
            dispatcher.submit(picky)
        assert good.result(PATIENCE) == 2
        with pytest.raises(RemoteError, match="not this"):
            picky.future.result(PATIENCE)


def test_calls_whose_deadline_has_passed_cost_nothing():
    policy = Policy()
    with batching(policy) as dispatcher:
        greedy = caller_named("greedy")
        with busy(dispatcher, policy):
            late = [ask(dispatcher, n, timeout=0.01) for n in (7, 8)]
            late += [ask(dispatcher, n, timeout=0.01, caller=greedy) for n in (9, 10)]
            good = [ask(dispatcher, n) for n in (1, 2)]
            time.sleep(0.05)  # until they are late
        assert results(good) == [2, 4]
        for future in late:
            with pytest.raises(DeadlineExceeded):
                future.result(PATIENCE)
        assert dispatcher.waiting == 0
        assert dispatcher.counts["DeadlineExceeded"] == 4
        assert ask(dispatcher, 3, caller=greedy).result(PATIENCE) == 6
    assert policy.batches[1].tolist() == [1, 2]


def test_a_batch_of_which_all_are_late_does_not_run():
    policy = Policy()
    with batching(policy) as dispatcher:
        with busy(dispatcher, policy):
            late = ask(dispatcher, 7, timeout=0.01)
            time.sleep(0.05)
        with pytest.raises(DeadlineExceeded):
            late.result(PATIENCE)
    assert policy.sizes == [1]


def test_calls_that_wait_are_counted_bounded_and_refused_at_the_end():
    policy = Policy()
    with batching(policy) as dispatcher:
        policy.held = True
        first = ask(dispatcher, 0)
        policy.entered.get(timeout=PATIENCE)
        greedy = [ask(dispatcher, n, caller=caller_named("greedy")) for n in range(4096)]
        with pytest.raises(Overloaded, match=r"calls waiting already: 4096, .* of this client"):
            ask(dispatcher, 1, caller=caller_named("greedy")).result(PATIENCE)
        others = [ask(dispatcher, n, caller=caller_named(str(n % 7))) for n in range(3 * 4096)]
        waiting = [*greedy, *others]
        assert dispatcher.waiting == len(waiting) == 1 << 14
        with pytest.raises(Overloaded, match=r"calls waiting already: 16384, .* of all clients"):
            ask(dispatcher, 1).result(PATIENCE)
        closing = threading.Thread(target=dispatcher.close)
        closing.start()
        for future in waiting:
            with pytest.raises(Closed):
                future.result(PATIENCE)
        policy.go_on.release()
        closing.join(PATIENCE)
        assert first.result(PATIENCE) == 0  # a batch that has begun is answered
        with pytest.raises(Closed):
            ask(dispatcher, 1).result(PATIENCE)


def test_a_rate_limit_holds_for_batches_too():
    policy = Policy()
    with batching(policy, rate_limit=20.0) as dispatcher:
        caller = caller_named("fast")
        with took(at_most=5.0, at_least=0.2):
            assert results([ask(dispatcher, n, caller=caller) for n in range(6)]) == [
                2 * n for n in range(6)
            ]
        assert dispatcher.waiting == 0


def test_with_several_workers_one_batch_runs_at_a_time():
    running, most = [], []

    def answer(batch):
        running.append(1)
        most.append(len(running))
        time.sleep(0.002)
        running.pop()
        return batch

    with batching(answer, workers=4) as dispatcher:
        futures = [ask(dispatcher, n) for n in range(200)]
        assert results(futures) == list(range(200))
    assert max(most) == 1


def test_many_threads_that_call_get_their_own_answers():
    policy = Policy(answer=lambda batch: {"twice": batch["x"] * 2, "name": batch["name"]})
    with batching(policy, settings=Batching(max_size=8)) as dispatcher:
        wrong = []

        def loop(n):
            for i in range(200):
                x = np.full(5 + i % 3, 1000 * n + i)
                result = ask(dispatcher, {"x": x, "name": f"{n}/{i}"}).result(PATIENCE)
                if result["name"] != f"{n}/{i}" or not np.array_equal(result["twice"], 2 * x):
                    wrong.append((n, i))

        threads = [threading.Thread(target=loop, args=(n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        wait_until(lambda: dispatcher.waiting == 0)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_size": 0}, "max_size must be 1 to"),
        ({"max_size": 2.5}, "max_size must be"),
        ({"max_delay": -1.0}, "max_delay must be 0 or more"),
        ({"max_delay": float("nan")}, "max_delay"),
        ({"sizes": "pow3"}, 'sizes is "pow2", "any"'),
        ({"sizes": [1, 64]}, "sizes must be 1 to max_size, 32"),
        ({"sizes": [1, 8]}, "has no 32, which is max_size"),
        ({"sizes": []}, "has no 32"),
        ({"sizes": [0, 32]}, "sizes must be 1 to"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        Batching(**settings)


# More than can be answered --------------------------------------------------------------------


class Clock:
    """Stands still but for what is told to take time."""

    def __init__(self, monkeypatch) -> None:
        self.now = time.monotonic()
        for module in ("core.call", "core.dispatch", "services.batching.batcher"):
            monkeypatch.setattr(f"edgeml.{module}.time", self)

    def monotonic(self) -> float:
        return self.now


@contextmanager
def batches_of_20_ms(monkeypatch, **settings):
    """Serve two calls at a time, each batch taking 20 ms, as is known."""
    clock, policy = Clock(monkeypatch), Policy()

    def work(batch):
        clock.now += 0.02
        return batch * 2

    policy.answer = work
    two = Batching(max_size=2, sizes="any")
    with batching(policy, settings=two, **settings) as dispatcher:
        for n in range(6):
            ask(dispatcher, n).result(PATIENCE)
            policy.entered.get(timeout=PATIENCE)
        policy.batches.clear()
        yield clock, policy, dispatcher


def test_a_batch_is_filled_with_calls_that_can_make_it(monkeypatch):
    with batches_of_20_ms(monkeypatch) as (clock, policy, dispatcher):
        with busy(dispatcher, policy):
            short = [ask(dispatcher, n, timeout=0.1) for n in (1, 2, 3)]
            long = [ask(dispatcher, n, timeout=10) for n in (4, 5, 6)]
            clock.now += 0.07  # and 20 ms more until the batch has run
        for future in short:
            with pytest.raises(Overloaded, match="'policy' takes 20 ms of late"):
                future.result(PATIENCE)
        assert results(long) == [8, 10, 12]
        assert sorted(policy.sizes) == [1, 1, 2]
        assert dispatcher.counts["refused_too_busy"] == 3


def test_calls_that_come_after_too_many_batches_are_refused_at_once(monkeypatch):
    with batches_of_20_ms(monkeypatch) as (_, policy, dispatcher):
        with busy(dispatcher, policy):
            futures = [ask(dispatcher, n, timeout=0.1) for n in range(1, 20)]
            refused = [future for future in futures if future.done()]
            assert futures[-len(refused) :] == refused
            for future in refused:
                with pytest.raises(Overloaded, match="ask less often"):
                    future.result(0)
            assert dispatcher.waiting == len(futures) - len(refused)
        kept = futures[: -len(refused)]
        assert 4 <= len(kept) <= 8
        assert results(kept) == [2 * n for n in range(1, len(kept) + 1)]
        assert dispatcher.counts["answered_too_late"] == 0


def test_who_was_answered_longer_ago_takes_the_place_of_who_was_answered_since(monkeypatch):
    with batches_of_20_ms(monkeypatch) as (_, policy, dispatcher):
        patient, *others = [caller_named(f"c{n}") for n in range(12)]
        for n, caller in enumerate([patient, *others], 1):
            ask(dispatcher, n, caller=caller).result(PATIENCE)
        policy.entered = queue.SimpleQueue()
        with busy(dispatcher, policy):
            futures = [ask(dispatcher, 1, 0.1, caller) for caller in others]
            kept = [future for future in futures if not future.done()]
            assert kept != futures
            last = ask(dispatcher, 7, 0.1, patient)
            assert not last.done()
            assert [future.done() for future in kept].count(True) == 1
        assert last.result(PATIENCE) == 14


def test_a_clients_newest_call_is_in_the_batch_where_that_is_wanted(monkeypatch):
    with batches_of_20_ms(monkeypatch, newest_first=True) as (_, policy, dispatcher):
        robot = caller_named("robot")
        with busy(dispatcher, policy):
            late = ask(dispatcher, 9, timeout=0.001)
            older = [ask(dispatcher, n, 0.5, robot) for n in (1, 2, 3)]
        assert late.exception(PATIENCE)
        assert [f.exception(PATIENCE).__class__ for f in older[:2]] == [Overloaded] * 2
        assert older[2].result(PATIENCE) == 6
        assert dispatcher.counts["refused_overtaken"] == 2
        assert dispatcher.waiting == 0
