"""Seconds that scoring on the host takes after generation has ended.

A reward without `processes` scores the batch then, one sample after the other. One with n processes
scores samples as they finish, beside generation, and only what sticks out is charged. Samples wait
in one queue, and each takes s seconds on one of n processes. So the last of B samples starts when
the one that finished n places before it has been scored, and scoring ends at

    max over i of  r(i n) + (i + 1) s

where r(j) is when the j-th last sample finishes (j = 0: the last one, as generation ends). For
example three samples that finish at 2, 6 and 10 s, and take 5 s on one process: the last one is
scored at max(10 + 5, 6 + 10, 2 + 15) = 17, which is 7 s after generation.

A sample is taken to finish at the share of generation that its length is of the longest one, as
where all sequences start at once. That share is the same for all layouts: so what sticks out falls
with the seconds of generation, but by no more than these rise. The search relies on that: faster
generation is never worse, whatever is scored after it."""

import math
from collections.abc import Sequence

import numpy as np

from planner.predict.columns import Integers, Seconds
from planner.spec.rewards import HostReward

MOST_WAVES = 64  # of a queue that are looked at: the first, the last, and some between


class Scoring:
    """What some rewards take for batches whose responses have these lengths [S, B]; each has
    processes of its own."""

    def __init__(self, rewards: Sequence[HostReward], responses: Integers) -> None:
        self.rewards, self._responses = rewards, responses
        # Seconds of each wave of samples, and the shares [W, S] of generation beside it.
        self._waves = [self._waves_of(reward) for reward in rewards if reward.processes is not None]
        batch = responses.shape[1]
        whole = [r.seconds_per_sequence * batch for r in rewards if r.processes is None]
        self._afterwards = max(whole, default=0.0)

    @property
    def beside(self) -> bool:
        """Whether anything is scored beside generation."""
        return bool(self._waves)

    @property
    def busy(self) -> float:
        """Seconds that the processes of the slowest of these rewards need for a batch, where some
        score beside generation."""
        batch = self._responses.shape[1] if self.beside else 0
        alone = [r.seconds_per_sequence * batch / (r.processes or 1) for r in self.rewards]
        return max(alone, default=0.0)

    def _waves_of(self, reward: HostReward) -> tuple[Seconds, Seconds]:
        count, batch = reward.processes or 1, self._responses.shape[1]
        waves = math.ceil(batch / count)
        looked_at = np.unique(np.linspace(0, waves - 1, MOST_WAVES).astype(np.int64))
        falling = -np.sort(-self._responses, axis=1)  # the last to finish first
        share = falling / falling[:, :1]
        beside = 1 - share[:, looked_at * count].T
        return np.asarray((looked_at + 1) * reward.seconds_per_sequence), beside

    def after(self, generation: Seconds) -> Seconds:
        """Seconds [..., S] after generation of so many [..., S]. A further column is of the mean
        over the scenarios (`with_mean`), for which what is returned is a bound from below."""
        found = np.full(generation.shape, self._afterwards)
        for seconds, beside in self._waves:
            if generation.shape[-1] > beside.shape[-1]:
                most = beside.max(axis=1, keepdims=True)
                beside = np.concatenate([beside, most], axis=1)
            for ready, share in zip(seconds.tolist(), beside, strict=True):
                np.maximum(found, ready - share * generation, out=found)
        return found

    def most(self, generation: Seconds) -> HostReward:
        """The reward that takes most after generation of so many seconds [S]."""
        alone = [Scoring([reward], self._responses) for reward in self.rewards]
        return self.rewards[int(np.argmax([each.after(generation).mean() for each in alone]))]
