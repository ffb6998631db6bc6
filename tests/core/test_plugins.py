"""Plugins found by name, broken ones among them, and the addresses that name them."""

import importlib
import sys
import textwrap
import threading

import numpy as np
import pytest

from edgeml import InferenceClient, InferenceServer, PluginError
from edgeml.core import Codec, Message, Transport, Url, load_codec, load_transport
from edgeml.core import plugins as plugins_module
from edgeml.core.plugins import find
from edgeml.core.url import resolve
from edgeml.testing import TransportTests
from pairs import started
from strangers import TRANSPORT


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a package that offers one module as a plugin, for the test's duration."""
    modules = set(sys.modules)

    def install(
        name, source, *, package=None, version="1.0", kind="transport", module=None, metadata=True
    ):
        package = package or f"{name}-package"
        module = module or f"plugin_{len(list(tmp_path.iterdir()))}"
        site = tmp_path / f"{package}-{version}"
        info = site / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        if metadata:
            text = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
            (info / "METADATA").write_text(text)
        (info / "entry_points.txt").write_text(f"[edgeml.{kind}s]\n{name} = {module}\n")
        (site / f"{module}.py").write_text(textwrap.dedent(source.format(name=name)))
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        return module

    yield install
    # What was loaded is gone with its package.
    for plugin in plugins_module._managers.values():
        for each in plugin.get_plugins():
            if getattr(each, "__name__", "").startswith("plugin_"):
                plugin.unregister(each)
    for key, loaded in list(plugins_module._loaded.items()):
        if type(loaded).__module__.startswith("plugin_"):
            del plugins_module._loaded[key]
    for name in set(sys.modules) - modules:
        if name.startswith("plugin_"):
            del sys.modules[name]


def assert_others_work():
    assert load_transport("inproc").name == "inproc"
    assert load_codec("msgpack").name == "msgpack"


# Plugins ----------------------------------------------------------------------------------


def test_listing_finds_what_is_installed_and_loads_nothing(installed):
    module = installed("mine", "raise RuntimeError('loaded')", version="2.5")
    found = {each.name: each for each in find("transport")}
    assert {"inproc", "zmq", "mine"} <= set(found)
    assert (found["mine"].kind, found["mine"].package) == ("transport", "mine-package 2.5")
    assert found["zmq"].package.startswith("edgeml")
    assert {"msgpack", "cloudpickle"} <= {each.name for each in find("codec")}
    assert module not in sys.modules


def test_a_strangers_transport_is_loaded_once_and_by_name(installed):
    installed("mine", TRANSPORT)
    transport = load_transport("mine")
    assert isinstance(transport, Transport)
    assert transport is load_transport("mine")
    assert type(transport).__name__ == "Mine"


def test_a_strangers_codec_is_loaded(installed):
    installed(
        "mine",
        """
        from edgeml.core import Codec, Message, hookimpl

        class Mine(Codec):
            name = "mine"

            def encode(self, value):
                return Message(b"mine")

            def decode(self, message, *, writable=False):
                return "mine"

        @hookimpl
        def edgeml_codec():
            return Mine
        """,
        kind="codec",
    )
    codec = load_codec("mine")
    assert isinstance(codec, Codec)
    assert codec.encode(None) == Message(b"mine")
    assert "mine" not in {each.name for each in find("transport")}


@pytest.mark.parametrize("first", ["transport", "codec"])
def test_one_module_may_offer_a_transport_and_a_codec(installed, first):
    source = (
        TRANSPORT
        + """
    from edgeml.core import Codec, Message

    class MyCodec(Codec):
        name = {name!r}

        def encode(self, value):
            return Message(b"mine")

        def decode(self, message, *, writable=False):
            return "mine"

    @hookimpl
    def edgeml_codec():
        return MyCodec
    """
    )
    module = installed("both", source)
    installed("both", source, kind="codec", package="half", module=module)
    loads = [load_transport, load_codec]
    for load in loads if first == "transport" else reversed(loads):
        assert load("both").name == "both"


