"""Items that one side can't take: counted, and told without flooding the log."""

from __future__ import annotations

import logging
import re

from edgeml.core.errors import EdgemlError, text_of

__all__ = ["Refusals", "reason"]

_log = logging.getLogger(__name__)

_KINDS = 100  # that are told apart; a text may have the item's own values in it
_TEXT = 300  # characters of a reason


class Refusals:
    """Counts refused items; logs the first of each kind, and again at the 10th, 100th and so on.

    Reasons that differ in their numbers alone are of one kind.

    Attributes:
        count: how many items were refused.
    """

    def __init__(self) -> None:
        self.count = 0
        self._kinds: dict[str, int] = {}

    def add(self, store: str, first_id: int, n: int, why: str) -> None:
        """Count n consecutive items of a store that are refused for one reason."""
        self.count += n
        kind = re.sub(r"\d+", "#", f"{store}: {why}")
        if kind not in self._kinds and len(self._kinds) >= _KINDS:
            kind = "another"
        before = self._kinds.get(kind, 0)
        self._kinds[kind] = total = before + n
        if not before or len(str(total)) > len(str(before)):
            last = first_id + n - 1
            which = f"item {first_id} is" if n == 1 else f"items {first_id} to {last} are"
            so_far = f" ({total} like this so far)" if total > n else ""
            _log.warning("store %r: %s refused and left out%s: %s", store, which, so_far, why)


def reason(error: BaseException) -> str:
    """Say in one line why an item is refused."""
    text = text_of(error)
    if not isinstance(error, (ValueError, EdgemlError)) or not text:
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())[:_TEXT]
