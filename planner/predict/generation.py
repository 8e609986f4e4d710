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

The samples of a prompt (its group) stay on one engine as far as its share of the batch goes, and
their common prompt is prefilled once there. So requests are dealt in another order than that of the
batch: the first sample of every prompt, then the second of every prompt, and so on. Those of a
prompt then come to the same engine where the engines divide the prompts, and each engine has an
even share of the first samples, which alone have their prompt to `prefill`, in any case.
"""

from collections.abc import Sequence

import numpy as np

from planner.predict.columns import Integers, Seconds
from planner.predict.generation_floors import BatchLengths
from planner.predict.kv_cache import AMPLE
from planner.predict.one_wave import alike, deal, one_wave_seconds
from planner.predict.preemption import preempting_seconds
from planner.predict.queued import queued_seconds
from planner.predict.speed import Speed

# Equal engines with a queue: if there are more than these, the others are taken to do as these with
# their share of the requests.
FOLLOWED_ENGINES = 64


def generation_seconds(
    prompts: Integers,
    responses: Integers,
    engines: Sequence[Speed],
    concurrency: int,
    limit: int,
    first: int | None = None,
) -> Seconds:
    """Seconds [S] until the last engine is done, for `prompts` and `responses` [S, B] in tokens.
    `concurrency` is each engine's number of slots, `limit` the longest response allowed. The
    `first` requests prefill their prompts, the others find them there; None: all prefill."""
    batch = responses.shape[1]
    first = batch if first is None else min(first, batch)
    if responses.shape[1] <= len(engines) * concurrency:
        return one_wave_seconds(prompts, responses, engines, concurrency, limit, first)
    rows = zip(prompts, responses.tolist(), strict=True)
    return np.array([queued_seconds(p, r, engines, concurrency, limit, first) for p, r in rows])


class GenerationRun:
    """Generation on some engines, simulated scenario by scenario as far as it is asked for. The
    first `known` of `seconds` [S] are simulated, the others are floors. Each engine has `room` for
    the keys and values of so many tokens."""

    def __init__(
        self,
        batch: BatchLengths,
        engines: Sequence[Speed],
        concurrency: int,
        limit: int,
        floor: Seconds | None = None,
        room: int = AMPLE,
    ) -> None:
        self._batch, self._engines, self._room = batch, engines, room
        self._concurrency, self._limit = concurrency, limit
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
        """Simulate one more scenario; all of them where none waits for a slot or for room."""
        batch, engines, slots = self._batch, self._engines, self._concurrency
        if not self.queued and self._room == AMPLE:
            self.seconds = generation_seconds(
                batch.prompts, batch.responses, engines, slots, self._limit, batch.first
            )
            self.known = len(self.seconds)
        else:
            scenario, count = self.known, len(engines)
            followed = min(count, FOLLOWED_ENGINES) if alike(engines) else count
            first = -(-batch.first * followed // count)
            share = (np.arange(batch.group)[:, None] * batch.first + np.arange(first)).ravel()
            prompts = batch.prompts[scenario, share]
            responses = batch.responses[scenario, share].tolist()
            speeds, limit = engines[:followed], self._limit
            if self._room == AMPLE:
                found = queued_seconds(prompts, responses, speeds, slots, limit, first)
            else:
                dealt = deal(prompts, followed, slots, limit)[0].tolist()
                asked = prompts.tolist(), responses, dealt
                found = preempting_seconds(*asked, speeds, self._room, first)
            self.seconds[scenario] = max(self.seconds[scenario], found)
            self.known += 1
