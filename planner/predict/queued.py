"""Seconds of generating a batch where sequences wait for a slot, event by event."""

import heapq
from collections.abc import Sequence

import numpy as np

from planner.predict.columns import Integers
from planner.predict.one_wave import deal
from planner.predict.speed import Speed


def queued_seconds(
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
