"""``edgeml keygen``: the keys of a server and of the clients that it lets in.

A server's directory, which only its owner may read:

======================================  ======================================================
``ca.pem``, ``ca.key``                  the authority that signs all certificates, and its key
``cert.pem``, ``key.pem``               the server's certificate, by which clients know it
``curve.public``, ``curve.secret``      its CURVE keys (https://rfc.zeromq.org/spec/26), in Z85
``allowed/NAME.json``                   what the server knows of a client: no secret
``clients/NAME/``                       what the client needs, to be taken to it
======================================  ======================================================

The certificates' keys are of the curve P-256, which both OpenSSL and gRPC's BoringSSL take.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

from edgeml.core.security import SERVER_NAME, ClientKey, Role, check_private, digest
from edgeml.extras import need_cryptography

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, x25519
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError as error:
    raise need_cryptography("edgeml keygen") from error

__all__ = ["CLIENT_DAYS", "SERVER_DAYS", "make_client_keys", "make_server_keys", "revoke", "run"]

SERVER_DAYS = 3650
"""For how long a server's certificate is valid by default."""

CLIENT_DAYS = 365
"""For how long a client's keys are valid by default."""

_AUTHORITY_DAYS = 36500  # it lies beside the server's key, so that its end would protect nothing
_EARLIER = timedelta(days=1)  # that keys are valid before they are made, for clocks that are behind
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # is a file's name and a certificate's
_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def run(
    directory: Path, client: str | None, role: str, days: float | None, revoked: str | None
) -> int:
    """Make keys, or revoke a client's, and print what was done and what comes next; 0 then.

    Args:
        directory: of the server's keys; made, with them, where there are none.
        client: whose keys to make; without it, and without `revoked`, the server's alone.
        role: what the client may do.
        days: for how long what is made is valid.
        revoked: whose keys to revoke.

    Raises:
        OSError: the directory can't be written, or others may read it.
        ValueError: no name of a client, or no role.
    """
    if revoked is not None:
        revoke(directory, revoked)
        print(f"{revoked} is let in no more; servers that run cut it off within a second")
        return 0
    is_new = not (directory / "ca.key").exists()
    if is_new or client is None:
        make_server_keys(directory, SERVER_DAYS if days is None or client else days)
        print(f"{directory}  the server's keys, until {_end_of(directory)}")
        if is_new:
            print("    they stay on the server's machine, which uses them with")
        else:
            print("    its certificate is new, and all else is as it was; restart what uses")
        print(f"    credentials={str(directory)!r} or EDGEML_CREDENTIALS={directory.resolve()}")
    if client is not None:
        made = make_client_keys(directory, client, role, CLIENT_DAYS if days is None else days)
        print(f"{made}  the keys of {client}, who may do: {role}, until {_end_of(made)}")
        print("    take them to the client's machine, as in")
        print(f"    scp -rp {made} HOST:keys && rm -r {made}")
        print("    which uses them with credentials='keys' or EDGEML_CREDENTIALS=$HOME/keys")
    elif is_new:
        print(f"for a client: edgeml keygen {directory} --client NAME")
    return 0


# Server -----------------------------------------------------------------------------------


def make_server_keys(directory: str | Path, days: float = SERVER_DAYS) -> Path:
    """Make the keys of a server, and an authority of its own that will sign its clients'.

    Where there are some, only the server's certificate is made anew, for another `days`: its
    keys, its authority and its clients stay as they are.

    Args:
        directory: where to; made if it isn't there, for its owner alone.
        days: for how long the server's certificate is valid.

    Returns:
        The directory.

    Raises:
        FileExistsError: there is something else in it.
        PermissionDenied: others than its owner may read it.
    """
    directory = Path(directory)
    if (directory / "ca.key").exists():
        check_private(directory)
        key = _read_key(directory / "key.pem")
        draft = directory / f".cert.pem.{os.getpid()}"
        draft.unlink(missing_ok=True)
        _write(draft, _sign_server(directory, key.public_key(), days))
        draft.replace(directory / "cert.pem")  # whoever reads it sees all of one of them
        return directory
    if directory.is_dir() and any(directory.iterdir()):
        raise FileExistsError(
            f"{directory} has other files and no keys; name a directory that is new or empty"
        )
    authority = ec.generate_private_key(ec.SECP256R1())
    key = ec.generate_private_key(ec.SECP256R1())
    with _whole(directory) as made:
        _write(made / "ca.key", _pem_of(authority))
        _write(made / "ca.pem", _make_authority(authority))
        _write(made / "key.pem", _pem_of(key))
        _write(made / "cert.pem", _sign_server(made, key.public_key(), days))
        _write_curve(made)
        (made / "allowed").mkdir(0o700)
        (made / "clients").mkdir(0o700)
    return directory


# Clients ----------------------------------------------------------------------------------


