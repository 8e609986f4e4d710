"""The autopilot of `plan execute`: at checkpoints it looks at what the last steps took, plans anew
in a thread where that is not what was expected, and lets the run go on under a plan that surely
pays for the switch."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from statistics import fmean
from threading import Thread

from planner.exchange.own_run import OwnRun, lines_of, own_run
from planner.exchange.replanning import PlannedAnew, own_profile, plan_anew, plan_to_go_on_with
from planner.predict.profile import Profile
from planner.report.tables import pools_text, seconds
from planner.search import SearchOptions
from planner.spec.errors import UserError
from planner.spec.lengths import sample
from planner.spec.plan import Plan
from planner.spec.timeline import Decision, Timeline
from planner.spec.wording import counted

DRIFT = 0.1  # of a step's seconds, or of a mean length; what differs by less is noise
TIMES_THE_COST = 1.5  # times what a switch costs, which it has to save over the steps that are left
FEWEST_STEPS = 4  # that are looked at, if there are as many
SEARCH_SECONDS = 60.0
COMMAND, SINCE = "plan execute --autopilot", "-since-"  # how its plans are made, and called


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search in the background has found for the steps of a run; `problem` says why
    nothing. The plan that was switched to before took `over` times what it promised."""

    run: OwnRun
    drift: str
    over: float = 1.0
    anew: PlannedAnew | None = None
    plan: Plan | None = None
    problem: str = ""

    @property
    def saves(self) -> float:
        """The seconds that a step of the best plan is surely shorter, where seconds that were not
        measured in its layout turn out as much longer as those of the plan before did."""
        assert self.anew is not None and self.anew.best.predicted is not None
        predicted = self.anew.best.predicted
        unmeasured = 1.0 - predicted.sources.get("measured", 0.0)
        return self.anew.low - (self.over - 1.0) * unmeasured * predicted.step_seconds


