"""What the examples share on the command line: connection options, a status line, a clean end."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from edgeml import EdgemlError

try:
    from rich.console import Console
except ImportError:
    raise SystemExit('The examples need some more packages: pip install -e ".[examples]"') from None

if TYPE_CHECKING:
    from typing_extensions import Self


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


class StatusLine:
    """A line at the bottom of a terminal; in a pipe or a log file, a new line now and then."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._status = self._console.status("starting")
        self._due = 0.0

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, text: str) -> None:
        """Replace the line. Call it as often as you like."""
        if (now := time.monotonic()) < self._due:
            return
        if self._console.is_terminal:
            self._due = now + 0.1
            self._status.update(text)
        else:
            self._due = now + 1.0
            self.note(text)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._status.stop()


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
