"""A plan whose generation streams, on a simulated clock.

The tasks and their predecessors are those of `schedule`, as ever. What is different is that nobody
knows how long `generate` takes before it has ended: that depends on the batches beside it and on
the syncs meanwhile, and when these come depends on it. So tasks are not taken in the order of time.
One sync after the other is asked for, and whatever it comes after is asked for first. Engines are
run no further than that needs. As a sync ends after all that it comes after, no engine ever has to
go back.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from planner.predict.columns import Integers
from planner.predict.schedule import Task
from planner.predict.speed import Speed
from planner.predict.stream import StreamEngine, Submitted
from planner.spec.timeline import ended_parts

FOLLOWED_IN_STREAMS = 8  # of equal ones; the others are taken to do as these with their share


class StreamLengths(NamedTuple):
    """Tokens of prompts and responses [S, G] of a batch in each scenario, with the `group` samples
    of a prompt next to each other. Step t has those of scenario t modulo S."""

    prompts: Integers
    responses: Integers
    group: int = 1

    def share(self, part: int, of: int) -> "StreamLengths":
        """The first of so many parts of each batch, in whole groups, with its longest response."""
        scenarios, size = self.responses.shape
        kept = -(-size // self.group * part // of) * self.group
        responses = self.responses[:, :kept].copy()
        rows = np.arange(scenarios)
        responses[rows, responses.argmax(axis=1)] = self.responses.max(axis=1)
        return StreamLengths(self.prompts[:, :kept], responses, self.group)


class EngineStream:
    """Engines that take batches while others are in flight. The samples of a prompt stay together
    and have it prefilled once; each goes to the engine with the fewest sequences."""

    def __init__(
        self, engines: Sequence[Speed], slots: int, lengths: StreamLengths, *, recompute: bool
    ) -> None:
        followed = engines
        if len(set(engines)) == 1 and len(engines) > FOLLOWED_IN_STREAMS:
            followed = engines[:FOLLOWED_IN_STREAMS]
            lengths = lengths.share(FOLLOWED_IN_STREAMS, len(engines))
        self.engines = [StreamEngine(speed, slots) for speed in followed]
        self._prompts, self._responses = lengths.prompts, lengths.responses
        self._group, self._recompute = lengths.group, recompute

    def submit(self, at: float, step: int) -> None:
        """Take the batch of a step of the training."""
        for engine in self.engines:
            engine.run_to(at)
        scenario, group = step % len(self._prompts), self._group
        prompts, responses = self._prompts[scenario], self._responses[scenario]
        outstanding = np.array([engine.outstanding for engine in self.engines])
        dealt = dealt_evenly(outstanding, len(prompts) // group, group)
        for number, engine in enumerate(self.engines):
            firsts = np.flatnonzero(dealt == number) * group
            chosen = (firsts[:, None] + np.arange(group)).ravel()
            prefills = np.tile(np.arange(group) == 0, len(firsts))
            requests = Submitted(step, prompts[chosen], responses[chosen], prefills)
            engine.submit(at, requests)

    def interrupt(self, start: float, end: float) -> None:
        """Stop all engines for a sync."""
        for engine in self.engines:
            engine.interrupt(start, end, recompute=self._recompute)

    def ended_parts(self) -> dict[int, tuple[float, ...]]:
        """When each of some equal parts of a batch had ended, by its step of the training; of what
        is followed."""
        ends = defaultdict[int, list[float]](list)
        for engine in self.engines:
            for step, end in engine.ended:
                ends[step].append(end)
        return {step: ended_parts(found) for step, found in ends.items()}

    def end_of(self, step: int) -> float:
        """When the last sequence of a step of the training ends, if no sync comes before that."""
        return max(engine.end_of(step) for engine in self.engines)


def dealt_evenly(outstanding: Integers, groups: int, group: int) -> Integers:
    """The engine [groups] that each of some groups goes to, one after the other to the one with the
    fewest outstanding sequences then; the first such on a tie.

    >>> dealt_evenly(np.array([4, 0, 1]), groups=4, group=2)
    array([1, 2, 1, 2])
    """
    spread = int(outstanding.max() - outstanding.min())
    most = groups // len(outstanding) + spread // group + 2  # that one engine gets
    before = outstanding[:, None] + group * np.arange(most)  # what it has when it gets each
    in_turn = np.argsort(before, axis=None, kind="stable") // most
    return np.asarray(in_turn[:groups])


@dataclass(kw_only=True)
class StreamRun:
    """One run of `tasks`. `seconds` gives the duration of each that does not stream; that of one
    which goes on since generation may depend on how long that took. A call that is `busy` for so
    many seconds a step, beside others, ends no sooner than that after its task before.

    `starts` and `ends` are those of each task, in seconds."""

    tasks: Sequence[Task]
    stream: EngineStream
    seconds: Callable[[Task, float], float]
    busy: dict[str, float] = field(default_factory=dict)
    overhead: float = 0.0  # of a call that streams

    def __post_init__(self) -> None:
        self.starts, self.ends = np.full((2, len(self.tasks)), np.nan)
        self._free = dict[str, float]()  # when what is busy will have ended
        self._generated = {task.step: task.index for task in self.tasks if task.call.streams}
        self._run()

    def _run(self) -> None:
        followers: dict[int | None, list[Task]] = {}
        for task in self.tasks:
            if task.call.streams:
                assert len(task.after) <= 1, "a wait stops the stream"
                followers.setdefault(task.after[0] if task.after else None, []).append(task)
        self._admit(followers.get(None, []), 0.0)
        for task in self.tasks:
            if task.call.kind == "transfer":
                self._resolve(task)
                start, end = self.starts[task.index], self.ends[task.index]
                self.stream.interrupt(float(start), float(end))
                self._admit(followers.get(task.index, []), float(end))
        for task in self.tasks:
            self._resolve(task)

    def _admit(self, tasks: Sequence[Task], at: float) -> None:
        for task in tasks:
            self.starts[task.index] = at
            self.stream.submit(at, task.step)

    def _resolve(self, task: Task) -> None:
        """Find when a task ends, after all that it comes after."""
        unknown, found = [task.index], set[int]()
        while unknown:
            index = unknown.pop()
            if index not in found and np.isnan(self.ends[index]):
                found.add(index)
                unknown += self.tasks[index].after
        for index in sorted(found):  # tasks are in topological order
            self._end(self.tasks[index])

    def _end(self, task: Task) -> None:
        index, name = task.index, task.call.name
        if task.call.streams:
            self.ends[index] = self.stream.end_of(task.step) + self.overhead
            return
        start = max((float(self.ends[before]) for before in task.after), default=0.0)
        generated = self._generated.get(task.step)
        took = (
            float(self.ends[generated] - self.starts[generated]) if generated is not None else 0.0
        )
        end = start + self.seconds(task, took)
        if task.call.since_generation and generated is not None:
            end = max(start, end - start + float(self.ends[generated]))
        if name in self.busy:
            end = self._free[name] = max(end, self._free.get(name, 0.0) + self.busy[name])
        self.starts[index], self.ends[index] = start, end
