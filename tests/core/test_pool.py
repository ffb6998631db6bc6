"""Several servers behind one client of the core: which of them calls go to, and what is told."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest

from edgeml import Closed, ConfigMismatch, NotReady, Overloaded, RemoteError, Unreachable
from edgeml.core.client import Client
from edgeml.core.errors import Interrupted
from edgeml.core.resolver import Asker, Place, listed
from edgeml.core.server import Server
from edgeml.core.session import SessionKeeper
from edgeml.core.state import ServerState
from edgeml.core.url import Url
from pairs import free_port, took, wait_until

PATIENCE = 20.0


class Numbered:
    """A server that tells its number, counts each client's calls, and holds calls on demand."""

    def __init__(self, number: int, port: int = 0) -> None:
        self.number = number
        self.go_on = threading.Event()
        self.episodes: list[str] = []
        self.server = server = Server("inference", [Url("inproc", "", port)])
        server.register("who", lambda call: call.answer(number))
        server.register("count", self._count)
        server.register("hold", self._hold)
        server.register("reset", self._reset)
        server.register("refuse", self._refuse)
        server.register("fail", self._fail)
        self.topic = server.topic("news")
        self.refused = 0

    def open(self) -> Numbered:
        self.server.open()
        self.server.dispatcher.start()
        return self

    def close(self) -> None:
        self.go_on.set()
        self.server.close()

    @property
    def url(self) -> str:
        return str(self.server.urls[0])

    @property
    def place(self) -> Place:
        return Place(self.url)

    def _count(self, call) -> None:
        session = call.episode.session
        session["calls"] = session.get("calls", 0) + 1
        call.answer([self.number, session["calls"]])

    def _hold(self, call) -> None:
        assert self.go_on.wait(PATIENCE)
        call.answer(self.number)

    def _reset(self, call) -> None:
        name = call.payload()
        self.episodes.append(name)
        self.server.begin_episode(call.caller, name)
        call.answer(self.number)

    def _refuse(self, call) -> None:
        self.refused += 1
        call.fail(Overloaded(f"{self.number} has too much to do"))

    def _fail(self, call) -> None:
        raise ZeroDivisionError


@contextmanager
def servers(n: int) -> Iterator[list[Numbered]]:
    with ExitStack() as stack:
        yield [stack.enter_context(closing(Numbered(number).open())) for number in range(n)]


def client_of(*servers: Numbered, **settings) -> Client:
    return Client("inference", listed([each.place for each in servers]), **settings)


def states(client: Client) -> list[str]:
    return sorted(each["state"] for each in client.stats()["servers"].values())


class Listing:
    """A list of servers that a test changes."""

    def __init__(self, *servers: Numbered) -> None:
        self.places = [each.place for each in servers]
        self.tells: list[Callable[[Sequence[Place]], None]] = []

    def watch(self, tell, asker) -> Callable[[], None]:
        self.tells.append(tell)
        tell(self.places)
        return lambda: self.tells.remove(tell) if tell in self.tells else None

    def change(self, *servers: Numbered) -> None:
        self.places = [each.place for each in servers]
        for tell in list(self.tells):
            tell(self.places)


# Where calls go ---------------------------------------------------------------------------


def test_calls_of_one_thread_go_to_all_servers_alike():
    with servers(3) as made, closing(client_of(*made)) as client:
        asked = Counter(client.call("who", None) for _ in range(300))
        assert sorted(asked) == [0, 1, 2]
        assert min(asked.values()) > 50
        counts = client.stats()["servers"]
        assert sum(each["calls"] for each in counts.values()) == 300
        assert states(client) == ["ready"] * 3
        assert {each["under_way"] for each in counts.values()} == {0}


