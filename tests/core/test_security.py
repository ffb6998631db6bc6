"""Keys, roles and limits as core holds to them, whatever the transport; tokens over inproc."""

from __future__ import annotations

import errno
import os
import shutil
import time
import tracemalloc
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256

import pytest

from edgeml import (
    ConfigMismatch,
    Credentials,
    EdgemlError,
    InferenceClient,
    InferenceServer,
    Limits,
    Malformed,
    Overloaded,
    PermissionDenied,
)
from edgeml.core import wire
from edgeml.core.client import Client
from edgeml.core.dispatch import Caller, answer_with
from edgeml.core.message import Message
from edgeml.core.plugins import load_transport
from edgeml.core.security import ALL, ClientKey, CurveKeys, Keyring, Role, digest
from edgeml.core.server import Server
from edgeml.core.transport import Endpoint, Peer
from edgeml.core.url import Url
from pairs import later, started, took, wait_until


def key(name: str, role: str = "all", **parts) -> ClientKey:
    return ClientKey(name, Role.parse(role), token=digest(f"token of {name}"), **parts)


def of(name: str) -> Credentials:
    return Credentials(name, token=f"token of {name}")


@pytest.fixture
def keyring():
    return Keyring([key("robot"), key("viewer", "observe,call:look*")])


@pytest.fixture
def server(keyring):
    with InferenceServer(0, transport="inproc", credentials=Credentials(clients=keyring)) as server:
        server.register_interface("echo", lambda payload: payload)
        with started(server):
            yield server


def client_of(server, credentials=None, **settings) -> InferenceClient:
    return InferenceClient(url=server.url, credentials=credentials, timeout=5, **settings)


@contextmanager
def serving(keyring=None, **settings):
    """The engine alone, not opened yet."""
    given = None if keyring is None else Credentials(clients=keyring)
    server = Server("test", [Url("inproc")], credentials=given, **settings)
    try:
        yield server
    finally:
        server.close()


# Roles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "permission", "name", "allowed"),
    [
        ("all", "administer", "anything", True),
        ("observe", "observe", "cam", True),
        ("observe", "act", "arm", False),
        ("act:grip*", "act", "gripper", True),
        ("act:grip*", "act", "arm", False),
        ("call:policy, subscribe", "call", "policy", True),
        ("call:policy, subscribe", "call", "policy2", False),
        ("call:policy, subscribe", "subscribe", "network", True),
        ("call:a,call:b", "call", "b", True),
        ("call:A", "call", "a", False),
    ],
)
def test_a_role_allows_what_it_says(text, permission, name, allowed):
    assert Role.parse(text).allows(permission, name) is allowed
    assert Role.parse(str(Role.parse(text))) == Role.parse(text)


def test_everything_is_the_role_all():
    assert Role.parse("observe,all") is ALL
    assert str(ALL) == "all"


@pytest.mark.parametrize("text", ["", " , ", "fly", "observe,fly:x", "Observe", None, 3])
def test_what_is_no_role_is_refused(text):
    with pytest.raises(ValueError, match=r"role|permission"):
        Role.parse(text)


# Keyrings -------------------------------------------------------------------------------------


def test_a_client_is_found_by_any_of_its_keys():
    ring = Keyring([key("a", curve="C" * 40, certificate="00"), key("b")])
    assert ring.by_curve("C" * 40).name == ring.by_curve(b"C" * 40).name == "a"
    assert ring.by_token("token of b").name == "b"
    assert ring.names() == ["a", "b"]
    for lost in (
        lambda: ring.by_curve("D" * 40),
        lambda: ring.by_certificate(b""),
        lambda: ring.by_token(""),
        lambda: ring.by_name("c"),
    ):
        with pytest.raises(PermissionDenied):
            lost()


def test_a_key_that_lacks_a_part_is_not_found_by_that():
    ring = Keyring([ClientKey("bare")])
    for text in ("", "None"):
        with pytest.raises(PermissionDenied):
            ring.by_token(text)
        with pytest.raises(PermissionDenied):
            ring.by_curve(text)


