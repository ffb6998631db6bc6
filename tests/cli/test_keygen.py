"""``edgeml keygen``: what it makes fits together, is whole, and is for its owner's eyes alone."""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import stat
import time

import pytest
import zmq
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgeml import InferenceClient, InferenceServer, Unreachable, cli
from edgeml.cli.keygen import make_client_keys, make_server_keys, revoke
from edgeml.core.errors import PermissionDenied
from edgeml.core.security import Credentials
from pairs import later, run_fresh, took, wait_until

SERVER_FILES = {"ca.pem", "ca.key", "cert.pem", "key.pem", "curve.public", "curve.secret"}
CLIENT_FILES = {
    *("name", "ca.pem", "cert.pem", "key.pem", "curve.public", "curve.secret"),
    *("server.public", "token"),
}


@pytest.fixture
def keys(tmp_path):
    return make_server_keys(tmp_path / "keys")


def text_of(path):
    return path.read_text().strip()


def certificate_of(directory):
    return x509.load_pem_x509_certificate((directory / "cert.pem").read_bytes())


def everything_in(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def shake_hands(server, client):
    """A TLS handshake in memory; each end shows its certificate, and asks for the other's."""
    contexts = []
    for protocol, directory in (
        (ssl.PROTOCOL_TLS_SERVER, server),
        (ssl.PROTOCOL_TLS_CLIENT, client),
    ):
        context = ssl.SSLContext(protocol)
        context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
        context.load_verify_locations(directory / "ca.pem")
        context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        contexts.append(context)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = contexts[0].wrap_bio(there, back, server_side=True)
    ours = contexts[1].wrap_bio(back, there, server_hostname="edgeml")
    waiting = [ours, theirs]
    for _ in range(8):
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
    return theirs.getpeercert(binary_form=True)


# What is made -----------------------------------------------------------------------------


def test_a_servers_keys_are_made_where_nobody_else_looks(tmp_path):
    before = os.umask(0)
    try:
        keys = make_server_keys(tmp_path / "deep" / "keys")
        robot = make_client_keys(keys, "robot")
    finally:
        os.umask(before)
    assert {path.name for path in keys.iterdir()} == SERVER_FILES | {"allowed", "clients"}
    assert {path.name for path in robot.iterdir()} == CLIENT_FILES
    for path in (keys, *keys.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_a_client_and_its_server_accept_each_others_certificates(keys):
    shown = shake_hands(keys, make_client_keys(keys, "robot"))
    known = json.loads((keys / "allowed" / "robot.json").read_text())
    assert hashlib.sha256(shown).hexdigest() == known["certificate"]


def test_a_client_cannot_pass_for_the_server(keys):
    robot, other = make_client_keys(keys, "robot"), make_client_keys(keys, "other")
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        shake_hands(robot, other)


def test_a_servers_certificate_admits_no_client(keys):
    with pytest.raises(ssl.SSLError, match="purpose"):
        shake_hands(keys, keys)


def test_keys_of_another_authority_are_refused(keys, tmp_path):
    other = make_server_keys(tmp_path / "other")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(other, make_client_keys(keys, "robot"))


def test_certificates_say_who_and_what_for(keys):
    robot = make_client_keys(keys, "robot")
    for directory, name, purpose in (
        (keys, "edgeml", ExtendedKeyUsageOID.SERVER_AUTH),
        (robot, "robot", ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        made = certificate_of(directory)
        assert made.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == name
        usage = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usage) == [purpose]
    names = certificate_of(keys).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == ["edgeml"]


def test_curve_keys_are_zeromqs(keys):
    robot = make_client_keys(keys, "robot")
    for directory in (keys, robot):
        secret = text_of(directory / "curve.secret").encode()
        assert zmq.curve_public(secret).decode() == text_of(directory / "curve.public")
    assert text_of(robot / "server.public") == text_of(keys / "curve.public")


def test_a_server_knows_of_a_client_nothing_that_is_secret(keys):
    robot = make_client_keys(keys, "robot", role="observe", days=30)
    text = (keys / "allowed" / "robot.json").read_text()
    known = json.loads(text)
    token = text_of(robot / "token")
    assert known == {
        "name": "robot",
        "role": "observe",
        "curve": text_of(robot / "curve.public"),
        "certificate": known["certificate"],
        "token": hashlib.sha256(token.encode()).hexdigest(),
        "expires": pytest.approx(time.time() + 30 * 86400, abs=60),
    }
    assert len(token) >= 32
    assert token not in text
    assert text_of(robot / "curve.secret") not in text
    assert certificate_of(robot).not_valid_after_utc.timestamp() == known["expires"]


def test_keys_that_have_expired_can_be_made(keys):
    robot = make_client_keys(keys, "robot", days=-1)
    assert json.loads((keys / "allowed" / "robot.json").read_text())["expires"] < time.time()
    with pytest.raises(ssl.SSLError, match="expired"):
        shake_hands(keys, robot)


def test_no_two_clients_share_anything_but_the_server(keys):
    robot, other = make_client_keys(keys, "robot"), make_client_keys(keys, "other")
    same = {n for n in CLIENT_FILES if (robot / n).read_bytes() == (other / n).read_bytes()}
    assert same == {"ca.pem", "server.public"}


def test_what_is_made_is_what_servers_and_clients_take(keys):
    robot = make_client_keys(keys, "robot", role="observe,act:grip*")
    server, client = Credentials.load(keys), Credentials.load(robot)
    assert server.clients is not None
    known = server.clients.by_name("robot")
    assert str(known.role) == "observe,act:grip*"
    assert client.name == "robot"
    assert client.curve is not None
    assert client.curve.secret == text_of(robot / "curve.secret")
    assert client.token is not None
    assert server.clients.by_curve(client.curve.public) == known
    assert server.clients.by_token(client.token) == known
    assert server.clients.by_certificate(shake_hands(keys, robot)) == known
    assert server.curve is not None
    assert server.curve.public == client.curve_server
    revoke(keys, "robot")
    server.clients.refresh()
    with pytest.raises(PermissionDenied):
        server.clients.by_name("robot")


def test_a_role_is_one_that_there_is(keys):
    before = everything_in(keys)
    with pytest.raises(ValueError, match="'fly' is no permission"):
        make_client_keys(keys, "robot", role="observe,fly")
    assert everything_in(keys) == before


# What stays -------------------------------------------------------------------------------


def test_a_new_certificate_for_the_server_changes_nothing_else(keys):
    robot = make_client_keys(keys, "robot")
    before = everything_in(keys)
    make_server_keys(keys, days=-1)
    after = everything_in(keys)
    assert {p.name for p in before if before[p] != after[p]} == {"cert.pem"}
    assert before.keys() == after.keys()
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        shake_hands(keys, robot)
    make_server_keys(keys)
    assert shake_hands(keys, robot)


def test_a_client_that_has_keys_keeps_them(keys):
    make_client_keys(keys, "robot")
    before = everything_in(keys)
    with pytest.raises(FileExistsError, match="--revoke robot"):
        make_client_keys(keys, "robot")
    assert everything_in(keys) == before


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="new or empty"):
        make_server_keys(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(directory):
        raise OSError("the disk is full")

    monkeypatch.setattr("edgeml.cli.keygen._write_curve", fail)
    with pytest.raises(OSError, match="full"):
        make_server_keys(tmp_path / "keys")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../other", "a/b", ".hidden", "a b", "é", "n" * 65]
)
def test_a_name_leads_nowhere_else(keys, name):
    before = everything_in(keys.parent)
    with pytest.raises(ValueError, match="name"):
        make_client_keys(keys, name)
    with pytest.raises(FileNotFoundError, match="knows no client"):
        revoke(keys, name)
    assert everything_in(keys.parent) == before


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o777])
def test_a_directory_that_others_may_use_is_refused(keys, mode):
    keys.chmod(mode)
    for use in (make_server_keys, lambda d: make_client_keys(d, "robot"), lambda d: revoke(d, "r")):
        with pytest.raises(PermissionDenied, match=f"chmod 700 {keys}"):
            use(keys)


