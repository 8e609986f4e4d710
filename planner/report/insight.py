"""Tables and sentences of `plan explain`, `plan what-if`, `plan pareto` and `plan space`."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from planner.predict.memory import PoolMemory
from planner.report.tables import gigabytes, seconds
from planner.spec.plan import Plan


def table_of(first: str, numbers: Sequence[str], last: str = "") -> Table:
    """A table with a name, right-aligned figures, and a wide last column if it has a title."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(first)
    for title in numbers:
        table.add_column(title, justify="right", no_wrap=True)
    if last:
        table.add_column(last, ratio=1)
    return table


def ladder_table(rungs: Sequence[tuple[str, Plan, float]]) -> Table:
    """Each decision, the step time after it, and the seconds that it buys: they add up to the whole
    difference."""
    table = table_of("decision", ["step s", "buys s"], "GPUs of each pool: its roles")
    before = rungs[0][2]
    for number, (what, plan, step) in enumerate(rungs):
        bought = _signed(before - step, rungs[0][2]) if number else ""
        table.add_row(
            escape(what), seconds(step), bought, structure_text(plan), style="" if number else "dim"
        )
        before = step
    table.add_section()
    whole = rungs[0][2] - rungs[-1][2]
    table.add_row(
        "all together", "", _signed(whole, rungs[0][2]), f"{rungs[0][2] / rungs[-1][2]:.2f}×"
    )
    return table


def structure_text(plan: Plan) -> str:
    """Every pool's GPUs and roles."""
    pools = []
    for name, pool in plan.pools.items():
        roles = [role for role, layout in plan.roles.items() if name in layout.pools]
        everything = len(roles) == len(plan.roles) > 1
        pools.append(
            f"{len(pool.gpus)}: {'all roles' if everything else ' '.join(roles) or 'nothing'}"
        )
    return " | ".join(pools)


def _signed(value: float, step: float) -> str:
    """Seconds of a difference, with digits that suit the step time that it is compared with."""
    return f"{value:+.{2 if step >= 1 else 4}f}"


def waits_table(waits: Sequence[tuple[str, float]], name: str, step: float) -> Table:
    """What each wait of a baseline alone costs."""
    table = table_of(f"wait of {name}", ["costs s alone"])
    for what, price in waits:
        table.add_row(escape(what), _signed(max(0.0, price), step))
    return table


def effects_table(
    effects: Sequence[tuple[str, float, float, float, str, float, float, float]], step: float
) -> Table:
    """Per call its seconds and their source, and what they do to the step."""
    table = table_of(
        "call", ["seconds", "scenarios", "step per s", "10% longer", "10% shorter"], "source"
    )
    for call, mean, least, most, source, share, slower, faster in effects:
        spread = f"{seconds(least)}–{seconds(most)}" if most > least else ""
        changes = [f"{after / step - 1:+.2%}" for after in (slower, faster)]
        table.add_row(call, seconds(mean), spread, f"{share:.2f}", *changes, source)
    return table


def bubbles_table(
    plan: Plan, busy: Mapping[str, float], bubbles: Sequence[tuple[str, str, str, float]]
) -> Table:
    """Per pool its busy share and, below it, where it idles, in seconds per step."""
    table = table_of(
        "pool", ["GPUs", "busy", "idle s"], "before which call, and what that waits for"
    )
    for pool, gpus in plan.pools.items():
        idle = sum(gap for where, _, _, gap in bubbles if where == pool)
        table.add_row(
            escape(pool),
            str(len(gpus.gpus)),
            f"{busy.get(pool, 0.0):.0%}",
            _idle(idle),
            style="bold",
        )
        for where, call, waits_for, gap in bubbles:
            if where == pool and gap >= 0.01 * idle:
                table.add_row(
                    "", "", "", seconds(gap), f"before {call}, which waits for {waits_for}"
                )
    return table


def _idle(value: float) -> str:
    return seconds(value) if value >= 1e-4 else "0"


def memory_kinds_tables(memory: Mapping[str, PoolMemory]) -> list[Table]:
    """Per pool its fullest GPU: what each role holds by kind while it runs, and what it keeps while
    others do."""
    tables = []
    for name, pool in memory.items():
        title = f"{name}, GB of {gigabytes(pool.allowed)}"
        table = table_of(escape(title), [*pool.detail])
        for kind in dict.fromkeys(
            kind for detail in pool.detail.values() for kind in detail if kind != "idle"
        ):
            held = [detail.get(kind, 0) for detail in pool.detail.values()]
            if any(held):
                table.add_row(
                    kind.replace("_", " "), *(gigabytes(count) if count else "" for count in held)
                )
        table.add_row(
            "kept while idle", *(gigabytes(detail["idle"]) for detail in pool.detail.values())
        )
        table.add_row(f"peak, processes too: {gigabytes(pool.peak)}", style="bold")
        tables.append(table)
    return tables


