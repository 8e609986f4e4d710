"""Generation that streams: engines with sequences of several steps in flight, event by event.

An engine decodes and prefills as `generation.py` says, and differs from there in what comes to it.
Batches are submitted while others are in flight, and their requests wait in the engine's own queue
for a slot. A weight sync stops an engine at the end of the decoding step that it is in, until the
sync has ended; where KV caches are recomputed, it then prefills what its sequences have so far.

Between two such events the number of active sequences falls by one after the other, so time is a
closed sum from one end to the next, and no token is simulated alone. An example with one engine
that takes a second for each step, whatever it has: responses of 2 and 5 tokens start at 0 s, and
one of 3 tokens is submitted at 2.5 s. It joins at the end of the step, at 3 s. The first ends at
2 s, the second at 5 s, the third at 6 s; a sync from 3.5 s to 10 s stops the engine at 4 s, and
lets both end 6 s later, at 11 and 12 s.
"""

import heapq
import math
from collections import Counter, deque
from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.predict.columns import Integers, Seconds
from planner.predict.speed import Speed


class Request(NamedTuple):
    """A sequence of the batch of a step: tokens of its prompt and its response, and whether the
    prompt has to be prefilled (another sample of the prompt may have done that)."""

    step: int
    prompt: int
    response: int
    prefills: bool = True


class Submitted(NamedTuple):
    """Sequences of the batch of a step, in the order in which they start: tokens of their prompts
    and responses [n], and which of the prompts have to be prefilled [n]."""

    step: int
    prompts: Integers
    responses: Integers
    prefills: NDArray[np.bool_]

    def parted(self, count: int) -> tuple["Submitted", "Submitted"]:
        """The first so many, and the others."""
        return self._part(slice(count)), self._part(slice(count, None))

    def _part(self, which: slice) -> "Submitted":
        prompts, responses = self.prompts[which], self.responses[which]
        return Submitted(self.step, prompts, responses, self.prefills[which])

    def alone(self) -> Iterator[Request]:
        """Each of them."""
        columns = self.prompts.tolist(), self.responses.tolist(), self.prefills.tolist()
        return map(Request, repeat(self.step), *columns)