def test_a_call_goes_to_whom_less_is_under_way_with():
    with servers(2) as made, closing(client_of(*made)) as client:
        for each in made:
            each.go_on.set()
        for name in ("who", "hold"):  # so that they are known to keep nothing
            client.call(name, None)
        for each in made:
            each.go_on.clear()
        held = [client.call_async("hold", None) for _ in range(6)]
        counts = client.stats()["servers"]
        assert [counts[each.url]["under_way"] for each in made] == [3, 3]
        made[0].go_on.set()
        wait_until(lambda: sum(future.done() for future in held) == 3)
        asked = Counter(client.call("who", None) for _ in range(10))
        assert asked == {0: 10}
        made[1].go_on.set()
        assert Counter(future.result(PATIENCE) for future in held) == {0: 3, 1: 3}


def test_where_as_much_is_under_way_the_shorter_queue_counts(monkeypatch):
    with servers(2) as made, closing(client_of(*made)) as client:
        client.call("who", None)
        sessions = {
            each.url: next(
                m.keeper.current
                for m in client.sessions._members.values()
                if m.place.url == each.url
            )
            for each in made
        }

        def told(server: Numbered, queue: float, ago: float) -> None:
            sessions[server.url].free_at = time.monotonic() + queue - ago

        monkeypatch.setattr(type(client.sessions), "note_answer", lambda *_: None)
        told(made[0], 5.0, 1.0)
        told(made[1], 2.0, 0.0)
        assert {client.call("who", None) for _ in range(20)} == {1}
        told(made[0], 5.0, 6.0)  # which is over
        assert {client.call("who", None) for _ in range(20)} == {0}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_list_that_changes_is_followed_at_once(asynchronous):
    with servers(3) as made:
        one, two, three = made
        known = Listing(one)
        with closing(Client("inference", known.watch)) as client:

            def asked() -> set[int]:
                if not asynchronous:
                    return {client.call("who", None) for _ in range(40)}
                return {each.result(5) for each in [client.call_async("who", 0) for _ in range(40)]}

            assert asked() == {0}
            known.change(two)
            assert asked() == {1}
            known.change(two, three)
            wait_until(lambda: states(client) == ["ready"] * 2)
            assert asked() == {1, 2}
            known.change(three)
            assert asked() == {2}
            known.change()
            with pytest.raises(Unreachable, match="none is listed"):
                client.call("who", None, timeout=0.2)
            known.change(one)
            assert asked() == {0}
            wait_until(lambda: not two.server.callers and not three.server.callers)
        assert known.tells == []


def test_what_is_under_way_in_a_server_that_is_listed_no_more_ends_there():
    with servers(2) as made:
        known = Listing(made[0])
        with closing(Client("inference", known.watch)) as client:
            future = client.call_async("hold", None)
            thread = threading.Thread(target=client.call, args=("hold", None))
            thread.start()
            wait_until(lambda: client.sessions.current.asking)
            known.change(made[1])
            assert client.call("who", None) == 1
            assert made[0].server.callers
            made[0].go_on.set()
            assert future.result(PATIENCE) == 0
            thread.join(PATIENCE)
            wait_until(lambda: not made[0].server.callers)


def test_what_takes_too_long_there_is_told_that_it_may_have_been_carried_out(monkeypatch):
    monkeypatch.setattr("edgeml.core.pool._LONGEST_LEAVE", 0.2)
    with servers(2) as made:
        known = Listing(made[0])
        with closing(Client("inference", known.watch)) as client:
            future = client.call_async("hold", None)
            known.change(made[1])
            with pytest.raises(Unreachable, match="may have been carried out"):
                future.result(PATIENCE)


def test_of_too_many_servers_some_are_used(monkeypatch, caplog):
    monkeypatch.setattr("edgeml.core.pool._MOST_SERVERS", 2)
    with servers(3) as made:
        known = Listing(*made)
        with closing(Client("inference", known.watch)) as client:
            used = set(client.stats()["servers"])
            assert len(used) == 2
            known.change(*reversed(made))
            assert set(client.stats()["servers"]) == used
    assert "of 3 servers this client uses 2" in caplog.text


