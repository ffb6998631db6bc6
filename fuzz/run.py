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

sys.path.insert(0, str(Path(__file__).parent))

_LARGE = 8192  # bytes


def mutate(seeds: list[bytes], rng: random.Random) -> bytes:
    """One of the seeds, changed in one to eight places; seldom one that is large, and slow."""
    while len(data := bytearray(rng.choice(seeds))) > _LARGE and rng.random() > 0.005:
        pass
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del data[at : at + rng.choice((1, 1, 2, 4, 8, 16))]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8)))
        elif kind == 4:
            other = rng.choice(seeds)
            begin = rng.randrange(len(other) + 1)
            data[at:at] = other[begin : begin + rng.choice((2, 8, 32, 128))]
        elif kind == 5:
            begin = rng.randrange(len(data) + 1)
            data[at:at] = data[begin : begin + rng.choice((2, 8, 32, 128))]
        else:
            data = data[:at]
    return bytes(data)


def run_mutations(name: str, n: int) -> None:
    """Give a target n inputs, and tell how it went."""
    import targets

    raised = targets.watch_threads()
    target = targets.TARGETS[name]()
    seeds = target.seeds() + [
        path.read_bytes() for path in sorted(targets.CORPUS.glob(f"{name}-*"))
    ]
    rng = random.Random(time.time_ns())
    data = b""
    began = time.monotonic()
    for data in seeds:
        _take(target, name, data)
    before = _memory()
    for count in range(n):
        data = mutate(seeds, rng)
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


def _take(target: object, name: str, data: bytes) -> None:
    try:
        target.take(data)  # type: ignore[attr-defined]
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
    known = [path.read_bytes() for path in targets.CORPUS.glob(f"{name}-*")]
    for data in (*target.seeds(), *known):
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)
    atheris.Setup([sys.argv[0], *arguments, str(folder)], target.take)
    atheris.Fuzz()  # ends the process


def main() -> None:
    """See the module."""
    logging.disable(logging.CRITICAL)
    if len(sys.argv) < 2:
        import targets

        raise SystemExit(f"{__doc__}\nTargets: {', '.join(targets.TARGETS)}")
    name, arguments = sys.argv[1], sys.argv[2:]
    if arguments and all(Path(each).is_file() for each in arguments):
        run_files(name, arguments)
    elif arguments[:1] == ["--mutate"]:
        run_mutations(name, int(arguments[1]))
    else:
        run_atheris(name, arguments)


if __name__ == "__main__":
    main()