def test_expired_and_revoked_keys_are_refused_with_what_to_do():
    ring = Keyring([key("old", expires=time.time() - 1), key("gone"), key("new")])
    ring.revoke("gone")
    with pytest.raises(PermissionDenied, match=r"expired: .*edgeml keygen"):
        ring.by_token("token of old")
    with pytest.raises(PermissionDenied, match="revoked"):
        ring.by_token("token of gone")
    with pytest.raises(PermissionDenied, match="revoked"):
        ring.by_name("gone")
    with pytest.raises(PermissionDenied):
        ring.revoke("nobody")
    ring.add(key("gone"))
    assert ring.by_name("gone").name == "gone"


def test_what_is_no_file_blocks_nobody(tmp_path):
    tmp_path.chmod(0o700)
    key("a").write(tmp_path / "a.json")
    ring = Keyring(directory=tmp_path)
    os.mkfifo(tmp_path / "b.json", 0o600)
    with pytest.raises(ValueError, match=r"b\.json is neither a file"):
        ring.refresh()
    assert ring.names() == ["a"]


def test_a_folder_of_keys_is_read_again_when_it_changes(tmp_path):
    tmp_path.chmod(0o700)
    key("a").write(tmp_path / "a.json")
    ring = Keyring(directory=tmp_path)
    assert ring.names() == ["a"]
    before = ring.version
    ring.refresh()
    assert ring.version == before
    key("b", "observe").write(tmp_path / "b.json")
    ring.refresh()
    assert ring.names() == ["a", "b"]
    assert ring.version > before
    (tmp_path / "a.json").unlink()
    ring.refresh()
    with pytest.raises(PermissionDenied):
        ring.by_token("token of a")
    assert str(ring.by_name("b").role) == "observe"


def test_a_key_that_was_made_just_now_is_not_refused(tmp_path):
    tmp_path.chmod(0o700)
    ring = Keyring(directory=tmp_path)
    with pytest.raises(PermissionDenied):
        ring.by_token("token of a")
    key("a", curve="public").write(tmp_path / "a.json")
    assert ring.by_token("token of a").name == "a"
    key("b", curve="other").write(tmp_path / "b.json")
    assert ring.by_curve("other").name == "b"
    key("c", certificate=sha256(b"der").hexdigest()).write(tmp_path / "c.json")
    assert ring.by_certificate(b"der").name == "c"


def test_a_folder_that_has_gone_lets_nobody_in(tmp_path):
    folder = tmp_path / "allowed"
    folder.mkdir(0o700)
    key("a").write(folder / "a.json")
    ring = Keyring(directory=folder)
    assert ring.by_token("token of a").name == "a"
    folder.rename(tmp_path / "away")
    ring.refresh()
    assert ring.names() == []
    with pytest.raises(PermissionDenied):
        ring.by_token("token of a")
    with pytest.raises(FileNotFoundError, match="allowed"):
        Keyring(directory=folder)


def test_keys_are_revoked_where_no_file_can_be_opened(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    for name in "abc":
        key(name).write(tmp_path / f"{name}.json")
    ring = Keyring(directory=tmp_path)

    def fail(*args):
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        with pytest.raises(OSError, match="too many"):
            ring.refresh()
        assert ring.names() == ["a", "b", "c"]
        (tmp_path / "a.json").unlink()
        key("b", "observe").write(tmp_path / "b.json")
        with pytest.raises(OSError, match="too many"):
            ring.refresh()
        assert ring.names() == ["c"]
    ring.refresh()
    assert ring.names() == ["b", "c"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"name": "b"}',
        '{"name": "b", "role": "fly"}',
        '{"name": "other", "role": "all"}',
        '{"name": "b", "role": "all", "token": 3}',
        '{"name": "b", "role": "all", "expires": "soon"}',
        '{"name": "b", "role": "all", "more": 1}',
        "[" * 100_000,
    ],
)
def test_a_file_that_is_no_key_lets_nobody_in_and_keeps_nobody_out(tmp_path, text):
    tmp_path.chmod(0o700)
    key("a").write(tmp_path / "a.json")
    ring = Keyring(directory=tmp_path)
    (tmp_path / "b.json").touch(0o600)
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(ValueError, match=r"b\.json"):
        ring.refresh()
    assert ring.names() == ["a"]


