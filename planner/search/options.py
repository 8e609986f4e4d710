"""How a search is run."""

from dataclasses import dataclass
from typing import get_args

from planner.predict.cost import SCENARIOS
from planner.predict.objective import ObjectiveName
from planner.spec.errors import UserError
from planner.spec.frameworks import FrameworkName
from planner.spec.limits import MOST_STALENESS, check_range


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Sequences may be up to `max_staleness` updates old (None: the workload's limit). The search
    minimises the `objective` (see `planner.predict.objective`) over at most `scenarios` draws of
    the response lengths. It ends after `time_limit` seconds (None: when the best plan is proven),
    and keeps that many `runners_up`. `pins` narrow the placements (see `space.pins`); no pin binds
    a baseline. With a `framework` only what it can execute is searched.

    Raises UserError for a value that is out of its range."""

    max_staleness: int | None = None
    objective: ObjectiveName = "mean"
    scenarios: int = SCENARIOS
    time_limit: float | None = None
    runners_up: int = 3
    pins: tuple[str, ...] = ()
    framework: FrameworkName | None = None

    def __post_init__(self) -> None:
        if self.max_staleness is not None:
            check_range("max_staleness", self.max_staleness, 0, MOST_STALENESS)
        check_range("scenarios", self.scenarios, 1)
        check_range("runners_up", self.runners_up, 0)
        if self.objective not in get_args(ObjectiveName):
            known = ", ".join(get_args(ObjectiveName))
            raise UserError(f"objective {self.objective!r}: choose one of {known}")
        if self.time_limit is not None and not self.time_limit > 0:
            raise UserError(
                f"time_limit {self.time_limit:g}: must be more than 0 seconds; leave it out to "
                "search to the end"
            )


DEFAULTS = SearchOptions()
