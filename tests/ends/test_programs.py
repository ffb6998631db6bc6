"""A server's program ends clean in whichever way: calls are answered, clients told, files gone."""

import signal

import pytest

from edgeml import EdgemlError, InferenceClient
from pairs import process, wait_until

SERVER = """
import sys, threading, time
from edgeml import InferenceServer

def slow(payload):
    print("called", flush=True)
    time.sleep(1.0)
    return payload

server = InferenceServer(url=sys.argv[1])
server.register_interface("slow", slow)
if sys.argv[2] == "blocking":
    print("ready", flush=True)
    server.start()
    print("after", flush=True)
else:
    server.start(threaded=True)
    print("ready", flush=True)
    {end}
"""
WAIT = "time.sleep(60)"
ENDS = {
    "exit": ("sys.stdin.readline()", 0, 0),
    "sys.exit": ("sys.stdin.readline(); sys.exit(3)", 0, 3),
    "raise": ("sys.stdin.readline(); 1 / 0", 0, 1),
    "SIGINT": (WAIT, signal.SIGINT, -signal.SIGINT),
    "SIGTERM": (WAIT, signal.SIGTERM, -signal.SIGINT),
    "SIGHUP": (WAIT, signal.SIGHUP, -signal.SIGINT),
}


def ask(url, program):
    """Have a program amid a call; returns the call's future."""
    client = InferenceClient(url=url, wait_for_server=20)
    future = client.call_async("slow", 7)
    assert program.line() == "called"
    return client, future


@pytest.mark.parametrize("end", ENDS)
def test_a_server_in_the_background_answers_and_leaves_no_file(end, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    what, number, expected = ENDS[end]
    path = tmp_path / "s"
    url = f"shm://{path}"
    with process(SERVER.format(end=what), url, "background") as program:
        assert program.line() == "ready"
        client, future = ask(url, program)
        with client:
            if number:
                program.signal(number)
            else:
                program.popen.stdin.write("\n")
                program.popen.stdin.flush()
            assert future.result(20) == 7
            code, stderr = program.end(60)
            assert code == expected, stderr
            with pytest.raises(EdgemlError):
                client.call("slow", 1, timeout=5)
    assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_server_that_blocks_is_ended_by_a_signal_as_by_ctrl_c(number, tmp_path):
    path = tmp_path / "s"
    url = f"shm://{path}"
    with process(SERVER.format(end=""), url, "blocking") as program:
        assert program.line() == "ready"
        wait_until(path.exists)
        client, future = ask(url, program)
        with client:
            program.signal(number)
            del future  # Ctrl-C cuts it off, as it always did
            assert program.line() == "after"
            assert program.end(60) == (0, "")
    assert not path.exists()