# Directories ----------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    """A server's directory, with nothing but a client's token."""
    home = tmp_path / "keys"
    (home / "allowed").mkdir(parents=True)
    for path in (home, home / "allowed"):
        path.chmod(0o700)
    key("robot").write(home / "allowed" / "robot.json")
    own = tmp_path / "robot"
    own.mkdir(0o700)
    for name, text in (("name", "robot\n"), ("token", "token of robot\n")):
        (own / name).touch(0o600)
        (own / name).write_text(text)
    return tmp_path


def test_directories_are_credentials(home, monkeypatch):
    server = Credentials.resolve(home / "keys")
    assert server.clients.names() == ["robot"]
    assert Credentials.resolve(str(home / "robot")) == of("robot")
    assert Credentials.resolve(None) is None
    monkeypatch.setenv("EDGEML_CREDENTIALS", str(home / "robot"))
    assert Credentials.resolve(None).name == "robot"
    assert "token of robot" not in repr(of("robot"))


@pytest.mark.parametrize("loose", ["keys", "keys/allowed", "robot", "robot/token"])
def test_what_others_could_read_is_refused_with_how_to_mend_it(home, loose):
    path = home / loose
    path.chmod(path.stat().st_mode | 0o040)
    with pytest.raises(PermissionDenied, match=rf"chmod [67]00 {path}"):
        Credentials.load(home / loose.split("/")[0])


def test_a_key_that_others_could_read_does_not_count(home):
    path = home / "keys/allowed/robot.json"
    path.chmod(0o644)
    with pytest.raises(PermissionDenied, match="chmod 600"):
        Credentials.load(home / "keys")


@pytest.mark.parametrize("given", [False, True, 0, 3.5, {}, [], "", object()])
def test_what_is_no_credentials_is_refused_by_both_ends(given):
    with pytest.raises(TypeError, match="edgeml keygen"):
        InferenceServer(0, transport="inproc", credentials=given)
    with pytest.raises(TypeError, match="edgeml keygen"):
        InferenceClient("localhost", 1, "inproc", credentials=given)


def test_the_other_ends_keys_are_refused(home, keyring):
    with pytest.raises(ValueError, match="keys of a client, 'robot'"):
        InferenceServer(0, transport="inproc", credentials=home / "robot")
    with pytest.raises(ValueError, match=r"keys of a server.*--client"):
        InferenceClient("localhost", 1, "inproc", credentials=home / "keys")


def test_a_missing_or_empty_directory_says_what_to_do(tmp_path):
    tmp_path.chmod(0o700)
    with pytest.raises(FileNotFoundError, match="edgeml keygen"):
        Credentials.load(tmp_path / "none")
    with pytest.raises(ValueError, match="edgeml keygen"):
        Credentials.load(tmp_path)


def test_a_servers_directory_without_its_folder_of_clients_lets_nobody_in(home):
    for name in ("curve.secret", "curve.public"):
        (home / "keys" / name).touch(0o600)
        (home / "keys" / name).write_text("x" * 40)
    shutil.rmtree(home / "keys/allowed")
    with pytest.raises(ValueError, match=r"no folder 'allowed'.*--client"):
        InferenceServer(0, transport="inproc", credentials=home / "keys")


def test_credentials_that_do_not_say_whom_to_let_in_are_no_servers():
    with pytest.raises(ValueError, match="whom to let in"):
        InferenceServer(0, transport="inproc", credentials=Credentials(curve=CurveKeys("a", "b")))
    InferenceServer(0, transport="inproc", credentials=Credentials(users=(0,))).stop()


def test_the_folder_above_a_clients_keys_is_told_from_it(home):
    home.chmod(0o700)
    with pytest.raises(ValueError, match=rf"such as {home}/robot"):
        Credentials.load(home)


