"""Images that travel as files, between the ends of each pair."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from edgeml import (
    ActionClient,
    ActionConfig,
    ActionServer,
    Batching,
    ConfigMismatch,
    InferenceClient,
    InferenceServer,
    Jpeg,
    Malformed,
    NotEncodable,
    Png,
    RemoteError,
    TrainerClient,
    TrainerConfig,
    TrainerServer,
)
from edgeml.codecs.msgpack import MsgpackCodec
from edgeml.core import Message, Url, wire
from edgeml.core.client import Client
from edgeml.core.server import Server
from edgeml.data import QueuedDataStore
from edgeml.images import ImageCodec, Images, Plan
from pairs import TRANSPORTS, free_port, plain_client, started, stop_server, wait_until

JPEGS = {"image*": Jpeg(90)}
CONFIG = {"action_keys": ["show"], "observation_keys": ["image", "step"]}


def photo(height: int = 96, width: int = 128, at: float = 0.0) -> np.ndarray[Any, Any]:
    """What a JPEG hardly changes, but a little."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 60 * np.sin(x / 40 + i + at) + 50 * np.cos(y / 30 - i) for i in range(3)]
    return np.stack(waves, -1).astype(np.uint8)


def was_jpeg(got: Any, sent: Any) -> bool:
    """Whether an image came by way of a JPEG; or else as it was."""
    assert got.shape == sent.shape
    assert np.abs(got.astype(int) - sent).mean() < 3
    return not np.array_equal(got, sent)


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    return request.param


@pytest.fixture
def encoded(monkeypatch):
    """The images that are encoded as JPEG in this process, in order."""
    images: list[np.ndarray[Any, Any]] = []
    encode = Jpeg.encode

    def count(self: Jpeg, pixels: np.ndarray[Any, Any]) -> bytes:
        images.append(pixels)
        return encode(self, pixels)

    monkeypatch.setattr(Jpeg, "encode", count)
    return images


@pytest.fixture
def server(transport):
    with started(InferenceServer(0, transport=transport, images=JPEGS)) as server:
        seen = server.seen = []

        @server.register_interface("echo")
        def echo(payload):
            seen.append(payload)
            return payload

        yield server


# Each pair, each way ------------------------------------------------------------------------


def test_a_call_and_its_result(server):
    sent = {"image": photo(), "state": photo(), "deep": [({"image_2": photo()}, 1)]}
    with InferenceClient(url=server.url, images=JPEGS) as client:
        got = client.call("echo", sent)
        assert was_jpeg(server.seen[0]["image"], sent["image"])
        assert not was_jpeg(server.seen[0]["state"], sent["state"])
        assert was_jpeg(got["deep"][0][0]["image_2"], photo())
        assert not got["image"].flags.writeable
        assert was_jpeg(client.call_async("echo", sent).result(10)["image"], photo())


def test_either_end_alone(server):
    with InferenceClient(url=server.url, writable=True) as client:
        got = client.call("echo", {"image": photo()})
        assert not was_jpeg(server.seen[-1]["image"], photo())
        assert was_jpeg(got["image"], photo())
        got["image"][:] = 0
    with (
        started(InferenceServer(0)) as plain,
        InferenceClient(url=plain.url, images={"image": Png()}) as client,
    ):
        plain.register_interface("echo", lambda payload: payload)
        assert not was_jpeg(client.call("echo", {"image": photo()})["image"], photo())


def test_observations_and_actions(transport, encoded):
    config = ActionConfig(0, **CONFIG, transport=transport)
    shown: list[Any] = []

    def act(key, payload):
        shown.append(payload)
        return {"image": photo()}

    with (
        started(
            ActionServer(config, lambda keys: {"image": photo(), "step": 1}, act, images=JPEGS)
        ) as server,
        ActionClient(url=server.url, config=config, images=JPEGS) as client,
    ):
        assert was_jpeg(client.obs()["image"], photo())
        assert was_jpeg(client.act("show", {"image": photo()})["image"], photo())
        assert was_jpeg(shown[0]["image"], photo())
        got: list[Any] = []
        client.register_obs_callback(got.append)
        server.publish_obs({"image": photo(), "step": 7})
        wait_until(lambda: got)
        assert got[0]["step"] == 7
        assert was_jpeg(got[0]["image"], photo())


