"""What importing costs, and which way imports point."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pairs import ROOT

HEAVY = ("zmq", "grpc", "jax", "gymnasium", "cloudpickle", "PIL", "cv2", "pytest")


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


def lint_imports(root: Path) -> tuple[bool, str]:
    """Run import-linter on a checkout; whether all rules are kept, and what it says."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            # The checkout to look at comes before the one that is installed.
            f"import sys; sys.path.insert(0, {str(root)!r})\n"
            "from importlinter.cli import lint_imports\n"
            f"sys.exit(lint_imports({str(root / 'pyproject.toml')!r}, no_cache=True))",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=root,
        check=False,
    )
    return done.returncode == 0, done.stdout + done.stderr


def test_imports_point_one_way():
    kept, output = lint_imports(ROOT)
    assert kept, output


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the checkout that a test may spoil."""
    shutil.copytree(ROOT / "edgeml", tmp_path / "edgeml", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_a_copy_keeps_the_rules_too(copy):
    kept, output = lint_imports(copy)
    assert kept, output


@pytest.mark.parametrize(
    ("module", "wrong"),
    [
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
    ],
)
def test_an_import_that_points_the_wrong_way_is_caught(copy, module, wrong):
    path = copy / "edgeml" / module
    path.write_text(f"{path.read_text()}\n{wrong}\n")
    kept, output = lint_imports(copy)
    assert not kept
    assert "BROKEN" in output, output
