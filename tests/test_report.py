"""Comparisons by hand-computed numbers, pictures by their pixels, tables and traces by what they
say."""

import io
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import ROLES, colocated, cpu_cluster, make_plan, make_workload
from matplotlib.colors import to_rgb
from rich.console import Console, RenderableType

from planner.predict.forecast import forecast, forecast_of
from planner.predict.schedule import Task, tasks_of
from planner.predict.simulate import simulate
from planner.report import gantt, tables, trace
from planner.report.bottleneck import bottleneck
from planner.report.compare import (
    compare,
    critical_seconds,
    occupancy,
    pool_busy,
    resimulate,
    steps_of,
    whole_steps,
)
from planner.report.live import LiveProgress
from planner.spec.cluster import make_cluster
from planner.spec.dataflow import ppo
from planner.spec.errors import UserError
from planner.spec.plan import Plan, Pool, Predicted, Proof
from planner.spec.timeline import Span, Timeline, mean_call_seconds, step_seconds

SECONDS = {
    "generate": 20.0,
    "score": 2.0,
    "ref_logprobs": 2.0,
    "old_logprobs": 2.0,
    "values": 2.0,
    "advantages": 0.5,
    "update_critic": 6.0,
    "update_actor": 8.0,
    "sync_weights": 1.0,
}


def one_step_off() -> Plan:
    """Rollout on 4 GPUs, generating for the next step while actor and critic train on 2 and 1; 1
    GPU is unused."""
    roles = {"rollout": "g", "actor": "t", "critic": "c", "reference": "t", "reward": "c"}
    return make_plan(
        make_workload(),
        {"g": 4, "t": 2, "c": 1},
        roles,
        offsets={"generate": 1},
        staleness=1,
        cluster=cpu_cluster(8),
        name="one-step-off",
    )


def ahead(staleness: int) -> Plan:
    """All roles on one GPU, generating so many steps ahead."""
    offsets = {"generate": staleness} if staleness else {}
    return make_plan(
        make_workload(),
        {"a": 1},
        dict.fromkeys(ROLES, "a"),
        offsets=offsets,
        staleness=staleness,
        blocking=False,
    )


def timeline_of(
    plan: Plan,
    steps: int = 6,
    seconds: Callable[[Task], float] = lambda task: SECONDS[task.call.name],
) -> Timeline:
    spans = simulate(tasks_of(plan, steps), seconds)
    return Timeline(
        source="simulated", plan=plan.name, steps=steps, warmup=plan.staleness + 1, spans=spans
    )


def serial_run(plan: Plan, steps: int, gap: float) -> Timeline:
    """A measured run of a serial plan: calls of 1 s, and a controller that takes `gap` seconds
    before each."""
    spans, now = [], 0.0
    for task in tasks_of(plan, steps):
        start, ready, now = now + gap, now, now + gap + 1.0
        role = task.call.roles[0] if task.call.roles else "host"
        spans.append(
            Span(call=task.call.name, role=role, pools=task.pools, step=task.step,
                 issued=ready, ready=ready, start=start, end=now)
        )  # fmt: skip
    return Timeline(source="measured", plan=plan.name, steps=steps, warmup=1, spans=tuple(spans))


def predicted(plan: Plan, step: float) -> Plan:
    figures = Predicted(
        step_seconds=step,
        step_seconds_p95=1.1 * step,
        tokens_per_second=1000.0 / step,
        lower_bound_seconds=0.9 * step,
        gap=1 / 0.9 - 1,
        proof=Proof(status="gap"),
        call_seconds=SECONDS,
        busy=dict.fromkeys(plan.pools, 0.5),
        sources={"measured": 0.75, "roofline": 0.25},
    )
    return plan.model_copy(update={"predicted": figures})


def text_of(*renderables: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=150)
    for renderable in renderables:
        console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_controller_overhead_is_what_the_gaps_add() -> None:
    plan = colocated(make_workload())
    calls = len(plan.dataflow.calls)
    slow = timeline_of(plan, seconds=lambda task: 1.2)
    comparison = compare(plan, slow.model_copy(update={"warmup": 1}), serial_run(plan, 6, gap=0.1))
    assert comparison.step.measured == pytest.approx(1.1 * calls)
    assert comparison.resimulated_step_seconds == pytest.approx(1.0 * calls)
    assert comparison.controller_overhead == pytest.approx(0.1)
    assert comparison.step.error == pytest.approx(1.2 / 1.1 - 1)
    assert {row.name: row.error for row in comparison.calls} == pytest.approx(
        dict.fromkeys(plan.dataflow.names, 0.2)
    )
    assert [row.name for row in comparison.steps] == ["1", "2", "3", "4", "5"]
    assert [row.measured for row in comparison.steps] == pytest.approx([1.1 * calls] * 5)


