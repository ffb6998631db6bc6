"""What the examples share on the command line: connection options, status lines, a clean end."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, TypeVar

from edgeml import EdgemlError, Unreachable

MORE_PACKAGES = 'pip install -e ".[examples]"'

try:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text
except ImportError:
    raise SystemExit(f"The examples need some more packages: {MORE_PACKAGES}") from None

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


# Before anything starts -------------------------------------------------------------------


def add_connection_options(parser: argparse.ArgumentParser, port: int) -> None:
    """Add --ip, --host, --port and --transport."""
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--ip", default="127.0.0.1", help="client: the server's address (default: %(default)s)"
    )
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="server: the address to listen at; 0.0.0.0 lets other machines in "
        "(default: %(default)s, this machine only)",
    )
    group.add_argument(
        "--port",
        type=int,
        default=port,
        help="the server's port; 0 on the server lets the system pick (default: %(default)s)",
    )
    group.add_argument(
        "--transport",
        help="zmq between machines, shm between processes of this one, auto for either, or a URL "
        "(default: $EDGEML_TRANSPORT, or zmq)",
    )


def require(*modules: str) -> None:
    """End the program here if packages are missing, rather than when they are first used."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"This needs {' and '.join(missing)}: {MORE_PACKAGES}")


def check_writable(option: str, path: Path) -> None:
    """End the program here if a file can't be written, rather than when there is much to lose."""
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise SystemExit(f"{option} {path} cannot be written: {error.strerror}") from None


# While it runs ----------------------------------------------------------------------------


class StatusLines:
    """Lines at the bottom of a terminal, one for each part of a program.

    In a pipe or a log file each is printed anew now and then, and so leaves a history. To be used
    by any thread.
    """

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._lines: dict[str, str] = {}
        self._due: dict[str, float] = {}
        self._unprinted: set[str] = set()
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=10)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        with self._lock:
            unprinted, self._unprinted = self._unprinted, set()
            before = [self._line(name) for name in self._lines if name in unprinted]
        for line in (*before, text):
            self._print(line)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, text: str, line: str = "") -> None:
        """Replace the line of that name. Call it as often as you like."""
        with self._lock:
            self._lines[line] = text
            if self._console.is_terminal:
                return  # it is drawn ten times a second
            if (now := time.monotonic()) < self._due.get(line, 0.0):
                self._unprinted.add(line)
                return
            # Every second at first; a long run shall not fill the disk.
            self._due[line] = now + min(10.0, max(1.0, (now - self._began) / 60))
            self._unprinted.discard(line)
        self._print(self._line(line))

    def _line(self, name: str) -> str:
        return f"{name}: {self._lines[name]}" if name else self._lines[name]

    def _render(self) -> Text:
        with self._lock:
            return Text("\n".join(map(self._line, self._lines)), no_wrap=True, overflow="ellipsis")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()  # the last state of each line stays there
        for name in self._unprinted:
            self._print(self._line(name))


class Pace:
    """How fast a count grows of late, and when it will reach its goal."""

    WINDOW = 10.0  # seconds

    def __init__(self, goal: int, unit: str) -> None:
        self._goal = goal
        self._unit = unit
        self._seen: deque[tuple[float, int]] = deque()

    def text(self, count: int) -> str:
        """Tell the count, the rate, and the time left. Call it as often as you like."""
        now = time.monotonic()
        if not self._seen or now - self._seen[-1][0] > 0.1:
            self._seen.append((now, count))
            while now - self._seen[0][0] > self.WINDOW:
                self._seen.popleft()
        since, before = self._seen[0]
        text = f"{count:,}/{self._goal:,} {self._unit}"
        if now - since < 0.5 or count <= before:
            return text
        rate = (count - before) / (now - since)
        left = max(0, self._goal - count) / rate
        minutes, seconds = divmod(round(left), 60)
        clock = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        return f"{text}, {rate:,.0f} {self._unit}/s, {clock} left"


class Side:
    """A part of the program that runs in a thread of its own, and whose error isn't lost.

    A context manager: at the end of the block the work is stopped, and what made it fail is raised.

    Args:
        name: for people.
        work: what the thread runs.
        stop: ends this work when the block is left, and the block's when this failed.
    """

    def __init__(self, name: str, work: Callable[[], None], stop: Callable[[], None]) -> None:
        self._work = work
        self._stop = stop
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=name)

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._error = error
            self._stop()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
        self._thread.join()
        if self._error is not None:
            raise self._error from None


# The other end ----------------------------------------------------------------------------


def announce(status: StatusLines, doing: str, url: str, host: str) -> None:
    """Say where a server listens, and how to let other machines in."""
    status.note(f"{doing} at {url}")
    if host in ("127.0.0.1", "localhost", "::1"):
        status.note("(for this machine only: --host 0.0.0.0 lets others in; Ctrl-C ends it)")


def connect(make: Callable[[float], T], role: str, status: StatusLines, patience: float = 0.0) -> T:
    """Make a client; say what it waits for while no server answers, and how to let it in.

    Args:
        make: makes it, given how many seconds to wait for its server.
        role: the option that starts the server.
        status: where it is said.
        patience: seconds to wait altogether.

    Raises:
        Unreachable: nobody answered; the text says what to do.
    """
    advice = (
        f"start {Path(sys.argv[0]).name} {role} there, "
        "with --host 0.0.0.0 if that is another machine: by default it lets in its own only"
    )
    deadline = time.monotonic() + patience
    told = False
    while True:
        try:
            return make(max(0.0, min(1.0, deadline - time.monotonic())))
        except Unreachable as error:
            if (left := deadline - time.monotonic()) <= 0:
                raise Unreachable(f"{error}; {advice}") from None
            if not told:
                status.note(f"{error}; waiting for up to {patience:.0f} s: {advice}")
                told = True
            status.show(f"waiting for the server, {left:.0f} s more")


# The end ----------------------------------------------------------------------------------


class CtrlC:
    """Notes that Ctrl-C was pressed, where KeyboardInterrupt could leave something half done.

    Pressed once more, it interrupts.
    """

    def __init__(self) -> None:
        self.pressed = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, self._previous)

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)


def run(main: Callable[[], None]) -> int:
    """Run a program; returns its exit code. Ctrl-C is a good end, and an error is one line."""
    try:
        main()
    except KeyboardInterrupt:
        return 0
    except (EdgemlError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
