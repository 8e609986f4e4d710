"""What the commands print: tables and sentences about plans, memory and comparisons."""

from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from planner.predict.costs.estimates import Estimate
from planner.report.compare import Comparison, SecondsCompared, occupancy
from planner.spec.plan import Plan, RolloutRole, TrainerRole
from planner.spec.wording import plural

SOURCES = ("measured", "interpolated", "extrapolated", "roofline")
HOST = "host"  # stands where a call has no pool


def plain_table() -> Table:
    """A table with one line, under its titles."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)


def plans_table(
    best: Plan, baselines: Mapping[str, Plan | str], runners_up: Sequence[Plan] = ()
) -> Table:
    """The winner, the baselines and the runners-up: what each one is predicted to do, and the
    speed-up over the two reference baselines. A baseline that does not fit has its reason in place
    of the figures."""
    table = plain_table()
    table.add_column("plan", no_wrap=True)
    for title in ("step s", "p95 s", "tokens/s", "busy", "vs split", "vs colocated", "stale"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("GPUs of each pool: its roles", ratio=1)
    references = {name: baselines.get(name) for name in ("split", "colocated")}
    table.add_row(*_plan_cells("best", best, references), style="bold")
    table.add_section()
    for name, plan in baselines.items():
        if isinstance(plan, Plan):
            table.add_row(*_plan_cells(name, plan, references))
        else:
            reason = plan.removeprefix(f"{name}: ")
            table.add_row(name, *["–"] * 7, escape(f"does not fit: {reason}"), style="dim")
    if runners_up:
        table.add_section()
        for plan in runners_up:
            table.add_row(*_plan_cells(escape(plan.name), plan, references))
    return table


def _plan_cells(name: str, plan: Plan, references: Mapping[str, Plan | str | None]) -> list[str]:
    expected = plan.predicted
    assert expected is not None, "a plan that was searched has its prediction"
    idle = len(plan.cluster.gpus) - plan.gpus_of(tuple(plan.pools))
    return [
        name,
        seconds(expected.step_seconds),
        seconds(expected.step_seconds_p95),
        f"{expected.tokens_per_second:,.0f}",
        f"{occupancy(plan, expected.busy):.0%}",
        *(speed_up(plan, reference) for reference in references.values()),
        f"{plan.staleness}{' in flight' * plan.streams}",
        pools_text(plan) + (f" | {idle}: idle" if idle else ""),
    ]


def pools_text(plan: Plan, separator: str = " | ") -> str:
    """Each pool's GPUs and roles, with spaces where a table may fold it."""
    texts = []
    for name, pool in plan.pools.items():
        roles = [role for role, layout in plan.roles.items() if name in layout.pools]
        told = "all roles" if len(roles) == len(plan.roles) else " ".join(roles) or "nothing"
        texts.append(f"{len(pool.gpus)}: {told}")
    return separator.join(texts)


def speed_up(plan: Plan, reference: Plan | str | None) -> str:
    """How many times faster a plan is than a reference; a dash if the reference does not fit."""
    if not isinstance(reference, Plan) or reference.predicted is None or plan.predicted is None:
        return "–"
    return f"{reference.predicted.step_seconds / plan.predicted.step_seconds:.2f}×"


