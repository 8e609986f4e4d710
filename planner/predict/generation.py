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
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.predict.columns import Integers, Seconds
from planner.predict.memory import compute_bytes, kv_bytes_per_token
from planner.predict.roofline import LINK_LATENCY_SECONDS
from planner.spec.cluster import Device
from planner.spec.workload import Shape

FOLLOWED_ENGINES = (
    64  # of equal ones with a queue: more are taken to do as these with their share of the requests
)

# Of a decoding step beside the roofline: scheduling, sampling with log-probs, launching the graph;
# and of each sequence in it. On a GPU as engines of 1.5B and 7B models with 64 to 512 sequences
# each had it (profiles/h200/README.md).
STEP_SECONDS = {"cuda": 1.5e-3, "cpu": 4e-3}
SEQUENCE_SECONDS = {"cuda": 1e-5, "cpu": 1e-4}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Coefficients in seconds of one engine. Matrices of a step with n sequences take max(weights,
    n * arithmetic)."""

    weights: float
    arithmetic: float
    attention: float  # per token of context in a step
    step: float
    sequence: float
    prefill_token: float
    prefill_square: float  # times the square of a prompt's length

    def matrices(self, active: int) -> float:
        """Seconds of a step with `active` sequences, attention apart."""
        return max(self.weights, self.arithmetic * active) + self.step + self.sequence * active

    def prefill(self, prompt: int) -> float:
        return self.prefill_token * prompt + self.prefill_square * prompt * prompt


def engine_speed(shape: Shape, tensor_parallel: int, device: Device) -> Speed:
    """The roofline of one engine: bytes over the memory's rate against operations over the matrix
    rate, each at its efficiency, and two all-reduces per layer between the GPUs of the engine
    (Shoeybi et al. 2019, arXiv:1909.08053)."""
    flops = device.flops * device.efficiency_compute * tensor_parallel
    bandwidth = device.memory_bandwidth * device.efficiency_memory
    size, peers = compute_bytes(device), tensor_parallel - 1
    matrices = shape.layers * shape.block_parameters + shape.embedding_parameters
    read = kv_bytes_per_token(shape, tensor_parallel, device) / bandwidth
    scores = (
        4 * shape.layers * shape.heads * shape.head_dim
    )  # FLOPs per query and key, both products
    reduced = 2 * shape.layers * 2 * size * shape.hidden * peers / tensor_parallel
    reduce_token = reduced / (device.link_bandwidth * device.efficiency_link)
    return Speed(
        weights=size * matrices / tensor_parallel / bandwidth,
        arithmetic=2 * matrices / flops,
        attention=max(read, scores / flops),
        step=STEP_SECONDS[device.kind]
        + (2 * shape.layers * LINK_LATENCY_SECONDS if peers else 0.0),
        sequence=SEQUENCE_SECONDS[device.kind] + reduce_token,
        prefill_token=2 * shape.layers * shape.block_parameters / flops + reduce_token,
        prefill_square=scores / 2 / flops,
    )


def generation_seconds(
    prompts: Integers, responses: Integers, engines: Sequence[Speed], concurrency: int, limit: int
) -> Seconds:
    """Seconds [S] until the last engine is done, for `prompts` and `responses` [S, B] in tokens.
    `concurrency` is each engine's number of slots, `limit` the longest response allowed."""
    if responses.shape[1] <= len(engines) * concurrency:
        return _one_wave(prompts, responses, engines, concurrency, limit)
    rows = zip(prompts, responses.tolist(), strict=True)
    return np.array([_queued(p, r, engines, concurrency, limit) for p, r in rows])