def test_an_address_that_is_none_is_left_out_and_told(caplog):
    with servers(1) as made:
        wrong = [Place("nonsense"), Place("zmq://without-port"), Place("unknown://host:1")]
        with closing(Client("inference", listed([*wrong, made[0].place]))) as client:
            assert client.call("who", None) == 0
            assert states(client) == ["lost", "ready"]
    assert "'nonsense' is left out" in caplog.text
    assert "no port" in caplog.text


def test_an_address_that_a_transport_cannot_use_says_why_at_once_and_once(caplog):
    wrong = Place(f"zmq://127.0.0.1:{free_port()}/path")
    with took(at_most=5.0), pytest.raises(Unreachable, match="has the path '/path', and zmq is"):
        Client("inference", listed([wrong]), timeout=PATIENCE)
    caplog.clear()
    with servers(1) as made:
        with closing(Client("inference", listed([wrong, made[0].place]))) as client:
            assert client.call("who", None) == 0
            (keeper,) = [m.keeper for m in client.sessions._members.values() if m.place == wrong]
            wait_until(lambda: keeper.failure is not None)
            for _ in range(3):
                keeper.failure = None
                keeper.hurry()
                wait_until(lambda: keeper.failure is not None)
        assert caplog.text.count("the connection to the server failed") == 1


def test_calls_and_subscriptions_may_have_servers_of_their_own():
    with servers(2) as made:
        places = [Place(made[0].url, topics=False), Place(made[1].url, calls=False)]
        with closing(Client("inference", listed(places))) as client:
            assert {client.call("who", None) for _ in range(20)} == {0}
            got: list[int] = []
            client.subscribe("news", got.append)
            made[0].topic.publish(10)
            made[1].topic.publish(11)
            wait_until(lambda: got)
            assert got == [11]


def test_a_subscription_waits_for_a_server_that_has_it():
    with servers(2) as made:
        calls, topics = Place(made[0].url, topics=False), Place(made[1].url, calls=False)
        known = Listing()
        known.places = [calls]
        with closing(Client("inference", known.watch, timeout=PATIENCE)) as client:
            got: list[int] = []
            asking = threading.Thread(target=client.subscribe, args=("news", got.append))
            asking.start()
            known.tells[0]([calls, topics])
            asking.join(PATIENCE)
            made[1].topic.publish(1)
            wait_until(lambda: got == [1])


def test_where_no_server_is_for_what_is_wanted_that_is_told():
    with servers(1) as made:
        known = Listing()
        known.places = [Place(made[0].url, topics=False)]
        with closing(Client("inference", known.watch, timeout=0.5)) as client:
            with pytest.raises(Unreachable, match=f"no server .* publishes: {made[0].url}"):
                client.subscribe("news", print)
            known.tells[0]([Place(made[0].url, calls=False)])
            with pytest.raises(Unreachable, match=f"no server .* takes calls: {made[0].url}"):
                client.call("who", None)


# Sessions ---------------------------------------------------------------------------------


def test_a_session_stays_where_it_began_until_it_begins_anew():
    with servers(3) as made, closing(client_of(*made, begins="reset")) as client:
        at = [client.call("count", None) for _ in range(10)]
        assert len({number for number, _ in at}) == 1
        assert [calls for _, calls in at] == list(range(1, 11))
        assert {client.call("who", None) for _ in range(20)} == {at[0][0]}
        seen = set()
        for episode in range(20):
            home = client.call("reset", f"e{episode}")
            assert [client.call("count", None) for _ in range(2)] == [[home, 1], [home, 2]]
            seen.add(home)
        assert seen == {0, 1, 2}
        # Where it was, it is told to be over.
        wait_until(lambda: sum(each.episodes[-1:] == [""] for each in made) == 2)
        assert not any(each["moved"] for each in client.stats()["servers"].values())


def test_the_calls_before_the_first_answer_go_to_one_server():
    with servers(3) as made, closing(client_of(*made)) as client:
        held = [client.call_async("hold", None) for _ in range(9)]
        for each in made:
            each.go_on.set()
        assert len({future.result(PATIENCE) for future in held}) == 1
        assert len({client.call("hold", None) for _ in range(40)}) == 3