def test_the_last_steps_of_a_pipeline_do_not_count() -> None:
    plan = ahead(1)
    total = sum(SECONDS.values())
    timeline = timeline_of(plan, 6)
    assert step_seconds(timeline) < total
    timeline = timeline.model_copy(update={"drain": 1})
    comparison = compare(plan, timeline, timeline)
    assert [row.name for row in comparison.steps] == ["2", "3", "4"]
    assert comparison.step.measured == pytest.approx(total)
    window = gantt.window_of(timeline, 9)
    assert list(window.ends) == [1, 2, 3, 4] and window.end - window.begin == pytest.approx(
        3 * total
    )


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("left", [1, 3, 12, 30])
def test_a_run_that_ended_early_is_compared_with_a_run_that_did_too(
    staleness: int, left: int
) -> None:
    """Each call took what was expected, so nothing is off, however many calls of the run are
    missing."""
    plan = ahead(staleness)
    expected = forecast(plan, 9)
    cut = expected.model_copy(update={"source": "measured", "spans": in_order(expected)[:-left]})
    measured = whole_steps(plan, cut)
    comparison = compare(plan, forecast_of(plan, measured), measured)
    assert comparison.step.error == pytest.approx(0, abs=1e-9)
    assert comparison.controller_overhead == pytest.approx(0, abs=1e-9)
    assert whole_steps(plan, measured) == measured


def in_order(timeline: Timeline) -> tuple[Span, ...]:
    return tuple(sorted(timeline.spans, key=lambda span: span.end))


def test_a_timeline_compared_with_itself_has_no_error() -> None:
    plan = one_step_off()
    timeline = timeline_of(
        plan, seconds=lambda task: SECONDS[task.call.name] * (1 + 0.1 * (task.step % 3))
    )
    comparison = compare(plan, timeline, timeline)
    assert resimulate(plan, timeline).spans == timeline.spans
    assert comparison.controller_overhead == pytest.approx(0.0, abs=1e-12)
    assert [
        row.error for row in (*comparison.calls, *comparison.steps, comparison.step)
    ] == pytest.approx([0.0] * (len(comparison.calls) + len(comparison.steps) + 1))


def test_steps_add_up_to_the_run() -> None:
    timeline = timeline_of(one_step_off())
    assert sum(steps_of(timeline).values()) == pytest.approx(
        max(span.end for span in timeline.spans if span.call == "update_actor")
    )


def test_an_interrupted_run_is_compared_by_its_whole_steps() -> None:
    plan = colocated(make_workload())
    run = serial_run(plan, 4, gap=0.1)
    cut = run.model_copy(update={"spans": run.spans[:-2]})
    whole = whole_steps(plan, cut)
    assert whole.steps == 3 and {span.step for span in whole.spans} == {0, 1, 2}
    assert compare(
        plan, timeline_of(plan, seconds=lambda task: 1.0), cut
    ).controller_overhead == pytest.approx(0.1)
    with pytest.raises(
        UserError, match=r"finished 1 steps, of which 1 are warm-up.*execute more steps"
    ):
        whole_steps(plan, run.model_copy(update={"spans": run.spans[:12]}))


def test_a_run_resumed_under_another_plan_is_compared_from_where_it_went_on() -> None:
    plan = ahead(1)
    whole = forecast(plan, 9)
    resumed = whole.model_copy(
        update={
            "warmup": 5,
            "drain": 0,
            "spans": tuple(s for s in whole.spans if s.step >= 3),
        }
    )
    measured = whole_steps(plan, resumed)
    assert (measured.steps, measured.drain) == (9, 0)
    comparison = compare(plan, forecast_of(plan, measured), measured)
    assert comparison.step.error == pytest.approx(0, abs=1e-9)
    assert [row.name for row in comparison.steps] == ["5", "6", "7", "8"]
    with pytest.raises(UserError, match="finished 1 steps, of which 2 are warm-up"):
        whole_steps(
            plan,
            resumed.model_copy(update={"spans": tuple(s for s in resumed.spans if s.step < 4)}),
        )


