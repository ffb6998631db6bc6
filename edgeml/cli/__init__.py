"""The command line, ``edgeml`` or ``python -m edgeml``: what is installed, what works, how fast.

It names no transport and no codec: it asks for those that are installed, anybody's among them.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from edgeml import __version__
from edgeml.core.errors import EdgemlError
from edgeml.core.url import Url

__all__ = ["main"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: those of the command line; this process's own by default.

    Returns:
        The exit code: 0, or 1 where something that was looked at doesn't work. Arguments that
        can't be understood exit with 2.
    """
    options = _parser().parse_args(arguments)
    # What goes wrong is printed here, in one line; the log has it once more, with a traceback.
    logging.getLogger("edgeml").addHandler(logging.NullHandler())
    try:
        code: int = options.run(options)
    except (EdgemlError, ImportError, OSError, ValueError) as error:
        print(f"edgeml: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # what a shell reports of Ctrl-C
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgeml", description="Connects robots and cameras to GPU servers."
    )
    parser.add_argument("--version", action="version", version=f"edgeml {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    plugins = commands.add_parser(
        "plugins",
        help="list transports, codecs and doors, and what is wrong with them",
        description="List every installed transport, codec and door, with the package that it "
        "comes from. Loads each; exits with 1 if one can't be used.",
    )
    plugins.set_defaults(run=_plugins)

    doctor = commands.add_parser(
        "doctor",
        help="see what works on this machine, and whether a server answers",
        description="Try every transport and door on this machine, show versions and limits, and "
        "ask servers who they are. Exits with 1 if something doesn't work.",
    )
    _add_transports(doctor)
    doctor.add_argument(
        "--url", nargs="+", default=[], type=_url, help="a server to ask, as in zmq://robot:5555"
    )
    doctor.add_argument(
        "--timeout",
        type=_seconds,
        default=5.0,
        metavar="S",
        help="seconds that connecting, and then an answer, may take (default: %(default)g)",
    )
    _add_credentials(doctor, "keys to look at; a client's are for the servers")
    doctor.set_defaults(run=_doctor)

    keygen = commands.add_parser(
        "keygen",
        help="make the keys of a server and its clients, or revoke them",
        description="Make a server's keys in DIR, and those of a client with --client. With keys "
        "there, DIR alone renews the server's certificate.",
    )
    keygen.add_argument("directory", type=Path, metavar="DIR", help="of the server's keys")
    who = keygen.add_mutually_exclusive_group()
    who.add_argument("--client", metavar="NAME", help="make the keys of this client, and let it in")
    who.add_argument("--revoke", metavar="NAME", help="let this client in no more")
    keygen.add_argument(
        "--role",
        default="all",
        help="what the client may do, as in observe or act:grip*,call (default: %(default)s)",
    )
    keygen.add_argument(
        "--days",
        type=_days,
        metavar="N",
        help="how long what is made is valid (default: a client's keys 365, a server's "
        "certificate 3650)",
    )
    keygen.set_defaults(run=_keygen)

    bench = commands.add_parser(
        "bench",
        help="measure this machine, or the link between two",
        usage="edgeml bench [-h] [--transport NAME ... | --url URL] [--size SIZE ...]\n"
        "                    [--seconds S] [--timeout S] [--credentials DIR]\n"
        "       edgeml bench serve [-h] [--host HOST] [--port PORT] [--transport NAME]\n"
        "                          [--credentials DIR]",
        description="Measure round trips and throughput to a server in another process, for each "
        "transport. Between two machines: run `edgeml bench serve --host 0.0.0.0` on one, and "
        "`edgeml bench --url` with what it prints on the other.",
    )
    chosen = bench.add_mutually_exclusive_group()
    _add_transports(chosen)
    chosen.add_argument("--url", type=_url, help="a running `edgeml bench serve` to measure")
    bench.add_argument(
        "--size",
        nargs="+",
        type=_size,
        default=[56, 300_000, 4_000_000],
        help="bytes of a payload, as in 56 300KB 4MB, which is the default",
    )
    bench.add_argument(
        "--seconds",
        type=_seconds,
        default=1.0,
        metavar="S",
        help="how long to measure each size (default: %(default)g)",
    )
    bench.add_argument(
        "--timeout",
        type=_seconds,
        default=10.0,
        metavar="S",
        help="seconds that connecting, or a call, may take (default: %(default)g)",
    )
    _add_credentials(bench, "a client's keys, for --url")
    bench.set_defaults(run=_bench)

    serve = bench.add_subparsers(
        title="on the other machine", metavar="COMMAND", prog="edgeml bench"
    ).add_parser(
        "serve",
        help="serve what `edgeml bench --url` measures, until Ctrl-C",
        description="Serve what `edgeml bench --url` measures, until Ctrl-C.",
    )
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="where to listen; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    serve.add_argument(
        "--port", type=int, default=0, help="0 lets the system pick one (default: %(default)s)"
    )
    serve.add_argument(
        "--transport", metavar="NAME", help="as for any server (default: $EDGEML_TRANSPORT, or zmq)"
    )
    _add_credentials(serve, "a server's keys", default=argparse.SUPPRESS)  # what bench was given
    serve.set_defaults(run=_serve)

    soak = commands.add_parser(
        "soak",
        help="hold many clients for a long time, and see what that takes",
        description="Hold clients of all three kinds on this machine, in several processes, each "
        "calling in turn, and print errors, memory, descriptors and threads over the time. Exits "
        "with 1 if a call failed, an answer was wrong, or anything grew after the first minute.",
    )
    soak.add_argument(
        "--transport", metavar="NAME", help="as for any server (default: $EDGEML_TRANSPORT, or zmq)"
    )
    soak.add_argument("--clients", type=_count, default=300, metavar="N", help="(default: 300)")
    soak.add_argument(
        "--minutes", type=_minutes, default=10.0, metavar="M", help="(default: %(default)g)"
    )
    soak.add_argument(
        "--rate",
        type=_rate,
        default=0.5,
        metavar="HZ",
        help="calls per second of each client (default: %(default)g)",
    )
    soak.add_argument(
        "--timeout",
        type=_seconds,
        default=10.0,
        metavar="S",
        help="seconds that connecting, or a call, may take (default: %(default)g)",
    )
    soak.add_argument(
        "--picture", type=Path, metavar="FILE", help="write a PNG as well, by matplotlib"
    )
    soak.set_defaults(run=_soak)

    up = commands.add_parser(
        "up",
        help="start the servers that a file names, by Ray, or change what differs",
        description="Make it so that there is what FILE says: start servers, change how many there "
        "are, replace those of which the file says something else, without a lost call. On this "
        "machine, on a Ray cluster that runs, or on machines that Ray's launcher starts.",
    )
    up.add_argument("file", type=Path, metavar="FILE", help="YAML: which servers, how many, where")
    up.add_argument("--prune", action="store_true", help="delete what FILE doesn't name")
    up.add_argument(
        "--timeout",
        type=_seconds,
        default=600.0,
        metavar="S",
        help="seconds that each may take until it is ready (default: %(default)g)",
    )
    up.set_defaults(run=_up)

    status = commands.add_parser(
        "status",
        help="list the servers that Ray keeps, and how they are",
        description="List the servers that Ray keeps, or those that FILE names. Exits with 1 if "
        "one of them isn't ready.",
    )
    status.set_defaults(run=_status)

    down = commands.add_parser(
        "down",
        help="end the servers that a file names, or all",
        description="End the servers that FILE names, or all: each answers what it has. With the "
        "last of them ends the Ray that `edgeml up` started on this machine, and with a FILE that "
        "names a cluster its machines are given back.",
    )
    down.set_defaults(run=_down)
    for command in (status, down):
        command.add_argument("file", type=Path, nargs="?", metavar="FILE", help="as for up")
    for command in (up, status, down):
        command.add_argument(
            "--address",
            metavar="HOST:PORT",
            help="the Ray cluster, whatever FILE says of it (default: that, $RAY_ADDRESS, or this "
            "machine's own)",
        )
    return parser


