"""The batcher: takes calls as they come, and answers many of them by one run of a function."""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgeml.core.alarms import Alarm
from edgeml.core.dispatch import Call, Caller, Gatherer, Turns
from edgeml.core.errors import Closed, DeadlineExceeded, EdgemlError
from edgeml.core.pace import OVERTAKEN, overtaken
from edgeml.core.transport import Endpoint
from edgeml.services.batching.patience import Costs, Patience
from edgeml.services.batching.stack import Layout, Stack, flatten, split
from edgeml.services.checks import Checks
from edgeml.services.functions import Function, context_of, rehearsed

__all__ = ["Batcher", "Batching"]

_LONG = 1e-3  # seconds of a batch beside which it pays to have another thread bring calls
_MOST_LAYOUTS = 16  # whose costs are remembered
_MOST_SIZE = 1 << 16


@dataclass(frozen=True)
class Batching:
    """How the calls of an interface are put together.

    Attributes:
        max_size: calls in a batch, at most.
        max_delay: seconds that a call may wait for others to fill its batch. With 0.0 a lone
            client waits for nobody, and what came while the last batch ran is the next at once; but
            clients that were just answered are waited for where it pays, for as long as it pays,
            by what batches have cost so far and how soon these clients have come back.
        sizes: to which batches are padded, so that a function which is compiled for each size is
            compiled for a few only: "pow2" for powers of two and ``max_size``, "any" for no
            padding, or the sizes themselves.

    Raises:
        ValueError: what contradicts itself.
    """

    max_size: int = 32
    max_delay: float = 0.0
    sizes: Literal["pow2", "any"] | Sequence[int] = "pow2"

    def __post_init__(self) -> None:
        if type(self.max_size) is not int or not 1 <= self.max_size <= _MOST_SIZE:
            raise ValueError(f"max_size must be 1 to {_MOST_SIZE}, not {self.max_size!r}")
        if not 0 <= self.max_delay < float("inf"):
            raise ValueError(f"max_delay must be 0 or more seconds, not {self.max_delay!r}")
        if isinstance(self.sizes, str):
            if self.sizes not in ("pow2", "any"):
                raise ValueError(f'sizes is "pow2", "any" or a list of sizes, not {self.sizes!r}')
        else:
            given = tuple(self.sizes)
            if not all(type(size) is int and 1 <= size <= self.max_size for size in given):
                raise ValueError(f"sizes must be 1 to max_size, {self.max_size}, not {given!r}")
            if self.max_size not in given:
                raise ValueError(
                    f"sizes {given!r} has no {self.max_size}, which is max_size: no batch of more "
                    f"than {max(given, default=0)} could be padded"
                )
            object.__setattr__(self, "sizes", tuple(sorted(set(given))))

    def all_sizes(self) -> list[int]:
        """Return every size that a batch may have, padding included, in ascending order."""
        if self.sizes == "any":
            return list(range(1, self.max_size + 1))
        if self.sizes == "pow2":
            return [1 << i for i in range(self.max_size.bit_length()) if 1 << i < self.max_size] + [
                self.max_size
            ]
        return [int(size) for size in self.sizes]


class _Batch:
    """Calls that are stacked, and wait for the others or for their turn."""

    def __init__(self, stack: Stack, checks: Checks | None = None) -> None:
        self.stack = stack
        self.checks = checks  # by which its payloads were checked
        self.calls: list[Call] = []
        self.since = time.monotonic()

    def select(self, rows: list[int]) -> _Batch:
        """Return copies of some rows, as a batch of its own."""
        other = _Batch(self.stack.select(rows), self.checks)
        other.calls = [self.calls[row] for row in rows]
        return other

    def keep(self, rows: list[int]) -> None:
        """Let go of all rows but these."""
        if len(rows) == len(self.calls):
            return
        for target, source in enumerate(rows):
            if target != source:
                self.stack.copy_row(source, target)
        self.calls = [self.calls[row] for row in rows]


