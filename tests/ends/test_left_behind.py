"""What a user gave that never returns is told of, with where it is, and holds up nothing."""

import logging
import threading

import pytest

from edgeml import ActionClient, ActionConfig, ActionServer, InferenceClient, InferenceServer
from edgeml.testing.stopwatch import Stopwatch
from pairs import no_thread_left, started, took, wait_until

WORKERS = 4


@pytest.fixture
def free():
    """Lets those who wait for ever go, at the end of the test."""
    event = threading.Event()
    with no_thread_left():
        yield event
        event.set()


def told(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "left behind" in r.getMessage()]


def test_handlers_that_never_return_are_told_of_and_hold_up_stop_once(transport, free, caplog):
    """Two seconds for all of them, not for each."""
    inside = threading.Semaphore(0)

    def wait_for_ever(payload):
        inside.release()
        free.wait()

    server = InferenceServer(0, transport=transport, workers=WORKERS)
    server.register_interface("stuck", wait_for_ever)
    with started(server), InferenceClient(url=server.url, label="arm") as client:
        futures = [client.call_async("stuck", n) for n in range(WORKERS)]
        for _ in futures:
            assert inside.acquire(timeout=20)
        with caplog.at_level(logging.WARNING), took(at_most=3.0, at_least=1.9):
            server.stop()
    lines = told(caplog)
    assert len(lines) == WORKERS
    for line in lines:
        assert "'stuck', called by" in line
        assert "in wait_for_ever" in line
        assert "free.wait()" in line


def test_a_subscribers_function_that_never_returns_is_told_of(transport, free, caplog):
    inside = threading.Event()

    def wait_for_ever(value):
        inside.set()
        free.wait()

    config = ActionConfig(0, [], ["cam"], transport=transport)
    with started(ActionServer(config, lambda keys: {"cam": 0}, lambda key, value: {})) as server:
        client = ActionClient(None, config=config, url=server.url)
        client.register_obs_callback(wait_for_ever)
        wait_until(lambda: server.publish_obs({"cam": 1}) is None or inside.is_set())
        watch = Stopwatch()
        with caplog.at_level(logging.WARNING):
            client.stop()
        assert watch.seconds < 3.0
    (line,) = told(caplog)
    assert "the subscriber's function for 'observations'" in line
    assert "in wait_for_ever" in line


def test_sys_exit_in_a_subscribers_function_ends_nothing_and_is_told(transport, caplog):
    came = []

    def leave(value):
        came.append(value)
        raise SystemExit(5)

    config = ActionConfig(0, [], ["cam"], transport=transport)
    with (
        started(ActionServer(config, lambda keys: {"cam": 0}, lambda key, value: {})) as server,
        ActionClient(None, config=config, url=server.url) as client,
    ):
        subscription = client.register_obs_callback(leave)
        wait_until(lambda: server.publish_obs({"cam": 1}) is None or len(came) >= 3)
        assert subscription.errors >= 2
    assert "SystemExit: 5" in caplog.text
