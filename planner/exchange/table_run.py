"""A run whose seconds stand in a table: what they are of is told by the user, and so is the
placement."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from planner.exchange.imported_run import STEP, ImportedRun, default_warmup
from planner.exchange.metric_tables import columns_of, read_metrics
from planner.spec.dataflow import Dataflow
from planner.spec.errors import UserError
from planner.spec.plan import Issue, Plan, Wait

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
OPENRLHF_COLUMNS = (  # OpenRLHF 0.11.2: `train_step` of its trainer
    "generate=timing/generation",
    "score,ref_logprobs,old_logprobs,values,advantages=timing/make_experience",
    "update_critic,update_actor=timing/ppo_train",
    "sync_weights=timing/broadcast",
    "step=timing/step_total",
)


def parse_columns(
    texts: Sequence[str], flow: Dataflow
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Columns by phase, and the calls of each phase: `values,ref_logprobs=timing/x` is a phase of
    two calls, and `step=…` the whole step. Raises UserError."""
    columns: dict[str, str] = {}
    phases: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, column = text.partition("=")
        calls = tuple(part.strip() for part in name.split(",") if part.strip())
        if not equals or not calls or not column.strip():
            raise UserError(f"--column {text}: write CALLS=COLUMN, such as generate=timing_s/gen")
        if calls == (STEP,):
            columns[STEP] = column.strip()
            continue
        for call in calls:
            if call not in flow.names:
                has = ", ".join(flow.names)
                raise UserError(f"--column {text}: there is no call {call!r}; there are {has}")
        phase = ",".join(calls)
        columns[phase], phases[phase] = column.strip(), calls
    if not phases:
        raise UserError("say what the columns are: --column generate=COLUMN, and so on")
    return columns, phases


def known_calls(texts: Sequence[str], flow: Dataflow) -> list[str]:
    """Columns without the calls that a workload has not."""
    found = []
    for text in texts:
        name, _, column = text.partition("=")
        calls = [call for call in name.split(",") if call in flow.names or call == STEP]
        if calls:
            found.append(f"{','.join(calls)}={column}")
    return found


def imported_table(
    path: Path, plan: Plan, columns: Sequence[str], unit: str, warmup: int | None
) -> ImportedRun:
    """The run of a table under a plan, whose program becomes that of the phases. Raises
    UserError."""
    named, phases = parse_columns(columns, plan.dataflow.steady)
    steps = [seconds for _, seconds in columns_of(read_metrics(path), named, path, UNITS[unit])]
    notes = [
        "placement, layouts, batch and lengths are those that were named, not the log's",
        "calls of one column share its seconds as the roofline has them",
    ]
    if STEP not in named:
        notes.append("no column is the step: it is taken as the sum of the others")
        steps = [{**step, STEP: sum(step.values())} for step in steps]
    first = default_warmup(len(steps)) if warmup is None else warmup
    if first >= len(steps):
        raise UserError(f"{path}: has {len(steps)} whole steps; --warmup {first} leaves none")
    notes.append(f"the first {first} of {len(steps)} steps do not count (--warmup)")
    return ImportedRun(
        plan=_with_program(plan, phases),
        steps=tuple(steps),
        phases=phases,
        warmup=first,
        notes=tuple(notes),
    )


def _with_program(plan: Plan, phases: Mapping[str, tuple[str, ...]]) -> Plan:
    """The plan whose phases come one after the other, with the calls of each at once."""
    items: list[Issue | Wait] = []
    listed = [call for calls in phases.values() for call in calls]
    rest = [call.name for call in plan.dataflow.steady.calls if call.name not in listed]
    order = {name: number for number, name in enumerate(plan.dataflow.steady.names)}
    groups = [*phases.values(), *((call,) for call in rest)]
    for calls in sorted(groups, key=lambda calls: min(order[call] for call in calls)):
        inside = sorted(calls, key=lambda call: order[call])
        items += [*(Issue(call=call) for call in inside), Wait(wait=tuple(inside))]
    return plan.changed(name="imported", program=tuple(items), staleness=0, predicted=None)
