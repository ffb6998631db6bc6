"""What the objects that users hold have in common: they are closed in the end, and not pickled."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ClosedAtExit", "Unpicklable", "close_when_dropped"]


class ClosedAtExit:
    """A context manager that calls the method `_leave` of a subclass at its end."""

    def _leave(self) -> object:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()


class Unpicklable:
    """Says what to do in place of pickling it, as to send it to another process does."""

    _instead = "make it in the process that uses it"

    def __reduce__(self) -> Any:
        raise TypeError(f"a {type(self).__name__} can't be pickled: {self._instead}")


def close_when_dropped(owner: object, close: Callable[[], object]) -> Callable[[], object]:
    """Have ``close`` called once nobody has ``owner`` any more, with a ResourceWarning.

    It is called in a thread of its own, as the last reference may go at any moment, under any
    lock. ``close`` must not refer to the owner, nor must what goes on in the background.

    Returns:
        What to call when the owner is closed as it should be.
    """
    dropped = weakref.finalize(owner, _close_dropped, type(owner).__name__, close)
    dropped.atexit = False  # the end of the program ends its threads
    return dropped.detach


def _close_dropped(name: str, close: Callable[[], object]) -> None:
    try:
        threading.Thread(target=close, name=f"edgeml closes a {name}", daemon=True).start()
    except RuntimeError:  # the interpreter shuts down, which ends it as well
        return
    warnings.warn(
        f"a {name} was dropped without stop(), and is closed now; call stop(), or use `with`",
        ResourceWarning,
        stacklevel=2,
    )