def test_an_older_server_that_does_not_tell_what_it_keeps_is_stayed_with(monkeypatch):
    monkeypatch.setattr("edgeml.core.wire.Served", _tell_nothing_kept())
    with servers(3) as made, closing(client_of(*made)) as client:
        assert len({client.call("who", None) for _ in range(30)}) == 1


def _tell_nothing_kept():
    from edgeml.core.wire import Served

    return lambda version, size, queue, compute, kept: Served(version, size, queue, compute)


def test_a_session_moves_when_its_server_goes_and_that_is_told(caplog):
    moves: list[tuple[str, str]] = []
    with servers(2) as made:
        told = lambda old, new: moves.append((old, new))  # noqa: E731
        with closing(client_of(*made, on_move=told)) as client:
            home, _ = client.call("count", None)
            made[home].close()
            wait_until(lambda: states(client) == ["lost", "ready"])
            assert client.call("count", None) == [1 - home, 1]
            assert client.call_async("count", None).result(PATIENCE) == [1 - home, 2]
            wait_until(lambda: moves == [(made[home].url, made[1 - home].url)])
            assert client.stats()["servers"][made[home].url]["moved"] == 1
    assert f"the session with {made[home].url} is lost" in caplog.text


def test_a_session_that_a_server_lost_as_it_restarted_is_told_as_well():
    moves: list[tuple[str, str]] = []
    port = free_port()
    told = lambda old, new: moves.append((old, new))  # noqa: E731
    first = Numbered(0, port).open()
    with closing(first), closing(client_of(first, on_move=told)) as client:
        assert client.call("count", None) == [0, 1]
        client.sessions.current.requester.close()  # the connection alone
        assert client.call("count", None) == [0, 2]
        assert not moves
        first.close()
        with closing(Numbered(1, port).open()) as second:
            wait_until(lambda: states(client) == ["ready"])
            assert client.call("count", None) == [1, 1]
            wait_until(lambda: moves == [(second.url, second.url)])


def test_who_stays_is_not_spread_and_moves_when_the_server_goes():
    with servers(2) as made, closing(client_of(*made, stays=True)) as client:
        first = client.epoch  # before anything is asked
        (home,) = {client.call("who", None) for _ in range(20)}
        assert first == client.epoch == made[home].server.epoch
        made[home].close()
        wait_until(lambda: states(client) == ["lost", "ready"])
        assert {client.call("who", None) for _ in range(20)} == {1 - home}
        assert client.epoch == made[1 - home].server.epoch


# What goes elsewhere ----------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_overloaded_server_sends_a_call_to_one_other_once(asynchronous):
    def ask(client: Client) -> Any:
        if asynchronous:
            return client.call_async("refuse", None).result(PATIENCE)
        return client.call("refuse", None)

    with servers(3) as made, closing(client_of(*made)) as client:
        with pytest.raises(Overloaded, match="too much to do"):
            ask(client)
        assert sum(each.refused for each in made) == 2
        assert max(each.refused for each in made) == 1


def test_a_session_does_not_move_for_an_overloaded_server():
    with servers(3) as made, closing(client_of(*made)) as client:
        home, _ = client.call("count", None)
        with pytest.raises(Overloaded):
            client.call("refuse", None)
        assert sum(each.refused for each in made) == made[home].refused == 1


