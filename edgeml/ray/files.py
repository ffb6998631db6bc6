"""What `edgeml up` reads: a YAML file that says which servers there shall be, how many, and where.

Everything is checked before anything is done: all that is wrong is told at once, each with its line
and what may stand there instead. Nothing of the user's is imported here: a server is named by
``module:function``, and its code is found where it runs.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgeml.extras import load_yaml

__all__ = ["Entry", "Factory", "Plan", "read"]

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}")
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_ADDRESS = re.compile(r"[^\s/:]+:\d{1,5}")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(K|M|G)B")
_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}
_TOLD = 20  # of what is wrong, at most
_MOST_VALUES = 100_000  # in a file, each counted as often as an alias (*name) repeats it
_MOST = 1e14  # of a resource; Ray counts in ten-thousandths, in 64 bits
_MOST_BYTES = 1 << 50


@dataclass(frozen=True)
class Factory:
    """Makes a server where it runs: the function is imported when it is called, and not before.

    Args:
        function: as in ``module:function``.
        arguments: that it is called with, by name.
        folder: where the server runs, and its module is looked for first; None for where it is.
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    folder: str | None = None

    def __call__(self) -> Any:
        """Return a new server, unstarted.

        Raises:
            ImportError: there is no such function; the text says where it was looked for.
        """
        if self.folder is not None:
            os.chdir(self.folder)
            if self.folder not in sys.path:
                sys.path.insert(0, self.folder)
        module, _, name = self.function.partition(":")
        try:
            there = find_spec(module) is not None
        except ModuleNotFoundError:  # a package that it would be in
            there = False
        if not there:
            raise ImportError(
                f"factory {self.function!r}: no module {module!r} in "
                f"{os.getcwd()}, nor among the packages that are installed"
            )
        found = getattr(import_module(module), name, None)
        if not callable(found):
            raise ImportError(f"factory {self.function!r}: the module has no function {name!r}")
        return found(**self.arguments)


@dataclass(frozen=True)
class Entry:
    """A deployment that the file names.

    Attributes:
        name: of the deployment.
        kind: "servers" or "trainers", under which it stands.
        said: what the file says of it, plainly; two entries are equal if this is.
    """

    name: str
    kind: str
    said: Mapping[str, Any]

    @property
    def note(self) -> str:
        """What is kept with the deployment, to see later whether the file says anything else.

        Of how many servers there are nothing: that is changed without replacing any.
        """
        said = {key: value for key, value in self.said.items() if key != "replicas"}
        return json.dumps({"kind": self.kind, **said}, sort_keys=True)

    @property
    def replicas(self) -> int | None:
        """How many servers there shall be; None where that is found out as it goes, or shards."""
        if self.kind == "trainers" or "autoscale" in self.said:
            return None
        replicas: int = self.said.get("replicas", 1)
        return replicas

    def factory(self, folder: Path | None) -> Factory:
        """Return what makes its servers."""
        arguments = self.said.get("arguments", {})
        return Factory(self.said["factory"], arguments, None if folder is None else str(folder))

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of its deployment, but for the factory and the name."""
        return {k: v for k, v in self.said.items() if k not in ("factory", "arguments")}


@dataclass(frozen=True)
class Plan:
    """What a file says.

    Attributes:
        path: of the file.
        entries: the deployments, in the file's order.
        address: of the Ray cluster that runs already, or None.
        cluster: what Ray's cluster launcher is to start, its file or that file's content; or None.
        machine: what this machine's Ray is given, where none of those is said.
        names: where the name service listens, HOST:PORT, if that is said.
        credentials: the folder of the keys by which that knows its clients.
    """

    path: Path
    entries: tuple[Entry, ...]
    address: str | None = None
    cluster: Path | Mapping[str, Any] | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)
    names: str | None = None
    credentials: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the file is, and the modules of its factories."""
        return self.path.parent


