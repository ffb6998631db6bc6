"""Who may speak, and to whom: the keys of one end, whom a server lets in, and what each may do.

One notion for all transports. ``edgeml keygen`` makes directories of it, and a transport takes the
part that it can use: CURVE keys, certificates, or none where the system itself vouches. A token is
for all of them, strangers' too: core checks it in the handshake, and never sends it where others
could read it. See ``docs/security.md``.
"""

from __future__ import annotations

import hmac
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from edgeml.core.errors import PermissionDenied

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "ALL",
    "PERMISSIONS",
    "SERVER_NAME",
    "ClientKey",
    "Credentials",
    "CredentialsLike",
    "CurveKeys",
    "Keyring",
    "Role",
    "TlsKeys",
    "check_private",
    "digest",
]

PERMISSIONS = ("observe", "act", "call", "upload", "subscribe", "administer")
"""What a role may allow: to read observations and follow them, to act, to call functions and
request types, to upload to stores, to subscribe to topics, and to manage the server."""

SERVER_NAME = "edgeml"
"""The name in a server's certificate. Clients check it in place of the host's name, since the
authority that signed it is the server's own."""

_ENVIRONMENT = "EDGEML_CREDENTIALS"
_EVERYTHING = "all"
_ALLOWED = "allowed"  # the folder of a server's directory that tells whom it lets in
_LARGEST_FILE = 1 << 20  # bytes
_REST = 20  # times as long as a look at the folder takes it is left alone ...
_AHEAD = 1.0  # ... though some looks may be ahead of that by so many seconds, for unknown keys


def digest(token: str) -> str:
    """What a server keeps of a token: SHA-256, in hexadecimal."""
    return sha256(token.encode()).hexdigest()


@dataclass(frozen=True)
class Role:
    """What a key may do.

    Attributes:
        allowed: pairs of a permission and a pattern of names (`fnmatch`), or None for everything.
    """

    allowed: tuple[tuple[str, str], ...] | None = None

    @classmethod
    def parse(cls, text: str) -> Role:
        """Read ``"all"``, or what is allowed: ``"observe"``, ``"act:grip*,call:policy,subscribe"``.

        Each part is one of `PERMISSIONS` and, after a colon, a pattern of the names that it is
        meant for: of observations, actions, functions, request types, stores or topics.

        Raises:
            ValueError: it names what is no permission; the text lists them.
        """
        if not isinstance(text, str):
            raise ValueError(f"a role is a text such as 'observe,act:grip*', not {text!r}")
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if _EVERYTHING in parts:
            return ALL
        allowed = []
        for part in parts:
            permission, _, pattern = part.partition(":")
            if permission not in PERMISSIONS:
                known = ", ".join((_EVERYTHING, *PERMISSIONS))
                raise ValueError(f"{part!r} is no permission; known: {known}")
            allowed.append((permission, pattern or "*"))
        if not allowed:
            raise ValueError("the role is empty, and allows nothing; revoke the key instead")
        return cls(tuple(allowed))

    def allows(self, permission: str, name: str) -> bool:
        """Whether it lets its key do this with what has that name."""
        return self.allowed is None or any(
            permission == each and fnmatchcase(name, pattern) for each, pattern in self.allowed
        )

    def __str__(self) -> str:
        if self.allowed is None:
            return _EVERYTHING
        return ",".join(
            permission if pattern == "*" else f"{permission}:{pattern}"
            for permission, pattern in self.allowed
        )


ALL = Role()
"""The role that allows everything; a key's default."""


@dataclass(frozen=True)
class ClientKey:
    """What a server knows of one client; nothing of it is a secret.

    Attributes:
        name: its identity.
        role: what it may do.
        curve: its public CURVE key, in Z85 (ZeroMQ RFC 32); None if it has none.
        certificate: of its certificate (DER) the SHA-256 in hexadecimal; None if it has none.
        token: the `digest` of its token; None if it has none.
        expires: when it ends, in seconds since 1970; None for never.
    """

    name: str
    role: Role = ALL
    curve: str | None = None
    certificate: str | None = None
    token: str | None = None
    expires: float | None = None

    @classmethod
    def read(cls, path: Path) -> ClientKey:
        """Read the file that `write` wrote.

        Raises:
            ValueError: it is none; the text names the file.
        """
        try:
            told = json.loads(_read(path))
            key = cls(**{**told, "role": Role.parse(told["role"])})
            if not key.name or not isinstance(key.name, str) or key.name != path.stem:
                raise ValueError(f"its name is {key.name!r}")
            texts = (key.curve, key.certificate, key.token)
            if not all(text is None or isinstance(text, str) for text in texts):
                raise ValueError("a key that is no text")
            if key.expires is not None:
                key = replace(key, expires=float(key.expires))
            return key
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} does not describe a client's key: {error}") from None

    def write(self, path: Path) -> None:
        """Write it as a file that only its owner can read; replaces one as a whole."""
        told = {**vars(self), "role": str(self.role)}
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(told, file, indent=1)
        draft.replace(path)


