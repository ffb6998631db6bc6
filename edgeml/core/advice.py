"""What the system allows a process, for errors that say what to do; and the commonest of them."""

from __future__ import annotations

import errno
import os
import resource

from edgeml.core.errors import Unreachable

__all__ = ["explain_no_connection", "if_out_of_files", "what_to_do"]


def what_to_do(number: int | None) -> str:
    """What to add to the text of an error with this errno; nothing if there is nothing to say."""
    if number not in (errno.EMFILE, errno.ENFILE):
        return ""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"; this process may have {soft} files and sockets open, and `ulimit -n` in its shell "
        f"raises that to {hard} at most: `edgeml doctor` tells what a client takes"
    )


def if_out_of_files() -> str:
    """The same for an error whose cause a library hides: not empty if no file can be opened."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return what_to_do(error.errno)
    return ""


def explain_no_connection(
    url: object,
    why: object,
    number: int | None = None,
    hint: str = "is the server started, and does its host= let this machine in?",
) -> Unreachable:
    """Return the error of whoever found nobody at ``url``.

    Args:
        url: where.
        why: what the system said.
        number: the errno, if one is known; it may tell that this process is at its own limit.
        hint: what to look at otherwise.
    """
    if advice := what_to_do(number):
        return Unreachable(f"no connection to {url}: {why}{advice}")
    return Unreachable(f"nobody answers at {url}: {why}; {hint}")
