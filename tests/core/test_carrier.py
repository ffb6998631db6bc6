"""Who runs a loop: its own thread, or those that come to carry it."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from edgeml.core.carrier import Carrier, Left
from pairs import no_thread_left, took, wait_until

PATIENCE = 20.0


class Loop:
    """A loop whose rounds each call one function, with its carrier."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.ends: list[threading.Thread] = []
        self.over = False
        self.carrier = Carrier("edgeml test loop", self._rounds, self._wake, self._end)

    def _wake(self) -> None:
        self.inbox.put(None)

    def _end(self) -> None:
        self.ends.append(threading.current_thread())

    def _rounds(self, stay) -> bool:
        waiting = stay()
        while not self.over:
            try:
                request = self.inbox.get(waiting)
            except queue.Empty:
                break
            if request is not None:
                request()
            if waiting and not stay():
                break
        return self.over

    def do(self, function=lambda: None) -> queue.SimpleQueue:
        """Call a function in a round; gives the thread that it ran in."""
        ran: queue.SimpleQueue = queue.SimpleQueue()

        def call() -> None:
            try:
                function()
            finally:
                ran.put(threading.current_thread())

        self.inbox.put(call)
        return ran

    def where(self) -> threading.Thread:
        """The thread that runs the loop now."""
        return self.do().get(timeout=PATIENCE)

    def stop(self) -> None:
        self.over = True
        if not self.carrier.in_round:
            self.carrier.relieve()
        self.carrier.wake()

    def close(self) -> None:
        self.stop()
        assert self.carrier.wait(PATIENCE)


@pytest.fixture
def loop():
    with no_thread_left():
        made = Loop()
        made.carrier.start()
        yield made
        made.close()


