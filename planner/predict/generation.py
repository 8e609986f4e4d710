"""Seconds of generating a batch on engines that decode many sequences at once.

The model. Requests wait in one queue in the order of the batch. Each goes to the engine with the
fewest outstanding tokens (prompt and response limit of what it has been given and not finished)
among those with a free slot, the first one on a tie; nobody looks at a response's length before it
is there. An engine that admits requests stops to prefill them, then decodes: a step gives each of
its n sequences one token and takes

    matrices(n) + attention * (sum of the n contexts) + step + sequence * n

seconds. The matrices read all weights once whatever n is, until the arithmetic takes longer;
attention reads every sequence's cached keys and values. A sequence of r tokens takes r steps and
leaves its slot at the end of the last one.

As a step's time is linear in the contexts, time between two events (a sequence leaves) is a closed
sum, and no token is simulated alone. If there is a slot for every sequence, nothing is ever
admitted late and the whole run is one sum.

The samples of a prompt (its group) stay on one engine as far as its share of the batch goes, and
their common prompt is prefilled once there. So requests are dealt in another order than that of the
batch: the first sample of every prompt, then the second of every prompt, and so on. Those of a
prompt then come to the same engine where the engines divide the prompts, and each engine has an
even share of the first samples, which alone have their prompt to `prefill`, in any case.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from planner.predict.columns import Integers, Seconds
from planner.predict.kv_cache import AMPLE
from planner.predict.preemption import UNUSED, preempting_seconds
from planner.predict.speed import Speed

# Equal engines with a queue: if there are more than these, the others are taken to do as these with
# their share of the requests.
FOLLOWED_ENGINES = 64


def generation_seconds(
    prompts: Integers,
    responses: Integers,
    engines: Sequence[Speed],
    concurrency: int,
    limit: int,
    first: int | None = None,
) -> Seconds:
    """Seconds [S] until the last engine is done, for `prompts` and `responses` [S, B] in tokens.
    `concurrency` is each engine's number of slots, `limit` the longest response allowed. The
    `first` requests prefill their prompts, the others find them there; None: all prefill."""
    batch = responses.shape[1]
    first = batch if first is None else min(first, batch)
    if responses.shape[1] <= len(engines) * concurrency:
        return _one_wave(prompts, responses, engines, concurrency, limit, first)
    rows = zip(prompts, responses.tolist(), strict=True)
    return np.array([_queued(p, r, engines, concurrency, limit, first) for p, r in rows])


class BatchLengths:
    """The lengths of a batch in tokens, `prompts` and `responses` [S, B], with what floors ask of
    them often. They are given with the `group` samples of a prompt next to each other, and kept in
    the order in which they are dealt: the `first` B / group of them prefill their prompts.

    A floor is a number of seconds that a simulation is not below. It is quick to find, so the
    search simulates only what its floor does not rule out. An example: prompts of 10 tokens and
    responses of 8, 2, 2 and 4 on one engine with two slots. Together they have 16 tokens, so at
    least 16 / 2 = 8 steps pass; the longest response that starts at once also takes 8. The slots
    are taken by 8 and 2; then 2 and 4 follow in the second slot, and the run does take 8 steps."""

    FOLLOWED = 8  # longest responses that are looked at with those that share their engine
    LEVELS = (0.25, 0.5, 0.75, 0.9)  # shares of shorter responses: there a wave is cut into parts
    DEEPEST = 32  # waves of a queue: with more, the shared work is what counts

    def __init__(self, prompts: Integers, responses: Integers, group: int = 1) -> None:
        self.prompts, self.responses = by_sample(prompts, group), by_sample(responses, group)
        prompts, responses = self.prompts, self.responses
        self.group, self.first = group, prompts.shape[1] // group
        self.even = bool((prompts == prompts[0, 0]).all())
        # Contexts of a sequence over all of its steps: p, p + 1, ..., p + r - 1.
        self.contexts = prompts * responses + responses * (responses - 1) // 2
        self.longest = np.argsort(-responses, axis=1, kind="stable")[:, : self.FOLLOWED]
        self._longest_starting: dict[tuple[int, int], Integers] = {}
        self._tokens = responses.sum(axis=1)
        self._context_sums = self.contexts.sum(axis=1)
        prefilled = prompts[:, : self.first]
        self._prompt_sums = prefilled.sum(axis=1)
        self._prompt_squares = (prefilled**2).sum(axis=1)
        self._rising = np.sort(responses, axis=1)
        self._levels = self._rising[0, [int(share * responses.shape[1]) for share in self.LEVELS]]

    def floors(
        self, speed: Speed, engines: Integers, concurrency: Integers, room: Integers | None = None
    ) -> Seconds:
        """Seconds [n, S] that generation with `engines` [n] of `concurrency` [n] slots and `room`
        [n] for tokens each (None: AMPLE) is not below: the larger of two floors.

        Work: what all engines take on average. An engine's steps are no fewer than its tokens over
        its slots, nor than the longest response among those that it starts with. Only their number
        depends on the order of the requests; the rest is linear in tokens and contexts, and
        matrices take no less than what either all steps or all tokens need. No step's contexts are
        more than an engine has room for, and what is preempted only adds prefills.

        Queue: the steps that pass at least, full ones as long as requests wait. As jobs taken in
        their order start no later if some of them get shorter, start times are not below those of
        jobs that take their length in full steps with no contexts but prompts. Once the queue is
        empty a step takes no less than a lone sequence's, and no step of an engine does that may
        preempt, for that has empty slots."""
        room = np.full_like(engines, AMPLE) if room is None else room
        return np.maximum(
            self._work_floors(speed, engines, concurrency, room),
            self._queue_floors(speed, engines, concurrency, room),
        )

    def _work_floors(
        self, speed: Speed, engines: Integers, concurrency: Integers, room: Integers
    ) -> Seconds:
        pairs = zip(engines.tolist(), concurrency.tolist(), strict=True)
        starting = [self._longest_at_first(*pair) for pair in pairs]
        longest = np.reshape(starting, (-1, len(self._tokens)))
        tokens = self._tokens
        steps = np.maximum(tokens / concurrency[:, None], longest)  # of all engines together
        with np.errstate(divide="ignore"):  # without room it takes for ever
            steps = np.maximum(steps, (self._context_sums + UNUSED * tokens) / room[:, None])
        matrices = np.maximum(speed.weights * steps, speed.arithmetic * tokens) + speed.step * steps
        decoding = matrices + speed.sequence * tokens + speed.attention * self._context_sums
        prefill = (
            speed.prefill_token * self._prompt_sums + speed.prefill_square * self._prompt_squares
        )
        return np.asarray((decoding + prefill) / engines[:, None])

    def _queue_floors(
        self, speed: Speed, engines: Integers, concurrency: Integers, room: Integers
    ) -> Seconds:
        emptied, last = self._least_steps(engines * concurrency)
        shortest = int(self.prompts.min())
        matrices = np.maximum(speed.weights, speed.arithmetic * concurrency) + speed.step
        attention = speed.attention * shortest * concurrency
        full_step = matrices + speed.sequence * concurrency + attention
        lone_step = speed.matrices(1) + speed.attention * shortest
        more = np.where(room < AMPLE, 0.0, full_step - lone_step)[:, None]
        return np.asarray(emptied * more + last * lone_step)

    def _longest_at_first(self, engines: int, slots: int) -> Integers:
        """The longest of the responses that each engine starts with, summed over the engines [S].
        With uneven prompts nobody knows which engine a request goes to: then the longest that any
        engine starts with.

        >>> BatchLengths(np.full((1, 4), 10), np.array([[8, 2, 2, 4]]))._longest_at_first(2, 1)
        array([10])
        """
        if not self.even:
            return np.asarray(self.responses[:, : engines * slots].max(axis=1))
        key, (scenarios, batch) = (engines, slots), self.responses.shape
        if key not in self._longest_starting:
            rounds = min(slots, -(-batch // engines))  # equal prompts are dealt in turn
            starting = np.zeros((scenarios, rounds * engines), dtype=np.int64)
            count = min(batch, rounds * engines)
            starting[:, :count] = self.responses[:, :count]
            by_engine = starting.reshape(scenarios, rounds, engines)
            self._longest_starting[key] = by_engine.max(axis=1).sum(axis=1)
        return self._longest_starting[key]

    def _least_steps(self, slots: Integers) -> tuple[Integers, Integers]:
        """Steps [n, S] that pass at least until the queue for so many slots [n] is empty, and until
        the last response ends.

        Request p starts when p - slots + 1 requests have ended. That many have ended earliest if
        the shortest are taken first; then one after another in every slot, in the order of their
        lengths. Of responses 8, 2, 2, 4 and two slots, the last request (p = 3) starts when two
        have ended: not before step 2, so that its end is not before step 2 + 4."""
        scenarios, batch = self.responses.shape
        emptied, last = np.zeros((2, len(slots), scenarios), dtype=np.int64)
        last[:] = self.responses.max(axis=1)
        final = np.full((scenarios, 1), batch - 1)
        requests = np.concatenate([self.longest, final], axis=1)
        scenario = np.arange(scenarios)[:, None]
        for row, count in enumerate(slots.tolist()):
            if not count < batch <= self.DEEPEST * count:
                continue
            waves = np.arange(-(-batch // count))[:, None, None]
            # A request's slot has been taken by every count-th of the shorter responses before it.
            before = requests - count - count * waves
            lengths = np.where(before >= 0, self._rising[scenario, np.maximum(before, 0)], 0)
            started = lengths.sum(axis=0)
            emptied[row] = started[:, -1]
            ended = (started + self.responses[scenario, requests]).max(axis=1)
            last[row] = np.maximum(last[row], ended)
        return emptied, last

    def wave_floors(self, speeds: Sequence[Speed], engines: int) -> list[Seconds]:
        """Seconds [S] for each speed that generation with a slot for every sequence is not below:
        those of the engines that hold the longest sequences (where prompts are equal and so dealt
        in turn)."""
        scenarios, batch = self.responses.shape
        turns = np.arange(-(-batch // engines))
        places = self.longest[:, :, None] % engines + engines * turns  # all on the same engine
        scenario, inside = np.arange(scenarios)[:, None, None], places < batch
        places = np.minimum(places, batch - 1)
        lengths = self.responses[scenario, places] * inside
        contexts = (self.contexts[scenario, places] * inside).sum(axis=2)
        longest, total = lengths.max(axis=2), lengths.sum(axis=2)
        count = (inside & (places < self.first)).sum(axis=2)
        prompt = int(self.prompts[0, 0])
        # Steps and tokens up to some lengths and from one to the next: the matrices of no such part
        # take less than either its steps or its tokens need.
        up_to = [np.minimum(lengths, level) for level in self._levels] + [lengths]
        steps = np.diff([part.max(axis=2) for part in up_to], axis=0, prepend=0)
        tokens = np.diff([part.sum(axis=2) for part in up_to], axis=0, prepend=0)
        found = []
        for speed in speeds:
            matrices = np.maximum(speed.weights * steps, speed.arithmetic * tokens).sum(axis=0)
            decoding = matrices + speed.step * longest + speed.sequence * total
            decoding = decoding + speed.attention * contexts
            found.append((decoding + speed.prefill(prompt) * count).max(axis=1))
        return found


class GenerationRun:
    """Generation on some engines, simulated scenario by scenario as far as it is asked for. The
    first `known` of `seconds` [S] are simulated, the others are floors. Each engine has `room` for
    the keys and values of so many tokens."""

    def __init__(
        self,
        batch: BatchLengths,
        engines: Sequence[Speed],
        concurrency: int,
        limit: int,
        floor: Seconds | None = None,
        room: int = AMPLE,
    ) -> None:
        self._batch, self._engines, self._room = batch, engines, room
        self._concurrency, self._limit = concurrency, limit
        self.seconds = np.zeros(len(batch.responses)) if floor is None else floor.copy()
        self.known = 0

    @property
    def done(self) -> bool:
        return self.known == len(self.seconds)

    @property
    def queued(self) -> bool:
        """Whether there are fewer slots than sequences."""
        return int(self._batch.responses.shape[1]) > len(self._engines) * self._concurrency

    def advance(self) -> None:
        """Simulate one more scenario; all of them where none waits for a slot or for room."""
        batch, engines, slots = self._batch, self._engines, self._concurrency
        if not self.queued and self._room == AMPLE:
            self.seconds = generation_seconds(
                batch.prompts, batch.responses, engines, slots, self._limit, batch.first
            )
            self.known = len(self.seconds)
        else:
            scenario, count = self.known, len(engines)
            followed = min(count, FOLLOWED_ENGINES) if _alike(engines) else count
            first = -(-batch.first * followed // count)
            share = (np.arange(batch.group)[:, None] * batch.first + np.arange(first)).ravel()
            prompts = batch.prompts[scenario, share]
            responses = batch.responses[scenario, share].tolist()
            speeds, limit = engines[:followed], self._limit
            if self._room == AMPLE:
                found = _queued(prompts, responses, speeds, slots, limit, first)
            else:
                dealt = deal(prompts, followed, slots, limit)[0].tolist()
                asked = prompts.tolist(), responses, dealt
                found = preempting_seconds(*asked, speeds, self._room, first)
            self.seconds[scenario] = max(self.seconds[scenario], found)
            self.known += 1


def by_sample(lengths: Integers, group: int) -> Integers:
    """Lengths [S, B] in the order in which requests are dealt.

    >>> by_sample(np.array([[10, 11, 20, 21]]), group=2)
    array([[10, 20, 11, 21]])
    """
    if group == 1:
        return lengths
    return lengths.reshape(len(lengths), -1, group).swapaxes(1, 2).reshape(len(lengths), -1)


def deal(
    prompts: Integers, engines: int, concurrency: int, limit: int
) -> tuple[Integers, Integers]:
    """The engine of each of the first requests [B], as long as there is a free slot, and its place
    among those of the engine.

    >>> deal(np.array([5, 1, 1, 1]), engines=2, concurrency=4, limit=2)
    (array([0, 1, 1, 1]), array([0, 0, 1, 2]))

    The third request finds 7 and 3 outstanding tokens, the fourth 7 and 6. A tie would go to the
    first engine."""
    prompts = prompts[: engines * concurrency]
    if (prompts == prompts[0]).all():
        return np.divmod(np.arange(len(prompts)), engines)[::-1]
    outstanding, dealt = [(0, engine, 0) for engine in range(engines)], []
    for prompt in prompts.tolist():
        tokens, engine, place = heapq.heappop(outstanding)
        dealt.append((engine, place))
        if place + 1 < concurrency:
            heapq.heappush(outstanding, (tokens + prompt + limit, engine, place + 1))
    engine_of, place_of = np.array(dealt).T
    return engine_of, place_of


def _one_wave(
    prompts: Integers,
    responses: Integers,
    engines: Sequence[Speed],
    concurrency: int,
    limit: int,
    first: int,
) -> Seconds:
    """Seconds [S] where every sequence starts at once. With an engine's sequences in the order of
    their lengths, the number of active ones is constant between two lengths; a sequence's contexts
    add up to p r + r (r - 1) / 2."""
    count, width = len(engines), min(concurrency, responses.shape[1])
    if _alike(engines) and (prompts == prompts[0, 0]).all():
        return _even_wave(int(prompts[0, 0]), responses, engines[0], count, first)
    active = range(width, 0, -1)
    matrices_of = {speed: [speed.matrices(n) for n in active] for speed in set(engines)}
    matrices = np.array([matrices_of[speed] for speed in engines])
    attention = np.array([speed.attention for speed in engines])
    token = np.array([speed.prefill_token for speed in engines])
    square = np.array([speed.prefill_square for speed in engines])
    seconds = np.zeros(len(responses))
    for scenario, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        engine, place = deal(prompt, count, concurrency, limit)
        lengths = np.zeros((count, width), dtype=np.int64)
        lengths[engine, place] = response
        lengths.sort(axis=1)  # an engine with free slots starts with zeros, which take no steps
        decoding = (np.diff(lengths, axis=1, prepend=0) * matrices).sum(axis=1)
        contexts = np.bincount(engine, prompt * response + response * (response - 1) // 2, count)
        prefilled = np.where(np.arange(len(prompt)) < first, prompt, 0)
        prompt_sums = np.bincount(engine, prefilled, count)
        prefill = token * prompt_sums + square * np.bincount(engine, prefilled**2, count)
        seconds[scenario] = (decoding + attention * contexts + prefill).max()
    return seconds


def _alike(engines: Sequence[Speed]) -> bool:
    return all(speed is engines[0] for speed in engines) or len(set(engines)) == 1


def _even_wave(prompt: int, responses: Integers, speed: Speed, engines: int, first: int) -> Seconds:
    """Seconds [S] where every sequence starts at once and equal prompts are dealt to equal engines
    in turn."""
    scenarios, batch = responses.shape
    width = -(-batch // engines)
    lengths = np.zeros((scenarios, width * engines), dtype=np.int64)
    lengths[:, :batch] = responses
    lengths = lengths.reshape(scenarios, width, engines)
    longest, total = lengths.max(axis=1), lengths.sum(axis=1)
    if speed.arithmetic * width <= speed.weights:
        matrices = speed.weights * longest
    else:
        # In the order of their lengths one sequence less is active after each.
        rising = np.diff(np.sort(lengths, axis=1), axis=1, prepend=0)
        of_active = np.maximum(speed.weights, speed.arithmetic * np.arange(width, 0, -1))
        matrices = np.einsum("swe,w->se", rising, of_active)
    contexts = prompt * total + ((lengths**2).sum(axis=1) - total) // 2
    count = (np.arange(width * engines) < first).reshape(width, engines).sum(axis=0)
    decoding = matrices + speed.step * longest + speed.sequence * total + speed.attention * contexts
    return np.asarray((decoding + speed.prefill(prompt) * count).max(axis=1))


def _queued(
    prompt_tokens: Integers,
    responses: list[int],
    engines: Sequence[Speed],
    slots: int,
    limit: int,
    prefilling: int,
) -> float:
    """Seconds of one scenario with a queue, event by event: always the engine whose next sequence
    ends first, the first engine on a tie, frees its slots and takes as many requests. While there
    is a queue every slot is busy.

    An example with one engine, two slots and responses of 2, 3, 1 and 4 tokens: requests 0 and 1
    start. At the end of step 2 request 0 leaves and request 2 takes its slot. At the end of step 3
    requests 1 and 2 leave and request 3 starts. Nothing waits any more: the rest, 4 steps of a lone
    sequence, is one sum (`_drain`)."""
    count, prompts, batch = len(engines), prompt_tokens.tolist(), len(responses)
    response_tokens = np.array(responses)
    totals = prompt_tokens + response_tokens
    first = deal(prompt_tokens, count, slots, limit)[0]
    # Of each engine: a heap of its running sequences, each as one integer, the step at which it
    # ends times `batch` plus its request; the last step at which one left, and the contexts then.
    running: list[list[int]] = []
    step, context = [0] * count, [0] * count
    agenda: list[tuple[float, int]] = []  # when the next sequence of each engine ends
    for engine, speed in enumerate(engines):
        requests = np.flatnonzero(first == engine)
        running.append((response_tokens[requests] * batch + requests).tolist())
        heapq.heapify(running[engine])
        context[engine] = int(prompt_tokens[requests].sum())
        started = prompt_tokens[requests[requests < prefilling]]
        squares = int((started**2).sum())
        prefill = speed.prefill_token * int(started.sum()) + speed.prefill_square * squares
        steps = running[engine][0] // batch
        agenda.append((prefill + _until_next(steps, slots, context[engine], speed), engine))
    heapq.heapify(agenda)
    full_step, waiting = [speed.matrices(slots) for speed in engines], len(first)
    while waiting < batch:
        clock, engine = agenda[0]
        speed, heap = engines[engine], running[engine]
        end = heap[0] // batch
        contexts = context[engine] + slots * (end - step[engine])
        while waiting < batch and heap[0] // batch == end:
            left = heapq.heapreplace(heap, (end + responses[waiting]) * batch + waiting) % batch
            contexts += prompts[waiting] - prompts[left] - responses[left]
            if waiting < prefilling:
                clock += speed.prefill(prompts[waiting])
            waiting += 1
        steps = heap[0] // batch - end
        attended = steps * contexts + slots * (steps * (steps - 1) // 2)
        clock += steps * full_step[engine] + speed.attention * attended
        step[engine], context[engine] = end, contexts
        heapq.heapreplace(agenda, (clock, engine))
    ends = []
    for clock, engine in agenda:
        now = running[engine][0] // batch
        contexts = context[engine] + slots * (now - step[engine])
        last_steps, requests = np.divmod(np.sort(running[engine]), batch)
        ends.append(clock + _drain(last_steps, totals[requests], now, contexts, engines[engine]))
    return max(ends)


def _drain(ends: Integers, tokens: Integers, now: int, context: int, speed: Speed) -> float:
    """Seconds from step `now` until the last of some sequences is done. `ends` [n] are the steps at
    which they end, rising, and `tokens` [n] what they then have; now they have `context`
    together."""
    steps, active = np.diff(ends, prepend=now), np.arange(len(ends), 0, -1)
    added = active * steps - tokens  # to the contexts, until a sequence has left
    before = context + np.cumsum(added) - added
    contexts = steps * before + active * (steps * (steps - 1) // 2)
    matrices = np.maximum(speed.weights, speed.arithmetic * active) + speed.step
    matrices = matrices + speed.sequence * active
    return float(steps @ matrices + speed.attention * contexts.sum())


def _until_next(steps: int, active: int, context: int, speed: Speed) -> float:
    """Seconds of some steps with a constant number of active sequences, which have `context` tokens
    at first."""
    contexts = steps * context + active * (steps * (steps - 1) // 2)
    return steps * speed.matrices(active) + speed.attention * contexts
