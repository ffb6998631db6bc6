"""The wire as docs/wire.md has it: its vectors, its examples, and a client made from it alone."""

import datetime as dt
import json
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

import edgeml
from edgeml import Malformed, PolicyContract
from edgeml.core import Message, Url, load_codec, load_transport, unframe, wire
from edgeml.core.client import Client
from edgeml.core.frames import frame
from edgeml.core.pieces import PREFIX, Assembly, cut_message, flatten
from edgeml.images import ImageCodec, Plan, Png
from pairs import started, wait_until
from vectors import make

HERE = Path(__file__).parent / "vectors"
PAGE = Path(__file__).parents[2] / "docs" / "wire.md"
ENVELOPE, CODEC, FRAME, ZMQ, GRPC, IMAGES = (
    json.loads((HERE / f"{stem}.json").read_text())
    for stem in ("envelope", "codec", "frame", "zmq", "grpc", "images")
)

codec = load_codec("msgpack")


def each(vectors):
    return pytest.mark.parametrize("vector", vectors, ids=lambda vector: vector["name"])


def raw(shown) -> bytes:
    if isinstance(shown, dict):
        return bytes.fromhex(shown["repeat"]) * shown["times"]
    return bytes.fromhex(shown)


def message_of(vector) -> Message:
    return Message(raw(vector["header"]), [memoryview(raw(b)) for b in vector["buffers"]])


def same(one: Message, other: Message) -> bool:
    return one.header == other.header and list(one.buffers) == list(other.buffers)


def test_the_vectors_are_what_their_script_makes():
    for stem, content in make.build().items():
        assert content == json.loads((HERE / f"{stem}.json").read_text()), stem


# The envelope -----------------------------------------------------------------------------

TYPES = {
    "request": wire.Request,
    "reply": wire.Answer,
    "result": wire.Result,
    "publication": wire.Publication,
    "hello": wire.Hello,
    "welcome": wire.Welcome,
    "credit": wire.Credit,
    "pong": wire.Pong,
}
BY_NAME = {vector["name"]: vector for vector in ENVELOPE["valid"]}


def struct_of(vector):
    kind = TYPES[vector["type"]]
    fields = dict(vector["value"])
    for field in msgspec.structs.fields(kind):
        if field.type in (bytes, "bytes"):
            fields[field.name] = bytes.fromhex(fields[field.name])
        elif isinstance(fields[field.name], str) and field.type in (int, "int"):
            fields[field.name] = int(fields[field.name])
    if fields.get("served") is not None:
        fields["served"] = wire.Served(*fields["served"])
    return kind(**fields)


@each(ENVELOPE["valid"])
def test_an_envelope_is_these_bytes(vector):
    value = struct_of(vector)
    assert wire.pack(value).hex() == vector["hex"]
    assert wire.unpack(type(value), bytes.fromhex(vector["hex"])) == value
    if "arguments" in vector:
        error = wire.error_of(value)
        assert wire.pack_error(error).hex() == vector["hex"]
        assert list(error.args) == vector["arguments"]


@each(ENVELOPE["read as well"])
def test_an_envelope_is_read_as_well(vector):
    means = struct_of(BY_NAME[vector["means"]])
    assert wire.unpack(TYPES[vector["type"]], bytes.fromhex(vector["hex"])) == means


@each(ENVELOPE["invalid"])
def test_an_envelope_is_refused(vector):
    with pytest.raises(Malformed):
        wire.unpack(TYPES[vector["type"]], bytes.fromhex(vector["hex"]))


# The codec --------------------------------------------------------------------------------


def value_of(tagged):
    if not isinstance(tagged, list):
        return tagged
    match tagged:
        case ["array", name, shape, data]:
            return np.frombuffer(raw(data), dtype(name)).reshape(shape)
        case ["scalar", name, data]:
            return np.frombuffer(raw(data), dtype(name))[0]
        case ["bytes", data]:
            return raw(data)
        case ["map", pairs]:
            return {value_of(key): value_of(item) for key, item in pairs}
        case ["list" | "tuple" | "set" | "frozenset" as kind, items]:
            makers = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
            return makers[kind](map(value_of, items))
        case ["int", text]:
            return int(text)
        case ["float", text]:
            return float(text)
        case ["complex", real, imaginary]:
            return complex(float(real), float(imaginary))
        case ["timedelta", days, seconds, microseconds]:
            return dt.timedelta(days, seconds, microseconds)
        case [kind, text]:
            return getattr(dt, kind).fromisoformat(text)


def dtype(name):
    if name == "bfloat16":
        return pytest.importorskip("ml_dtypes").bfloat16
    return np.dtype(name)


@each(CODEC["valid"])
def test_a_value_is_these_bytes(vector):
    encoded = codec.encode(value_of(vector["value"]))
    assert encoded.header.hex() == vector["header"]
    assert [bytes(buffer) for buffer in encoded.buffers] == [raw(b) for b in vector["buffers"]]


@each(CODEC["valid"] + CODEC["read as well"])
def test_these_bytes_are_a_value(vector):
    got = codec.decode(message_of(vector))
    assert make.tagged(got) == vector["value"]  # type for type, which == would not look at


