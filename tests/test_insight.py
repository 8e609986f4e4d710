"""The tables and sentences of explain, what-if and pareto, from results written by hand."""

from conftest import cpu_cluster, make_plan, make_workload
from rich.console import Console, RenderableType

from planner.predict.memory import PoolMemory
from planner.report import insight
from planner.search.questions.explain import Bubble, Critical, Effect, WaitPrice
from planner.search.questions.ladder import Rung
from planner.search.questions.pareto import ParetoPoint
from planner.search.questions.what_if import Refused, Replanned
from planner.spec.plan import Plan

POOLS = {"a": 2, "b": 1}
HOMES = {"actor": "a", "critic": "a", "reference": "a", "reward": "b", "rollout": "b"}


def two_pools() -> Plan:
    return make_plan(make_workload(), POOLS, HOMES, cluster=cpu_cluster(3))


def rows_of(table: RenderableType) -> list[list[str]]:
    """The cells of a printed table that are not empty, line by line."""
    console = Console(width=200, no_color=True)
    with console.capture() as captured:
        console.print(table)
    lines = [line for line in captured.get().splitlines() if line.strip(" ─━")]
    return [[cell for cell in line.split("  ") if cell.strip()] for line in lines]


def stripped(table: RenderableType) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in rows_of(table)]


def test_the_rungs_of_a_ladder_show_what_each_buys_and_the_whole() -> None:
    plan = two_pools()
    rungs = [Rung("split", plan, 8.0), Rung("drop the waits", plan, 7.5), Rung("best", plan, 4.0)]
    rows = stripped(insight.ladder_table(rungs))
    assert [row[:3] for row in rows[2:4]] == [
        ["drop the waits", "7.50", "+0.50"],
        ["best", "4.00", "+3.50"],
    ]
    assert rows[1][:2] == ["split", "8.00"]
    assert rows[-1] == ["all together", "+4.00", "2.00×"]


def test_a_wait_never_costs_less_than_nothing() -> None:
    waits = [WaitPrice("after score", 0.25), WaitPrice("after values", -1e-12)]
    rows = stripped(insight.waits_table(waits, "split", step=2.0))
    assert rows[1:] == [["after score", "+0.25"], ["after values", "+0.00"]]
    fine = stripped(insight.waits_table(waits, "split", step=0.5))
    assert fine[1:] == [["after score", "+0.2500"], ["after values", "+0.0000"]]


def test_effects_are_relative_to_the_step() -> None:
    varying = Effect("generate", 2.0, 1.5, 3.0, "measured", 0.5, 4.1, 3.9)
    fixed = Effect("score", 1.0, 1.0, 1.0, "roofline", 0.0, 4.0, 4.0)
    rows = stripped(insight.effects_table([varying, fixed], step=4.0))
    assert rows[1] == ["generate", "2.00", "1.50–3.00", "0.50", "+2.50%", "-2.50%", "measured"]
    assert rows[2] == ["score", "1.00", "0.00", "+0.00%", "+0.00%", "roofline"]


def test_a_pools_idle_time_is_listed_but_for_its_shortest_gaps() -> None:
    bubbles = [
        Bubble("a", "update_actor", "generate", 0.990),
        Bubble("a", "values", "score", 0.005),
        Bubble("b", "generate", "sync_weights", 0.5),
    ]
    rows = stripped(insight.bubbles_table(two_pools(), {"a": 0.75, "b": 1.0}, bubbles))
    assert rows[1] == ["a", "2", "75%", "0.995"]
    assert rows[2] == ["0.990", "before update_actor, which waits for generate"]
    assert rows[3] == ["b", "1", "100%", "0.500"]
    assert rows[4] == ["0.500", "before generate, which waits for sync_weights"]
    assert len(rows) == 5  # five milliseconds are less than a hundredth of the first pool's


def test_memory_is_shown_by_kind_of_each_role() -> None:
    detail = {
        "actor": {"weights": 3 * 10**9, "optimizer": 0, "idle": 10**9},
        "rollout": {"kv_cache": 20 * 10**9, "idle": 0},
    }
    memory = PoolMemory(peak=24 * 10**9, allowed=80 * 10**9, detail=detail)
    (table,) = insight.memory_kinds_tables({"a": memory})
    rows = stripped(table)
    assert rows[0] == ["a, GB of 80.0", "actor", "rollout"]
    assert [row[0] for row in rows[1:]] == [
        "weights",
        "kv cache",
        "kept while idle",
        "peak, processes too: 24.0",
    ]
    assert rows[1] == ["weights", "3.0"] and rows[2] == ["kv cache", "20.0"]


def test_a_critical_cycle_is_said_in_one_sentence() -> None:
    always = Critical(("generate", "update_actor"), 1, 1.0)
    at_times = Critical(("generate", "sync_weights"), 2, 0.25)
    assert insight.critical_sentences([always, at_times]) == [
        "Critical cycle in every length scenario, over one step: generate, update_actor.",
        "Critical cycle in 25% of the length scenarios, over 2 steps: generate, sync_weights.",
    ]


def test_a_decision_flips_where_another_structure_is_faster_or_the_plans_fits_no_more() -> None:
    plan = two_pools()
    rows = [
        Replanned("as it is", plan, 4.0, 1000.0, kept=4.0),
        Replanned("slower links", plan, 4.0, 1000.0, kept=5.0),
        Replanned("2 GPUs", plan, 4.0, 1000.0, kept=None),
        Refused("1 GPU", "nothing fits"),
    ]
    assert [row.flips for row in rows if isinstance(row, Replanned)] == [False, True, True]
    shown = stripped(insight.what_if_table(rows))[1:]
    assert [row[4:6] for row in shown[:3]] == [
        ["+0.0%", "same"],
        ["+25.0%", "flips"],
        ["–", "flips"],
    ]
    assert shown[3] == ["1 GPU", "–", "–", "–", "–", "–", "nothing fits"]


def test_prices_are_shown_where_a_price_is_known() -> None:
    plan = two_pools()
    point = ParetoPoint(8, 1, plan, 4.0, 2500.0, 0.02, True)
    priced = stripped(insight.pareto_table([point]))
    assert priced[0][3:6] == ["tokens/s", "$ per step", "$ per M tokens"]
    assert priced[1][:7] == ["8", "1", "4.00", "2,500", "0.020", "2.000", "yes"]
    free = stripped(insight.pareto_table([point._replace(dollars=0.0, best=False)]))
    assert free[0][3:5] == ["tokens/s", "best"] and free[1][3] == "2,500"