def _add_transports(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--transport", nargs="+", metavar="NAME", help="only these (default: all installed)"
    )


def _add_credentials(
    parser: argparse.ArgumentParser, what: str, default: str | None = None
) -> None:
    parser.add_argument(
        "--credentials",
        metavar="DIR",
        default=default,
        help=f"{what} (default: $EDGEML_CREDENTIALS, or none)",
    )


# Each command is imported when it is run, so that none waits for what only another needs.


def _plugins(options: argparse.Namespace) -> int:
    from edgeml.cli import plugins

    return plugins.run()


def _doctor(options: argparse.Namespace) -> int:
    from edgeml.cli import doctor

    return doctor.run(options.transport, options.url, options.timeout, options.credentials)


def _keygen(options: argparse.Namespace) -> int:
    from edgeml.cli import keygen

    return keygen.run(options.directory, options.client, options.role, options.days, options.revoke)


def _bench(options: argparse.Namespace) -> int:
    from edgeml.cli import bench

    if options.credentials and options.url is None:
        raise ValueError("--credentials is for --url: what is measured here alone has no keys")
    return bench.run(
        options.transport,
        options.url,
        options.size,
        options.seconds,
        options.timeout,
        options.credentials,
    )


def _serve(options: argparse.Namespace) -> int:
    from edgeml.cli import bench

    return bench.serve(options.transport, options.host, options.port, options.credentials)


def _soak(options: argparse.Namespace) -> int:
    from edgeml.cli import soak

    return soak.run(
        options.transport,
        options.clients,
        options.minutes * 60,
        options.rate,
        options.timeout,
        options.picture,
    )


def _up(options: argparse.Namespace) -> int:
    from edgeml.cli import up

    return up.up(options.file, options.address, options.prune, options.timeout)


def _status(options: argparse.Namespace) -> int:
    from edgeml.cli import up

    return up.status(options.file, options.address)


def _down(options: argparse.Namespace) -> int:
    from edgeml.cli import up

    return up.down(options.file, options.address)


# What arguments mean ----------------------------------------------------------------------


def _url(text: str) -> Url:
    try:
        url = Url.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not url.port and not url.path:
        raise argparse.ArgumentTypeError(f"{text!r} names no port; write it as 'zmq://host:port'")
    return url


def _seconds(text: str) -> float:
    return _amount(text, 1e6, "time in seconds")


def _minutes(text: str) -> float:
    return _amount(text, 1e5, "time in minutes")


def _rate(text: str) -> float:
    return _amount(text, 1e4, "number of calls per second, up to 10000")


def _count(text: str) -> int:
    count = int(text) if text.isdecimal() else 0
    if not 1 <= count <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of clients, from 1 to 100000")
    return count


def _days(text: str) -> float:
    return _amount(text, 36500, "number of days, up to 36500")


def _amount(text: str, most: float, what: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = 0.0
    if not 0 < amount <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is no {what}")
    return amount


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?((?:[KMG]I?)?)B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 56, 300KB or 4MB")
    return size
