"""What vla-eval's harness is told of a policy, out of the plain form of its contract.

The harness knows a component by a name, its number of dimensions (0 for what is no array: images
and texts) and a *format*, the convention that its numbers follow. A contract has no word for that,
so it is ``"raw"``, but for texts and color images, which the harness has formats for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["describe"]

_TEXT, _COLORS, _ANY = "language", "rgb_hwc_uint8", "raw"


def describe(contract: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return ``action_spec`` and ``observation_spec``, each where the contract states it."""
    specs = {}
    for what, alone in (("action", "actions"), ("observation", "observation")):
        features = (contract or {}).get(what)
        if features is not None:
            specs[f"{what}_spec"] = {
                name or alone: _component(name or alone, feature)
                for name, feature in _each(features, "")
            }
    return specs


def _each(features: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each feature, and the keys that lead to it, joined by dots."""
    if isinstance(features.get("dtype"), str):  # in a map of features it would be a map
        yield name, features
        return
    for key, part in features.items():
        yield from _each(part, f"{name}.{key}" if name else key)


def _component(name: str, feature: Mapping[str, Any]) -> dict[str, Any]:
    dtype, shape, kind = feature["dtype"], feature["shape"], feature.get("kind")
    if dtype == "str":
        return {"name": name, "dims": 0, "format": _TEXT}
    said = [f"shape {tuple(shape)} {dtype}"]
    if "names" in feature:
        said.append(" ".join(feature["names"]))
    if "units" in feature:
        units = feature["units"]
        said.append("in " + (units if isinstance(units, str) else " ".join(units)))
    image = kind in ("image", "depth")
    colors = kind == "image" and dtype == "uint8" and shape[2:] == [3]
    return {
        "name": name,
        "dims": 0 if image else (shape[-1] or 0) if shape else 1,
        "format": _COLORS if colors else _ANY,
        "description": ", ".join(said),
    }
