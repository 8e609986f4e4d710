"""`plan explain`."""

from collections.abc import Sequence
from pathlib import Path

from planner.commands.inputs import make_console, profiles_of
from planner.predict.cost import CostModel
from planner.predict.forecast import predict
from planner.predict.memory import plan_memory
from planner.predict.schedule import load_plan
from planner.report.bottleneck import bottleneck
from planner.report.insight import (
    bubbles_table,
    critical_sentences,
    effects_table,
    ladder_table,
    memory_kinds_tables,
    source_sentence,
    waits_table,
)
from planner.report.tables import seconds
from planner.search.questions import explain as explaining
from planner.search.solver.problem import scenarios_of


def explain(plan: Path, profiles: Sequence[Path]) -> None:
    checked = load_plan(plan)
    errors, console = make_console(stderr=True), make_console()
    found = profiles_of(checked, plan, profiles, errors)
    model = CostModel(checked.workload, checked.cluster, found, scenarios_of(checked))
    predicted = predict(checked, found, model=model)
    checked = checked.changed(predicted=predicted)
    with errors.status("explaining"):
        explanation = explaining.explain(checked, found)
    start = explanation.ladder[0].what
    if len(explanation.ladder) > 1:
        console.print(f"[bold]From {start} to {plan.stem}, one decision at a time[/bold]")
        console.print(ladder_table(explanation.ladder))
        if explanation.waits:
            console.print()
            console.print(waits_table(explanation.waits, start, explanation.ladder[0].seconds))
    else:
        console.print(
            "No ladder: neither split nor colocated fits these GPUs, or the plan shares pools in a "
            "way that the search does not know."
        )
    console.print(
        f"\n[bold]What binds {plan.stem}: {seconds(explanation.step_seconds)} s per step[/bold]"
    )
    for sentence in (bottleneck(checked), *critical_sentences(explanation.critical)):
        console.print(sentence, soft_wrap=True)
    console.print()
    console.print(bubbles_table(checked, predicted.busy, explanation.bubbles))
    console.print("\n[bold]What each call's cost does to the step[/bold]")
    console.print(effects_table(explanation.effects, explanation.step_seconds))
    console.print(source_sentence(explanation.effects), soft_wrap=True)
    console.print("\n[bold]Memory of the fullest GPU of each pool while each role runs[/bold]")
    for table in memory_kinds_tables(plan_memory(checked)):
        console.print(table)
        console.print()
