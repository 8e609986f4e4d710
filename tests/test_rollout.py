"""The transformers engine: it samples what the model says, whatever batch a sequence is in."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import SHAPE
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from executor.data.requests import Requests, make_requests
from executor.rollout.by_length import Part, parts_of
from executor.rollout.engine import Engine
from executor.rollout.sampling import cut, invert
from executor.rollout.stop_strings import StopStrings
from executor.rollout.transformers_engine import TransformersEngine
from executor.rollout.vllm.engine import graph_sizes
from executor.training import models, weights
from planner.spec.data import Sampler
from planner.spec.workload import Model

EOS = 5


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return models.load("actor", Model(shape=SHAPE, random_weights=True), 3, torch.float32)


def requests(
    prompts: list[list[int]], max_tokens: int = 12, exact: bool = False, seed: int = 0
) -> Requests:
    keys = np.array([(seed, 0, row, 0) for row in range(len(prompts))])
    arrays = [np.array(prompt, dtype=np.int32) for prompt in prompts]
    return make_requests(
        arrays, keys, np.full(len(prompts), max_tokens), np.full(len(prompts), exact)
    )


PROMPTS = [[1, 2, 3], [4], [6, 7, 8, 9, 10], [11, 12]] * 3


def responses(engine: Engine, asked: Requests, temperature: float) -> list[list[int]]:
    lengths, tokens, _ = engine.generate(asked, Sampler(temperature=temperature))
    ends = np.cumsum(lengths)
    return [tokens[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]


def test_a_sequence_does_not_depend_on_the_batch_it_is_in(model: torch.nn.Module) -> None:
    asked = requests(PROMPTS)
    together = responses(TransformersEngine(model, [EOS], 64), asked, 1.0)
    assert together == responses(TransformersEngine(model, [EOS], 5), asked, 1.0)
    reverse = np.arange(len(PROMPTS))[::-1].copy()
    assert together[::-1] == responses(
        TransformersEngine(model, [EOS], 64), asked.take(reverse), 1.0
    )
    assert together != responses(
        TransformersEngine(model, [EOS], 64), requests(PROMPTS, seed=1), 1.0
    )


def test_responses_end_at_end_of_sequence_or_at_the_limit(model: torch.nn.Module) -> None:
    found = responses(
        TransformersEngine(model, [EOS, 17], 64), requests(PROMPTS * 8, max_tokens=20), 2.0
    )
    ended = [response for response in found if response[-1] in (EOS, 17)]
    assert ended and len(ended) < len(found)
    assert all(not {EOS, 17} & set(response[:-1]) for response in found)
    assert all(len(response) == 20 for response in found if response[-1] not in (EOS, 17))


def words(count: int) -> PreTrainedTokenizerFast:
    """A tokenizer to which number 7 is the text w7, and spaces part the words."""
    made = Tokenizer(WordLevel({f"w{n}": n for n in range(count)}, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def ended_at(whole: list[list[int]], stops: list[str]) -> list[list[int]]:
    """Responses up to the first token with which their text has a stop string."""

    def end(response: list[int]) -> int:
        texts = [" ".join(f"w{n}" for n in response[:end]) for end in range(len(response) + 1)]
        return next(
            (n for n, text in enumerate(texts) if any(s in text for s in stops)), len(texts)
        )

    return [response[: end(response)] for response in whole]


def test_responses_end_where_a_stop_string_is_complete(model: torch.nn.Module) -> None:
    """`w3 w1` is complete with any word that begins with w1, after any that ends with w3."""
    asked, stops = requests(PROMPTS * 8, max_tokens=40), ["w7", "w3 w1"]
    whole = responses(TransformersEngine(model, [EOS], 64), asked, 2.0)
    engine = TransformersEngine(model, [EOS], 64, StopStrings(stops, words(SHAPE["vocab"])))
    assert ended_at(whole, stops) != whole
    assert responses(engine, asked, 2.0) == ended_at(whole, stops)


def test_what_completes_a_stop_string_is_decoded_seldom() -> None:
    class Counted:
        decoded = 0

        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            self.decoded += 1
            return "".join("abc\ufffd"[token] for token in tokens)

    tokenizer = Counted()
    stops = StopStrings(["ab"], tokenizer)
    assert not stops.completed([0]) and not stops.completed([0, 0]) and not stops.completed([0, 2])
    assert tokenizer.decoded == 2  # a and c
    assert stops.completed([0, 1]) and not stops.completed([1])
    assert not stops.completed([3])  # part of a character: what it completes is looked for


def test_responses_are_handed_over_as_they_finish(model: torch.nn.Module) -> None:
    """Each once, whole, those that end sooner first."""
    asked = requests(PROMPTS * 2, max_tokens=20)
    engine = TransformersEngine(model, [EOS, 17], 32)
    handed: list[tuple[int, list[int]]] = []

    def hand_over(numbers: Sequence[int], found: Sequence[Sequence[int]]) -> None:
        handed.extend(zip(numbers, map(list, found), strict=True))

    lengths, tokens, _ = engine.generate(asked, Sampler(temperature=2.0), hand_over)
    ends = np.cumsum(lengths)
    whole = [tokens[end - n : end].tolist() for end, n in zip(ends, lengths, strict=True)]
    assert sorted(handed) == list(enumerate(whole))
    finished = [len(response) for _, response in handed]
    assert finished == sorted(finished) and len(set(finished)) > 1


def test_what_all_samples_of_a_prompt_share_is_computed_once(model: torch.nn.Module) -> None:
    computed: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    responses(TransformersEngine(model, [], 6), requests([[1, 2, 3]] * 6, max_tokens=3), 1.0)
    hook.remove()
    assert computed == [3, 6, 6]


def test_rows_of_ended_sequences_are_dropped(model: torch.nn.Module) -> None:
    """And the next ones take their places."""
    asked = requests([[token] for token in range(8)], max_tokens=9, exact=True)
    asked.max_tokens[:3] = 2
    computed: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: computed.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    responses(TransformersEngine(model, [], 6), asked, 1.0)
    hook.remove()
    assert computed == [6, 6, 2, *[5] * 7, 2]


def test_attention_is_over_rows_of_like_length() -> None:
    """Within a factor of 3, or short."""
    found = parts_of([1000, 400, 333, 150, 100, 30, 2])
    assert found == [
        Part(slice(0, 2), 1000),
        Part(slice(2, 4), 333),
        Part(slice(4, 7), 100),
    ]


def test_exact_requests_ignore_end_of_sequence(model: torch.nn.Module) -> None:
    everything = list(range(SHAPE["vocab"]))
    asked = requests(PROMPTS, max_tokens=6, exact=True)
    assert {
        len(response)
        for response in responses(TransformersEngine(model, everything, 64), asked, 1.0)
    } == {6}


def test_without_a_temperature_it_generates_what_transformers_does_greedily(
    model: torch.nn.Module,
) -> None:
    ours = responses(TransformersEngine(model, [], 64), requests(PROMPTS[:4]), 0.0)
    for prompt, response in zip(PROMPTS, ours, strict=False):
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert response == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_log_probs_are_those_of_the_distribution_that_is_sampled(
    model: torch.nn.Module, temperature: float
) -> None:
    asked = requests([[1, 2, 3]] * 4000, max_tokens=1)
    _, tokens, log_probs = TransformersEngine(model, [], 4000).generate(
        asked, Sampler(temperature=temperature)
    )
    with torch.no_grad():
        expected = (model(torch.tensor([[1, 2, 3]])).logits[0, -1] / temperature).log_softmax(-1)
    assert np.allclose(log_probs, expected[tokens.tolist()], atol=1e-5)
    shares = np.bincount(tokens, minlength=SHAPE["vocab"]) / 4000
    assert np.abs(shares - expected.exp().numpy()).max() < 0.02


def test_a_token_without_probability_is_never_drawn() -> None:
    log_p = torch.tensor([[float("-inf"), 0.5, float("-inf"), 0.5]]).log_softmax(-1)
    ends = torch.tensor([0.0, 0.4999, 0.5, 1 - 1e-16], dtype=torch.float64)
    assert invert(log_p.expand(4, 4), ends).tolist() == [1, 1, 3, 3]


def test_new_weights_are_used_and_must_be_the_same_parameters(model: torch.nn.Module) -> None:
    other = models.load("actor", Model(shape=SHAPE, random_weights=True), 4, torch.float32)
    engine = TransformersEngine(
        models.load("actor", Model(shape=SHAPE, random_weights=True), 3, torch.float32), [], 64
    )
    before = responses(engine, requests(PROMPTS), 0.0)
    arrays = weights.gather(other, keep=True)
    assert arrays is not None
    engine.install(arrays)
    assert responses(engine, requests(PROMPTS), 0.0) != before
    assert responses(engine, requests(PROMPTS), 0.0) == responses(
        TransformersEngine(other, [], 64), requests(PROMPTS), 0.0
    )
    with pytest.raises(AssertionError, match="lm_head"):
        engine.install({name: array for name, array in arrays.items() if "lm_head" not in name})


def test_every_number_of_sequences_has_a_graph_that_is_little_larger() -> None:
    for concurrency in (1, 2, 3, 7, 8, 9, 128, 171, 255, 256, 257, 512):
        sizes = graph_sizes(concurrency)
        assert sizes[-1] == concurrency and sizes == sorted(set(sizes))
        steps = np.diff([0, *sizes])
        assert max(steps) <= (8 if concurrency <= 256 else 16)
        assert len(sizes) <= 52  # each takes time to capture


# Probabilities 0.4, 0.3, 0.2 and 0.1, of tokens 3, 0, 2 and 1.
LOG_P = torch.tensor([[0.3, 0.1, 0.2, 0.4]]).log()


@pytest.mark.parametrize(
    ("sampling", "left"),
    [
        ({}, [0.3, 0.1, 0.2, 0.4]),
        ({"top_k": 2}, [3 / 7, 0, 0, 4 / 7]),
        ({"top_k": 9}, [0.3, 0.1, 0.2, 0.4]),
        ({"top_p": 0.65}, [3 / 7, 0, 0, 4 / 7]),  # 0.4 is less, 0.7 is enough
        ({"top_p": 0.75}, [1 / 3, 0, 2 / 9, 4 / 9]),
        ({"top_p": 0.01}, [0, 0, 0, 1]),
        ({"min_p": 0.45}, [1 / 3, 0, 2 / 9, 4 / 9]),  # at least 0.18
        ({"min_p": 0.45, "top_p": 0.4}, [0, 0, 0, 1]),  # of 4/9
        ({"top_k": 3, "top_p": 0.7}, [3 / 7, 0, 0, 4 / 7]),  # 4/9, then 7/9
    ],
)
def test_what_a_sampler_leaves_has_its_probability(
    sampling: dict[str, float], left: list[float]
) -> None:
    found = cut(LOG_P, Sampler(temperature=1, **sampling)).exp()
    assert np.allclose(found, [left], atol=1e-6)


def test_no_response_ends_before_its_minimum(model: torch.nn.Module) -> None:
    ends = list(range(0, SHAPE["vocab"], 2))
    engine, asked = TransformersEngine(model, ends, 64), requests(PROMPTS * 4)
    for temperature in (0.0, 1.0):
        sampler = Sampler(temperature=temperature, min_tokens=3)
        lengths, tokens, log_probs = engine.generate(asked, sampler)
        first = np.cumsum(lengths) - lengths
        assert lengths.min() == 4 and all((tokens[first + n] % 2).all() for n in range(3))
    exact = engine.generate(requests(PROMPTS * 4, exact=True), sampler)
    assert (exact[1][np.cumsum(exact[0]) - exact[0]] % 2 == 0).any()
    # Without the half that would end it, a token is twice as likely.
    whole = engine.generate(asked, Sampler(temperature=1.0))
    assert np.exp(log_probs[first]).mean() > 1.5 * np.exp(whole[2]).mean()
