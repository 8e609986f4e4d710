"""What lanes by age and lending would buy, for the long-tailed 7B job of docs/streaming.md.

python reports/streaming/lanes.py      # a table, in a minute or two

Lanes: sequences that have passed an age move to engines with few neighbours and more GPUs each, by
prefilling what they have again. Lending: engines on the trainers' GPUs generate while these idle.

Both sides of the comparison are floors of the same kind (`LeastLatencies`): an engine has N steps
in a period beside what tokens, contexts and prompts take, and a token takes period / N. Lending
can buy no more than the share of all GPU time in which trainers idle. What it buys is estimated in
its favour (`lent`): idle time comes in one piece a step, and all that engines make in it counts.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np

from planner.predict.cost import CostModel
from planner.predict.cycle import plan_cycles
from planner.predict.speed import engine_speed
from planner.search import SearchOptions, find
from planner.search.questions.ladder import seconds_of
from planner.spec.cluster import make_cluster
from planner.spec.files import profiles_dir
from planner.spec.plan import Plan
from planner.spec.workload_file import load_workload

GPUS, STALENESS = 16, (1, 2, 4)
ROLLOUT_GPUS, AGES, SIZES = (4, 5, 6, 7, 8), (1000, 2000, 3000, 4000, 6000, 8000), (1, 2, 4)
SETTINGS = ("mean=4000", "sigma=1.0", "max=16384")

Lane = tuple[int, int]  # GPUs of an engine, and engines


class Job:
    """The trainers of the best plan with so many GPUs for generation, and what generation has to
    do."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.model = plan, CostModel(plan.workload, plan.cluster)
        self.cycles, self.seconds = plan_cycles(plan), seconds_of(plan, self.model)
        self.generate = plan.dataflow.steady.names.index("generate")
        lengths = self.model.streams.lengths
        self.responses, self.prompt = lengths.responses, int(lengths.prompts[0, 0])
        self.longest = float(self.responses.max(axis=1).mean())

    def step(self, latency: float) -> float:
        """Seconds of a step at a latency of generation."""
        seconds = self.seconds.copy()
        seconds[self.generate] = latency
        return float(self.cycles.periods(seconds).mean())

    def token_seconds(self, lane: Lane, period: float, first: int, last: float) -> float:
        """Seconds of a token on engines that have all sequences between two ages; infinite if they
        cannot do that in a period."""
        size, engines = lane
        device = self.plan.device_of("rollout")
        speed = engine_speed(self.plan.workload.actor.shape, size, device)
        there = self.responses > first
        until = np.minimum(self.responses, last)
        tokens = np.where(there, until - first, 0)
        contexts = tokens * (self.prompt + first) + tokens * (tokens - 1) / 2
        begun = there.sum(axis=1) * (self.prompt + first)
        linear = speed.sequence * tokens.sum(axis=1) + speed.attention * contexts.sum(axis=1)
        taken = float((linear + speed.prefill_token * begun).mean()) / engines
        left = period - taken
        return period / (left / (speed.weights + speed.step)) if left > 0 else np.inf

    def fixed_point(self, bulk: Lane, fast: Lane | None, age: int) -> float:
        """Seconds of a step with one lane, or with two and an age at which sequences move."""

        def latency(period: float) -> float:
            if fast is None:
                return self.longest * self.token_seconds(bulk, period, 0, np.inf)
            slow = min(age, self.longest) * self.token_seconds(bulk, period, 0, age)
            return slow + (self.longest - age) * self.token_seconds(fast, period, age, np.inf)

        low, high = 1.0, 1000.0
        while high - low > 0.01:
            middle = (low + high) / 2
            short = self.step(min(latency(middle), 1e6)) > middle
            low, high = (middle, high) if short else (low, middle)
        return high


class Parted(NamedTuple):
    """Seconds of a step with two lanes, and the age at which sequences move."""

    seconds: float
    bulk: Lane
    fast: Lane
    age: int


