"""The thread of an RLDS logger: only the end of an episode waits for it, and nothing is lost."""

import errno
import gc
import logging
import os
import re
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeml.core.errors import Closed, DeadlineExceeded
from edgeml.data.rlds import RLDSLogger, read_episodes
from edgeml.data.rlds import values as values_module
from edgeml.data.rlds import writer as writer_module
from pairs import no_thread_left, process, run_fresh, threads, wait_until

SHAPE = (6, 5, 3)


def frame(i: int) -> np.ndarray:
    return np.full(SHAPE, i, np.uint8)


def step(log: RLDSLogger, i: int, **options: Any) -> None:
    log.log_step(np.float32(i), frame(i), float(i), **options)


def read(directory: Path) -> list[list[int]]:
    """For each episode what is in its frames, checked against actions and rewards."""
    episodes = []
    for episode in read_episodes(directory):
        steps = episode["steps"]
        numbers = [int(image.flat[0]) for image in steps["observation"]]
        assert steps["action"].tolist() == [*numbers[1:], 0]
        assert steps["reward"].tolist() == [*numbers[1:], 0]
        episodes.append(numbers)
    return episodes


class Gate:
    """Stands in the way of the encoder; counts who has come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.threads: list[threading.Thread] = []
        self.error: BaseException | None = None  # for those who get through
        encode = values_module.encode_image

        def wait(*arguments: Any) -> bytes:
            self.threads.append(threading.current_thread())
            assert self.open.wait(30)
            if self.error is not None:
                raise self.error
            return encode(*arguments)

        monkeypatch.setattr(values_module, "encode_image", wait)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open.set()


@contextmanager
def in_background(function: Any) -> Iterator[list[Any]]:
    """Call a function in a thread; gives a list that holds its error, or None, once it is over."""
    results: list[Any] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            results.append(error)
        else:
            results.append(None)

    thread = threading.Thread(target=run)
    thread.start()
    yield results
    thread.join(30)
    assert not thread.is_alive()


class TestTime:
    def test_steps_wait_for_no_encoder(self, tmp_path, gate):
        with RLDSLogger(tmp_path) as log:
            log.log_reset(frame(0))
            for i in range(1, 20):
                step(log, i)
            assert log.stats()["waiting_steps"] == 19
            assert log.stats()["waiting_bytes"] > 19 * frame(0).nbytes
            gate.open.set()
        assert threading.current_thread() not in gate.threads
        assert read(tmp_path) == [[*range(20)]]
        assert log.stats() == {"waiting_steps": 0, "waiting_bytes": 0, "waits": 0, "waited": 0}

    def test_arrays_may_be_changed_at_once(self, tmp_path, gate):
        observation, action = frame(0), np.zeros(3)
        with RLDSLogger(tmp_path) as log:
            log.log_reset(observation)
            for i in range(1, 4):
                observation[:], action[:] = i, i
                log.log_step(action, observation, 0.0)
            observation[:], action[:] = 99, 99
            gate.open.set()
        [episode] = read_episodes(tmp_path)
        assert episode["steps"]["observation"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
        assert episode["steps"]["action"][:, 0].tolist() == [1, 2, 3, 0]

    def test_transposed_images_are_copied_too(self, tmp_path):
        image = np.random.default_rng(0).integers(0, 256, (200, 300, 3)).astype(np.uint8)
        with RLDSLogger(tmp_path) as log:
            log.log_reset(image.transpose(1, 0, 2))
            log.log_step(0, image.transpose(1, 0, 2), 0.0)
        [episode] = read_episodes(tmp_path)
        assert np.array_equal(episode["steps"]["observation"][1], image.transpose(1, 0, 2))

    def test_the_end_of_an_episode_waits_until_it_is_on_the_disk(self, tmp_path, gate):
        log = RLDSLogger(tmp_path)
        log.log_reset(frame(0))
        step(log, 1)
        with in_background(lambda: step(log, 2, terminated=True)) as results:
            wait_until(lambda: log.stats()["waiting_steps"] == 2)
            assert not results
            gate.open.set()
        assert results == [None]
        assert log.episodes == 1
        assert read(tmp_path) == [[0, 1, 2]]
        log.close()

    def test_where_steps_come_too_fast_the_next_one_waits(self, tmp_path, gate, caplog):
        size = frame(0).nbytes + 12  # with a reward of 8 bytes and a discount of 4
        with RLDSLogger(tmp_path, max_waiting_bytes=3 * size + 20) as log:
            log.log_reset(frame(0))
            for i in range(1, 4):
                step(log, i)
            with in_background(lambda: [step(log, i) for i in range(4, 10)]) as results:
                time.sleep(0.05)  # is nothing that a wrong one would wait for
                assert log.stats()["waiting_steps"] == 3
                assert not results
                gate.open.set()
            assert results == [None]
            stats = log.stats()
        assert 1 <= stats["waits"] <= 6
        assert stats["waited"] > 0.04
        [record] = [r for r in caplog.records if "can't keep up" in r.message]
        assert record.levelno == logging.WARNING
        assert str(tmp_path) in record.message
        assert read(tmp_path) == [[*range(10)]]

    def test_a_step_larger_than_all_that_may_wait_is_taken(self, tmp_path):
        with RLDSLogger(tmp_path, max_waiting_bytes=1) as log:
            log.log_reset(frame(0))
            for i in range(1, 5):
                step(log, i)
        assert read(tmp_path) == [[*range(5)]]

    def test_no_wait_is_for_ever(self, tmp_path, gate, monkeypatch):
        monkeypatch.setattr(writer_module, "_PATIENCE", 0.05)
        log = RLDSLogger(tmp_path, max_waiting_bytes=1)
        log.log_reset(frame(0))
        step(log, 1)
        with pytest.raises(DeadlineExceeded, match=f"nothing was written to {tmp_path} for"):
            step(log, 2)
        with pytest.raises(DeadlineExceeded):
            log.end_episode()
        monkeypatch.undo()
        gate.open.set()
        log.close()
        assert read(tmp_path) == [[0, 1]]


class TestErrors:
    @pytest.fixture
    def fail(self, monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
        """Errors that the encoder is still to raise."""
        errors: list[BaseException] = []
        encode = values_module.encode_image

        def maybe(*arguments: Any) -> bytes:
            if errors:
                raise errors.pop(0)
            return encode(*arguments)

        monkeypatch.setattr(values_module, "encode_image", maybe)
        return errors

    def test_the_next_call_raises_and_the_one_after_goes_on(self, tmp_path, fail):
        with RLDSLogger(tmp_path) as log:
            log.log_reset(frame(0))
            fail += [MemoryError("once"), MemoryError("twice")]
            step(log, 1)
            wait_until(lambda: len(fail) == 1)
            wait_until(lambda: log._writer._error is not None)
            with pytest.raises(MemoryError, match="once"):
                step(log, 2)
            with pytest.raises(MemoryError, match="twice"):
                step(log, 2)
            step(log, 2)  # neither of those was taken
            step(log, 3)
        assert read(tmp_path) == [[0, 1, 2, 3]]

    def test_closing_tries_once_more(self, tmp_path, fail):
        log = RLDSLogger(tmp_path)
        log.log_reset(frame(0))
        fail += [MemoryError("once")]
        step(log, 1)
        wait_until(lambda: log._writer._error is not None)
        log.close()
        assert read(tmp_path) == [[0, 1]]

    def test_closing_raises_and_lets_go(self, tmp_path, fail):
        with no_thread_left():
            log = RLDSLogger(tmp_path)
            log.log_reset(frame(0))
            fail += [MemoryError(str(i)) for i in range(9)]
            step(log, 1)
            with pytest.raises(MemoryError):
                log.close()
            log.close()
            RLDSLogger(tmp_path).close()

    def test_an_error_wakes_who_waits_for_room(self, tmp_path, gate):
        with RLDSLogger(tmp_path, max_waiting_bytes=1) as log:
            log.log_reset(frame(0))
            step(log, 1)
            gate.error = MemoryError("on purpose")
            with in_background(lambda: step(log, 2)) as results:
                wait_until(lambda: gate.threads)
                gate.open.set()
            assert results == [gate.error]
            gate.error = None
            step(log, 2)
        assert read(tmp_path) == [[0, 1, 2]]


class TestNoRoom:
    def noise(self, i: int) -> np.ndarray:
        return np.random.default_rng(i).integers(0, 256, (512, 1024, 3)).astype(np.uint8)

    def log(self, log: RLDSLogger, *numbers: int) -> None:
        log.log_reset(self.noise(numbers[0]))
        for i in numbers[1:]:
            log.log_step(i, self.noise(i), 0.0, truncated=i == numbers[-1])

    def read(self, directory: Path) -> list[int]:
        return [len(episode["steps"]["action"]) for episode in read_episodes(directory)]

    def test_an_episode_is_kept_until_there_is_some(self, small_disk):
        """1.5 MB for each image, and 4 MB in all."""
        directory = small_disk / "set"
        with RLDSLogger(directory) as log:
            self.log(log, 0, 1)
            with pytest.raises(OSError, match="No space left on device") as raised:
                self.log(log, 2, 3)
            assert raised.value.errno == errno.ENOSPC
            assert raised.value.filename == str(directory / "edgeml-train.tfrecord-00000")
            needed = re.search(
                "at least ([0-9,]+) bytes are needed; the episodes", str(raised.value)
            )
            assert needed
            assert 2 * 512 * 1024 * 3 < int(needed[1].replace(",", "")) < 2.1 * 512 * 1024 * 3
            assert self.read(directory) == [2]
            with pytest.raises(OSError, match="the next call tries again"):
                log.log_reset(self.noise(4))
            more = ["mount", "-o", "remount,size=16m", str(small_disk)]
            subprocess.run(more, timeout=20, check=True)
            self.log(log, 4, 5)  # and the one before is written first
        assert self.read(directory) == [2, 2, 2]

    def test_a_directory_that_can_not_be_made_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError) as raised:
            RLDSLogger(tmp_path / "file" / "set")
        assert raised.value.filename == str(tmp_path / "file" / "set")
        with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none: there is no such directory"):
            list(read_episodes(tmp_path / "none"))


class TestEnds:
    def drop(self, loggers: list[RLDSLogger]) -> None:
        with pytest.warns(ResourceWarning, match="RLDSLogger .* was not closed"):
            loggers.clear()

    def test_one_that_is_dropped_is_closed(self, tmp_path):
        with no_thread_left():
            loggers = [RLDSLogger(tmp_path)]
            loggers[0].log_reset(frame(0))
            step(loggers[0], 1)
            logger, writer = weakref.ref(loggers[0]), weakref.ref(loggers[0]._writer)
            self.drop(loggers)
            assert logger() is None
        assert read(tmp_path) == [[0, 1]]
        assert writer() is None
        RLDSLogger(tmp_path).close()

    def test_one_that_is_dropped_in_a_cycle_is_closed(self, tmp_path):
        with no_thread_left():
            log = RLDSLogger(tmp_path)
            log.itself = log  # type: ignore[attr-defined]
            log.log_reset(frame(0))
            step(log, 1)
            del log
            with pytest.warns(ResourceWarning, match="was not closed"):
                gc.collect()
        assert read(tmp_path) == [[0, 1]]

    def test_one_that_was_never_made_is_none(self, tmp_path):
        (tmp_path / "features.json").write_bytes(b"{}")
        before = threads()
        with pytest.raises(ValueError, match="not written by edgeml"):
            RLDSLogger(tmp_path)
        gc.collect()  # no ResourceWarning
        assert threads() == before

    def test_what_can_not_be_written_of_a_dropped_one_is_logged(
        self, tmp_path, monkeypatch, caplog
    ):
        def full(*arguments: Any) -> bytes:
            raise OSError("no room")

        monkeypatch.setattr(values_module, "encode_image", full)
        for steps in (0, 1):  # an episode without a step is none
            assert not caplog.text
            with no_thread_left():
                loggers = [RLDSLogger(tmp_path)]
                loggers[0].log_reset(frame(0))
                for i in range(steps):
                    step(loggers[0], i)
                self.drop(loggers)
        assert f"the logger of {tmp_path} was not closed, and what it had left" in caplog.text
        assert "no room" in caplog.text

    @pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise KeyboardInterrupt"])
    def test_a_program_that_ends_without_closing(self, tmp_path, end):
        program = f"""
        import sys
        import numpy as np
        from edgeml.data.rlds import RLDSLogger
        log = RLDSLogger({str(tmp_path)!r})
        log.log_reset(np.zeros({SHAPE}, np.uint8))
        for i in range(1, 200):
            log.log_step(np.float32(i), np.full({SHAPE}, i, np.uint8), float(i))
        try:
            {end or "pass"}
        except BaseException:
            pass
        """
        _, stderr = run_fresh(program)
        assert stderr == ""
        assert read(tmp_path) == [[*range(200)]]

    def test_ctrl_c_loses_nothing(self, tmp_path):
        program = """
