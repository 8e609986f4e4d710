"""Tables and sentences of `plan explain`, `plan what-if`, `plan pareto` and `plan space`."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from rich.markup import escape
from rich.table import Table

from planner.predict.memory import PoolMemory
from planner.report.tables import gigabytes, plain_table, pools_text, seconds
from planner.search.questions.explain import Bubble, Critical, Effect, WaitPrice
from planner.search.questions.ladder import Rung
from planner.search.questions.pareto import ParetoPoint
from planner.search.questions.space_size import SpaceSize
from planner.search.questions.what_if import Refused, Replanned
from planner.spec.plan import Plan

SHOWN_SHARE = 0.01  # of a pool's idle time: shorter gaps are left out
LEAST_SAVED = 0.0005  # of a step: what saves less saves nothing
POOLS = "GPUs of each pool: its roles"


def table_of(first: str, numbers: Sequence[str], last: str = "") -> Table:
    """A table with a name, right-aligned figures, and a wide last column if it has a title."""
    table = plain_table()
    table.add_column(first)
    for title in numbers:
        table.add_column(title, justify="right", no_wrap=True)
    if last:
        table.add_column(last, ratio=1)
    return table


# --- explain ---


def ladder_table(rungs: Sequence[Rung]) -> Table:
    """Each decision, the step time after it, and the seconds that it buys: they add up to the whole
    difference."""
    table = table_of("decision", ["step s", "buys s"], POOLS)
    start, end = rungs[0], rungs[-1]
    before = start.seconds
    for number, rung in enumerate(rungs):
        bought = _signed(before - rung.seconds, start.seconds) if number else ""
        cells = [escape(rung.what), seconds(rung.seconds), bought, pools_text(rung.plan)]
        table.add_row(*cells, style="" if number else "dim")
        before = rung.seconds
    table.add_section()
    whole = _signed(start.seconds - end.seconds, start.seconds)
    table.add_row("all together", "", whole, f"{start.seconds / end.seconds:.2f}×")
    return table


def _signed(value: float, step: float) -> str:
    """Seconds of a difference, with digits that suit the step time that it is compared with."""
    return f"{value:+.{2 if step >= 1 else 4}f}"


def waits_table(waits: Sequence[WaitPrice], name: str, step: float) -> Table:
    """What each wait of a baseline alone costs."""
    table = table_of(f"wait of {name}", ["costs s alone"])
    for wait in waits:
        table.add_row(escape(wait.what), _signed(max(0.0, wait.seconds), step))
    return table


def effects_table(effects: Sequence[Effect], step: float) -> Table:
    """Per call its seconds and their source, and what they do to the step."""
    table = table_of(
        "call", ["seconds", "scenarios", "step per s", "10% longer", "10% shorter"], "source"
    )
    for effect in effects:
        spread = ""
        if effect.longest > effect.shortest:
            spread = f"{seconds(effect.shortest)}–{seconds(effect.longest)}"
        table.add_row(
            effect.call,
            seconds(effect.seconds),
            spread,
            f"{effect.share:.2f}",
            f"{effect.slower / step - 1:+.2%}",
            f"{effect.faster / step - 1:+.2%}",
            effect.source,
        )
    return table


def bubbles_table(plan: Plan, busy: Mapping[str, float], bubbles: Sequence[Bubble]) -> Table:
    """Per pool its busy share and, below it, where it idles, in seconds per step."""
    table = table_of(
        "pool", ["GPUs", "busy", "idle s"], "before which call, and what that waits for"
    )
    for name, pool in plan.pools.items():
        own = [bubble for bubble in bubbles if bubble.pool == name]
        idle = sum(bubble.seconds for bubble in own)
        shown_idle = seconds(idle) if idle >= 1e-4 else "0"
        busy_share = f"{busy.get(name, 0.0):.0%}"
        table.add_row(escape(name), str(len(pool.gpus)), busy_share, shown_idle, style="bold")
        for bubble in own:
            if bubble.seconds >= SHOWN_SHARE * idle:
                where = f"before {bubble.call}, which waits for {bubble.waits_for}"
                table.add_row("", "", "", seconds(bubble.seconds), where)
    return table


def memory_kinds_tables(memory: Mapping[str, PoolMemory]) -> list[Table]:
    """Per pool its fullest GPU: what each role holds by kind while it runs, and what it keeps while
    others do."""
    return [_memory_kinds_table(name, pool) for name, pool in memory.items()]


def _memory_kinds_table(name: str, pool: PoolMemory) -> Table:
    table = table_of(escape(f"{name}, GB of {gigabytes(pool.allowed)}"), [*pool.detail])
    details = list(pool.detail.values())
    kinds = dict.fromkeys(kind for detail in details for kind in detail if kind != "idle")
    for kind in kinds:
        held = [detail.get(kind, 0) for detail in details]
        if any(held):
            cells = [gigabytes(count) if count else "" for count in held]
            table.add_row(kind.replace("_", " "), *cells)
    table.add_row("kept while idle", *(gigabytes(detail["idle"]) for detail in details))
    table.add_row(f"peak, processes too: {gigabytes(pool.peak)}", style="bold")
    return table


def critical_sentences(critical: Sequence[Critical]) -> list[str]:
    """The cycles that bind the step."""
    found = []
    for cycle in critical:
        spans = "one step" if cycle.steps == 1 else f"{cycle.steps} steps"
        often = f"in {cycle.share:.0%} of the length scenarios"
        if cycle.share == 1:
            often = "in every length scenario"
        found.append(f"Critical cycle {often}, over {spans}: {', '.join(cycle.calls)}.")
    return found


def source_sentence(effects: Sequence[Effect]) -> str:
    """Which calls' costs were measured and which not."""
    by_source: dict[str, list[str]] = {}
    for effect in effects:
        by_source.setdefault(effect.source, []).append(effect.call)
    sources = "; ".join(f"{source}: {', '.join(calls)}" for source, calls in by_source.items())
    if by_source.keys() & {"measured", "interpolated"}:
        return f"Costs by source. {sources}."
    return f"No cost was measured ({sources}); `plan profile` measures them."


