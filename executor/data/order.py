"""The order in which prompts come: each once per epoch, shuffled by seed and epoch. Of several
pools, which have weights, each comes once per epoch of its own."""

from collections.abc import Sequence
from functools import lru_cache
from math import floor

from executor.data.requests import ORDER, Rows, permutation

Drawn = tuple[int, int]  # a pool, and a prompt in it


class Shuffled:
    """The endless stream of the prompts of pools of these `sizes`. `weights` are the pools' shares
    of it: of any first n prompts, a pool has its share but for less than one for each pool."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._sizes, self._seed = sizes, seed
        self._shares = [weight / sum(weights) for weight in weights]
        self._shuffled = lru_cache(maxsize=2 * len(sizes))(self._shuffle)

    def places(self, begin: int, end: int) -> list[Drawn]:
        """The prompts `[begin, end)` of the stream."""
        return [self._place(pool, number) for pool, number in self._turns(begin, end)]

    def _turns(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Whose turn it is at each place, and how often it was before. The j-th turn of a pool with
        share s comes at time (j + 1/2) / s, and times are taken in order. Before time t come
        about t turns, half a turn more or less for each pool; so the places asked for lie between
        the times chosen here, wherever the stream is entered."""
        early = max(0, begin - len(self._shares))
        late = end + len(self._shares)
        before = [floor(early * share + 0.5) for share in self._shares]
        times = [
            ((number + 0.5) / share, pool, number)
            for pool, share in enumerate(self._shares)
            for number in range(before[pool], floor(late * share + 0.5))
        ]
        skipped = begin - sum(before)
        chosen = sorted(times)[skipped : skipped + end - begin]
        return [(pool, number) for _, pool, number in chosen]

    def _place(self, pool: int, number: int) -> Drawn:
        epoch, place = divmod(number, self._sizes[pool])
        return pool, int(self._shuffled(pool, epoch)[place])

    def _shuffle(self, pool: int, epoch: int) -> Rows:
        key = (
            (self._seed, epoch, ORDER)
            if len(self._sizes) == 1
            else (self._seed, epoch, pool, ORDER)
        )
        return permutation(self._sizes[pool], *key)
