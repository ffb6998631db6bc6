"""Many slow subscribers of something large: does memory stay as it is?"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

from .processes import Process, Zygote

_GROUP = 10  # subscribers in a process
_WARM = 10  # publications that each has had before memory counts
_GROWTH = 0.05


def watch(
    transport: str, subscribers: int, nbytes: int, hz: float, pause: float, seconds: float
) -> list[str]:
    """Publish to slow subscribers for so long, once it has warmed up; returns what is wrong."""
    at = "shm://" if transport == "shm" else f"{transport}://127.0.0.1:0"
    samples: list[tuple[float, float]] = []
    with Zygote() as zygote:
        if transport == "shm":
            at = f"shm:///tmp/slow-{zygote.process.pid}"
        publisher = zygote.start("publisher", url=at, nbytes=nbytes, hz=hz)
        url = publisher.hear()
        groups = [
            zygote.start("subscribers", url=url, count=min(_GROUP, subscribers - n), seconds=pause)
            for n in range(0, subscribers, _GROUP)
        ]
        for group in groups:
            group.hear()
        print(
            f"{transport}: {subscribers} subscribers that take {pause:g} s over each of "
            f"{nbytes / 1e6:g} MB, published at {hz:g} Hz\n"
            f"{'time s':>8}{'published/s':>13}{'received/s':>12}{'publisher MB':>14}"
            f"{'subscribers MB':>16}{'all MB':>9}"
        )
        began, wrong = time.monotonic(), ""
        before = (0.0, publisher.ask(do="counts"), 0)
        end = _WARM * pause + seconds
        while (now := time.monotonic() - began) < end:
            time.sleep(min(max(2.0, end / 30), max(0.0, end - now)))
            now = time.monotonic() - began
            told = [group.ask(do="counts") for group in groups]
            counts = now, publisher.ask(do="counts"), sum(t.get("publications", 0) for t in told)
            passed = now - before[0]
            own, all_groups = _share(publisher), sum(map(_share, groups))
            if now > _WARM * pause:
                samples.append((own / 1e6, (own + all_groups) / 1e6))
            print(
                f"{now:>8.0f}{(counts[1] - before[1]) / passed:>13.1f}"
                f"{(counts[2] - before[2]) / passed:>12.1f}{own / 1e6:>14.1f}"
                f"{all_groups / 1e6:>16.1f}{(own + all_groups) / 1e6:>9.1f}",
                flush=True,
            )
            before = counts
            wrong = ", ".join(
                f"{n} {what}"
                for what in ("not newer", "spoilt")
                if (n := sum(t.get(what, 0) for t in told))
            )
    found = [wrong] if wrong else []
    some = max(1, len(samples) // 4)
    for name, values in zip(("publisher", "all"), zip(*samples, strict=True), strict=True):
        first, last = median(values[:some]), median(values[-some:])
        print(f"{name}: {first:.1f} to {last:.1f} MB, {last / first - 1:+.1%}")
        if last > first * (1 + _GROWTH):
            found.append(f"{transport}: memory of {name} grows")
    return found


def _share(process: Process) -> int:
    """Bytes of memory; what several processes map is shared among them."""
    for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return 0