@each(CODEC["invalid"])
def test_a_value_is_refused(vector):
    with pytest.raises(Malformed):
        codec.decode(message_of(vector))


# Images -----------------------------------------------------------------------------------

with_images = ImageCodec(codec)


@each(IMAGES["valid"])
def test_these_bytes_are_a_value_with_images(vector):
    value = with_images.decode(message_of(vector))
    assert make.tagged(value) == vector["value"]
    patterns = {"*": Png()} if isinstance(value, np.ndarray) else {"image": Png(), "views": Png()}
    encoded = ImageCodec(codec, Plan(patterns)).encode(value_of(vector["value"]))
    assert encoded.header.hex() == vector["header"]  # a PNG's own bytes differ with its writer
    assert len(encoded.buffers) == len(vector["buffers"])


@each(IMAGES["invalid"])
def test_a_value_with_images_is_refused(vector):
    with pytest.raises(Malformed):
        with_images.decode(message_of(vector))


# Frames -----------------------------------------------------------------------------------


@each(FRAME["valid"])
def test_a_frame_is_these_bytes(vector):
    message = message_of(vector)
    assert frame(message).hex() == vector["hex"]
    assert same(unframe(bytes.fromhex(vector["hex"])), message)


@each(FRAME["invalid"])
def test_a_frame_is_refused(vector):
    with pytest.raises(Malformed):
        unframe(bytes.fromhex(vector["hex"]))


# ZeroMQ -----------------------------------------------------------------------------------


def test_a_request_over_zmq_is_these_frames_and_so_is_its_reply():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger, router.rcvtimeo = 0, 5000
        port = router.bind_to_random_port("tcp://127.0.0.1")
        url = Url("zmq", "127.0.0.1", port)
        with load_transport("zmq").connect(url, 20) as requester:
            for vector in ZMQ["valid"]:  # in the order of their numbers
                future = requester.request(message_of(vector))
                identity, *frames = router.recv_multipart()
                assert [part.hex() for part in frames] == vector["frames"]
                router.send_multipart([identity, *frames])
                assert same(future.result(20), message_of(vector))


def test_frames_over_zmq_are_taken_for_a_request_and_those_that_are_none_ignored():
    taken = []

    def on_request(message, reply) -> None:
        taken.append(message)
        reply(message)

    with (
        load_transport("zmq").serve(Url("zmq", "127.0.0.1", 0), on_request) as endpoint,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as dealer,
    ):
        dealer.linger, dealer.rcvtimeo = 0, 5000
        dealer.connect(f"tcp://127.0.0.1:{endpoint.url.port}")
        for vector in ZMQ["invalid"]:
            dealer.send_multipart([bytes.fromhex(part) for part in vector["frames"]])
        for vector in ZMQ["valid"]:
            dealer.send_multipart([bytes.fromhex(part) for part in vector["frames"]])
            assert [part.hex() for part in dealer.recv_multipart()] == vector["frames"]
        assert all(map(same, taken, map(message_of, ZMQ["valid"])))


# gRPC -------------------------------------------------------------------------------------


@each(GRPC["valid"])
def test_a_piece_for_grpc_is_these_bytes(vector):
    message = message_of(vector)
    size, parts = flatten(message)
    for first, key in ((int(GRPC["number"]), "request"), (0, "reply")):
        assert b"".join([PREFIX.pack(first, size), *parts]).hex() == vector[key]
        assert b"".join(cut_message(first, message, 1 << 20)).hex() == vector[key]
        whole = bytes.fromhex(vector[key])
        assert PREFIX.unpack_from(whole) == (first, size)
        assembly = Assembly()
        for at in (slice(0, 16), slice(16, 20), slice(20, None)):
            assembly.add(whole[at])
        assert assembly.number == first
        assert same(assembly.message(), message)


def test_the_other_pieces_for_grpc_are_these_bytes():
    number, key = int(GRPC["number"]), int(GRPC["key"])
    assert PREFIX.pack(number, 0).hex() == GRPC["connected"]
    assert PREFIX.pack(number, key).hex() == GRPC["fetch"]
    assert PREFIX.pack(key, 5_000_008).hex() == GRPC["kept"]


@each(GRPC["invalid streams"])
def test_a_stream_for_grpc_is_refused(vector):
    assembly = Assembly()
    with pytest.raises(Malformed):  # noqa: PT012
        for piece in vector["pieces"]:
            assembly.add(bytes.fromhex(piece))
        assembly.message()


# The page ---------------------------------------------------------------------------------


def test_the_contract_is_one() -> None:
    """The vector that the page shows is a plain form, and the only one of that contract."""
    header = bytes.fromhex(_header(CODEC["valid"], "contract"))
    plain = load_codec("msgpack").decode(Message(header))
    assert PolicyContract.from_plain(plain).to_plain() == plain


