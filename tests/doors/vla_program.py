"""What runs where vla-eval is: test_unmodified_clients.py starts it. It knows no edgeml.

python vla_program.py PORT     a line once all is well; and after a line from stdin, another
"""

import asyncio
import json
import sys

from vla_eval.connection import Connection
from vla_eval.protocol.numpy_codec import set_image_format
from websockets.exceptions import ConnectionClosed

from robot import FAILING, check, observe

STEPS = 25


async def act(connection, number, task="fold the towel"):
    front, wrist, state = seen = observe(number)
    result = await connection.act(
        {
            "images": {"front": front, "wrist": wrist},
            "state": state,
            "task_description": task,
        }
    )
    check(result["actions"], seen)
    return result


async def main():
    steps = []
    connection = Connection(f"ws://127.0.0.1:{sys.argv[1]}", backoff_base=0.1)
    await connection.connect(benchmark="towels")
    for episode in range(8):
        # Both its default, PNG, and what costs no time.
        set_image_format("raw" if episode else "png")
        await connection.start_episode({"task": {"name": f"towel {episode}"}})
        for number in range(STEPS):
            result = await act(connection, STEPS * episode + number)
            steps.append(int(result["step"]))
        await connection.end_episode({"metrics": {"success": True}, "steps": STEPS})
    try:
        await act(connection, 0, FAILING)
    except RuntimeError as error:
        failed = str(error)
    assert connection.is_connected
    await act(connection, 0)
    told = {"server": connection.server_info, "failed": failed, "steps": steps}
    print(json.dumps(told), flush=True)
    await asyncio.to_thread(input)  # the server is started anew meanwhile
    try:
        await act(connection, 1)
    except ConnectionClosed:  # it noticed only now
        await act(connection, 1)
    await connection.close()
    print("again", flush=True)


asyncio.run(main())
