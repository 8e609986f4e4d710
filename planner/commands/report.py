"""`plan report`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from planner.commands.compare import read_run
from planner.commands.inputs import check_target, make_console, profiles_of
from planner.exchange.own_run import lines_of
from planner.predict.cost import CostModel
from planner.predict.forecast import forecast, forecast_of, predict
from planner.predict.profile import Profile
from planner.predict.schedule import load_plan
from planner.report.bottleneck import bottleneck
from planner.report.compare import compare
from planner.report.curves import draw_curves
from planner.report.gantt import render
from planner.report.insight import (
    bubbles_table,
    critical_sentences,
    effects_table,
    ladder_table,
    pareto_sentences,
    pareto_table,
    source_sentence,
    waits_table,
    what_if_table,
)
from planner.report.page import Section, answer_of, as_shown, page, svg_of
from planner.report.pareto import chart
from planner.report.picture import inline_svg
from planner.report.samples import SampleLine, told
from planner.report.tables import (
    comparison_tables,
    figures,
    plain_table,
    pools_text,
    seconds,
    verdict,
)
from planner.search import SearchOptions, find
from planner.search.questions import explain as explaining
from planner.search.questions.explain import Explanation
from planner.search.questions.pareto import pareto_points
from planner.search.questions.variants import resized
from planner.search.questions.what_if import Refused, Replanned, conditions
from planner.search.questions.what_if import what_if as plan_under
from planner.search.solver.problem import scenarios_of
from planner.spec.errors import UserError
from planner.spec.files import write_atomic
from planner.spec.frameworks import FrameworkName
from planner.spec.plan import Plan
from planner.spec.timeline import Timeline

STEPS_ON_PAGE = 3
SHOWN_SAMPLES = 6


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """What else a page has: the best plan of a framework, other conditions, other numbers of
    GPUs."""

    framework: FrameworkName | None = None
    with_what_if: bool = False
    counts: Sequence[int] = ()


def report(
    path: Path,
    run: Path | None,
    out: Path,
    profiles: Sequence[Path],
    options: PageOptions,
    command: str,
) -> None:
    check_target(out, ".html")
    plan = load_plan(path)
    errors = make_console(stderr=True)
    found = profiles_of(plan, path, profiles, errors)
    measured = read_run(run, plan) if run is not None else None
    model = CostModel(plan.workload, plan.cluster, found, scenarios_of(plan))
    proof = plan.predicted.proof if plan.predicted else None
    bound = plan.predicted.lower_bound_seconds if plan.predicted else 0.0
    plan = plan.changed(predicted=predict(plan, (), proof, bound, model))
    with errors.status("explaining"):
        explanation = explaining.explain(plan, found)
        sections = list(_sections(plan, found, explanation, measured, run))
        if options.framework is not None:
            sections.insert(0, _faster(plan, found, options.framework))
        if options.with_what_if:
            sections.append(_what_if(plan, found))
        if options.counts:
            sections.append(_pareto(plan, found, options.counts))
        sections.append(_provenance(plan))
    start = explanation.ladder[0]
    compared = start.seconds if len(explanation.ladder) > 1 else None
    text = page(
        plan,
        answer=answer_of(plan, start.what, compared),
        timeline=_timelines(plan, found, measured),
        measured=measured is not None,
        sections=sections,
        command=command,
    )
    write_atomic(out, text)
    make_console().print(f"Wrote {out}.", markup=False, soft_wrap=True)


def _timelines(plan: Plan, found: Sequence[Profile], measured: Timeline | None) -> str:
    if measured is None:
        steps = 2 * plan.staleness + 1 + STEPS_ON_PAGE
        drawn = [forecast(plan, steps, found)]
    else:
        drawn = [forecast_of(plan, measured, found), measured]
    return inline_svg(lambda: render(drawn, plan, "svg", steps=STEPS_ON_PAGE), "timeline")


def _sections(
    plan: Plan,
    found: Sequence[Profile],
    explanation: Explanation,
    measured: Timeline | None,
    run: Path | None,
) -> Iterator[Section]:
    assert plan.predicted
    if measured is not None:
        compared = compare(plan, forecast_of(plan, measured, found), measured)
        tables = tuple(map(as_shown, comparison_tables(compared)))
        yield Section(
            title="Predicted and measured", sentences=tuple(verdict(compared)), tables=tables
        )
    if len(explanation.ladder) > 1:
        start = explanation.ladder[0]
        tables = (as_shown(ladder_table(explanation.ladder)),)
        if explanation.waits:
            tables += (as_shown(waits_table(explanation.waits, start.what, start.seconds)),)
        yield Section(title=f"From {start.what} to this plan", tables=tables)
    busy = plan.predicted.busy
    yield Section(
        title="What binds",
        sentences=(
            bottleneck(plan),
            *critical_sentences(explanation.critical),
            source_sentence(explanation.effects),
        ),
        tables=(
            as_shown(bubbles_table(plan, busy, explanation.bubbles)),
            as_shown(effects_table(explanation.effects, explanation.step_seconds)),
        ),
    )
    if run is not None:
        yield from _of_run(run)


def _of_run(run: Path) -> Iterator[Section]:
    """The curves and some samples of a run, if it has them."""
    figure = draw_curves(lines_of(run / "metrics.jsonl"))
    if figure is not None:
        yield Section(title="How the run went", picture=svg_of(figure, "curves"))
    samples = []
    for line in lines_of(run / "samples.jsonl")[-SHOWN_SAMPLES:]:
        try:
            samples.append(told(SampleLine.model_validate(line)))
        except ValueError:
            continue  # of another version
    if samples:
        yield Section(title="What the model said last", texts=tuple(samples))


def _faster(plan: Plan, found: Sequence[Profile], framework: FrameworkName) -> Section:
    """The best plan that a framework can execute and the best of all, with the seconds and dollars
    between them and this one."""
    assert plan.predicted
    table = plain_table()
    table.add_column("plan")
    for title in ("step s", "$ per 1,000 steps", "saves"):
        table.add_column(title, justify="right")
    table.add_column("GPUs of each pool: its roles")
    per_hour = sum(plan.cluster.device_of(gpu).price_per_hour for gpu in plan.cluster.gpus)
    searched = {f"the best for {framework}": framework, "the best of all": None}
    plans: dict[str, Plan] = {"this plan": plan}
    for what, name in searched.items():
        options = SearchOptions(framework=name, runners_up=0, scenarios=scenarios_of(plan))
        plans[what] = find(plan.workload, plan.cluster, options, profiles=found).best
    for what, other in plans.items():
        assert other.predicted
        step = other.predicted.step_seconds
        saved = 1 - step / plan.predicted.step_seconds
        dollars = f"{per_hour * step / 3.6:,.2f}"
        table.add_row(what, seconds(step), dollars, f"{saved:.1%}", pools_text(other))
    fresh = "All have sequences as fresh as the workload asks for (max_staleness)."
    return Section(title="What would be faster", sentences=(fresh,), tables=(as_shown(table),))


def _what_if(plan: Plan, found: Sequence[Profile]) -> Section:
    rows: list[Replanned | Refused] = []
    for condition in conditions(plan, (), ()):
        try:
            rows.append(plan_under(plan, condition, found))
        except UserError as error:
            rows.append(Refused(condition.what, str(error)))
    return Section(title="What if", tables=(as_shown(what_if_table(rows)),))


def _pareto(plan: Plan, found: Sequence[Profile], counts: Sequence[int]) -> Section:
    clusters = [resized(plan.cluster, count) for count in counts]
    stalest = range(plan.workload.max_staleness + 1)
    points, reasons = pareto_points(plan.workload, clusters, stalest, found)
    if not points:
        return Section(title="What more GPUs buy", sentences=tuple(reasons))
    sentences = (*pareto_sentences(points), *reasons)
    picture = svg_of(chart(points, ""), "pareto")
    table = as_shown(pareto_table(points))
    return Section(
        title="What more GPUs buy", sentences=sentences, picture=picture, tables=(table,)
    )


def _provenance(plan: Plan) -> Section:
    """Where each figure comes from."""
    assert plan.predicted
    table = plain_table()
    table.add_column("figure")
    table.add_column("from")
    table.add_row(
        "step time", f"exact period over {plan.predicted.proof.scenarios} length scenarios"
    )
    for source, share in sorted(plan.predicted.sources.items()):
        table.add_row(f"{share:.0%} of the seconds of calls", source)
    for name, device in plan.cluster.devices.items():
        table.add_row(f"rates of {name}", device.source or "the cluster file")
        if device.price_per_hour:
            table.add_row("dollars", f"{device.price_per_hour:g} an hour for a GPU of kind {name}")
    origin = plan.provenance
    if origin is not None:
        table.add_row("the plan", f"splitplan {origin.version}: {origin.command}")
        for name, sha256 in origin.profiles.items():
            table.add_row(f"profile {name}", f"sha256 {sha256[:16]}")
    longest = seconds(plan.predicted.step_seconds_p95)
    sentences = (
        *figures(plan),
        f"In one of twenty length scenarios a step takes {longest} s or more.",
    )
    return Section(
        title="Where the figures come from", sentences=sentences, tables=(as_shown(table),)
    )
