"""Who has which sequences of a stream: those that wait, and those that each engine has."""

from collections.abc import Callable, Iterable
from itertools import takewhile

from executor.running.growing import Growing


class Shares:
    """Sequences wait in the order of the steps, and those of evaluations before them. An engine
    takes the next ones up to its share of all, and all that wait of a prompt of which it takes
    some: it computes the prompt once. Engines that are `away` have no share."""

    def __init__(self, engines: int, room: int) -> None:
        self._room = room  # an engine takes no more sequences than that, but for those of a prompt
        self.waiting: list[Growing] = []
        self._given: list[dict[int, Growing]] = [{} for _ in range(engines)]  # by number
        self.away: set[int] = set()

    def wait(self, sequences: Iterable[Growing]) -> None:
        """Sequences that wait from here on."""
        self.waiting = sorted([*self.waiting, *sequences], key=_place)

    def take(self, engine: int, ready: Callable[[Growing], bool]) -> list[Growing]:
        """The sequences that an engine takes next, of those that are `ready`."""
        waiting = list(filter(ready, self.waiting))
        there = max(1, len(self._given) - len(self.away))
        share = -(-(len(waiting) + sum(map(len, self._given))) // there)
        count = max(0, min(self._room, share) - len(self._given[engine]))
        taken, rest = waiting[:count], waiting[count:]
        if taken:
            last = taken[-1].group
            taken += takewhile(lambda growing: growing.group == last, rest)
        mine = {growing.number: growing for growing in taken}
        self._given[engine] |= mine
        self.waiting = [each for each in self.waiting if each.number not in mine]
        return taken

    def take_back(self, engine: int) -> list[Growing]:
        """All that an engine had waits again."""
        had = list(self._given[engine].values())
        self._given[engine] = {}
        self.wait(had)
        return had

    def given(self, engine: int, number: int) -> Growing:
        """The sequence of this number, which an engine has."""
        return self._given[engine][number]

    def release(self, engine: int, number: int) -> None:
        """An engine has this sequence no more."""
        del self._given[engine][number]

    def has_some(self, engine: int) -> bool:
        return bool(self._given[engine])

    def any_given(self) -> bool:
        return any(self._given)

    def any_waits(self, ready: Callable[[Growing], bool]) -> bool:
        return any(map(ready, self.waiting))


def _place(growing: Growing) -> tuple[int, int]:
    step = growing.batch.step
    return -1 if step is None else step, growing.number
