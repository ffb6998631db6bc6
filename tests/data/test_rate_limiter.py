"""The rate limiter keeps samples and inserts in step, and says so when it can't."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from edgeml.core.errors import Closed, DeadlineExceeded
from edgeml.data import RateLimiter


def may(await_turn: object, n: int = 1) -> bool:
    try:
        await_turn(n, timeout=0)  # type: ignore[operator]
    except DeadlineExceeded:
        return False
    return True


def test_samples_follow_inserts() -> None:
    limiter = RateLimiter(samples_per_insert=2, min_inserts=10)
    limiter.inserted(10)
    assert not may(limiter.await_sample)
    limiter.inserted(3)
    for _ in range(6):
        assert may(limiter.await_sample)
        limiter.sampled()
    assert not may(limiter.await_sample)
    limiter.inserted()
    assert may(limiter.await_sample, 2)
    assert not may(limiter.await_sample, 3)
    assert (limiter.inserts, limiter.samples) == (14, 6)


def test_inserts_wait_for_samples() -> None:
    limiter = RateLimiter(samples_per_insert=0.5, min_inserts=10, slack=4)
    for _ in range(14):
        assert may(limiter.await_insert)
        limiter.inserted()
    assert not may(limiter.await_insert)
    limiter.sampled()
    assert may(limiter.await_insert, 2)
    assert not may(limiter.await_insert, 3)


def test_totals_only_rise() -> None:
    limiter = RateLimiter(samples_per_insert=1)
    limiter.advance_to(inserts=5)
    limiter.advance_to(samples=3)
    limiter.advance_to(inserts=4, samples=2)
    assert (limiter.inserts, limiter.samples) == (5, 3)


@pytest.mark.parametrize("ratio", [0.3, 1.0, 4.0])
def test_two_sides_in_step(ratio: float) -> None:
    min_inserts, slack, steps = 3, 1 + 1 / ratio, 200
    limiter = RateLimiter(ratio, min_inserts, slack=slack)

    def learn() -> None:
        for i in range(int(steps * ratio)):
            limiter.await_sample(timeout=30)
            assert i + 1 <= (limiter.inserts - min_inserts) * ratio
            limiter.sampled()

    def act() -> None:
        for i in range(steps + min_inserts + 1):
            limiter.await_insert(timeout=30)
            assert i + 1 <= min_inserts + limiter.samples / ratio + slack
            limiter.inserted()

    with ThreadPoolExecutor(2) as pool:
        for task in [pool.submit(learn), pool.submit(act)]:
            task.result(timeout=60)


@pytest.mark.parametrize("method", ["await_sample", "await_insert"])
def test_waiting_ends_with_its_timeout(method: str) -> None:
    limiter = RateLimiter(samples_per_insert=1, slack=2)
    limiter.advance_to(inserts=3 if method == "await_insert" else 1)
    with pytest.raises(DeadlineExceeded, match=r"0\.01 s, at"):
        getattr(limiter, method)(timeout=0.01)


def test_closing_wakes_who_waits() -> None:
    limiter = RateLimiter(samples_per_insert=1, slack=2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(limiter.await_sample, timeout=30)
        limiter.close()
        with pytest.raises(Closed):
            waiting.result(timeout=30)
    with pytest.raises(Closed):
        limiter.await_insert(timeout=30)


@pytest.mark.parametrize(
    ("ratio", "min_inserts", "slack"), [(0, 1, 10), (-1, 1, 10), (1, -1, 10), (1, 1, 1.9)]
)
def test_what_could_never_work_is_refused(ratio: float, min_inserts: int, slack: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        RateLimiter(ratio, min_inserts, slack=slack)
