"""What runs where pyzmq and msgpack are: test_unmodified_clients.py starts it. It knows no edgeml.

python groot_program.py PORT CLIENT     CLIENT: the file of strands-robots, which is loaded alone
"""

import importlib.util
import json
import sys

import numpy as np

from robot import FAILING, check, observe


def get_action(client, number, task="fold the towel"):
    front, wrist, state = seen = observe(number)
    result = client.get_action(
        {
            "video.front": front[None],
            "video.wrist": wrist[None],
            "state.arm": state[None],
            "annotation.human.task_description": [task],
        }
    )
    check(result["action.arm"], seen)
    return sorted(result)


def main():
    spec = importlib.util.spec_from_file_location("client", sys.argv[2])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    client = module.GR00TClient("127.0.0.1", int(sys.argv[1]))
    assert client.ping()
    for number in range(200):
        keys = get_action(client, number)
    try:
        get_action(client, 0, FAILING)
    except RuntimeError as error:
        failed = str(error)
    try:  # what no policy takes; it must be answered all the same, or this waits forever
        client.get_action({"video.front": np.zeros(3)})
    except RuntimeError as error:
        unlike = str(error)
    get_action(client, 0)
    print(json.dumps({"keys": keys, "failed": failed, "unlike": unlike}), flush=True)
    input()  # the server is started anew meanwhile; the socket finds it by itself
    get_action(client, 1)
    print("again", flush=True)


main()