def test_who_tries_many_tokens_costs_few_looks_at_the_folder(home, monkeypatch):
    ring = Credentials.load(home / "keys").clients
    looks = []
    real = os.scandir

    def scan(path):
        looks.append(path)
        time.sleep(0.01)
        return real(path)

    monkeypatch.setattr(os, "scandir", scan)
    for number in range(100):
        with pytest.raises(PermissionDenied):
            ring.by_token(f"token {number}")
    assert len(looks) <= 10


# Tokens ---------------------------------------------------------------------------------------


def test_a_token_lets_in_and_says_who_it_is(server, caplog):
    caplog.set_level("INFO", "edgeml")
    with client_of(server, of("robot")) as client:
        assert client.call("echo", 1) == 1
    assert "with the key of robot" in caplog.text
    assert "token of" not in caplog.text


@pytest.mark.parametrize(
    "credentials", [None, of("stranger"), Credentials("robot", token="token of robo")]
)
def test_none_and_wrong_tokens_are_refused_quickly_counted_and_logged(server, credentials, caplog):
    with took(at_most=2.0), pytest.raises(PermissionDenied):
        client_of(server, credentials)
    assert server.stats()["PermissionDenied"] == 1
    assert "is refused" in caplog.text
    assert server.clients() == []


def test_a_right_connection_with_a_wrong_token_is_refused(keyring):
    server = Server("test", [Url("inproc")], credentials=Credentials(clients=keyring))
    peer = Peer("1", "here", identity="robot")
    assert server._identify(peer, "token of robot").name == "robot"
    for token in (None, "token of viewer", 3):
        with pytest.raises(PermissionDenied, match="'robot', and the token"):
            server._identify(peer, token)
    server.close()


def test_strangers_are_told_nothing_of_the_configuration():
    ring = Keyring([key("robot")])
    with serving(ring, config={"secret": 7}) as server:
        server.open()
        with pytest.raises(PermissionDenied) as caught:
            Client("other", server.urls, timeout=5)
        assert "secret" not in str(caught.value)
        with pytest.raises(ConfigMismatch, match="secret"):
            Client("other", server.urls, credentials=of("robot"), timeout=5)


# Ends that protect nothing ---------------------------------------------------------------------


@pytest.fixture
def exposed(monkeypatch):
    """Inproc, as if it sent clear text to other machines."""
    transport = load_transport("inproc")

    def exposing(make):
        def expose(*args, **settings):
            end: Endpoint = make(*args, **settings)
            end.local = end.secured = False
            return end

        return expose

    monkeypatch.setattr(transport, "serve", exposing(transport.serve))
    monkeypatch.setattr(transport, "connect", exposing(transport.connect))


def test_keys_are_not_served_where_nothing_protects_them(exposed, keyring):
    server = InferenceServer(0, transport="inproc", credentials=Credentials(clients=keyring))
    with server, pytest.raises(PermissionDenied, match="clear text"):
        server.start(threaded=True)


def test_a_token_is_not_sent_where_others_could_read_it(exposed):
    heard = []
    transport = load_transport("inproc")
    with (
        transport.serve(Url("inproc"), lambda message, reply: heard.append(message)) as end,
        pytest.raises(PermissionDenied, match="clear text"),
    ):
        InferenceClient(url=str(end.url), credentials=of("robot"), timeout=20)
    assert heard == []


def test_code_runs_on_no_end_that_protects_nothing(exposed):
    server = InferenceServer(0, transport="inproc", codecs=["msgpack", "cloudpickle"])
    with server, pytest.raises(PermissionDenied, match="runs code"):
        server.start(threaded=True)
    server = InferenceServer(0, transport="inproc")
    with server, started(server), pytest.raises(PermissionDenied, match="runs code"):
        client_of(server, codec="cloudpickle")


def test_a_server_that_anybody_reaches_says_so_once_with_what_to_do(exposed, caplog):
    with InferenceServer(0, transport="inproc") as server, started(server):
        pass
    told = [r.message for r in caplog.records if "edgeml keygen" in r.message]
    assert len(told) == 1
    assert "WHOEVER REACHES THIS MACHINE" in told[0]


def test_a_server_on_this_machine_alone_says_nothing(caplog):
    with InferenceServer(0, transport="inproc") as server, started(server):
        pass
    assert caplog.records == []


