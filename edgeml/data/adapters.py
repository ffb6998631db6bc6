"""Stores of four methods, as other libraries have them, made to keep the whole contract.

Such a store has `insert`, `latest_data_id`, `get_latest_data(from_id)`, which returns a list, and
`__len__`. It may number its items from 0, and knows of no lock, limit or reset. `adapt_class` puts
a layer around these four, and the base class's methods stand on that.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

from edgeml.data.batch import Batch
from edgeml.data.tree import copy_item

__all__ = ["adapt_class", "hide_items", "is_adapted"]

_MARK = "_edgeml_adapted"
_STATE = "_edgeml_adapter"


class _Adapter:
    """What is kept of each adapted store.

    Attributes:
        shift: is added to its own ids to make ours.
        hidden: its own id up to which items are forgotten.
        inside: whether one of its methods runs, and what it calls is its own.
    """

    def __init__(self, shift: int) -> None:
        self.shift = shift
        self.hidden = -(1 << 62)
        self.inside = False


def adapt_class(cls: type[Any]) -> None:
    """Put the layer around a class's methods, if it is such a store."""
    get = cls.get_latest_data
    if getattr(get, "__isabstractmethod__", False) or is_adapted(cls):
        for name in _LAYERS if is_adapted(cls) else ():
            _wrap(cls, name)  # what a subclass has overridden
        return
    if "limit" not in inspect.signature(get).parameters:
        for name in _LAYERS:
            _wrap(cls, name)


def is_adapted(cls: type[Any]) -> bool:
    """Return whether a class is such a store."""
    return hasattr(cls.get_latest_data, _MARK) or any(
        hasattr(vars(base).get("get_latest_data"), _MARK) for base in cls.__mro__
    )


def hide_items(store: Any, next_id: int) -> None:
    """Hide all items that such a store has, and number the next one as told."""
    with store.lock:
        adapter = _find_adapter(store)
        own = _call_own(store, adapter, "latest_data_id")
        adapter.hidden = own
        adapter.shift = next_id - 1 - own


def _wrap(cls: type[Any], name: str) -> None:
    own = getattr(cls, name)
    if hasattr(own, _MARK) or getattr(own, "__isabstractmethod__", False):
        return
    layer = _LAYERS[name]

    @functools.wraps(own)
    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        with self.lock:
            adapter = _find_adapter(self)
            if adapter.inside:
                return own(self, *arguments, **options)
            return layer(self, adapter, own, *arguments, **options)

    setattr(method, _MARK, own)
    setattr(cls, name, method)


def _find_adapter(store: Any) -> _Adapter:
    adapter: _Adapter | None = vars(store).get(_STATE)
    if adapter is None:
        if not isinstance(store.lock, type(threading.RLock())):
            raise TypeError(
                f"{type(store).__name__}.lock is the base class's, which whoever uses the store "
                "takes: name your own lock otherwise, such as _lock"
            )
        adapter = _Adapter(0)
        setattr(store, _STATE, adapter)
        # Before anything was inserted, our latest id is 0, whatever its own is; and what it was
        # made with has ids from 1.
        held, latest = (_call_own(store, adapter, name) for name in ("__len__", "latest_data_id"))
        adapter.shift = max(0, held - latest) if held else -latest
    return adapter


def _call_own(store: Any, adapter: _Adapter, name: str, *arguments: Any) -> Any:
    was, adapter.inside = adapter.inside, True
    try:
        return getattr(store, name)(*arguments)
    finally:
        adapter.inside = was


def _insert(
    store: Any,
    adapter: _Adapter,
    own: Callable[..., Any],
    item: Any,
    *more: Any,
    **options: Any,
) -> Any:
    adapter.inside = True
    try:
        return own(store, copy_item(item), *more, **options)
    finally:
        adapter.inside = False


def _latest_data_id(store: Any, adapter: _Adapter, own: Callable[..., Any]) -> int:
    latest = _call_own(store, adapter, "latest_data_id")
    return int(latest) + adapter.shift


def _length(store: Any, adapter: _Adapter, own: Callable[..., Any]) -> int:
    latest = _call_own(store, adapter, "latest_data_id")
    return int(min(_call_own(store, adapter, "__len__"), latest - adapter.hidden))


def _get_latest_data(
    store: Any,
    adapter: _Adapter,
    own: Callable[..., Any],
    from_id: int,
    *,
    limit: int | None = None,
) -> Batch:
    after = max(from_id - adapter.shift, adapter.hidden)
    latest = _call_own(store, adapter, "latest_data_id")
    items = list(_call_own(store, adapter, "get_latest_data", after)) if after < latest else []
    # It may hand out more than it was asked for; and ids are consecutive up to the newest.
    items = items[max(0, len(items) - int(latest - after)) :]
    first = int(latest) + adapter.shift + 1 - len(items)
    if not items:
        first = max(from_id + 1, first)
    items = items[: max(0, limit)] if limit is not None else items
    batch = Batch.of(items, first, allocate=store.allocate)
    if batch.columns is None:
        batch = Batch.of([copy_item(item) for item in items], first)
    return batch.cut(store.cuts_within(first, len(items)))


_LAYERS: dict[str, Callable[..., Any]] = {
    "insert": _insert,
    "latest_data_id": _latest_data_id,
    "get_latest_data": _get_latest_data,
    "__len__": _length,
}
