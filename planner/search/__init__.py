"""Which plan is best, and the proof."""

from planner.search.find import Result, baseline, find

__all__ = ["Result", "baseline", "find"]