def test_uploads_and_weights(transport):
    config = TrainerConfig(0, request_types=["show"], transport=transport)
    learner, actor = QueuedDataStore(100), QueuedDataStore(100)
    for step in range(5):
        actor.insert({"observations": {"image": photo(at=step)}, "reward": float(step)})
    actor.insert({"image": photo(), "note": "an item that makes no column"})
    with (
        started(
            TrainerServer(config, None, lambda kind, payload: payload, images={"image": Png()})
        ) as server,
    ):
        server.register_data_store("arm", learner)
        with TrainerClient(
            "arm", url=server.url, config=config, data_store=actor, images=JPEGS
        ) as client:
            assert client.update().applied == 6
            items = list(learner.get_latest_data(0))
            for step in range(5):
                assert was_jpeg(items[step]["observations"]["image"], photo(at=step))
                assert items[step]["reward"] == step
            assert was_jpeg(items[5]["image"], photo())
            assert was_jpeg(client.request("show", {"image": photo()})["image"], photo())
            got: list[Any] = []
            client.recv_network_callback(got.append)
            server.publish_network({"image": photo(), "weights": np.ones(3)})
            wait_until(lambda: got)
            assert not was_jpeg(got[0]["image"], photo())


def test_an_item_whose_image_is_none_is_refused_by_its_path(caplog):
    config = TrainerConfig(0, transport="inproc")
    actor = QueuedDataStore(100)
    actor.insert({"image": photo()})
    actor.insert({"image": np.zeros(3, np.float32)})
    with started(TrainerServer(config)) as server:
        server.register_data_store("arm", QueuedDataStore(100))
        with TrainerClient(
            "arm", url=server.url, config=config, data_store=actor, images=JPEGS
        ) as client:
            assert client.update().applied == 1
            assert client.stats()["items_refused"] == 1
    assert "['image']" in caplog.text
    assert "float32" in caplog.text


def test_batches(transport):
    with started(InferenceServer(0, transport=transport)) as server:
        server.register_interface(
            "mean",
            lambda payload: payload["image"].mean(axis=(1, 2, 3)),
            batching=Batching(max_size=8),
        )
        with InferenceClient(url=server.url, images=JPEGS) as client:
            calls: list[Future[Any]] = [
                client.call_async("mean", {"image": photo(at=i)}) for i in range(10)
            ]
            for i, call in enumerate(calls):
                assert abs(call.result(20) - photo(at=i).mean()) < 1


# Publications -------------------------------------------------------------------------------


def test_publications_are_encoded_once_for_those_who_are_there_and_for_nobody_else(encoded):
    config = ActionConfig(0, **CONFIG, transport="zmq")
    with started(ActionServer(config, None, None, images=JPEGS)) as server:

        def publish(step: int) -> int:
            """How often its image was encoded."""
            before = len(encoded)
            server.publish_obs({"image": photo(), "step": step})
            return len(encoded) - before

        assert publish(1) == 0  # for nobody
        got: dict[int, list[Any]] = {i: [] for i in range(3)}
        with plain_client(server) as plain:  # doesn't know of images
            plain.subscribe("observations", got[0].append)
            wait_until(lambda: got[0])
            assert publish(2) == 0
            wait_until(lambda: len(got[0]) == 2)
            assert not was_jpeg(got[0][1]["image"], photo())
            with (
                ActionClient(url=server.url, config=config) as one,
                ActionClient(url=server.url, config=config) as two,
            ):
                one.register_obs_callback(got[1].append)
                wait_until(lambda: got[1])  # who comes late gets what is current
                assert was_jpeg(got[1][0]["image"], photo())
                two.register_obs_callback(got[2].append)
                wait_until(lambda: got[2])
                assert len(encoded) == 1
                assert publish(3) == 1
                wait_until(lambda: all(each and each[-1]["step"] == 3 for each in got.values()))
                assert was_jpeg(got[2][-1]["image"], photo())
                assert not was_jpeg(got[0][-1]["image"], photo())
            assert publish(4) == 0  # they have left


def test_what_is_no_image_is_refused_before_anybody_subscribes():
    config = ActionConfig(0, **CONFIG, transport="inproc")
    with (
        started(ActionServer(config, None, None, images=JPEGS)) as server,
        pytest.raises(NotEncodable, match=r"value\['image'\] has dtype float64"),
    ):
        server.publish_obs({"image": np.zeros((4, 4))})


def test_a_result_that_is_no_image_hurts_its_caller_alone(server):
    with InferenceClient(url=server.url) as client:
        with pytest.raises(RemoteError, match=r"value\['image'\] is 5, not an image"):
            client.call("echo", {"image": 5})
        assert client.call("echo", 5) == 5
    with (
        InferenceClient(url=server.url, images=JPEGS) as client,
        pytest.raises(NotEncodable, match=r"value\['image'\] is 5, not an image"),
    ):
        client.call("echo", {"image": 5})


# What is wanted -----------------------------------------------------------------------------


