"""Seconds of generating on engines whose slots need more keys and values than they hold.

An engine has as many requests as slots, and those that its KV cache has no room for wait in it. It
does what vLLM's scheduler does (`vllm/v1/core/sched/scheduler.py`). Before each step it looks
whether what runs has room for one more token each. If not, it sets the request aside that started
last, and again, until the others have; that request waits as the first. If nothing had to be set
aside, those that wait start in their order, as long as the next one has room. A request that goes
on has its prompt and what it has generated so far prefilled again.

A request with a context of c tokens takes room for c and half a block: its last block is half full
on average. The contexts grow evenly between two events (a request leaves, or is set aside), so no
step is simulated alone, as in `generation.py`.

An example: room for 20 tokens (blocks apart), two requests with prompts of 5 and responses of 10.
Together they have 10, 12, ..., 20 tokens in their first 6 steps. Before the seventh the second one
is set aside, with 11 tokens. The first one goes on alone for 4 steps and leaves; then 11 tokens are
prefilled, and the second one takes its last 4 steps.
"""

import heapq
from collections import deque
from collections.abc import Sequence

from planner.predict.kv_cache import BLOCK_TOKENS
from planner.predict.speed import Speed

UNUSED = BLOCK_TOKENS // 2  # tokens of a request's last block


def preempting_seconds(
    prompts: Sequence[int],
    responses: Sequence[int],
    dealt: Sequence[int],
    engines: Sequence[Speed],
    room: int,
    prefilling: int,
) -> float:
    """Seconds of one scenario until the last engine, of `engines` with room for `room` tokens each,
    is done. The first requests go to the engines `dealt`; each later one to the engine that a
    request leaves. The first `prefilling` requests prefill their prompts, the others find them."""
    tokens = _Tokens(prompts, responses, prefilling)
    all_engines = [_Engine(speed, room, tokens) for speed in engines]
    for request, number in enumerate(dealt):
        all_engines[number].waiting.append(request)
    left = [engine.run() for engine in all_engines]
    # When the next request of each engine leaves.
    agenda = [(engine.clock, number) for number, engine in enumerate(all_engines) if left[number]]
    heapq.heapify(agenda)
    queue = deque(range(len(dealt), len(prompts)))
    while agenda:
        _, number = agenda[0]
        engine = all_engines[number]
        for _ in range(min(left[number], len(queue))):
            engine.waiting.append(queue.popleft())
        left[number] = engine.run()
        if left[number]:
            heapq.heapreplace(agenda, (engine.clock, number))
        else:
            heapq.heappop(agenda)
    return max(engine.clock for engine in all_engines)


class _Tokens:
    """The requests of a scenario: prompt and response together, the context to start with, and the
    tokens to prefill then."""

    def __init__(self, prompts: Sequence[int], responses: Sequence[int], prefilling: int) -> None:
        self.total = [p + r for p, r in zip(prompts, responses, strict=True)]
        self.context = list(prompts)
        self.unfilled = [*prompts[:prefilling], *[0] * (len(prompts) - prefilling)]


class _Engine:
    """One engine. `running` has the step at which each request ends, in the order in which they
    started; `held` are the tokens that they have together now, with their unused ones."""

    def __init__(self, speed: Speed, room: int, tokens: _Tokens) -> None:
        self.speed, self.room, self.tokens = speed, room, tokens
        self.clock, self.step, self.held = 0.0, 0, 0
        self.waiting = deque[int]()
        self.running = dict[int, int]()
        self._ends = list[tuple[int, int]]()  # a heap of ends and requests, some set aside since

    def run(self) -> int:
        """Go on until requests leave; how many do. 0 if there are none."""
        while self.running or self.waiting:
            crowded = self._set_aside()
            if not crowded:
                self._start()
            self._decode(1 if crowded else self._even_steps())
            if left := self._leave():
                return left
        return 0

    def _set_aside(self) -> bool:
        """Whether something had to be set aside."""
        before = len(self.running)
        while self.held > self.room and len(self.running) > 1:  # one always has room
            request, end = self.running.popitem()
            context = self.tokens.total[request] - (end - self.step)
            self.tokens.context[request] = self.tokens.unfilled[request] = context
            self.held -= context + UNUSED
            self.waiting.appendleft(request)
        return len(self.running) < before

    def _start(self) -> None:
        tokens = self.tokens
        while self.waiting:
            request = self.waiting[0]
            needed = tokens.context[request] + UNUSED
            if self.running and self.held + needed > self.room:
                return
            self.waiting.popleft()
            self.held += needed
            self.clock += self.speed.prefill(tokens.unfilled[request])
            end = self.step + tokens.total[request] - tokens.context[request]
            self.running[request] = end
            heapq.heappush(self._ends, (end, request))

    def _even_steps(self) -> int:
        """Steps in which the same requests run."""
        while self.running.get(self._ends[0][1]) != self._ends[0][0]:
            heapq.heappop(self._ends)
        steps, active = self._ends[0][0] - self.step, len(self.running)
        return steps if active == 1 else min(steps, (self.room - self.held) // active + 1)

    def _decode(self, steps: int) -> None:
        active = len(self.running)
        context = self.held - active * UNUSED
        contexts = steps * context + active * (steps * (steps - 1) // 2)
        self.clock += steps * self.speed.matrices(active) + self.speed.attention * contexts
        self.step += steps
        self.held += steps * active

    def _leave(self) -> int:
        """How many requests end now."""
        left = 0
        while self._ends and self._ends[0][0] <= self.step:
            end, request = heapq.heappop(self._ends)
            if self.running.get(request) == end:
                del self.running[request]
                self.held -= self.tokens.total[request] + UNUSED
                left += 1
        return left
