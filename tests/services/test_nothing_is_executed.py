"""Nothing that comes from the network is executed: what could is made to fail, and all works."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from edgeml.cli.keygen import make_client_keys, make_server_keys
from pairs import ROOT, run_fresh

GUARD = '''
import builtins, marshal, pickle, _pickle, shelve, sys
import cloudpickle

used = []


def is_own_source(frame):
    """Whether a module is read from disk, which takes `exec`, or annotations are of one."""
    if frame.f_globals.get("__name__") in ("typing", "msgspec._utils"):
        return True
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(("importlib._boot", "_frozen_importlib")):
            return True
        frame = frame.f_back
    return False


def forbid(module, name):
    before = getattr(module, name)

    def refuse(*args, **kwargs):
        if is_own_source(sys._getframe(1)):
            return before(*args, **kwargs)
        used.append(f"{module.__name__}.{name}")
        raise AssertionError(f"{module.__name__}.{name} was called")

    setattr(module, name, refuse)


for module in (pickle, _pickle, cloudpickle):
    for name in ("loads", "load"):
        forbid(module, name)
for name in ("_loads", "_load"):
    forbid(pickle, name)
for module, name in ((pickle, "Unpickler"), (pickle, "_Unpickler"), (_pickle, "Unpickler")):

    class Refused(getattr(module, name)):
        def __init__(self, *args, **kwargs):
            used.append("an Unpickler")
            raise AssertionError("an Unpickler was made")

    setattr(module, name, Refused)
forbid(marshal, "loads")
forbid(marshal, "load")
forbid(shelve, "open")
for name in ("eval", "exec"):
    forbid(builtins, name)
for call in (
    lambda: pickle.loads(pickle.dumps(1)),
    lambda: pickle.Unpickler(None),
    lambda: eval("1"),
    lambda: marshal.loads(b"i"),
):
    try:
        call()
    except AssertionError:
        used.pop()
    else:
        raise SystemExit("the guard sees nothing")
'''

PAIRS = """
import os, tempfile, threading
import numpy as np
import edgeml
from edgeml import *
from edgeml.data import QueuedDataStore, ReplayBuffer

transport, server_keys, client_keys = TRANSPORT, SERVER_KEYS, CLIENT_KEYS


class Bomb:
    def __reduce__(self):
        return os._exit, (17,)


pickled = pickle.dumps(Bomb())
value = {
    "image": np.arange(30_000, dtype=np.uint8).reshape(100, 100, 3),
    "large": np.zeros(600_000, np.float32),
    "strings": ["a", b"b", pickled, "__import__('os')._exit(17)"],
    "numbers": (1, 2.5, None, True, 1 << 70, np.float32(2), np.int8(-1)),
    "set": {1, 2},
}


def same(a, b):
    np.testing.assert_equal(a, b)


def until(event):
    if not event.wait(10):
        raise SystemExit("it did not come")


# Action
config = ActionConfig(0, ["move"], ["all"], transport=transport)
with ActionServer(
    config, lambda keys: {"all": value}, lambda key, payload: payload, credentials=server_keys
) as server:
    server.start(threaded=True)
    server.publish_obs(value)
    config = ActionConfig(server.port, ["move"], ["all"], transport=transport)
    with ActionClient("127.0.0.1", config=config, credentials=client_keys) as client:
        same(client.obs()["all"], value)
        same(client.act("move", value), value)
        same(client.act_async("move", value).result(10), value)
        came = threading.Event()
        client.register_obs_callback(lambda got: (same(got, value), came.set()))
        until(came)