def test_a_client_sends_what_the_server_wants(transport, encoded):
    wants = {"image*": Jpeg(80, size=(64, 64)), "raw": Png()}
    with started(InferenceServer(0, transport=transport, wants_images=wants)) as server:
        server.register_interface("echo", lambda payload: payload)
        with InferenceClient(url=server.url) as client:
            got = client.call("echo", {"image": photo(), "raw": photo(), "other": photo()})
            assert got["image"].shape == (64, 64, 3)
            assert got["image"][:7].mean() < 5  # 96x128 becomes 48x64, in the middle
            assert not was_jpeg(got["raw"], photo())
            assert len(encoded) == 1
        with InferenceClient(url=server.url, images={"image": Png()}) as client:
            assert client.call("echo", {"image": photo()})["image"].shape == (64, 64, 3)
            assert len(encoded) == 1  # its own format, in the size wanted


def test_a_client_that_cannot_resize_is_refused(monkeypatch):
    with started(InferenceServer(0, wants_images={"image": Jpeg(size=(64, 64))})) as server:
        monkeypatch.setattr("edgeml.images.agreement.has_pillow", lambda: False)
        with pytest.raises(ConfigMismatch, match=r"wants 'image' in the size \(64, 64\).*Pillow"):
            InferenceClient(url=server.url)


@pytest.mark.parametrize("restarted", [{}, {"wants_images": {"image": Png((16, 16))}}])
def test_after_a_restart_the_client_does_as_the_new_server_wants(restarted):
    wants = {"image": Png((32, 32))}
    port = free_port()
    with started(InferenceServer(port, wants_images=wants)) as server:
        server.register_interface("shape", lambda payload: list(payload["image"].shape))
        client = InferenceClient(url=server.url)
        assert client.call("shape", {"image": photo()}) == [32, 32, 3]
        stop_server(server, client)
    with client, started(InferenceServer(port, **restarted)) as server:
        server.register_interface("shape", lambda payload: list(payload["image"].shape))
        asynchronous = client.call_async("shape", {"image": photo()})
        assert client.call("shape", {"image": photo()}) == (
            [16, 16, 3] if restarted else [96, 128, 3]
        )
        assert asynchronous.result(10) == ([16, 16, 3] if restarted else [32, 32, 3])


# Agreeing -----------------------------------------------------------------------------------


def test_a_client_that_cannot_decode_gets_arrays_and_both_are_told(server, caplog):
    hello = {"images": {"decodes": [], "encodes": []}}
    with plain_client(server, extensions=hello, label="old robot") as client:
        assert not was_jpeg(client.call("echo", {"image": photo()})["image"], photo())
        assert client.sessions.current.extensions["images"]["encodes"] == ["jpeg"]
    assert "old robot" in caplog.text
    assert "can't decode jpeg: it gets images as arrays" in caplog.text


def test_a_client_is_told_that_it_cannot_decode(server, caplog, monkeypatch):
    monkeypatch.setattr(Images, "ask", lambda self: {"decodes": [], "encodes": []})
    monkeypatch.setattr(
        Images,
        "accept",
        lambda self, answered, codec, at, accept=Images.accept: accept(
            self, {**answered, "encodes": ["webp"]}, codec, at
        ),
    )
    with InferenceClient(url=server.url) as client:
        assert not was_jpeg(client.call("echo", {"image": photo()})["image"], photo())
    assert "come as arrays, since webp can't be decoded here" in caplog.text


def test_a_client_whose_images_the_server_cannot_decode_is_refused(server):
    hello = {"images": {"decodes": ["jpeg"], "encodes": ["webp"]}}
    with (
        pytest.raises(ConfigMismatch, match="the client sends webp, which the server can't"),
        plain_client(server, extensions=hello),
    ):
        pass
    core = Server("inference", [Url.parse("inproc://127.0.0.1:0")])  # knows nothing of images
    core.open()
    try:
        with pytest.raises(ConfigMismatch, match="doesn't know of images that are encoded"):
            InferenceClient(url=str(core.urls[0]), images=JPEGS)
        InferenceClient(url=str(core.urls[0])).stop()
    finally:
        core.close()


@pytest.mark.parametrize("asked", [5, None, {"decodes": 5}, {"decodes": [5]}, {"encodes": {}}])
def test_an_extension_that_makes_no_sense_is_malformed(server, asked):
    with (
        pytest.raises(Malformed, match="images: "),
        plain_client(server, extensions={"images": asked}),
    ):
        pass


