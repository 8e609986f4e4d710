"""The lengths of a workload's sequences in seeded scenarios."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from planner.predict.columns import Integers
from planner.spec.lengths import Fixed, sample
from planner.spec.workload import Workload

# All scenarios together have at most this many sequences (those of a large batch differ little),
# but there are never fewer than FEWEST_SCENARIOS.
MOST_SEQUENCES, FEWEST_SCENARIOS = 2**16, 4


@dataclass(frozen=True)
class SampledLengths:
    """Tokens of each sequence that a step generates, `prompts` and `responses` [S, G]; the `group`
    samples of a prompt lie next to each other. The first `batch` of them (all, if it is None) are
    trained on: nobody knows which will be."""

    prompts: Integers
    responses: Integers
    group: int = 1
    batch: int | None = None

    @classmethod
    def drawn(cls, workload: Workload, scenarios: int) -> Self:
        """Lengths of up to `scenarios` scenarios, or of one where all lengths are fixed. Scenario s
        depends on the workload's seed and s alone."""
        generated, group, seed = workload.generated, workload.group, workload.seed
        count = min(scenarios, max(FEWEST_SCENARIOS, MOST_SEQUENCES // generated))
        if isinstance(workload.prompt, Fixed) and isinstance(workload.response, Fixed):
            count = 1
        prompts = [sample(workload.prompt, generated // group, seed, s, 0) for s in range(count)]
        responses = [sample(workload.response, generated, seed, s, 1) for s in range(count)]
        each = np.repeat(np.stack(prompts), group, axis=1)
        return cls(each, np.stack(responses), group, workload.batch)

    @property
    def scenarios(self) -> int:
        return len(self.prompts)

    @cached_property
    def generated(self) -> Integers:
        """Tokens [S, G] of each sequence, prompt and response."""
        return self.prompts + self.responses

    @cached_property
    def sequences(self) -> Integers:
        """Tokens [S, B] of each sequence that is trained on."""
        return self.generated[:, : self.batch]

    @cached_property
    def tokens(self) -> Integers:
        """Tokens [S] of each batch."""
        return np.asarray(self.sequences.sum(axis=1))