class StreamEngine:
    """One engine. `now` is the end of the last decoding step that it has taken, in seconds; it may
    be ahead of what it was asked to run to, by less than a step."""

    def __init__(self, speed: Speed, slots: int) -> None:
        self.speed, self.slots = speed, slots
        self.now = 0.0
        self.steps = 0  # decoding steps so far
        # The sequences in flight, the first to end first: the step at which each ends, what it then
        # has in tokens, and the step of the training that it is of.
        self._ends = np.zeros(0, np.int64)
        self._tokens = np.zeros(0, np.int64)
        self._of_step = np.zeros(0, np.int64)
        self._waiting = deque[Request]()
        # Of each that has ended: the step of the training that it was of, and when it did.
        self.ended: list[tuple[int, float]] = []
        # By step of the training: its sequences that have not ended, and when the last one did.
        self._left, self._last = Counter[int](), dict[int, float]()

    @property
    def outstanding(self) -> int:
        """Sequences that are in flight or wait."""
        return len(self._ends) + len(self._waiting)

    def submit(self, at: float, requests: Submitted) -> None:
        """Take requests, which start as soon as there are slots."""
        self.run_to(at)
        self.now = max(self.now, at)
        self._left[requests.step] += len(requests.responses)
        free = 0 if self._waiting else max(self.slots - len(self._ends), 0)
        started, others = requests.parted(free)
        self._waiting.extend(others.alone())
        if len(started.responses):
            self._start(started)

    def interrupt(self, start: float, end: float, *, recompute: bool) -> None:
        """Stop for new weights, and prefill again what is in flight, if it is to be recomputed."""
        self.run_to(start)
        self.now = max(self.now, end)
        if recompute:
            has = self._tokens - (self._ends - self.steps)
            square = self.speed.prefill_square * float((has**2).sum())
            self.now += self.speed.prefill_token * int(has.sum()) + square

    def end_of(self, step: int) -> float:
        """Run until all sequences of a step of the training have ended; when that was. 0 if this
        engine has none."""
        while self._left[step]:
            if self._waiting:
                self._run_queued(np.inf, step)
            else:
                mine = self._ends[self._of_step == step]
                self._run_closed(np.inf, int(mine.max()))
        return self._last.get(step, 0.0)

    def run_to(self, until: float) -> None:
        """Run to the end of the first decoding step that ends no sooner than `until`, or until
        nothing is in flight."""
        if self._waiting and self.now < until:
            self._run_queued(until)
        if self.now < until:
            self._run_closed(until)

    def _run_queued(self, until: float, of_step: int | None = None) -> None:
        """Run to the end of the first decoding step that ends no sooner than `until`, or with which
        all sequences of a step of the training have ended, or after which nothing waits. Until then
        every slot is busy."""
        active, last = len(self._ends), self.now
        columns = self._ends.tolist(), self._tokens.tolist(), self._of_step.tolist()
        running = list(zip(*columns, strict=True))  # a heap, as they are in the order of their ends
        matrices, attention = self.speed.matrices(active), self.speed.attention
        context, ended = self._context(), list[tuple[int, float]]()
        while self._waiting and self.now < until and (of_step is None or self._left[of_step]):
            stretch = _Stretch(matrices, attention, context, active)
            steps = running[0][0] - self.steps
            if self.now + stretch.seconds(steps) >= until:
                steps = stretch.steps_in(until - self.now, steps)
            self.now = last = self.now + stretch.seconds(steps)
            self.steps += steps
            context += active * steps
            while self._waiting and running[0][0] == self.steps:
                request = self._waiting.popleft()
                has_at_end = request.prompt + request.response
                started = self.steps + request.response, has_at_end, request.step
                _, tokens_left, step_left = heapq.heapreplace(running, started)
                context += request.prompt - tokens_left
                self.now += self.speed.prefill(request.prompt) * request.prefills
                ended.append((step_left, last))
                self._left[step_left] -= 1
        self._record(ended)
        self._ends, self._tokens, self._of_step = np.array(sorted(running)).T
        self._leave(int(np.searchsorted(self._ends, self.steps, "right")), np.full(active, last))

    def _run_closed(self, until: float, last_decoding: int | None = None) -> None:
        """Run to the end of the first decoding step that ends no sooner than `until` or is the
        `last_decoding` one, where nothing starts meanwhile."""
        if not len(self._ends):
            return
        first, context = self.steps, self._context()
        steps, active = np.diff(self._ends, prepend=first), np.arange(len(self._ends), 0, -1)
        added = active * steps - self._tokens
        before = context + np.cumsum(added) - added  # contexts at the beginning of each stretch
        speed = self.speed
        matrices = speed.matrices_each(active)
        attended = steps * before + active * (steps * (steps - 1) // 2)
        ends = self.now + np.cumsum(steps * matrices + speed.attention * attended)
        at = int(np.searchsorted(ends, until))  # the stretch in which `until` lies
        if last_decoding is not None:
            at = min(at, int(np.searchsorted(self._ends, last_decoding)))
        if at == len(ends):
            self._leave(len(ends), ends)
            self.steps, self.now = int(first + steps.sum()), float(ends[-1])
            return
        start, some = float(ends[at - 1]) if at else self.now, int(steps[at])
        self.now = float(ends[at])
        if until < self.now:
            stretch = _Stretch(
                float(matrices[at]), speed.attention, int(before[at]), int(active[at])
            )
            some = stretch.steps_in(until - start, some)
            self.now = start + stretch.seconds(some)
        self.steps = int(self._ends[at] - steps[at]) + some
        self._leave(int(np.searchsorted(self._ends, self.steps, "right")), ends)

    def _leave(self, count: int, ends: Seconds) -> None:
        """The first sequences end at these seconds."""
        of_step = self._of_step[:count].tolist()
        self._left.subtract(of_step)
        self._record(list(zip(of_step, ends[:count].tolist(), strict=True)))
        self._ends, self._tokens = self._ends[count:], self._tokens[count:]
        self._of_step = self._of_step[count:]

    def _record(self, ended: list[tuple[int, float]]) -> None:
        """Sequences of these steps of the training end, each at its seconds."""
        self.ended += ended
        self._last.update(ended)

    def _context(self) -> int:
        """Tokens that the sequences in flight have together."""
        return int((self._tokens - self._ends).sum()) + self.steps * len(self._ends)

    def _start(self, requests: Submitted) -> None:
        """Let requests start in free slots: all of them prefill first."""
        prefilled = requests.prompts[requests.prefills]
        square = self.speed.prefill_square * int((prefilled**2).sum())
        self.now += self.speed.prefill_token * int(prefilled.sum()) + square
        ends = np.concatenate([self._ends, self.steps + requests.responses])
        tokens = np.concatenate([self._tokens, requests.prompts + requests.responses])
        of_step = np.concatenate([self._of_step, np.full(len(requests.responses), requests.step)])
        order = np.argsort(ends, kind="stable")
        self._ends, self._tokens, self._of_step = ends[order], tokens[order], of_step[order]


class _Stretch(NamedTuple):
    """Steps in which the same sequences are active. They have `context` tokens together at first,
    and each step adds one to each `active` one."""

    matrices: float
    attention: float
    context: int
    active: int

    def seconds(self, steps: int) -> float:
        attended = steps * self.context + self.active * (steps * (steps - 1) // 2)
        return steps * self.matrices + self.attention * attended

    def steps_in(self, seconds: float, most: int) -> int:
        """The fewest steps, up to `most`, that take no less than some seconds."""
        square = self.attention * self.active / 2
        linear = self.matrices + self.attention * self.context - square
        root = math.sqrt(linear**2 + 4 * square * max(seconds, 0.0))
        found = min(most, math.ceil(2 * max(seconds, 0.0) / (linear + root)))
        while found and self.seconds(found - 1) >= seconds:  # the root is rounded
            found -= 1
        while found < most and self.seconds(found) < seconds:
            found += 1
        return found