class BatchLengths:
    """The lengths of a batch in tokens, `prompts` and `responses` [S, B], with what floors ask of
    them often."""

    FOLLOWED = (
        8  # of the longest responses: how many are looked at with those that share their engine
    )
    LEVELS = (0.25, 0.5, 0.75, 0.9)  # of responses that are shorter: there a wave is cut into parts
    DEEPEST = 32  # waves of a queue: with more, the shared work is what counts

    def __init__(self, prompts: Integers, responses: Integers) -> None:
        self.prompts, self.responses = prompts, responses
        self.contexts = (
            prompts * responses + responses * (responses - 1) // 2
        )  # over all steps of a sequence
        self.even = bool((prompts == prompts[0, 0]).all())
        self.longest = np.argsort(-responses, axis=1, kind="stable")[:, : self.FOLLOWED]
        self._first: dict[tuple[int, int], Integers] = {}
        self._sums = [
            values.sum(axis=1) for values in (responses, self.contexts, prompts, prompts**2)
        ]
        self._rising = np.sort(responses, axis=1)
        self._levels = self._rising[0, [int(share * responses.shape[1]) for share in self.LEVELS]]

    def floors(self, speed: Speed, engines: Integers, concurrency: Integers) -> Seconds:
        """Seconds [n, S] that generation on so many engines with so many slots each [n] is not
        below: what all engines take on average; or the steps that pass at least, full ones as long
        as there is a queue. As jobs taken in their order start no later if some of them get
        shorter, start times are not below those of jobs that take their length in full steps with
        no contexts but prompts. Once the queue is empty a step takes no less than a lone
        sequence's.

        An engine's steps are no fewer than its tokens over its slots, nor than the longest response
        among those that it starts with. Only their number depends on the order of the requests; the
        rest is linear in tokens and contexts, and matrices take no less than what either all steps
        or all tokens need."""
        tokens, contexts, prompts, squares = self._sums
        each = [
            self._longest_at_first(*pair)
            for pair in zip(engines.tolist(), concurrency.tolist(), strict=True)
        ]
        steps = np.maximum(tokens / concurrency[:, None], np.reshape(each, (-1, len(tokens))))
        matrices = np.maximum(speed.weights * steps, speed.arithmetic * tokens) + speed.step * steps
        prefill = speed.prefill_token * prompts + speed.prefill_square * squares
        average = (
            matrices + speed.sequence * tokens + speed.attention * contexts + prefill
        ) / engines[:, None]
        slots = engines * concurrency
        emptied, last = self._least_steps(slots)
        prompt = int(self.prompts.min())
        full = np.maximum(speed.weights, speed.arithmetic * concurrency) + speed.step
        full = (full + speed.sequence * concurrency + speed.attention * prompt * concurrency)[
            :, None
        ]
        lone = speed.matrices(1) + speed.attention * prompt
        return np.asarray(np.maximum(average, emptied * (full - lone) + last * lone))

    def _longest_at_first(self, engines: int, slots: int) -> Integers:
        """The longest of the responses [S] that each engine starts with, summed over the
        engines."""
        if not self.even:
            return np.asarray(self.responses[:, : engines * slots].max(axis=1))
        key, batch = (engines, slots), self.responses.shape[1]
        if key not in self._first:
            rows = min(slots, -(-batch // engines))
            first = np.zeros((len(self.responses), rows * engines), dtype=np.int64)
            there = min(batch, rows * engines)
            first[:, :there] = self.responses[:, :there]
            self._first[key] = first.reshape(len(first), rows, engines).max(axis=1).sum(axis=1)
        return self._first[key]

    def _least_steps(self, slots: Integers) -> tuple[Integers, Integers]:
        """Steps [n, S] that pass at least until the queue for so many slots [n] is empty, and until
        the last response ends.

        Request p starts when p - slots + 1 requests have ended. So many have ended earliest if the
        shortest are taken first; then one after another in every slot, in the order of their
        lengths."""
        batch = self.responses.shape[1]
        emptied, last = np.zeros((2, len(slots), len(self.responses)), dtype=np.int64)
        last[:] = self.responses.max(axis=1)
        at = np.concatenate(
            [self.longest[:, : self.FOLLOWED], np.full((len(self.responses), 1), batch - 1)], axis=1
        )
        scenario = np.arange(len(at))[:, None]
        for number, count in enumerate(slots.tolist()):
            if count < batch <= self.DEEPEST * count:
                places = at - count - count * np.arange(-(-batch // count))[:, None, None]
                ended = np.where(places >= 0, self._rising[scenario, np.maximum(places, 0)], 0).sum(
                    axis=0
                )
                emptied[number] = ended[:, -1]
                last[number] = np.maximum(
                    last[number], (ended + self.responses[scenario, at]).max(axis=1)
                )
        return emptied, last

    def wave_floors(self, speeds: Sequence[Speed], engines: int) -> list[Seconds]:
        """Seconds [S] for each speed that generation with a slot for every sequence is not below:
        those of the engines that hold the longest sequences (where prompts are equal and so dealt
        in turn)."""
        scenarios, batch = self.responses.shape
        places = self.longest[:, :, None] % engines + engines * np.arange(-(-batch // engines))
        inside, rows = places < batch, np.arange(scenarios)[:, None, None]
        places = np.minimum(places, batch - 1)
        lengths = self.responses[rows, places] * inside
        most, total, count = lengths.max(axis=2), lengths.sum(axis=2), inside.sum(axis=2)
        contexts = (self.contexts[rows, places] * inside).sum(axis=2)
        prompt = int(self.prompts[0, 0])
        # Steps and tokens up to some lengths and from one to the next: matrices of no such part
        # take less than of both.
        upto = [np.minimum(lengths, level) for level in self._levels] + [lengths]
        steps = np.diff([part.max(axis=2) for part in upto], axis=0, prepend=0)
        tokens = np.diff([part.sum(axis=2) for part in upto], axis=0, prepend=0)
        return [
            (
                np.maximum(speed.weights * steps, speed.arithmetic * tokens).sum(axis=0)
                + speed.step * most
                + speed.sequence * total
                + speed.attention * contexts
                + speed.prefill(prompt) * count
            ).max(axis=1)
            for speed in speeds
        ]


class GenerationRun:
    """Generation on some engines, simulated scenario by scenario as far as it is asked for:
    `seconds` [S] are floors but for the first `known` scenarios."""

    def __init__(
        self,
        batch: BatchLengths,
        engines: Sequence[Speed],
        concurrency: int,
        limit: int,
        floor: Seconds | None = None,
    ) -> None:
        self._batch, self._engines, self._concurrency, self._limit = (
            batch,
            engines,
            concurrency,
            limit,
        )
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
        """Simulate one more scenario; all of them where none waits for a slot."""
        batch, engines, slots = self._batch, self._engines, self._concurrency
        if not self.queued:
            self.seconds = generation_seconds(
                batch.prompts, batch.responses, engines, slots, self._limit
            )
            self.known = len(self.seconds)
        else:
            at, count = self.known, len(engines)
            some = min(count, FOLLOWED_ENGINES) if _alike(engines) else count
            requests = -(-batch.responses.shape[1] * some // count)
            prompts, responses = (
                batch.prompts[at, :requests],
                batch.responses[at, :requests].tolist(),
            )
            found = _queued(prompts, responses, engines[:some], slots, self._limit)
            self.seconds[at] = max(self.seconds[at], found)
            self.known += 1


def deal(
    prompts: Integers, engines: int, concurrency: int, limit: int
) -> tuple[Integers, Integers]:
    """Engine and place within it of each of the first requests [B], as long as there is a free
    slot."""
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
    prompts: Integers, responses: Integers, engines: Sequence[Speed], concurrency: int, limit: int
) -> Seconds:
    """Every sequence starts at once. With an engine's sequences in the order of their lengths, the
    number of active ones is constant between two lengths; a sequence's contexts add up to p r + r
    (r - 1) / 2."""
    count, width = len(engines), min(concurrency, responses.shape[1])
    if _alike(engines) and (prompts == prompts[0, 0]).all():
        return _even_wave(int(prompts[0, 0]), responses, engines[0], count)
    falling = {
        speed: [speed.matrices(active) for active in range(width, 0, -1)] for speed in set(engines)
    }
    matrices = np.array([falling[speed] for speed in engines])
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
        prefill = token * np.bincount(engine, prompt, count) + square * np.bincount(
            engine, prompt**2, count
        )
        seconds[scenario] = (decoding + attention * contexts + prefill).max()
    return seconds


def _alike(engines: Sequence[Speed]) -> bool:
    return all(speed is engines[0] for speed in engines) or len(set(engines)) == 1


def _even_wave(prompt: int, responses: Integers, speed: Speed, engines: int) -> Seconds:
    """Every sequence starts at once, equal prompts are dealt to equal engines in turn."""
    scenarios, batch = responses.shape
    width = -(-batch // engines)
    lengths = np.zeros((scenarios, width * engines), dtype=np.int64)
    lengths[:, :batch] = responses
    lengths = lengths.reshape(scenarios, width, engines)
    longest, total = lengths.max(axis=1), lengths.sum(axis=1)
    if speed.arithmetic * width <= speed.weights:
        read = speed.weights * longest
    else:
        rising = np.diff(
            np.sort(lengths, axis=1), axis=1, prepend=0
        )  # sequences that end in the order of their lengths
        active = np.arange(width, 0, -1)
        read = np.einsum("swe,w->se", rising, np.maximum(speed.weights, speed.arithmetic * active))
    contexts = prompt * total + ((lengths**2).sum(axis=1) - total) // 2
    count = (np.arange(width * engines) < batch).reshape(width, engines).sum(axis=0)
    seconds = read + speed.step * longest + speed.sequence * total + speed.attention * contexts
    return np.asarray((seconds + speed.prefill(prompt) * count).max(axis=1))


def _queued(
    prompt_tokens: Integers, responses: list[int], engines: Sequence[Speed], slots: int, limit: int
) -> float:
    """One scenario with a queue, event by event: always the engine whose next sequence ends first,
    the first engine on a tie, frees its slots and takes as many requests. While there is a queue
    every slot is busy.

    An engine's heap holds the step at which each sequence ends and the request, as one integer."""
    count, prompts, batch = len(engines), prompt_tokens.tolist(), len(responses)
    response_tokens = np.array(responses)
    totals = prompt_tokens + response_tokens
    step, context = [0] * count, [0] * count
    first = deal(prompt_tokens, count, slots, limit)[0]
    running, agenda = [], []  # agenda: (time of an engine's next event, engine)
    for engine, speed in enumerate(engines):
        requests = np.flatnonzero(first == engine)
        held = prompt_tokens[requests]
        running.append((response_tokens[requests] * batch + requests).tolist())
        heapq.heapify(running[engine])
        context[engine] = int(held.sum())
        clock = speed.prefill_token * context[engine] + speed.prefill_square * int((held**2).sum())
        agenda.append(
            (
                clock + _until_next(running[engine][0] // batch, slots, context[engine], speed),
                engine,
            )
        )
    heapq.heapify(agenda)
    full, waiting = [speed.matrices(slots) for speed in engines], len(first)
    while waiting < batch:
        clock, engine = agenda[0]
        speed, heap = engines[engine], running[engine]
        end = heap[0] // batch
        contexts = context[engine] + slots * (end - step[engine])
        while waiting < batch and heap[0] // batch == end:
            left = heapq.heapreplace(heap, (end + responses[waiting]) * batch + waiting) % batch
            contexts += prompts[waiting] - prompts[left] - responses[left]
            clock += speed.prefill(prompts[waiting])
            waiting += 1
        steps = heap[0] // batch - end
        clock += steps * full[engine] + speed.attention * (
            steps * contexts + slots * (steps * (steps - 1) // 2)
        )
        step[engine], context[engine] = end, contexts
        heapq.heapreplace(agenda, (clock, engine))
    ends = []
    for clock, engine in agenda:
        now = running[engine][0] // batch
        contexts = context[engine] + slots * (now - step[engine])
        steps_at, left_over = np.divmod(np.sort(running[engine]), batch)
        ends.append(clock + _drain(steps_at, totals[left_over], now, contexts, engines[engine]))
    return max(ends)


def _drain(ends: Integers, tokens: Integers, now: int, context: int, speed: Speed) -> float:
    """Seconds from step `now` until the last of some sequences is done: the steps [n] at which they
    end, rising, and the tokens [n] that they then have; now they have `context` together."""
    steps, active = np.diff(ends, prepend=now), np.arange(len(ends), 0, -1)
    before = context + np.cumsum(active * steps - tokens) - (active * steps - tokens)
    contexts = steps * before + active * (steps * (steps - 1) // 2)
    matrices = (
        np.maximum(speed.weights, speed.arithmetic * active) + speed.step + speed.sequence * active
    )
    return float(steps @ matrices + speed.attention * contexts.sum())


def _until_next(steps: int, active: int, context: int, speed: Speed) -> float:
    """Seconds of some steps with a constant number of active sequences, which have `context` tokens
    at first."""
    contexts = steps * context + active * (steps * (steps - 1) // 2)
    return steps * speed.matrices(active) + speed.attention * contexts