def test_a_plugin_may_load_another_while_it_is_imported(installed):
    installed("wrapper", TRANSPORT + "\n    load_transport('inproc')\n")
    loaded = []
    thread = threading.Thread(target=lambda: loaded.append(load_transport("wrapper")), daemon=True)
    thread.start()
    thread.join(20)
    assert loaded


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("import a_module_that_is_not_there", "ModuleNotFoundError: .*a_module_that_is_not_there"),
        ("def broken(:", "SyntaxError"),
        ("", "does not answer the hook edgeml_transport"),
        (
            TRANSPORT.replace("    @hookimpl\n", ""),
            "does not answer the hook edgeml_transport",
        ),
        (
            TRANSPORT.replace("def connect", "def connects"),
            "lacks connect",
        ),
        (
            TRANSPORT.replace("name = {name!r}", "name = 'other'"),
            "is called 'other' by its class",
        ),
        (TRANSPORT.replace("    name = {name!r}", "    pass"), "is called None by its class"),
        (TRANSPORT.replace("return Mine", "return Mine()"), "no subclass of Transport"),
        (TRANSPORT.replace("return Mine", "return int"), "no subclass of Transport"),
        (TRANSPORT.replace("return Mine", "raise KeyError('why')"), "KeyError: 'why'"),
        (
            TRANSPORT.replace("edgeml_transport()", "edgeml_transport(surprise)"),
            "PluginValidationError.*surprise",
        ),
        (
            TRANSPORT.replace("def serve", "def __init__(self, must): ...\n\n        def serve"),
            "TypeError.*must",
        ),
    ],
    ids=lambda value: value[:40] if "class" not in value else "",
)  # fmt: skip
def test_a_broken_plugin_is_named_with_the_reason_and_hurts_no_other(installed, source, reason):
    installed("broken", source, package="their-package", version="0.3")
    installed("mine", TRANSPORT)
    for _ in range(2):  # also when it is asked for again
        with pytest.raises(PluginError, match=rf"(?s)'broken' of their-package 0\.3 .*{reason}"):
            load_transport("broken")
        assert load_transport("mine").name == "mine"
        assert_others_work()


def test_a_plugin_error_is_an_import_error_that_keeps_its_cause(installed):
    installed("broken", "raise RuntimeError('no licence')")
    with pytest.raises(ImportError) as caught:
        load_transport("broken")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_two_packages_that_claim_one_name_are_both_named(installed):
    installed("mine", TRANSPORT, package="first", version="1.0")
    installed("mine", TRANSPORT, package="second", version="2.0")
    with pytest.raises(PluginError, match=r"claimed by first 1\.0 and second 2\.0"):
        load_transport("mine")
    assert_others_work()


def test_a_name_that_a_builtin_has_can_not_be_taken(installed, monkeypatch):
    installed("inproc", TRANSPORT, package="thief")
    monkeypatch.delitem(plugins_module._loaded, ("transport", "inproc"), raising=False)
    with pytest.raises(PluginError, match=r"claimed by edgeml.* and thief 1\.0"):
        load_transport("inproc")
    assert load_transport("zmq").name == "zmq"


def test_one_package_found_twice_is_one_plugin(installed, tmp_path, monkeypatch):
    installed("mine", TRANSPORT)
    monkeypatch.syspath_prepend(str(tmp_path / "mine-package-1.0"))
    monkeypatch.syspath_prepend(str(tmp_path / "mine-package-1.0" / "." / ""))
    assert load_transport("mine").name == "mine"


def test_a_package_that_is_half_uninstalled_hurts_nobody(installed):
    installed("mine", TRANSPORT, metadata=False)
    assert "mine" in {each.name for each in find("transport")}
    assert load_transport("mine").name == "mine"
    assert_others_work()


def test_an_unknown_name_lists_those_that_are_installed():
    with pytest.raises(PluginError, match=r"no transport 'carrier-pigeon'.*inproc, shm, .*zmq"):
        load_transport("carrier-pigeon")
    with pytest.raises(PluginError, match=r"no codec 'morse'.*cloudpickle, .*msgpack"):
        load_codec("morse")


# A third party's whole job ----------------------------------------------------------------

STRANGER = """
    # A transport is a class of two methods; this one hands them on to another.
    import dataclasses

    from edgeml.core import Transport, hookimpl, load_transport

    class Stranger(Transport):
        name = "stranger"

        def serve(self, url, on_request, *, credentials=None, limits=None):
            url = dataclasses.replace(url, scheme="zmq")
            endpoint = load_transport("zmq").serve(url, on_request)
            endpoint.url = dataclasses.replace(endpoint.url, scheme="stranger")
            return endpoint

        def connect(self, url, timeout, *, credentials=None):
            requester = load_transport("zmq").connect(url, timeout)
            requester.url = url
            return requester

    @hookimpl
    def edgeml_transport():
        return Stranger
"""


class TestStranger(TransportTests):
    """The suite runs on a transport that it has never heard of, in other processes too."""

    url = "stranger://127.0.0.1:0"

    @pytest.fixture(autouse=True)
    def _installed(self, installed):
        installed("stranger", STRANGER)


# All that the suite tests is tested elsewhere; here it's enough that it can be used.
for _name in [name for name in dir(TransportTests) if name.startswith("test_")]:
    if _name not in (
        "test_endpoints_are_context_managers",
        "test_another_process_answers_and_killing_it_is_noticed",
    ):
        setattr(TestStranger, _name, None)