_Refusal = tuple[Call, Exception, str]
"""A call that waits no longer, why, and what to count it by, if it was for want of time."""


def _overtaken(call: Call) -> _Refusal:
    return call, overtaken(call), OVERTAKEN


class Batcher(Gatherer):
    """Answers calls in batches.

    A call is stacked in the thread that brings it, while the last batch runs. Of each client one
    call at a time is stacked, and the rest is taken in turn with those of others as room is left.

    Args:
        function: gets a batch, and where it is told of calls a list of their contexts, without any
            for padding.
        batching: how calls are put together.
        newest_first: whether of a client's calls the newest is answered first.

    Attributes:
        function: the newest version; the next batch runs by it.
    """

    def __init__(self, function: Function, batching: Batching, newest_first: bool = False) -> None:
        self.function = function
        self._newest_first = newest_first
        self._max_size = batching.max_size
        self._max_delay = batching.max_delay
        self._sizes = batching.all_sizes()
        self._size_of = [0]
        for size in self._sizes:  # of each number of calls, the size to which they are padded
            self._size_of += [size] * (size + 1 - len(self._size_of))

        self._turns: Turns
        self._lock = threading.Lock()
        self._batches: deque[_Batch] = deque()  # in the order in which they are to run
        self._newest: dict[Layout, _Batch] = {}  # of them, where the next call of a layout goes
        self._lines: dict[Caller, deque[Call]] = {}  # what else those wait for who are in a batch
        self._waiting = 0  # calls
        self._source: Endpoint | None = None  # which brought the last one
        self._asked = False  # for a turn, which has not ended
        self._asked_at = 0.0  # when, ...
        self._gap = 0.0  # ... seconds until it came, of late, ...
        self._free_at = 0.0  # ... and when it is to end
        self._runs = 0
        # Which run answered them last.
        self._served: weakref.WeakKeyDictionary[Caller, int] = weakref.WeakKeyDictionary()
        self._closed = False
        self._alarm: Alarm | None = None  # that looks again, ...
        self._alarm_at = 0.0  # ... and when
        self._costs: OrderedDict[Layout, Costs] = OrderedDict()
        self._costs_now = Costs()
        self._patience = Patience(lambda rows: self._costs_now.of(self._pad(rows)))

    def _pad(self, rows: int) -> int:
        return self._size_of[min(rows, self._max_size)]

    # Calls come, in any thread ------------------------------------------------------------

    def attach(self, turns: Turns) -> None:
        """See `Gatherer.attach`."""
        self._turns = turns

    def take(self, call: Call) -> None:
        """See `Gatherer.take`."""
        failure: Exception | None = None
        refused: list[_Refusal] = []
        with self._lock:
            if self._closed:
                failure = Closed("the server has been stopped")
            else:
                now = time.monotonic()
                self._patience.arrive(call.caller, now)
                try:
                    refused = self._put(call, now)
                except Exception as error:
                    failure = error
                self._source = call.source
                if not self._asked:
                    self._look()
        if failure is not None:  # not under the lock, since the answer is sent at once
            self._refuse(call, failure)
        for each in refused:
            self._refuse(*each)

    def _put(self, call: Call, now: float) -> list[_Refusal]:
        """Have a call wait; returns those that wait no longer, it among them; under the lock."""
        line = self._lines.get(call.caller)
        pace, pressed = self._turns.pace, self._turns.pressed
        refused: list[_Refusal] = []
        if pressed and self._newest_first and line is not None:
            refused = [_overtaken(each) for each in line]
            self._waiting -= len(refused)
            line.clear()
        else:
            full = self._waiting // self._max_size  # batches that come before it
            ahead = max(0.0, self._free_at - now) + full * (pace.usual + self._gap)
            left = call.deadline - now - ahead
            if pace.rules_out(left, now) or (pressed and full and pace.is_risky(call, left, ahead)):
                other = call
                if line is None and full:
                    other = self._replace(call)
                return [(other, *pace.refusal(other, now, ahead))]
        if line is not None:
            line.append(call)
        else:
            self._place(call)
            self._lines[call.caller] = deque()
        self._waiting += 1
        return refused

    def _replace(self, call: Call) -> Call:
        """Give a call the place of one whose client was answered later; who has none then."""
        batch, served = self._batches[-1], self._served
        rows = [row for row, each in enumerate(batch.calls) if not self._lines[each.caller]]
        row = max(rows, key=lambda row: served.get(batch.calls[row].caller, 0), default=-1)
        if row < 0:
            return call
        other = batch.calls[row]
        ours = served.get(call.caller, 0)
        if served.get(other.caller, 0) <= ours or not self._overwrite(batch, row, call):
            return call
        del self._lines[other.caller]
        self._lines[call.caller] = deque()
        return other

    def _refuse(self, call: Call, error: Exception, reason: str = "") -> None:
        if isinstance(error, Closed) or reason:
            assert isinstance(error, EdgemlError)
            self._turns.refuse(call, error, reason)
        elif self._turns.begin(call):  # or it is too late, of which it has been told
            self._turns.fail(call, error)

    def _place(self, call: Call) -> _Batch:
        """Stack a call into the newest batch of its layout; under the lock."""
        payload = call.payload()
        checks = self.function.checks
        if checks is not None:
            checks.check_payload(call, payload)
        layout, leaves = flatten(payload)
        batch = self._newest.get(layout)
        if batch is None or len(batch.calls) == self._max_size or batch.checks is not checks:
            batch = _Batch(Stack(layout, self._max_size), checks)
            self._batches.append(batch)
            self._newest[layout] = batch
        batch.stack.write(len(batch.calls), leaves)
        batch.calls.append(call)
        call.drop_payload()
        return batch

    def has_enough(self) -> bool:
        """See `Gatherer.has_enough`."""
        return self._waiting >= self._max_size

    def _look(self) -> None:
        """Ask for a turn if one is due, or look again when it may be; under the lock."""
        if not self._batches or self._closed:
            return
        if self._waiting < self._max_size:
            due = self._batches[0].since + self._max_delay if self._max_delay else 0.0
            if self._waiting < self._patience.wanted:
                due = max(due, self._patience.until)
            if due and (left := due - time.monotonic()) > 0:
                if self._alarm is None or self._alarm_at > due:
                    self._alarm_at = due
                    self._alarm = self._turns.after(left, self._look_again)
                return
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._asked = True
        self._asked_at = time.monotonic()
        self._turns.ask(self._source)

    def _look_again(self) -> None:
        with self._lock:
            self._alarm = None
            if not self._asked:
                self._look()

    # A turn, in the handlers' thread -------------------------------------------------------

    def run(self) -> None:
        """See `Gatherer.run`."""
        answered: list[Caller] = []
        try:
            with self._lock:
                now = time.monotonic()
                self._gap += (now - self._asked_at - self._gap) / 4
                self._free_at = now + self._turns.pace.usual
                batch, refused = self._next(now)
            for each in refused:
                self._refuse(*each)
            if batch is not None:
                answered = [call.caller for call in batch.calls]
                batch.keep([i for i, call in enumerate(batch.calls) if self._turns.begin(call)])
                if batch.calls:
                    self._run(batch)
        finally:
            with self._lock:
                self._asked = False
                self._free_at = 0.0
                self._runs += 1
                self._served.update(dict.fromkeys(answered, self._runs))
                gone = [caller for caller in set(answered) if caller not in self._lines]
                self._patience.decide(gone, self._waiting, self._max_size)
                self._look()

    def _next(self, now: float) -> tuple[_Batch | None, list[_Refusal]]:
        """Take the oldest batch, without those that can't make it, with others in their place."""
        refused: list[_Refusal] = []
        batch: _Batch | None = None
        callers: deque[Caller] = deque()
        while self._batches and (batch is None or not batch.calls):
            batch = self._batches.popleft()
            callers += [call.caller for call in batch.calls]
            self._prune(batch, now, refused)
        if batch is None:
            return None, refused
        callers += self._fill(batch)
        if self._newest_first and self._turns.pressed:
            self._renew(batch, refused)
        while callers:
            caller = callers.popleft()
            line = self._lines[caller]
            if not line:
                del self._lines[caller]
                continue
            call = line.pop() if self._newest_first else line.popleft()
            try:
                if self._is_late(call, now):
                    raise DeadlineExceeded
                placed = self._place(call)
            except Exception as error:
                self._waiting -= 1
                refused.append((call, error, ""))
                placed = batch
            if placed is batch:
                callers.append(caller)
        if self._newest.get(batch.stack.layout) is batch:
            del self._newest[batch.stack.layout]
        self._waiting -= len(batch.calls)
        return batch, refused

    def _is_late(self, call: Call, now: float) -> bool:
        """Whether a call can't make it, though its batch runs now."""
        return call.expired or self._turns.pace.rules_out(call.deadline - now, now)

    def _prune(self, batch: _Batch, now: float, refused: list[_Refusal]) -> None:
        """Take those out of a batch that can't make it."""
        late = {row for row, call in enumerate(batch.calls) if self._is_late(call, now)}
        refused += [(batch.calls[row], DeadlineExceeded(), "") for row in late]
        self._waiting -= len(late)
        batch.keep([row for row in range(len(batch.calls)) if row not in late])
        if not batch.calls and self._batches and self._newest.get(batch.stack.layout) is batch:
            del self._newest[batch.stack.layout]

    def _fill(self, batch: _Batch) -> list[Caller]:
        """Move calls of the next batch to this one, and return whose they are."""
        moved: list[Caller] = []
        while 0 < len(batch.calls) < self._max_size and self._batches:
            other = self._batches[0]
            if other.stack.layout != batch.stack.layout or other.checks is not batch.checks:
                break
            call = other.calls.pop()
            batch.stack.write(len(batch.calls), other.stack.row(len(other.calls)))
            batch.calls.append(call)
            moved.append(call.caller)
            if not other.calls:
                self._batches.popleft()
                if self._newest.get(other.stack.layout) is other:
                    del self._newest[other.stack.layout]
        return moved

    def _renew(self, batch: _Batch, refused: list[_Refusal]) -> None:
        """Put each client's newest call in place of its older one."""
        for row, older in enumerate(batch.calls):
            line = self._lines[older.caller]
            if line:
                call = line.pop()
                self._waiting -= 1
                try:
                    renewed = self._overwrite(batch, row, call)
                except Exception as error:
                    refused.append((call, error, ""))
                    continue
                refused.append(_overtaken(older) if renewed else _overtaken(call))

    def _overwrite(self, batch: _Batch, row: int, call: Call) -> bool:
        """Stack a call in place of another; False where it doesn't fit there."""
        payload = call.payload()
        checks = self.function.checks
        if checks is not None:
            checks.check_payload(call, payload)
        layout, leaves = flatten(payload)
        if layout != batch.stack.layout or checks is not batch.checks:
            return False
        batch.stack.write(row, leaves)
        batch.calls[row] = call
        call.drop_payload()
        return True

    def _run(self, batch: _Batch) -> None:
        function = self.function
        if function.checks is not batch.checks and not self._check_again(function, batch):
            return
        layout = batch.stack.layout
        costs = self._costs.setdefault(layout, Costs())
        self._costs.move_to_end(layout)
        if len(self._costs) > _MOST_LAYOUTS:
            self._costs.popitem(last=False)
        self._costs_now = costs
        size = self._pad(len(batch.calls))
        if costs.of(size) > _LONG:
            # Whoever has several calls in a batch doesn't wait for one before it makes the next.
            more = len({call.caller for call in batch.calls}) < len(batch.calls)
            with self._lock:
                more = more or bool(self._batches)
                more = more or self._patience.expects_more(time.monotonic())
            if more:
                self._turns.relieve()
        began = time.monotonic()
        for call in batch.calls:
            call.began = began
            call.batch_size = len(batch.calls)
            call.version = function.version
        failed: Exception | None = None
        try:
            result = self._compute(function, batch, size)
        except Exception as error:
            failed = error
        except BaseException as error:  # Ctrl-C, which ends the server
            self._fail(batch, error)
            raise
        if failed is not None:  # not above, or each culprit's traceback would begin with this one
            self._find_culprits(function, batch, failed)
            return
        ended = self._answer(function, batch, result, size)
        costs.add(size, ended - began)
        done = time.monotonic()
        self._turns.pace.add(done - began, done)
        if late := sum(done > call.deadline for call in batch.calls):
            self._turns.note_late(late)

    def _check_again(self, function: Function, batch: _Batch) -> bool:
        """Whether calls are left that the function takes which has come while they waited."""
        kept = []
        for row, call in enumerate(batch.calls):
            try:
                if function.checks is not None:
                    function.checks.check_again(call, batch.checks)
                kept.append(row)
            except EdgemlError as error:
                self._turns.fail(call, error)
        batch.keep(kept)
        return bool(kept)

    def _compute(self, function: Function, batch: _Batch, size: int) -> Any:
        batch.stack.pad(len(batch.calls), size)
        tree = batch.stack.tree(size)
        if not function.told:
            return function.run(tree)
        return function.run(tree, [context_of(call) for call in batch.calls])

    def _fail(self, batch: _Batch, error: BaseException) -> None:
        for call in batch.calls:
            self._turns.fail(call, error)

    def _answer(self, function: Function, batch: _Batch, result: Any, size: int) -> float:
        """Give each call its row; returns when the result was there, on the host."""
        try:
            rows = split(result, size, len(batch.calls))
        except Exception as error:  # the function's fault and no call's, so nobody is looked for
            self._fail(batch, error)
            return time.monotonic()
        ended = time.monotonic()
        checks = function.checks
        for call, row in zip(batch.calls, rows, strict=True):
            call.ended = ended
            try:
                if checks is not None:
                    checks.check_result(call, row)
                call.answer(row)
            except Exception as error:
                self._turns.fail(call, error)
        return ended

    def _find_culprits(self, function: Function, batch: _Batch, error: BaseException) -> None:
        """Run the halves of a batch that failed, until those calls are found that make it fail."""
        if len(batch.calls) == 1:
            self._turns.fail(batch.calls[0], error)
            return
        middle = len(batch.calls) // 2
        for rows in (range(middle), range(middle, len(batch.calls))):
            half = batch.select(list(rows))
            size = self._pad(len(half.calls))
            failed: Exception | None = None
            try:
                result = self._compute(function, half, size)
            except Exception as again:
                failed = again
            if failed is not None:
                self._find_culprits(function, half, failed)
            else:
                self._answer(function, half, result, size)

    # Before and after ----------------------------------------------------------------------

    def warm_up(self, example: Any, report: Callable[[float, str], None]) -> None:
        """Run the function on every size of batch, twice each: a first run may compile, and the
        second tells what a batch costs.

        Args:
            example: a payload, as clients will send it.
            report: told of the fraction done, and what is next.
        """
        layout, leaves = flatten(example)
        stack = Stack(layout, self._max_size)
        stack.write(0, leaves)
        costs = self._costs.setdefault(layout, Costs())
        function = self.function
        for done, size in enumerate(self._sizes):
            report(done / len(self._sizes), f"a batch of {size}")
            batch = _Batch(stack)
            with rehearsed(example) as call:
                batch.calls = [call]
                for _ in range(2):
                    began = time.monotonic()
                    split(self._compute(function, batch, size), size, 1)
                    costs.add(size, time.monotonic() - began)

    def close(self) -> list[Call]:
        """See `Gatherer.close`."""
        with self._lock:
            self._closed = True
            waiting = [call for batch in self._batches for call in batch.calls]
            waiting += [call for line in self._lines.values() for call in line]
            self._batches.clear()
            self._newest.clear()
            self._lines.clear()
            self._waiting = 0
        return waiting
