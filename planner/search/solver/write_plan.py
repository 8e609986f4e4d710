"""A candidate of the search, written out as a plan."""

from planner.predict.forecast import predict
from planner.search.solver.evaluate import Candidate
from planner.search.solver.problem import Problem
from planner.spec.plan import Issue, Plan, Pool, Proof, Provenance, RolloutRole, TrainerRole


def assemble(candidate: Candidate, name: str, problem: Problem) -> Plan:
    """Write a candidate out as a plan. Pools are named by their roles."""
    order = problem.workload.roles
    names = {
        f"p{i}": "+".join(r for r in order if r in roles)
        for i, roles in enumerate(candidate.structure)
    }
    roles: dict[str, TrainerRole | RolloutRole] = {
        **candidate.trainers,
        "rollout": candidate.rollout,
    }
    issues = [item for item in candidate.program.items if isinstance(item, Issue)]
    installs = problem.flow.installs.name  # what a monitor looks at
    offset = next(item.offset for item in issues if item.call == installs)
    monitors = [
        Issue(call=call.name, offset=offset)
        for call in problem.workload.dataflow.calls
        if call.monitor
    ]
    return Plan(
        name=name,
        workload=problem.workload,
        cluster=problem.cluster,
        pools={names[f"p{i}"]: Pool(gpus=gpus) for i, gpus in enumerate(candidate.pools)},
        roles={
            role: roles[role].model_copy(
                update={"pools": tuple(names[pool] for pool in roles[role].pools)}
            )
            for role in order
        },
        program=(*candidate.program.items, *monitors),
        staleness=candidate.program.staleness,
    )


def trimmed(plan: Plan) -> Plan:
    """The plan without the GPUs of a pool that none of its roles uses. The plan is left as it is
    where weights would then cross fewer nodes, because that would be another placement."""
    engines = plan.engine_gpus()
    pools = {}
    for name, pool in plan.pools.items():
        ranks = [layout.gpus for layout in plan.trainers.values() if name in layout.pools]
        used = {gpu for home, gpus in engines for gpu in gpus if home == name} | set(
            pool.gpus[: max(ranks, default=0)]
        )
        pools[name] = pool.model_copy(
            update={"gpus": tuple(gpu for gpu in pool.gpus if gpu in used)}
        )
    linked = {*plan.trainers["actor"].pools, *plan.rollout.pools}
    nodes = [
        {node for name in linked for node, _ in each[name].gpus} for each in (plan.pools, pools)
    ]
    empty = any(not pool.gpus for pool in pools.values())
    return plan if empty or nodes[0] != nodes[1] else plan.model_copy(update={"pools": pools})


def complete(
    plan: Plan,
    provenance: Provenance,
    problem: Problem,
    proof: Proof | None,
    bound: float,
    seconds: float,
) -> Plan:
    predicted = predict(plan, (), proof, bound, problem.model).model_copy(
        update={"search_seconds": seconds}
    )
    return plan.model_copy(update={"predicted": predicted, "provenance": provenance})
