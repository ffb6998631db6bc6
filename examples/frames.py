"""Where a video stream's frames come from, and where they go.

A frame is RGB, uint8, of shape (height, width, 3). OpenCV, whose frames are BGR, is imported only
by what needs it, and gymnasium only to render.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
Size = tuple[int, int]  # width, height


def import_cv2() -> Any:
    """Return the module cv2, or end the program with a word on how to get it."""
    try:
        import cv2
    except ImportError:
        raise SystemExit('This needs OpenCV: pip install -e ".[examples]"') from None
    return cv2


# Sources ----------------------------------------------------------------------------------


class Source(ABC):
    """Gives frame after frame.

    Attributes:
        name: for people.
        fps: the rate that it was made for.
    """

    name: str
    fps: float

    @abstractmethod
    def read(self) -> Frame:
        """Return the next frame."""

    def close(self) -> None:  # noqa: B027 - not every source holds something
        """Free what it holds."""


class ColourBars(Source):
    """Colour bars that move by some pixels with each frame."""

    COLOURS = ("ffffff", "ffff00", "00ffff", "00ff00", "ff00ff", "ff0000", "0000ff", "000000")

    def __init__(self, size: Size, fps: float) -> None:
        width, height = size
        bar = np.arange(width) * len(self.COLOURS) // width
        colours = np.array([[*bytes.fromhex(colour)] for colour in self.COLOURS], np.uint8)
        self._bars = np.tile(colours[bar], (height, 1, 1))
        self._shift = 0
        self.name, self.fps = "test pattern", fps

    def read(self) -> Frame:
        self._shift += 4
        return np.roll(self._bars, self._shift, axis=1)


class Simulation(Source):
    """A MuJoCo environment whose robot swings its joints."""

    def __init__(self, env: str, size: Size, fps: float) -> None:
        # It has to be chosen before MuJoCo is imported, whose default needs a screen.
        if sys.platform == "linux" and not has_screen():
            os.environ.setdefault("MUJOCO_GL", "egl")
        import gymnasium

        width, height = size
        self._env: Any = gymnasium.make(env, render_mode="rgb_array", width=width, height=height)
        self._env.reset(seed=0)
        self._steps = 0
        self.name, self.fps = env, fps
        try:
            self._env.render()  # a machine that can't render shows it here
        except BaseException:
            self._env.close()
            raise

    def read(self) -> Frame:
        self._steps += 1
        space = self._env.action_space
        phase = np.arange(space.shape[0]) + 0.1 * self._steps
        action = 0.5 * space.high * np.sin(phase)
        _, _, terminated, truncated, _ = self._env.step(action.astype(space.dtype))
        if terminated or truncated:
            self._env.reset()
        frame: Frame = self._env.render()
        return frame

    def close(self) -> None:
        self._env.close()


class Capture(Source):
    """A camera, by its number, or a video file, which is repeated endlessly."""

    def __init__(self, what: int | str, size: Size | None, fps: float | None) -> None:
        self._cv2 = cv2 = import_cv2()
        self._size = size
        self._is_file = isinstance(what, str)
        self.name = Path(what).name if isinstance(what, str) else f"camera {what}"
        self._capture = cv2.VideoCapture(what)
        if not self._capture.isOpened():
            raise SystemExit(f"cannot open {self.name}")
        if not self._is_file:
            self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # fresh frames rather than queued ones
            if size:
                self._capture.set(cv2.CAP_PROP_FRAME_WIDTH, size[0])
                self._capture.set(cv2.CAP_PROP_FRAME_HEIGHT, size[1])
            if fps:
                self._capture.set(cv2.CAP_PROP_FPS, fps)
        self.fps = fps or self._capture.get(cv2.CAP_PROP_FPS) or 30.0

    def read(self) -> Frame:
        cv2 = self._cv2
        ok, frame = self._capture.read()
        if not ok and self._is_file:
            self._capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
            ok, frame = self._capture.read()
        if not ok:
            raise SystemExit(f"{self.name} gives no more frames")
        if self._size and frame.shape[1::-1] != self._size:
            frame = cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)
        rgb: Frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        return rgb

    def close(self) -> None:
        self._capture.release()


DEFAULT_ENV = "InvertedPendulum-v5"


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add what `open_source` reads."""
    group = parser.add_argument_group("server: what to stream")
    what = group.add_mutually_exclusive_group()
    what.add_argument("--camera", type=int, metavar="N", help="a camera, the first one being 0")
    what.add_argument("--video", metavar="PATH", help="a video file, repeated")
    what.add_argument(
        "--env",
        help=f"a MuJoCo environment of gymnasium's (the default: {DEFAULT_ENV}, or the test "
        "pattern where nothing can be rendered)",
    )
    what.add_argument("--pattern", action="store_true", help="a moving test pattern")
    group.add_argument(
        "--size",
        type=_size,
        metavar="WxH",
        help="in pixels (default: the camera's or the video's own, else 640x480)",
    )


