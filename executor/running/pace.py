"""How long the latest calls of a run have taken."""

RECENT = 3  # calls of each name


class Pace:
    """The latest calls of each name, and how much was generated for the step of each. Other threads
    may ask while one notes."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[tuple[int, float], ...]] = {}  # step and seconds
        self._generated: dict[int, int] = {}  # tokens by step

    def note(self, call: str, step: int, seconds: float) -> None:
        self._latest[call] = (*self._latest.get(call, ()), (step, seconds))[-RECENT:]

    def note_generated(self, step: int, tokens: int) -> None:
        self._generated[step] = tokens

    def of(self, call: str, step: int) -> float | None:
        """Seconds of the longest of the latest calls of a name; longer, if more tokens were
        generated for `step` than for theirs. None if there was none."""
        latest = self._latest.get(call, ())
        grown = [seconds * self._growth(before, step) for before, seconds in latest]
        return max(grown, default=None)

    def _growth(self, before: int, step: int) -> float:
        """Tokens of a step by those of one before, or 1."""
        tokens, former = self._generated.get(step, 0), self._generated.get(before, 0)
        return max(1.0, tokens / former) if former else 1.0
