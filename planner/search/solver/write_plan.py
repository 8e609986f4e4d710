"""A candidate of the search, written out as a plan."""

from collections.abc import Iterable, Mapping

from planner.predict.forecast import predict
from planner.search.solver.evaluate import Candidate
from planner.search.solver.problem import Problem
from planner.spec.plan import Issue, Plan, Pool, Proof, Provenance, RolloutRole, TrainerRole


def assemble(candidate: Candidate, name: str, problem: Problem) -> Plan:
    """Write a candidate out as a plan of that name. Pools are named by their roles."""
    workload = problem.workload
    pools, names = {}, {}
    for number, gpus in enumerate(candidate.pools):
        members = [role for role in workload.roles if role in candidate.structure[number]]
        names[f"p{number}"] = "+".join(members)
        pools["+".join(members)] = Pool(gpus=gpus)
    layouts: dict[str, TrainerRole | RolloutRole] = dict(candidate.trainers)
    layouts["rollout"] = candidate.rollout
    roles: dict[str, TrainerRole | RolloutRole] = {}
    for role in workload.roles:
        renamed = tuple(names[pool] for pool in layouts[role].pools)
        roles[role] = layouts[role].changed(pools=renamed)
    return Plan(
        name=name,
        workload=workload,
        cluster=problem.cluster,
        pools=pools,
        roles=roles,
        program=(*candidate.program.items, *_monitors(candidate, problem)),
        staleness=candidate.program.staleness,
        sync="in_flight" if candidate.streams else "boundary",
    )


def _monitors(candidate: Candidate, problem: Problem) -> list[Issue]:
    """The monitors of a step, at the end of the program. They look at the weights that were
    installed last, so they belong to the step of that sync."""
    installs = problem.flow.installs.name
    issues = [item for item in candidate.program.items if isinstance(item, Issue)]
    offset = next(item.offset for item in issues if item.call == installs)
    monitors = [call for call in problem.workload.dataflow.calls if call.monitor]
    return [Issue(call=call.name, offset=offset) for call in monitors]


def trimmed(plan: Plan) -> Plan:
    """The plan without the GPUs of a pool that none of its roles uses. The plan is left as it is
    where weights would then cross fewer nodes, because that would be another placement."""
    engines = plan.engine_gpus()
    pools = {}
    for name, pool in plan.pools.items():
        ranks = [layout.gpus for layout in plan.trainers.values() if name in layout.pools]
        used = set(pool.gpus[: max(ranks, default=0)])
        for home, gpus in engines:
            if home == name:
                used.update(gpus)
        left = tuple(gpu for gpu in pool.gpus if gpu in used)
        if not left:
            return plan
        pools[name] = Pool(gpus=left)
    handing = {*plan.trainers["actor"].pools, *plan.rollout.pools}
    if _nodes(handing, plan.pools) != _nodes(handing, pools):
        return plan
    return plan.changed(pools=pools)


def _nodes(names: Iterable[str], pools: Mapping[str, Pool]) -> set[int]:
    """The nodes that some pools lie on."""
    return {node for name in names for node, _ in pools[name].gpus}


def complete(
    plan: Plan,
    provenance: Provenance,
    problem: Problem,
    proof: Proof | None,
    bound: float,
    seconds: float,
) -> Plan:
    """The plan with its predicted figures and its provenance: the `proof` that it is the best, the
    `bound` that no plan is below, and the `seconds` that the search took."""
    predicted = predict(plan, (), proof, bound, problem.model).changed(search_seconds=seconds)
    return plan.changed(predicted=predicted, provenance=provenance)