def read(path: str | os.PathLike[str]) -> Plan:
    """Read a file.

    Raises:
        ValueError: something in it is wrong: all of that, a line each.
        OSError: it can't be read.
        ImportError: the extra `ray` is not installed.
    """
    yaml = load_yaml()
    path = Path(path).absolute()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: it is no text in UTF-8: {error}") from None
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is not None and _count_values(root, {}) > _MOST_VALUES:
                raise ValueError(f"{path.name}: it has more than {_MOST_VALUES} values")
            reader = _Reader(yaml, loader, path)
            plan = reader.plan(root)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError(f"{path.name}: it can't be read: it is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path.name}, line {mark.line + 1}" if mark is not None else path.name
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{where}: it can't be read: {what}") from None
    if reader.wrong:
        wrong = [text for _, text in sorted(reader.wrong)]
        more = [f"and {len(wrong) - _TOLD} more"] if len(wrong) > _TOLD else []
        raise ValueError("\n".join([*wrong[:_TOLD], *more]))
    return plan


def _count_values(node: Any, counted: dict[Any, int]) -> int:
    """Count what there is once a file's aliases are written out, which may be without an end to it.

    What holds itself counts as nothing here, and can't be read.
    """
    if node not in counted:
        counted[node] = 0
        parts = [] if isinstance(node.value, str) else node.value
        nodes = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
        counted[node] = 1 + sum(_count_values(each, counted) for each in nodes)
    return counted[node]


class _Wrong(Exception):
    """A value can't stand where it does."""


_Check = Callable[["_Reader", Any, str], Any]  # of a node, under a key; returns the value


class _Reader:
    """Makes a plan of YAML's nodes, which know their lines; collects what is wrong."""

    def __init__(self, yaml: Any, loader: Any, path: Path) -> None:
        self._yaml, self._loader, self._file = yaml, loader, path
        self.wrong: list[tuple[int, str]] = []

    def plan(self, root: Any) -> Plan:
        if root is None:
            self.wrong.append((0, f"{self._file.name}: it is empty; say `servers:`"))
            return Plan(self._file, ())
        said = self._mapping(root, "", _FILE)
        where = [key for key in ("address", "cluster", "machine") if key in said]
        if len(where) > 1:
            self._complain(root, where[1], f"there is {where[0]!r} already; say one of them")
        entries = [
            Entry(name, kind, values)
            for kind in ("servers", "trainers")
            for name, values in (said.get(kind) or {}).items()
        ]
        names = [entry.name for entry in entries]
        for name in sorted({name for name in names if names.count(name) > 1}):
            self._complain(root, f"trainers.{name}", "a server has this name; choose another")
        if not entries and not self.wrong:
            self._complain(root, "", "it names nothing; say `servers:` or `trainers:`")
        return Plan(
            self._file,
            tuple(entries),
            said.get("address"),
            said.get("cluster"),
            said.get("machine", {}),
            said.get("names"),
            said.get("credentials"),
        )

    def _complain(self, node: Any, key: str, what: str) -> None:
        line = node.start_mark.line + 1
        where = f"{self._file.name}, line {line}: "
        self.wrong.append((line, where + (f"{key}: {what}" if key else what)))

    # Mappings -----------------------------------------------------------------------------

    def _pairs(self, node: Any, key: str) -> dict[str, tuple[Any, Any]]:
        """The nodes of a mapping's keys and values, by the keys' texts."""
        if not isinstance(node, self._yaml.MappingNode):
            self._complain(node, key, "this is to be a mapping: keys with values, a line each")
            return {}
        pairs: dict[str, tuple[Any, Any]] = {}
        for name, value in node.value:
            text = name.value if isinstance(name, self._yaml.ScalarNode) else None
            if text is None:
                self._complain(name, key, "a key is to be a name")
            elif text in pairs:
                first = pairs[text][0].start_mark.line + 1
                self._complain(name, _under(key, text), f"it stands in line {first} already")
            else:
                pairs[text] = name, value
        return pairs

    def _mapping(
        self, node: Any, key: str, known: Mapping[str, _Check], needed: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """The values of a mapping with known keys."""
        values: dict[str, Any] = {}
        pairs = self._pairs(node, key)
        for name, (there, value) in pairs.items():
            if name not in known:
                alike = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {alike[0]!r}? " if alike else ""
                self._complain(
                    there,
                    _under(key, name),
                    f"there is no such key; {hint}Known are {', '.join(known)}",
                )
                continue
            self._take(values, name, value, _under(key, name), known[name])
        for name in needed:
            if name not in pairs and isinstance(node, self._yaml.MappingNode):
                self._complain(node, key, f"{name!r} is missing")
        return values

    def _take(self, values: dict[str, Any], name: str, node: Any, key: str, check: _Check) -> None:
        try:
            values[name] = check(self, node, key)
        except _Wrong as error:
            self._complain(node, key, str(error))

    def _servers(self, node: Any, key: str) -> dict[str, dict[str, Any]]:
        return self._entries(node, key, _SERVERS, ("factory",))

    def _trainers(self, node: Any, key: str) -> dict[str, dict[str, Any]]:
        return self._entries(node, key, _TRAINERS, ("factory",))

    def _machine(self, node: Any, key: str) -> dict[str, Any]:
        return self._mapping(node, key, _MACHINE)

    def _entries(
        self, node: Any, key: str, known: Mapping[str, _Check], needed: tuple[str, ...]
    ) -> dict[str, dict[str, Any]]:
        entries = {}
        for name, (there, value) in self._pairs(node, key).items():
            if not _NAME.fullmatch(name):
                self._complain(
                    there,
                    _under(key, name),
                    "a name is of lower-case letters, digits, '.', '_' and '-', and begins with "
                    "one of the first two",
                )
                continue
            entries[name] = self._mapping(value, _under(key, name), known, needed)
            if {"replicas", "autoscale"} <= entries[name].keys():
                self._complain(
                    value,
                    _under(key, name),
                    "'replicas' and 'autoscale' both say how many; say one of them",
                )
        return entries

    # Values -------------------------------------------------------------------------------

    def _plain(self, node: Any) -> Any:
        try:
            return self._loader.construct_object(node, deep=True)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # A date of a 13th month, say: what YAML makes of a text by how it looks, or by its tag.
            raise _Wrong(f"it is not what it looks like ({error}); write texts in quotes") from None

    def _text(self, node: Any, key: str) -> str:
        value = self._plain(node)
        if not isinstance(value, str) or not value:
            raise _Wrong(f"{_shown(value)} is no text; write it in quotes")
        return value

    def _address(self, node: Any, key: str) -> str:
        value = self._plain(node)
        if not isinstance(value, str) or not _ADDRESS.fullmatch(value) or _port(value) > 65535:
            raise _Wrong(f"{_shown(value)} is no address; write it as '0.0.0.0:5550'")
        return value

    def _path(self, node: Any, key: str) -> Path:
        return self._file.parent / self._text(node, key)

    def _directory(self, node: Any, key: str) -> str:
        return str(self._path(node, key))

    def _function(self, node: Any, key: str) -> str:
        value = self._plain(node)
        if not isinstance(value, str) or not _FUNCTION.fullmatch(value):
            raise _Wrong(
                f"{_shown(value)} names no function; write it as 'module:function', as in "
                "'policies:make_server'"
            )
        return value

    def _count(self, node: Any, key: str) -> int:
        value = self._plain(node)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10_000:
            raise _Wrong(f"{_shown(value)} is no number of servers, from 1 to 10000")
        return value

    def _amount(self, node: Any, key: str) -> float:
        value = self._plain(node)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value <= _MOST:
            raise _Wrong(f"{_shown(value)} is no amount: a number from 0 on, as in 1 or 0.5")
        amount: float = value
        return amount

    def _gpus(self, node: Any, key: str) -> float:
        amount = self._amount(node, key)
        if amount > 1 and amount != int(amount):
            raise _Wrong(f"{_shown(amount)} is no number of GPUs: a part of one, or whole ones")
        return amount

    def _whole(self, node: Any, key: str) -> int:
        value = self._plain(node)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST:
            raise _Wrong(f"{_shown(value)} is no whole number from 0 on")
        return value

    def _bytes(self, node: Any, key: str) -> int:
        value = said = self._plain(node)
        match = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if match is not None:
            size = float(match[1]) * _UNITS[match[2]]
            value = int(size) if size <= _MOST_BYTES else None
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST_BYTES:
            raise _Wrong(f"{_shown(said)} is no size; write it as 200MB or 4GB")
        return value

    def _resources(self, node: Any, key: str) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, (there, value) in self._pairs(node, key).items():
            if name in ("CPU", "GPU"):
                self._complain(there, _under(key, name), f"say it as num_{name.lower()}s")
                continue
            if not name:
                self._complain(there, key, "a resource is to have a name")
                continue
            self._take(values, name, value, _under(key, name), _Reader._amount)
        return values

    def _autoscale(self, node: Any, key: str) -> dict[str, Any]:
        bounds = self._mapping(
            node,
            key,
            {"least": _Reader._count, "most": _Reader._count, "waiting": _Reader._waiting},
            ("most",),
        )
        if bounds.get("least", 1) > bounds.get("most", math.inf):
            raise _Wrong("'least' is more than 'most'")
        return bounds

    def _waiting(self, node: Any, key: str) -> float:
        value = self._amount(node, key)
        if value == 0:
            raise _Wrong("0 calls that wait are never too many; say how many may, as in 2")
        return value

    def _seconds(self, node: Any, key: str) -> float:
        value = self._amount(node, key)
        if value == 0:
            raise _Wrong("0 is no time; say how many seconds, as in 60")
        return value

    def _arguments(self, node: Any, key: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, (there, value) in self._pairs(node, key).items():
            if not name.isidentifier():
                self._complain(there, _under(key, name), "no function has such an argument")
                continue
            self._take(values, name, value, _under(key, name), _Reader._argument)
        return values

    def _argument(self, node: Any, key: str) -> Any:
        value = self._plain(node)
        try:
            json.dumps(value, sort_keys=True)
        except TypeError:  # a date, say, or a mapping of which one key is a text and one a number
            raise _Wrong(
                "it may be text, a number, true, false, null, or lists and mappings of those, with "
                "texts as keys"
            ) from None
        return value

    def _cluster(self, node: Any, key: str) -> Path | dict[str, Any]:
        if isinstance(node, self._yaml.MappingNode):
            self._pairs(node, key)
            content: dict[str, Any] = self._plain(node)  # Ray checks it, and by its own schema
            return content
        path = self._file.parent / self._text(node, key)
        if not path.is_file():
            raise _Wrong(
                f"there is no file {path}; it is the one that `ray up` takes, or its content "
                "stands here"
            )
        return path


def _under(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


_RESOURCES: dict[str, _Check] = {
    "num_cpus": _Reader._amount,
    "num_gpus": _Reader._gpus,
    "resources": _Reader._resources,
}
_SERVERS: dict[str, _Check] = {
    "factory": _Reader._function,
    "arguments": _Reader._arguments,
    "replicas": _Reader._count,
    "autoscale": _Reader._autoscale,
    **_RESOURCES,
}
_TRAINERS: dict[str, _Check] = {
    "factory": _Reader._function,
    "arguments": _Reader._arguments,
    "shards": _Reader._count,
    "checkpoint_dir": _Reader._directory,
    "checkpoint_every": _Reader._seconds,
    **_RESOURCES,
}
_MACHINE: dict[str, _Check] = {
    "num_cpus": _Reader._whole,
    "num_gpus": _Reader._whole,
    "resources": _Reader._resources,
    "object_store_memory": _Reader._bytes,
}
_FILE: dict[str, _Check] = {
    "servers": _Reader._servers,
    "trainers": _Reader._trainers,
    "address": _Reader._text,
    "cluster": _Reader._cluster,
    "machine": _Reader._machine,
    "names": _Reader._address,
    "credentials": _Reader._path,
}
