"""A GPU's process for all training and inference roles of its pool: their group, models and memory
(FSDP2)."""

import contextlib
import fcntl
import gc
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import ray
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from executor.fleet import gpu_memory
from executor.fleet.worker import Worker
from executor.training import loading, models, residual, self_check, shards
from executor.training.offload import Parking
from planner.predict.memory import trainer_allowance
from planner.spec.plan import Plan, TrainerRole
from planner.spec.workload import TRAINED

SIOCGIFADDR = 0x8915  # Linux: the address of a network interface


@dataclass(kw_only=True)
class Hosted:
    """A role on this rank."""

    layout: TrainerRole
    module: models.RoleModel
    optimizer: torch.optim.Optimizer | None
    version: int = 0  # updates in its weights
    weights: Parking = field(default_factory=Parking)
    moments: Parking = field(default_factory=Parking)

    def peek(self, tensor: Tensor) -> Tensor:
        """The data of a parameter or a moment, on the host while it is parked there."""
        return self.moments.peek(self.weights.peek(tensor))


class Host(Worker):
    """A rank of a pool's torch.distributed group. A role runs on the first `shard * replicas`
    ranks."""

    def configure(self, plan: Plan, pool: str, rank: int) -> None:
        """Become this rank of a plan's pool; whatever came before is dropped."""
        self.leave()
        self.plan, self.pool, self.rank = plan, pool, rank
        self.on_cpu = plan.device_of(pool).kind == "cpu"
        self.device = torch.device("cpu") if self.on_cpu else torch.device("cuda", 0)
        if self.on_cpu:
            torch.set_num_threads(1)
        else:
            gpu_memory.limit(trainer_allowance(plan, pool))
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def leave(self) -> None:
        """Leave the pool's group and drop the models. All ranks must do so at the same time: NCCL
        waits for them."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self.roles: dict[str, Hosted] = {}
        gc.unfreeze()  # see `Trainer.warm_up`
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # an engine that starts on this GPU takes what is free

    def synchronize(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        gpu_memory.forget_peak()

    def peak(self) -> dict[str, int]:
        return gpu_memory.peak()

    # --- set-up ---

    def listen(self) -> tuple[str, int]:
        """Open the rendezvous on rank 0 and return its host and port. It listens at a free port of
        the address by which Ray knows this node, and at no other address."""
        host, size = ray.util.get_node_ip_address(), len(self.plan.pools[self.pool].gpus)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family, backlog=max(128, size))
        port = listener.getsockname()[1]
        self.store = dist.TCPStore(
            host,
            port,
            size,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        return host, port

    def join(self, collective_seconds: float, host: str, port: int) -> None:
        """Form the pool's group, in which a collective may take so long."""
        size = len(self.plan.pools[self.pool].gpus)
        store = self.store if self.rank == 0 else dist.TCPStore(host, port, size, is_master=False)
        if self.on_cpu and (interface := _interface(ray.util.get_node_ip_address())) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        backend = "gloo" if self.on_cpu else "nccl"
        timeout = timedelta(seconds=collective_seconds)
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=size, timeout=timeout
        )

    def load_models(self, saved: shards.Saved | None) -> None:
        """Load and shard the pool's models, those that train as a checkpoint holds them if one is
        given."""
        for role, layout in self.plan.trainers.items():
            if layout.pools == (self.pool,):
                mesh = _mesh(
                    layout, self.device.type
                )  # a collective over the whole pool, idle ranks too
                if self.rank < layout.gpus:
                    self.roles[role] = self._host(role, layout, mesh, saved)
        if not self.on_cpu:
            # Of whole parameters; an engine that starts on this GPU takes what is free.
            torch.cuda.empty_cache()

    def _host(
        self, role: str, layout: TrainerRole, mesh: DeviceMesh, saved: shards.Saved | None
    ) -> Hosted:
        trained = role in TRAINED
        workload = self.plan.workload
        dtype = torch.float32 if self.on_cpu or trained else torch.bfloat16
        if self.rank == 0 and not self.on_cpu:  # what runs on a CPU was tried before the start
            self_check.check(role, workload.models[role], self.device, torch.bfloat16)
        model = models.empty(role, workload.models[role], dtype)
        restored = shards.Restored(role, saved) if trained and saved else None
        source = restored or models.weights_of(role, workload.models[role], workload.seed, model)
        module = models.wrap(role, model, workload.algorithm.temperature).requires_grad_(trained)
        if trained and layout.recompute:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        policy = MixedPrecisionPolicy()
        if not self.on_cpu:
            residual.keep_residual_in_fp32(model, torch.bfloat16)
            models.compile_blocks(model)
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        for block in residual.blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        loading.fill(module, model, source, self.device)
        optimizer = None
        if trained:
            settings = workload.optimizer.of(role)
            optimizer = torch.optim.AdamW(
                module.parameters(),
                lr=settings.lr,
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=settings.weight_decay,
                fused=True,
            )
            shards.give_moments(optimizer, self.device)
        hosted = Hosted(layout=layout, module=module, optimizer=optimizer)
        if restored and optimizer is not None:
            restored.restore(model, optimizer)
            hosted.version = restored.state.version
        self._rest(hosted, moments=True)
        return hosted

    # --- offloading ---

    @contextlib.contextmanager
    def _awake(self, role: str, version: int | None, train: bool = False) -> Iterator[Hosted]:
        """The role on its device, its weights of this version, ready to `train` or not; what its
        layout offloads while idle comes and goes here. An engine that sleeps on the same GPU finds
        all that is free when it wakes."""
        hosted = self.roles[role]
        assert version in (None, hosted.version), (
            f"{role} has weights {hosted.version}, the plan says {version}"
        )
        if hosted.layout.offload != "none" and not self.on_cpu:
            with self.part("wake"):
                hosted.weights.fetch()
                if train:
                    hosted.moments.fetch()
        yield hosted
        self._rest(hosted, train)

    def _rest(self, hosted: Hosted, moments: bool) -> None:
        if self.on_cpu:
            return
        if hosted.layout.offload != "none":
            with self.part("offload"):
                if hosted.layout.offload == "all":
                    hosted.weights.park(hosted.module.parameters())
                if hosted.optimizer is not None and moments:
                    states = hosted.optimizer.state.values()
                    hosted.moments.park(x for state in states for x in state.values() if x.dim())
        if self.plan.rollout.offload and self.pool in self.plan.rollout.pools:
            self.synchronize()
            torch.cuda.empty_cache()


def _interface(address: str) -> str | None:
    """The network interface of this host that has an IPv4 address: Gloo would take the one that the
    host's name leads to, which may be another. None if it cannot be found."""
    if ipaddress.ip_address(address).is_loopback:
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an address
                answer = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def _mesh(layout: TrainerRole, device: str) -> DeviceMesh:
    """Replicas of shards; neighbouring ranks, which the pool keeps on one node, share a shard
    group."""
    ranks = torch.arange(layout.gpus)
    if layout.replicas == 1:
        return DeviceMesh(device, ranks, mesh_dim_names=("shard",))
    shape = ranks.view(layout.replicas, layout.shard)
    return DeviceMesh(device, shape, mesh_dim_names=("replicate", "shard"))
