"""The video streamer, server and client in two processes over zmq."""

from __future__ import annotations

import argparse
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgeml import ActionClient, ActionServer, RemoteError
from example_program import EXAMPLES, Example
from pairs import started, wait_until

NAME = "action_streamer.py"
PATTERN = ("--pattern", "--size", "160x120", "--fps", 60)
SUMMARY = (
    r"(\d+) frames in [\d.]+ s: [\d.]+ fps, [\d.]+ MB/s of pixels, latency (-?[\d.]+) ms "
    r"\(p95 -?[\d.]+ ms\), \d+ dropped; written to "
)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    return partial(Example, NAME, cwd=tmp_path)


@pytest.fixture(autouse=True)
def examples_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def pictures(folder: Path) -> dict[int, Any]:
    """Return the pictures of a folder as RGB, by the number in their names."""
    found = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"frame_(\d{6})\.png", path.name)
        assert match, path
        found[int(match[1])] = cv2.imread(str(path))[..., ::-1]
    return found


def video(path: Path) -> list[Any]:
    """Return the frames of a video as RGB."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(read[1][..., ::-1])
    capture.release()
    return frames


def bars(count: int) -> list[Any]:
    """Return the first frames of the test pattern."""
    from frames import ColourBars

    source = ColourBars((160, 120), 60)
    return [source.read() for _ in range(count)]


def difference(a: Any, b: Any) -> float:
    return float(np.mean(np.abs(a.astype(int) - b.astype(int))))


def test_raw_frames_arrive_as_they_were_and_ctrl_c_ends_the_server(
    run: Any, tmp_path: Path
) -> None:
    with run("--server", "--port", 0, *PATTERN) as server:
        port = server.port()
        with run("--client", "--port", port, "--frames", 5, "--output", "shots") as client:
            printed = client.end()
        match = re.search(SUMMARY, printed)
        assert match, printed
        assert match[1] == "5"
        assert -5 < float(match[2]) < 1000
        shots = pictures(tmp_path / "shots")
        assert len(shots) == 5
        expected = bars(max(shots))
        for number, shot in shots.items():
            np.testing.assert_array_equal(shot, expected[number - 1])
        server.interrupt()
        assert "streamed" in server.end()


def test_jpeg_frames_become_an_mp4_which_ctrl_c_finishes(run: Any, tmp_path: Path) -> None:
    with run("--server", "--port", 0, "--jpeg", 90, *PATTERN) as server:
        port = server.port()
        with run("--client", "--port", port, "--frames", 20, "--output", "some.mp4") as client:
            client.end()
        with run("--client", "--port", port) as client:  # no screen: an mp4 is the default
            client.until(r"frames, [\d.]+ fps")
            client.interrupt()
            match = re.search(SUMMARY, client.end())
        server.interrupt()
        server.end()
    some = video(tmp_path / "some.mp4")
    assert len(some) == 20
    assert match
    assert len(video(tmp_path / "action_streamer.mp4")) == int(match[1]) >= 2
    # The pattern repeats after 40 frames, so one of them must look like this one.
    assert min(difference(some[-1], frame) for frame in bars(40)) < 10
    assert min(difference(some[-1][..., ::-1], frame) for frame in bars(40)) > 30


def test_a_video_file_is_repeated_at_its_own_rate(run: Any, tmp_path: Path) -> None:
    red_and_blue = np.zeros((48, 64, 3), np.uint8)
    red_and_blue[:, :32, 2] = red_and_blue[:, 32:, 0] = 255  # BGR, as OpenCV has it
    writer = cv2.VideoWriter(
        str(tmp_path / "in.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 50, (64, 48)
    )
    for _ in range(6):
        writer.write(red_and_blue)
    writer.release()
    with run("--server", "--port", 0, "--video", "in.mp4") as server:
        port = server.port()
        with run("--client", "--port", port, "--frames", 20, "--output", "shots") as client:
            printed = client.end()
        server.interrupt()
        server.end()
    match = re.search(r"in [\d.]+ s: ([\d.]+) fps", printed)
    assert match
    assert float(match[1]) < 60
    shots = pictures(tmp_path / "shots")
    assert len(shots) == 20
    for shot in shots.values():
        assert difference(shot, red_and_blue[..., ::-1]) < 12


def test_a_simulated_robot_moves(run: Any, tmp_path: Path) -> None:
    with run("--server", "--port", 0, "--size", "160x120", "--fps", 30) as server:
        port = server.port()
        if "cannot render" in server.printed:
            pytest.skip(server.printed)
        with run("--client", "--port", port, "--frames", 10, "--output", "shots") as client:
            client.end()
        server.interrupt()
        server.end()
    shots = [*pictures(tmp_path / "shots").values()]
    assert difference(shots[0], shots[-1]) > 0
    red, green, blue = np.moveaxis(shots[0], -1, 0)
    assert np.sum((red > 90) & (green > 90) & (blue < 60)) > 50  # the cart is yellow


def test_where_nothing_renders_the_test_pattern_is_streamed(run: Any) -> None:
    with run("--server", "--port", 0, MUJOCO_GL="nonsense") as server:
        server.port()
        assert "streaming a test pattern instead" in server.printed
        server.interrupt()
        server.end()
    with run("--server", "--port", 0, "--env", "NoSuchEnv-v0") as server:
        assert "cannot render NoSuchEnv-v0" in server.end(code=1)


def test_the_server_takes_orders(run: Any) -> None:
    from action_streamer import make_config

    with run("--server", "--port", 0, *PATTERN) as server:
        config = make_config(argparse.Namespace(port=server.port(), transport=None))
        with ActionClient("127.0.0.1", config=config) as client:

            def newest() -> int:
                return int(client.obs(["frame"])["frame"].get("seq", 0))

            assert client.act("set_fps", {"fps": 200}) == {"fps": 200, "paused": False}
            wait_until(lambda: newest() > 3)
            assert client.act("pause")["paused"] is True
            # A frame may be under way still; when the server says so, it is at rest.
            count = int(server.until(r"paused after (\d+) frames")[1])
            assert newest() == count
            assert client.act("pause", {"paused": False})["paused"] is False
            wait_until(lambda: newest() > count)
            with pytest.raises(RemoteError, match="fps must be within 1 and 1000, not 0"):
                client.act("set_fps", {"fps": 0})
            assert client.obs(["stream"])["stream"]["source"] == "test pattern"
        server.interrupt()
        assert re.search(r"act.* failed for .*127\.0\.0\.1: ValueError: fps must be", server.end())


def test_errors_are_one_line(run: Any, tmp_path: Path) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError")
    with (
        run("--client", "--port", 1) as nobody,
        run("--client", "--port", 1, "--output", "no/video.mp4") as no_folder,
        run("--server", "--video", "no.mp4") as no_file,
        run("--server", "--video", "no.mp4", PYTHONPATH=str(tmp_path)) as no_opencv,
        run("--server", "--fps", 0) as no_rate,
        run("--help") as help,
    ):
        assert re.search(
            r"error: nobody answers at zmq://127\.0\.0\.1:1.*; start action_streamer\.py --server "
            r"there, with --host 0\.0\.0\.0",
            nobody.end(code=1),
        )
        assert "--output no/video.mp4 cannot be written: No such file" in no_folder.end(code=1)
        assert "cannot open no.mp4" in no_file.end(code=1)
        assert 'This needs OpenCV: pip install -e ".[examples]"' in no_opencv.end(code=1)
        assert "--fps" in no_rate.end(code=2)
        printed = help.end()
        for option in ("--server", "--client", "--ip", "--host", "--port", "--transport"):
            assert option in printed


def test_a_server_that_is_lost_is_told(run: Any) -> None:
    with run("--server", "--port", 0, *PATTERN) as server:
        port = server.port()
        with run("--client", "--port", port, "--output", "some.mp4") as client:
            client.until(r"frames, [\d.]+ fps")
            server.kill()
            client.until(r"no frames for \d+ s: .*zmq://127\.0\.0\.1")
            client.interrupt()
            assert re.search(SUMMARY + r"some\.mp4", client.end())


def test_a_client_to_which_no_frame_came_does_not_claim_to_have_written_any(run: Any) -> None:
    from action_streamer import make_config

    def answer(keys: list[str]) -> dict[str, Any]:
        stream = {"source": "a robot that sees nothing", "fps": 30.0, "paused": False}
        known = {"frame": {}, "clock": time.monotonic(), "stream": stream}
        return {key: known[key] for key in keys}

    config = make_config(argparse.Namespace(port=0, transport=None))
    with started(ActionServer(config, answer, lambda key, payload: {})) as server:
        silent = ("--client", "--port", server.port, "--output", "none", "--seconds", 1)
        with run(*silent) as client:
            printed = client.end(code=1)
    assert "no frames came within 1 s" in printed
    assert "written" not in printed


def test_dropped_frames_are_counted_by_their_numbers() -> None:
    from action_streamer import Meter

    meter = Meter()
    for number in (7, 8, 11, 1, 2):  # two were dropped; then the server was started anew
        meter.add(float(number), number, 100)
    assert meter.dropped == 2
    assert meter.frames == 5


def test_latency_is_told_between_clocks_that_differ() -> None:
    from action_streamer import RemoteClock

    class Server:
        ahead = 1000.0

        def obs(self, keys: list[str], timeout: float) -> dict[str, float]:
            assert keys == ["clock"]
            return {"clock": time.monotonic() + self.ahead}

    server: Any = Server()
    clock = RemoteClock(server)
    now = time.monotonic()
    assert clock.age(taken=now + 1000.0, arrived=now + 0.5) == pytest.approx(0.5, abs=0.01)
    server.ahead = -3.0  # the server's machine was restarted
    clock.measure()
    assert clock.age(taken=now - 3.0, arrived=now + 0.5) == pytest.approx(0.5, abs=0.01)


def test_without_windows_or_a_screen_a_video_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from frames import Sink, VideoFile, open_sink

    monkeypatch.chdir(tmp_path)
    assert type(open_sink("none", "title", 30.0)) is Sink
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert isinstance(open_sink(None, "title", 30.0), VideoFile)
    if re.search(r"GUI:\s+NONE", cv2.getBuildInformation()):
        monkeypatch.setenv("DISPLAY", ":0")
        assert isinstance(open_sink(None, "title", 30.0), VideoFile)
