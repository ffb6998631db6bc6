"""A remote environment is the environment, as far as gymnasium can see."""

import functools
import signal
import threading
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence

import edgeml
from edgeml.gym import EnvServer, RemoteEnv
from pairs import process, run_fresh, started, took, wait_until
from served import Faulty, Room, remote, serving


@pytest.fixture
def room():
    """The name by which gymnasium makes a `Room`."""
    gymnasium.register("edgeml-tests/Room-v0", Room)
    yield "edgeml-tests/Room-v0"
    del gymnasium.registry["edgeml-tests/Room-v0"]


def same_episodes(ours, theirs, steps, seed):
    """Step both alike, and check that all that comes back is equal, and of the same types."""
    ours.action_space.seed(seed)
    results = ours.reset(seed=seed), theirs.reset(seed=seed)
    assert data_equivalence(*results, exact=True), results
    for _ in range(steps):
        action = ours.action_space.sample()
        results = ours.step(action), theirs.step(action)
        assert data_equivalence(*results, exact=True), results
        if results[0][2] or results[0][3]:
            results = ours.reset(), theirs.reset()
            assert data_equivalence(*results, exact=True), results


def complaints(env, **settings):
    """What gymnasium warns of; what it finds wrong it raises."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env, **settings)
    return {str(warning.message) for warning in caught}


@pytest.mark.parametrize("env", ["edgeml-tests/Room-v0", "CartPole-v1", "Pendulum-v1"])
def test_gymnasium_finds_no_fault_that_the_environment_hasnt_itself(transport, env, room):
    # Of gymnasium's own, a window and a picture need pygame.
    settings = {"skip_render_check": env != room}
    with serving(env, transport) as server, remote(server) as made:
        found = complaints(made.unwrapped, **settings)
    assert found == complaints(gymnasium.make(env).unwrapped, **settings)


@pytest.mark.parametrize(
    "env",
    [Room, "CartPole-v1", "Pendulum-v1", "InvertedPendulum-v5", "FrozenLake-v1", "Blackjack-v1"],
)
def test_whole_episodes_are_those_of_the_environment_here(env):
    local = env() if env is Room else gymnasium.make(env)
    with serving(env) as server, remote(server) as made:
        assert made.observation_space == local.observation_space
        assert made.action_space == local.action_space
        same_episodes(local, made, steps=300 if env is not Room else 30, seed=11)
    local.close()


def test_whole_episodes_are_equal_over_each_transport(transport):
    local = gymnasium.make("Pendulum-v1")
    with serving("Pendulum-v1", transport) as server, remote(server) as made:
        same_episodes(local, made, steps=250, seed=5)
    local.close()


def test_metadata_and_render_mode_are_the_environments(caplog):
    with serving(Room) as server:
        with remote(server, render_mode="ansi") as made:
            assert made.render_mode == "ansi"
            assert made.metadata == {"render_modes": ["rgb_array", "ansi"], "render_fps": 10}
            made.reset(options={"taken": 3})
            assert made.render() == "a room after 3 steps"
            made.reset()
            assert made.render() == "a room after 0 steps"
        with remote(server, render_mode="rgb_array") as made:
            made.reset(options={"taken": 7})
            frame = made.render()
            assert (frame == np.full((4, 6, 3), 7, np.uint8)).all()
            assert frame.flags.writeable
    assert "metadata 'autoreset' is not sent" in caplog.text


def test_a_mode_that_collects_frames_is_the_servers_business(room):
    with serving(room) as server, remote(server, render_mode="rgb_array_list") as made:
        made.reset()
        made.step(made.action_space.sample())
        assert [int(frame[0, 0, 0]) for frame in made.render()] == [0, 1]


def test_gymnasium_makes_it_without_importing_edgeml_first():
    with serving("CartPole-v1") as server:
        printed, _ = run_fresh(f"""
            import gymnasium
            env = gymnasium.make("edgeml.gym:edgeml/Remote-v0", url={server.url!r})
            print(env.reset(seed=1)[0].shape, env.spec.id)
            env.close()
        """)
    assert printed == "(4,) edgeml/Remote-v0\n"


def test_it_is_made_again_of_its_spec():
    with serving(Room) as server, remote(server) as made:
        again = made.spec.make(render_mode="ansi")
        assert again.unwrapped.render_mode == "ansi"
        assert again.unwrapped is not made.unwrapped
        again.close()


def test_observations_are_private_and_may_be_changed():
    with serving("CartPole-v1") as server, remote(server) as made:
        first, _ = made.reset(seed=1)
        kept = first.copy()
        first += 1
        second = made.step(1)[0]
        second += 1
        assert (made.reset(seed=1)[0] == kept).all()


def test_seeds_are_known_at_both_ends():
    with serving("CartPole-v1") as server, remote(server) as made:
        made.reset(seed=123)
        assert made.unwrapped.np_random_seed == 123
        with pytest.raises(edgeml.Malformed, match="a seed is a whole number"):
            made.unwrapped.client.call("/env/reset", ["x", None])
        with pytest.raises(edgeml.Malformed, match="options are a dict"):
            made.unwrapped.client.call("/env/reset", [None, 3])
        for garbage in (None, 3, [], [1, 2, 3], {"seed": 1}):
            with pytest.raises(edgeml.Malformed):
                made.unwrapped.client.call("/env/reset", garbage)
        made.reset()


# What goes wrong --------------------------------------------------------------------------


def test_an_error_of_the_environment_is_raised_here_and_it_lives_on():
    with serving(Faulty) as server, remote(server) as made:
        made.reset()
        assert made.step(np.zeros(2, np.float32))[0] == 1
        with pytest.raises(edgeml.RemoteError, match="ZeroDivisionError: too far") as raised:
            made.step(np.full(2, 2, np.float32))
        assert "served.py" in raised.value.traceback
        assert made.step(np.zeros(2, np.float32))[0] == 2
        with pytest.raises(edgeml.RemoteError, match="KeyError"):
            made.reset(options={"room": 7})
        with pytest.raises(ResetNeeded, match=r"its reset failed; call reset\(\)"):
            made.step(np.zeros(2, np.float32))
        made.reset()
        assert made.step(np.zeros(2, np.float32))[0] == 1


def test_an_info_that_cant_be_carried_is_told_by_its_place():
    with serving(Faulty) as server, remote(server) as made:
        made.reset()
        with pytest.raises(edgeml.RemoteError, match=r"NotEncodable.*\['unsendable'\]"):
            made.step(np.array([0, 2.5], np.float32))
        assert made.step(np.zeros(2, np.float32))[0] == 2


def test_garbage_for_an_action_is_refused_and_the_environment_doesnt_see_it(transport):
    with serving(Faulty, transport) as server, remote(server, disable_env_checker=True) as made:
        made.reset()
        for garbage in (None, "up", [1], [[1, 2]], {}, np.zeros(3), np.zeros((2, 2)), [1j, 0]):
            with pytest.raises(edgeml.Malformed, match="the action must be of Box"):
                made.step(garbage)
            with pytest.raises(ValueError, match="nothing was done"):
                made.step(garbage)
        with pytest.raises(edgeml.NotEncodable):
            made.step(object())
        assert made.step(np.zeros(2, np.float32))[0] == 1
        assert made.step([0.5, 0.5])[0] == 2


def test_it_needs_a_reset_first():
    with serving("CartPole-v1") as server, remote(server) as made:
        for env in (made, made.unwrapped):
            with pytest.raises(ResetNeeded, match=r"reset"):
                env.step(1)
        # And whoever doesn't ask its own end learns it from the server.
        assert made.unwrapped.client.call("/env/step", 1) is None


def test_what_runs_there_must_be_an_environment():
    with serving(lambda: 7) as server, pytest.raises(edgeml.RemoteError, match="no environment"):
        RemoteEnv(server.url)
    other = edgeml.InferenceServer(0)
    with started(other), pytest.raises(edgeml.ConfigMismatch, match="no environment"):
        RemoteEnv(other.url)


class OwnSpace(spaces.Discrete):
    pass


class Unsendable(Faulty):
    def __init__(self, closed=int):
        super().__init__(closed=closed)
        self.action_space = OwnSpace(3)


def test_a_space_that_cant_be_sent_is_refused_at_once():
    told = "of the action space: the space is a test_env.OwnSpace, which can't be sent"
    with pytest.raises(TypeError, match=told):
        EnvServer(Unsendable(), 0)
    closed = []
    other = serving(lambda: Unsendable(lambda: closed.append(1)))
    with other as server, pytest.raises(edgeml.RemoteError, match=told):
        RemoteEnv(server.url)
    assert closed == [1]


@pytest.mark.parametrize("env", [7, "CartPole-v1", None])
def test_what_is_served_must_be_an_environment_or_make_one(env):
    with pytest.raises(TypeError, match="an environment, or a function that makes one, not"):
        EnvServer(env, 0)


def test_environments_have_one_thread():
    with pytest.raises(ValueError, match="one thread"):
        EnvServer(Room, 0, workers=2)
    seen = set()

    class Watched(Faulty):
        def __init__(self):
            seen.add(threading.get_ident())
            super().__init__(closed=lambda: seen.add(threading.get_ident()))

        def step(self, action):
            seen.add(threading.get_ident())
            return super().step(action)

    with serving(Watched) as server, remote(server) as one, remote(server) as other:
        for made in (one, other):
            made.reset()
            made.step(np.zeros(2, np.float32))
    assert len(seen) == 1
    assert threading.get_ident() not in seen


def test_a_render_mode_that_the_function_doesnt_take_is_told():
    with serving(lambda: Room()) as server, pytest.raises(edgeml.RemoteError, match="render_mode"):
        RemoteEnv(server.url, render_mode="ansi")


def test_a_closed_one_says_so():
    with serving("CartPole-v1") as server:
        made = RemoteEnv(server.url)
        made.reset()
        made.close()
        made.close()
        for use in (made.reset, made.render, lambda: made.step(1)):
            with pytest.raises(edgeml.Closed):
                use()


# Several clients --------------------------------------------------------------------------


def test_each_client_has_an_environment_of_its_own(transport):
    closed = []
    with serving(lambda: Faulty(closed=lambda: closed.append(1)), transport) as server:
        with remote(server) as one, remote(server) as other:
            one.reset()
            other.reset()
            for number in range(1, 4):
                assert one.step(np.zeros(2, np.float32))[0] == number
            assert other.step(np.zeros(2, np.float32))[0] == 1
            one.close()
            assert closed == [1]
            assert other.step(np.zeros(2, np.float32))[0] == 2
        assert closed == [1, 1]


def test_one_that_is_shared_is_had_by_one_client_at_a_time(transport):
    closed = []
    env = Faulty(closed=lambda: closed.append(1))
    with serving(env, transport) as server:
        one = RemoteEnv(server.url, client_id="the first")
        one.reset()
        with pytest.raises(edgeml.Overloaded, match=r"in use by the first.*wait until"):
            RemoteEnv(server.url)
        assert one.step(np.zeros(2, np.float32))[0] == 1
        one.close()
        with remote(server) as other:
            with pytest.raises(ResetNeeded):
                other.unwrapped.step(np.zeros(2, np.float32))
            other.reset()
            assert other.step(np.zeros(2, np.float32))[0] == 1
    assert closed == []  # it is for whoever made it to close it


def test_one_that_is_shared_has_the_render_mode_it_was_made_with():
    with serving(Room(render_mode="ansi")) as server:
        with remote(server) as made:
            assert made.render_mode == "ansi"
        with remote(server, render_mode="ansi") as made:
            made.reset()
            assert made.render() == "a room after 0 steps"
        with pytest.raises(edgeml.Malformed, match="render_mode='ansi', so it can't have"):
            RemoteEnv(server.url, render_mode="rgb_array")


def test_a_client_that_comes_back_has_the_shared_one_at_once():
    env = Faulty()
    with serving(env) as server, remote(server, client_id="me") as one:
        one.reset()
        with remote(server, client_id="me") as again:
            again.reset()
            assert again.step(np.zeros(2, np.float32))[0] == 1
            with pytest.raises(ResetNeeded, match="ended this client's session"):
                one.step(np.zeros(2, np.float32))


CLIENT = """
import signal, sys, numpy
from edgeml.gym import RemoteEnv
env = RemoteEnv(sys.argv[1])
env.reset()
env.step(numpy.zeros(2, "float32"))
print("stepped", flush=True)
signal.pause()
"""


def test_a_client_that_is_killed_frees_its_environment(monkeypatch):
    monkeypatch.setattr("edgeml.core.server._FORGET", 4.0)
    closed = []
    made = serving(lambda: Faulty(closed=lambda: closed.append(threading.get_ident())))
    with made as server, remote(server) as one, process(CLIENT, server.url) as other:
        assert other.line() == "stepped"
        other.signal(signal.SIGKILL)
        wait_until(lambda: closed, timeout=20)
        one.reset()
        assert one.step(np.zeros(2, np.float32))[0] == 1
    assert len(closed) == 2
    assert len(set(closed)) == 1  # in the handlers' thread
    assert threading.get_ident() not in closed


def test_a_client_that_is_killed_frees_the_shared_one(monkeypatch):
    monkeypatch.setattr("edgeml.core.server._FORGET", 4.0)
    with serving(Faulty()) as server, process(CLIENT, server.url) as other:
        assert other.line() == "stepped"
        with pytest.raises(edgeml.Overloaded):
            RemoteEnv(server.url)
        other.signal(signal.SIGKILL)

        def free() -> bool:
            try:
                RemoteEnv(server.url).close()
            except edgeml.Overloaded:
                return False
            return True

        wait_until(free, timeout=20)


def test_environments_are_closed_when_the_server_stops():
    closed = []
    with serving(lambda: Faulty(closed=lambda: closed.append(1))) as server:
        made = RemoteEnv(server.url)
        made.reset()
    assert closed == [1]
    with took(3.0):
        made.close()


# A server that goes away ------------------------------------------------------------------

SERVER = """
import functools, signal, sys, gymnasium
from edgeml.gym import EnvServer
server = EnvServer(functools.partial(gymnasium.make, sys.argv[2]), url=sys.argv[1])
with server:
    server.start(threaded=True)
    print(server.url, flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("scheme", ["zmq", "shm", "grpc", "ws"])
def test_a_server_that_is_killed_and_started_again_needs_a_reset(scheme):
    with process(SERVER, f"{scheme}://127.0.0.1:0", "CartPole-v1") as first:
        url = first.line()
        made = gymnasium.make("edgeml/Remote-v0", url=url, timeout=10.0)
        made.reset(seed=3)
        made.step(1)
        first.signal(signal.SIGKILL)
        first.popen.wait()
        with pytest.raises((edgeml.EdgemlError, ResetNeeded)):
            made.step(1)
    with process(SERVER, url, "CartPole-v1") as second:
        assert second.line() == url
        # Never on in a new environment, as if nothing had happened.
        for _ in range(3):
            with pytest.raises(ResetNeeded, match=r"call reset\(\)"):
                made.step(1)
        local = gymnasium.make("CartPole-v1")
        same_episodes(local, made, steps=50, seed=3)
        local.close()
        made.close()


@pytest.mark.parametrize("transport", ["grpc", "shm", "ws", "zmq"])  # inproc has no ports
def test_a_server_that_is_started_again_between_two_steps_needs_a_reset(transport):
    with serving("CartPole-v1", transport) as server:
        url = server.url
        made = RemoteEnv(url)
        made.reset()
        made.step(1)
    make = functools.partial(gymnasium.make, "CartPole-v1")
    with started(EnvServer(make, url=url)):
        with pytest.raises((ResetNeeded, edgeml.EdgemlError)):
            made.step(1)
        with pytest.raises(ResetNeeded, match=r"call reset\(\)"):
            made.step(1)
        made.reset()
        made.step(1)
        made.close()


def test_another_environment_in_its_place_is_refused():
    with serving("CartPole-v1") as server:
        url = server.url
        made = RemoteEnv(url)
        made.reset()
    with started(EnvServer(functools.partial(gymnasium.make, "Pendulum-v1"), url=url)):
        with pytest.raises(edgeml.ConfigMismatch, match="another environment now: its observation"):
            made.reset()
        made.close()


def test_one_whose_session_is_ended_is_closed_and_needs_a_reset():
    closed = []
    with (
        serving(lambda: Faulty(closed=lambda: closed.append(1))) as server,
        remote(server) as made,
    ):
        made.reset()
        made.unwrapped.client.reset()
        with pytest.raises(ResetNeeded, match="ended this client's session"):
            made.step(np.zeros(2, np.float32))
        wait_until(lambda: closed)
        made.reset()
        assert made.step(np.zeros(2, np.float32))[0] == 1


def test_one_that_is_dropped_frees_its_environment():
    closed = []
    with serving(lambda: Faulty(closed=lambda: closed.append(1))) as server:
        held = [RemoteEnv(server.url)]
        held[0].reset()
        with pytest.warns(ResourceWarning):
            held.clear()
        wait_until(lambda: closed)


def test_it_goes_on_while_the_server_has_other_functions():
    with serving(Faulty) as server, remote(server) as made:
        server.register_interface("score", lambda payload: 2 * payload)
        made.reset()
        assert made.unwrapped.client.interfaces() == ["score"]
        assert made.unwrapped.client.call("score", 4) == 8
        assert made.step(np.zeros(2, np.float32))[0] == 1


def test_a_step_whose_answer_is_lost_needs_a_reset():
    going = threading.Event()

    class Slow(Faulty):
        def step(self, action):
            going.wait(10)
            return super().step(action)

    with serving(Slow) as server, remote(server, timeout=0.3) as made:
        made.reset()
        with pytest.raises(edgeml.DeadlineExceeded):
            made.step(np.zeros(2, np.float32))
        going.set()
        with pytest.raises(ResetNeeded, match=r"its last step was lost \(DeadlineExceeded\)"):
            made.step(np.zeros(2, np.float32))
        made.reset()
        assert made.step(np.zeros(2, np.float32))[0] == 1


def test_nothing_is_warned_of_in_everyday_use():
    with warnings.catch_warnings(), serving("CartPole-v1") as server, remote(server) as made:
        warnings.simplefilter("error")
        made.reset(seed=1)
        for _ in range(5):
            made.step(made.action_space.sample())