# Inference
contract = PolicyContract(observation={"image": Feature((100, 100, 3), "uint8", kind="image")})
with InferenceServer(0, transport=transport, credentials=server_keys) as server:
    server.register_interface("echo", lambda payload: payload, contract=contract)
    server.register_interface("batch", lambda payload: payload, batching=Batching(4))

    @server.register_interface("fail")
    def fail(payload):
        raise ValueError("eval('1')")

    server.start(threaded=True)
    with InferenceClient(
        url=server.url, expect={"echo": contract}, credentials=client_keys
    ) as client:
        same(client.call("echo", value), value)
        same(client.call("batch", {"x": np.ones(3)}), {"x": np.ones(3)})
        same(client.contract("echo"), contract)
        client.reset("one")
        try:
            client.call("fail", None)
        except RemoteError as error:
            same(error.message, "eval('1')")
    if "edgeml.codecs.cloudpickle" in sys.modules:
        raise SystemExit("what nobody asked for was imported")
    try:
        InferenceClient(url=server.url, codec="cloudpickle", credentials=client_keys)
        raise SystemExit("a codec that the server doesn't offer was spoken")
    except ConfigMismatch:
        pass

# Trainer
config = TrainerConfig(0, None, ["ask"], transport=transport)
with tempfile.TemporaryDirectory() as folder:
    with TrainerServer(
        config, None, lambda kind, payload: payload, credentials=server_keys
    ) as server:
        server.register_data_store("demos", ReplayBuffer(100))
        server.start(threaded=True)
        server.publish_network(value)
        config = TrainerConfig(server.port, None, ["ask"], transport=transport)
        store = QueuedDataStore(100)
        store.batch_insert([{"x": np.full(3, k, np.float32), "r": float(k)} for k in range(20)])
        with TrainerClient("demos", "127.0.0.1", config, store, credentials=client_keys) as client:
            same(client.update().applied, 20)
            same(client.request("ask", value), value)
            came = threading.Event()
            client.recv_network_callback(lambda got: (same(got, value), came.set()))
            until(came)
        server.save_checkpoint(os.path.join(folder, "run"), value)
    with TrainerServer(config, credentials=server_keys) as again:
        again.register_data_store("demos", ReplayBuffer(100))
        same(again.load_checkpoint(os.path.join(folder, "run")), value)
        same(len(again.data_store("demos")), 20)

if used:
    raise SystemExit(f"called: {used}")
print("done")
"""


def program(transport, server_keys=None, client_keys=None) -> str:
    names = {"TRANSPORT": transport, "SERVER_KEYS": server_keys, "CLIENT_KEYS": client_keys}
    text = PAIRS
    for name, given in names.items():
        text = text.replace(name, repr(None if given is None else str(given)))
    return GUARD + text


def test_the_three_pairs_work_where_nothing_can_be_executed(transport):
    assert run_fresh(program(transport), timeout=60)[0] == "done\n"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    home = make_server_keys(tmp_path_factory.mktemp("keys") / "server")
    return home, make_client_keys(home, "robot")


def test_with_keys_too(transport, keys):
    assert run_fresh(program(transport, *keys), timeout=60)[0] == "done\n"


# What is written --------------------------------------------------------------------------------

EXECUTING = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
CALLS = {"eval", "exec", "compile", "__import__"}
# The codec that says so itself, and a suite that compares what a store gives before and after.
EXCEPT = {"edgeml/codecs/cloudpickle.py", "edgeml/testing/stores.py"}


def executing(path: Path) -> list[str]:
    """Lines of a module that import or call what can execute data."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [each.name.partition(".")[0] for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").partition(".")[0]]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [node.func.id] if node.func.id in CALLS else []
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            names = [] if getattr(node.value, "value", True) is False else ["pickle"]
        if EXECUTING & set(names) or CALLS & set(names):
            found.append(f"{path}:{node.lineno}")
    return found


def test_no_module_but_the_codecs_imports_or_calls_what_executes():
    sources = [*(ROOT / "edgeml").rglob("*.py"), *(ROOT / "plugins").glob("*/edgeml_*.py")]
    assert len(sources) > 100
    found = {str(path.relative_to(ROOT)): executing(path) for path in sources}
    assert {name for name, lines in found.items() if lines} == EXCEPT, found
