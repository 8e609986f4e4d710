"""The processes of a real run: trainers and engines on the GPUs of a plan, and the reward function's."""

from typing import Any

from executor import pools
from executor.reward import RewardWorker
from executor.rollout import EngineWorker
from executor.trainer import Trainer
from executor.worker import Rank, ask
from planner.spec.plan import Plan
from planner.spec.workload import RewardFunction


class Processes:
    """Started and ready when constructed: one trainer per GPU of a pool that trains or infers, one engine per
    tensor-parallel group of the rollout's pools, and one process for a reward function."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.seats = pools.reserve(plan)
        self.trainers: dict[str, list[Rank]] = {}
        self.engines: list[Rank] = []
        self.judge: list[Rank] = []
        try:
            self._start()
            self._set_up()
        except BaseException:
            self.close()
            raise

    def of(self, role: str) -> list[Rank]:
        """The ranks that a training or inference role runs on."""
        layout = self.plan.trainers[role]
        return self.trainers[layout.pools[0]][: layout.gpus]

    def _start(self) -> None:
        """All at once, for most of their start is loading libraries."""
        plan, reward = self.plan, self.plan.workload.reward
        started: list[tuple[list[Rank], str, Any]] = []
        for pool in dict.fromkeys(layout.pools[0] for layout in plan.trainers.values()):
            self.trainers[pool] = []
            for rank, seat in enumerate(self.seats[pool]):
                handle = pools.start(Trainer, [seat], plan, pool, rank)
                started.append((self.trainers[pool], f"trainer {rank} of pool {pool}", handle))
        for number, (pool, seats) in enumerate(self._engine_seats()):
            handle = pools.start(EngineWorker, seats, plan, pool)
            started.append((self.engines, f"engine {number} in pool {pool}", handle))
        if isinstance(reward, RewardFunction):
            started.append((self.judge, "the reward function's process", pools.start(RewardWorker, None, reward)))
        for home, name, handle in started:
            home.append(Rank(name=name, handle=handle))

    def _engine_seats(self) -> list[tuple[str, list[pools.Seat]]]:
        """Pool and seats of each engine: neighbouring GPUs, pool by pool."""
        size = self.plan.rollout.tensor_parallel
        groups = [
            (pool, self.seats[pool][begin : begin + size])
            for pool in self.plan.rollout.pools
            for begin in range(0, self.plan.engines_of(pool) * size, size)
        ]
        return groups[: self.plan.rollout.replicas]

    def _set_up(self) -> None:
        """Clocks, then the groups, then the models."""
        for home in (*self.trainers.values(), self.engines, self.judge):
            home[:] = pools.connect(home)
        addresses = {pool: ask(ranks[:1], "listen").results[0] for pool, ranks in self.trainers.items()}
        ranks = [rank for ranks in self.trainers.values() for rank in ranks]
        ask(ranks, "join", each=[addresses[pool] for pool, ranks in self.trainers.items() for _ in ranks])
        ask(ranks, "load")
        self.eos: list[int] = ask(self.engines, "start").results[0]
        ask(self.judge, "load")

    def close(self) -> None:
        """End all of them at once, whatever they are doing."""
        everyone = [rank for home in (*self.trainers.values(), self.engines, self.judge) for rank in home]
        pools.stop(everyone, self.seats)
