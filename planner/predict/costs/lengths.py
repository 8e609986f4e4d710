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
    """Tokens of each sequence of a batch, `prompts` and `responses` [S, B]."""

    prompts: Integers
    responses: Integers

    @classmethod
    def drawn(cls, workload: Workload, scenarios: int) -> Self:
        """Lengths of up to `scenarios` scenarios, or of one where all lengths are fixed. Scenario s
        depends on the workload's seed and s alone."""
        batch, seed = workload.batch, workload.seed
        count = min(scenarios, max(FEWEST_SCENARIOS, MOST_SEQUENCES // batch))
        if isinstance(workload.prompt, Fixed) and isinstance(workload.response, Fixed):
            count = 1
        prompts = [sample(workload.prompt, batch, seed, s, 0) for s in range(count)]
        responses = [sample(workload.response, batch, seed, s, 1) for s in range(count)]
        return cls(np.stack(prompts), np.stack(responses))

    @property
    def scenarios(self) -> int:
        return len(self.prompts)

    @cached_property
    def sequences(self) -> Integers:
        """Tokens [S, B] of each sequence, prompt and response."""
        return self.prompts + self.responses

    @cached_property
    def tokens(self) -> Integers:
        """Tokens [S] of each batch."""
        return np.asarray(self.sequences.sum(axis=1))
