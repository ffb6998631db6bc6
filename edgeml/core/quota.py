"""How much memory each peer of a server may take up, counted where a transport takes it."""

from __future__ import annotations

import threading
from collections import Counter

from edgeml.core.errors import Overloaded
from edgeml.core.transport import Peer

__all__ = ["Held", "Quota"]


class Held:
    """Bytes that are counted until they are given back."""

    __slots__ = ("_keys", "_nbytes", "_quota")

    def __init__(self, quota: Quota, keys: tuple[str, ...], nbytes: int) -> None:
        self._quota = quota
        self._keys = keys
        self._nbytes = nbytes

    def release(self) -> None:
        """Count them no more; harmless the second time."""
        nbytes, self._nbytes = self._nbytes, 0
        self._quota._give_back(self._keys, nbytes)

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Quota:
    """Counts the bytes held for each peer, for each host, of which one may have half, and in all.

    A single message is always let in, however large: of a peer that has none, as far as its host's
    share allows, and of a host that has none. Usable from any thread.

    Args:
        each: bytes for one peer, in more than one message.
        total: bytes in all.
        what: what is counted, for errors.
    """

    def __init__(self, each: int, total: int, what: str) -> None:
        self._limits = (each, total // 2, total)
        self._what = what
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that are held in all."""
        return self._held["all"]

    def take(self, peer: Peer, nbytes: int) -> Held:
        """Count bytes for a peer.

        Raises:
            Overloaded: it has too many, or its host has, or all have together.
        """
        keys = of_peer, of_host, of_all = f"peer {peer.id}", f"host {peer.host}", "all"
        each, half, total = self._limits
        held = self._held
        with self._lock:
            peers, hosts, alls = held.get(of_peer, 0), held.get(of_host, 0), held.get(of_all, 0)
            if peers and peers + nbytes > each:
                raise self._refusal(peers, "you", each, nbytes)
            if hosts and hosts + nbytes > half:
                raise self._refusal(hosts, "your host", half, nbytes)
            if hosts and alls + nbytes > total:
                raise self._refusal(alls, "all", total, nbytes)
            held[of_peer] = peers + nbytes
            held[of_host] = hosts + nbytes
            held[of_all] = alls + nbytes
        return Held(self, keys, nbytes)

    def _refusal(self, has: int, whose: str, most: int, nbytes: int) -> Overloaded:
        return Overloaded(
            f"{has} bytes {self._what} for {whose} already, and {most} are the most: "
            f"{nbytes} more have to wait; try again"
        )

    def _give_back(self, keys: tuple[str, ...], nbytes: int) -> None:
        with self._lock:
            for key in keys:
                self._held[key] -= nbytes
                if not self._held[key]:
                    del self._held[key]
