"""Fuzz a target: ``python fuzz/run.py decoder -runs=100000``; say none to see which there are.

Further arguments are libFuzzer's, such as ``-max_total_time=600`` and ``-max_len=4096``; what leads
it further it keeps in ``corpus-decoder/``, from which the next run begins. With ``--mutate N`` no
atheris is needed: N inputs are made from the seeds by chance, which is faster and sees less. An
input that is a find is written to a file, and is run again by ``python fuzz/run.py decoder FILE``;
once it is mended the file goes into ``fuzz/corpus/``, as ``decoder-WHAT``.
"""

from __future__ import annotations

import hashlib
import logging
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))


def run_mutations(name: str, n: int) -> None:
    """Give a target n inputs, and tell how it went."""
    import targets
    from mutations import make

    raised = targets.watch_threads()
    target = targets.TARGETS[name]()
    messages = target.messages()
    headers = [message.header for message in messages]
    rng = random.Random(time.time_ns())
    data = b""
    began = time.monotonic()
    for data in _seeds(name, target):
        _take(target, name, data)
    before = _memory()
    for count in range(n):
        data = make(target, messages, headers, rng)
        _take(target, name, data)
        if raised:
            raise SystemExit(
                f"a thread ended: {raised[0].exc_value!r}; the last was {_keep(name, data)}"
            )
        if count % 100_000 == 99_999:
            print(f"{name}: {count + 1}, {_memory() - before:+} MB", flush=True)
    target.close()
    seconds = time.monotonic() - began
    print(f"{name}: {n} inputs in {seconds:.0f} s, memory {_memory() - before:+} MB", flush=True)


def _seeds(name: str, target: Any) -> list[bytes]:
    """What a target really gets, and what once was a find."""
    import targets

    found = [path.read_bytes() for path in sorted(targets.CORPUS.glob(f"{name}-*"))]
    return [target.wrap(message) for message in target.messages()] + found


def _take(target: Any, name: str, data: bytes) -> None:
    try:
        target.take(data)
    except BaseException:
        print(f"{name}: a find, in {_keep(name, data)}", flush=True)
        raise


def _keep(name: str, data: bytes) -> Path:
    path = Path(f"{name}-{hashlib.sha256(data).hexdigest()[:16]}")
    path.write_bytes(data)
    return path


def _memory() -> int:
    """Megabytes that the process takes up now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20


def run_files(name: str, paths: list[str]) -> None:
    """Give a target what files hold."""
    import targets

    target = targets.TARGETS[name]()
    for path in paths:
        _take(target, name, Path(path).read_bytes())
    target.close()


def run_atheris(name: str, arguments: list[str]) -> None:
    """Let libFuzzer choose the inputs by the lines that they reach."""
    import atheris

    with atheris.instrument_imports(include=["edgeml", "edgeml_websocket"]):
        import targets
    target = targets.TARGETS[name]()
    folder = Path(f"corpus-{name}")  # in which it also keeps what leads it further
    folder.mkdir(exist_ok=True)
    for data in _seeds(name, target):
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)
    atheris.Setup([sys.argv[0], *arguments, str(folder)], target.take)
    atheris.Fuzz()  # ends the process


def main() -> None:
    """See the module."""
    logging.disable(logging.CRITICAL)
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        import targets

        print(f"{__doc__}\nTargets: {', '.join(targets.TARGETS)}")
        return
    name, arguments = sys.argv[1], sys.argv[2:]
    if arguments and all(Path(each).is_file() for each in arguments):
        run_files(name, arguments)
    elif arguments[:1] == ["--mutate"]:
        run_mutations(name, int(arguments[1]))
    else:
        run_atheris(name, arguments)


if __name__ == "__main__":
    main()
