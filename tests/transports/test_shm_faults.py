"""What shared memory must survive: kills, forks, readers that stop, hoarders, and long lives.

Each test comes quick, in seconds, and slow, in minutes. The processes are those of shm_faults.py,
which check every byte that they receive, and end at once where one is wrong.
"""

import itertools
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shm_faults import KB, MB, Child, Held, Zygote, is_alive, names_left, until

SCHEME = "shm"
ANYWHERE = f"{SCHEME}://127.0.0.1:0"
STALL = 1.0  # seconds that nothing may take, but for what other programs have the machine do

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

Spawn = Callable[[str], Child]


def how_many(quick: int, slow: int, minutes: int) -> pytest.MarkDecorator:
    """Run a test with few repetitions, and with as many as take up to some minutes."""
    marks = [pytest.mark.slow, pytest.mark.timeout(60 * minutes)]
    values = [pytest.param(quick, id="quick"), pytest.param(slow, id="slow", marks=marks)]
    return pytest.mark.parametrize("count", values)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """What all processes are forked from, so that they start in milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEML_SHM_LIMIT_MB", "512")
        zygote = Zygote()
    with zygote:
        yield zygote


@pytest.fixture
def spawn(zygote: Zygote) -> Iterator[Spawn]:
    """Starts processes, and finds no file that they leave behind."""
    before = names_left()
    yield zygote.spawn
    zygote.kill_all()
    assert until(lambda: names_left() <= before, 20.0), names_left() - before


def blocks(count: int) -> Iterator[range]:
    """Numbers in some blocks: five to warm up, then a hundred at a time."""
    starts = [0, *range(5, count + 5, 100), count + 5]
    return (range(start, end) for start, end in itertools.pairwise(starts))


def at_rest(child: Child) -> Held:
    """What a process holds when that has not changed for more than a second."""
    looks = [Held.by(child)]

    def unchanged() -> bool:
        looks.append(Held.by(child))
        return len(looks) > 200 and len({look.counts for look in looks[-200:]}) == 1

    assert until(unchanged, 20.0), looks[-1]
    return looks[-1]


def assert_no_more_is_held(child: Child, *before: Any) -> None:
    """Like `Held.beyond`; what a process releases may take it a moment."""
    until(lambda: not Held.by(child).beyond(*before), 20.0)
    beyond = Held.by(child).beyond(*before)
    assert not beyond, beyond


def kill(child: Child) -> float:
    """As ``kill -9`` does, some time in the next 20 ms, which is what is tested."""
    time.sleep(random.uniform(0, 0.02))
    return child.signal(signal.SIGKILL)


# Kills ------------------------------------------------------------------------------------


@how_many(quick=10, slow=1000, minutes=30)
def test_clients_may_be_killed_at_any_moment(spawn: Spawn, count: int) -> None:
    server = spawn("Server")
    url = server.ask("serve", ANYWHERE)
    server.ask("give_up_idle_memory_soon")
    before = None
    for block in blocks(count):
        other = spawn("Client")
        other.ask("start", url, count + 5, 0.005)
        for number in block:
            client = spawn("Client")
            client.ask("start", url, number)
            killed = kill(client)
            assert server.ask("gone", number) - killed < STALL
            assert client.status() == -signal.SIGKILL
        assert other.ask("stop") < STALL
        other.end()
        server.ask("let_go")
        before = before or at_rest(server)
        assert_no_more_is_held(server, before)
    server.end()


@how_many(quick=10, slow=1000, minutes=30)
def test_servers_may_be_killed_at_any_moment(spawn: Spawn, count: int) -> None:
    client = spawn("Client")
    client.ask("give_up_idle_memory_soon")
    before = None
    for block in blocks(count):
        for number in block:
            server = spawn("Server")
            client.ask("start", server.ask("serve", ANYWHERE), number)
            killed = kill(server)
            assert client.ask("lost") - killed < STALL
            assert server.status() == -signal.SIGKILL
        client.ask("let_go")
        before = before or at_rest(client)
        assert_no_more_is_held(client, before)
    client.end()


# A long life ------------------------------------------------------------------------------


@how_many(quick=1_500, slow=1_000_000, minutes=40)
def test_a_long_life_changes_no_byte_and_takes_no_more_memory(spawn: Spawn, count: int) -> None:
    server, client = both = spawn("Server"), spawn("Client")
    client.ask("connect", server.ask("serve", ANYWHERE), 3)
    client.ask("exchange", 2_000, 6, "wide")  # so that pools of memory fill
    before: list[Held] = []
    for _ in range(10):
        left = count // 10 // 2  # a request and a reply each
        while left > 0:
            client.ask("exchange", min(left, 5_000), 6)
            left -= 5_000
        for child in both:
            child.ask("let_go")
        before = before or [Held.by(child) for child in both]
        for child, then in zip(both, before, strict=True):
            # Blocks of rare sizes come and go with chance: a few dozen of hundreds.
            assert_no_more_is_held(child, then, 64, 64 * MB)
    client.end()
    server.end()


# Hoarders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("hoarder", ["client", "server"])
@how_many(quick=600, slow=5_000, minutes=10)
def test_who_keeps_all_that_it_receives_stalls_nobody(
    spawn: Spawn, count: int, hoarder: str
) -> None:
    server, client = both = spawn("Server"), spawn("Client")
    url = server.ask("serve", ANYWHERE, hoarder == "server")
    client.ask("connect", url)
    sizes = (0, 300_000) if hoarder == "client" else (300_000, 0)
    for done in range(0, count, 100):
        if done == count // 2:  # what was kept outlives its connection
            client.ask("disconnect")
            client.ask("connect", url)
        assert client.ask("call", 100, *sizes) < STALL
        for child in both:
            assert len(Held.by(child).descriptors) < 400
    assert (client if hoarder == "client" else server).ask("recheck_hoard") == count
    client.end()
    server.end()


# Readers that stop ------------------------------------------------------------------------

MOST = 1536 * MB  # bytes of memory that a peer which has stopped may cost


@how_many(quick=1_800, slow=5_000, minutes=10)
def test_a_client_that_stops_reading_costs_little_and_delays_nobody(
    spawn: Spawn, count: int
) -> None:
    server, client, other = spawn("Server"), spawn("Client"), spawn("Client")
    url = server.ask("serve", ANYWHERE)
    client.ask("park", url, 1, count)
    other.ask("start", url, 2, 0.001)
    client.signal(signal.SIGSTOP)
    for together, _ in zip(itertools.cycle((True, False)), range(0, count, 50), strict=False):
        assert server.ask("answer_parked", 1, 50, MB, together) < STALL / 2
        assert Held.by(server).memory < MOST
    assert other.ask("stop") < STALL
    dropped = server.ask("dropped")
    client.signal(signal.SIGCONT)

    def accounted_for() -> bool:
        tally = client.ask("tally")
        assert tally["answered"] + tally["failed"] + tally["waiting"] == count
        return tally["answered"] + max(tally["failed"], server.ask("dropped")) >= count

    assert until(accounted_for, 10.0), (client.ask("tally"), server.ask("dropped"))
    assert dropped > 0
    client.ask("works")  # or says that it is lost
    client.ask("connect", url)
    assert client.ask("works")[-1]
    for child in (client, other, server):
        child.end()


@how_many(quick=1_800, slow=5_000, minutes=10)
def test_a_server_that_stops_reading_costs_little_and_delays_no_request(
    spawn: Spawn, count: int
) -> None:
    server, client = spawn("Server"), spawn("Client")
    client.ask("connect", server.ask("serve", ANYWHERE))
    assert client.ask("works") == [True]
    server.signal(signal.SIGSTOP)
    refused = 0
    for _ in range(0, count, 50):
        more, slowest = client.ask("flood", 50, MB)
        refused += more
        assert slowest < STALL / 2
        assert Held.by(client).memory < MOST
    assert client.ask("tally") == {"answered": 0, "failed": 0, "waiting": count - refused}
    server.signal(signal.SIGCONT)
    assert until(lambda: client.ask("tally")["waiting"] == 0, 30.0), client.ask("tally")
    assert client.ask("works") == [client.ask("tally")["failed"] == 0]
    client.end()
    server.end()


# Forks ------------------------------------------------------------------------------------


@how_many(quick=1, slow=50, minutes=20)
def test_a_forked_child_reads_what_was_kept_and_keeps_no_connection_alive(
    spawn: Spawn, count: int
) -> None:
    server = spawn("Server")
    url = server.ask("serve", ANYWHERE)
    for number in range(count):
        client = spawn("Client")
        client.ask("connect", url)
        sizes = (1_000, 300_000, 2 * MB)  # more than are lent at a time, so that some are copies
        for back in sizes:
            client.ask("call", 40, 64 * KB, back)
        kept = client.ask("recheck_hoard")
        client.ask("start", url, number)
        child = client.ask("fork")
        assert client.ask("in_fork", "recheck_hoard") == kept
        # Each lets go of what the other keeps, and goes on, so that memory is used again.
        client.ask("let_go_of_hoard", 0, 2)
        client.ask("in_fork", "let_go_of_hoard", 1, 2)
        client.ask("in_fork", "disconnect")
        client.ask("in_fork", "connect", url)
        for back in sizes:
            client.ask("call", 30, 64 * KB, back)
            client.ask("in_fork", "call", 30, 64 * KB, back)
        for order in (["recheck_hoard"], ["in_fork", "recheck_hoard"]):
            assert client.ask(*order) == kept // 2 + 90
        killed = kill(client)
        assert server.ask("gone", number) - killed < STALL
        assert is_alive(child)
        assert client.ask("recheck_hoard") == kept // 2 + 90  # answered by the forked child
        assert client.ask("works") == [True]
        assert client.status() == -signal.SIGKILL
        assert until(lambda: not is_alive(child), 20.0)  # noqa: B023 - called at once
    server.end()
