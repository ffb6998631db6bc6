"""The command line, in processes of its own: plugins, doctor and bench."""

import importlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from edgeml import Feature, InferenceServer, PolicyContract, TrainerConfig, TrainerServer
from edgeml.cli import _size, main
from edgeml.cli.keygen import make_client_keys, make_server_keys
from edgeml.cli.probe import ACK
from edgeml.core import Message, Url, load_transport, wire
from pairs import ROOT, TRANSPORTS, process, started, wait_until
from strangers import TRANSPORT

SECURED = ("shm", "zmq", "grpc", "ws")
BETWEEN = sorted(set(TRANSPORTS) - {"inproc"})
PROGRAM = "import sys; from edgeml.cli import main; sys.exit(main(sys.argv[1:]))"


def edgeml(*arguments, **options) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and see that it shows no traceback, whatever happens."""
    done = subprocess.run(
        [sys.executable, "-m", "edgeml", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done


def line_of(done, *words) -> str:
    """The one line of the output that has all of some words."""
    lines = [line for line in done.stdout.splitlines() if all(word in line for word in words)]
    assert len(lines) == 1, done.stdout + done.stderr
    return lines[0]


@pytest.fixture
def installed(tmp_path):
    """Installs packages that offer a module as a plugin; for processes with what it returns."""
    sites = []

    def install(name, source, *, package, kind="transport") -> dict[str, str]:
        site = tmp_path / package
        info = site / f"{package}-1.5.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
        module = f"module_of_{package}"
        (info / "entry_points.txt").write_text(f"[edgeml.{kind}s]\n{name} = {module}\n")
        source = textwrap.dedent(source.replace("{name!r}", repr(name)))
        (site / f"{module}.py").write_text(source)
        sites.append(str(site))
        return {**os.environ, "PYTHONPATH": os.pathsep.join([*sites, os.environ["PYTHONPATH"]])}

    return install


# The commands -----------------------------------------------------------------------------


def test_help_names_the_commands_and_each_has_its_own():
    done = edgeml("--help")
    assert done.returncode == 0
    for command in ("plugins", "doctor", "keygen", "bench", "soak"):
        assert command in done.stdout
        assert edgeml(command, "--help").returncode == 0
    assert "--host" in edgeml("bench", "serve", "--help").stdout


def test_the_console_script_is_the_same_program():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["edgeml"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["doctor", "--url", "robot:5555"], "'robot:5555' is not a URL"),
        (["doctor", "--url", "zmq://robot"], "'zmq://robot' names no port"),
        (["doctor", "--timeout", "nan"], "'nan' is no time in seconds"),
        (["bench", "--size", "big"], "'big' is no size"),
        (["bench", "--size", "0"], "'0' is no size"),
        (["bench", "--seconds", "-1"], "'-1' is no time in seconds"),
        (["soak", "--clients", "0"], "'0' is no number of clients"),
        (["bench", "--url", "zmq://a:1", "--transport", "zmq"], "not allowed with"),
    ],
)
def test_arguments_that_are_not_understood_are_quoted(arguments, said, capsys):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("56", 56), ("56B", 56), ("300KB", 300_000), ("300 kb", 300_000), ("4M", 4_000_000)),
        *(("1.5MB", 1_500_000), ("1KiB", 1024), ("2MiB", 2 << 20), ("1GB", 10**9)),
    ],
)
def test_a_size_is_read(text, size):
    assert _size(text) == size


# plugins ----------------------------------------------------------------------------------


def test_plugins_lists_what_is_installed_with_its_package():
    done = edgeml("plugins")
    assert done.returncode == 0
    for kind, names in (("transport", TRANSPORTS), ("codec", ("cloudpickle", "msgpack"))):
        for name in names:
            package = "edgeml-websocket" if name == "ws" else "edgeml-robotics"
            row = rf"(?m)^{kind} +{name} +{package} [\d.]+ +ok$"
            assert re.search(row, done.stdout), done.stdout
    assert "FAILED" not in done.stdout


NO_TEXT = """
class Silent(BaseException):
    def __str__(self):
        raise ValueError