# --- what-if and pareto ---


def what_if_table(rows: Sequence[Replanned | Refused]) -> Table:
    """Per condition the best plan's step, tokens per second and staleness, and how much longer a
    step takes with the roles on pools as in the plan at hand (a dash where that does not fit).
    Where nothing fits, the reason."""
    table = table_of(
        "condition", ["step s", "tokens/s", "stale", "as in the plan", "decision"], POOLS
    )
    for row in rows:
        if isinstance(row, Refused):
            table.add_row(escape(row.what), *["–"] * 5, escape(row.reason), style="dim")
            continue
        table.add_row(
            escape(row.what),
            seconds(row.seconds),
            f"{row.tokens_per_second:,.0f}",
            str(row.plan.staleness),
            "–" if row.kept is None else f"{row.kept / row.seconds - 1:+.1%}",
            "flips" if row.flips else "same",
            pools_text(row.plan),
            style="bold" if row.flips else "",
        )
    return table


def pareto_table(points: Sequence[ParetoPoint]) -> Table:
    """Per number of GPUs and staleness allowed: the best plan's step, tokens per second, dollars
    per step (where a price is known), and whether no other is as fast with no more GPUs and no more
    staleness."""
    priced = any(point.dollars for point in points)
    money = ["$ per step", "$ per M tokens"] if priced else []
    table = table_of("GPUs", ["stale ≤", "step s", "tokens/s", *money, "best"], POOLS)
    before = points[0].gpus if points else 0
    for point in points:
        if point.gpus != before:
            table.add_section()
        before = point.gpus
        figures = [
            str(point.max_staleness),
            seconds(point.seconds),
            f"{point.tokens_per_second:,.0f}",
        ]
        if priced:
            tokens = point.tokens_per_second * point.seconds
            figures += [f"{point.dollars:.3f}", f"{1e6 * point.dollars / tokens:.3f}"]
        figures.append("yes" if point.best else "")
        table.add_row(str(point.gpus), *figures, pools_text(point.plan))
    return table


def pareto_sentences(points: Sequence[ParetoPoint]) -> Iterator[str]:
    """What the next GPUs save, and at what price, a sentence per step: the best plan of each number
    of GPUs against that of the number before."""
    fastest: dict[int, ParetoPoint] = {}
    for point in points:
        before = fastest.get(point.gpus)
        if before is None or point.seconds < before.seconds:
            fastest[point.gpus] = point
    for less, more in pairwise(fastest[gpus] for gpus in sorted(fastest)):
        saved = 1 - more.seconds / less.seconds
        hours = more.gpus * more.seconds / (less.gpus * less.seconds) - 1
        money = f", {less.dollars:.3f} → {more.dollars:.3f} dollars" if more.dollars else ""
        what = f"{saved:.1%} less time a step" if saved >= LEAST_SAVED else "no less time a step"
        price = f"{abs(hours):.1%} {'more' if hours >= 0 else 'fewer'} GPU hours"
        yield (
            f"{less.gpus} → {more.gpus} GPUs: {what} ({seconds(less.seconds)} → "
            f"{seconds(more.seconds)} s) for {price}{money}."
        )


# --- space ---


def space_tables(size: SpaceSize) -> list[Table]:
    """Placements by the number of pools; layouts of each role on all GPUs; programs by
    staleness."""
    placements = table_of("pools", ["structures", "placements"])
    for row in size.placements:
        placements.add_row(*(f"{count:,}" for count in row))
    structures = sum(row.structures for row in size.placements)
    all_placements = sum(row.placements for row in size.placements)
    placements.add_row("all", f"{structures:,}", f"{all_placements:,}", style="bold")
    layouts = table_of("role on all GPUs", ["layouts", "worth trying"])
    for role in size.layouts:
        layouts.add_row(role.role, f"{role.listed:,}", f"{role.worth_trying:,}")
    programs = table_of("staleness", ["programs", "most of one structure"])
    for each in size.programs:
        programs.add_row(str(each.staleness), f"{each.programs:,}", f"{each.most:,}")
    return [placements, layouts, programs]
