"""The autopilot: what it decides for some steps of a run, and a run that it takes to another
plan."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import colocated, nearly, runs_on
from interrupted import OPTIONS, STEPS, WORKLOAD, metrics_of
from processes import PATIENCE
from test_replan import made

from executor.fleet.pools import Fleet
from executor.running import checkpoint
from executor.running.execute import execute
from planner.commands.autopilot import TIMES_THE_COST, Autopilot, decision_of
from planner.predict.schedule import load_plan
from planner.spec.lengths import Fixed
from planner.spec.plan import Plan
from planner.spec.timeline import Decision, Timeline


def looked(run: Path, pilot: Autopilot, since: float = 5.0) -> Decision | None:
    """What the autopilot decides for the steps of a run."""
    pilot.starting()
    pilot.ready()
    pilot.look(Timeline.read(run / "timeline.json"), run / "metrics.jsonl")
    end = time.monotonic() + PATIENCE
    while pilot.is_searching and time.monotonic() < end:
        if (decision := pilot.decided(8, since)) is not None:
            return decision
        time.sleep(0.01)
    return None


def pilot_of(run: Path, switches: int = 1) -> Autopilot:
    return Autopilot(load_plan(run / "plan.json"), (), switches)


def test_what_goes_as_predicted_is_left_alone(tmp_path: Path) -> None:
    run = made(tmp_path, "standalone")
    assert looked(run, pilot_of(run)) is None


def test_a_call_that_has_drifted_leads_to_a_switch_and_no_more_than_allowed(
    tmp_path: Path,
) -> None:
    run = made(tmp_path, "standalone", slower={"generate": 1.5})
    pilot, old = pilot_of(run), load_plan(run / "plan.json")
    decision = looked(run, pilot)
    assert decision is not None and decision.switches and decision.why.count("generate takes") == 1
    assert (decision.steps_done, decision.seconds) == (8, 5.0)
    assert decision.saves is not None and decision.costs is not None
    assert decision.saves * (100 - 8) > TIMES_THE_COST * decision.costs
    new = pilot.chosen()
    assert (new.name, new.workload) == ("standalone-since-8", old.workload)
    assert new.pools != old.pools
    assert looked(run, pilot) is None  # it may switch once


@pytest.mark.slow
def test_lengths_that_have_drifted_are_planned_for_once(tmp_path: Path) -> None:
    """No step is left for a switch to pay; what has been looked at is expected from then on."""
    run = made(tmp_path, tokens=256)
    Timeline.read(run / "timeline.json").changed(steps=8).write(run / "timeline.json")
    pilot = pilot_of(run)
    decision = looked(run, pilot)
    assert decision is not None and not decision.switches
    assert "responses have 256 tokens instead of 512; the plan is kept" in decision.why
    assert pilot.latest is not None
    assert pilot.latest.run.observed.workload.response == Fixed(tokens=256)
    assert looked(run, pilot) is None


@pytest.mark.slow
def test_a_switch_that_does_not_pay_is_not_made(tmp_path: Path) -> None:
    run = made(tmp_path, "standalone", slower={"generate": 1.5})
    pilot = pilot_of(run)
    assert looked(run, pilot) is not None and pilot.latest is not None
    dear = replace(pilot.latest, run=replace(pilot.latest.run, start_seconds=1e6))
    decision = decision_of(dear, 8, 5.0)
    assert not decision.switches and "a switch costs 1,000,000 s" in decision.why
    over = replace(pilot.latest, over=3.0)
    best = over.anew.best.predicted
    unmeasured = 1 - best.sources.get("measured", 0.0)
    assert pilot.latest.saves == over.anew.low
    assert over.saves == pytest.approx(over.anew.low - 2 * unmeasured * best.step_seconds)
    disappointed = decision_of(over, 8, 5.0)
    assert not disappointed.switches and "took 3 times what is promised" in disappointed.why
    failed = decision_of(replace(dear, anew=None, problem="no plan fits"), 8, 5.0)
    assert not failed.switches and "(no plan fits)" in failed.why


class Once:
    """A pilot that takes a run to a plan at the first stop behind its first checkpoint."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.looks, self.starts, self.backs = plan, 0, 0, 0

    def starting(self) -> None: ...

    def ready(self) -> None:
        self.starts += 1

    def look(self, timeline: Timeline, metrics: Path) -> None:
        self.looks += 1

    def decided(self, steps_done: int, seconds: float) -> Decision | None:
        if self.looks != 1:
            return None
        self.looks += 1
        return Decision(steps_done=steps_done, seconds=seconds, switches=True, why="a test")

    def chosen(self) -> Plan:
        return self.plan

    def went_back(self) -> None:
        self.backs += 1


def test_a_run_that_switches_loses_no_step_and_no_prompt(two_cores: Fleet, tmp_path: Path) -> None:
    before = colocated(WORKLOAD)
    after = colocated(WORKLOAD, layouts={role: {"micro_batch_tokens": 32} for role in ("actor",)})
    pilot = Once(after)
    with runs_on(two_cores):
        whole = execute(before, name="whole", runs=tmp_path, options=OPTIONS)
        run = execute(before, name="r", runs=tmp_path, options=OPTIONS, pilot=pilot)
    assert (pilot.starts, pilot.backs) == (2, 0)
    ours, theirs = metrics_of(run), metrics_of(whole)
    assert [line["step"] for line in ours] == list(range(STEPS)) and ours[:2] == theirs[:2]
    for a, b in zip(ours, theirs, strict=True):
        assert a == {name: nearly(value, rel=1e-4, abs=1e-5) for name, value in b.items()}
    (decision,) = Timeline.read(run / "timeline.json").decisions
    assert (decision.switches, decision.why) == (True, "a test")
    kept = checkpoint.find(run)
    assert kept.plan == after and kept.timeline.decisions == (decision,)
    assert "INFO a test" in (run / "log.txt").read_text()
    assert Plan.read(run / "plan-until-000003.json") == before


def test_a_run_that_does_not_come_up_under_a_plan_goes_back(
    two_cores: Fleet, tmp_path: Path
) -> None:
    """The plan wants an engine that is not installed here."""
    before = colocated(WORKLOAD)
    pilot = Once(colocated(WORKLOAD, layouts={"rollout": {"engine": "vllm"}}))
    with runs_on(two_cores):
        run = execute(before, name="r", runs=tmp_path, options=OPTIONS, pilot=pilot)
    assert (pilot.starts, pilot.backs) == (2, 1)
    assert [line["step"] for line in metrics_of(run)] == list(range(STEPS))
    assert "The run goes back to the plan before" in (run / "log.txt").read_text()
    assert Plan.read(run / "plan.json") == before
    assert len(Timeline.read(run / "timeline.json").ends) == STEPS