def test_clients_need_a_server(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"edgeml keygen {tmp_path}"):
        make_client_keys(tmp_path, "robot")


def test_a_revoked_client_leaves_nothing(keys):
    make_client_keys(keys, "robot")
    before = everything_in(keys)
    make_client_keys(keys, "other")
    revoke(keys, "other")
    assert everything_in(keys) == before
    with pytest.raises(FileNotFoundError, match="no client 'other'; it knows robot"):
        revoke(keys, "other")
    make_client_keys(keys, "other")  # and may have new ones


def test_a_revoked_client_whose_keys_were_taken_away_is_let_in_no_more(keys):
    robot = make_client_keys(keys, "robot")
    robot.rename(keys.parent / "taken")
    revoke(keys, "robot")
    assert not list((keys / "allowed").iterdir())


# The command ------------------------------------------------------------------------------


def test_one_command_makes_all_and_says_what_comes_next(tmp_path, capsys):
    keys = tmp_path / "keys"
    assert cli.main(["keygen", str(keys), "--client", "robot", "--days", "30"]) == 0
    printed = capsys.readouterr().out
    assert f"credentials={str(keys)!r}" in printed
    assert f"scp -rp {keys / 'clients' / 'robot'}" in printed
    assert "-----BEGIN" not in printed
    assert text_of(keys / "clients" / "robot" / "token") not in printed
    days = certificate_of(keys / "clients" / "robot").not_valid_after_utc.timestamp() - time.time()
    assert days == pytest.approx(30 * 86400, abs=60)
    days = certificate_of(keys).not_valid_after_utc.timestamp() - time.time()
    assert days == pytest.approx(3650 * 86400, abs=60)
    assert cli.main(["keygen", str(keys), "--revoke", "robot"]) == 0
    assert not list((keys / "allowed").iterdir())


