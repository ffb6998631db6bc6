"""What fuzz/ holds: hostile messages that once did harm, and a short run on each target."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pairs import ROOT

FUZZ = ROOT / "fuzz"
sys.path.append(str(FUZZ))

import seeds  # noqa: E402
import targets  # noqa: E402
from spelling import respell  # noqa: E402

from edgeml import Malformed  # noqa: E402
from edgeml.core import Message, load_codec, unframe  # noqa: E402
from edgeml.core.frames import frame  # noqa: E402


def run(cwd: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, FUZZ / "run.py", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", targets.TARGETS)
def test_hostile_messages_and_what_chance_makes_of_them(name: str, tmp_path: Path) -> None:
    """Each is refused or taken, a good client is answered meanwhile, and no thread ends."""
    assert f"{name}: 1500 inputs" in run(tmp_path, name, "--mutate", "1500")


def test_a_short_run_that_is_led_by_what_it_reaches(tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris, of the extra fuzz, is not installed")
    assert "Done 1000 runs" in run(tmp_path, "decoder", "-runs=1000", "-max_len=512")


def test_a_find_is_kept_and_run_again(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['run.py', 'envelope', '--mutate', '10']\n"
        f"sys.path.insert(0, {str(FUZZ)!r})\n"
        "import run, targets\n"
        "def take(self, data): raise RuntimeError('a find')\n"
        "targets.Envelope.take = take\n"
        "run.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "RuntimeError: a find" in done.stderr
    (found,) = os.listdir(tmp_path)
    assert f"a find, in {found}" in done.stdout
    run(tmp_path, "envelope", found)


def test_the_seeds_are_as_many_sorts_as_they_say() -> None:
    codec = load_codec("msgpack")
    taken = refused = 0
    for message in seeds.payloads():
        try:
            value = codec.decode(message)
        except Malformed:
            refused += 1
        else:
            taken += 1
            again = codec.encode(value)
            assert frame(again) == frame(respell(message))
    assert taken > 30
    assert refused > 30
    harmless = 0
    for message in seeds.hostile_payloads():
        try:
            codec.decode(message)
        except Malformed:
            continue
        harmless += 1
    assert harmless <= 4  # such as are a lot, and just not too much


def test_another_spelling_is_told_from_the_one() -> None:
    """Or the decoder's target would find nothing."""
    for wrong, right in (
        (b"\xcd\x00\x01", b"\x01"),
        (b"\xca\x3f\x80\x00\x00", b"\xcb\x3f\xf0" + bytes(6)),
        (b"\xc7\x03\x06\x92\x02\x01", b"\xc7\x03\x06\x92\x01\x02"),
        (b"\x82\xa1a\x01\xa1a\x02", b"\x81\xa1a\x02"),
    ):
        assert respell(Message(wrong)).header == right
    kept = unframe(frame(Message(b"\xd6\x04" + bytes(4), [memoryview(bytes(9000))])))
    assert respell(kept).buffers == kept.buffers
