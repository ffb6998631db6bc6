"""What runs where openpi-client is: test_unmodified_clients.py starts it. It knows no edgeml.

python openpi_program.py PORT [KEY]     a line once all is well; after a line from stdin, another
"""

import json
import sys

from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import ConnectionClosed

from robot import FAILING, check, observe


def infer(client, number, task="fold the towel"):
    front, wrist, state = seen = observe(number)
    result = client.infer(
        {
            "observation/image": front,
            "observation/wrist_image": wrist,
            "observation/state": state,
            "prompt": task,
        }
    )
    check(result["actions"], seen)
    return result["server_timing"]


def main():
    port, key = int(sys.argv[1]), (sys.argv[2:] or [None])[0]
    client = WebsocketClientPolicy("127.0.0.1", port, api_key=key)
    metadata = client.get_server_metadata()
    timings = [infer(client, number) for number in range(200)]
    client.reset()
    infer(client, 0)
    try:
        infer(client, 0, FAILING)
    except RuntimeError as error:
        failed = str(error)
    try:
        infer(client, 0)
    except ConnectionClosed as error:
        code = error.rcvd.code
    client = WebsocketClientPolicy("127.0.0.1", port, api_key=key)
    infer(client, 0)
    told = {"metadata": metadata, "failed": failed, "code": code, "timing": timings[-1]}
    print(json.dumps(told), flush=True)
    input()  # the server is started anew meanwhile
    try:
        infer(client, 0)
    except ConnectionClosed:
        client = WebsocketClientPolicy("127.0.0.1", port, api_key=key)
    infer(client, 1)
    print("again", flush=True)


main()