def test_a_call_that_never_counts_is_compared_by_the_steps_before() -> None:
    """Evaluated every third step, of which the measured run counts none."""
    plan = ahead(1)
    spans = tuple(s for s in timeline_of(plan, 6).spans if s.call != "score" or s.step in (0, 5))
    timeline = timeline_of(plan, 6).model_copy(update={"drain": 1, "spans": spans})
    slow = [
        Span(**{**vars_of(s), "end": s.end + 9}) if s.step == 5 and s.call == "score" else s
        for s in spans
    ]
    assert mean_call_seconds(
        timeline.model_copy(update={"spans": tuple(slow)})
    ) == mean_call_seconds(timeline)


def vars_of(span: Span) -> dict[str, object]:
    return {name: getattr(span, name) for name in span.__slots__}


def test_a_run_of_another_plan_is_refused() -> None:
    run = serial_run(colocated(make_workload()), 4, gap=0.1)
    with pytest.raises(UserError, match="pool 'all' that plan 'one-step-off' does not have"):
        whole_steps(one_step_off(), run)
    without_critic = colocated(make_workload(critic=None))
    with pytest.raises(UserError, match="call 'update_critic' that plan 'colocated' does not have"):
        whole_steps(without_critic, run)


def test_busy_shares_are_those_of_the_steady_state() -> None:
    """Generation bounds the step (20 + 1 s of sync); the drain, which has no generation, does not
    count."""
    plan = one_step_off()
    timeline = timeline_of(plan)
    assert step_seconds(timeline) == pytest.approx(21.0)
    busy = pool_busy(timeline)
    assert busy == pytest.approx({"g": 1.0, "t": (2 + 2 + 8 + 1) / 21, "c": (2 + 2 + 6) / 21})
    assert occupancy(plan, busy) == pytest.approx((4 * busy["g"] + 2 * busy["t"] + busy["c"]) / 8)


def test_critical_calls_sum_to_the_period() -> None:
    assert critical_seconds(one_step_off(), SECONDS) == {"generate": 20.0, "sync_weights": 1.0}
    plan = one_step_off()
    slow_actor = SECONDS | {"update_actor": 40.0}
    found = critical_seconds(plan, slow_actor)
    period = step_seconds(timeline_of(plan, 12, lambda task: slow_actor[task.call.name]))
    assert "generate" not in found and next(iter(found)) == "update_actor"
    assert sum(found.values()) == pytest.approx(period)


def pixels(data: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(data), format="png")[..., :3]


def share_of(image: np.ndarray, color: str) -> float:
    return float((np.abs(image - np.array(to_rgb(color))).max(axis=-1) < 0.02).mean())


def test_every_call_has_a_colour_of_its_own() -> None:
    names = {*ppo(make_workload()).names, "evaluate"}
    assert names <= gantt.CALL_COLORS.keys()
    assert len({gantt.CALL_COLORS[name] for name in names}) == len(names)


def test_the_picture_shows_bars_in_proportion_to_their_time() -> None:
    plan = one_step_off()
    timeline = timeline_of(plan)
    image = pixels(gantt.render([timeline], plan))
    update_actor, update_critic = (
        share_of(image, gantt.CALL_COLORS[call]) for call in ("update_actor", "update_critic")
    )
    heights = {
        lane.name: lane.height
        for lane in gantt.lanes_of(timeline, plan, gantt.window_of(timeline, 3))
    }
    wanted = SECONDS["update_actor"] * heights["t"] / (SECONDS["update_critic"] * heights["c"])
    assert update_actor / update_critic == pytest.approx(wanted, rel=0.2)
    assert share_of(image, gantt.CALL_COLORS["generate"]) > update_actor
    assert share_of(image, gantt.EMPTY) > 0.1
    assert heights["g"] > heights["t"] > heights["c"] > heights[tables.HOST]


