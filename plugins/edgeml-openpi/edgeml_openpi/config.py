"""The configuration that the second dialect's clients are told, as a policy's contract has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["configure"]

_WRIST = ("wrist", "hand", "gripper")


def configure(contract: Mapping[str, Any] | None, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first message of the second dialect.

    Args:
        contract: see `edgeml.core.Dispatch.contract`.
        metadata: what whoever opened the door says besides, or instead: a key that is None there is
            left out.
    """
    contract = contract or {}
    images = dict(_images(contract.get("observation"), ""))
    sizes = {size for size in images.values() if None not in size}
    at_wrist = [name for name in images if any(word in name.lower() for word in _WRIST)]
    made: dict[str, Any] = {
        "image_resolution": list(sizes.pop()) if len(sizes) == 1 else None,
        "n_external_cameras": len(images) - len(at_wrist),
        "needs_wrist_camera": bool(at_wrist),
        "needs_session_id": False,  # without one a connection is a session
        "action_space": "joint_position",
    }
    if "horizon" in contract:
        made["action_horizon"] = contract["horizon"]
    action = contract.get("action") or {}
    lengths = [feature["shape"][-1] for _, feature in _features(action, "") if feature["shape"]]
    if lengths and None not in lengths:
        made["action_dim"] = sum(lengths)
    if action and not _is_feature(action):
        made["action_keys"] = list(action)
    return {
        key: value
        for key, value in {**made, **metadata}.items()
        if value is not None or key not in metadata
    }


def _is_feature(plain: Mapping[str, Any]) -> bool:
    return isinstance(plain.get("dtype"), str)  # in a map of features it would be a map


def _features(plain: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not isinstance(plain, Mapping):
        return
    if _is_feature(plain):
        yield path, plain
        return
    for name, part in plain.items():
        yield from _features(part, f"{path}/{name}")


def _images(observation: Any, path: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The height and width of each image."""
    for name, feature in _features(observation, path):
        shape = feature["shape"]
        pixels = feature["dtype"] == "uint8" and len(shape) == 3 and shape[-1] in (1, 3, 4)
        if len(shape) >= 3 and (feature.get("kind") == "image" or pixels):
            yield name, (shape[-3], shape[-2])
