"""Seconds of moving the actor's weights to the engines."""

import numpy as np

from planner.predict.correction import Corrections
from planner.predict.costs.estimates import Estimates
from planner.predict.likeness import like_transfer, transfer_key, way_of
from planner.predict.roofline import Sharding, sync_cost
from planner.spec.cluster import Cluster, Device
from planner.spec.workload import Workload


class SyncCosts:
    """A sync goes to engines on the actor's GPUs (`shared`), to others (`separate`), or to both."""

    def __init__(
        self, workload: Workload, cluster: Cluster, scenarios: int, corrections: Corrections
    ) -> None:
        self._shape, self._cluster = workload.actor.shape, cluster
        self._scenarios, self._corrections = scenarios, corrections

    def ratio(self, device: Device, *, shared: bool, separate: bool) -> float:
        """Measured over roofline seconds of the syncs that go this way, whatever their layouts."""
        way = way_of(shared=shared, separate=separate)
        return self._corrections.mean_ratio(transfer_key("actor", self._shape, device, way))

    def call(
        self,
        sharding: Sharding,
        device: Device,
        tensor_parallel: int,
        engines: int,
        *,
        same_node: bool,
        shared: bool,
        separate: bool,
    ) -> Estimates:
        """The sync of one layout, without waking the actor and the engines. `same_node`: actor and
        engines lie on one node."""
        seconds = sync_cost(
            self._shape,
            sharding,
            device,
            self._cluster,
            tensor_parallel,
            same_node=same_node,
            shared=shared,
            separate=separate,
        )
        like = like_transfer(
            "actor",
            self._shape,
            device,
            way_of(shared=shared, separate=separate),
            shard=sharding.shard.item(),
            gpus=sharding.gpus.item(),
            tensor_parallel=tensor_parallel,
            engines=engines,
        )
        ratio = self.ratio(device, shared=shared, separate=separate)
        transfer = np.broadcast_to(seconds[:, None] * ratio, (1, self._scenarios))
        sources = np.array([self._corrections.mean_source(like)])
        return Estimates(compute=np.zeros_like(transfer), transfer=transfer, sources=sources)
