"""What actors insert: items that say whose and which they are, and that can be seen to be whole."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeml.data import Batch

_RAMP = np.arange(1 << 16, dtype=np.uint32)


def make(actor: int, number: int, size: int) -> dict[str, Any]:
    """The item of an actor with a number, from 1; its data are so many bytes."""
    return {
        "actor": np.int64(actor),
        "number": np.int64(number),
        "data": _data(np.array([[actor * 977 + number * 31]]), size)[0],
    }


def tell(batch: Batch) -> list[list[int]]:
    """Whose and which a batch's items are: ``[actor, number]`` each.

    Raises:
        AssertionError: one isn't as it was made.
    """
    if not len(batch):
        return []
    columns = batch.columns
    if columns is None:  # of items that came one by one
        columns = {key: np.stack([item[key] for item in batch]) for key in batch[0]}
    actors, numbers, data = columns["actor"], columns["number"], columns["data"]
    wanted = _data(actors[:, None] * 977 + numbers[:, None] * 31, data.shape[1])
    spoilt = numbers[(data != wanted).any(1)]
    assert not len(spoilt), f"the data of items {spoilt.tolist()} isn't theirs"
    return np.stack([actors, numbers], 1).tolist()


def _data(start: Any, size: int) -> Any:
    return ((start + _RAMP[:size]) % 251).astype(np.uint8)