def examples() -> list[tuple[str, str]]:
    """The blocks of hex in the page: which vector each says that it is, and the hex."""
    found = re.findall(r"^```hex (.+)\n((?:.*\n)+?)```$", PAGE.read_text(), re.MULTILINE)
    lines = [(name, [line.partition("#")[0] for line in text.splitlines()]) for name, text in found]
    return [(name, "".join("".join(each).split())) for name, each in lines]


def vector_named(name: str) -> str:
    layer, _, rest = name.partition(": ")
    found = {
        "envelope": lambda: BY_NAME[rest]["hex"],
        "codec": lambda: _header(CODEC["valid"], rest),
        "images": lambda: _header(IMAGES["valid"], rest),
        "frame": lambda: _one(FRAME["valid"], rest)["hex"],
        "zmq": lambda: "".join(_one(ZMQ["valid"], rest)["frames"]),
        "grpc request": lambda: _one(GRPC["valid"], rest)["request"],
        "grpc reply": lambda: _one(GRPC["valid"], rest)["reply"],
        "grpc": lambda: GRPC[rest],
    }
    return found[layer]()


def _one(vectors, name):
    return next(vector for vector in vectors if vector["name"] == name)


def _header(vectors, name):
    return _one(vectors, name)["header"]


def test_there_is_an_example_of_each_layer():
    layers = {name.partition(":")[0].partition(" ")[0] for name, _ in examples()}
    assert layers == {"envelope", "codec", "frame", "zmq", "grpc", "images"}


@pytest.mark.parametrize("example", examples(), ids=lambda example: example[0])
def test_an_example_in_the_page_is_a_vector(example):
    name, shown = example
    assert shown == vector_named(name)


def test_no_bytes_in_the_page_are_outside_of_the_examples():
    rest = re.sub(r"^```hex .*\n(?:.*\n)+?```$", "", PAGE.read_text(), flags=re.MULTILINE)
    assert not re.search(r"(\b[0-9a-f]{2} ){3}", rest)


def test_the_page_says_the_numbers_that_the_code_has():
    text = PAGE.read_text()
    for name in ("HELLO", "CALL", "NEXT", "GOODBYE", "PING"):
        assert re.search(rf"^\| {getattr(wire, name)} \| {name} ", text, re.MULTILINE), name
    for status, kind in wire._ERRORS.items():
        assert re.search(rf"^\| {status} \| {kind.__name__}\b", text, re.MULTILINE), kind


# Somebody who has read the page -----------------------------------------------------------


def fail(_):
    raise ValueError("no")


@pytest.mark.parametrize("how", ["zmq", "grpc", "stream"])
def test_a_client_made_from_the_page_alone_calls_an_inference_server(how):
    transport = "zmq" if how == "zmq" else "grpc"
    with started(edgeml.InferenceServer(0, transport=transport)) as server:
        server.register_interface("echo", lambda payload: payload)
        server.register_interface("zeros", lambda size: np.zeros(size, np.uint8))
        server.register_interface("fail", fail)
        server.register_interface("picture", lambda payload: payload["image"][0, 0].tolist())
        stranger(how, "inference", server.port)
        wait_until(lambda: not server.clients())


@pytest.mark.parametrize("how", ["zmq", "grpc", "stream"])
def test_a_client_made_from_the_page_alone_talks_to_a_robot(how):
    transport = "zmq" if how == "zmq" else "grpc"
    config = edgeml.ActionConfig(0, ["move"], ["cam"], transport=transport)

    def act(key, payload):
        for number in (1, 2) if payload["x"] == 3 else ():
            assert server.publish_obs({"cam": number}) == number
        return {"moved": payload["x"]}

    with started(edgeml.ActionServer(config, lambda keys: {"cam": 5}, act)) as server:
        stranger(how, "action", server.port)
        wait_until(lambda: not server.clients())


def stranger(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", HERE / "stranger.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_an_upload_as_the_page_has_it_is_taken():
    config = edgeml.TrainerConfig(0, broadcast_port=None, transport="inproc")

    class Notes(edgeml.data.QueuedDataStore):
        def batch_insert(self, batch):
            if any(isinstance(item.get("note", ""), int) for item in batch):
                raise ValueError("item['note'] is no text")
            super().batch_insert(batch)

    with started(edgeml.TrainerServer(config)) as server:
        store = Notes(10)
        server.register_data_store("demos", store)
        with closing(Client("trainer", [Url.parse(server.url)], config=config.shared())) as client:
            answers = {}
            for name in ("upload", "upload of items", "upload of what may be refused"):
                upload = codec.decode(message_of(_one(CODEC["valid"], name)))
                answers[name] = client.call("update", upload)
                assert client.call("update", upload) == answers[name]  # repeated
            refused = codec.decode(message_of(_one(CODEC["valid"], "refused")))
            answer = answers["upload of what may be refused"]
            assert {**answer, "epoch": refused["epoch"]} == refused
            assert answers["upload"]["mark"] == 2
            like = codec.decode(message_of(_one(CODEC["valid"], "answer")))
            assert answers["upload of items"].keys() == like.keys()
            assert answers["upload of items"]["mark"] == like["mark"]
        assert store.latest_data_id() == 4