def test_a_server_that_says_nothing_of_the_codec_is_not_believed():
    def welcome(message, reply):
        said = wire.pack(wire.Welcome(b"s", 1, {"": 1}, []))
        reply(Message(wire.pack(wire.Answer(wire.OK, said))))

    with (
        load_transport("inproc").serve(Url("inproc"), welcome) as end,
        pytest.raises(ConfigMismatch, match="does not say that it speaks 'cloudpickle'"),
    ):
        InferenceClient(url=str(end.url), codec="cloudpickle", timeout=20)


# Revocation -----------------------------------------------------------------------------------


def test_a_revoked_client_is_cut_off_within_a_second(server, keyring):
    served = []
    server.register_interface("note", served.append)
    with client_of(server, of("robot")) as client:
        client.call("note", 1)
        keyring.revoke("robot")
        with took(at_most=1.0):
            wait_until(lambda: server.clients() == [])
        with took(at_most=1.0), pytest.raises(PermissionDenied, match="revoked"):
            client.call("note", 2)
    assert served == [1]


@pytest.mark.parametrize("how", ["stays", "leaves", "comes again"])
@pytest.mark.parametrize("change", ["revoked", "limited"])
def test_calls_that_wait_end_with_the_key_whose_client_sent_them(keyring, how, change):
    ran = []
    with serving(keyring, rate_limit=2) as server:
        note = answer_with(lambda payload, caller: ran.append(payload))
        server.register("note", note, needs="call")
        server.dispatcher.start()
        server.open()
        with load_transport("inproc").connect(server.urls[0], 20) as requester:

            def ask(kind, session, body=b"", name="", timeout=60.0):
                header = wire.pack(wire.Request(kind, session, name, timeout, body))
                return requester.request(Message(header))

            def greet(**extensions):
                said = {"token": "token of robot", **extensions}
                hello = wire.pack(wire.Hello(1, "test", "c", "", "msgpack", {}, said))
                answer = wire.unpack(wire.Answer, ask(wire.HELLO, b"", hello).result(20).header)
                return wire.unpack(wire.Welcome, answer.body).session

            session = greet()
            calls = [
                ask(wire.CALL, session, wire.pack(n), "note", timeout)
                for n, timeout in enumerate([60.0, 60.0, float("inf"), 60.0])
            ]
            calls[0].result(20)
            if how == "leaves":
                ask(wire.GOODBYE, session).result(20)
            elif how == "comes again":
                greet(resume=session)
            if change == "revoked":
                keyring.revoke("robot")
            else:
                keyring.add(key("robot", "observe"))
            for call in calls[2:]:  # one may just have been handled
                answer = wire.unpack(wire.Answer, call.result(20).header)
                assert isinstance(wire.error_of(answer), PermissionDenied)
    assert set(ran) <= {0, 1}


def test_what_a_client_calls_itself_and_others_is_one_short_line_in_the_log(server, caplog):
    caplog.set_level("INFO", "edgeml")
    label = "x\nWARNING: admin has come\x1b[2J" + "y" * 150
    hello = wire.Hello(1, "inference", "c", label, "msgpack", {}, {"token": "token of viewer"})
    with load_transport("inproc").connect(Url.parse(server.url), 20) as requester:
        header = wire.pack(wire.Request(wire.HELLO, b"", "", 5.0, wire.pack(hello)))
        requester.call(Message(header), 20)
    (line,) = [r.message for r in caplog.records if "has come" in r.message]
    assert line.isprintable()
    assert server.clients()[0].address.isprintable()
    with pytest.raises(PermissionDenied) as caught:
        Caller("c", "", Peer("1", "here"), role=Role.parse("observe")).require("act", "a\n" * 9999)
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


def test_names_that_a_role_lacks_are_not_kept_in_mind():
    role = Role.parse("act:grip*")
    tracemalloc.start()
    try:
        for number in range(300):
            assert not role.allows("act", f"{number:0100000}")
        assert tracemalloc.get_traced_memory()[0] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_client_that_is_added_while_the_server_runs_comes_in(server, keyring):
    with pytest.raises(PermissionDenied):
        client_of(server, of("new"))
    keyring.add(key("new"))
    with client_of(server, of("new")) as client:
        assert client.call("echo", 1) == 1