raise Silent
"""


def test_plugins_names_each_that_is_broken_with_the_reason(installed):
    reasons = {
        "quits": ("raise SystemExit(0)", "SystemExit: 0"),
        "raises": ("raise RuntimeError('no\\n licence')", "RuntimeError: no licence"),
        "imports": ("import a_module_that_is_not_there", "a_module_that_is_not_there"),
        "garbled": ("def broken(:", "SyntaxError"),
        "silent": (NO_TEXT, "Silent"),
        "lacking": (TRANSPORT.replace("def connect", "def connects"), "lacks connect"),
    }
    for name, (source, _) in reasons.items():
        installed(name, source, package=f"p_{name}")
    installed("inproc", TRANSPORT, package="thief")
    installed("twice", TRANSPORT, package="first")
    installed("twice", TRANSPORT, package="second")
    installed("morse", "import sys; sys.exit('why')", package="p_morse", kind="codec")
    done = edgeml("plugins", env=installed("fine", TRANSPORT, package="p_fine"))
    assert done.returncode == 1
    for name, (_, reason) in reasons.items():
        assert re.search(rf"transport +{name} +p_{name} 1\.5 +FAILED\n.*{reason}", done.stdout)
    assert re.search(r"codec +morse +p_morse 1\.5 +FAILED\n.*SystemExit: why", done.stdout)
    for package in ("first", "second"):
        row = rf"transport +twice +{package} 1\.5 +FAILED\n.*claimed by first 1\.5 and second 1\.5"
        assert re.search(row, done.stdout), done.stdout
    row = r"transport +inproc +thief 1\.5 +FAILED\n.*claimed by edgeml-robotics .* and thief 1\.5"
    assert re.search(row, done.stdout), done.stdout
    for row in (
        r"transport +fine +p_fine 1\.5",
        *(rf"transport +{name} +edgeml" for name in BETWEEN),
    ):
        assert re.search(rf"(?m)^{row}.* ok$", done.stdout), done.stdout


# doctor -----------------------------------------------------------------------------------


def test_doctor_tries_every_transport():
    done = edgeml("doctor")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^edgeml [\d.]+, protocol \d+\nPython 3\.\d+\.\d+, numpy \d", done.stdout)
    for name in BETWEEN:
        assert re.search(rf"  {name} +ok, .* ms in this process, .* ms between two", done.stdout)
        assert re.search(rf"  {name}: a client .* takes \d+ at the server: about \d+", done.stdout)
    assert "within one process only" in line_of(done, "  inproc ")
    for reported in ("libzmq: ", "pyzmq: ", "memory: ", "lent to one peer: "):
        assert line_of(done, reported)


def test_doctor_counts_the_descriptors_that_a_client_takes():
    done = edgeml("doctor", "--transport", "shm", "zmq")
    for name, each in (("shm", 4), ("zmq", 3)):
        assert f" takes {each} at the server" in line_of(done, f"{name}: a client")


def limited(soft, hard):
    return edgeml(
        *("doctor", "--transport", "zmq"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
    )


def test_doctor_says_how_to_have_more_open_files():
    done = limited(256, 512)
    assert "256 (soft limit), and raise that to 512 (hard limit)" in done.stdout
    assert line_of(done, "ulimit -n 512")
    clients = int(re.findall(r"zmq: .*about (\d+) clients", done.stdout)[0])
    assert 50 < clients <= 256 / 3
    done = limited(256, 256)
    assert "`ulimit -n` can't raise it" in done.stdout


def test_doctor_shows_a_limit_of_shared_memory_that_was_chosen():
    done = edgeml("doctor", "--transport", "shm", env={**os.environ, "EDGEML_SHM_LIMIT_MB": "300"})
    assert "300 MiB" in line_of(done, "lent to one peer")


def test_doctor_says_how_to_start_processes_that_use_grpc():
    said = line_of(edgeml("doctor", "--transport", "grpc"), "fork")
    assert "spawn" in said
    assert "forkserver" in said


def test_doctor_asks_a_server():
    with started(InferenceServer(0, transport="zmq")) as server:
        done = edgeml("doctor", "--transport", "inproc", "--url", server.url)
    assert done.returncode == 0, done.stdout
    assert f"{server.url}  ok, inference server, protocol {wire.PROTOCOL}" in done.stdout
    assert re.search(r"round trip [\d.]+ ms \(median\), [\d.]+ ms \(best\)", done.stdout)
    clock = re.search(r"its clock is ([\d.]+) ms .* ours, give or take ([\d.]+) ms", done.stdout)
    assert clock is not None
    assert float(clock[1]) <= float(clock[2]) + 0.001  # it is the same clock; and the rounding


def test_doctor_shows_the_contracts_of_a_server():
    with started(InferenceServer(0, transport="zmq")) as server:
        server.register_interface("free", lambda payload: payload)
        server.register_interface(
            "policy\x1b[2J",
            lambda payload: payload,
            contract=PolicyContract(
                {"state": Feature(2, "float32", names=("a", "b\x1b[2J"), units="rad")}, rate=50
            ),
        )
        done = edgeml("doctor", "--transport", "inproc", "--url", server.url)
    assert done.returncode == 0, done.stdout
    assert "protocol 1, ready\n" in done.stdout
    assert "interface 'free', without a contract" in done.stdout
    told = r"interface 'policy\x1b[2J'" + "\n          50 Hz\n          observation['state']: shape"
    assert told in done.stdout
    assert "\x1b" not in done.stdout


def test_doctor_shows_what_a_server_is_at():
    report, go_on = threading.Event(), threading.Event()

    def load(tell):
        tell(0.25, "weights\x1b[2J")
        report.set()
        assert go_on.wait(60)

    server = InferenceServer(0, transport="zmq")
    server.load(load)
    server.register_interface("policy", lambda payload: payload)
    with started(server):
        assert report.wait(10)
        done = edgeml("doctor", "--transport", "inproc", "--url", server.url)
        go_on.set()
    assert done.returncode == 0, done.stdout
    assert r"protocol 1, 'loading, 25% done: weights\x1b[2J'" in done.stdout
    assert "interface" not in done.stdout


def test_doctor_says_why_contracts_cannot_be_had():
    with started(InferenceServer(0, transport="zmq", codecs=("cloudpickle",))) as server:
        done = edgeml("doctor", "--transport", "inproc", "--url", server.url)
    assert done.returncode == 0, done.stdout
    assert "its contracts can't be had: codec: the server offers cloudpickle" in done.stdout


def test_doctor_says_of_each_server_what_is_wrong():
    def foreign(message, reply):
        reply(Message(b"hello"))

    def newer(message, reply):
        pong = wire.pack(wire.Pong(99, "action", 0.0))
        reply(Message(wire.pack(wire.Answer(wire.OK, pong))))

    def older(message, reply):
        reply(Message(wire.pack_error(wire.Malformed("unknown kind of request: 4"))))

    zmq, url = load_transport("zmq"), Url("zmq")
    with (
        zmq.serve(url, foreign) as first,
        zmq.serve(url, newer) as second,
        zmq.serve(url, older) as third,
        socket.create_server(("127.0.0.1", 0)) as silent,
        started(InferenceServer(0, transport="zmq")) as good,
    ):
        taken = socket.socket()
        taken.bind(("127.0.0.1", 0))  # and listens not
        nobody = Url("zmq", port=taken.getsockname()[1])
        mute = Url("zmq", port=silent.getsockname()[1])
        urls = [first.url, second.url, third.url, mute, nobody, "pigeon://loft:1", good.url]
        done = edgeml("doctor", "--transport", "inproc", "--timeout", 0.5, "--url", *urls)
        taken.close()
    assert done.returncode == 1
    for endpoint in (first, third):
        assert "FAILED: what answers is no edgeml server" in line_of(done, str(endpoint.url))
    assert "protocol 99" in line_of(done, str(second.url), "FAILED")
    assert "gave no reply within" in line_of(done, f"{mute}  FAILED")
    assert "nobody answers" in line_of(done, f"{nobody}  FAILED")
    assert "no transport 'pigeon'" in line_of(done, "pigeon://loft:1  FAILED")
    assert line_of(done, f"{good.url}  ok")


def test_doctor_goes_on_after_a_transport_that_fails(installed):
    installed("raises", TRANSPORT.replace("NotImplementedError", "KeyError('why')"), package="one")
    env = installed("quits", "raise SystemExit", package="two")
    done = edgeml("doctor", "--transport", "raises", "quits", "inproc", "unknown", env=env)
    assert done.returncode == 1
    assert "KeyError: 'why'" in line_of(done, "  raises ", "FAILED")
    assert "two 1.5 failed to load: SystemExit" in line_of(done, "  quits ", "FAILED")
    assert "there is no transport 'unknown'" in line_of(done, "  unknown ", "FAILED")
    assert line_of(done, "  inproc ", "ok")


DOOR = """
from edgeml.core import Door, Endpoint, hookimpl

