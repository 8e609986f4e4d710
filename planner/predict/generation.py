"""Seconds of generating a batch on engines that decode many sequences at once.

The model. Requests wait in one queue in the order of the batch. Each goes to the engine with the fewest outstanding
tokens (prompt and response limit of what it has been given and not finished) among those with a free slot, the first
one on a tie; nobody looks at a response's length before it is there. An engine that admits requests stops to prefill
them, then decodes: a step gives each of its n sequences one token and takes

    matrices(n) + attention * (sum of the n contexts) + step + sequence * n

seconds. The matrices read all weights once whatever n is, until the arithmetic takes longer; attention reads every
sequence's cached keys and values. A sequence of r tokens takes r steps and leaves its slot at the end of the last one.

As a step's time is linear in the contexts, time between two events (a sequence leaves) is a closed sum, and no token
is simulated alone. If there is a slot for every sequence, nothing is ever admitted late and the whole run is one sum.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.predict.memory import compute_bytes, kv_bytes_per_token
from planner.predict.roofline import LINK_LATENCY_SECONDS
from planner.spec.cluster import Device
from planner.spec.workload import Shape

Tokens = NDArray[np.int64]
Seconds = NDArray[np.float64]

# Of a decoding step beside the roofline: scheduling, sampling with log-probs, launching the graph; and of each sequence
# in it. vLLM on an H200 decodes about 34,000 tokens/s with 256 sequences of a 1.5B model, 7.5 ms a step, of which the
# roofline explains 2.6; the split into a fixed and a growing part is a guess that profiles replace.
STEP_SECONDS = {"cuda": 2e-3, "cpu": 4e-3}
SEQUENCE_SECONDS = {"cuda": 1.2e-5, "cpu": 1e-4}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Coefficients in seconds of one engine. Matrices of a step with n sequences take max(weights, n * arithmetic)."""

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
    """The roofline of one engine: bytes over the memory's rate against operations over the matrix rate, each at its
    efficiency, and two all-reduces per layer between the GPUs of the engine (Shoeybi et al. 2019, arXiv:1909.08053)."""
    flops = device.flops * device.efficiency_compute * tensor_parallel
    bandwidth = device.memory_bandwidth * device.efficiency_memory
    size, peers = compute_bytes(device), tensor_parallel - 1
    matrices = shape.layers * shape.block_parameters + shape.embedding_parameters
    read = kv_bytes_per_token(shape, tensor_parallel, device) / bandwidth
    scores = 4 * shape.layers * shape.heads * shape.head_dim  # FLOPs per query and key, both products
    reduced = 2 * shape.layers * 2 * size * shape.hidden * peers / tensor_parallel
    reduce_token = reduced / (device.link_bandwidth * device.efficiency_link)
    return Speed(
        weights=size * matrices / tensor_parallel / bandwidth,
        arithmetic=2 * matrices / flops,
        attention=max(read, scores / flops),
        step=STEP_SECONDS[device.kind] + (2 * shape.layers * LINK_LATENCY_SECONDS if peers else 0.0),
        sequence=SEQUENCE_SECONDS[device.kind] + reduce_token,
        prefill_token=2 * shape.layers * shape.block_parameters / flops + reduce_token,
        prefill_square=scores / 2 / flops,
    )


def generation_seconds(
    prompts: Tokens, responses: Tokens, engines: Sequence[Speed], concurrency: int, limit: int
) -> Seconds:
    """Seconds [S] until the last engine is done, for `prompts` and `responses` [S, B] in tokens. `concurrency` is each
    engine's number of slots, `limit` the longest response allowed."""
    if responses.shape[1] <= len(engines) * concurrency:
        return _one_wave(prompts, responses, engines, concurrency, limit)
    rows = zip(prompts, responses.tolist(), strict=True)
    return np.array([_queued(p, r, engines, concurrency, limit) for p, r in rows])


