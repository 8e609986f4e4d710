"""Sequences that stream through the transformers engine: the same as in a batch, whenever they
come, and go on where they were."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import SHAPE
from test_rollout import EOS, PROMPTS, requests, responses, words

from executor.data.requests import Requests
from executor.rollout.stop_strings import StopStrings
from executor.rollout.streaming import Collected, Stretch, Unfinished
from executor.rollout.transformers_engine import TransformersEngine
from executor.training import models, weights
from planner.spec.data import Sampler
from planner.spec.workload import Model

WARM = Sampler(temperature=1.0)


def random_model(seed: int) -> torch.nn.Module:
    return models.load("actor", Model(shape=SHAPE, random_weights=True), seed, torch.float32)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return random_model(3)


def unfinished(asked: Requests, sampler: Sampler = WARM) -> list[Unfinished]:
    return [
        Unfinished(
            number=row,
            prompt=prompt,
            response=np.zeros(0, dtype=np.int32),
            key=tuple(asked.keys[row].tolist()),
            max_tokens=int(asked.max_tokens[row]),
            exact=bool(asked.exact[row]),
            sampler=sampler,
        )
        for row, prompt in enumerate(asked.prompts())
    ]


def streamed(
    engine: TransformersEngine,
    sequences: Sequence[Unfinished],
    steps: int = 10**6,
    version: int = 0,
) -> list[Stretch]:
    engine.submit(sequences, version)
    collected = Collected()
    while engine.in_flight and steps:
        collected.add(*engine.step(version))
        steps -= 1
    return list(collected.stretches())


def whole(stretches: Sequence[Stretch]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for stretch in stretches:
        found[stretch.number] += stretch.tokens.tolist()
    return found


@pytest.mark.parametrize("concurrency", [2, 5, 64])
def test_what_streams_is_what_a_batch_gives(model: torch.nn.Module, concurrency: int) -> None:
    asked = requests(PROMPTS * 3, max_tokens=20)
    expected = responses(TransformersEngine(model, [EOS], 64), asked, 1.0)
    stretches = streamed(TransformersEngine(model, [EOS], concurrency), unfinished(asked))
    assert whole(stretches) == dict(enumerate(expected))
    assert {stretch.number for stretch in stretches if stretch.ended} == set(range(len(asked)))


def test_the_log_probs_of_what_streams_are_those_of_a_batch(model: torch.nn.Module) -> None:
    asked = requests(PROMPTS * 3, max_tokens=20)
    lengths, _, expected = TransformersEngine(model, [EOS], 64).generate(asked, WARM)
    stretches = streamed(TransformersEngine(model, [EOS], 7), unfinished(asked))
    for stretch, one in zip(
        sorted(stretches, key=lambda stretch: stretch.number),
        np.split(expected, np.cumsum(lengths)[:-1]),
        strict=True,
    ):
        assert np.allclose(stretch.log_probs, one, atol=1e-5)


def test_strings_end_what_streams(model: torch.nn.Module) -> None:
    asked = requests(PROMPTS * 8, max_tokens=40)
    stops = StopStrings(["w7", "w3 w1"], words(SHAPE["vocab"]))
    expected = responses(TransformersEngine(model, [EOS], 64, stops), asked, 2.0)
    sequences = unfinished(asked, Sampler(temperature=2.0))
    found = streamed(TransformersEngine(model, [EOS], 9, stops), sequences)
    assert whole(found) == dict(enumerate(expected))


def test_sequences_come_at_any_time(model: torch.nn.Module) -> None:
    """In the order in which they came, with samplers of their own."""
    asked = requests(PROMPTS * 3, max_tokens=20)
    warm, greedy = (
        responses(TransformersEngine(model, [EOS], 64), asked, heat) for heat in (1.0, 0.0)
    )
    engine = TransformersEngine(model, [EOS], 8)
    sequences = [
        sequence if row % 2 else unfinished(asked, Sampler())[row]
        for row, sequence in enumerate(unfinished(asked))
    ]
    stretches: list[Stretch] = []
    for begin in range(0, len(sequences), 5):
        stretches += streamed(engine, sequences[begin : begin + 5], steps=3)
    stretches += streamed(engine, [])
    assert whole(stretches) == {
        row: (warm if row % 2 else greedy)[row] for row in range(len(sequences))
    }


def test_a_sequence_goes_on_elsewhere_with_the_tokens_that_it_has(model: torch.nn.Module) -> None:
    """With the same numbers at the same places: it is the sequence that it would have been."""
    asked = requests(PROMPTS, max_tokens=20)
    expected = responses(TransformersEngine(model, [EOS], 64), asked, 1.0)
    sequences = unfinished(asked)
    first = streamed(TransformersEngine(model, [EOS], 6), sequences, steps=7)
    had, ended = whole(first), {stretch.number for stretch in first if stretch.ended}
    assert ended and any(had[n] for n in range(len(asked)) if n not in ended)
    left = [each.with_more(had[each.number]) for each in sequences if each.number not in ended]
    stretches = streamed(TransformersEngine(model, [EOS], 64), left)
    assert whole([*first, *stretches]) == dict(enumerate(expected))


def test_weights_come_between_two_steps(model: torch.nn.Module) -> None:
    """What was sampled before is of the old version, what comes then of the new one. Recomputed, a
    sequence goes on as a prompt that has the same tokens; kept, it does not."""
    asked = requests(PROMPTS, max_tokens=16, exact=True)
    other = random_model(4)
    arrays = weights.gather(other, keep=True)
    assert arrays is not None
    for recompute in (False, True):
        engine = TransformersEngine(random_model(3), [EOS], 64)
        before = streamed(engine, unfinished(asked, Sampler()), steps=6)
        engine.install(arrays)
        if recompute:
            engine.recompute()
        after = streamed(engine, [], version=1)
        assert {len(stretch.tokens) for stretch in before} == {6}
        assert {(p.version, len(p.tokens), p.ended) for p in after} == {(1, 10, True)}
        had = whole(before)
        left = [each.with_more(had[each.number]) for each in unfinished(asked, Sampler())]
        fresh = streamed(TransformersEngine(other, [EOS], 64), left)
        after, fresh = (sorted(each, key=lambda s: s.number) for each in (after, fresh))
        pairs = zip(after, fresh, strict=True)
        same = [np.allclose(a.log_probs, f.log_probs, atol=1e-4) for a, f in pairs]
        assert all(same) if recompute else not any(same)
        assert whole(after) == whole(fresh) or not recompute