# Addresses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("zmq://robot:5555", Url("zmq", "robot", 5555)),
        ("zmq://127.0.0.1:0", Url("zmq", "127.0.0.1", 0)),
        ("zmq://robot", Url("zmq", "robot", 0)),
        ("zmq://:5555", Url("zmq", "", 5555)),
        ("zmq://[::1]:5555", Url("zmq", "::1", 5555)),
        ("zmq://[fe80::1%eth0]:5555", Url("zmq", "fe80::1%eth0", 5555)),
        ("shm:///run/robot.sock", Url("shm", "", 0, "/run/robot.sock")),
        ("ws://robot:80/edgeml", Url("ws", "robot", 80, "/edgeml")),
    ],
)
def test_a_url_is_read_and_written(text, url):
    assert Url.parse(text) == url
    assert Url.parse(str(url)) == url


def test_a_trailing_slash_is_no_path():
    assert Url.parse("zmq://robot:5555/") == Url("zmq", "robot", 5555)


@pytest.mark.parametrize(
    "text",
    [
        *("", "zmq", "robot:5555", "zmq:robot", "://robot", "zmq://robot:port", "zmq://robot:-1"),
        *("zmq://robot:65536", "zmq://[::1:5555", "zmq://::1:5555", "zmq://me@robot:5555"),
        *("shm:///run/a?b", "shm:///run/a#b"),
    ],
)
def test_what_is_no_url_is_a_value_error_that_quotes_it(text):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is what is tested
        Url.parse(text)
    assert repr(text) in str(caught.value)


def test_a_url_can_be_changed():
    url = Url("zmq", "robot", 1)
    assert (url.with_port(2).port, url.with_host("::1").host) == (2, "::1")
    assert str(url.with_host("::1")) == "zmq://[::1]:1"


def test_a_name_with_host_and_port_is_the_same_as_a_url():
    assert resolve("zmq", "robot", 5555) == resolve("zmq://robot:5555", "", 0)
    assert resolve("zmq", "::1", 5555) == [Url("zmq", "::1", 5555)]
    assert resolve("zmq://robot", "robot", 5555) == [Url("zmq", "robot", 5555)]
    assert resolve("zmq://:5555", "robot", 0) == [Url("zmq", "robot", 5555)]
    assert resolve("zmq://robot:5555", "robot", 5555) == [Url("zmq", "robot", 5555)]
    assert resolve("shm:///run/robot.sock", "robot", 5555) == [Url("shm", "", 0, "/run/robot.sock")]


def test_several_transports_may_be_named():
    assert resolve("inproc, zmq://robot:1 ,", "robot", 1) == [
        Url("inproc", "robot", 1),
        Url("zmq", "robot", 1),
    ]


def test_contradictions_raise():
    with pytest.raises(ValueError, match="port 5555, but port 5556"):
        resolve("zmq://robot:5555", "robot", 5556)
    with pytest.raises(ValueError, match="host robot, but host server"):
        resolve("zmq://robot:5555", "server", 5555)
    with pytest.raises(ValueError, match="names no transport"):
        resolve(" , ", "robot", 1)
    for port in (-1, 65536):
        with pytest.raises(ValueError, match="0 to 65535"):
            resolve("zmq", "robot", port)


@pytest.mark.parametrize(
    ("host", "port", "match"),
    [
        ("localhost:5600", 0, r"host='localhost', port=5600"),
        ("[::1]:5600", 0, r"host='\[::1\]', port=5600"),
        ("http://robot", 0, "URL as transport="),
        ("zmq://robot:5555", 0, "URL as transport="),
        (None, 0, "leave it out"),
        (b"robot", 0, "as text"),
        ("robot", "5600", "as a number: 5600"),
        ("robot", "http", "whole number"),
        ("robot", 5600.0, "whole number"),
        ("robot", None, "whole number"),
    ],
)
def test_what_is_no_host_and_no_port_is_told_what_to_write(host, port, match):
    with pytest.raises(ValueError, match=match):
        resolve(None, host, port)
    if host is None or port is None:  # which is to leave them out
        return
    with pytest.raises(ValueError, match=match):
        InferenceServer(port, host)
    with pytest.raises(ValueError, match=match):
        InferenceClient(host, port)


def test_a_host_may_have_brackets_and_a_port_be_numpys():
    assert resolve("zmq", "[fe80::1%eth0]", np.uint16(5555)) == [Url("zmq", "fe80::1%eth0", 5555)]
    assert Url("zmq", "[::1]", 1) == Url.parse("zmq://[::1]:1")
    with started(InferenceServer(np.int64(0), "127.0.0.1")) as server:
        assert server.port


def test_the_environment_sets_the_default_and_the_keyword_wins(monkeypatch):
    monkeypatch.delenv("EDGEML_TRANSPORT", raising=False)
    assert resolve(None, "robot", 1) == [Url("zmq", "robot", 1)]
    monkeypatch.setenv("EDGEML_TRANSPORT", "inproc")
    assert resolve(None, "robot", 1) == [Url("inproc", "robot", 1)]
    assert resolve("zmq", "robot", 1) == [Url("zmq", "robot", 1)]
    monkeypatch.setenv("EDGEML_TRANSPORT", "")
    assert resolve(None, "robot", 1) == [Url("zmq", "robot", 1)]
