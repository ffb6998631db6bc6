import io
from contextlib import contextmanager

import msgspec
import numpy as np
import zmq

from edgeml import InferenceServer


def pack(value):
    def save(array):
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": file.getvalue()}

    return msgspec.msgpack.encode(value, enc_hook=save)


@contextmanager
def robot():
    """Asks a server whose function gives twice the state, as GR00T's clients do."""
    with InferenceServer(url="inproc://127.0.0.1:0", doors=["groot://127.0.0.1:0"]) as server:
        server.register_interface("policy", lambda observation: {"arm": 2 * observation["state"]})
        with server.serving(), zmq.Context() as context, context.socket(zmq.REQ) as peer:
            peer.linger, peer.rcvtimeo = 0, 10_000
            peer.connect(server.doors()[0].replace("groot", "tcp"))

            def ask(request):
                peer.send(pack(request))
                return msgspec.msgpack.decode(peer.recv())

            yield ask


def load(array):
    return np.load(io.BytesIO(array["as_npy"]), allow_pickle=False).tolist()


def test_an_older_client_gets_the_action():
    with robot() as ask:
        answer = ask({"endpoint": "get_action", "data": {"state": np.arange(3.0)}})
        assert load(answer["arm"]) == [0, 2, 4]


def test_a_newer_client_gets_an_info_as_well():
    with robot() as ask:
        data = {"observation": {"state": np.arange(3.0)}, "options": None}
        action, info = ask({"endpoint": "get_action", "data": data})
        assert load(action["arm"]) == [0, 2, 4]
        assert info == {}


def test_every_request_is_answered():
    with robot() as ask:
        assert ask({"endpoint": "ping"})["status"] == "ok"
        assert ask({"endpoint": "reset", "data": {"options": None}}) == {}
        for wrong in ({"endpoint": "kill"}, {"endpoint": "what"}, [], {"data": {"no state": 1}}):
            assert ask(wrong).keys() == {"error"}
