"""What an actor keeps on disk until the learner has it: a log for each store, and who it is."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

from edgeml.core.forks import drop_descriptors, watch_forks
from edgeml.data import DataStoreBase, LoggedDataStore
from edgeml.data.files import explain_errors, lock_directory, replace

__all__ = ["Outbox"]

_LONGEST_ID = 1000  # bytes


class Outbox:
    """The logs of a client's stores, in one directory.

    Args:
        directory: it is made if need be.
        stores: by name, whose items go into logs.

    Attributes:
        client_id: of whoever has the directory.
        stores: the logs, by the same names.

    Raises:
        BlockingIOError, Malformed, OSError: as `LoggedDataStore`.
    """

    def __init__(self, directory: str | os.PathLike[str], stores: Mapping[str, DataStoreBase]):
        path = Path(directory)
        self.stores: dict[str, DataStoreBase] = {}
        with ExitStack() as stack:
            taken = "another client keeps its log there"
            self._lock = stack.enter_context(lock_directory(path, taken))
            self.client_id = _read_id(path / "client_id")
            for name, store in stores.items():
                if isinstance(store, LoggedDataStore):
                    self.stores[name] = store
                    continue
                # No name is a path, and none is that of the two files above.
                log = LoggedDataStore(path / f"store-{quote(name, safe='')}")
                self.stores[name] = stack.enter_context(log)
                store.forward_to(log)
                stack.callback(store.forward_to, None)
            self._closing = stack.pop_all()
        watch_forks(self)

    def close(self) -> None:
        """Have the stores go on alone, and see all on the disk."""
        self._closing.close()

    def abandon(self) -> None:
        """Leave it to the parent, in a forked child."""
        drop_descriptors([self._lock])


def _read_id(path: Path) -> str:
    """Return the client's id that a file has, which is made if need be."""
    with explain_errors(path, _LONGEST_ID, "nothing was changed"):
        try:
            client_id = path.read_text()[:_LONGEST_ID]
        except (FileNotFoundError, UnicodeDecodeError):
            client_id = ""
    if not client_id.isprintable() or not client_id:
        client_id = secrets.token_hex(8)
        with replace(path) as fd:
            os.write(fd, client_id.encode())
    return client_id