def critical_sentences(critical: Sequence[tuple[tuple[str, ...], int, float]]) -> list[str]:
    """The cycles that bind the step."""
    found = []
    for calls, steps, share in critical:
        spans = "one step" if steps == 1 else f"{steps} steps"
        often = (
            "in every length scenario" if share == 1 else f"in {share:.0%} of the length scenarios"
        )
        found.append(f"Critical cycle {often}, over {spans}: {', '.join(calls)}.")
    return found


def source_sentence(
    effects: Sequence[tuple[str, float, float, float, str, float, float, float]],
) -> str:
    """Which calls' costs were measured and which not."""
    by_source: dict[str, list[str]] = {}
    for call, _, _, _, source, *_ in effects:
        by_source.setdefault(source, []).append(call)
    parts = [f"{source}: {', '.join(calls)}" for source, calls in by_source.items()]
    if set(by_source) & {"measured", "interpolated"}:
        return f"Costs by source. {'; '.join(parts)}."
    return f"No cost was measured ({'; '.join(parts)}); `plan profile` measures them."


def what_if_table(rows: Sequence[tuple[str, Plan | str, float, float, float | None]]) -> Table:
    """Per condition the best plan's step, tokens per second and staleness, and how much longer a
    step takes with the roles on pools as in the plan at hand (a dash where that does not fit).
    Where nothing fits, the reason."""
    table = table_of(
        "condition",
        ["step s", "tokens/s", "stale", "as in the plan", "decision"],
        "GPUs of each pool: its roles",
    )
    for what, plan, step, tokens, kept in rows:
        if isinstance(plan, str):
            table.add_row(escape(what), *["–"] * 5, escape(plan), style="dim")
            continue
        longer = "–" if kept is None else f"{kept / step - 1:+.1%}"
        flips = kept is None or kept > step * (1 + 1e-9)
        figures = [
            seconds(step),
            f"{tokens:,.0f}",
            str(plan.staleness),
            longer,
            "flips" if flips else "same",
        ]
        table.add_row(escape(what), *figures, structure_text(plan), style="bold" if flips else "")
    return table


def pareto_table(
    rows: Sequence[tuple[int, int, Plan, float, float, float, bool]], dollars_known: bool
) -> Table:
    """Per number of GPUs and staleness allowed: the best plan's step, tokens per second, dollars
    per step, and whether no other is as fast with no more GPUs and no more staleness."""
    money = ["$ per step", "$ per M tokens"] if dollars_known else []
    table = table_of(
        "GPUs", ["stale ≤", "step s", "tokens/s", *money, "best"], "GPUs of each pool: its roles"
    )
    before = rows[0][0] if rows else 0
    for gpus, allowed, plan, step, tokens, dollars, best in rows:
        if gpus != before:
            table.add_section()
        before = gpus
        prices = (
            [f"{dollars:.3f}", f"{1e6 * dollars / (tokens * step):.3f}"] if dollars_known else []
        )
        figures = [str(allowed), seconds(step), f"{tokens:,.0f}", *prices, "yes" if best else ""]
        table.add_row(str(gpus), *figures, structure_text(plan))
    return table


def space_tables(
    pools: Sequence[tuple[int, int, int]],
    layouts: Sequence[tuple[str, int, int]],
    programs: Sequence[tuple[int, int, int]],
) -> list[Table]:
    """Placements by the number of pools; layouts of each role on all GPUs; programs by
    staleness."""
    placements = table_of("pools", ["structures", "placements"])
    for row in pools:
        placements.add_row(*(f"{count:,}" for count in row))
    placements.add_row(
        "all", *(f"{sum(row[column] for row in pools):,}" for column in (1, 2)), style="bold"
    )
    roles = table_of("role on all GPUs", ["layouts", "worth trying"])
    for role, *counts in layouts:
        roles.add_row(role, *(f"{count:,}" for count in counts))
    orders = table_of("staleness", ["programs", "most of one structure"])
    for staleness, total, most in programs:
        orders.add_row(str(staleness), f"{total:,}", f"{most:,}")
    return [placements, roles, orders]
