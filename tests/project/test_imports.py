"""What importing costs, and which way imports point."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pairs import ROOT

HEAVY = ("zmq", "grpc", "jax", "gymnasium", "ray", "cloudpickle", "PIL", "cv2", "pytest")


def heavy_after(program: str) -> list[str]:
    """Which of the heavy packages a fresh interpreter has loaded after running a program."""
    tell = f"import json, sys; print(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{tell}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_edgeml_loads_nothing_heavy():
    assert heavy_after("import edgeml") == []


@pytest.mark.parametrize(
    "name",
    [
        "core",
        "extras",
        "images",
        "services",
        "data",
        "codecs",
        "transports",
        "cli",
        "__main__",
        "aio",
        "control",
        "ray",
        "ray.names",
    ],
)
def test_no_package_loads_an_optional_or_networking_library(name):
    assert heavy_after(f"import edgeml.{name}") == []


def test_every_public_name_can_be_imported_without_the_network():
    assert (
        heavy_after(
            "import edgeml\n"
            "for name in edgeml.__all__: assert getattr(edgeml, name) is not None, name\n"
            "assert set(edgeml.__all__) <= set(dir(edgeml))\n"
        )
        == []
    )


def test_importing_edgeml_takes_well_under_a_second():
    def once() -> float:
        program = (
            "import time; t = time.perf_counter(); import edgeml; print(time.perf_counter()-t)"
        )
        return float(subprocess.check_output([sys.executable, "-c", program], timeout=60))

    assert min(once() for _ in range(3)) < 0.2


SERVE = """
import edgeml
with edgeml.InferenceServer(0, transport="{transport}") as server:
    server.register_interface("echo", lambda payload: payload)
    server.start(threaded=True)
    with edgeml.InferenceClient("127.0.0.1", server.port, "{transport}") as client:
        assert client.call("echo", [1, "two"]) == [1, "two"]
"""


def test_using_one_plugin_loads_no_other():
    assert heavy_after(SERVE.format(transport="inproc")) == []
    assert heavy_after(SERVE.format(transport="zmq")) == ["zmq"]


def test_the_environment_chooses_the_transport():
    program = "import os; os.environ['EDGEML_TRANSPORT'] = 'inproc'\n" + SERVE.replace(
        'transport="{transport}"', ""
    ).replace(', "{transport}"', "")
    assert heavy_after(program) == []


# Which way imports point ------------------------------------------------------------------


LINT = """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv[1])  # before the checkout that is installed
from importlinter.cli import lint_imports
for _ in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = lint_imports()
    print(json.dumps([status == 0, said.getvalue()]), flush=True)