def test_what_a_handler_raises_is_the_answer():
    with servers(2) as made, closing(client_of(*made)) as client:
        with pytest.raises(RemoteError, match="ZeroDivisionError"):
            client.call("fail", None)
        assert sum(each["calls"] for each in client.stats()["servers"].values()) == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_server_that_is_not_ready_is_asked_no_more_until_it_is(asynchronous):
    def ask(client: Client) -> Any:
        if asynchronous:
            return client.call_async("who", None).result(PATIENCE)
        return client.call("who", None)

    with servers(2) as made, closing(client_of(*made)) as client:
        loading = made[0].server
        loading._open_to_calls, loading.state = False, ServerState("loading", 0.5)
        assert {ask(client) for _ in range(20)} == {1}
        wait_until(lambda: states(client) == ["loading", "ready"])
        assert client.stats()["servers"][made[0].url]["calls"] == 1
        assert client.state().state == "ready"
        loading._open_to_calls, loading.state = True, ServerState("ready")
        wait_until(lambda: states(client) == ["ready", "ready"])
        assert {ask(client) for _ in range(20)} == {0, 1}


def test_where_none_is_ready_a_call_waits_until_one_is_or_says_what_they_are_at():
    with servers(2) as made, closing(client_of(*made)) as client:
        for each in made:
            each.server._open_to_calls = False
            each.server.state = ServerState("loading", 0.5, "weights")
        with pytest.raises(NotReady, match=r"loading, 50% done: weights.*; .*loading"):
            client.call("who", None, timeout=0.5)
        future = client.call_async("who", None, timeout=PATIENCE)
        made[1].server._open_to_calls, made[1].server.state = True, ServerState("ready")
        assert future.result(PATIENCE) == 1


def test_what_was_refused_as_a_server_stopped_goes_elsewhere_and_what_was_interrupted_does_not():
    with servers(2) as made, closing(client_of(*made)) as client:
        for each in made:
            each.server.register("stopped", lambda call: call.fail(Closed("stopped")))
        for each in made:
            each.server.register("amid", lambda call: call.fail(Interrupted("stopped")))
        with pytest.raises(Closed):
            client.call("amid", None)
        assert len(client.sessions._ready) == 2
        with pytest.raises(Unreachable, match="no server could be asked"):
            client.call("stopped", None, timeout=0.3)


def test_a_server_that_stops_is_left_as_it_says_so_before_its_connections_end(monkeypatch):
    # Nobody asks for a sign of life, which would tell as well, but later.
    monkeypatch.setattr(SessionKeeper, "_watch", lambda _, session: session.over.wait(PATIENCE))
    with servers(2) as made, closing(client_of(*made)) as client:
        session = next(
            m.keeper.current
            for m in client.sessions._members.values()
            if m.place.url == made[0].url
        )
        wait_until(lambda: made[0].server._topics[""]._subscribers)  # it is listened to
        made[0].server._topics[""].close()  # as closing begins
        wait_until(lambda: session.lost)
        assert not session.requester.lost  # so that what is under way may be answered
        assert {client.call("who", None) for _ in range(20)} <= {0, 1}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_when_all_are_gone_a_call_waits_for_one_until_its_deadline(asynchronous):
    told: list[str] = []
    ports = [free_port(), free_port()]
    made = [Numbered(number, port).open() for number, port in enumerate(ports)]
    urls = [each.url for each in made]
    with closing(
        client_of(
            *made,
            on_disconnect=lambda: told.append("gone"),
            on_reconnect=lambda: told.append("back"),
        )
    ) as client:

        def ask(timeout: float) -> Any:
            if asynchronous:
                return client.call_async("who", None, timeout=timeout).result(PATIENCE)
            return client.call("who", None, timeout=timeout)

        made[0].close()
        assert ask(PATIENCE) == 1
        made[1].close()
        wait_until(lambda: told == ["gone"])
        with took(at_most=5.0, at_least=0.3), pytest.raises(Unreachable) as error:
            ask(0.3)
        assert all(url in str(error.value) for url in urls)
        again = threading.Timer(0.2, lambda: made.append(Numbered(2, ports[0]).open()))
        again.start()
        with took(at_most=5.0):
            assert ask(PATIENCE) == 2
        again.join()
        wait_until(lambda: told == ["gone", "back"])
    made[2].close()


