"""Forked children can go on with all that has a lock, whoever held it."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from edgeml.data import Mixture, QueuedDataStore, RateLimiter, ReplayBuffer, locks
from edgeml.data.locks import make_lock, sort_locks
from test_replay import episode, wait_for

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks")


def run_in_child(work: Callable[[], object]) -> None:
    """Run something in a forked child, which has to end well."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(wait_for(child)) == 0


def test_a_fork_amid_what_holds_a_lock() -> None:
    """A thread that forks while it has a lock has it in the child too, and gives it back."""
    store = QueuedDataStore(5)

    def use() -> None:
        store.insert(1)
        store.lock.release()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(store.insert, 2).result(timeout=10)
        store.lock.acquire()

    with store.lock:
        run_in_child(use)
    assert len(store) == 0
    with ThreadPoolExecutor(1) as pool:  # nor has the parent's thread kept it
        pool.submit(store.insert, 1).result(timeout=10)


def test_locks_that_others_take_in_another_order() -> None:
    """No fork waits for somebody who waits for a lock that the fork has taken already."""
    stores = [ReplayBuffer(5) for _ in range(3)]
    ordered = sort_locks(store.lock for store in stores)
    ended = threading.Event()

    def take() -> None:
        while not ended.is_set():
            with ordered[2], ordered[1], ordered[0]:
                ended.wait(0.002)
            ended.wait(0.001)

    with ThreadPoolExecutor(2) as pool:
        takers = [pool.submit(take) for _ in range(2)]
        try:
            for _ in range(20):
                run_in_child(lambda: [len(store) for store in stores])
        finally:
            ended.set()
        for taker in takers:
            taker.result(timeout=30)


def test_what_is_made_of_stores_and_what_keeps_the_pace() -> None:
    store, limiter = ReplayBuffer(20), RateLimiter(4, slack=10)
    store.batch_insert(episode(9))
    mixture = Mixture([(store, 1), (store, 2)])
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            mixture.sample(5)
            limiter.inserted()
            limiter.sampled()

    def use() -> None:
        mixture.sample(5)
        limiter.inserted(1000)
        limiter.await_sample(timeout=5)

    with ThreadPoolExecutor(2) as pool:
        threads = [pool.submit(work) for _ in range(2)]
        try:
            for _ in range(20):
                run_in_child(use)
        finally:
            ended.set()
        for thread in threads:
            thread.result(timeout=30)


def test_a_lock_that_is_held_for_too_long_delays_a_fork_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "_ALL", 0.2)
    lock, held, enough = make_lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            enough.wait(30)

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(hold)
        assert held.wait(10)

        def use() -> None:
            assert lock.acquire(timeout=20)

        run_in_child(use)
        enough.set()
        holding.result(timeout=10)
    assert "may be half changed" in caplog.text
    assert lock.acquire(timeout=20)
    lock.release()


def test_locks_are_forgotten_with_their_owners() -> None:
    gc.collect()  # those of earlier tests, which could go in the midst
    before = len(locks._locks)
    stores = [ReplayBuffer(5) for _ in range(50)]
    assert len(locks._locks) >= before + 50
    del stores
    assert len(locks._locks) < before + 50