"""


@contextmanager
def linter(root: Path) -> Iterator[Callable[[], tuple[bool, str]]]:
    """What runs import-linter on a checkout; tells whether all rules are kept, and what it says."""
    with subprocess.Popen(
        [sys.executable, "-c", LINT, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    ) as process:

        def lint() -> tuple[bool, str]:
            print(file=process.stdin, flush=True)
            kept, said = json.loads(process.stdout.readline())
            return kept, said

        yield lint
        process.stdin.close()


def test_imports_point_one_way():
    with linter(ROOT) as lint:
        kept, output = lint()
    assert kept, output


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the checkout that a test may spoil, if it mends it again."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "edgeml", copy / "edgeml", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


@pytest.fixture(scope="module")
def lint(copy):
    """Lints the copy; one process for all tests, for its start takes longer than the linting."""
    with linter(copy) as lint:
        yield lint


def test_a_copy_keeps_the_rules_too(lint):
    kept, output = lint()
    assert kept, output


WRONG = [
    ("core/url.py", "import edgeml.data"),
    ("core/url.py", "import edgeml.services"),
    ("core/url.py", "import edgeml.transports.inproc"),
    ("core/url.py", "import edgeml.codecs.msgpack"),
    ("core/url.py", "import edgeml.testing"),
    ("core/url.py", "from edgeml import InferenceServer"),
    ("core/url.py", "def later():\n    import edgeml.services"),
    ("core/url.py", "import zmq"),
    ("core/url.py", "import jax.numpy"),
    ("core/dispatch.py", "import edgeml.core.wire"),
    ("core/dispatch.py", "import edgeml.core.server"),
    ("core/carrier.py", "import edgeml.core.transport"),
    ("core/dispatch.py", "import edgeml.core.guests"),
    ("core/dispatch.py", "import edgeml.core.door"),
    ("core/door.py", "import edgeml.core.dispatch"),
    ("core/door.py", "import edgeml.core.guests"),
    ("core/guests.py", "import edgeml.core.wire"),
    ("core/guests.py", "import edgeml.core.server"),
    ("core/server.py", "import edgeml_openpi"),
    ("services/inference.py", "import edgeml_groot.endpoint"),
    ("services/inference.py", "import agentlace"),
    ("cli/doctor.py", "import edgeml_vla_eval"),
    ("cli/plugins.py", "import edgeml_websocket.doors"),
    ("testing/doors.py", "import edgeml_openpi.codec"),
    ("testing/doors.py", "import websockets"),
    ("testing/doors.py", "import zmq"),
    ("transports/zmq/__init__.py", "import edgeml_groot"),
    ("core/session.py", "import edgeml.core.client"),
    ("core/session.py", "import edgeml.core.streams"),
    ("data/base.py", "import edgeml.services"),
    ("data/base.py", "import edgeml.transports.zmq"),
    ("data/base.py", "import grpc.aio"),
    ("services/base.py", "import edgeml.transports.zmq"),
    ("services/base.py", "import edgeml.codecs.msgpack"),
    ("services/base.py", "import gymnasium"),
    ("transports/zmq/__init__.py", "import edgeml.transports.inproc"),
    ("transports/zmq/__init__.py", "import edgeml.services"),
    ("transports/zmq/__init__.py", "import edgeml.codecs.msgpack"),
    ("services/trainer/client.py", "import edgeml.services.trainer.server"),
    ("services/trainer/ledger.py", "import edgeml.services.trainer.uploader"),
    ("services/functions.py", "import edgeml.services.batching"),
    ("services/contract.py", "import edgeml.services.functions"),
    ("services/shadow.py", "import edgeml.services.inference"),
    ("services/shadow.py", "import edgeml.services.batching"),
    ("services/batching/batcher.py", "import edgeml.services.inference"),
    ("services/batching/stack.py", "import edgeml.services.batching.patience"),
    ("services/batching/patience.py", "import edgeml.services.batching.batcher"),
    ("transports/inproc.py", "import edgeml.data"),
    ("codecs/msgpack.py", "import edgeml.codecs.cloudpickle"),
    ("codecs/msgpack.py", "import edgeml.transports.zmq"),
    ("testing/transports.py", "import edgeml.transports.zmq"),
    ("testing/transports.py", "import edgeml.cli"),
    ("services/base.py", "import edgeml.cli"),
    ("core/url.py", "import edgeml.__main__"),
    ("cli/bench.py", "import edgeml.transports.zmq"),
    ("cli/doctor.py", "import edgeml.codecs.msgpack"),
    ("cli/doctor.py", "import zmq"),
    ("services/base.py", "import edgeml.gym"),
    ("data/spaces.py", "import gymnasium"),
    ("data/spaces.py", "import edgeml.gym.spaces"),
    ("testing/stores.py", "import edgeml.gym"),
    ("cli/doctor.py", "import gymnasium"),
    ("extras.py", "import gymnasium"),
    ("gym/env.py", "import edgeml.transports.zmq"),
    ("gym/env.py", "import edgeml.codecs.msgpack"),
    ("gym/env.py", "import edgeml.testing"),
    ("gym/env.py", "import edgeml.cli"),
    ("gym/server.py", "import zmq"),
    ("gym/server.py", "import jax"),
    ("services/base.py", "import edgeml.aio"),
    ("gym/env.py", "import edgeml.aio"),
    ("testing/stores.py", "import edgeml.aio"),
    ("aio.py", "import edgeml.gym"),
    ("aio.py", "import edgeml.testing"),
    ("aio.py", "import edgeml.transports.zmq"),
    ("aio.py", "import grpc"),
    ("aio.py", "import jax"),
    ("aio.py", "import gymnasium"),
    ("aio.py", "import edgeml.control"),
    ("services/base.py", "import edgeml.control"),
    ("gym/env.py", "import edgeml.control"),
    ("testing/stores.py", "import edgeml.control"),
    ("control/chunks.py", "import edgeml.gym"),
    ("control/chunks.py", "import edgeml.aio"),
    ("control/chunks.py", "import edgeml.testing"),
    ("control/chunks.py", "import edgeml.cli"),
    ("control/chunks.py", "import edgeml.transports.zmq"),
    ("control/chunks.py", "import edgeml.codecs.msgpack"),
    ("control/chunks.py", "import zmq"),
    ("control/chunks.py", "import jax"),
    ("control/chunks.py", "import gymnasium"),
    ("control/chunks.py", "import PIL.Image"),
    ("control/merging.py", "import edgeml.control.chunks"),
    ("control/chunks.py", "import edgeml.control.asking"),
    ("control/asking.py", "import edgeml.control.policy"),
    ("control/statistics.py", "import edgeml.control.asking"),
    ("core/resolver.py", "import edgeml.ray"),
    ("services/base.py", "import edgeml.ray"),
    ("services/base.py", "import ray"),
    ("gym/env.py", "import edgeml.ray"),
    ("gym/env.py", "import ray"),
    ("aio.py", "import edgeml.ray"),
    ("testing/stores.py", "import edgeml.ray"),
    ("cli/doctor.py", "import ray"),
    ("ray/names.py", "import edgeml.gym"),
    ("ray/names.py", "import edgeml.control"),
    ("ray/names.py", "import edgeml.cli"),
    ("ray/names.py", "import edgeml.testing"),
    ("ray/names.py", "import edgeml.transports.zmq"),
    ("ray/names.py", "import edgeml.codecs.msgpack"),
    ("ray/names.py", "import zmq"),
    ("ray/cluster.py", "import ray"),
    ("ray/cluster.py", "import jax"),
    ("ray/deployment.py", "import edgeml.ray.cluster"),
    ("ray/replica.py", "import edgeml.ray.servers"),
    ("ray/names.py", "import edgeml.ray.controller"),
    ("core/url.py", "import edgeml.images"),
    ("core/url.py", "import edgeml.extras"),
    ("extras.py", "import edgeml.core.errors"),
    ("extras.py", "import zmq"),
    ("images/codec.py", "import edgeml.data"),
    ("images/files.py", "import edgeml.codecs.msgpack"),
    ("images/files.py", "import PIL.Image"),
    ("images/files.py", "import jax"),
    ("data/rlds/features.py", "import PIL.Image"),
    ("codecs/msgpack.py", "import cv2"),
    ("codecs/msgpack.py", "import jax"),
]


@pytest.mark.parametrize("module", dict.fromkeys(module for module, _ in WRONG))
def test_an_import_that_points_the_wrong_way_is_caught(copy, lint, module):
    """All of one module are looked for at once, each by its line."""
    path = copy / "edgeml" / module
    right = path.read_text()
    lines, wrong = [], []
    for code in (code for where, code in WRONG if where == module):
        lines += code.splitlines()
        wrong.append(len(right.splitlines()) + len(lines))
    path.write_text(right + "\n".join([*lines, ""]))
    kept, output = lint()
    path.write_text(right)
    assert not kept
    assert "BROKEN" in output, output
    culprit = re.escape(
        f"edgeml.{module.removesuffix('.py').removesuffix('/__init__')}".replace("/", ".")
    )
    told = re.findall(rf"{culprit}\s+->\s+\S+\s+\(([^)]*)\)", output)
    found = {int(line) for each in told for line in re.findall(r"l\.(\d+)", each)}
    assert set(wrong) <= found, (dict(zip(wrong, lines, strict=False)), output)


# What doors know --------------------------------------------------------------------------


def doors() -> list[Path]:
    """The folders of the plugins that are doors, and of what these stand on."""
    found = (path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
    return sorted(each for each in found if "edgeml.doors" in (each / "pyproject.toml").read_text())


def modules_of(name: str, code: str) -> list[str]:
    """What a module imports, in functions too."""
    found = []
    for node in ast.walk(ast.parse(code, name)):
        if isinstance(node, ast.Import):
            found += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def strays(name: str, code: str) -> list[str]:
    """What a door's module imports that doors are not to know."""
    return [
        each
        for each in modules_of(name, code)
        if each.split(".")[0] == "edgeml" and each.split(".")[1:2] not in (["core"], ["images"])
    ]


def test_there_are_doors():
    assert {"edgeml-groot", "edgeml-openpi", "edgeml-vla-eval"} <= {each.name for each in doors()}


@pytest.mark.parametrize("door", doors(), ids=lambda door: door.name)
def test_a_door_knows_core_and_images_alone(door):
    for path in door.glob("edgeml_*/**/*.py"):
        assert strays(path.name, path.read_text()) == [], path


@pytest.mark.parametrize(
    "wrong",
    [
        "import edgeml",
        "from edgeml import InferenceServer",
        "import edgeml.services",
        "def later():\n    from edgeml.transports.zmq import ZmqTransport",
        "import edgeml.corelike",
        "from edgeml.data import Batch",
    ],
)
def test_a_door_that_knows_more_is_caught(wrong):
    assert strays("door.py", f"from edgeml.core import Door\n{wrong}\n") != []
