"""Seconds that generation of a batch is not below, without a simulation.

The engines are those of `generation.py`. Floors are quick to find, so the search simulates only
what its floor does not rule out.
"""

from collections.abc import Sequence

import numpy as np

from planner.predict.columns import Integers, Seconds
from planner.predict.kv_cache import AMPLE
from planner.predict.preemption import UNUSED
from planner.predict.speed import Speed


class BatchLengths:
    """The lengths of a batch in tokens, `prompts` and `responses` [S, B], with what floors ask of
    them often. They are given with the `group` samples of a prompt next to each other, and kept in
    the order in which they are dealt: the `first` B / group of them prefill their prompts.

    A floor is a number of seconds that a simulation is not below. It is quick to find, so the
    search simulates only what its floor does not rule out. An example: prompts of 10 tokens and
    responses of 8, 2, 2 and 4 on one engine with two slots. Together they have 16 tokens, so at
    least 16 / 2 = 8 steps pass; the longest response that starts at once also takes 8. The slots
    are taken by 8 and 2; then 2 and 4 follow in the second slot, and the run does take 8 steps."""

    FOLLOWED = 8  # longest responses that are looked at with those that share their engine
    LEVELS = (0.25, 0.5, 0.75, 0.9)  # shares of shorter responses: there a wave is cut into parts
    DEEPEST = 32  # waves of a queue: with more, the shared work is what counts

    def __init__(self, prompts: Integers, responses: Integers, group: int = 1) -> None:
        self.prompts, self.responses = by_sample(prompts, group), by_sample(responses, group)
        prompts, responses = self.prompts, self.responses
        self.group, self.first = group, prompts.shape[1] // group
        self.even = bool((prompts == prompts[0, 0]).all())
        # Contexts of a sequence over all of its steps: p, p + 1, ..., p + r - 1.
        self.contexts = prompts * responses + responses * (responses - 1) // 2
        self.longest = np.argsort(-responses, axis=1, kind="stable")[:, : self.FOLLOWED]
        self._longest_starting: dict[tuple[int, int], Integers] = {}
        self._tokens = responses.sum(axis=1)
        self._context_sums = self.contexts.sum(axis=1)
        prefilled = prompts[:, : self.first]
        self._prompt_sums = prefilled.sum(axis=1)
        self._prompt_squares = (prefilled**2).sum(axis=1)
        self._rising = np.sort(responses, axis=1)
        self._levels = self._rising[0, [int(share * responses.shape[1]) for share in self.LEVELS]]

    def floors(
        self, speed: Speed, engines: Integers, concurrency: Integers, room: Integers | None = None
    ) -> Seconds:
        """Seconds [n, S] that generation with `engines` [n] of `concurrency` [n] slots and `room`
        [n] for tokens each (None: AMPLE) is not below: the larger of two floors.

        Work: what all engines take on average. An engine's steps are no fewer than its tokens over
        its slots, nor than the longest response among those that it starts with. Only their number
        depends on the order of the requests; the rest is linear in tokens and contexts, and
        matrices take no less than what either all steps or all tokens need. No step's contexts are
        more than an engine has room for, and what is preempted only adds prefills.

        Queue: the steps that pass at least, full ones as long as requests wait. As jobs taken in
        their order start no later if some of them get shorter, start times are not below those of
        jobs that take their length in full steps with no contexts but prompts. Once the queue is
        empty a step takes no less than a lone sequence's, and no step of an engine does that may
        preempt, for that has empty slots."""
        room = np.full_like(engines, AMPLE) if room is None else room
        return np.maximum(
            self._work_floors(speed, engines, concurrency, room),
            self._queue_floors(speed, engines, concurrency, room),
        )

    def _work_floors(
        self, speed: Speed, engines: Integers, concurrency: Integers, room: Integers
    ) -> Seconds:
        pairs = zip(engines.tolist(), concurrency.tolist(), strict=True)
        starting = [self._longest_at_first(*pair) for pair in pairs]
        longest = np.reshape(starting, (-1, len(self._tokens)))
        tokens = self._tokens
        steps = np.maximum(tokens / concurrency[:, None], longest)  # of all engines together
        with np.errstate(divide="ignore"):  # without room it takes for ever
            steps = np.maximum(steps, (self._context_sums + UNUSED * tokens) / room[:, None])
        matrices = np.maximum(speed.weights * steps, speed.arithmetic * tokens) + speed.step * steps
        decoding = matrices + speed.sequence * tokens + speed.attention * self._context_sums
        prefill = (
            speed.prefill_token * self._prompt_sums + speed.prefill_square * self._prompt_squares
        )
        return np.asarray((decoding + prefill) / engines[:, None])

    def _queue_floors(
        self, speed: Speed, engines: Integers, concurrency: Integers, room: Integers
    ) -> Seconds:
        emptied, last = self._least_steps(engines * concurrency)
        shortest = int(self.prompts.min())
        matrices = np.maximum(speed.weights, speed.arithmetic * concurrency) + speed.step
        attention = speed.attention * shortest * concurrency
        full_step = matrices + speed.sequence * concurrency + attention
        lone_step = speed.matrices(1) + speed.attention * shortest
        more = np.where(room < AMPLE, 0.0, full_step - lone_step)[:, None]
        return np.asarray(emptied * more + last * lone_step)

    def _longest_at_first(self, engines: int, slots: int) -> Integers:
        """The longest of the responses that each engine starts with, summed over the engines [S].
        With uneven prompts nobody knows which engine a request goes to: then the longest that any
        engine starts with.

        >>> BatchLengths(np.full((1, 4), 10), np.array([[8, 2, 2, 4]]))._longest_at_first(2, 1)
        array([10])
        """
        if not self.even:
            return np.asarray(self.responses[:, : engines * slots].max(axis=1))
        key, (scenarios, batch) = (engines, slots), self.responses.shape
        if key not in self._longest_starting:
            rounds = min(slots, -(-batch // engines))  # equal prompts are dealt in turn
            starting = np.zeros((scenarios, rounds * engines), dtype=np.int64)
            count = min(batch, rounds * engines)
            starting[:, :count] = self.responses[:, :count]
            by_engine = starting.reshape(scenarios, rounds, engines)
            self._longest_starting[key] = by_engine.max(axis=1).sum(axis=1)
        return self._longest_starting[key]

    def _least_steps(self, slots: Integers) -> tuple[Integers, Integers]:
        """Steps [n, S] that pass at least until the queue for so many slots [n] is empty, and until
        the last response ends.

        Request p starts when p - slots + 1 requests have ended. That many have ended earliest if
        the shortest are taken first; then one after another in every slot, in the order of their
        lengths. Of responses 8, 2, 2, 4 and two slots, the last request (p = 3) starts when two
        have ended: not before step 2, so that its end is not before step 2 + 4."""
        scenarios, batch = self.responses.shape
        emptied, last = np.zeros((2, len(slots), scenarios), dtype=np.int64)
        last[:] = self.responses.max(axis=1)
        final = np.full((scenarios, 1), batch - 1)
        requests = np.concatenate([self.longest, final], axis=1)
        scenario = np.arange(scenarios)[:, None]
        for row, count in enumerate(slots.tolist()):
            if not count < batch <= self.DEEPEST * count:
                continue
            waves = np.arange(-(-batch // count))[:, None, None]
            # A request's slot has been taken by every count-th of the shorter responses before it.
            before = requests - count - count * waves
            lengths = np.where(before >= 0, self._rising[scenario, np.maximum(before, 0)], 0)
            started = lengths.sum(axis=0)
            emptied[row] = started[:, -1]
            ended = (started + self.responses[scenario, requests]).max(axis=1)
            last[row] = np.maximum(last[row], ended)
        return emptied, last

    def wave_floors(self, speeds: Sequence[Speed], engines: int) -> list[Seconds]:
        """Seconds [S] for each speed that generation with a slot for every sequence is not below:
        those of the engines that hold the longest sequences (where prompts are equal and so dealt
        in turn)."""
        scenarios, batch = self.responses.shape
        turns = np.arange(-(-batch // engines))
        places = self.longest[:, :, None] % engines + engines * turns  # all on the same engine
        scenario, inside = np.arange(scenarios)[:, None, None], places < batch
        places = np.minimum(places, batch - 1)
        lengths = self.responses[scenario, places] * inside
        contexts = (self.contexts[scenario, places] * inside).sum(axis=2)
        longest, total = lengths.max(axis=2), lengths.sum(axis=2)
        count = (inside & (places < self.first)).sum(axis=2)
        prompt = int(self.prompts[0, 0])
        # Steps and tokens up to some lengths and from one to the next: the matrices of no such part
        # take less than either its steps or its tokens need.
        up_to = [np.minimum(lengths, level) for level in self._levels] + [lengths]
        steps = np.diff([part.max(axis=2) for part in up_to], axis=0, prepend=0)
        tokens = np.diff([part.sum(axis=2) for part in up_to], axis=0, prepend=0)
        found = []
        for speed in speeds:
            matrices = np.maximum(speed.weights * steps, speed.arithmetic * tokens).sum(axis=0)
            decoding = matrices + speed.step * longest + speed.sequence * total
            decoding = decoding + speed.attention * contexts
            found.append((decoding + speed.prefill(prompt) * count).max(axis=1))
        return found


def by_sample(lengths: Integers, group: int) -> Integers:
    """Lengths [S, B] in the order in which requests are dealt.

    >>> by_sample(np.array([[10, 11, 20, 21]]), group=2)
    array([[10, 20, 11, 21]])
    """
    if group == 1:
        return lengths
    return lengths.reshape(len(lengths), -1, group).swapaxes(1, 2).reshape(len(lengths), -1)