class End(Endpoint):
    local = True

    def __init__(self, url):
        self.url = url.with_port(4321)

    def close(self):
        pass

class Mine(Door):
    name = {name!r}

    def report(self):
        return {"speaks": "in riddles"}

    def open(self, url, dispatch, *, credentials, limits):
        return End(url)

@hookimpl
def edgeml_door():
    return Mine
"""


def test_doctor_opens_every_door(installed):
    installed("mine", DOOR, package="one", kind="door")
    fails = DOOR.replace("return End(url)", "raise OSError('the hinges are gone')")
    env = installed("stuck", fails, package="two", kind="door")
    done = edgeml("doctor", "--transport", "inproc", env=env)
    assert done.returncode == 1
    assert line_of(done, "  mine ", "ok, listened at mine://127.0.0.1:4321")
    assert line_of(done, "speaks: in riddles")
    assert line_of(done, "  stuck ", "FAILED: OSError: the hinges are gone")
    listed = edgeml("plugins", env=env)
    assert listed.returncode == 0
    assert line_of(listed, "door ", "mine ", "one 1.5", "ok")


# Keys -------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path):
    return make_server_keys(tmp_path / "keys")


def with_keys(directory) -> dict[str, str]:
    return {**os.environ, "EDGEML_CREDENTIALS": str(directory)}


def test_doctor_looks_at_a_servers_keys(keys):
    make_client_keys(keys, "robot", role="observe,act:grip*")
    make_client_keys(keys, "former", days=-1)
    done = edgeml("doctor", "--transport", "inproc", "--credentials", keys)
    assert done.returncode == 0, done.stdout
    assert "CURVE, certificate; it lets in 2" in line_of(done, "those of a server")
    assert "may do observe,act:grip*, until 20" in line_of(done, "  robot: ")
    assert "has expired" in line_of(done, "  former: ")


def test_doctor_looks_at_the_environments_keys(keys):
    robot = make_client_keys(keys, "robot")
    done = edgeml("doctor", "--transport", "zmq", env=with_keys(robot))
    assert done.returncode == 0, done.stdout  # and what is tried here has none
    assert line_of(done, "those of the client robot: CURVE, certificate, token")


def test_doctor_says_of_keys_what_is_wrong(keys, tmp_path):
    keys.chmod(0o755)
    done = edgeml("doctor", "--transport", "inproc", "--credentials", keys)
    assert done.returncode == 1
    assert f"chmod 700 {keys}" in line_of(done, "  FAILED: others can read")
    done = edgeml("doctor", "--transport", "inproc", "--credentials", tmp_path / "none")
    assert done.returncode == 1
    assert "make keys with `edgeml keygen`" in line_of(done, "  FAILED: ")


@pytest.mark.parametrize("transport", SECURED)
def test_doctor_asks_a_server_with_keys(keys, transport):
    robot = make_client_keys(keys, "robot")
    with started(InferenceServer(0, transport=transport, credentials=keys)) as server:
        server.register_interface("policy", lambda payload: payload)
        asking = ("doctor", "--transport", "inproc", "--url", server.url)
        done = edgeml(*asking, "--credentials", robot)
    assert done.returncode == 0, done.stdout
    assert "interface 'policy', without a contract" in done.stdout


def test_doctor_says_that_these_are_no_keys_to_ask_with(keys):
    with started(InferenceServer(0, transport="zmq", credentials=keys)) as server:
        asking = ("doctor", "--transport", "inproc", "--url", server.url)
        done = edgeml(*asking, "--credentials", keys)
    assert done.returncode == 1
    assert "these are the keys of a server" in line_of(done, f"{server.url}  FAILED")


@pytest.mark.parametrize("transport", ["grpc", "zmq"])
def test_bench_measures_a_server_with_keys(keys, transport):
    robot = make_client_keys(keys, "robot")
    serving = ("bench", "serve", "--transport", transport)
    with process(PROGRAM, *serving, "--credentials", keys) as server:
        url = re.findall(r"edgeml bench --url (\S+)", server.line())[0]
        measuring = ("bench", "--url", url, "--seconds", 0.02, "--size", 56)
        done = edgeml(*measuring, "--credentials", robot)
        assert done.returncode == 0, done.stdout
        done = edgeml(*measuring, env=with_keys(robot))
        assert done.returncode == 0, done.stdout
        done = edgeml(*measuring)
        assert done.returncode == 1
        assert line_of(done, "FAILED")


def test_bench_says_that_whoever_reaches_it_may_call_it(keys):
    with process(PROGRAM, "bench", "serve", "--transport", "zmq", "--host", "0.0.0.0") as server:
        server.line()
        assert "edgeml keygen" in server.line()
    before = ("bench", "--credentials", keys, "serve")  # as good as after it
    with process(PROGRAM, *before, "--transport", "zmq", "--host", "0.0.0.0") as server:
        server.line()
        assert "Ctrl-C stops it" in server.line()


def test_bench_takes_keys_for_another_machine_alone(keys):
    done = edgeml("bench", "--credentials", keys)
    assert done.returncode == 1
    assert "--credentials is for --url" in done.stderr


# bench ------------------------------------------------------------------------------------

FIGURES = r" +\d+\.\d+ +\d+\.\d+ +\d+ +\d+\.\d"


def test_bench_measures_every_transport_between_processes():
    done = edgeml("bench", "--seconds", 0.02, "--size", 56, "300KB")
    assert done.returncode == 0, done.stdout
    for name in BETWEEN:
        for size in ("56 B", "300 KB"):
            assert re.search(rf"(?m)^{name} +{size}{FIGURES}$", done.stdout), done.stdout
    assert "within one process only" in line_of(done, "inproc ")


def test_bench_goes_on_after_a_transport_that_fails(installed):
    env = installed(
        "raises", TRANSPORT.replace("NotImplementedError", "KeyError('why')"), package="one"
    )
    arguments = ("--transport", "unknown", "raises", "shm", "--seconds", 0.02, "--size", 56)
    done = edgeml("bench", *arguments, env=env)
    assert done.returncode == 1
    assert "there is no transport 'unknown'" in line_of(done, "unknown ", "FAILED")
    assert "it can't serve: KeyError: 'why'" in line_of(done, "raises ", "FAILED")
    assert re.search(rf"(?m)^shm +56 B{FIGURES}$", done.stdout), done.stdout


def test_bench_serve_is_measured_from_elsewhere_until_ctrl_c():
    with process(PROGRAM, "bench", "serve", "--transport", "shm,zmq") as server:
        urls = [re.findall(r"edgeml bench --url (\S+)", server.line())[0] for _ in range(2)]
        assert [url.partition(":")[0] for url in urls] == ["shm", "zmq"]
        assert "only this machine" in server.line()
        assert "Ctrl-C stops it" in server.line()
        for url in urls:
            done = edgeml("bench", "--url", url, "--seconds", 0.02, "--size", 56)
            assert done.returncode == 0, done.stdout
            assert re.search(rf"(?m)^\w+ +56 B{FIGURES}$", done.stdout), done.stdout
        server.signal(signal.SIGINT)
        assert (server.line(), server.line()) == ("", "stopped")
        assert server.end() == (0, "")


def test_bench_serve_says_that_its_port_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = edgeml("bench", "serve", "--transport", "zmq", "--port", port)
    assert done.returncode == 1
    assert done.stderr.startswith("edgeml: ")
    assert f"cannot serve zmq://127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize(
    "make",
    [
        lambda: InferenceServer(0, transport="zmq"),
        lambda: TrainerServer(TrainerConfig(port_number=0, broadcast_port=0, transport="zmq")),
    ],
    ids=["inference", "trainer"],
)
def test_bench_says_that_another_server_is_none_to_measure(make):
    with started(make()) as server:
        done = edgeml("bench", "--url", server.url)
    assert done.returncode == 1
    assert "is no `edgeml bench serve`" in line_of(done, "FAILED")


def test_bench_says_that_its_server_was_lost():
    measured = threading.Event()

    def ack(payload):
        measured.set()
        return 0

    server = InferenceServer(0, transport="zmq")
    server.register_interface(ACK, ack)
    with started(server), process(PROGRAM, "bench", "--url", server.url, "--seconds", 60) as bench:
        assert measured.wait(30)
        server.stop()
        printed, stderr = bench.popen.communicate(timeout=30)
        assert bench.popen.returncode == 1
        assert "FAILED" in printed
        assert stderr == ""


def test_ctrl_c_ends_a_measurement_at_once():
    with process(PROGRAM, "bench", "--transport", "shm", "--seconds", 60) as bench:
        assert "p50 ms" in bench.line()
        bench.signal(signal.SIGINT)
        assert bench.end() == (130, "")


def test_ctrl_c_ends_a_measurement_while_its_servers_process_starts():
    with process(PROGRAM, "bench", "--transport", "shm", "--seconds", 60) as bench:
        children = Path(f"/proc/{bench.popen.pid}/task/{bench.popen.pid}/children")
        wait_until(lambda: children.read_text(), timeout=30)
        server = int(children.read_text())
        wait_until(lambda: os.getsid(server) == server)  # so a terminal's Ctrl-C isn't for it
        bench.signal(signal.SIGINT)
        assert bench.end() == (130, "")
    wait_until(lambda: not Path(f"/proc/{server}").exists(), timeout=30)  # if by itself