def test_two_timelines_share_a_time_axis() -> None:
    plan = one_step_off()
    fast, slow = (
        timeline_of(plan),
        timeline_of(plan, seconds=lambda task: 2 * SECONDS[task.call.name]),
    )
    alone, both = (pixels(gantt.render(shown, plan)) for shown in ([fast], [fast, slow]))
    assert both.shape[0] > 1.5 * alone.shape[0] and both.shape[1] == alone.shape[1]
    color, half = gantt.CALL_COLORS["update_actor"], both.shape[0] // 2
    assert share_of(both[half:], color) == pytest.approx(2 * share_of(both[:half], color), rel=0.2)


def test_the_window_holds_steady_steps_and_short_runs_whole() -> None:
    plan = one_step_off()
    timeline = timeline_of(plan)
    window = gantt.window_of(timeline, 3)
    assert sorted(window.ends) == [1, 2, 3, 4]
    assert window.end - window.begin == pytest.approx(3 * step_seconds(timeline))
    assert gantt.busy_in(timeline, window) == pytest.approx(pool_busy(timeline))
    assert gantt.window_of(timeline_of(plan, 1), 3).begin == 0.0
    assert gantt.render([timeline_of(plan, 1)], plan).startswith(b"\x89PNG")


def test_pictures_are_whole_or_not_there(tmp_path: Path) -> None:
    plan = one_step_off()
    gantt.draw([timeline_of(plan)], plan, tmp_path / "new" / "a.svg")
    assert (tmp_path / "new" / "a.svg").read_text().rstrip().endswith("</svg>")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        gantt.draw([timeline_of(plan)], plan, tmp_path / "file" / "a.png")
    with pytest.raises(UserError, match=r"\.png, \.svg or \.pdf"):
        gantt.draw([timeline_of(plan)], plan, tmp_path / "a.txt")
    assert {path.name for path in tmp_path.iterdir()} == {"new", "file"}


