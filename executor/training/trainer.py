"""The trainer process: one per GPU, which computes the calls of all training and inference roles of
its pool."""

import collections
import contextlib
import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from executor.data.batch import Sequences
from executor.data.requests import Rows
from executor.training import aggregation, losses, models, nccl_group, shards, weights
from executor.training.aggregation import Stats
from executor.training.host import Host, Hosted
from executor.training.learning_rate import learning_rate
from executor.training.packing import Packed, pack
from executor.training.weights import Described
from planner.spec.errors import UserError
from planner.spec.plan import TrainerRole
from planner.spec.workload import TRAINED

COLUMNS = dict[str, NDArray[np.float32]]  # further columns [B, R] of a batch, by datum


@dataclass(frozen=True, kw_only=True)
class Minibatch:
    """One optimizer step as a rank sees it: its micro-batches, and over all ranks the response
    tokens that are learned from and the sequences that have some."""

    micro_batches: list[Rows]
    tokens: int
    sequences: int


class Trainer(Host):
    """Calls of a rank, each on a role that it hosts."""

    group: Any = None  # over NCCL, with the engines on other GPUs
    window: weights.Window | None = None  # of CUDA IPC, to the engine on this GPU

    def leave(self) -> None:
        self._leave_engines()
        self.window = None
        super().leave()

    def warm_up(self) -> None:
        """Compile all that the roles run and take all the memory that a step may, by a full
        micro-batch each: then the first step is as fast as any, and what does not fit fails now.
        A micro-batch of two short sequences follows, for sizes that are compiled apart. Leaves
        nothing behind: no optimizer step is taken. A collective; nothing is compiled on a CPU."""
        compiled = {} if self.on_cpu else self.roles
        for role, hosted in compiled.items():
            batches = self._full_micro_batch(role, hosted.layout), self._micro_batch(2, 2)
            with self._awake(role, None), torch.no_grad():
                hosted.module.eval()
                for batch in batches:
                    hosted.module(batch)
                    reshard(hosted.module)
            if hosted.optimizer is not None:
                with self._awake(role, None, train=True):
                    hosted.module.train()
                    for batch in batches:
                        hosted.module(batch).mean().backward()
                    hosted.optimizer.zero_grad()
        gc.collect()
        # To look at what one compiled model left takes half a second, in which the other ranks
        # wait.
        gc.freeze()

    def _full_micro_batch(self, role: str, layout: TrainerRole) -> Packed:
        """A micro-batch with as many of the longest sequences as it may have."""
        workload = self.plan.workload
        share = (workload.minibatch if role in TRAINED else workload.batch) // layout.gpus
        count = max(1, min(layout.micro_batch_tokens // workload.longest, share))
        return self._micro_batch(count, workload.response.longest)

    def _micro_batch(self, count: int, response: int) -> Packed:
        """Some sequences of the longest prompt and a response of so many tokens."""
        prompt = self.plan.workload.prompt.longest
        sequences = Sequences(
            tokens=np.zeros((count, prompt + response), dtype=np.int32),
            prompt_lengths=np.full(count, prompt, dtype=np.int32),
            response_lengths=np.full(count, response, dtype=np.int32),
            log_probs=np.zeros((count, response), dtype=np.float32),
            weights_versions=np.zeros((count, response), dtype=np.int32),
        )
        return pack(sequences, np.arange(count), self.device)

    # --- calls ---

    @torch.no_grad()
    def infer(
        self,
        role: str,
        version: int | None,
        refs: list[ray.ObjectRef[Any]],
        micro_batches: list[Rows],
    ) -> list[NDArray[np.float32]]:
        """Log-probs, values `[rows, columns]` or scores `[rows]` of each micro-batch, by weights of
        this version (None: of a role that does not train)."""
        (sequences,) = self.fetch(refs)
        sequences = self._readable(role, sequences)
        with self._awake(role, version) as hosted:
            hosted.module.eval()
            outputs = [hosted.module(pack(sequences, rows, self.device)) for rows in micro_batches]
            reshard(hosted.module)
            return [output.cpu().numpy() for output in outputs]

    def train(
        self, role: str, version: int, refs: list[ray.ObjectRef[Any]], minibatches: list[Minibatch]
    ) -> list[dict[str, float]]:
        """An optimizer step per minibatch, which makes the weights of this version out of the one
        before; this rank's sums of the loss statistics, and the gradient norm. Where that is not
        finite the step is left out."""
        sequences, further = self.fetch(refs)
        sequences = self._readable(role, sequences)
        with self._awake(role, version - 1, train=True) as hosted:
            hosted.module.train()
            self._set_learning_rate(role, hosted, version - 1)
            stats = [
                self._step(role, hosted, sequences, further, minibatch) for minibatch in minibatches
            ]
            hosted.version = version
            return stats

    def _set_learning_rate(self, role: str, hosted: Hosted, step: int) -> None:
        assert hosted.optimizer is not None
        workload = self.plan.workload
        rate = learning_rate(workload.optimizer.of(role), step, workload.steps)
        for group in hosted.optimizer.param_groups:
            group["lr"] = rate

    def _step(
        self,
        role: str,
        hosted: Hosted,
        sequences: Sequences,
        further: COLUMNS,
        minibatch: Minibatch,
    ) -> dict[str, float]:
        assert hosted.optimizer is not None
        sums: dict[str, Tensor] = {}
        for number, rows in enumerate(minibatch.micro_batches, start=1):
            if hosted.layout.replicas > 1:  # they need to agree once, at the end
                assert isinstance(hosted.module, FSDPModule)
                hosted.module.set_requires_all_reduce(number == len(minibatch.micro_batches))
            batch = pack(sequences, rows, self.device)
            columns = {name: self._columns(x, rows, batch) for name, x in further.items()}
            loss_of = self._policy_loss if role == "actor" else self._value_loss
            loss, stats = loss_of(hosted.module, batch, columns, minibatch)
            (
                loss * hosted.layout.gpus
            ).backward()  # FSDP averages over the ranks; the normalizer wants their sum
            for name, value in stats.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value
        settings = self.plan.workload.optimizer.of(role)
        norm = nn.utils.clip_grad_norm_(hosted.module.parameters(), settings.grad_clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if norm.isfinite():  # it is the same on every rank
            hosted.optimizer.step()
        hosted.optimizer.zero_grad()
        return {"grad_norm": float(norm), **{name: float(value) for name, value in sums.items()}}

    def _policy_loss(
        self,
        module: nn.Module,
        batch: Packed,
        columns: Mapping[str, Tensor],
        minibatch: Minibatch,
    ) -> tuple[Tensor, Stats]:
        settings = self.plan.workload.algorithm
        log_probs, entropy = module(batch, entropy=True)
        mask = batch.mask & (columns["weights"] > 0)
        divided_by = aggregation.normalizer(
            settings.aggregation,
            mask,
            tokens=minibatch.tokens,
            sequences=minibatch.sequences,
            longest=self.plan.workload.response.longest,
        )
        loss, stats = losses.policy_loss(
            kind=settings.loss,
            log_probs=log_probs,
            proximal_log_probs=columns["proximal_log_probs"],
            advantages=columns["advantages"],
            weights=columns["weights"],
            mask=mask,
            clip=settings.clip,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
            normalizer=divided_by,
        )
        if settings.kl_kind != "k1" and "ref_log_probs" in columns:
            kl, kl_stats = losses.kl_loss(
                log_probs=log_probs,
                ref_log_probs=columns["ref_log_probs"],
                mask=mask,
                kind=settings.kl_kind,
                coef=settings.kl_coef,
                normalizer=divided_by,
            )
            loss, stats = loss + kl, stats | kl_stats
        bonus, entropy_stats = losses.entropy_loss(
            entropy=entropy, mask=mask, coef=settings.entropy_coef, normalizer=divided_by
        )
        return loss + bonus, stats | entropy_stats

    def _value_loss(
        self,
        module: nn.Module,
        batch: Packed,
        columns: Mapping[str, Tensor],
        minibatch: Minibatch,
    ) -> tuple[Tensor, Stats]:
        clip = self.plan.workload.algorithm.value_clip
        return losses.value_loss(
            values=module(batch),
            old_values=columns["values"],
            returns=columns["returns"],
            mask=batch.mask,
            clip=None if clip == "off" else clip,
            normalizer=minibatch.tokens,
        )

    def gather(self, role: str, version: int) -> ray.ObjectRef[Any] | None:
        """The role's weights of this version in the object store, from rank 0."""
        with self._awake(role, version) as hosted:
            arrays = weights.gather(hosted.module.model, keep=self.rank == 0)
        return None if arrays is None else ray.put(arrays)

    # --- the actor's weights to engines on GPUs; see `weight_sync.py` ---

    def version_of(self, role: str) -> int:
        return self.roles[role].version

    def describe_weights(self) -> list[Described]:
        return weights.describe(self.roles["actor"].module)

    def rendezvous(self) -> tuple[str, int]:
        """Where to form a group: this host and a free port of it."""
        return ray.util.get_node_ip_address(), nccl_group.free_port()

    def lead_group(self, host: str, port: int, world: int) -> None:
        """Form the NCCL group with the GPUs of the engines elsewhere, as its rank 0. Returns when
        all have joined (`VllmWorker.join_group`)."""
        self._leave_engines()
        self.group = nccl_group.join(host, port, 0, world)

    def _leave_engines(self) -> None:
        if self.group is not None:
            nccl_group.leave(self.group)
        self.group = None

    def send_weights(self, version: int) -> None:
        """Send the weights of this version to that group, from the rank that is in it
        (`VllmWorker.receive_weights`)."""
        with self._awake("actor", version) as hosted:
            gathered = weights.compute_weights(hosted.module)
            if self.rank == 0:
                nccl_group.send(self.group, gathered)
            else:
                collections.deque(gathered, maxlen=0)

    def open_window(self, chunks: list[list[Described]]) -> dict[str, Any]:
        """Make a buffer from which the engine on this GPU reads weights; its handle."""
        self.window = weights.Window(chunks)
        return self.window.handles

    def begin_sending(self, version: int) -> None:
        """Prepare for sending the weights of this version, before the first of the chunks that they
        go in."""
        self.sending = contextlib.ExitStack()
        self.hosted = self.sending.enter_context(self._awake("actor", version))

    def fill_window(self, chunk: list[Described]) -> None:
        """Put a chunk's weights into the window, for `VllmWorker.read_window`."""
        assert self.window is not None
        self.window.fill(self.hosted.module, chunk)

    def end_sending(self) -> None:
        """End the sending after the last chunk."""
        self.sending.close()
        del self.hosted  # or the next plan would find its memory taken

    def export(self, role: str, directory: Path) -> None:
        """Write the role as a Hugging Face directory, from rank 0."""
        with self._awake(role, None) as hosted:
            model = hosted.module.model
            state = {name: tensor.cpu() for name, tensor in weights.whole(model) if self.rank == 0}
            if self.rank == 0:
                try:
                    models.export(model, state, directory)
                except (OSError, SafetensorError) as error:  # fresh processes would not help
                    raise UserError(
                        f"{role}: cannot be written to {directory} ({error}); make room there"
                    ) from None

    def snapshot(self, directory: Path) -> None:
        """Copy this rank's shards of what trains off the device, and begin to write them there."""
        copies = {}
        for role, hosted in self.roles.items():
            if hosted.optimizer is None:
                continue
            model, peek = hosted.module.model, hosted.peek
            copied = shards.copy(role, model, hosted.optimizer, hosted.version, self.rank, peek)
            if copied is not None:
                copies[role] = copied
        self.writer = shards.Writer(copies, directory)

    def written(self) -> tuple[dict[str, shards.RoleState], dict[str, shards.FileEntry]] | None:
        """The roles and the files of the checkpoint that was written; None while it is being
        written. Raises UserError if it failed."""
        return self.writer.finished()

    def _readable(self, role: str, sequences: Sequences) -> Sequences:
        """The sequences for a model whose vocabulary is padded less than the actor's: padding that
        the actor sampled becomes the last number that there is."""
        models = self.plan.workload.models
        most = models[role].shape.vocab
        if most >= models["actor"].shape.vocab:
            return sequences
        return replace(sequences, tokens=np.minimum(sequences.tokens, most - 1))

    def _columns(self, column: NDArray[np.float32], rows: Rows, batch: Packed) -> Tensor:
        """The micro-batch's part of a column `[B, R]`: `[n, W]`; any row's for an empty one, whose
        mask is false."""
        n, width = batch.mask.shape
        part = column[rows, :width] if len(rows) else column[:n, :width]
        return torch.tensor(part, device=self.device)  # a copy: Ray's arrays are read-only


def reshard(module: nn.Module) -> None:
    """Free what FSDP keeps gathered after a forward pass that no backward pass follows: the
    parameters of the root."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
