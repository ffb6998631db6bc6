"""What the system allows a process, for errors that say what to do."""

from __future__ import annotations

import errno
import os
import resource

__all__ = ["if_out_of_files", "what_to_do"]


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
