"""`plan search`, `plan space` and `plan baseline`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from planner.commands.inputs import Inputs, check_target, make_console, read_inputs
from planner.predict.forecast import forecast
from planner.predict.objective import ObjectiveName
from planner.report.insight import space_tables
from planner.report.tables import bottleneck, figures, plans_table, pools_table, seconds
from planner.search import baseline as find_baseline
from planner.search import find
from planner.search.find import tied
from planner.search.questions.space_size import COUNTED, count
from planner.spec.errors import UserError
from planner.spec.plan import Plan

PICTURE_STEPS = 8  # simulated; the picture shows a few of them after the warm-up


def search(
    *,
    max_staleness: int | None,
    objective: ObjectiveName,
    time_limit: float | None,
    scenarios: int,
    keep: int,
    pins: Sequence[str],
    out: Path,
    no_picture: bool,
    command: str,
    **options: Any,
) -> None:
    check_target(out, ".json")
    _check_staleness(max_staleness)
    if keep < 0:
        raise UserError(f"--keep {keep}: must be at least 0")
    if scenarios < 1:
        raise UserError(f"--scenarios {scenarios}: must be at least 1")
    if time_limit is not None and not time_limit > 0:
        raise UserError(
            f"--time-limit {time_limit:g}: must be more than 0 seconds; leave it out to search to "
            "the end"
        )
    inputs = read_inputs(**options)
    with make_console(stderr=True).status("searching"):
        result = find(
            inputs.workload,
            inputs.cluster,
            profiles=inputs.profiles,
            profile_hashes=inputs.provenance,
            max_staleness=max_staleness,
            keep=keep + 1,
            pins=pins,
            objective=objective,
            time_limit=time_limit,
            scenarios=scenarios,
            command=command,
        )
    best = _named(result.best, out)
    written = _write(best, out, inputs, picture=not no_picture)
    console = make_console()
    console.print(
        f"[bold]{inputs.workload.name}[/bold] on {len(inputs.cluster.gpus)} GPUs "
        f"({inputs.cluster.name})"
    )
    console.print(plans_table(best, result.baselines, result.runners_up))
    console.print()
    console.print(pools_table(best))
    console.print()
    for sentence in (bottleneck(best), *figures(best), *_notes(best, result.runners_up, inputs)):
        console.print(sentence, soft_wrap=True)
    console.print(
        f"The space has {result.placements:,} placements, each with many layouts and programs. The "
        "bounds left "
        f"{result.evaluated:,} to evaluate, in {seconds(result.seconds)} s. Wrote {written}.",
        soft_wrap=True,
    )


def _notes(best: Plan, runners_up: Sequence[Plan], inputs: Inputs) -> Iterator[str]:
    """What was minimised, how many GPUs the plan uses, and what is as good."""
    assert best.predicted
    cluster = inputs.cluster
    price = (
        sum(cluster.device_of(gpu).price_per_hour for gpu in cluster.gpus)
        / 3600
        * best.predicted.step_seconds
    )
    objective = {
        "mean": "the mean step time",
        "p95": "the 95th percentile of the step time",
        "cost": (
            f"the cost of a step, {price:.3g} dollars with all GPUs of the cluster paid for, "
            "used or not"
        ),
    }[best.predicted.proof.objective]
    yield f"Minimised: {objective}."
    used = sum(len(pool.gpus) for pool in best.pools.values())
    if used < len(cluster.gpus) and best.predicted.proof.status == "optimal":
        yield (
            f"The plan uses {used:,} of {len(cluster.gpus):,} GPUs: it would be no faster with "
            "more."
        )
    if len(cluster.gpus) > inputs.workload.minibatch:
        yield (
            f"A minibatch of {inputs.workload.minibatch:,} sequences gives {len(cluster.gpus):,} "
            "GPUs less than one "
            f"each: no trained role can use more than {inputs.workload.minibatch:,} of them; a "
            "larger minibatch would."
        )
    if names := tied(best, runners_up, inputs.profiles):
        yield f"Within the error of what was measured as good: {', '.join(names)}."


def baseline(*, name: str, out: Path, command: str, **options: Any) -> None:
    check_target(out, ".json")
    inputs = read_inputs(**options)
    plan = find_baseline(
        name,
        inputs.workload,
        inputs.cluster,
        profiles=inputs.profiles,
        profile_hashes=inputs.provenance,
        command=command,
    )
    plan = _named(plan, out)
    written = _write(plan, out, inputs, picture=False)
    console = make_console()
    console.print(pools_table(plan))
    console.print()
    if plan.predicted is not None:
        console.print(
            f"{name}: {seconds(plan.predicted.step_seconds)} s per step, "
            f"{plan.predicted.tokens_per_second:,.0f} tokens/s. {bottleneck(plan)}",
            soft_wrap=True,
        )
    console.print(f"Wrote {written}.", soft_wrap=True)


def space(*, max_staleness: int | None, **options: Any) -> None:
    inputs = read_inputs(**options)
    _check_staleness(max_staleness)
    console, errors = make_console(), make_console(stderr=True)
    with errors.status("counting"):
        found = count(inputs.workload, inputs.cluster, max_staleness)
    console.print(
        f"[bold]{inputs.workload.name}[/bold] on {len(inputs.cluster.gpus)} GPUs "
        f"({inputs.cluster.name})"
    )
    for table in space_tables(found):
        console.print(table)
        console.print()
    console.print(
        "A placement is a structure (which roles share a pool) with a size for each pool. Layouts "
        "worth trying fit a "
        "pool of their own, and no other is better in everything. Programs are those of all "
        "structures that differ in "
        "their event graphs"
        + (
            f"; those of staleness {COUNTED + 1} and more are not counted."
            if found.uncounted
            else "."
        ),
        soft_wrap=True,
    )


def _check_staleness(max_staleness: int | None) -> None:
    if max_staleness is not None and max_staleness < 0:
        raise UserError(f"--max-staleness {max_staleness}: must be at least 0")


def _named(plan: Plan, out: Path) -> Plan:
    """The plan under the name of its file, by which runs and pictures call it."""
    return plan.model_copy(update={"name": out.stem})


def _write(plan: Plan, out: Path, inputs: Inputs, *, picture: bool) -> str:
    """Write the plan, and beside it its picture if wanted; what was written, in words."""
    if not picture:
        plan.write(out)
        return str(out)
    from planner.report.gantt import draw  # matplotlib is slow to load

    drawing = out.with_suffix(".png")
    check_target(drawing)
    plan.write(out)
    draw([forecast(plan, PICTURE_STEPS, inputs.profiles)], plan, drawing)
    return f"{out} and {drawing}"