def main() -> None:
    print("| staleness | one lane | two lanes | bought | engines | age | trainers idle | lent |")
    print("|---:|---:|---:|---:|---|---:|---:|---:|")
    for staleness in STALENESS:
        jobs = [Job(best(staleness, gpus)) for gpus in ROLLOUT_GPUS]
        sizes = list(zip(jobs, ROLLOUT_GPUS, strict=True))
        alone, idles = min(each for job, gpus in sizes for each in with_one_lane(job, gpus))
        parted = min(each for job, gpus in sizes for each in with_two_lanes(job, gpus))
        _, lending = min((seconds_a_step(job.plan), lent(job)) for job in jobs)
        print(row(staleness, alone, idles, parted, lending))


def row(staleness: int, alone: float, idles: float, parted: Parted, lending: float) -> str:
    lanes = [f"{engines} × {size}" for size, engines in (parted.bulk, parted.fast)]
    bought = 1 - parted.seconds / alone
    cells = [
        str(staleness),
        f"{alone:.1f}",
        f"{parted.seconds:.1f}",
        f"{bought:.1%}".replace("-", "−"),
    ]
    cells += [f"{' and '.join(lanes)} GPUs", f"{parted.age:,}", f"{idles:.1%}", f"{lending:.1%}"]
    return f"| {' | '.join(cells)} |"


def with_one_lane(job: Job, gpus: int) -> Iterator[tuple[float, float]]:
    """Seconds of a step, and the share of all GPU time in which trainers idle."""
    for size in SIZES:
        if gpus >= size:
            yield job.fixed_point((size, gpus // size), None, 0), idle(job.plan)


def with_two_lanes(job: Job, gpus: int) -> Iterator[Parted]:
    for slow_size, fast_size in product(SIZES, SIZES):
        for engines in range(1, (gpus - slow_size) // fast_size + 1):
            bulk = slow_size, (gpus - engines * fast_size) // slow_size
            fast = fast_size, engines
            for age in AGES:
                yield Parted(job.fixed_point(bulk, fast, age), bulk, fast, age)


def best(staleness: int, gpus: int) -> Plan:
    """The best plan that streams with so many GPUs for generation."""
    settings = [f"response.{setting}" for setting in SETTINGS]
    settings += ["batch=512", "minibatch=128", "sync=in_flight", f"max_staleness={staleness}"]
    workload = load_workload(profiles_dir() / "workloads" / "7b.toml", settings)
    options = SearchOptions(runners_up=0, pins=(f"rollout={gpus}",))
    return find(workload, make_cluster(GPUS), options).best


def lent(job: Job) -> float:
    """The share of a batch's tokens that engines on the trainers' GPUs take from the others.

    Each of these GPUs wakes an engine when its trainer idles. Some sequences of mean context move
    there, are prefilled, get tokens until the trainer goes on, and are prefilled again where they
    came from, which has so much less time to decode. Of all numbers of sequences the best counts.
    They cannot stay parked: in a step they would get the tokens of the idle time alone."""
    plan, model, tokens = job.plan, job.model, float(job.responses.sum(axis=1).mean())
    device, period = plan.device_of("rollout"), seconds_a_step(plan)
    generating = len(plan.pools["rollout"].gpus)
    gpus = GPUS - generating
    window = idle(plan) * GPUS * period / gpus - float(model.rollouts.moves(1, device).both.item())
    speed = engine_speed(plan.workload.actor.shape, 1, device)
    contexts = job.responses * (job.prompt + job.responses / 2)
    context = float(contexts.sum() / job.responses.sum())
    made_elsewhere = tokens / period / generating  # by a GPU in a second
    best = 0.0
    for sequences in range(1, 513):
        prefill = sequences * speed.prefill(int(context))
        step = speed.matrices(sequences) + speed.attention * sequences * context
        made = sequences * max(window - prefill, 0.0) / step
        best = max(best, gpus * (made - made_elsewhere * prefill) / tokens)
    return best


def seconds_a_step(plan: Plan) -> float:
    assert plan.predicted
    return plan.predicted.step_seconds


def idle(plan: Plan) -> float:
    """The share of all GPU time in which trainers idle."""
    assert plan.predicted
    busy = plan.predicted.busy
    pools = [name for name in plan.pools if name not in plan.rollout.pools]
    idling = sum(len(plan.pools[name].gpus) * (1 - busy[name]) for name in pools)
    return idling / len(plan.cluster.gpus)


if __name__ == "__main__":
    main()
