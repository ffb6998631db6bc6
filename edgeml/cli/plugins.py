"""``edgeml plugins``: what is installed of each kind, and what is wrong with it."""

from __future__ import annotations

from edgeml.core import PluginError
from edgeml.core.plugins import KINDS, Found, find, load

__all__ = ["run"]


def run() -> int:
    """Load and print every plugin; 1 if one of them can't be used."""
    found = [each for kind in KINDS for each in find(kind)]
    width = max([len(each.name) for each in found], default=0)
    packages = max([len(each.package) for each in found], default=0)
    failed = 0
    for each in found:
        why = _failure(each)
        row = f"{each.kind:<9}  {each.name:<{width}}  {each.package:<{packages}}"
        print(f"{row}  {'FAILED' if why else 'ok'}")
        if why:
            print(f"           {why}")
            failed += 1
    if not found:
        print("none is installed, not even edgeml's own: install edgeml with pip")
    elif failed:
        print(f"\n{failed} of {len(found)} can't be used; the others are not affected")
    return 1 if failed or not found else 0


def _failure(each: Found) -> str | None:
    """Why a plugin can't be used, in one line; None if it can."""
    try:
        load(each.kind, each.name)
    except PluginError as error:
        return " ".join(str(error).split())
    return None
