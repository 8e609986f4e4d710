"""What a step could gain at most by beginning inference on minibatches that are complete.

python reports/streaming/chunks.py      # a table, in some minutes

Of the seconds of inference only the last minibatch's then come after generation; the others run
beside it. The pools still have all of it to do. So a step of a plan takes no less than its longest
pool has to do. The larger of that and of a simulation in which inference takes the last minibatch's
seconds is what a plan is taken to reach: the best one, and those with fewer GPUs for generation.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from planner.predict.cost import CostModel, Estimate
from planner.search import SearchOptions, find
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.plan import Plan
from planner.spec.workload_file import load_workload

LONG_TAIL = ("response.mean=4000", "response.sigma=1.0", "response.max=16384", "batch=512")
JOBS = (
    ("long tail", "7b", 16, (*LONG_TAIL, "minibatch=128")),
    ("7b", "7b", 16, ()),
    ("70b", "70b", 64, ()),
    ("gsm8k", "gsm8k", 8, ()),
)
STALENESS = (1, 2, 4)


def main() -> None:
    print("| job | GPUs | staleness | in flight | by minibatch, at best | bought at most |")
    print("|---|---:|---:|---:|---:|---:|")
    for job, name, gpus, settings in JOBS:
        for staleness in STALENESS:
            plans = list(best_plans(name, gpus, staleness, settings))
            whole = min(seconds_of(plan) for plan in plans)
            parted = min(with_chunks(plan) for plan in plans)
            bought = max(1 - parted / whole, 0.0)
            cells = f"{job} | {gpus} | {staleness} | {whole:.2f} | {parted:.2f} | {bought:.1%}"
            print(f"| {cells} |", flush=True)


def best_plans(name: str, gpus: int, staleness: int, settings: tuple[str, ...]) -> Iterator[Plan]:
    """The best plan that streams, and the best with fewer GPUs for generation."""
    asked = [*settings, "sync=in_flight", f"max_staleness={staleness}"]
    workload = load_workload(profiles_dir() / "workloads" / f"{name}.toml", asked)
    cluster = make_cluster(gpus)
    best = find(workload, cluster, SearchOptions(runners_up=0)).best
    yield best
    has = len(best.pools[best.rollout.pools[0]].gpus)
    for generating in range(max(1, has // 2), has):
        options = SearchOptions(runners_up=0, pins=(f"rollout={generating}",))
        try:
            yield find(workload, cluster, options).best
        except UserError:  # too few for its engines
            continue


def seconds_of(plan: Plan) -> float:
    assert plan.predicted
    return plan.predicted.step_seconds


def with_chunks(plan: Plan) -> float:
    """Seconds that a step takes at least if only the last minibatch is inferred after
    generation."""
    steady, model = plan.dataflow.steady, CostModel(plan.workload, plan.cluster)
    calls = [call for call in steady.calls if not call.streams]
    seconds = {call: float(model.call(call, plan).seconds.mean()) for call in calls}
    loads = [
        sum(seconds[call] for call in calls if pool in plan.pools_of(call)) for pool in plan.pools
    ]
    minibatches = plan.workload.batch // plan.workload.minibatch
    with inference_of_one_in(minibatches):
        quick = CostModel(plan.workload, plan.cluster).streamed(plan).steps
    return max(*loads, float(np.mean(quick)))


@contextmanager
def inference_of_one_in(parts: int) -> Iterator[None]:
    """Inference takes that share of its seconds meanwhile."""
    whole = CostModel.infer

    def part(model: CostModel, *layout: object) -> Estimate:
        return whole(model, *layout).repeated(1 / parts)  # type: ignore[arg-type]

    CostModel.infer = part  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        CostModel.infer = whole  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
