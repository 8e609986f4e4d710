"""What a split that is given takes: the same as the same split of a search, and one line for what
cannot be."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROLES, small_workload, tiny_cluster

from planner.cli import main
from planner.predict.forecast import predict
from planner.report.tables import seconds
from planner.search import SearchOptions, baseline, find
from planner.search.questions.given_split import best_in, parse_pools, with_layouts
from planner.search.solver.problem import problem_of
from planner.search.solver.write_plan import assemble
from planner.spec.errors import UserError
from planner.spec.plan import Plan

SMALL = small_workload(max_staleness=1)


def given(*pools: str, gpus: int = 4, staleness: int = 0) -> Plan:
    problem = problem_of(SMALL, tiny_cluster(gpus), (), staleness)
    found = best_in(parse_pools(pools, SMALL.roles), problem)
    return assemble(found, "given", problem)


def plan(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["estimate", *arguments])
    assert result.exit_code in (0, 2)
    assert len(result.stderr.splitlines()) == (1 if result.exit_code else 0)
    return result.stderr if result.exit_code else result.stdout


def test_the_pools_of_the_best_plan_give_its_step_time():
    best = find(SMALL, tiny_cluster(4), SearchOptions(max_staleness=1)).best
    homes = {pool: [role for role in ROLES if role in best.roles] for pool in best.pools}
    for pool in homes:
        homes[pool] = [role for role in homes[pool] if pool in best.roles[role].pools]
    texts = [f"{','.join(homes[name])}={len(pool.gpus)}" for name, pool in best.pools.items()]
    again = predict(given(*texts, staleness=1))
    assert again.step_seconds == pytest.approx(best.predicted.step_seconds, rel=1e-6)


def test_one_pool_of_all_roles_is_the_colocated_baseline():
    """Whose waits cost next to nothing there, for only the host's calls could run beside others."""
    ours = predict(given("actor,critic,rollout=4"))
    theirs = baseline("colocated", SMALL, tiny_cluster(4))
    assert ours.step_seconds == pytest.approx(theirs.predicted.step_seconds, rel=3e-3)


def test_a_layout_that_is_given_is_kept_and_its_replicas_fill_the_pool():
    plan = with_layouts(given("all=4"), ["actor.shard=2", "rollout.tensor_parallel=2"])
    assert (plan.trainers["actor"].shard, plan.trainers["actor"].replicas) == (2, 2)
    assert (plan.rollout.tensor_parallel, plan.rollout.replicas) == (2, 2)


@pytest.mark.parametrize(
    ("pools", "said"),
    [
        (["actor,rollout=1"], "critic is in no pool"),
        (["actor=1", "actor,critic,rollout=1"], "actor is in 2 pools"),
        (["actor"], "write roles and GPUs"),
        (["actor=0"], "write roles and GPUs"),
        (["boss=1"], "the workload has no role 'boss'; it has actor, rollout, critic"),
        (["all=5"], "5 GPUs together, and the cluster has 4"),
        (["actor,critic=1", "rollout=1", "rollout=1"], "make it rollout=2"),
    ],
)
def test_pools_that_cannot_be(pools, said):
    with pytest.raises(UserError, match=said):
        given(*pools)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("actor.size=2", "a layout of actor has shard"),
        ("actor.shard=x", "shard"),
        ("actor=2", "write ROLE.KEY=VALUE"),
        ("boss.shard=2", "no role 'boss'"),
        ("rollout.tensor_parallel=3", "rollout has 2 GPUs"),
        ("actor.shard=3", "actor has 2 GPUs"),
    ],
)
def test_layouts_that_cannot_be(layout, said):
    with pytest.raises(UserError, match=said):
        with_layouts(given("all=2", gpus=2), [layout])


def test_the_command_writes_a_plan_that_says_what_was_shown(tmp_path: Path):
    out = tmp_path / "given.json"
    pools = ["--pool", "actor,critic,reference,reward=2", "--pool", "rollout=2"]
    shown = plan("--gpus", "4", "--workload", "1.5b", *pools, "--staleness", "1", "--out", str(out))
    found = Plan.read(out)
    assert f"{seconds(found.predicted.step_seconds)} s per step" in shown
    assert found.staleness == 1 and found.name == "given"
    assert f"{seconds(found.predicted.call_seconds['update_actor'])} " in shown


def test_pools_are_asked_for():
    assert "--pool" in plan("--gpus", "4")
