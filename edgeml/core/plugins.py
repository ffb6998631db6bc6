"""Transports, codecs, doors and resolvers by name, from whatever packages are installed.

The entry point's name is the name that users write, so listing them loads nothing and using one
loads that one alone. What is loaded registers with pluggy and answers a hook; the built-in plugins
do exactly what a stranger's do. Hooks are asked once for each name, never on the data path.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from edgeml.core.codec import Codec
from edgeml.core.door import Door
from edgeml.core.errors import PluginError, text_of
from edgeml.core.resolver import Resolver
from edgeml.core.transport import Transport

__all__ = [
    "KINDS",
    "Found",
    "find",
    "hookimpl",
    "load",
    "load_codec",
    "load_door",
    "load_resolver",
    "load_transport",
    "resolves",
]

hookspec = pluggy.HookspecMarker("edgeml")
hookimpl = pluggy.HookimplMarker("edgeml")
"""Marks a plugin's answer to one of the hooks below."""


class Hooks:
    """The hooks; a plugin's module answers the one of its entry-point group."""

    @hookspec(firstresult=True)
    def edgeml_transport(self) -> type[Transport]:  # type: ignore[empty-body]
        """The transport class of the module that the ``edgeml.transports`` entry point names."""

    @hookspec(firstresult=True)
    def edgeml_codec(self) -> type[Codec]:  # type: ignore[empty-body]
        """The codec class of the module that the ``edgeml.codecs`` entry point names."""

    @hookspec(firstresult=True)
    def edgeml_door(self) -> type[Door]:  # type: ignore[empty-body]
        """The door class of the module that the ``edgeml.doors`` entry point names."""

    @hookspec(firstresult=True)
    def edgeml_resolver(self) -> type[Resolver]:  # type: ignore[empty-body]
        """The resolver class of the module that the ``edgeml.resolvers`` entry point names."""


def _manager() -> pluggy.PluginManager:
    made = pluggy.PluginManager("edgeml")
    made.add_hookspecs(Hooks)
    return made


KINDS: dict[str, type] = {
    "transport": Transport,
    "codec": Codec,
    "door": Door,
    "resolver": Resolver,
}
"""The kinds of plugin, and what each is a subclass of."""

# One for each kind, since one module may well offer one of each.
_managers = {kind: _manager() for kind in KINDS}
_lock = threading.RLock()  # a plugin may load another while it is being imported


@dataclass(frozen=True)
class Found:
    """An installed plugin, loaded or not.

    Attributes:
        kind: one of `KINDS`.
        name: the entry point's name.
        package: the distribution that it comes from, with its version.
        entry: what loads it.
    """

    kind: str
    name: str
    package: str
    entry: EntryPoint


def find(kind: str) -> list[Found]:
    """List the installed plugins of a kind, one of `KINDS`; loads none of them."""
    found = {}
    for entry in entry_points(group=f"edgeml.{kind}s"):
        package = _package(entry)
        # A distribution may be on sys.path twice; it is one plugin all the same.
        found[entry.name, package] = Found(kind, entry.name, package, entry)
    return sorted(found.values(), key=lambda f: (f.name, f.package))


def _package(entry: EntryPoint) -> str:
    """The name and version of the distribution that an entry point comes from."""
    try:
        return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"
    except Exception:  # half uninstalled, say; importlib.metadata fails in several ways
        return "a package without metadata"


def _load(kind: str, name: str) -> Any:
    """Load the class that a plugin offers, check that it can be used, and make one."""
    installed = find(kind)
    matches = [f for f in installed if f.name == name]
    if not matches:
        names = ", ".join(sorted({f.name for f in installed})) or "none"
        hint = f"; doors are packages: pip install edgeml-{name}" if kind == "door" else ""
        raise PluginError(f"there is no {kind} {name!r}; installed are: {names}{hint}")
    if len(matches) > 1:
        packages = " and ".join(f.package for f in matches)
        raise PluginError(f"{kind} {name!r} is claimed by {packages}; uninstall one of them")
    found = matches[0]
    try:
        loaded = _ask(kind, found.entry)
        problem = _unusable(loaded, kind, name)
        if not problem:
            return loaded()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() among them: it ends nothing here
        raise PluginError(
            f"{kind} {name!r} of {found.package} failed to load: "
            f"{type(error).__name__}: {text_of(error)}"
        ) from error
    raise PluginError(f"{kind} {name!r} of {found.package} {problem}")


def _ask(kind: str, entry: EntryPoint) -> Any:
    """Import a plugin, and have it answer the hook of its kind; None if it does not."""
    with _lock:
        plugin = entry.load()
        manager = _managers[kind]
        try:
            if not manager.is_registered(plugin):
                manager.register(plugin, entry.name)
            others = [other for other in manager.get_plugins() if other is not plugin]
            return manager.subset_hook_caller(f"edgeml_{kind}", others)()
        except BaseException:
            # The next try should fail for the same reason, not for this one's remains.
            if manager.is_registered(plugin):
                manager.unregister(plugin)
            raise


def _unusable(loaded: Any, kind: str, name: str) -> str | None:
    """What is wrong with what a plugin answered; None if nothing is."""
    base = KINDS[kind]
    if loaded is None:
        return f"does not answer the hook edgeml_{kind}"
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        return f"answers edgeml_{kind} with {loaded!r}, which is no subclass of {base.__name__}"
    if missing := getattr(loaded, "__abstractmethods__", None):
        return f"lacks {', '.join(sorted(missing))}"
    if getattr(loaded, "name", None) != name:
        return f"is called {getattr(loaded, 'name', None)!r} by its class; make the names equal"
    return None


_loaded: dict[tuple[str, str], Any] = {}


def load(kind: str, name: str) -> Any:
    """The plugin of that kind and name, loaded when first asked for.

    Raises:
        PluginError: not installed, broken, or claimed by two packages; the text says which.
    """
    if (kind, name) not in _loaded:
        _loaded[kind, name] = _load(kind, name)
    return _loaded[kind, name]


def load_transport(name: str) -> Transport:
    """The transport of that name; see `load`."""
    made: Transport = load("transport", name)
    return made


def load_codec(name: str) -> Codec:
    """The codec of that name; see `load`."""
    made: Codec = load("codec", name)
    return made


def load_door(name: str) -> Door:
    """The door of that name; see `load`."""
    made: Door = load("door", name)
    return made


def load_resolver(name: str) -> Resolver:
    """The resolver of that name; see `load`."""
    made: Resolver = load("resolver", name)
    return made


def resolves(scheme: str) -> bool:
    """Whether a URL's scheme is a resolver's; loads none."""
    if ("transport", scheme) in _loaded:  # as nearly always, and to look takes milliseconds
        return False
    return ("resolver", scheme) in _loaded or any(f.name == scheme for f in find("resolver"))
