"""Where the step of an imported run goes, call by call, beside what the device's rates allow."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median

from rich.table import Table

from planner.report.bottleneck import bottleneck
from planner.report.tables import plain_table, seconds
from planner.spec.plan import Plan

LITTLE = 0.001  # of a step: a call that takes less has no line


def calls_of_run(
    plan: Plan,
    steps: Sequence[Mapping[str, float]],
    roofline: Mapping[str, float],
    measured: Sequence[float],
) -> Table:
    """The calls of the steps that count: mean, least and most seconds, the share of the
    `measured` step, and how many times the roofline's seconds that is."""
    table = plain_table()
    table.add_column("call", no_wrap=True)
    for title in ("measured s", "least", "most", "share", "roofline s", "times"):
        table.add_column(title, justify="right", no_wrap=True)
    whole = fmean(measured)
    for call in steps[0]:
        taken = [step[call] for step in steps]
        mean, computed = fmean(taken), roofline[call]
        if mean < LITTLE * whole:
            continue
        ranges = [seconds(value) for value in (mean, min(taken), max(taken))]
        on_host = plan.dataflow[call].kind == "host"
        compared = ["–", "–"] if on_host else [seconds(computed), f"{mean / computed:.1f}×"]
        table.add_row(call, *ranges, f"{mean / whole:.0%}", *compared)
    return table


def sentences_of_run(plan: Plan, measured: Sequence[float], roofline: float) -> Iterator[str]:
    """The step as it was measured, as the plan predicts it, and by the roofline; and what binds."""
    assert plan.predicted
    predicted, middle = plan.predicted.step_seconds, median(measured)
    yield (
        f"[bold]Step: {seconds(fmean(measured))} s[/bold] (median {seconds(middle)} s of "
        f"{len(measured)} steps). From the means of its calls splitplan predicts "
        f"{seconds(predicted)} s, {predicted / middle - 1:+.1%} of the median."
    )
    yield (
        f"By the roofline the same plan takes {seconds(roofline)} s a step: the device's rates at "
        "the efficiencies of profiles/devices.toml, not at the data sheet's."
    )
    yield bottleneck(plan)