def generation_floor(prompts: Tokens, responses: Tokens, engines: Sequence[Speed], concurrency: int) -> Seconds:
    """Seconds [S] that no way of dealing the requests undercuts: the work of full engines shared evenly, or the longest
    sequence alone. A token costs least in a full step, since matrices(n) / n falls with n."""
    least = min(engines, key=lambda speed: speed.matrices(concurrency))
    squares = responses * (responses - 1) // 2
    work = responses.sum(axis=1) * least.matrices(concurrency) / concurrency
    work += min(speed.attention for speed in engines) * (prompts * responses + squares).sum(axis=1)
    alone = responses.max(axis=1) * min(speed.matrices(1) for speed in engines)
    return np.asarray(np.maximum(work / len(engines), alone))


def deal(prompts: Tokens, engines: int, concurrency: int, limit: int) -> tuple[Tokens, Tokens]:
    """Engine and place within it of each of the first requests [B], as long as there is a free slot."""
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


def _one_wave(prompts: Tokens, responses: Tokens, engines: Sequence[Speed], concurrency: int, limit: int) -> Seconds:
    """Every sequence starts at once. With an engine's sequences in the order of their lengths, the number of active
    ones is constant between two lengths; a sequence's contexts add up to p r + r (r - 1) / 2."""
    count, width = len(engines), min(concurrency, responses.shape[1])
    falling = {speed: [speed.matrices(active) for active in range(width, 0, -1)] for speed in set(engines)}
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
        prefill = token * np.bincount(engine, prompt, count) + square * np.bincount(engine, prompt**2, count)
        seconds[scenario] = (decoding + attention * contexts + prefill).max()
    return seconds


def _queued(prompt_tokens: Tokens, responses: list[int], engines: Sequence[Speed], slots: int, limit: int) -> float:
    """One scenario with a queue, event by event: always the engine whose next sequence ends first, the first engine on
    a tie, frees its slots and takes as many requests. While there is a queue every slot is busy.

    An engine's heap holds the step at which each sequence ends and the request, as one integer."""
    count, prompts, batch = len(engines), prompt_tokens.tolist(), len(responses)
    step, context = [0] * count, [0] * count
    first = deal(prompt_tokens, count, slots, limit)[0]
    running, agenda = [], []  # agenda: (time of an engine's next event, engine)
    for engine, speed in enumerate(engines):
        requests = np.flatnonzero(first == engine).tolist()
        running.append([responses[request] * batch + request for request in requests])
        heapq.heapify(running[engine])
        context[engine] = sum(prompts[request] for request in requests)
        clock = sum(speed.prefill(prompts[request]) for request in requests)
        agenda.append((clock + _until_next(running[engine][0] // batch, slots, context[engine], speed), engine))
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
        clock += steps * full[engine] + speed.attention * (steps * contexts + slots * (steps * (steps - 1) // 2))
        step[engine], context[engine] = end, contexts
        heapq.heapreplace(agenda, (clock, engine))
    ends = []
    for clock, engine in agenda:
        now = running[engine][0] // batch
        contexts = context[engine] + slots * (now - step[engine])
        pending = [(entry // batch, entry % batch) for entry in sorted(running[engine])]
        tokens = [(end, prompts[request] + responses[request]) for end, request in pending]
        ends.append(clock + _drain(tokens, now, contexts, engines[engine]))
    return max(ends)


def _drain(left: Sequence[tuple[int, int]], now: int, context: int, speed: Speed) -> float:
    """Seconds from step `now` until the last of some sequences (step at which it ends, tokens it then has) is done."""
    seconds = 0.0
    for gone, (end, tokens) in enumerate(left):
        active, steps = len(left) - gone, end - now
        seconds += _until_next(steps, active, context, speed)
        context += active * steps - tokens
        now = end
    return seconds


def _until_next(steps: int, active: int, context: int, speed: Speed) -> float:
    """Seconds of some steps with a constant number of active sequences, which have `context` tokens at first."""
    contexts = steps * context + active * (steps * (steps - 1) // 2)
    return steps * speed.matrices(active) + speed.attention * contexts