def test_a_client_whose_keys_were_replaced_is_cut_off(server, keyring):
    with client_of(server, of("robot")) as client:
        keyring.add(replace(key("robot"), token=digest("another")))
        with took(at_most=1.0):
            wait_until(lambda: server.clients() == [])
        with pytest.raises(PermissionDenied):
            client.call("echo", 1)


def test_a_client_whose_key_expires_meanwhile_is_cut_off(server, keyring, monkeypatch):
    keyring.add(key("short", expires=time.time() + 1800))
    with client_of(server, of("short")):
        later(monkeypatch, 3600)
        with took(at_most=1.2):
            wait_until(lambda: server.clients() == [])


def test_a_subscriber_that_is_revoked_gets_no_more(keyring):
    with serving(keyring) as server:
        topic = server.topic("news")
        server.open()
        got = []
        client = Client("test", server.urls, credentials=of("robot"), timeout=5)
        try:
            client.subscribe("news", got.append)
            topic.publish(1)
            wait_until(lambda: got == [1])
            keyring.revoke("robot")
            wait_until(lambda: server.callers == [])
            topic.publish(2)
            keyring.add(key("robot"))  # and gets what is there then
            topic.publish(3)
            wait_until(lambda: got[-1] == 3)
            assert 2 not in got
        finally:
            client.close()


def test_a_folder_that_can_t_be_read_is_told_once_and_changes_nothing(home, caplog):
    server = InferenceServer(0, transport="inproc", credentials=home / "keys")
    server.register_interface("echo", lambda payload: payload)
    with server, started(server), client_of(server, home / "robot") as client:
        bad = home / "keys/allowed/bad.json"
        bad.touch(0o600)
        wait_until(lambda: "bad.json" in caplog.text)
        assert client.call("echo", 1) == 1
        (home / "keys/allowed/robot.json").unlink()
        wait_until(lambda: server.clients() == [])
        with pytest.raises(PermissionDenied):
            client.call("echo", 2)
    assert len([r for r in caplog.records if "bad.json" in r.message]) == 1


# Client ids -----------------------------------------------------------------------------------


def test_a_client_id_is_that_of_the_key_that_first_used_it(server):
    with client_of(server, of("robot"), client_id="arm") as client:
        with pytest.raises(PermissionDenied, match="'arm' belongs to another key"):
            client_of(server, of("viewer"), client_id="arm")
        with client_of(server, of("robot"), client_id="arm"):
            pass
        assert client.call("echo", 1) == 1
    with pytest.raises(PermissionDenied, match="belongs to another key"):  # also when it has left
        client_of(server, of("viewer"), client_id="arm")


def test_a_keys_name_is_its_own_client_id_from_the_start(server):
    with pytest.raises(PermissionDenied, match="'robot' is the name of another key"):
        client_of(server, of("viewer"), client_id="robot")
    with client_of(server, of("robot"), client_id="robot") as client:
        assert client.call("echo", 1) == 1


def test_nobody_can_make_a_server_forget_whose_an_id_is(server, monkeypatch):
    monkeypatch.setattr("edgeml.core.server._MOST_IDS", 3)
    with client_of(server, of("robot"), client_id="arm"):
        pass
    for number in range(10):
        with client_of(server, of("viewer"), client_id=f"v{number}"):
            pass
    with pytest.raises(PermissionDenied, match="belongs to another key"):
        client_of(server, of("viewer"), client_id="arm")


# Roles at the server --------------------------------------------------------------------------


