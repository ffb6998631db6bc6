"""The end of a program: what is still done, and what signals do to get there."""

from __future__ import annotations

import signal
import threading

from edgeml.core.ending import run_at_end
from pairs import process

PROGRAM = """
import os, signal, sys, threading, time
from edgeml.core.ending import run_at_end
cancel = run_at_end(lambda: print("end", flush=True))
{rest}
"""


def run(rest: str, *signals: int) -> tuple[list[str], int, str]:
    """What a program prints, its exit code, and its errors; it is sent signals once it is ready."""
    lines = []
    with process(PROGRAM.format(rest=rest)) as program:
        for number in signals:
            assert program.line() == "ready"
            program.signal(number)
        assert program.popen.stdout is not None
        lines = program.popen.stdout.read().split()
        code, stderr = program.end()
    return lines, code, stderr


WAIT = "print('ready', flush=True); time.sleep(60)"


def test_it_is_done_once_whichever_way_the_program_ends():
    assert run("") == (["end"], 0, "")
    assert run("sys.exit(3)") == (["end"], 3, "")
    lines, code, stderr = run("1 / 0")
    assert (lines, code) == (["end"], 1)
    assert "ZeroDivisionError" in stderr
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        lines, code, stderr = run(WAIT, number)
        assert (lines, code) == (["end"], -signal.SIGINT)
        assert "KeyboardInterrupt" in stderr


def test_what_is_cancelled_is_not_done_and_signals_are_as_they_were():
    other = "other = run_at_end(lambda: print('other', flush=True))"
    assert run("cancel(); cancel()") == ([], 0, "")
    assert run(f"{other}; cancel()") == (["other"], 0, "")
    lines, code, _ = run(f"{other}; cancel(); {WAIT}", signal.SIGTERM)
    assert (lines, code) == (["other"], -signal.SIGINT)
    assert run(f"cancel(); {WAIT}", signal.SIGTERM) == ([], -signal.SIGTERM, "")


def test_in_another_thread_it_is_done_and_signals_are_as_they_were():
    elsewhere = """
cancel()
thread = threading.Thread(target=run_at_end, args=(lambda: print("end", flush=True),))
thread.start()
thread.join()
"""
    assert run(elsewhere) == (["end"], 0, "")
    assert run(f"{elsewhere}\n{WAIT}", signal.SIGTERM) == ([], -signal.SIGTERM, "")


def test_a_signal_is_as_it_was_once_another_thread_has_cancelled_the_last():
    elsewhere = "thread = threading.Thread(target=cancel); thread.start(); thread.join()"
    for number in (signal.SIGTERM, signal.SIGHUP):
        assert run(f"{elsewhere}; {WAIT}", number) == ([], -number, "")


def test_a_forked_child_does_nothing_of_it_and_signals_end_it_as_they_would_have():
    """However soon they come: an exception in the midst of the fork would be lost."""
    fork = """
for _ in range(200):
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM, status
child = os.fork()
if child == 0:
    sys.exit(7)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7
print("parent", signal.pthread_sigmask(signal.SIG_BLOCK, ()) or "", flush=True)
"""
    assert run(fork) == (["parent", "end"], 0, "")


def test_a_child_of_multiprocessing_does_its_own():
    child = """
import multiprocessing
def act():
    run_at_end(lambda: print("child", flush=True))
child = multiprocessing.get_context("fork").Process(target=act)
child.start()
child.join(10)
"""
    assert run(child) == (["child", "end"], 0, "")


def test_nothing_is_left_behind_in_this_process():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    cancels = [run_at_end(lambda: None) for _ in range(3)]
    threads = [threading.Thread(target=cancel) for cancel in cancels[:2]]
    for thread in threads:
        thread.start()
        thread.join()
    cancels[2]()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)] == before