def pools_table(plan: Plan) -> Table:
    """Per pool its GPUs, busy share and the memory of its fullest GPU; below it the layout of each
    of its roles."""
    table = plain_table()
    table.add_column("pool and roles", no_wrap=True)
    for title in ("GPUs", "busy", "memory GB"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("layout", ratio=1)
    for name, pool in plan.pools.items():
        busy = plan.predicted.busy.get(name, 0.0) if plan.predicted else 0.0
        used = plan.predicted.memory_bytes.get(name, 0) if plan.predicted else 0
        memory = f"{gigabytes(used)} of {gigabytes(plan.device_of(name).memory_bytes)}"
        table.add_row(
            escape(name),
            str(len(pool.gpus)),
            f"{busy:.0%}",
            memory,
            _where(plan, name),
            style="bold",
        )
        for role, layout in plan.roles.items():
            if name in layout.pools:
                table.add_row(f"  {role}", "", "", "", layout_text(layout))
    unused = len(plan.cluster.gpus) - plan.gpus_of(tuple(plan.pools))
    if unused:
        table.add_row("(unused)", str(unused), "0%", "", "", style="dim")
    return table


def _where(plan: Plan, pool: str) -> str:
    """The nodes of a pool and its GPUs there; nodes with the same ones are said together."""
    on: dict[int, list[int]] = {}
    for node, index in plan.pools[pool].gpus:
        on.setdefault(node, []).append(index)
    alike: dict[str, list[int]] = {}
    for node, indices in sorted(on.items()):
        alike.setdefault(_ranges(sorted(indices)), []).append(node)
    texts = []
    for gpus, nodes in alike.items():
        texts.append(f"{plural('node', len(nodes))} {_ranges(nodes)}: {gpus}")
    return "; ".join(texts)


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def layout_text(layout: TrainerRole | RolloutRole) -> str:
    """A role's layout in a few words."""
    if isinstance(layout, RolloutRole):
        text = f"{layout.engine}, {layout.replicas} × tensor-parallel {layout.tensor_parallel}, "
        text += f"{layout.concurrency} sequences at once, {layout.memory_fraction:.0%} of memory"
        return text + (", sleeps while idle" if layout.offload else "")
    text = f"FSDP {layout.shard}"
    text += f" × {layout.replicas} replicas" if layout.replicas > 1 else ""
    text += f", micro-batch {layout.micro_batch_tokens:,} tokens"
    text += ", recomputes" if layout.recompute else ""
    return text + (f", offloads {layout.offload}" if layout.offload != "none" else "")


def figures(plan: Plan) -> list[str]:
    """Sentences on the lower bound and on where the costs come from."""
    expected = plan.predicted
    assert expected is not None
    space = f" in its space ({expected.proof.space})" if expected.proof.space else ""
    proof = {
        "optimal": f"proven optimal{space}",
        "gap": "not proven optimal",
        "time_limit": "not proven optimal when the search was ended",
        "none": "not searched",
    }[expected.proof.status]
    bound = seconds(expected.lower_bound_seconds)
    sentences = [f"Lower bound {bound} s, gap {expected.gap:.1%}; {proof}."]
    shares = []
    for source in (*SOURCES, *sorted(expected.sources.keys() - set(SOURCES))):
        share = expected.sources.get(source, 0.0)
        if share >= 0.005:
            shares.append(f"{share:.0%} {source}")
    if shares:
        sentences.append(f"Costs by busy time: {', '.join(shares)}.")
    return sentences


def calls_table(plan: Plan, call_seconds: Mapping[str, float]) -> Table:
    """Mean seconds of each call, and the pools that it occupies."""
    table = plain_table()
    table.add_column("call", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("pools")
    for call, value in call_seconds.items():
        table.add_row(
            call,
            seconds(value),
            ", ".join(map(escape, plan.pools_of(plan.dataflow[call]))) or HOST,
        )
    return table


def estimate_table(plan: Plan, estimates: Mapping[str, Estimate]) -> Table:
    """Mean seconds of each call of a step, the share of them, the pools that it occupies, and where
    the figure comes from."""
    table = plain_table()
    table.add_column("call", no_wrap=True)
    for title in ("seconds", "share"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("pools")
    table.add_column("source", no_wrap=True)
    means = {name: float(found.seconds.mean()) for name, found in estimates.items()}
    total = sum(means.values())
    for call, value in means.items():
        pools = ", ".join(map(escape, plan.pools_of(plan.dataflow[call]))) or HOST
        source = estimates[call].source
        table.add_row(call, seconds(value), f"{value / total:.0%}", pools, source)
    return table


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Predicted and measured figures: per call, per pool and per step."""
    calls = _errors_table(
        "call", "on", comparison.calls, lambda row: ", ".join(map(escape, row.pools)) or HOST
    )
    steps = _errors_table("step", "", comparison.steps, None)
    steps.add_section()
    steps.add_row("mean", *_error_cells(comparison.step), style="bold")
    pools = plain_table()
    pools.add_column("pool", no_wrap=True)
    pools.add_column("predicted busy", justify="right")
    pools.add_column("measured busy", justify="right")
    for pool, share in comparison.predicted_busy.items():
        pools.add_row(
            escape(pool), f"{share:.0%}", f"{comparison.measured_busy.get(pool, 0.0):.0%}"
        )
    return [calls, pools, steps]


def verdict(comparison: Comparison) -> list[str]:
    """Sentences on the two numbers that matter: the error of the step time, and the controller's
    overhead."""
    step = comparison.step
    return [
        f"Step time: predicted {seconds(step.predicted)} s, measured {seconds(step.measured)} s, "
        f"error {step.error:+.1%}.",
        f"Controller overhead: {comparison.controller_overhead:+.1%} over the same program "
        "re-simulated with the measured durations "
        f"({seconds(comparison.resimulated_step_seconds)} s).",
    ]


def _errors_table(
    title: str,
    where: str,
    rows: Sequence[SecondsCompared],
    place: Callable[[SecondsCompared], str] | None,
) -> Table:
    table = plain_table()
    table.add_column(title, no_wrap=True)
    for column in ("predicted s", "measured s", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    if place:
        table.add_column(where)
    for row in rows:
        table.add_row(row.name, *_error_cells(row), *([place(row)] if place else []))
    return table


def _error_cells(row: SecondsCompared) -> tuple[str, str, str]:
    return seconds(row.predicted), seconds(row.measured), f"{row.error:+.1%}"


def memory_table(rows: Mapping[str, tuple[int, int]]) -> Table:
    """Per pool the bytes that its fullest GPU holds at its peak, and those that it may: `{pool:
    (peak, allowed)}`."""
    table = plain_table()
    table.add_column("pool", no_wrap=True)
    for title in ("peak GB", "allowed GB", "free"):
        table.add_column(title, justify="right")
    for pool, (peak, allowed) in rows.items():
        table.add_row(
            escape(pool), gigabytes(peak), gigabytes(allowed), f"{1 - peak / allowed:.0%}"
        )
    return table


def roles_of(plan: Plan, pool: str) -> str:
    """The roles of a pool, or its name if it has none."""
    return "+".join(role for role, layout in plan.roles.items() if pool in layout.pools) or pool


def seconds(value: float) -> str:
    """Three significant digits where that is readable, and never an exponent."""
    if value >= 99.95:
        return f"{value:,.0f}"
    digits = 1 if value >= 9.995 else 2 if value >= 0.9995 else 3 if value >= 0.09995 else 4
    return f"{value:.{digits}f}"


def gigabytes(value: int) -> str:
    """Bytes as a figure of a table in GB: three significant digits, two below one."""
    if value >= 99.95e9:
        return f"{value / 1e9:.0f}"
    return f"{value / 1e9:.1f}" if value >= 1e9 else f"{value / 1e9:.2g}"
