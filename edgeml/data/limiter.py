"""Keeps learning and collecting in step: so many samples for each insert."""

from __future__ import annotations

import threading
from collections.abc import Callable

from edgeml.core.errors import Closed, DeadlineExceeded
from edgeml.data.locks import make_lock

__all__ = ["RateLimiter"]


class RateLimiter:
    """Holds the ratio of samples to inserts, by making whoever is ahead wait.

    Both sides are counted by whoever does the work, or told of by totals from the other process.
    The learner may sample while ``samples <= (inserts - min_inserts) * samples_per_insert``; an
    actor may insert while it is at most ``slack`` inserts ahead of what the samples so far have
    used up, ``min_inserts + samples / samples_per_insert``. (Reverb's SampleToInsertRatio, with
    all of its error buffer on the actor's side.)

    In the learner, which sends ``limiter.samples`` along with the weights::

        limiter = RateLimiter(samples_per_insert=4, min_inserts=1000, slack=200)

        def on_upload():  # called in the server's thread
            limiter.advance_to(inserts=store.latest_data_id())

        while True:
            limiter.await_sample(timeout=60)
            update(store.sample(256))
            limiter.sampled()

    In an actor in another process::

        limiter = RateLimiter(samples_per_insert=4, min_inserts=1000, slack=200)

        def on_weights(weights, samples):  # called in the thread that receives
            limiter.advance_to(samples=samples)

        while True:
            limiter.await_insert(timeout=60)
            store.insert(act())
            limiter.inserted()

    Each of N actors alike gives N times the ratio, and an Nth of ``min_inserts`` and ``slack``:
    it counts its own inserts only.

    Args:
        samples_per_insert: how often each item is used on average; a sample is what you count as
            one, such as an update.
        min_inserts: how many items come before the first sample (default 1).
        slack: in inserts (default 1000); at least ``1 + 1 / samples_per_insert``, and more by
            what an actor keeps between uploads, or both sides could wait for each other.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self, samples_per_insert: float, min_inserts: int = 1, *, slack: float = 1000.0
    ) -> None:
        if samples_per_insert <= 0 or min_inserts < 0:
            raise ValueError("samples_per_insert must be above 0, and min_inserts not below it")
        if slack < 1 + 1 / samples_per_insert:
            raise ValueError(f"slack must be at least 1 + 1 / samples_per_insert, got {slack}")
        self._ratio = samples_per_insert
        self._min_inserts = min_inserts
        self._slack = slack
        self._inserts = 0
        self._samples = 0
        self._closed = False
        self._changed = threading.Condition(make_lock())

    @property
    def inserts(self) -> int:
        """How many inserts have been counted."""
        return self._inserts

    @property
    def samples(self) -> int:
        """How many samples have been counted."""
        return self._samples

    def inserted(self, n: int = 1) -> None:
        """Count n more inserts."""
        with self._changed:
            self._inserts += n
            self._changed.notify_all()

    def sampled(self, n: int = 1) -> None:
        """Count n more samples."""
        with self._changed:
            self._samples += n
            self._changed.notify_all()

    def advance_to(self, *, inserts: int = 0, samples: int = 0) -> None:
        """Raise the counts to totals told by the other process; lower ones are old news."""
        with self._changed:
            self._inserts = max(self._inserts, inserts)
            self._samples = max(self._samples, samples)
            self._changed.notify_all()

    def await_sample(self, n: int = 1, *, timeout: float) -> None:
        """Block until n more samples would not run ahead of the inserts; counts nothing.

        Raises:
            DeadlineExceeded: not within ``timeout`` seconds.
            Closed: the limiter is closed.
        """
        self._await(
            lambda: self._samples + n <= (self._inserts - self._min_inserts) * self._ratio,
            timeout,
        )

    def await_insert(self, n: int = 1, *, timeout: float) -> None:
        """Block until n more inserts would not run ahead of the samples; counts nothing.

        Raises:
            DeadlineExceeded: not within ``timeout`` seconds.
            Closed: the limiter is closed.
        """
        self._await(
            lambda: (
                self._inserts + n <= self._min_inserts + self._samples / self._ratio + self._slack
            ),
            timeout,
        )

    def close(self) -> None:
        """Wake everybody who waits, now and later, with Closed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _await(self, allowed: Callable[[], bool], timeout: float) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or allowed(), timeout):
                raise DeadlineExceeded(
                    f"not within {timeout} s, at {self._inserts} inserts and "
                    f"{self._samples} samples"
                )
            if self._closed:
                raise Closed("the rate limiter is closed")
