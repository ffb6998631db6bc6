"""What asyncio users have: the same clients, awaited."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import threading
import time

import numpy as np
import pytest

import edgeml
from edgeml import (
    ActionConfig,
    ActionServer,
    Closed,
    DeadlineExceeded,
    InferenceServer,
    NotHolder,
    RemoteError,
    Stale,
    TrainerConfig,
    TrainerServer,
    UnknownInterface,
    Unreachable,
    aio,
)
from edgeml.data import QueuedDataStore
from pairs import free_port, no_thread_left, started, threads, took, wait_until

DEVICE = ActionConfig(0, ["move"], ["joints"])
LEARNER = TrainerConfig(0, None, ["echo"])


def url_of(transport) -> str:
    return f"{transport}://127.0.0.1:0"


@pytest.fixture
def policy(transport):
    """A server of functions, one of which waits until a test lets it go on."""
    server = InferenceServer(url=url_of(transport), workers=2)
    server.let_go = threading.Event()
    server.asked = []

    @server.register_interface("echo")
    def echo(payload):
        server.asked.append(payload)
        return payload

    @server.register_interface("slow")
    def slow(payload):
        server.asked.append(payload)
        server.let_go.wait(20)
        return payload

    @server.register_interface("fail")
    def fail(payload):
        raise KeyError("of the policy")

    with started(server):
        yield server
        server.let_go.set()


@pytest.fixture
def device(transport):
    def observe(keys):
        return {key: [1.0] for key in keys}

    with started(
        ActionServer(DEVICE, observe, lambda key, value: value, url=url_of(transport))
    ) as server:
        yield server


@contextlib.asynccontextmanager
async def eventually(seconds=10.0):
    """Fail if the block takes longer."""
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    alarm = loop.call_later(seconds, task.cancel)
    yield
    alarm.cancel()


async def until(predicate, timeout=30.0) -> None:
    deadline = time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


# The three clients ------------------------------------------------------------------------------


def test_an_inference_client_is_awaited(policy):
    async def main():
        async with aio.InferenceClient(url=policy.url, client_id="robot") as client:
            assert client.client_id == "robot"
            assert await client.call("echo", {"image": np.arange(3)}) is not None
            assert sorted(await client.interfaces()) == ["echo", "fail", "slow"]
            assert await asyncio.gather(*(client.call("echo", n) for n in range(50))) == [
                *range(50)
            ]
            result, timing = await client.call("echo", 1, timing=True)
            assert result == 1
            assert isinstance(timing, edgeml.Timing)
            assert timing.version == 1
            with pytest.raises(RemoteError, match="KeyError"):
                await client.call("fail", None)
            with pytest.raises(UnknownInterface, match="known: echo"):
                await client.call("nothing", None)
            assert await client.reset("first") == "first"
            assert (await client.state()).state == "ready"
            assert client.empty(3, np.uint8).shape == (3,)
            assert client.stats()["replies_copied"] == 0
        with pytest.raises(Closed):
            await client.call("echo", 1)

    with no_thread_left():
        asyncio.run(main())


def test_an_action_client_is_awaited(device):
    async def main():
        async with aio.ActionClient(config=DEVICE, url=device.url, task_id="viewer") as client:
            assert await client.obs() == {"joints": [1.0]}
            assert await client.obs(["joints"], timeout=20) == {"joints": [1.0]}
            assert await client.act("move", {"x": 1}) == {"x": 1}
            with pytest.raises(UnknownInterface):
                await client.act("jump")
            assert "viewer" in device.clients()[0].address

    with no_thread_left():
        asyncio.run(main())


def test_a_lease_is_awaited(device):
    async def main():
        clients = [
            aio.ActionClient(config=DEVICE, url=device.url, task_id=name)
            for name in ("policy", "human")
        ]
        policy, human = [await client.connect() for client in clients]
        async with policy.lease("move") as lease:
            assert (lease.held, lease.since) == (True, 1)
            with pytest.raises(NotHolder, match="policy"):
                async with human.lease("move", wait=0.1):
                    pass
            with pytest.raises(NotHolder):
                await human.act("move", 1)
            async with human.lease("move", priority=1):
                assert await human.act("move", 1) == 1
                wait_until(lambda: not lease.held)
            assert await lease.wait(30)
            assert lease.since == 2
            waiting = asyncio.ensure_future(human.lease("move").__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        async with human.lease("move", wait=0) as lease:
            assert await lease.wait(30)
        with pytest.raises(Closed):
            await human.lease("move").wait()
        for client in clients:
            await client.stop()

    with no_thread_left():
        asyncio.run(main())


def test_a_trainer_client_is_awaited(transport):
    there, here = QueuedDataStore(1000), QueuedDataStore(1000)
    server = TrainerServer(LEARNER, request_callback=lambda kind, x: x, url=url_of(transport))
    server.register_data_store("arm", there)

    async def main():
        async with aio.TrainerClient("arm", None, LEARNER, here, url=server.url) as client:
            assert await client.request("echo", 3) == 3
            here.batch_insert(list(range(5)))
            assert (await client.update()).applied == 5
            assert client.lost == 0
            assert client.stats()["items_refused"] == 0
            server.publish_network({"w": 1})
            async for network in client.networks():
                assert network == {"w": 1}
                break
            here.batch_insert(list(range(5, 9)))
            client.start_async_update(60)
        assert there.latest_data_id() == 9  # stop() has sent the rest

    with started(server), no_thread_left():
        asyncio.run(main())


def test_the_clients_take_what_the_others_do():
    for name in ("ActionClient", "InferenceClient", "TrainerClient"):
        mine, other = getattr(aio, name), getattr(edgeml, name)
        assert inspect.signature(mine) == inspect.signature(other)
        assert name in inspect.getdoc(mine)


# Connecting -------------------------------------------------------------------------------------


def test_the_loop_goes_on_while_a_client_connects_and_waits_for_its_server(transport):
    async def main():
        url = f"{transport}://127.0.0.1:{free_port()}"
        client = aio.InferenceClient(url=url, wait_for_server=20)
        connecting = asyncio.ensure_future(client.connect())
        for _ in range(20):  # none of which waits for the connection
            await asyncio.sleep(0.01)
        assert not connecting.done()
        again = InferenceServer(url=url)
        again.register_interface("echo", lambda payload: payload)
        with again.serving():
            assert await connecting is client
            assert await client.connect() is client
            assert await client.call("echo", 1) == 1
            await client.stop()
            await client.stop()
            with pytest.raises(Closed):
                await client.connect()

    asyncio.run(main())


def test_a_client_that_cannot_connect_says_so_and_can_try_again(policy):
    async def main():
        nobody = aio.InferenceClient(url="zmq://127.0.0.1:1", timeout=0.2)
        for _ in range(2):
            with pytest.raises(Unreachable):
                await nobody.connect()
        with pytest.raises(Closed, match="isn't connected; use `async with`"):
            await nobody.call("echo", 1)
        await nobody.stop()
        with pytest.raises(ValueError, match="was given as well"):
            await aio.InferenceClient("robot", url=policy.url).connect()
        with pytest.raises(TypeError, match="compress"):
            await aio.InferenceClient(url=policy.url, compress=True).connect()

    with no_thread_left():
        asyncio.run(main())


@pytest.mark.parametrize("how", ["cancel", "stop"])
def test_connecting_can_be_given_up(transport, how):
    server = InferenceServer(url=url_of(transport))
    with server.serving():
        url = server.url

    async def main():
        client = aio.InferenceClient(url=url, wait_for_server=True)
        connecting = asyncio.ensure_future(client.connect())
        await asyncio.sleep(0.1)
        with took(at_most=2.0):
            if how == "cancel":
                connecting.cancel()
            else:
                await client.stop()
            with pytest.raises((asyncio.CancelledError, Closed)):
                await connecting

    with no_thread_left():
        asyncio.run(main())


def test_a_client_that_is_made_as_it_is_given_up_is_stopped(policy):
    async def main():
        for _ in range(10):
            task = asyncio.ensure_future(aio.InferenceClient(url=policy.url).connect())
            await asyncio.sleep(0.002)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await (await task).stop()

    with no_thread_left():
        asyncio.run(main())


# Giving up --------------------------------------------------------------------------------------


def test_a_task_that_is_cancelled_gives_its_call_up(policy):
    async def main():
        async with aio.InferenceClient(url=policy.url) as client:
            tasks = [asyncio.ensure_future(client.call("slow", n)) for n in range(4)]
            await until(lambda: len(policy.asked) == 2)  # both workers are busy
            for task in tasks:
                task.cancel()
            for task in tasks:
                with pytest.raises(asyncio.CancelledError):
                    await task
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.call("slow", 9), 0.05)
            policy.let_go.set()
            assert await client.call("echo", 5) == 5

    asyncio.run(main())


def test_a_call_has_a_deadline(policy):
    async def main():
        async with aio.InferenceClient(url=policy.url, timeout=0.1) as client:
            with took(at_least=0.1, at_most=5.0), pytest.raises(DeadlineExceeded):
                await client.call("slow", 1)
            with took(at_least=0.2, at_most=5.0), pytest.raises(DeadlineExceeded):
                await client.call("slow", 1, timeout=0.2)

    asyncio.run(main())


def test_stopping_fails_what_is_under_way(policy):
    async def main():
        client = await aio.InferenceClient(url=policy.url).connect()
        call = asyncio.ensure_future(client.call("slow", 1))
        await until(lambda: policy.asked)
        await client.stop()
        with pytest.raises(Closed):
            await call

    with no_thread_left():
        asyncio.run(main())


def test_a_loop_that_is_closed_meanwhile_hurts_nobody(policy, caplog):
    loop = asyncio.new_event_loop()
    client = loop.run_until_complete(aio.InferenceClient(url=policy.url).connect())
    call = loop.create_task(client.call("slow", 1))
    loop.run_until_complete(until(lambda: policy.asked))
    call.cancel()
    call._log_destroy_pending = False
    loop.close()  # with the call under way, and nobody told
    policy.let_go.set()
    call.get_coro().close()

    async def go_on():
        assert await client.call("echo", 2) == 2
        await client.stop()

    asyncio.run(go_on())  # in another loop
    assert "Event loop is closed" not in caplog.text
    assert "exception calling callback" not in caplog.text


def test_several_loops_share_a_client(policy):
    client = asyncio.run(aio.InferenceClient(url=policy.url).connect())
    results = []

    async def call_often(first: int):
        return await asyncio.gather(*(client.call("echo", first + n) for n in range(20)))

    def run(first: int) -> None:
        results.append(asyncio.run(call_often(first)))

    running = [threading.Thread(target=run, args=(first,)) for first in (0, 100, 200)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(20)
    assert sorted(results) == [[*range(first, first + 20)] for first in (0, 100, 200)]
    asyncio.run(client.stop())


def test_a_client_that_is_dropped_is_closed(policy):
    async def main():
        await aio.InferenceClient(url=policy.url).connect()

    def drop() -> None:
        asyncio.run(main())
        wait_until(lambda: not any(thread.name == "edgeml aio" for thread in threads()))
        gc.collect()

    with no_thread_left(), pytest.warns(ResourceWarning, match="dropped without stop"):
        drop()


# Subscriptions ----------------------------------------------------------------------------------


def test_observations_are_an_async_iterator(device):
    async def main():
        async with aio.ActionClient(config=DEVICE, url=device.url) as client:
            device.publish_obs({"n": 0})
            seen = []
            async with client.observations() as observations:
                async for value in observations:
                    seen.append(value["n"])
                    if len(seen) == 50:
                        break
                    device.publish_obs({"n": len(seen)})
                assert observations.received == 50
                assert observations.missed == 0
                assert observations.version[1] == 50
            assert seen == list(range(50))
            with pytest.raises(StopAsyncIteration):
                await observations.__anext__()

    with no_thread_left():
        asyncio.run(main())


def test_actions_tell_what_they_rest_on_and_the_record_is_followed(device):
    async def main():
        async with (
            aio.ActionClient(config=DEVICE, url=device.url, client_id="robot") as client,
            client.executed() as executed,
        ):
            observation = await client.observe()
            assert observation.values == {"joints": [1.0]}
            said = {"observation": observation.id, "valid": 60.0, "policy": "v1"}
            assert await client.act("move", 1, **said) == 1
            with pytest.raises(Stale):
                await client.act("move", 2, age=3.0, valid=2.0)
            for n in range(3, 40):
                await client.act("move", n)
            first = await executed.__anext__()
            assert (first.client_id, first.policy, first.outcome) == ("robot", "v1", "done")
            assert first.observation == observation.id
            numbers = [first.number] + [(await executed.__anext__()).number for _ in range(37)]
            assert numbers == [1, *range(3, 40)]
            assert executed.missed == 0
            assert client.stats()["actions_stale"] == 1
            device.publish_obs({"n": 7}, taken=12345)
            async for stamped in client.stamped_observations():
                assert stamped == edgeml.Observation({"n": 7}, 12345)
                break

    with no_thread_left():
        asyncio.run(main())


def test_a_slow_task_skips_to_the_newest_and_nothing_piles_up(device):
    async def main():
        async with (
            aio.ActionClient(config=DEVICE, url=device.url) as client,
            client.observations() as observations,
        ):
            device.publish_obs({"n": 0})
            assert await observations.__anext__() == {"n": 0}
            for n in range(1, 500):
                device.publish_obs({"n": n})
            assert await observations.__anext__() == {"n": 499}
            assert observations.received == 2
            assert observations.missed == 498

    asyncio.run(main())


def test_what_a_server_keeps_a_slow_task_gets(transport):
    server = ActionServer(DEVICE, None, None, keep=100, url=url_of(transport))

    async def main():
        async with (
            aio.ActionClient(config=DEVICE, url=server.url) as client,
            client.observations() as observations,
        ):
            for n in range(100):
                server.publish_obs({"n": n})
            assert [(await observations.__anext__())["n"] for _ in range(100)] == [*range(100)]

    with started(server):
        asyncio.run(main())


def test_a_task_that_gave_up_waiting_loses_nothing(device):
    async def main():
        async with (
            aio.ActionClient(config=DEVICE, url=device.url) as client,
            client.observations() as observations,
        ):
            for n in range(3):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(observations.__anext__(), 0.02)
                device.publish_obs({"n": n})
                assert await observations.__anext__() == {"n": n}

    asyncio.run(main())


@pytest.mark.parametrize("ended_by", ["subscription", "client"])
def test_stop_ends_the_iteration_of_another_task(device, ended_by):
    async def main():
        async with aio.ActionClient(config=DEVICE, url=device.url) as client:
            observations = client.observations()
            seen = []

            async def iterate():
                async for value in observations:
                    seen.append(value)  # noqa: PERF401

            task = asyncio.ensure_future(iterate())
            device.publish_obs({"n": 0})
            await until(lambda: seen)
            if ended_by == "client":
                await client.stop()
                with pytest.raises(Closed):
                    client.observations()
            else:
                observations.stop()
            async with eventually():
                await task

    with no_thread_left():
        asyncio.run(main())


def test_a_client_stops_quickly_while_a_task_is_busy_with_a_value(device):
    async def main():
        client = await aio.ActionClient(config=DEVICE, url=device.url).connect()
        observations = client.observations()
        device.publish_obs({"n": 0})
        await observations.__anext__()
        device.publish_obs({"n": 1})
        with took(at_most=0.9):
            await client.stop()
        with pytest.raises(StopAsyncIteration):
            await observations.__anext__()

    with no_thread_left():
        asyncio.run(main())


def test_an_iterator_that_is_dropped_ends_its_thread(device):
    async def main():
        async with aio.ActionClient(config=DEVICE, url=device.url) as client:
            before = threads()
            for n in range(3):
                device.publish_obs({"n": n})
                async for value in client.observations():
                    assert value == {"n": n}
                    break
            gc.collect()
            await until(lambda: threads() <= before)

    asyncio.run(main())


def test_what_the_body_raises_ends_the_subscription_that_it_is_in(device):
    async def main():
        async with aio.ActionClient(config=DEVICE, url=device.url) as client:
            device.publish_obs({"n": 0})

            async def fail() -> None:
                async with client.observations() as observations:
                    async for value in observations:
                        raise KeyError(value["n"])

            with pytest.raises(KeyError):
                await fail()
            assert await client.act("move", 1) == 1

    with no_thread_left():
        asyncio.run(main())


def test_two_tasks_need_a_subscription_each(device):
    async def main():
        async with (
            aio.ActionClient(config=DEVICE, url=device.url) as client,
            client.observations() as one,
            client.observations() as other,
        ):
            waiting = asyncio.ensure_future(one.__anext__())
            await asyncio.sleep(0)
            await asyncio.sleep(0.05)
            with pytest.raises(RuntimeError, match="another task waits"):
                await one.__anext__()
            device.publish_obs({"n": 0})
            assert await waiting == await other.__anext__() == {"n": 0}

    asyncio.run(main())


def test_a_subscription_goes_on_when_the_server_is_restarted(transport):
    async def main():
        first = ActionServer(DEVICE, None, None, url=url_of(transport))
        with first.serving():
            url = first.url
            client = await aio.ActionClient(config=DEVICE, url=url).connect()
            observations = client.observations()
            first.publish_obs({"n": 0})
            assert await observations.__anext__() == {"n": 0}
        second = ActionServer(DEVICE, None, None, url=url)
        with second.serving():
            second.publish_obs({"n": 1})
            async with eventually():
                assert await observations.__anext__() == {"n": 1}
            await client.stop()

    asyncio.run(main())


def test_a_subscription_moves_from_one_loop_to_another(device):
    client = asyncio.run(aio.ActionClient(config=DEVICE, url=device.url).connect())
    observations = client.observations()
    for n in range(3):
        device.publish_obs({"n": n})
        assert asyncio.run(anext_of(observations)) == {"n": n}
    asyncio.run(client.stop())


async def anext_of(iterator):
    return await iterator.__anext__()


def test_a_subscription_that_cannot_begin_says_so_and_can_try_again(transport):
    async def main():
        server = ActionServer(DEVICE, None, None, url=url_of(transport))
        with server.serving():
            url = server.url
            client = await aio.ActionClient(config=DEVICE, url=url, timeout=0.3).connect()
        observations = client.observations()
        # Until it knows that its server has gone, it would wait for what that publishes.
        async with eventually(30):
            while True:
                try:
                    await client.obs()
                except Unreachable:
                    break
                except (Closed, DeadlineExceeded):
                    pass
        with pytest.raises((Unreachable, Closed, DeadlineExceeded)):
            await observations.__anext__()
        again = ActionServer(DEVICE, None, None, url=url)
        with again.serving():
            again.publish_obs({"n": 1})
            async with eventually():
                assert await observations.__anext__() == {"n": 1}
            await client.stop()

    asyncio.run(main())
