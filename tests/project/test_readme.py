"""Runs the README's programs as they stand, server and client in two processes."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pairs import ROOT

README = (ROOT / "README.md").read_text()
PROGRAMS = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", README, re.DOTALL))


def start(path: Path, name: str) -> subprocess.Popen[str]:
    (path / name).write_text(PROGRAMS[name])
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, "-u", name], cwd=path, text=True, **pipes)


def await_port(port: int, server: subprocess.Popen[str]) -> None:
    while server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except ConnectionRefusedError:
            continue
    pytest.fail(f"the server ended: {server.communicate()[0]}")


@pytest.mark.parametrize(
    ("pair", "port", "expected"),
    [
        ("action", 6379, ["(224, 224, 3)", "{'moved': True}"]),
        ("inference", 5557, ["['face_reg', 'voice_reg']", "'loudness': 1.0", "'brightness': 0.0"]),
        ("trainer", 5555, ["got weights of step 2"]),
        ("camera", 6380, ["frames (480, 640, 3) copied on the way: 0"]),
    ],
)
def test_the_readme_programs_run_as_they_stand(
    pair: str, port: int, expected: list[str], tmp_path: Path
) -> None:
    server = start(tmp_path, f"{pair}_server.py")
    try:
        await_port(port, server)
        client = start(tmp_path, f"{pair}_client.py")
        printed, _ = client.communicate(timeout=60)
        assert client.returncode == 0, printed
        for text in expected:
            assert text in printed
        if pair in ("trainer", "camera"):  # which end by themselves
            server.wait(timeout=30)
        else:
            server.send_signal(signal.SIGINT)
        printed, _ = server.communicate(timeout=30)
        assert server.returncode == 0, printed
        assert "Traceback" not in printed
    finally:
        server.kill()
        server.wait()


ALONE = {
    "replay": ["(256, 4, 64, 64, 3)", "2.9701", "an observation is kept once: True"],
    "sequences": ["(256, 8, 2) of which", "goals lie ahead: True"],
    "resume": ["steps 100 items 100"],
    "episodes": ["me (", ", 4) True", "(32, 4)"],
}


@pytest.mark.parametrize("name", ALONE)
def test_the_readme_programs_of_one_process_run_as_they_stand(name: str, tmp_path: Path) -> None:
    program = start(tmp_path, f"{name}.py")
    printed, _ = program.communicate(timeout=100)
    assert program.returncode == 0, printed
    for text in ALONE[name]:
        assert text in printed


def test_every_program_in_the_readme_is_run() -> None:
    pairs = [
        f"{pair}_{side}.py"
        for pair in ("action", "inference", "trainer", "camera")
        for side in ("server", "client")
    ]
    assert sorted(PROGRAMS) == sorted([*pairs, *(f"{name}.py" for name in ALONE)])


def test_the_readme_commands_are_the_ones_that_ci_runs() -> None:
    command = 'pip install -e ".[test]" && pytest'
    assert command in README
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install --quiet -e ".[test]"\npytest\n' in ci