@pytest.mark.parametrize(
    "wants",
    [
        *(5, {"image": 5}, {"image": {"format": 5}}, {5: {"format": "jpeg"}}),
        {"image": {"format": "jpeg", "quality": 1000}},
        {"image": {"format": "jpeg", "size": [-1, 5]}},
        {"image": {"format": "jpeg", "size": "large"}},
        {"image": {"format": "jpeg", "size": [50_000, 50_000]}},  # 7.5 GB, at each call
    ],
)
def test_a_server_that_wants_what_makes_no_sense_is_told_of(wants):
    core = Server("inference", [Url.parse("inproc://127.0.0.1:0")])
    core.extend("images", lambda asked, caller: {"decodes": ["jpeg", "png"], "wants": wants})
    core.open()
    try:
        with pytest.raises(Malformed, match=r"images: |a key that is not a str"):
            InferenceClient(url=str(core.urls[0]))
    finally:
        core.close()


def test_a_want_that_cannot_be_met_is_a_mismatch_and_later_settings_are_ignored():
    wants = {"image": {"format": "jpeg", "quality": 80, "size": None, "later": 1}}
    core = Server("inference", [Url.parse("inproc://127.0.0.1:0")])
    core.extend("images", lambda asked, caller: {"decodes": ["jpeg"], "wants": wants, "later": 1})
    core.open()
    try:
        InferenceClient(url=str(core.urls[0])).stop()
        wants["image"]["format"] = "webp"
        with pytest.raises(ConfigMismatch, match="as webp, which can't be encoded here"):
            InferenceClient(url=str(core.urls[0]))
    finally:
        core.close()


@pytest.mark.parametrize(
    "given", [[Jpeg()], {"image": "jpeg"}, {"image": 90}, {"": Jpeg()}, "image"]
)
def test_images_is_a_dict_of_formats(given):
    for name in ("images", "wants_images"):
        with pytest.raises(TypeError, match=f"^{name} is a dict of patterns and formats"):
            InferenceServer(0, **{name: given})
    with pytest.raises(TypeError, match="images is a dict of patterns and formats"):
        InferenceClient("127.0.0.1", 1, images=given)


# The bytes ----------------------------------------------------------------------------------


def test_off_the_bytes_are_as_before(transport):
    seen: list[Message] = []

    def look(call):
        seen.append(call._message)
        call.answer(call.payload())

    value = {"image": photo(), "step": 5}
    expected = MsgpackCodec().encode(value)
    server = Server("inference", [Url.parse(f"{transport}://127.0.0.1:0")], wrapping=Images())
    server.register("look", look)
    server.open()
    server.dispatcher.start()
    client = Client("inference", server.urls, wrapping=Images())
    try:
        assert np.array_equal(client.call("look", value)["image"], photo())
        assert seen[0].header == expected.header
        assert [*map(bytes, seen[0].buffers)] == [*map(bytes, expected.buffers)]
        session = client.sessions.current
        request = wire.Request(wire.CALL, session.key, "look", 5.0, expected.header)
        message = Message(wire.pack(request), expected.buffers)
        reply = session.requester.call(message, 20)
        assert wire.unpack(wire.Answer, reply.header).body == expected.header
        assert [*map(bytes, reply.buffers)] == [*map(bytes, expected.buffers)]
    finally:
        client.close()
        server.close()


def test_forged_images_hurt_their_sender_alone(server):
    with plain_client(server, extensions={"images": {"decodes": [], "encodes": []}}) as client:
        session = client.sessions.current
        for body, files in (
            (b"\xc1", []),
            (
                b"\xc1\x92\xc4\x01\xc0\x91\x93\x90\xa4jpeg\x93\xcd\xea\x60\xcd\xea\x60\x03",
                [b"\xff\xd8"],
            ),
            (b"\xc1\x92\xc4\x01\xc0\x91\x93\x91\x05\xa3png\x93\x01\x01\x03", [b"\x89PNG"]),
        ):
            request = wire.Request(wire.CALL, session.key, "echo", 5.0, body)
            message = Message(wire.pack(request), list(map(memoryview, files)))
            answer = wire.unpack(wire.Answer, session.requester.call(message, 20).header)
            with pytest.raises(Malformed):
                raise wire.error_of(answer)
        assert client.call("echo", 5) == 5


def test_one_who_did_not_agree_on_images_can_not_send_them(server):
    with plain_client(server) as client:
        session = client.sessions.current
        body = ImageCodec(MsgpackCodec(), Plan({"*": Png()})).encode(photo())
        request = wire.Request(wire.CALL, session.key, "echo", 5.0, body.header)
        message = Message(wire.pack(request), body.buffers)
        answer = wire.unpack(wire.Answer, session.requester.call(message, 20).header)
        with pytest.raises(Malformed):
            raise wire.error_of(answer)
