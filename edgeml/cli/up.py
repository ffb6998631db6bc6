"""`edgeml up`, `edgeml status`, `edgeml down`: what a file says, made so; seen; and ended."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import edgeml.ray
from edgeml.core.errors import DeadlineExceeded, EdgemlError, Unreachable
from edgeml.ray import files, launcher, machine

__all__ = ["down", "status", "up"]

_LOOK = 0.1  # seconds between two looks at what a deployment is at


def up(path: Path, address: str | None, prune: bool, timeout: float) -> int:
    """Make it so that there is what a file says, changing only what differs.

    Args:
        path: of the file.
        address: of the Ray cluster, whatever the file says of it; None for that.
        prune: delete what the file doesn't name.
        timeout: seconds that the servers of each deployment may take until they are ready.

    Returns:
        The exit code.
    """
    plan = files.read(path)
    if plan.cluster is not None and address is None:
        launcher.begin(plan)
        words = ["up", path.name, "--timeout", f"{timeout:g}", *["--prune"] * prune]
        launcher.run(plan, [*words, "--address", "auto"])
        return 0
    address = _address(plan, address)
    here = address is None
    if address is None:
        address = machine.start(plan.machine).address
    # What runs here finds its modules beside the file; what runs elsewhere gets a copy of them.
    with machine.connected(address, None if here else plan.folder):
        if plan.names is not None or plan.credentials is not None:
            edgeml.ray.start(plan.names, plan.credentials)
        there = edgeml.ray.status()
        named = {entry.name for entry in plan.entries}
        for name in sorted(there.keys() - named):
            if prune:
                edgeml.ray.delete(name)
                _say(f"{name}: deleted, as {path.name} doesn't name it")
            else:
                _say(f"{name}: left as it is; {path.name} doesn't name it, and --prune deletes it")
        failed = False
        for entry in plan.entries:
            try:
                _make_so(entry, there.get(entry.name), plan.folder if here else None, timeout)
            except (EdgemlError, ValueError) as error:  # the others are done all the same
                print(f"edgeml: {entry.name}: {error}", file=sys.stderr)
                failed = True
    return int(failed)


def _make_so(entry: files.Entry, there: Any, folder: Path | None, timeout: float) -> None:
    """Make one deployment what the file says, and return when it is."""
    if there is not None and there.state == "failed":
        edgeml.ray.delete(entry.name)  # it has no servers
        there = None
    if there is not None and there.note == entry.note:
        if entry.replicas is None or entry.replicas == there.wanted:
            _say(f"{entry.name}: as it was, {_servers(there.wanted)}; {there.url}")
            return
        edgeml.ray.scale(entry.name, entry.replicas)
        made = _await(entry, timeout)
        _say(f"{entry.name}: {_servers(made.wanted)} in place of {there.wanted}; {made.url}")
        return
    if there is not None and there.kind != _KINDS[entry.kind]:
        raise ValueError(
            f"there are {there.kind!r} of this name; end them first, by `edgeml down` of the file "
            "that names them, or choose another name"
        )
    if there is not None and entry.kind == "trainers":
        _save(entry, there)
    settings = entry.settings()
    if "autoscale" in settings:
        settings["autoscale"] = edgeml.ray.Autoscale(**settings["autoscale"])
    room: Any = edgeml.ray
    deploy = room.deploy_trainer if entry.kind == "trainers" else room.deploy
    made = deploy(
        entry.factory(folder), name=entry.name, note=entry.note, timeout=timeout, **settings
    )
    what = "started"
    if there is not None:
        what = f"replaced, now version {made.version}"
        if entry.kind == "servers":
            _await(entry, timeout)  # the old ones answer what they have
    _say(f"{entry.name}: {what}, {_servers(made.wanted)}; {made.url}")


def _save(entry: files.Entry, there: Any) -> None:
    """End a trainer that goes on from its checkpoints, with what the file says now.

    Two at a time would save to one place. So there is a pause, in which actors hold their items.
    """
    before = json.loads(there.note or "{}")
    kept = {key: (before.get(key), entry.said.get(key)) for key in ("shards", "checkpoint_dir")}
    if before.get("checkpoint_dir") is None or any(old != new for old, new in kept.values()):
        raise ValueError(
            "a trainer goes on with something else only from its checkpoints, which are of as many "
            "shards: the file has to name the same 'checkpoint_dir' and 'shards' as before, or end "
            "it by `edgeml down` first, and what it has with it"
        )
    edgeml.ray.delete(entry.name)


def _await(entry: files.Entry, timeout: float) -> Any:
    """Return what a deployment is at once it has as many servers as are wanted, and no more."""
    deadline = time.monotonic() + timeout
    while True:
        now = edgeml.ray.status(entry.name)
        if now.state == "ready" and now.ready == len(now.replicas) == now.wanted:
            return now
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"of {_servers(now.wanted)} {now.ready} are ready after {timeout:g} s; `edgeml "
                "status` tells what the others are at"
            )
        time.sleep(_LOOK)


_KINDS = {"servers": "servers", "trainers": "trainer"}  # as a status tells of them


def status(path: Path | None, address: str | None) -> int:
    """Print what there is; of a file, what it names.

    Returns:
        The exit code: 1 where something that is wanted isn't ready.
    """
    plan = None if path is None else files.read(path)
    if plan is not None and plan.cluster is not None and address is None:
        launcher.run(plan, ["status", plan.path.name, "--address", "auto"])
        return 0
    found = _find(plan, address)
    if found is None:
        _say("nothing runs on this machine; `edgeml up FILE` starts what a file says")
        return 0 if plan is None else 1
    with machine.connected(found):
        there = edgeml.ray.status()
    names = list(there) if plan is None else [entry.name for entry in plan.entries]
    rows = [("name", "kind", "state", "servers", "version", "url")]
    wrong = False
    for name in names:
        one = there.get(name)
        if one is None:
            rows.append((name, "", "missing", "", "", ""))
            wrong = True
            continue
        wrong |= one.state != "ready" or one.ready < one.wanted or one.failure is not None
        rows.append(
            (name, one.kind, one.state, f"{one.ready} of {one.wanted}", str(one.version), one.url)
        )
    _table(rows)
    each = [("server", "state", "waiting", "version", "node", "process", "url")]
    each += [
        (
            *(one.id, one.state, str(one.waiting), str(one.version)),
            *(one.node, str(one.pid), one.url or one.detail),
        )
        for name in names
        if name in there
        for one in there[name].replicas
    ]
    if len(each) > 1:
        _say("")
        _table(each)
    for name in names:
        if name in there and there[name].failure:
            _say(f"\n{name}: {there[name].failure}")
    return int(wrong)


def down(path: Path | None, address: str | None) -> int:
    """End what a file names, or all; and this machine's Ray with the last of it.

    Returns:
        The exit code.
    """
    plan = None if path is None else files.read(path)
    if plan is not None and plan.cluster is not None and address is None:
        try:
            launcher.run(plan, ["down", plan.path.name, "--address", "auto"])
        except Unreachable as error:
            print(f"edgeml: {error}; its machines are given back", file=sys.stderr)
        launcher.give_back(plan)
        return 0
    found = _find(plan, address)
    if found is None:
        _say("nothing runs on this machine")
        return 0
    with machine.connected(found):
        there = edgeml.ray.status()
        ended = list(there) if plan is None else [e.name for e in plan.entries if e.name in there]
        for name in ended:
            edgeml.ray.delete(name)
            _say(f"{name}: ended")
        last = len(ended) == len(there)
        if last:
            edgeml.ray.stop()
    if last and _address(plan, address) is None and machine.end():
        _say("this machine's Ray has ended")
    return 0


def _address(plan: files.Plan | None, address: str | None) -> str | None:
    """Where there is a cluster already; None for this machine's own Ray."""
    return address or (plan and plan.address) or os.environ.get("RAY_ADDRESS") or None


def _find(plan: files.Plan | None, address: str | None) -> str | None:
    """The address of what runs; None where nothing does."""
    if (said := _address(plan, address)) is not None:
        return said
    running = machine.find()
    return running.address if running is not None else None


def _servers(count: int) -> str:
    return "1 server" if count == 1 else f"{count} servers"


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        _say("  ".join(cells).rstrip())


def _say(text: str) -> None:
    print(text, flush=True)
