"""Where a plan evaluates."""

from conftest import cpu_cluster, make_workload

from planner.predict.schedule import check
from planner.search.questions.baselines import best_of
from planner.search.solver.best_program import Program
from planner.search.solver.problem import problem_of
from planner.search.solver.write_plan import assemble
from planner.search.space.enumerate_programs import all_programs
from planner.search.space.placements import sharing_of


def test_a_monitor_is_issued_in_the_step_of_the_sync_also_where_the_critic_lags(tmp_path):
    """An evaluation looks at the weights of the sync, which a lagging update of the critic puts one
    offset ahead."""
    data = {
        "train": tmp_path / "train.jsonl",
        "evaluation": tmp_path / "eval.jsonl",
        "evaluate_every": 2,
    }
    problem = problem_of(make_workload(data=data, max_staleness=1), cpu_cluster(2), (), None)
    candidate = best_of("split", problem)
    offsets = set()
    for items in all_programs(problem.flow, sharing_of(problem.flow, candidate.structure), 0)[0]:
        plan = assemble(candidate._replace(program=Program(items, 0)), "any", problem)
        check(plan)
        offset = {issue.call: issue.offset for issue in plan.program}
        assert offset["evaluate"] == offset["sync_weights"]
        offsets.add(offset["sync_weights"] - offset["update_critic"])
    assert 1 in offsets  # there are programs that lag