def test_the_server_alone_is_renewed_by_the_same_command(tmp_path, capsys):
    keys = tmp_path / "keys"
    assert cli.main(["keygen", str(keys)]) == 0
    assert f"edgeml keygen {keys} --client NAME" in capsys.readouterr().out
    authority = (keys / "ca.pem").read_bytes()
    assert cli.main(["keygen", str(keys), "--days", "7"]) == 0
    assert "certificate is new" in capsys.readouterr().out
    assert (keys / "ca.pem").read_bytes() == authority
    days = certificate_of(keys).not_valid_after_utc.timestamp() - time.time()
    assert days == pytest.approx(7 * 86400, abs=60)


def test_what_goes_wrong_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["keygen", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("edgeml: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("days", ["0", "-1", "nan", "soon", "1e9"])
def test_days_are_a_number(tmp_path, days, capsys):
    with pytest.raises(SystemExit):
        cli.main(["keygen", str(tmp_path / "keys"), f"--days={days}"])
    assert "no number of days" in capsys.readouterr().err


def test_without_cryptography_it_says_what_to_install(tmp_path):
    out, err = run_fresh(
        f"""
        import sys
        sys.modules["cryptography"] = None
        from edgeml import InferenceClient, InferenceServer, Unreachable, cli
        assert cli.main(["keygen", {str(tmp_path / "keys")!r}]) == 1
        """
    )
    assert (out, err) == (
        "",
        'edgeml: edgeml keygen needs cryptography: pip install "edgeml-robotics[keys]"\n',
    )


def test_no_other_command_needs_cryptography():
    run_fresh(
        """
        import sys
        sys.modules["cryptography"] = None
        import edgeml, edgeml.services, edgeml.testing
        from edgeml import InferenceClient, InferenceServer, Unreachable, cli
        assert cli.main(["plugins"]) == 0
        """
    )


# While a server runs ----------------------------------------------------------------------


@pytest.fixture
def serving(keys, transport):
    """A server with keys, over each transport; and how to make a client of it."""
    server = InferenceServer(0, transport=transport, credentials=keys)
    server.register_interface("whoami", lambda payload, context: context.identity)
    server.register_interface("other", lambda payload: payload)

    def client(credentials):
        return InferenceClient(url=server.url, credentials=credentials, timeout=20)

    with server.serving():
        yield client


def test_a_client_that_is_made_while_the_server_runs_is_let_in(serving, keys):
    with serving(make_client_keys(keys, "late")) as client:
        assert client.call("whoami", None) == "late"


def test_a_client_that_is_revoked_is_cut_off_within_a_second(serving, keys):
    robot, other = make_client_keys(keys, "robot"), make_client_keys(keys, "other")
    taken = robot.rename(keys.parent / "taken")  # to its own machine
    with serving(taken) as client, serving(other) as stays:
        assert client.call("whoami", None) == "robot"
        revoke(keys, "robot")

        def refused():
            try:
                client.call("whoami", None)
            except PermissionDenied:
                return True
            except Unreachable:  # while it is being cut off
                return False
            return False

        with took(at_most=1.5):  # a second, and a moment
            wait_until(refused)
        assert stays.call("whoami", None) == "other"
        with took(2.0), pytest.raises(PermissionDenied):
            serving(taken)


def test_new_keys_take_the_place_of_revoked_ones(serving, keys):
    old = make_client_keys(keys, "robot").rename(keys.parent / "old")
    revoke(keys, "robot")
    new = make_client_keys(keys, "robot")
    with serving(new) as client:
        assert client.call("whoami", None) == "robot"
    with took(2.0), pytest.raises(PermissionDenied):
        serving(old)


def test_keys_end_when_they_expire(serving, keys, monkeypatch):
    brief = make_client_keys(keys, "brief", days=1)
    with serving(brief) as client:
        assert client.call("whoami", None) == "brief"
        later(monkeypatch, 2 * 86400)

        def refused():
            try:
                client.call("whoami", None)
            except (PermissionDenied, Unreachable) as error:
                return isinstance(error, PermissionDenied)
            return False

        wait_until(refused)


def test_a_role_holds_for_the_key_that_was_given_it(serving, keys):
    with serving(make_client_keys(keys, "picky", role="call:whoami")) as client:
        assert client.call("whoami", None) == "picky"
        with pytest.raises(PermissionDenied, match="picky"):
            client.call("other", None)


def test_a_server_with_a_new_certificate_is_still_the_one(keys):
    robot = make_client_keys(keys, "robot")
    make_server_keys(keys, days=30)
    for transport in ("grpc", "zmq"):
        server = InferenceServer(0, transport=transport, credentials=keys)
        server.register_interface("whoami", lambda payload, context: context.identity)
        with server.serving(), InferenceClient(url=server.url, credentials=robot) as client:
            assert client.call("whoami", None) == "robot"


def test_a_client_does_not_speak_to_a_server_whose_certificate_has_expired(keys):
    robot = make_client_keys(keys, "robot")
    make_server_keys(keys, days=-1)
    server = InferenceServer(0, transport="grpc", credentials=keys)
    with server.serving(), took(2.5), pytest.raises(PermissionDenied):
        InferenceClient(url=server.url, credentials=robot, timeout=5)
