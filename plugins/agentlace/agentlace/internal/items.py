"""Parts that edgeml's stores ask for, added to items in which agentlace's have none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgeml.data import Batch

__all__ = ["add_key"]


def add_key(
    batch: Batch | Sequence[Any],
    key: str,
    make: Callable[[Mapping[str, Any], tuple[int, ...]], Any],
) -> Batch:
    """Return a batch whose items have a key.

    Args:
        batch: of items.
        key: that they may lack.
        make: is given the columns, or an item, and the shape of what it is to make of them.
    """
    batch = batch if isinstance(batch, Batch) else Batch.of(batch)
    columns = batch.columns
    if isinstance(columns, dict):
        if key in columns:
            return batch
        added = {**columns, key: make(columns, (len(batch),))}
        made = Batch.from_columns(added, batch.first_id)
        return made.cut(batch.cuts).in_lanes(batch.lanes)
    items = [item if key in item else {**item, key: make(item, ())} for item in batch]
    return Batch.of(items, batch.first_id).cut(batch.cuts).in_lanes(batch.lanes)