class Autopilot:
    """Decides for one run, at most `switches` times for another plan. `profiles` are what the plan
    was searched with."""

    def __init__(self, plan: Plan, profiles: Sequence[Profile], switches: int) -> None:
        self._plan, self._profiles, self._left = plan, tuple(profiles), switches
        predicted = plan.predicted.call_seconds if plan.predicted else {}
        self._expected: Mapping[str, float] = predicted
        self._tokens: float | None = None  # of a response, when it was last planned
        self._began: float | None = None  # a start, or the end under the plan before
        self._cost: float | None = None
        self._looked_at = 0  # steps
        self._promised: float | None = None  # seconds of a step, by a switch, until it has run
        self._over = 1.0  # times what was promised
        self.is_searching = False
        self._answers: SimpleQueue[Found] = SimpleQueue()
        self.latest: Found | None = None

    # --- what a run asks ---

    def starting(self) -> None:
        if self._began is None:
            self._began = time.perf_counter()

    def ready(self) -> None:
        if self._began is not None:
            self._cost, self._began = time.perf_counter() - self._began, None

    def look(self, timeline: Timeline, metrics: Path) -> None:
        """Begin to plan anew if the steps since the last look are not what was expected."""
        if self.is_searching or not self._left:
            return
        done = max(timeline.ends, default=-1) + 1
        last, self._looked_at = max(FEWEST_STEPS, done - self._looked_at), done
        try:
            found = own_run(self._plan, timeline, lines_of(metrics), last, self._cost)
        except UserError:  # too few steps have been made
            return
        if self._promised is not None:
            if abs(_tokens(found.observed) / (self._tokens or 1.0) - 1) <= DRIFT:
                self._over = max(1.0, fmean(found.step_seconds) / self._promised)
            self._promised = None
        if drift := self._drift(found):
            self.is_searching = True
            Thread(target=self._search, args=(found, drift), daemon=True).start()

    def decided(self, steps_done: int, seconds: float) -> Decision | None:
        try:
            found = self._answers.get_nowait()
        except Empty:
            return None
        self.is_searching = False
        self._expect({call: _mean(found.run, call) for call in found.run.steps[0]}, found.run)
        decision = decision_of(found, steps_done, seconds)
        self.latest = found
        return decision

    def chosen(self) -> Plan:
        assert self.latest is not None and self.latest.plan is not None
        found, plan = self.latest.run, self.latest.plan
        self._profiles = (own_profile(found, found.steps, COMMAND), *self._profiles)
        self._plan, self._left = plan, self._left - 1
        assert self.latest.anew is not None and self.latest.anew.best.predicted is not None
        promised = self.latest.anew.best.predicted
        self._promised = promised.step_seconds
        self._expect(promised.call_seconds, found)
        self._began = time.perf_counter()
        return plan

    def went_back(self) -> None:
        self._left = 0

    # --- how it decides ---

    def _expect(self, calls: Mapping[str, float], found: OwnRun) -> None:
        self._expected, self._tokens = calls, _tokens(found.observed)

    def _drift(self, found: OwnRun) -> str:
        """What is not as expected, in words; nothing if all is."""
        if not self._expected:
            return "nothing was predicted"
        step = fmean(found.step_seconds)
        differences = {
            call: _mean(found, call) - expected
            for call, expected in self._expected.items()
            if call in found.steps[0]
        }
        call = max(differences, key=lambda name: abs(differences[name]))
        if abs(differences[call]) > DRIFT * step:
            before = self._expected[call]
            return f"{call} takes {seconds(_mean(found, call))} s instead of {seconds(before)} s"
        tokens = _tokens(found.observed)
        before = self._tokens or _tokens(self._plan)
        if abs(tokens / before - 1) > DRIFT:
            return f"responses have {tokens:.0f} tokens instead of {before:.0f}"
        return ""

    def _search(self, found: OwnRun, drift: str) -> None:
        """Plan anew; runs in a thread of its own."""
        name = f"{self._plan.name.partition(SINCE)[0]}{SINCE}{found.done}"
        options = SearchOptions(runners_up=0, time_limit=SEARCH_SECONDS)
        try:
            anew = plan_anew(found, options, self._profiles, COMMAND)
            plan = plan_to_go_on_with(found, anew.best, self._profiles, name, COMMAND)
            over = self._over
            self._answers.put(Found(run=found, drift=drift, over=over, anew=anew, plan=plan))
        except Exception as error:  # the run goes on without
            self._answers.put(Found(run=found, drift=drift, problem=str(error)))


def _mean(found: OwnRun, call: str) -> float:
    return fmean(step[call] for step in found.steps)


def _tokens(plan: Plan) -> float:
    """The mean length of a plan's responses."""
    workload = plan.workload
    return float(sample(workload.response, workload.generated, workload.seed).mean())


def decision_of(found: Found, steps_done: int, since: float) -> Decision:
    """Whether to switch, and why."""
    anew, plan, run = found.anew, found.plan, found.run

    def keeps(why: str, saves: float | None = None) -> Decision:
        said = f"autopilot: {found.drift}; the plan is kept: {why}"
        return Decision(
            steps_done=steps_done,
            seconds=since,
            switches=False,
            why=said,
            saves=saves,
            costs=run.start_seconds,
        )

    if anew is None or plan is None:
        return keeps(f"a search failed ({found.problem})")
    if not anew.is_surely_faster:
        return keeps("no other one is surely faster by more than a hundredth")
    left, cost = counted(run.asked - steps_done, "step"), run.start_seconds or 0.0
    saves = found.saves
    if saves <= 0:
        return keeps(
            f"the best one would save nothing if it took {found.over:.2g} times what is promised, "
            "as the last one did",
            saves,
        )
    at_least = f"at least {seconds(saves)} s a step, with {left} left"
    if saves * (run.asked - steps_done) <= TIMES_THE_COST * cost:
        why = f"the best one would save {at_least}, and a switch costs {seconds(cost)} s"
        return keeps(why, saves)
    return Decision(
        steps_done=steps_done,
        seconds=since,
        switches=True,
        why=(
            f"autopilot: {found.drift}; a switch to {pools_text(plan)} saves {at_least}, and costs "
            f"{seconds(cost)} s: it comes at the next stop"
        ),
        saves=saves,
        costs=cost,
    )
