"""Files that are replaced as a whole."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["rename"]


def rename(temporary: Path, path: Path) -> None:
    """Put a file in another's place, and see the new names of that directory on the disk.

    What is in it has to be there already, by `os.fsync`: then, whatever happens, either the old
    file or the new one is there.
    """
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