def test_a_trace_has_each_span_on_each_of_its_pools(tmp_path: Path) -> None:
    plan = one_step_off()
    timeline = timeline_of(plan)
    trace.write(timeline, tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    threads = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    assert threads.keys() == {"g", "t", "c", "host"}
    drawn = [e for e in events if e["ph"] == "X"]
    assert len(drawn) == sum(len(span.pools) or 1 for span in timeline.spans)
    sync = next(span for span in timeline.spans if span.call == "sync_weights" and span.step == 2)
    found = [e for e in drawn if e["name"] == "sync_weights 2"]
    assert {e["tid"] for e in found} == {threads["g"], threads["t"]}
    assert all(
        e["ts"] == pytest.approx(1e6 * sync.start) and e["dur"] == pytest.approx(1e6) for e in found
    )
    for thread in threads.values():
        on = sorted((e["ts"], e["ts"] + e["dur"]) for e in drawn if e["tid"] == thread)
        assert all(end <= start + 1e-3 for (_, end), (start, _) in pairwise(on))


def test_the_search_table_has_speed_ups_and_reasons() -> None:
    best, split = predicted(one_step_off(), 20.0), predicted(colocated(make_workload()), 30.0)
    table = tables.plans_table(
        best, {"colocated": "actor needs 90 GB of 80 GB", "split": split}, (split,)
    )
    lines = text_of(table).splitlines()
    (row,) = (line for line in lines if line.startswith("best"))
    assert "20.0" in row and "1.50×" in row and "–" in row and "44%" in row
    (unfit,) = (line for line in lines if "does not fit: actor needs 90 GB of 80 GB" in line)
    assert unfit.startswith("colocated")
    assert (
        sum("2: all roles" in line for line in lines) == 2
        and "4: rollout | 2: actor reference" in row
    )
    assert "1: idle" in " ".join(lines)


def test_the_bottleneck_is_named() -> None:
    plan = predicted(one_step_off(), 21.0)
    assert bottleneck(plan) == (
        "Bottleneck: the GPUs of rollout (4) always work: generate 95%, sync_weights 5%."
    )
    pools = text_of(tables.pools_table(plan))
    assert "4 × tensor-parallel 1" in pools and "(unused)" in pools and "FSDP 2" in pools
    assert tables.figures(plan) == [
        "Lower bound 18.9 s, gap 11.1%; not proven optimal.",
        "Costs by busy time: 75% measured, 25% roofline.",
    ]


def test_a_reward_function_that_takes_long_is_the_bottleneck() -> None:
    """All other calls of a serial plan take 1 s, `score` takes 991; then half a second."""
    workload = make_workload(reward={"function": "folder/rewards.py:length"}, batch=512)
    plan = predicted(colocated(workload), 999.0)
    assert plan.predicted
    seconds = dict.fromkeys(plan.dataflow.names, 1.0) | {"score": 991.0}
    slow = plan.model_copy(
        update={"predicted": plan.predicted.model_copy(update={"call_seconds": seconds})}
    )
    # One wave of 991 / 512 s: two would take twice as long.
    assert bottleneck(slow) == (
        "Bottleneck: reward rewards.py:length, for which GPUs wait: score 99%, the rest little. "
        "With processes = 512 it would score beside generation, and add 1.94 s to it instead of "
        "991."
    )
    seconds["score"] = 0.5
    even = slow.predicted.model_copy(update={"call_seconds": seconds}) if slow.predicted else None
    told = bottleneck(plan.model_copy(update={"predicted": even}))
    assert told.startswith(
        "Bottleneck: calls that wait for each other, with reward rewards.py:length: "
    )
    assert "always work" not in told and "With processes = 1 it" in told


def test_nodes_with_the_same_gpus_are_said_together() -> None:
    plan, cluster = colocated(make_workload()), make_cluster(36)
    (pool,) = plan.pools
    several = Pool(gpus=tuple(gpu for gpu in cluster.gpus if gpu != (4, 1)))
    plan = plan.model_copy(update={"cluster": cluster, "pools": {pool: several}})
    assert "nodes 0-3: 0-7; node 4: 0, 2-3" in text_of(tables.pools_table(plan))


def test_the_comparison_is_told_in_two_sentences() -> None:
    plan = colocated(make_workload())
    slow = timeline_of(plan, seconds=lambda task: 1.2).model_copy(update={"warmup": 1})
    comparison = compare(plan, slow, serial_run(plan, 6, gap=0.1))
    step, overhead = tables.verdict(comparison)
    assert step == "Step time: predicted 10.8 s, measured 9.90 s, error +9.1%."
    assert overhead.startswith("Controller overhead: +10.0%")
    assert text_of(*tables.comparison_tables(comparison)).count("+20.0%") == len(
        plan.dataflow.calls
    )
    assert "generate" in text_of(tables.calls_table(plan, mean_call_seconds(slow)))


def test_progress_tells_which_pool_does_what() -> None:
    plan = one_step_off()
    generate = next(task for task in tasks_of(plan, 1) if task.call.name == "generate")
    plain = Console(file=io.StringIO(), width=120)
    with LiveProgress(plan, 5, plain) as progress:
        progress.on_start(generate)
        progress.on_step({"step": 0, "reward": 0.25, "tokens_per_second": 1234.0, "seconds": 2.0})
        shown = text_of(progress._table())
    assert isinstance(plain.file, io.StringIO)
    assert plain.file.getvalue() == "step 1/5  ·  reward 0.250  ·  tokens/s 1,234  ·  2.00 s\n"
    assert "generate 0" in shown and shown.count("idle") == 2


def test_progress_shows_the_score_of_each_evaluation() -> None:
    plain = Console(file=io.StringIO(), width=120)
    figures = {"evaluation/sums/score": 0.5, "evaluation/sums/pass@4": 0.75}
    with LiveProgress(one_step_off(), 5, plain) as progress:
        progress.on_step({"step": 0, **figures})
    assert isinstance(plain.file, io.StringIO)
    assert plain.file.getvalue() == "step 1/5  ·  sums 0.500\n"


def test_progress_names_the_reward_function_that_runs() -> None:
    plan = colocated(make_workload(reward={"function": "folder/rewards.py:length"}))
    score = next(task for task in tasks_of(plan, 1) if task.call.name == "score")
    with LiveProgress(plan, 5, Console(file=io.StringIO(), width=120)) as progress:
        progress.on_start(score)
        assert re.search(r"reward rewards\.py:length +score 0", text_of(progress._table()))
        progress.on_end(next(s for s in timeline_of(plan).spans if s.call == "score"))
        assert "score" not in text_of(progress._table())


def test_a_note_is_shown_as_it_is_and_leaves_the_table_its_style() -> None:
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=100, color_system=None)
    with LiveProgress(colocated(make_workload()), 3, console) as progress:
        progress.on_note("the file [dim] is full")
    assert "the file [dim] is full" in said.getvalue()
    assert said.getvalue().count("[dim]") == 1