def _size(text: str) -> Size:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 640x480")
    return int(match[1]), int(match[2])


def open_source(args: argparse.Namespace, fps: float | None) -> Source:
    """Return the source that the command line asks for."""
    if args.camera is not None:
        return Capture(args.camera, args.size, fps)
    if args.video is not None:
        return Capture(args.video, args.size, fps)
    size, fps = args.size or (640, 480), fps or 30.0
    if not args.pattern:
        try:
            return Simulation(args.env or DEFAULT_ENV, size, fps)
        except Exception as error:  # by what lies between gymnasium and the GPU: of any kind
            problem = f"cannot render {args.env or DEFAULT_ENV}: {type(error).__name__}: {error}"
            if args.env:
                raise SystemExit(problem) from None
            hint = "MUJOCO_GL=egl, osmesa or glfw may help; streaming a test pattern instead"
            print(f"{problem}\n{hint}", file=sys.stderr)
    return ColourBars(size, fps)


# Sinks ------------------------------------------------------------------------------------


class Sink:
    """Takes frames; this one ignores them."""

    name = "nowhere"

    def write(self, number: int, frame: Frame) -> None:
        """Take a frame."""

    def key(self) -> str:
        """Return the key that was pressed since the last time, if any."""
        return ""

    def close(self) -> None:
        """Finish what was written."""


class Window(Sink):
    """Shows frames on the screen. To be used by the main thread only."""

    name = "a window"

    def __init__(self, title: str) -> None:
        self._cv2 = cv2 = import_cv2()
        self._title = title
        cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)

    def write(self, number: int, frame: Frame) -> None:
        self._cv2.imshow(self._title, self._cv2.cvtColor(frame, self._cv2.COLOR_RGB2BGR))

    def key(self) -> str:
        """Return the key that was pressed, after a moment for the window to draw itself."""
        code: int = self._cv2.waitKey(1)
        return chr(code & 0xFF) if code >= 0 else ""

    def close(self) -> None:
        self._cv2.destroyAllWindows()


class VideoFile(Sink):
    """Writes an mp4."""

    def __init__(self, path: Path, fps: float) -> None:
        self._cv2 = import_cv2()
        self._path, self._fps = path, fps
        self._size: Size | None = None
        self._writer: Any = None
        self.name = str(path)

    def write(self, number: int, frame: Frame) -> None:
        """Append a frame; the first one decides the size."""
        cv2 = self._cv2
        if self._size is None:
            self._size = (frame.shape[1], frame.shape[0])
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self._path), codec, self._fps, self._size)
            if not self._writer.isOpened():
                raise SystemExit(f"cannot write {self._path}")
        frame = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        # OpenCV drops frames of another size without a word.
        self._writer.write(cv2.resize(frame, self._size))

    def close(self) -> None:
        """Write the end, without which players refuse the file."""
        if self._writer is not None:
            self._writer.release()


class Folder(Sink):
    """Writes a picture for each frame, named by its number."""

    def __init__(self, path: Path) -> None:
        self._cv2 = import_cv2()
        self._path = path
        path.mkdir(parents=True, exist_ok=True)
        self.name = f"{path}{os.sep}"

    def write(self, number: int, frame: Frame) -> None:
        bgr = self._cv2.cvtColor(frame, self._cv2.COLOR_RGB2BGR)
        if not self._cv2.imwrite(str(self._path / f"frame_{number:06}.png"), bgr):
            raise SystemExit(f"cannot write to {self._path}")


def has_screen() -> bool:
    """Whether there is a screen to open a window on."""
    # To be asked first: without one, OpenCV built with Qt aborts the whole process.
    return sys.platform != "linux" or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )


def open_sink(output: str | None, title: str, fps: float) -> Sink:
    """Return a video file, a folder, or nothing for "none"; by default a window or a video file."""
    if output == "none":
        return Sink()
    if output is None and has_screen():
        try:
            return Window(title)
        except import_cv2().error:  # opencv-python-headless has no windows
            pass
    path = Path(output or "action_streamer.mp4")
    return VideoFile(path, fps) if path.suffix == ".mp4" else Folder(path)
