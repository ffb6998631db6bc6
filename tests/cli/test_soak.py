"""``edgeml soak``: a short one, and what it says of longer ones."""

from collections import Counter

import pytest

from edgeml.cli import soak
from edgeml.cli.soak import Sample
from test_cli import edgeml


def samples(memory=(100e6, 50e6), descriptors=100, threads=20, errors=(), growth=0.0, more=0):
    """Ten minutes of samples, at whose end there is more memory, or more of all else."""
    return [
        Sample(
            seconds=20.0 * n,
            memory=tuple(int(size * (1 + growth * n / 30)) for size in memory),
            descriptors=descriptors + more * n // 30,
            threads=threads,
            errors=Counter(errors),
        )
        for n in range(31)
    ]


@pytest.mark.parametrize("transport", ["zmq", "shm"])
def test_holds_clients_of_all_kinds_and_prints_what_they_took(transport, tmp_path):
    picture = tmp_path / "soak.png"
    words = ["--transport", transport, "--clients", 7, "--minutes", 0.05, "--rate", 5]
    done = edgeml("soak", *words, "--picture", picture)
    assert "7 clients in 1 processes, 3 servers" in done.stdout
    (errors,) = (line.split()[1] for line in done.stdout.splitlines() if line.startswith("errors"))
    assert errors == "0", done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()][1:]
    assert len(rows) >= 3
    assert all(len(row) == 9 and float(row[1]) > 0 for row in rows), done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_is_content_where_nothing_fails_or_grows(capsys):
    assert soak._conclude(samples()) == 0
    assert "GROWS" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("told", "name"),
    [({"growth": 0.05}, "servers MB"), ({"more": 10}, "descriptors")],
)
def test_says_what_grows(told, name, capsys):
    assert soak._conclude(samples(**told)) == 1
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith(name) and "GROWS" in line]


def test_what_comes_in_the_first_minute_is_no_growth(capsys):
    warming = [Sample(n, memory=(10_000_000, 10_000_000), threads=5) for n in range(50)]
    assert soak._conclude([*warming, *samples()[3:]]) == 0


def test_says_which_errors_there_were_and_how_often(capsys):
    assert soak._conclude(samples(errors={"no answer in 10 s": 3})) == 1
    assert "3 x no answer in 10 s" in capsys.readouterr().out


def test_a_client_that_gets_a_wrong_answer_or_none_is_counted():
    class Client:
        def turn(self, number):
            if number == 1:
                raise ValueError("no")
            return number > 1

        def stop(self):
            pass

    crowd = soak._Crowd(1000.0)
    crowd.start([Client()])
    total, errors = 0, Counter()
    while total < 3:
        calls, _, errors = crowd.counted()
        total += calls
    crowd.stop()
    assert errors == {"an answer isn't what was asked for": 1, "ValueError: no": 1}


def test_a_server_that_cannot_be_started_is_named():
    done = edgeml("soak", "--transport", "carrier-pigeon", "--clients", 3, "--minutes", 0.05)
    assert done.returncode == 1
    assert "carrier-pigeon" in done.stderr