def test_interfaces_and_topics_need_what_they_are_registered_with(keyring):
    with serving(keyring) as server:
        ran = []
        server.register(
            "look", answer_with(lambda payload, caller: ran.append("look")), needs="call"
        )
        server.register("act", answer_with(lambda payload, caller: ran.append("act")), needs="call")
        server.topic("news", needs="subscribe")
        server.dispatcher.start()
        server.open()
        client = Client("test", server.urls, credentials=of("viewer"), timeout=5)
        try:
            client.call("look", None)
            with pytest.raises(PermissionDenied, match="lacks call:act"):
                client.call("act", None)
            assert ran == ["look"]
            with pytest.raises(PermissionDenied, match="lacks subscribe:news"):
                client.subscribe("news", ran.append)
            assert server.stats()["PermissionDenied"] == 2
            client.call("look", None)
        finally:
            client.close()


def test_an_interface_may_need_another_permission(keyring):
    keyring.add(key("keeper", "call,administer"))
    given = Credentials(clients=keyring)
    with InferenceServer(0, transport="inproc", credentials=given) as server:
        with pytest.raises(ValueError, match="'rule' is no permission; known: observe, "):
            server.register_interface("look", print, permission="rule")
        server.register_interface("look_away", lambda _: "done", permission="administer")
        with started(server):
            with client_of(server, of("keeper")) as client:
                assert client.call("look_away", None) == "done"
            with (
                client_of(server, of("viewer")) as client,
                pytest.raises(PermissionDenied, match="lacks administer:look_away"),
            ):
                client.call("look_away", None)


def test_a_role_that_changes_counts_within_a_second_and_costs_no_connection(keyring, caplog):
    with serving(keyring) as server:
        topic = server.topic("news", needs="subscribe")
        server.register("look", answer_with(lambda payload, caller: payload), needs="call")
        server.dispatcher.start()
        server.open()
        client = Client("test", server.urls, credentials=of("robot"), timeout=5)
        try:
            got = []
            client.subscribe("news", got.append)
            topic.publish(1)
            wait_until(lambda: got == [1])
            before = [caller.client_id for caller in server.callers]
            keyring.add(key("robot", "call"))
            wait_until(lambda: server.callers[0].role.allowed is not None)
            topic.publish(2)  # by the credit that it had parked
            wait_until(lambda: "publications of 'news' are missed" in caplog.text)
            topic.publish(3)
            assert client.call("look", 1) == 1
            keyring.add(key("robot"))
            wait_until(lambda: got[-1] == 3)
            assert [caller.client_id for caller in server.callers] == before
        finally:
            client.close()


# Limits ---------------------------------------------------------------------------------------


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match="sessions"):
        Limits(sessions=0)


@pytest.mark.parametrize("limit", ["sessions", "sessions_per_connection"])
def test_one_connection_cannot_take_all_sessions(limit):
    server = InferenceServer(0, transport="inproc", limits=Limits(**{limit: 3}))
    server.register_interface("echo", lambda payload: payload)
    with server, started(server):
        transport = load_transport("inproc")
        with transport.connect(Url.parse(server.url), 20) as requester:
            hello = wire.pack(wire.Hello(1, "inference", "c", "", "msgpack", {}))
            header = wire.pack(wire.Request(wire.HELLO, b"", "", 5.0, hello))
            said = [
                wire.unpack(wire.Answer, requester.call(Message(header), 20).header)
                for _ in range(5)
            ]
            assert [answer.status for answer in said[:3]] == [wire.OK] * 3
            for answer in said[3:]:
                assert isinstance(wire.error_of(answer), Overloaded)
            welcome = wire.unpack(wire.Welcome, said[0].body)
            leave = wire.pack(wire.Request(wire.GOODBYE, welcome.session, "", 5.0, b""))
            requester.call(Message(leave), 20)
            again = wire.unpack(wire.Answer, requester.call(Message(header), 20).header)
            assert again.status == wire.OK
        assert server.stats()["Overloaded"] == 2


def test_a_large_hello_is_refused_before_it_is_decoded(server):
    transport = load_transport("inproc")
    with transport.connect(Url.parse(server.url), 20) as requester:
        config = {f"{number:0100}": number for number in range(1000)}
        hello = wire.pack(wire.Hello(1, "inference", "c", "", "msgpack", config))
        header = wire.pack(wire.Request(wire.HELLO, b"", "", 5.0, hello))
        answer = wire.unpack(wire.Answer, requester.call(Message(header), 20).header)
        error = wire.error_of(answer)
        assert isinstance(error, Malformed)
        assert "a hello of" in str(error)


