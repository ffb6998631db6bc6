"""Machines for programs to run on: zygotes, each with a monotonic clock of its own.

No two machines' clocks have anything to do with each other, and a machine that was started anew
has another one than before. So here the clocks differ by days, by time namespaces of Linux; where
these can't be had, all machines have the same clock.
"""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from .processes import Zygote

if TYPE_CHECKING:
    from typing_extensions import Self

_FAR = 250_000  # seconds that a client's clock is ahead
_AGE = 40  # seconds since a machine was started anew, that has been


class Machine:
    """A zygote, and by how many seconds its clock is ahead of the harness's."""

    def __init__(self, stack: ExitStack, ahead: int) -> None:
        prefix = ["unshare", "--user", "--map-root-user", "--time", "--monotonic", str(ahead)]
        try:
            tried = subprocess.run([*prefix, "true"], capture_output=True, check=False)
            works = ahead != 0 and not tried.returncode
        except FileNotFoundError:
            works = False
        self.ahead = ahead if works else 0
        self.zygote = stack.enter_context(Zygote(prefix if works else []))


class Machines:
    """The harness's own machine, one far away, and the first one started anew; a context manager.

    Attributes:
        here: where proxies are, and devices by default.
        far: where clients are.
        anew: where a device is after its machine was started anew, so that its clock is behind.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.here = Machine(self._stack, 0)
        self.far = Machine(self._stack, _FAR)
        self.anew = Machine(self._stack, _AGE - int(time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
