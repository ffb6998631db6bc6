"""Runs an example as people do: a process of its own, whose output is read while it runs."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

EXAMPLES = Path(__file__).parents[2] / "examples"
PATIENCE = 30.0  # seconds; what is waited for takes a second or two on an idle machine


class Example:
    """A running example; a context manager that leaves no process behind.

    Args:
        name: of the file.
        arguments: for its command line.
        cwd: where it runs, for what it writes.
        env: changes to the environment.
    """

    def __init__(self, name: str, *arguments: object, cwd: Path, **env: str) -> None:
        inherited = {
            key: value
            for key, value in os.environ.items()
            if key not in ("DISPLAY", "WAYLAND_DISPLAY", "EDGEML_TRANSPORT")
        }
        # A background job of a shell ignores SIGINT, and so would its children.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.process = subprocess.Popen(
                [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
                cwd=cwd,
                env={**inherited, **env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        self.printed = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
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

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def end(self, code: int = 0) -> str:
        """Wait for its end, which must be a clean one; returns all that it printed."""
        while (line := self._lines.get(timeout=PATIENCE)) is not None:
            self.printed += line
        assert self.process.wait(PATIENCE) == code, self.printed
        assert "Traceback" not in self.printed
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
        self.process.kill()
        self.process.wait()
        self._reader.join()
