"""`plan search`, `plan space` and `plan baseline`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from planner.commands.inputs import Inputs, check_target, make_console, read_inputs
from planner.commands.options import JobOptions
from planner.predict.forecast import forecast
from planner.report.bottleneck import bottleneck
from planner.report.hosts import host_sentences
from planner.report.insight import space_tables
from planner.report.tables import figures, plans_table, pools_table, seconds
from planner.search import SearchOptions, find
from planner.search import baseline as find_baseline
from planner.search.find import tied
from planner.search.questions.space_size import COUNTED, count
from planner.spec.cluster import Cluster
from planner.spec.plan import Plan
from planner.spec.wording import counted

DRAWN_STEPS = 3


NEARLY_FULL = 0.4  # of a host's memory: then it may be what decides


def search(
    job: JobOptions, options: SearchOptions, *, out: Path, picture: bool, command: str
) -> None:
    check_target(out, ".json")
    inputs = read_inputs(job)
    with make_console(stderr=True).status("searching"):
        result = find(
            inputs.workload,
            inputs.cluster,
            options,
            profiles=inputs.profiles,
            provenance=inputs.provenance(command),
        )
    best = _named(result.best, out)
    written = _write(best, out, inputs, picture=picture)
    console = make_console()
    console.print(_headline(inputs))
    console.print(plans_table(best, result.baselines, result.runners_up))
    console.print()
    console.print(pools_table(best))
    console.print()
    notes = *host_sentences(best, NEARLY_FULL), *_notes(best, result.runners_up, inputs)
    for sentence in (bottleneck(best), *figures(best), *notes):
        console.print(sentence, soft_wrap=True)
    console.print(
        f"The space has {counted(result.placements, 'placement')}, each with many layouts and "
        "programs. "
        f"The bounds left {result.evaluated:,} to evaluate, in {seconds(result.seconds)} s. Wrote "
        f"{written}.",
        soft_wrap=True,
    )


def _notes(best: Plan, runners_up: Sequence[Plan], inputs: Inputs) -> Iterator[str]:
    """What was minimised, how many GPUs the plan uses, and what is as good."""
    assert best.predicted
    cluster, proof = inputs.cluster, best.predicted.proof
    yield f"Minimised: {_minimised(best, cluster)}."
    workload = inputs.workload
    if workload.oversamples:
        yield (
            f"A step generates and scores {workload.generated:,} sequences, of which "
            f"{workload.batch:,} are trained on."
        )
    yield from _in_flight(best, runners_up)
    gpus, minibatch = len(cluster.gpus), workload.minibatch
    used = best.gpus_of(tuple(best.pools))
    if used < gpus and proof.status == "optimal":
        yield f"The plan uses {used:,} of {gpus:,} GPUs: it would be no faster with more."
    if gpus > minibatch:
        yield (
            f"A minibatch of {minibatch:,} sequences gives {gpus:,} GPUs less than one each: no "
            f"trained role can use more than {minibatch:,} of them; a larger minibatch would."
        )
    if names := tied(best, runners_up, inputs.profiles):
        yield f"Within the error of what was measured as good: {', '.join(names)}."


def _in_flight(best: Plan, runners_up: Sequence[Plan]) -> Iterator[str]:
    """Whether weights in flight pay, where the workload leaves that open."""
    workload = best.workload
    if workload.sync != "any":
        return
    other = next((plan for plan in runners_up if plan.streams != best.streams), None)
    verdict = "pay" if best.streams else "do not pay"
    if other is not None:
        with_them = "with a boundary" if best.streams else "with them"
        took = f"{other.name}, the best plan {with_them}, takes {_step(other)} s"
        yield f"Weights in flight {verdict} here: {took}."
    elif not best.streams:
        why = "generation would need GPUs of its own, beside all other roles"
        if not workload.max_staleness:
            why = "nothing is in flight at a staleness of 0"
        yield f"No plan with weights in flight: {why}."


def _step(plan: Plan) -> str:
    assert plan.predicted, "a plan that was searched has its prediction"
    return seconds(plan.predicted.step_seconds)


def _minimised(best: Plan, cluster: Cluster) -> str:
    assert best.predicted
    objective = best.predicted.proof.objective
    if objective == "mean":
        return "the mean step time"
    if objective == "p95":
        return "the 95th percentile of the step time"
    per_hour = sum(cluster.device_of(gpu).price_per_hour for gpu in cluster.gpus)
    dollars = per_hour / 3600 * best.predicted.step_seconds
    return (
        f"the cost of a step, {dollars:.3g} dollars with all GPUs of the cluster paid for, used "
        "or not"
    )


def baseline(job: JobOptions, name: str, *, out: Path, command: str) -> None:
    check_target(out, ".json")
    inputs = read_inputs(job)
    plan = find_baseline(
        name,
        inputs.workload,
        inputs.cluster,
        profiles=inputs.profiles,
        provenance=inputs.provenance(command),
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


def space(job: JobOptions, max_staleness: int | None) -> None:
    inputs = read_inputs(job)
    console, errors = make_console(), make_console(stderr=True)
    with errors.status("counting"):
        found = count(inputs.workload, inputs.cluster, max_staleness)
    console.print(_headline(inputs))
    for table in space_tables(found):
        console.print(table)
        console.print()
    rest = f"; those of staleness {COUNTED + 1} and more are not counted" if found.uncounted else ""
    console.print(
        "A placement is a structure (which roles share a pool) with a size for each pool. Layouts "
        "worth trying fit a pool of their own, and no other is better in everything. Programs are "
        f"those of all structures that differ in their event graphs{rest}.",
        soft_wrap=True,
    )


def _headline(inputs: Inputs) -> str:
    gpus = len(inputs.cluster.gpus)
    return f"[bold]{inputs.workload.name}[/bold] on {counted(gpus, 'GPU')} ({inputs.cluster.name})"


def _named(plan: Plan, out: Path) -> Plan:
    """The plan under the name of its file, by which runs and pictures call it."""
    return plan.changed(name=out.stem)


def _write(plan: Plan, out: Path, inputs: Inputs, *, picture: bool) -> str:
    """Write the plan, and next to it its picture if wanted; returns what was written, in words."""
    if not picture:
        plan.write(out)
        return str(out)
    from planner.report.gantt import draw  # matplotlib is slow to load

    drawing = out.with_suffix(".png")
    check_target(drawing)
    plan.write(out)
    steps = 2 * plan.staleness + 1 + DRAWN_STEPS  # the pipeline fills, runs full, and drains
    draw([forecast(plan, steps, inputs.profiles)], plan, drawing, steps=DRAWN_STEPS)
    return f"{out} and {drawing}"
