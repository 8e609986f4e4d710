"""Seconds of generating a batch where every sequence has a slot and starts at once."""

import heapq
from collections.abc import Sequence

import numpy as np

from planner.predict.columns import Integers, Seconds
from planner.predict.speed import Speed


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


def one_wave_seconds(
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
    if alike(engines) and (prompts == prompts[0, 0]).all():
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
        steps = np.diff(lengths, axis=1, prepend=0)  # from the end of one to that of the next
        decoding = (steps * matrices).sum(axis=1)
        contexts = prompt * response + response * (response - 1) // 2
        context_sums = np.bincount(engine, contexts, count)
        prefilled = np.where(np.arange(len(prompt)) < first, prompt, 0)
        prompt_sums = np.bincount(engine, prefilled, count)
        prompt_squares = np.bincount(engine, prefilled**2, count)
        prefill = token * prompt_sums + square * prompt_squares
        seconds[scenario] = (decoding + attention * context_sums + prefill).max()
    return seconds


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
    squares = (lengths**2).sum(axis=1)
    contexts = prompt * total + (squares - total) // 2
    is_first = (np.arange(width * engines) < first).reshape(width, engines)
    prefill = speed.prefill(prompt) * is_first.sum(axis=0)
    decoding = matrices + speed.step * longest + speed.sequence * total
    decoding = decoding + speed.attention * contexts
    return np.asarray((decoding + prefill).max(axis=1))


def alike(engines: Sequence[Speed]) -> bool:
    return all(speed is engines[0] for speed in engines) or len(set(engines)) == 1
