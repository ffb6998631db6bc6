"""What a `Stopwatch` counts: what passes, but for what the machine kept the process waiting."""

import signal
import time

from edgeml.testing.stopwatch import Stopwatch
from pairs import process

FROZEN = """
import time
from edgeml.testing.stopwatch import Stopwatch
watch, began = Stopwatch(), time.monotonic()
print("began")
while (passed := time.monotonic() - began) < 2.0:
    time.sleep(0.01)
print(passed, watch.seconds)
"""


def test_it_counts_what_a_wait_takes():
    watch = Stopwatch()
    time.sleep(0.3)
    assert 0.1 < watch.seconds <= 1.0


def test_it_does_not_count_while_the_process_stands_still():
    with process(FROZEN) as frozen:
        assert frozen.line() == "began"
        frozen.signal(signal.SIGSTOP)
        time.sleep(2.0)
        frozen.signal(signal.SIGCONT)
        passed, seconds = map(float, frozen.line().split())
        assert seconds < passed - 1.0
        assert frozen.end() == (0, "")