import sys, threading, time
import numpy as np
from edgeml.data.rlds import RLDSLogger
from edgeml.data.rlds import values
encode, go = values.encode_image, threading.Event()
def slow(*arguments):
    go.wait(30)
    return encode(*arguments)
values.encode_image = slow
def tell():
    while len(log._writer._jobs) < 3:  # two steps and the end
        time.sleep(0.01)
    print("waiting", flush=True)
try:
    with RLDSLogger(sys.argv[1]) as log:
        log.log_reset(np.zeros((6, 5, 3), np.uint8))
        log.log_step(np.float32(1), np.full((6, 5, 3), 1, np.uint8), 1.0)
        threading.Thread(target=tell, daemon=True).start()
        try:
            log.log_step(np.float32(2), np.full((6, 5, 3), 2, np.uint8), 2.0, terminated=True)
        except KeyboardInterrupt:
            go.set()
            raise
except KeyboardInterrupt:
    print("interrupted", log.episodes)
"""
        with process(program, tmp_path) as child:
            assert child.line() == "waiting"
            child.signal(signal.SIGINT)
            assert child.line() == "interrupted 1"
            assert child.end() == (0, "")
        assert read(tmp_path) == [[0, 1, 2]]

    def test_ctrl_c_as_a_step_is_taken_begins_another_episode(self, tmp_path, monkeypatch):
        """Whether it was taken is not known, so nothing may be said to follow upon it."""
        with RLDSLogger(tmp_path) as log:
            log.log_reset(frame(0))
            step(log, 1)
            put = log._writer.put

            def interrupted(*arguments: Any) -> None:
                put(*arguments)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(log._writer, "put", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    step(log, 2)
            with pytest.raises(RuntimeError, match="log_reset"):
                step(log, 3)
            log.log_reset(frame(3))
            step(log, 4)
        assert read(tmp_path) == [[0, 1, 2], [3, 4]]


class TestForks:
    def fork(self, child: Any) -> int:
        """Run a function in a forked child, which ends with its result; returns the child's id."""
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            code = int(child() or 0)
        finally:
            os._exit(code)

    def ended(self, pid: int) -> int:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise AssertionError("the child hangs")

    def test_a_child_leaves_all_to_its_parent(self, tmp_path, gate):
        log = RLDSLogger(tmp_path)
        log.log_reset(frame(0))
        step(log, 1)
        wait_until(lambda: gate.threads)

        def child() -> int:
            with pytest.raises(Closed, match="belongs to the process before the fork"):
                step(log, 9)
            assert log.stats()["waits"] == 0
            log.close()
            return 7

        held, done = threading.Event(), threading.Event()

        def hold() -> None:  # as the thread may, at any moment
            with log._writer.turn, log._writer._changed:
                held.set()
                assert done.wait(30)

        with in_background(hold):
            assert held.wait(30)
            pid = self.fork(child)
            done.set()
        assert self.ended(pid) == 7
        gate.open.set()
        step(log, 2, truncated=True)
        log.close()
        assert read(tmp_path) == [[0, 1, 2]]

    @pytest.mark.parametrize("how", ["closed", "killed"])
    def test_a_child_does_not_hold_the_directory(self, tmp_path, how):
        program = """
import os, signal, sys, time
from edgeml.data.rlds import RLDSLogger
log = RLDSLogger(sys.argv[1])
reader, writer = os.pipe()
child = os.fork()
if not child:
    signal.alarm(30)
    os.write(writer, b"here")
    signal.pause()
os.read(reader, 4)
if sys.argv[2] == "closed":
    log.close()
print(child, flush=True)
time.sleep(30)
"""
        with process(program, tmp_path, how) as parent:
            child = int(parent.line())
            try:
                if how == "killed":
                    parent.signal(signal.SIGKILL)
                    parent.popen.wait(10)
                RLDSLogger(tmp_path).close()
            finally:
                os.kill(child, signal.SIGKILL)
