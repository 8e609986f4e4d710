"""`plan estimate`."""

from collections.abc import Sequence
from pathlib import Path

from planner.commands.inputs import check_target, make_console, read_inputs
from planner.commands.options import JobOptions
from planner.predict.forecast import durations
from planner.report.bottleneck import bottleneck
from planner.report.tables import estimate_table, pools_table, seconds
from planner.search.questions.given_split import best_in, parse_pools, with_layouts
from planner.search.solver.problem import problem_of
from planner.search.solver.write_plan import assemble, complete
from planner.spec.wording import counted


def estimate(
    job: JobOptions,
    pools: Sequence[str],
    layouts: Sequence[str],
    staleness: int,
    out: Path | None,
    command: str,
) -> None:
    if out is not None:
        check_target(out, ".json")
    inputs = read_inputs(job)
    problem = problem_of(inputs.workload, inputs.cluster, inputs.profiles, staleness)
    given = parse_pools(pools, problem.workload.roles)
    with make_console(stderr=True).status("choosing layouts"):
        candidate = best_in(given, problem)
    name = "given" if out is None else out.stem
    plan = with_layouts(assemble(candidate, name, problem), layouts)
    plan = complete(plan, inputs.provenance(command), problem, None, 0.0, 0.0)
    assert plan.predicted
    console = make_console()
    console.print(pools_table(plan))
    console.print()
    console.print(estimate_table(plan, durations(plan, model=problem.model)))
    console.print()
    told = "no updates old"
    if plan.staleness:
        told = f"up to {counted(plan.staleness, 'update')} old"
    console.print(
        f"[bold]{seconds(plan.predicted.step_seconds)} s per step[/bold], "
        f"{plan.predicted.tokens_per_second:,.0f} tokens/s, with sequences {told}. "
        f"{bottleneck(plan)}",
        soft_wrap=True,
    )
    if out is not None:
        plan.write(out)
        console.print(f"Wrote {out}.", markup=False, soft_wrap=True)
