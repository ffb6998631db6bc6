"""Runs an example as people do: a process of its own, whose output is read while it runs."""

from __future__ import annotations

import os
import pty
import queue
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

EXAMPLES = Path(__file__).parents[2] / "examples"
PATIENCE = 60.0  # seconds; what is waited for takes a second or two on an idle machine


class Example:
    """A running example; a context manager that leaves no process behind.

    Args:
        name: of the file.
        arguments: for its command line.
        cwd: where it runs, for what it writes.
        before: Python that runs first in the same process, to make something fail there.
        terminal: give it a terminal, at which keys can be pressed, rather than a pipe.
        env: changes to the environment.
    """

    def __init__(
        self,
        name: str,
        *arguments: object,
        cwd: Path,
        before: str = "",
        terminal: bool = False,
        **env: str,
    ) -> None:
        program = [str(EXAMPLES / name)]
        if before:
            run = f"import runpy, sys; sys.path.insert(0, {str(EXAMPLES)!r})\n{before}\n"
            program = ["-c", run + f"runpy.run_path({program[0]!r}, run_name='__main__')"]
        inherited = {
            key: value
            for key, value in os.environ.items()
            if key not in ("DISPLAY", "WAYLAND_DISPLAY", "EDGEML_TRANSPORT")
        }
        # A background job of a shell ignores SIGINT, and so would its children.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        read, write = pty.openpty() if terminal else os.pipe()
        self._output = open(read, errors="replace")  # noqa: SIM115 - the reader closes it
        try:
            self.process = subprocess.Popen(
                [sys.executable, *program, *map(str, arguments)],
                cwd=cwd,
                env={**inherited, **env},
                stdin=write if terminal else subprocess.DEVNULL,
                stdout=write,
                stderr=write,
            )
        finally:
            os.close(write)
            signal.signal(signal.SIGINT, handler)
        self.printed = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with self._output as lines, suppress(OSError):  # which is how a terminal ends
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def until(self, pattern: str) -> re.Match[str]:
        """Read on until a line matches."""
        while (line := self._lines.get(timeout=PATIENCE)) is not None:
            self.printed += line
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"ended without {pattern!r}:\n{self.printed}")

    def port(self) -> int:
        """Return the port that a server says it has."""
        return int(self.until(r"\w+://[^ ]*:(\d+)")[1])

    def press(self, keys: str) -> None:
        """Press keys at its terminal."""
        os.write(self._output.fileno(), keys.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait()

    def end(self, code: int = 0, *, traceback: bool = False) -> str:
        """Wait for its end, which must be a clean one; returns all that it printed."""
        while (line := self._lines.get(timeout=PATIENCE)) is not None:
            self.printed += line
        assert self.process.wait(PATIENCE) == code, self.printed
        assert ("Traceback" in self.printed) == traceback, self.printed
        assert "Exception ignored" not in self.printed, self.printed
        return self.printed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self._reader.join()
