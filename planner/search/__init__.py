"""Which plan is best, and the proof."""

from planner.search.find import Result, baseline, find
from planner.search.options import SearchOptions

__all__ = ["Result", "SearchOptions", "baseline", "find"]