def test_a_subscription_follows_to_another_server():
    with servers(2) as made, closing(client_of(*made)) as client:
        got: list[int] = []
        client.subscribe("news", got.append)
        for each in made:
            each.topic.publish(each.number)
        wait_until(lambda: got)
        (source,) = got
        made[source].close()
        wait_until(lambda: got == [source, 1 - source])
        made[1 - source].topic.publish(5)
        wait_until(lambda: got[2:] == [5])


# Who refuses this client ------------------------------------------------------------------


def test_one_that_refuses_this_client_is_left_out_and_told(caplog):
    with servers(2) as made:
        made[0].server._config["rate"] = 50
        with closing(client_of(*made)) as client:
            assert {client.call("who", None) for _ in range(20)} == {1}
            assert client.stats()["servers"][made[0].url]["state"] == "refused"
        assert "is left out: rate: the server has 50" in caplog.text
        made[1].server._config["rate"] = 60
        with pytest.raises(ConfigMismatch, match=r"50.*60|60.*50"):
            client_of(*made)


def test_once_all_refuse_it_a_call_raises_that():
    with servers(2) as made, closing(client_of(*made)) as client:
        assert client.call("who", None) in (0, 1)
        for each in made:
            each.server._config["rate"] = 50
            for session in list(each.server._sessions.values()):
                each.server.dismiss(session)
        with pytest.raises(ConfigMismatch, match="rate"):
            client.call("who", None)


# Beginning and ending ---------------------------------------------------------------------


def test_nobody_is_there():
    urls = [f"inproc://:{free_port()}" for _ in range(2)]
    with took(at_most=5.0), pytest.raises(Unreachable) as error:
        Client("inference", listed([Place(url) for url in urls]))
    assert all(url.partition("//:")[2] in str(error.value) for url in urls)
    with pytest.raises(Unreachable, match="none is listed"):
        Client("inference", listed([]))


def test_who_waits_for_a_server_waits_for_the_first_of_several():
    port = free_port()
    places = listed([Place(f"inproc://127.0.0.1:{each}") for each in (port, free_port())])
    made: list[Numbered] = []
    later = threading.Timer(0.2, lambda: made.append(Numbered(0, port).open()))
    later.start()
    with closing(Client("inference", places, wait=PATIENCE)) as client:
        assert client.call("who", None) == 0
    later.join()
    made[0].close()


def test_a_resolver_that_cannot_be_asked_is_asked_again_by_who_waits(caplog):
    with servers(1) as made:
        asked: list[Asker] = []

        def watch(tell, asker) -> Callable[[], None]:
            asked.append(asker)
            if len(asked) < 2:
                raise Unreachable("the name service is away")
            tell([made[0].place])
            return lambda: None

        with pytest.raises(Unreachable, match="name service"):
            Client("inference", watch)
        asked.clear()
        with closing(Client("inference", watch, client_id="me", wait=PATIENCE)) as client:
            assert client.call("who", None) == 0
        assert [each.client_id for each in asked] == ["me", "me"]
        assert "waiting for servers: the name service is away" in caplog.text
        assert asked[0].service == "inference"


def test_closing_wakes_all_who_wait():
    with servers(1) as made:
        known = Listing(made[0])
        client = Client("inference", known.watch)
        known.change()
        future = client.call_async("who", None, timeout=PATIENCE)
        errors: list[Exception] = []

        def call() -> None:
            try:
                client.call("who", None, timeout=PATIENCE)
            except Exception as error:
                errors.append(error)

        waiting = threading.Thread(target=call)
        waiting.start()
        client.close()
        waiting.join(PATIENCE)
        assert isinstance(errors[0], Closed)
        with pytest.raises(Closed):
            future.result(PATIENCE)
        with pytest.raises(Closed):
            client.call("who", None)


def test_a_forked_child_has_no_part_in_it():
    with servers(2) as made, closing(client_of(*made)) as client:
        client.call("who", None)
        child = os.fork()
        if not child:
            try:
                client.call("who", None, timeout=0.2)
            except Unreachable as error:
                os._exit(7 if "nobody serves" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert client.call("who", None) in (0, 1)