def make_client_keys(
    directory: str | Path, name: str, role: str = "all", days: float = CLIENT_DAYS
) -> Path:
    """Make the keys of a client, and let it in: also at servers that run already.

    Args:
        directory: of the server's keys.
        name: whom they are for; 64 ASCII letters, digits, dots, underscores and hyphens at most.
        role: what it may do, as `Role.parse` takes it.
        days: for how long they are valid.

    Returns:
        A directory with all that the client needs, to be taken to its machine.

    Raises:
        FileExistsError: the client has keys already.
        FileNotFoundError: the directory has no server's keys.
        PermissionDenied: others than its owner may read the directory.
        ValueError: this is no name, or no role.
    """
    directory = Path(directory)
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no client's name; take up to 64 of A-Z a-z 0-9 . _ - and begin with "
            "a letter or a digit"
        )
    known = Role.parse(role)
    _check_server(directory)
    allowed, theirs = directory / "allowed" / f"{name}.json", directory / "clients" / name
    if allowed.exists() or theirs.exists():
        raise FileExistsError(
            f"{name} has keys already, in {directory}; for new ones in their place: "
            f"edgeml keygen {directory} --revoke {name}, and "
            "this again"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _sign(
        directory, name, key.public_key(), days, ExtendedKeyUsageOID.CLIENT_AUTH, None
    )
    token = secrets.token_urlsafe(32)
    with _whole(theirs) as made:
        _write(made / "name", name)
        _write(made / "ca.pem", (directory / "ca.pem").read_text())
        _write(made / "key.pem", _pem_of(key))
        _write(made / "cert.pem", _pem_of(certificate))
        public = _write_curve(made)
        _write(made / "server.public", (directory / "curve.public").read_text())
        _write(made / "token", token)
    ClientKey(
        name,
        known,
        curve=public,
        certificate=certificate.fingerprint(hashes.SHA256()).hex(),
        token=digest(token),
        expires=_expiry_of(certificate).timestamp(),
    ).write(allowed)
    return theirs


def revoke(directory: str | Path, name: str) -> None:
    """Let a client in no more, and remove what is left here of its keys.

    Args:
        directory: of the server's keys.
        name: whose.

    Raises:
        FileNotFoundError: no such client is known; the text lists them.
    """
    directory = Path(directory)
    _check_server(directory)
    allowed, theirs = directory / "allowed" / f"{name}.json", directory / "clients" / name
    if not _NAME.fullmatch(name) or not (allowed.exists() or theirs.exists()):
        known = sorted(path.stem for path in (directory / "allowed").glob("*.json"))
        raise FileNotFoundError(
            f"{directory} knows no client {name!r}; it knows {', '.join(known) or 'none'}"
        )
    allowed.unlink(missing_ok=True)  # first: this is what counts
    if theirs.exists():
        shutil.rmtree(theirs)


# Certificates -----------------------------------------------------------------------------


def _make_authority(key: ec.EllipticCurvePrivateKey) -> str:
    name = f"edgeml authority {secrets.token_hex(4)}"
    made = (
        _builder(name, name, key.public_key(), _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(_key_name(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pem_of(made)


def _sign_server(directory: Path, key: ec.EllipticCurvePublicKey, days: float) -> str:
    return _pem_of(
        _sign(directory, SERVER_NAME, key, days, ExtendedKeyUsageOID.SERVER_AUTH, SERVER_NAME)
    )


def _sign(
    directory: Path,
    name: str,
    key: ec.EllipticCurvePublicKey,
    days: float,
    purpose: x509.ObjectIdentifier,
    host: str | None,
) -> x509.Certificate:
    """Have a key certified by the directory's authority, for one purpose only."""
    authority = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
    issuer = authority.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    builder = (
        _builder(name, str(issuer), key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(_key_name(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
    )
    if host is not None:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False
        )
    return builder.sign(_read_key(directory / "ca.key"), hashes.SHA256())


def _builder(
    name: str, issuer: str, key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - _EARLIER)
        .not_valid_after(end)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_name(key: ec.EllipticCurvePublicKey) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(key)


def _pem_of(what: x509.Certificate | ec.EllipticCurvePrivateKey) -> str:
    pem = serialization.Encoding.PEM
    if isinstance(what, x509.Certificate):
        return what.public_bytes(pem).decode()
    plain = serialization.NoEncryption()
    return what.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain).decode()


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path} is no key of an elliptic curve, so edgeml keygen didn't make it")
    return key


def _expiry_of(certificate: x509.Certificate) -> datetime:
    return certificate.not_valid_after_utc


def _end_of(directory: Path) -> str:
    certificate = x509.load_pem_x509_certificate((directory / "cert.pem").read_bytes())
    return f"{_expiry_of(certificate):%Y-%m-%d}"


# CURVE ------------------------------------------------------------------------------------


def _write_curve(directory: Path) -> str:
    """Make a pair of CURVE keys, write both and return the public one."""
    key = x25519.X25519PrivateKey.generate()
    public = _z85(key.public_key().public_bytes_raw())
    _write(directory / "curve.public", public)
    _write(directory / "curve.secret", _z85(key.private_bytes_raw()))
    return public


def _z85(raw: bytes) -> str:
    """Encode bytes, 4 to each 5 characters (https://rfc.zeromq.org/spec/32)."""
    text = ""
    for start in range(0, len(raw), 4):
        number = int.from_bytes(raw[start : start + 4], "big")
        text += "".join(_Z85[number // 85**place % 85] for place in (4, 3, 2, 1, 0))
    return text


# Files ------------------------------------------------------------------------------------


@contextmanager
def _whole(directory: Path) -> Iterator[Path]:
    """A new directory to fill, which takes its place at the end, or is gone."""
    directory.parent.mkdir(0o700, parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".keygen-", dir=directory.parent))
    try:
        yield made
        made.rename(directory)  # in the place of an empty one, or of none
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    """Write a file that nobody else may read at any time."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)  # as it is: other people's clients show a token just as they read it


def _check_server(directory: Path) -> None:
    if not (directory / "ca.key").exists():
        raise FileNotFoundError(
            f"{directory} has no server's keys; make them with: edgeml keygen {directory}"
        )
    check_private(directory)
