"""Seconds of the calls that trained and inference roles run: updates, forward passes, and moving
what is offloaded."""

import numpy as np

from planner.predict.columns import Integers
from planner.predict.correction import Corrections
from planner.predict.costs.estimates import Estimates, Moves, moves_of
from planner.predict.costs.lengths import SampledLengths
from planner.predict.dealing import Lengths32, Work, dealt, longest_first
from planner.predict.likeness import (
    Likeness,
    MoveCall,
    TrainerCall,
    like_trainer,
    like_trainer_move,
)
from planner.predict.roofline import Cost, Sharding, infer_cost, train_cost
from planner.spec.cluster import Cluster, Device
from planner.spec.workload import Workload, head_of


class TrainerCosts:
    """Calls in many layouts at once; how a batch is dealt to a number of ranks is remembered."""

    def __init__(
        self,
        workload: Workload,
        cluster: Cluster,
        lengths: SampledLengths,
        corrections: Corrections,
    ) -> None:
        self._workload, self._cluster = workload, cluster
        self._lengths, self._corrections = lengths, corrections
        self._minibatches: dict[int, Lengths32] = {}
        self._dealt: dict[tuple[int, int], Work] = {}

    def calls(self, call: TrainerCall, role: str, sharding: Sharding, device: Device) -> Estimates:
        """A forward pass or an update of a role in each layout, without the moves of what is
        offloaded."""
        if not len(sharding.shard):
            nothing = np.zeros((0, self._lengths.scenarios))
            return Estimates(compute=nothing, transfer=nothing, sources=np.array([], dtype=str))
        workload, lengths = self._workload, self._lengths
        cost = self._roofline(call, role, sharding, device)
        sequences = lengths.generated if role == "reward" else lengths.sequences
        like = like_trainer(
            call,
            role,
            workload.models[role].shape,
            device,
            shard=sharding.shard,
            gpus=sharding.gpus,
            micro_batch_tokens=sharding.micro_batch_tokens,
            recompute=sharding.recompute,
            sequences=sequences.shape[1],
            minibatch=workload.minibatch,
            epochs=workload.algorithm.epochs,
        )
        sizes = np.log(sequences.sum(axis=1) / sharding.gpus[:, None])
        return Estimates.corrected(cost, self._corrections.ratios(like, sizes))

    def _roofline(self, call: TrainerCall, role: str, sharding: Sharding, device: Device) -> Cost:
        workload, cluster = self._workload, self._cluster
        shape, head = workload.models[role].shape, head_of(role)
        if call == "infer":
            work = self._work(workload.inferred_by(role), sharding.gpus)
            return infer_cost(shape, head, sharding, device, cluster, work)
        work = self._work(workload.minibatch, sharding.gpus)
        epochs = workload.algorithm.epochs
        return train_cost(shape, head, sharding, device, cluster, work, epochs)

    def _work(self, minibatch: int, gpus: Integers) -> Work:
        """The busiest rank's work [n, S, M] with minibatches dealt to so many GPUs [n] each."""
        counts, which = np.unique(gpus, return_inverse=True)
        works = [self._dealt_to(minibatch, ranks) for ranks in counts.tolist()]
        tokens = np.stack([work.tokens for work in works])
        squares = np.stack([work.squares for work in works])
        return Work(tokens=tokens[which], squares=squares[which])

    def _dealt_to(self, minibatch: int, ranks: int) -> Work:
        if minibatch not in self._minibatches:
            lengths = self._lengths
            whole = minibatch > lengths.sequences.shape[1]  # to score what is generated
            sequences = lengths.generated if whole else lengths.sequences
            self._minibatches[minibatch] = longest_first(sequences, minibatch)
        if (minibatch, ranks) not in self._dealt:
            self._dealt[minibatch, ranks] = dealt(self._minibatches[minibatch], ranks)
        return self._dealt[minibatch, ranks]

    def moves(self, role: str, sharding: Sharding, moved: Integers, device: Device) -> Moves:
        """Moves of a role's `moved` bytes [n] per GPU."""
        shape = self._workload.models[role].shape

        def like(call: MoveCall) -> Likeness:
            gpus = sharding.gpus
            return like_trainer_move(call, role, shape, device, shard=sharding.shard, gpus=gpus)

        return moves_of(self._corrections, like, moved, device)