class Visitor:
    """A thread that carries a loop until told to leave it, and then is away until it comes back."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.staying = True
        self._orders: queue.SimpleQueue = queue.SimpleQueue()
        self._left: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while self._orders.get():
            try:
                self._left.put(self.loop.carrier.carry(lambda: self.staying))
            except BaseException as error:
                self._left.put(error)

    def come(self) -> None:
        self.staying = True
        self._orders.put(True)

    def leave(self):
        """Leave the loop, and return what `carry` gave or raised."""
        self.staying = False
        self.loop.carrier.wake()
        return self.left()

    def left(self):
        return self._left.get(timeout=PATIENCE)

    def has(self) -> bool:
        """Whether it runs the loop."""
        return self.loop.where() is self.thread

    def __enter__(self):
        self.come()
        wait_until(self.has)
        return self

    def __exit__(self, *_) -> None:
        self.staying = False
        self._orders.put(False)
        while self.thread.is_alive():
            self.loop.carrier.wake()
            self.loop.carrier.relieve()
            self.thread.join(0.01)


def test_a_loop_runs_in_its_own_thread_until_somebody_comes():
    with no_thread_left():
        loop = Loop()
        done = loop.do()
        time.sleep(0.02)
        assert done.empty(), "it runs before it is started"
        loop.carrier.start()
        own = done.get(timeout=PATIENCE)
        assert own.name == "edgeml test loop"
        assert own.daemon
        loop.carrier.start()  # changes nothing
        assert loop.where() is own
        loop.close()
        assert loop.ends == [own]


def test_a_visitor_has_the_loop_until_it_is_relieved(loop):
    own = loop.where()
    with Visitor(loop) as visitor:
        assert visitor.leave() is True
        ran = loop.do()
        with pytest.raises(queue.Empty):
            ran.get(timeout=0.05)  # the loop waits for its carrier
        visitor.come()
        assert ran.get(timeout=PATIENCE) is visitor.thread
        visitor.leave()
        loop.carrier.relieve()
        assert loop.where() is own
        visitor.come()
        wait_until(visitor.has)


def test_a_visitor_in_a_round_is_not_relieved(loop):
    with Visitor(loop) as visitor:
        for _ in range(20):
            loop.carrier.relieve()
            assert visitor.has()


def test_one_who_does_not_stay_makes_one_round_that_waits_for_nothing(loop):
    with Visitor(loop) as visitor:
        visitor.leave()
        seen: list[int] = []
        for n in range(3):
            loop.inbox.put(lambda n=n: seen.append(n))
        visitor._orders.put(True)
        assert visitor.left() is True
        assert seen == [0, 1, 2]
        with took(at_most=5.0):
            visitor._orders.put(True)
            assert visitor.left() is True


def test_one_who_does_not_stay_does_not_wait_for_a_loop_that_another_has(loop):
    own = loop.where()
    with took(at_most=5.0):
        assert loop.carrier.carry(lambda: False)
    assert loop.where() is own
    assert not loop.carrier.here


def test_here_and_in_round_are_for_those_who_have_the_loop(loop):
    seen = []

    def look():
        seen.append((loop.carrier.here, loop.carrier.in_round))

    loop.do(look).get(timeout=PATIENCE)
    with Visitor(loop):
        loop.do(look).get(timeout=PATIENCE)
        look()
    assert seen == [(True, True), (True, True), (False, False)]
    loop.carrier.carry(lambda: False)
    while not loop.carrier.here:  # its own thread has it until it is asked to give it up
        rounds = iter([True, True])
        loop.inbox.put(None)
        loop.carrier.carry(lambda rounds=rounds: next(rounds, False))
    assert not loop.carrier.in_round  # between two rounds
    loop.carrier.relieve()
    assert not loop.carrier.here


def test_wake_has_who_waits_look_up(loop):
    with Visitor(loop) as visitor:
        visitor.staying = False
        with took(at_most=5.0):
            loop.carrier.wake()
            assert visitor.left() is True


def test_rouse_has_the_loop_take_up_what_it_was_given_although_its_carrier_is_away(loop):
    own = loop.where()
    with Visitor(loop) as visitor:
        loop.carrier.rouse()
        assert visitor.has()
        visitor.leave()
        ran = loop.do()
        loop.carrier.rouse()
        assert ran.get(timeout=PATIENCE) is own


def test_visitors_have_the_loop_one_after_another(loop):
    with Visitor(loop) as second:
        second.leave()
        with Visitor(loop) as first:
            second.come()
            assert first.has()
            assert first.leave() is True
            wait_until(second.has)
            first.come()
            assert second.leave() is True
            wait_until(first.has)


def test_many_come_and_go_and_every_round_is_made_once(loop):
    seen: list[int] = []
    done = threading.Event()

    def visit(n):
        rounds = 0
        while not done.is_set():
            rounds += 1
            loop.carrier.carry(lambda: not done.is_set() and len(seen) % 7 != n)
            if rounds % 3 == n % 3:
                loop.carrier.relieve()

    def disturb():
        while not done.is_set():
            loop.carrier.relieve()
            loop.carrier.rouse()
            loop.carrier.wake()
            done.wait(1e-4)

    with ThreadPoolExecutor(4) as pool:
        visiting = [pool.submit(visit, n) for n in range(3)] + [pool.submit(disturb)]
        try:
            for n in range(500):
                loop.inbox.put(lambda n=n: seen.append(n))
                if n % 50 == 49:
                    wait_until(lambda n=n: len(seen) == n + 1)
        finally:
            done.set()
            while not all(each.done() for each in visiting):
                loop.carrier.relieve()
                loop.carrier.wake()
                time.sleep(0.001)
        for each in visiting:
            each.result(PATIENCE)
    assert seen == list(range(500))


# What goes wrong in a round -------------------------------------------------------------------


class Bad(BaseException):
    """Neither an error nor Ctrl-C."""


def fail(error):
    raise error


@pytest.mark.parametrize("error", [OSError("no memory"), SystemExit(3), KeyboardInterrupt(), Bad()])
def test_whatever_a_round_raises_in_its_own_thread_the_loop_goes_on(loop, caplog, error):
    own = loop.where()
    loop.do(lambda: fail(error)).get(timeout=PATIENCE)
    assert loop.where() is own
    assert "edgeml test loop: the loop failed, and goes on" in caplog.text


def test_a_loop_goes_on_where_there_is_no_memory_to_say_that_it_failed(loop, monkeypatch):
    def fail(*arguments):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("edgeml.core.carrier._log.exception", fail)
        for _ in range(3):
            loop.do(fail).get(timeout=PATIENCE)
    assert loop.do().get(timeout=PATIENCE).name == "edgeml test loop"


@pytest.mark.parametrize("visited", [False, True])
def test_a_loop_whose_rounds_all_fail_keeps_no_core_busy_and_goes_on_when_they_can(
    monkeypatch, caplog, visited
):
    """As at the limit of open files."""
    tried = []
    broken = threading.Event()
    broken.set()
    over = threading.Event()

    def rounds(stay):
        tried.append(1)
        if broken.is_set():
            raise OSError(24, "Too many open files")
        over.wait(PATIENCE)
        return True

    carrier = Carrier("edgeml broken loop", rounds, over.set, lambda: None)
    carrier.start()
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        if visited:
            carrier.carry(lambda: time.monotonic() < deadline)
        else:
            threading.Event().wait(0.1)
    assert 3 < len(tried) < 50
    assert 2 <= caplog.text.count("the loop failed, and goes on") < 8
    broken.clear()
    over.set()
    carrier.relieve()
    assert carrier.wait(PATIENCE)


def test_a_loop_that_can_have_no_other_thread_stays_with_the_one_that_is_stuck(loop, monkeypatch):
    """Which cannot be helped; but it goes on as soon as that is free."""

    def no_more_threads(thread):
        raise RuntimeError("can't start new thread")

    def strand():
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", no_more_threads)
            loop.carrier.strand()

    first = loop.do(strand).get(timeout=PATIENCE)
    assert loop.do().get(timeout=PATIENCE) is first


def test_an_error_in_a_visitors_round_is_logged_as_in_the_loops_own_thread(loop, caplog):
    with Visitor(loop) as visitor:
        loop.do(lambda: fail(OSError("no memory"))).get(timeout=PATIENCE)
        assert visitor.left() is True
        assert "edgeml test loop: the loop failed, and goes on" in caplog.text
        visitor.come()
        assert visitor.has()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), Bad()])
def test_ctrl_c_in_a_visitors_round_is_the_visitors_and_the_loop_goes_on(loop, error):
    own = loop.where()
    with Visitor(loop) as visitor:
        loop.do(lambda: fail(error)).get(timeout=PATIENCE)
        assert visitor.left() is error
        loop.carrier.relieve()
        assert loop.where() is own
        visitor.come()  # it may come back, too
        wait_until(visitor.has)


def test_ctrl_c_just_before_a_round_leaves_the_loop_to_others(loop):
    class Interrupting:
        """A lock as which it is given back Ctrl-C comes, the n-th time."""

        def __init__(self, lock, n) -> None:
            self._lock = lock
            self._n = n

        def __enter__(self):
            self._lock.acquire()

        def __exit__(self, *_) -> None:
            self._lock.release()
            self._n -= 1
            if self._n == 0:
                raise KeyboardInterrupt

    own = loop.where()
    turn = loop.carrier.turn
    rounds = iter([True])
    loop.inbox.put(None)
    loop.carrier.turn = Interrupting(turn, 1)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.carrier.carry(lambda: next(rounds, False))
    finally:
        loop.carrier.turn = turn
    assert not loop.carrier.in_round
    loop.carrier.relieve()
    assert loop.where() is own


def test_what_takes_requests_may_raise_what_it_likes(loop, caplog):
    own = loop.where()
    for error in (ValueError("bad"), SystemExit(3), KeyboardInterrupt()):
        took_it = loop.do(lambda error=error: loop.carrier.hand_over(fail, error))
        assert took_it.get(timeout=PATIENCE) is own
        assert "on_request failed" in caplog.text
        assert "goes on" not in caplog.text
        caplog.clear()
    with Visitor(loop) as visitor:
        loop.do(lambda: loop.carrier.hand_over(fail, ValueError("bad"))).get(timeout=PATIENCE)
        assert "on_request failed" in caplog.text
        assert visitor.has()
        interrupt = KeyboardInterrupt()  # which is for whoever carries the loop
        loop.do(lambda: loop.carrier.hand_over(fail, interrupt)).get(timeout=PATIENCE)
        assert visitor.left() is interrupt


def test_a_thread_that_is_stuck_in_a_round_is_stranded_and_ends_when_it_comes_free(loop):
    own = loop.where()
    stuck, go_on = threading.Event(), threading.Event()

    def hang():
        stuck.set()
        assert go_on.wait(60)
        with loop.carrier.turn:
            if not loop.carrier.here:
                raise Left

    loop.do(hang)
    assert stuck.wait(PATIENCE)
    loop.carrier.strand()
    fresh = loop.where()
    assert fresh is not own
    go_on.set()
    own.join(PATIENCE)
    assert not own.is_alive()
    assert loop.where() is fresh
    with Visitor(loop) as visitor:
        loop.carrier.strand()  # a visitor is not left behind
        assert visitor.has()


# The end --------------------------------------------------------------------------------------


def test_the_end_is_made_once_in_the_thread_whose_round_was_the_last():
    with no_thread_left():
        for by in ("own", "visitor", "away"):
            loop = Loop()
            loop.carrier.start()
            own = loop.where()
            if by == "own":
                loop.close()
                assert loop.ends == [own]
            else:
                with Visitor(loop) as visitor:
                    if by == "away":
                        visitor.leave()
                    loop.close()
                    if by == "visitor":
                        assert visitor.left() is False
                assert loop.ends == [visitor.thread if by == "visitor" else own]
            assert loop.carrier.over
            assert loop.carrier.carry(lambda: True) is False
            assert loop.carrier.carry(lambda: False) is False
            loop.carrier.start()  # changes nothing
            loop.carrier.relieve()
            loop.carrier.wake()
            loop.carrier.rouse()
            loop.carrier.strand()
            assert loop.carrier.wait(0)
            assert len(loop.ends) == 1


def test_a_visitor_that_waits_for_the_loop_hears_of_its_end():
    with no_thread_left():
        loop = Loop()
        loop.carrier.start()
        stuck, go_on = threading.Event(), threading.Event()

        def hang():
            stuck.set()
            assert go_on.wait(60)
            loop.over = True

        loop.do(hang)
        assert stuck.wait(PATIENCE)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(loop.carrier.carry, lambda: True)
            go_on.set()
            assert waiting.result(PATIENCE) is False
        assert loop.carrier.wait(PATIENCE)
        assert len(loop.ends) == 1


def test_wait_says_whether_the_loop_is_over_and_does_not_wait_within_it(loop):
    with took(at_most=5.0, at_least=0.05):
        assert loop.carrier.wait(0.05) is False
    answers: list[bool] = []
    with took(at_most=5.0):
        loop.do(lambda: answers.append(loop.carrier.wait(60))).get(timeout=PATIENCE)
    assert answers == [False]


def test_wait_waits_until_the_end_is_done():
    with no_thread_left():
        ending, go_on = threading.Event(), threading.Event()
        over = threading.Event()

        def end():
            ending.set()
            assert go_on.wait(60)

        carrier = Carrier("edgeml test loop", lambda stay: over.wait(0.001), lambda: None, end)
        carrier.start()
        over.set()
        assert ending.wait(PATIENCE)
        assert carrier.over
        assert carrier.wait(0.05) is False
        go_on.set()
        assert carrier.wait(PATIENCE) is True


def test_an_end_that_fails_is_an_end():
    def end():
        raise OSError("no")

    loop = Loop()
    loop.over = True
    carrier = Carrier("edgeml test loop", lambda stay: True, lambda: None, end)
    with pytest.raises(OSError, match="no"):
        carrier.carry(lambda: True)
    assert carrier.over
    assert carrier.wait(0)


def test_what_is_abandoned_is_over_for_everybody(loop):
    other = Loop()
    other.carrier.abandon()
    assert other.carrier.over
    assert other.carrier.wait(0)
    assert other.carrier.carry(lambda: True) is False
    assert other.ends == []
