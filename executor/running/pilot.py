"""What a run asks somebody who may take it to another plan."""

from pathlib import Path
from typing import Protocol

from planner.spec.plan import Plan
from planner.spec.timeline import Decision, Timeline


class Pilot(Protocol):
    """Decides whether a run goes on under another plan. It is asked on the thread of the loop, and
    returns at once."""

    def starting(self) -> None:
        """Processes are about to be started."""
        ...

    def ready(self) -> None:
        """The processes have started, and the first call may begin."""
        ...

    def look(self, timeline: Timeline, metrics: Path) -> None:
        """A checkpoint is taken: what has been done so far, and the file of the metrics."""
        ...

    def decided(self, steps_done: int, seconds: float) -> Decision | None:
        """What has been decided since this was asked before."""
        ...

    def chosen(self) -> Plan:
        """The plan to switch to, as was decided; the run ends under the one before."""
        ...

    def went_back(self) -> None:
        """The run could not be started under the chosen plan: no other is to be looked for."""
        ...
