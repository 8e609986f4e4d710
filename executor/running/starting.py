"""Where the time of a start goes."""

import time

UNTOLD_SECONDS = 0.05  # of a part that is left out


class StartTimes:
    """The seconds of a start, part by part from its beginning on. What goes on beside another part
    counts as far as it lasts longer."""

    def __init__(self) -> None:
        self._begun = self._last = time.monotonic()
        self.parts: dict[str, float] = {}

    def passed(self, part: str) -> None:
        """All since the last part was this one."""
        now = time.monotonic()
        self.parts[part] = now - self._last
        self._last = now

    def line(self) -> str:
        """The start in one line, its longest part first."""
        told = [each for each in self.parts.items() if each[1] >= UNTOLD_SECONDS]
        told.sort(key=lambda part: -part[1])
        of_which = ", ".join(f"{part} {seconds:.1f}" for part, seconds in told)
        return f"start: {self._last - self._begun:.1f} s, of which {of_which}"
