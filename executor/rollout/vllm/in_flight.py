"""Sequences that stream through vLLM."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from executor.rollout.stop_strings import StopStrings
from executor.rollout.streaming import Drawn, Unfinished
from planner.spec.data import Sampler

if TYPE_CHECKING:  # it imports vLLM
    from executor.rollout.vllm.private import Internals


class InFlight:
    """The sequences that an engine has. Each is a request of a name that no other has had."""

    def __init__(
        self, internals: "Internals", eos: Sequence[int], stops: StopStrings | None
    ) -> None:
        self._internals, self._eos, self._stops = internals, eos, stops
        self._asked = 0  # requests so far
        self._abandoned = 0  # how often all were, as at the start of a run
        self._sequences: dict[str, Unfinished] = {}
        self._responses: dict[str, list[int]] = {}  # so far, where strings may end them

    def __len__(self) -> int:
        return len(self._sequences)

    def submit(self, sequences: Sequence[Unfinished], version: int) -> None:
        """A sequence that has tokens goes on as a prompt with a key of its own: vLLM draws by the
        order of the tokens of a request, not by their places."""
        if not sequences:
            return
        first, self._asked = self._asked, self._asked + len(sequences)
        names = [f"stream-{number}" for number in range(first, self._asked)]
        self._sequences |= dict(zip(names, sequences, strict=True))
        prompts = [np.concatenate([each.prompt, each.response]).tolist() for each in sequences]
        params = [self._params(each) for each in sequences]
        # The cached beginnings of prompts that other weights have computed are not for these; each
        # run that the process has been in counts its versions anew.
        salt = f"run {self._abandoned}, weights {version}"
        self._internals.add(zip(names, prompts, params, strict=True), salt)

    def _params(self, sequence: Unfinished) -> Any:
        """Those of what is left of a sequence."""
        had, sampler, key = len(sequence.response), sequence.sampler, sequence.key
        if had:
            key = (*key, had)
            least = max(0, sampler.min_tokens - had)
            sampler = sampler.model_copy(update={"min_tokens": least})
        left = sequence.max_tokens - had
        return sampling_params(sampler, key, left, sequence.exact, self._eos)

    def step(self, version: int) -> tuple[int, list[Drawn]]:
        """Schedule a step with the weights of this version; what an earlier one drew, and the
        version by which it did."""
        scheduler = self._internals.scheduler
        scheduler.version = version
        outputs = self._internals.step()
        log_probs = scheduler.log_probs.tolist() if outputs else []
        drawn, stopped = [], []
        for output, log_prob in zip(outputs, log_probs, strict=True):
            name, tokens = output.request_id, output.new_token_ids
            ended = output.finish_reason is not None
            if not ended and self._completes(name, tokens):
                ended = True
                stopped.append(name)
            number = self._sequences[name].number
            drawn.append(Drawn(number, tokens, [log_prob] * len(tokens), ended))
            if ended:
                self._forget(name)
        if stopped:
            self._internals.abort(stopped)
        return scheduler.version_of_outputs, drawn

    def abandon(self) -> None:
        """Forget all sequences."""
        self._abandoned += 1
        self._internals.abort(list(self._sequences))
        self._sequences, self._responses = {}, {}

    def _completes(self, name: str, tokens: list[int]) -> bool:
        """Whether a sequence has one of the strings that end it, with these tokens."""
        sequence = self._sequences[name]
        if self._stops is None or sequence.exact:
            return False
        response = self._responses.setdefault(name, sequence.response.tolist())
        response += tokens
        return bool(response) and self._stops.completed(response)

    def _forget(self, name: str) -> None:
        del self._sequences[name]
        self._responses.pop(name, None)


def sampling_params(
    sampler: Sampler, key: Sequence[int], max_tokens: int, exact: bool, eos: Sequence[int]
) -> Any:
    """vLLM's parameters of a request, whose key fixes its randomness."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=sampler.temperature,
        top_p=sampler.top_p,
        top_k=sampler.top_k,
        min_p=sampler.min_p,
        min_tokens=0 if exact else min(sampler.min_tokens, max_tokens),
        seed=int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1),
        max_tokens=max_tokens,
        ignore_eos=True,
        stop_token_ids=None if exact else list(eos),
        logprobs=0,  # of the token itself, and of no other
        detokenize=False,
        skip_clone=True,  # nobody else has it
    )