@pytest.mark.parametrize("limits", [Limits(), Limits(header_bytes=1 << 20)])
def test_a_large_header_is_not_copied_before_it_is_known_whose_it_is(limits):
    server = InferenceServer(0, transport="inproc", limits=limits)
    server.register_interface("size", len)
    body = wire.pack("x" * (30 << 20))
    with server, started(server), client_of(server) as client:
        for session in (b"", b"0" * 16):
            header = wire.pack(wire.Request(wire.CALL, session, "size", 5.0, body))
            with load_transport("inproc").connect(Url.parse(server.url), 20) as requester:
                tracemalloc.start()
                try:
                    answer = requester.call(Message(header), 20)
                    assert tracemalloc.get_traced_memory()[1] < 1 << 20
                finally:
                    tracemalloc.stop()
            status = wire.unpack(wire.Answer, answer.header).status
            assert (status == wire.NO_SESSION) is (limits == Limits())  # and it is sent again
        if limits == Limits():
            assert client.call("size", "x" * (30 << 20)) == 30 << 20
        else:
            with pytest.raises(Malformed, match="a header of 3"):
                client.call("size", "x" * (30 << 20))


@pytest.mark.parametrize(
    ("limits", "payload"), [(Limits(nodes=100), [0.5] * 100), (Limits(nesting=3), [[[[1]]]])]
)
def test_what_one_message_may_hold_is_the_servers_to_say(limits, payload):
    servers = [InferenceServer(0, transport="inproc", limits=each) for each in (limits, Limits())]
    for server, refused in zip(servers, (True, False), strict=True):
        server.register_interface("echo", lambda payload: payload)
        with server, started(server), client_of(server) as client:
            if refused:
                with pytest.raises(Malformed):
                    client.call("echo", payload)
            else:
                assert client.call("echo", payload) == payload
            assert client.call("echo", 1) == 1


def test_one_client_has_so_many_subscriptions_and_no_more():
    limits = Limits(subscriptions_per_client=2, credits=3)
    with serving(limits=limits) as server:
        server.topic("news")
        server.open()
        transport = load_transport("inproc")
        with transport.connect(server.urls[0], 20) as requester:
            hello = wire.pack(wire.Hello(1, "test", "c", "", "msgpack", {}))
            header = wire.pack(wire.Request(wire.HELLO, b"", "", 5.0, hello))
            answer = wire.unpack(wire.Answer, requester.call(Message(header), 20).header)
            session = wire.unpack(wire.Welcome, answer.body).session

            def ask(number):
                credit = wire.pack(wire.Credit(number, 0, 0))
                return requester.request(
                    Message(wire.pack(wire.Request(wire.NEXT, session, "news", 5.0, credit)))
                )

            kept = [ask(1), ask(1), ask(1), ask(2)]
            for refused in (ask(1), ask(3)):
                said = wire.unpack(wire.Answer, refused.result(20).header)
                assert isinstance(wire.error_of(said), Overloaded)
            assert not any(future.done() for future in kept)


def test_a_hello_of_colliding_keys_costs_nothing(server):
    # Maps whose keys are arrays of numbers with equal hashes.
    transport = load_transport("inproc")
    keys = b"".join(b"\x92\xff" + b"\xfe" + b"\xc0" for _ in range(15_000))
    config = b"\xdf" + (15_000).to_bytes(4, "big") + keys
    fields = {"protocol": 1, "service": "inference", "client_id": "c", "label": "", "codec": "x"}
    packed = wire.pack(fields)
    hello = bytes([packed[0] + 1]) + packed[1:] + wire.pack("config") + config
    header = wire.pack(wire.Request(wire.HELLO, b"", "", 5.0, hello))
    with transport.connect(Url.parse(server.url), 20) as requester, took(at_most=2.0):
        answer = wire.unpack(wire.Answer, requester.call(Message(header), 20).header)
    assert isinstance(wire.error_of(answer), EdgemlError)