class Keyring:
    """Whom a server lets in: clients' keys, which may be added and revoked while it serves.

    Args:
        keys: those that there are from the start.
        directory: a folder of files of `ClientKey`, read again whenever it changes, and before a
            key that isn't in it is refused; where it has gone, so have they. None for none.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: a file in it is no client's key.
    """

    def __init__(self, keys: Iterable[ClientKey] = (), directory: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # one at a time, so that what was read last counts
        self._directory = directory
        self._added = {key.name: key for key in keys}
        self._revoked: set[str] = set()
        self._read: dict[str, ClientKey] = {}
        self._seen: dict[str, Any] = {}
        self._rested = 0.0  # when the looks at the folder will have been paid for by rest
        self.version = 0
        """Rises whenever somebody was added or revoked."""
        if directory is not None and not directory.is_dir():
            raise FileNotFoundError(f"there is no directory {directory}")
        self.refresh()

    def add(self, key: ClientKey) -> None:
        """Let a client in from now on; its former key, if it has one, is replaced."""
        with self._lock:
            self._added[key.name] = key
            self._revoked.discard(key.name)
            self.version += 1

    def revoke(self, name: str) -> None:
        """Let a client in no more, and cut off within a second where it is connected.

        Lasts as long as this object; ``edgeml keygen DIR --revoke NAME`` lasts.

        Raises:
            PermissionDenied: there is none of that name.
        """
        with self._lock:
            self._find(name)
            self._added.pop(name, None)
            self._revoked.add(name)
            self.version += 1

    def names(self) -> list[str]:
        """Of the clients that are let in, expired ones included."""
        with self._lock:
            return sorted((self._read.keys() | self._added.keys()) - self._revoked)

    def refresh(self) -> None:
        """Look whether the directory has changed, and read it again if it has.

        Raises:
            ValueError: a file in it is no client's key; the others count.
        """
        if self._directory is None:
            return
        with self._reading:
            began = time.monotonic()
            try:
                wrong = self._read_directory(self._directory)
                now = time.monotonic()
                self._rested = max(self._rested, now) + _REST * (now - began)
            except OSError:  # no file can be opened, say, which mustn't save a key that is revoked
                self._drop_changed(self._directory)
                raise
        if wrong is not None:
            raise wrong

    def _read_directory(self, directory: Path) -> Exception | None:
        """Read all keys anew if any has changed; returns what is wrong with one of them."""
        seen = _stamp(directory)
        if seen == self._seen:
            return None
        found, wrong = {}, None
        for path in sorted(directory.glob("*.json")):
            try:
                check_private(path)
                key = ClientKey.read(path)
                found[key.name] = key
            except FileNotFoundError:  # it has just been removed
                pass
            except (ValueError, PermissionDenied) as error:
                wrong = error
        with self._lock:
            if found != self._read:
                self._read = found
                self.version += 1
            self._seen = seen
        return wrong

    def _drop_changed(self, directory: Path) -> None:
        """Let nobody in whose file has gone or changed; to see that takes no file descriptor."""
        kept = {}
        for name, key in self._read.items():
            with suppress(OSError):
                file = f"{name}.json"
                if _stamp_of((directory / file).stat()) == self._seen.get(file):
                    kept[name] = key
        with self._lock:
            if len(kept) < len(self._read):
                self._read = kept
                self._seen = {}
                self.version += 1

    def __contains__(self, name: object) -> bool:
        """Whether a client of that name is let in; its key may have expired."""
        with self._lock:
            return (name in self._added or name in self._read) and name not in self._revoked

    def by_name(self, name: str) -> ClientKey:
        """Return the key of a client.

        Raises:
            PermissionDenied: it is not let in, any more or yet; or its key has expired.
        """
        with self._lock:
            return _check_expiry(self._find(name))

    def _find(self, name: str) -> ClientKey:
        key = self._added.get(name) or self._read.get(name)
        if name in self._revoked:
            raise PermissionDenied(f"the key of {name!r} has been revoked")
        if key is None:
            raise PermissionDenied(f"the server knows no key of {name!r}, or has revoked it")
        return key

    def _all(self) -> list[ClientKey]:
        with self._lock:
            keys = {**self._read, **self._added}
            return [key for name, key in keys.items() if name not in self._revoked]

    def by_curve(self, public: str | bytes) -> ClientKey:
        """Return the key of the client with this public CURVE key (Z85); raises as `by_name`."""
        text = public if isinstance(public, str) else public.decode("latin-1")
        return self._search(lambda key: key.curve == text, "CURVE key")

    def by_certificate(self, der: bytes) -> ClientKey:
        """Return the key of the client with this certificate (DER); raises as `by_name`."""
        told = sha256(der).hexdigest()
        return self._search(lambda key: key.certificate == told, "certificate")

    def by_token(self, token: str) -> ClientKey:
        """Return the key of the client with this token; raises as `by_name`.

        Takes as long for a token that is nearly right as for any other.
        """
        told = digest(token)
        return self._search(lambda key: hmac.compare_digest(key.token or "", told), "token")

    def _search(self, fits: Callable[[ClientKey], bool], what: str) -> ClientKey:
        fitting = [key for key in self._all() if fits(key)]
        # It may have been made just now; but whoever tries many keys isn't to cost many looks.
        if not fitting and self._rested - time.monotonic() < _AHEAD:
            with suppress(OSError, ValueError, PermissionDenied):  # the keys that can be read count
                self.refresh()
            fitting = [key for key in self._all() if fits(key)]
        if not fitting:
            raise PermissionDenied(f"the server knows no such {what}, or has revoked it")
        return _check_expiry(fitting[0])


def _check_expiry(key: ClientKey) -> ClientKey:
    if key.expires is not None and time.time() > key.expires:
        raise PermissionDenied(
            f"the key of {key.name!r} has expired: make another with `edgeml keygen`"
        )
    return key


def _stamp(directory: Path) -> dict[str, Any]:
    """What changes whenever a file in a directory does, of each file."""
    stamps: dict[str, Any] = {}
    try:
        entries = os.scandir(directory)
    except FileNotFoundError:
        return stamps
    with entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                stamps[entry.name] = _stamp_of(entry.stat())
    return stamps


def _stamp_of(now: os.stat_result) -> tuple[int, ...]:
    return now.st_mtime_ns, now.st_ctime_ns, now.st_ino, now.st_size


@dataclass(frozen=True)
class CurveKeys:
    """A pair of CURVE keys, in Z85 (ZeroMQ RFC 32)."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True)
class TlsKeys:
    """Files, in PEM, of an authority's certificate, one's own, and its key."""

    authority: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class Credentials:
    """The keys of one end; any part may be absent, and a transport says which one it lacks.

    Attributes:
        name: of a client: who it is.
        curve: its own CURVE keys.
        curve_server: of a client: the server's public one.
        tls: its own certificate and key, and the authority that the other side's must be of.
        token: of a client: what it shows in the handshake.
        clients: of a server: whom it lets in; None lets in everybody.
        users: other users of this machine, by name or id, whose processes are talked to over shared
            memory; one's own user is always.
    """

    name: str = ""
    curve: CurveKeys | None = None
    curve_server: str | None = None
    tls: TlsKeys | None = None
    token: str | None = field(default=None, repr=False)
    clients: Keyring | None = None
    users: tuple[int | str, ...] = ()

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Self:
        """Read a directory that ``edgeml keygen`` made, a server's or a client's.

        Raises:
            FileNotFoundError: there is none.
            PermissionDenied: others could read it; the text says how to mend that.
            ValueError: something in it is no key.
        """
        home = Path(directory).expanduser()
        check_private(home)
        if not home.is_dir():
            raise ValueError(f"{home} is no directory: give the one that `edgeml keygen` made")

        def read(name: str) -> str | None:
            path = home / name
            if not path.exists():
                return None
            check_private(path)
            return _read(path).strip()

        is_server = (home / _ALLOWED).is_dir()
        token, secret, public = read("token"), read("curve.secret"), read("curve.public")
        has_keys = secret is not None or (home / "key.pem").exists()
        if not is_server and token is None:
            if has_keys and not (home / "server.public").exists():
                raise ValueError(
                    f"{home} has a server's keys and no folder {_ALLOWED!r}, so that it would let "
                    f"nobody in: copy that, too, or `edgeml keygen {home} --client NAME`"
                )
            if not has_keys:
                raise ValueError(f"there are no keys in {home}: {_where_to_look(home)}")
        tls = None
        files = [home / name for name in ("ca.pem", "cert.pem", "key.pem")]
        if all(path.exists() for path in files):
            for path in files:
                check_private(path)
            tls = TlsKeys(*files)
        clients = None
        if is_server:
            check_private(home / _ALLOWED)
            clients = Keyring(directory=home / _ALLOWED)
        users = [line.strip() for line in (read("users") or "").splitlines()]
        return cls(
            name=read("name") or "",
            curve=None if secret is None or public is None else CurveKeys(public, secret),
            curve_server=read("server.public"),
            tls=tls,
            token=token,
            clients=clients,
            users=tuple(int(user) if user.isdecimal() else user for user in users if user),
        )

    @classmethod
    def resolve(cls, given: CredentialsLike) -> Credentials | None:
        """Return what a user means by ``credentials=``: these, those of a directory, or those of
        ``$EDGEML_CREDENTIALS``; None where there are none.

        Raises:
            TypeError: it is something else.
            What `load` does.
        """
        if given is None:
            given = os.environ.get(_ENVIRONMENT) or None
        if given is None or isinstance(given, Credentials):
            return given
        if not isinstance(given, (str, os.PathLike)) or not os.fspath(given):
            raise TypeError(
                f"credentials must be the directory that `edgeml keygen` made, or Credentials, not "
                f"{type(given).__name__}; leave them out for none"
            )
        return cls.load(given)

    def for_server(self) -> Credentials:
        """Return these, if they are a server's.

        Raises:
            ValueError: they are a client's, or don't say whom to let in.
        """
        if self.clients is not None or self == Credentials(users=self.users):
            return self
        if self.token is not None or self.curve_server is not None:
            raise ValueError(
                f"these are the keys of a client, {self.name!r}: a server's are in the directory "
                "that `edgeml keygen DIR` made"
            )
        raise ValueError(
            "these credentials don't say whom to let in: give clients=, a Keyring, or the "
            "directory that `edgeml keygen DIR` made"
        )

    def for_client(self) -> Credentials:
        """Return these, if they are a client's.

        Raises:
            ValueError: they are a server's.
        """
        if self.clients is not None:
            raise ValueError(
                "these are the keys of a server: make a client's with `edgeml keygen DIR --client "
                "NAME`, and give DIR/clients/NAME"
            )
        return self


CredentialsLike: TypeAlias = "Credentials | str | os.PathLike[str] | None"
"""What users give as ``credentials=``: see `Credentials.resolve`."""


def _where_to_look(home: Path) -> str:
    inside = [path for path in sorted(home.iterdir()) if (path / "token").exists()]
    if inside:
        return f"give one of the folders in it, such as {inside[0]}"
    return "make them with `edgeml keygen`"


def check_private(path: Path) -> None:
    """See that nobody but this user, or root, could read or change a file or directory.

    Raises:
        FileNotFoundError: there is none.
        PermissionDenied: others could; the text says how to mend that.
    """
    try:
        now = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no {path}: make keys with `edgeml keygen`, or copy them here"
        ) from None
    if not stat.S_ISREG(now.st_mode) and not stat.S_ISDIR(now.st_mode):
        raise ValueError(f"{path} is neither a file nor a directory")  # to open it may block
    if stat.S_IMODE(now.st_mode) & 0o077:
        mode = "700" if path.is_dir() else "600"
        raise PermissionDenied(f"others can read {path}: chmod {mode} {path}")
    if now.st_uid not in (os.geteuid(), 0):
        raise PermissionDenied(
            f"{path} belongs to user {now.st_uid}, who could change it: chown it to your own"
        )


def _read(path: Path) -> str:
    with path.open() as file:
        text = file.read(_LARGEST_FILE + 1)
    if len(text) > _LARGEST_FILE:
        raise ValueError(f"{path} is too large to be a key")
    return text
