"""Generation with vLLM; `scheduler.py` and `extension.py` are what vLLM is given to work with.

vLLM's engine runs inside of our worker's process (`worker.py`) and on each of its GPUs in a
process that ends with ours. So one schedules the next step and collects what the last one made
while the other launches kernels: for small models a step takes as long as the host needs for it.
Weights come by NCCL from a trainer on another GPU, or by CUDA IPC from the one that shares the GPU.
A build of vLLM for CPUs computes in float32, and its weights come from Ray's object store.
"""

import contextlib
import gc
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, GenerationConfig

from executor.data.requests import Ints, Requests
from executor.fleet import gpus
from executor.rollout.engine import OnFinished
from executor.rollout.stop_strings import stops_of
from executor.rollout.streaming import Drawn, Unfinished
from executor.rollout.vllm.in_flight import InFlight, sampling_params
from executor.training import models
from executor.training.weights import Arrays, Described
from planner.predict.memory import kv_cache_bytes
from planner.spec.data import Sampler
from planner.spec.errors import UserError
from planner.spec.files import write_atomic
from planner.spec.plan import Plan
from planner.spec.tokenizers import stop_tokens
from planner.spec.workload import Model

ENGINE_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine dies with the process it is in
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it returns no processed log-probs
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # NVLink multicast is not everywhere allowed
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class VllmEngine:
    """vLLM with one version of the weights at a time; none to begin with, so the first thing is a
    transfer.

    While asleep it holds no KV cache and has its weights on the host; with `drop_weights` nowhere,
    for then a transfer comes before it generates again."""

    drop_weights = False

    def __init__(self, plan: Plan) -> None:
        """Raises UserError if the vLLM that is installed was built for other devices."""
        load_library()
        from vllm import LLM

        rollout, workload = plan.rollout, plan.workload
        on_cpu = _on_cpu(plan)
        self.eos = [*eos_tokens(workload.actor), *stop_tokens(workload)]
        self.stops = stops_of(workload)
        # vLLM reads files itself, and expects the names that are there.
        self._stored = models.stored_names(models.empty("actor", workload.actor, torch.bfloat16))
        self._awake = {"weights", "kv_cache"}
        self._asked = 0  # requests so far
        if not on_cpu:
            _check_room(plan)
        with _told_what_fails():
            self.llm = LLM(
                model=str(_model_directory(workload.actor)),
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype="float32" if on_cpu else "bfloat16",
                enforce_eager=on_cpu,
                tensor_parallel_size=rollout.tensor_parallel,
                distributed_executor_backend="mp",
                worker_extension_cls="executor.rollout.vllm.extension.Extension",
                gpu_memory_utilization=rollout.memory_fraction,
                # What vLLM measures itself is wrong where trainers load their models on the same
                # GPU meanwhile.
                kv_cache_memory_bytes=kv_cache_bytes(plan),
                max_model_len=workload.longest,
                max_num_seqs=rollout.concurrency,
                cudagraph_capture_sizes=None if on_cpu else graph_sizes(rollout.concurrency),
                logprobs_mode="processed_logprobs",
                enable_sleep_mode=rollout.offload and not on_cpu,
                scheduler_cls="executor.rollout.vllm.scheduler.Scheduler",
                # The samples of a prompt share its prefill. Without any, looking for common
                # beginnings would only take time at every token of a sequence.
                enable_prefix_caching=workload.group > 1,
            )
        from executor.rollout.vllm.private import Internals

        self.internals = Internals(self.llm)
        self._streaming = InFlight(self.internals, self.eos, self.stops)
        # All processes have opened their files by now, which would outlive processes that are
        # killed.
        self.internals.unlink_queues()
        self.llm.collective_rpc("unlink_queues")
        # What the engine consists of stays; collecting must not look at it at every step.
        gc.freeze()

    @property
    def failed(self) -> bool:
        """Whether a process of a GPU has ended."""
        return self.internals.failed

    def generate(
        self, requests: Requests, sampler: Sampler, hand_over: OnFinished | None = None
    ) -> tuple[Ints, Ints, NDArray[np.float32]]:
        """Generate as `LLM.generate` does, without its object per sequence that grows with every
        token."""
        self.internals.forget_prefixes()  # which other weights may have computed
        first = self._add(requests, sampler)
        tokens: list[list[int]] = [[] for _ in range(len(requests))]
        log_probs: list[list[float]] = [[] for _ in range(len(requests))]
        left = len(requests)
        with _no_collecting():
            while left:
                if not (outputs := self.internals.step()):
                    continue
                of_outputs = self.internals.scheduler.log_probs.tolist()
                ended, stopped = list[int](), list[str]()
                for output, log_prob in zip(outputs, of_outputs, strict=True):
                    number = int(output.request_id) - first
                    assert number >= 0, "an output of a call that was cut short"
                    tokens[number] += output.new_token_ids
                    log_probs[number].append(log_prob)
                    if output.finish_reason is not None:
                        ended.append(number)
                    elif self.stops is not None and self.stops.completed(tokens[number]):
                        ended.append(number)
                        stopped.append(output.request_id)
                if stopped:
                    self.internals.abort(stopped)
                left -= len(ended)
                if ended and hand_over is not None:
                    hand_over(ended, [tokens[number] for number in ended])
        lengths = np.array([len(row) for row in tokens], dtype=np.int32)
        total, flat = int(lengths.sum()), itertools.chain.from_iterable
        return (
            lengths,
            np.fromiter(flat(tokens), np.int32, total),
            np.fromiter(flat(log_probs), np.float32, total),
        )

    def _add(self, requests: Requests, sampler: Sampler) -> int:
        """Queue requests; the number of the first one."""
        first = self._asked
        self._asked += len(requests)
        names = map(str, range(first, self._asked))
        prompts = [prompt.tolist() for prompt in requests.prompts()]
        columns = requests.keys.tolist(), requests.max_tokens.tolist(), requests.exact.tolist()
        params = [
            sampling_params(sampler, key, max_tokens, exact, self.eos)
            for key, max_tokens, exact in zip(*columns, strict=True)
        ]
        self.internals.add(zip(names, prompts, params, strict=True))
        return first

    # --- sequences that stream ---

    @property
    def in_flight(self) -> int:
        return len(self._streaming)

    def submit(self, sequences: Sequence[Unfinished], version: int) -> None:
        self._streaming.submit(sequences, version)

    def step(self, version: int) -> tuple[int, list[Drawn]]:
        with _no_collecting():
            return self._streaming.step(version)

    def recompute(self) -> None:
        self.internals.recompute()

    def abandon(self) -> None:
        self._streaming.abandon()

    # --- memory ---

    def forget_peak(self) -> None:
        self.llm.collective_rpc("forget_peak")

    def peak(self) -> dict[str, int]:
        """Bytes at the peak of the fullest GPU, by kind."""
        found = self.llm.collective_rpc("peak")
        return {kind: max(peak[kind] for peak in found) for kind in found[0]}

    def sleep(self) -> None:
        """Nothing to do where the weights alone are awake: vLLM does not let them sleep again
        before the rest woke."""
        if "kv_cache" in self._awake:
            self.llm.sleep(level=2 if self.drop_weights else 1)
            self._awake = set()

    def wake(self, *parts: str) -> None:
        """Bring back what sleeps of these parts (weights, kv_cache); of all without any."""
        missing = [part for part in parts or ("weights", "kv_cache") if part not in self._awake]
        if missing:
            self.llm.wake_up(missing)
            self._awake.update(missing)

    # --- weights ---

    def install(self, arrays: Arrays) -> None:
        """Take over all weights, on a CPU."""
        tensors = [(self._stored[name], torch.tensor(array)) for name, array in arrays.items()]
        self.llm.collective_rpc("install", args=(tensors,))

    def join_group(self, host: str, port: int, first: int, world: int) -> None:
        """Join a trainer's NCCL group with this engine's GPUs as ranks from `first` on. Returns
        when all have."""
        self.llm.collective_rpc("join_group", args=(host, port, first, world))

    def leave_group(self) -> None:
        """Leave the group, if the GPUs are in one."""
        self.llm.collective_rpc("leave_group")

    def receive(self, weights: Sequence[Described]) -> None:
        """Take over all weights, from the group's trainer."""
        self.llm.collective_rpc("receive", args=(self._as_stored(weights),))

    def read(self, weights: Sequence[Described], handles: dict[str, Any]) -> None:
        """Take over some weights, end to end in a buffer on each of the engine's GPUs; its CUDA IPC
        handle by GPU."""
        self.llm.collective_rpc("read", args=(self._as_stored(weights), handles))

    def _as_stored(self, weights: Sequence[Described]) -> list[Described]:
        return [replace(weight, name=self._stored[weight.name]) for weight in weights]


def graph_sizes(concurrency: int) -> list[int]:
    """The numbers of sequences for which a step is captured as a CUDA graph: close together where
    there are few, and the largest possible one, for with more than the last a step runs without a
    graph, which takes several times as long. vLLM's own sizes end with a multiple of 8 or 16."""
    sizes = {1, 2, 4, *range(8, 256, 8), *range(256, concurrency, 16), concurrency}
    return sorted(size for size in sizes if size <= concurrency)


def load_library() -> None:
    """Takes long, and needs no GPU."""
    os.environ.update(
        {name: os.environ.get(name, value) for name, value in ENGINE_ENVIRONMENT.items()}
    )
    import vllm  # noqa: F401


@contextlib.contextmanager
def _no_collecting() -> Iterator[None]:
    """Do not look for garbage meanwhile: steps make none, and looking again and again costs a tenth
    of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def _told_what_fails() -> Iterator[None]:
    """Raise what ended one of an engine's processes while it starts; vLLM raises that one ended."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "failure.txt"
        os.environ["SPLITPLAN_ENGINE_FAILURE"] = str(file)  # see `extension.py`
        try:
            yield
        except Exception as error:
            if not file.exists():
                raise
            raise RuntimeError(file.read_text(encoding="utf-8")) from error
        finally:
            del os.environ["SPLITPLAN_ENGINE_FAILURE"]


def _check_room(plan: Plan) -> None:
    """Raise MemoryError where less is free than an engine takes, before it has taken a minute to
    start."""
    needed = plan.rollout.memory_fraction * plan.device_of(plan.rollout.pools[0]).memory_bytes
    for gpu in gpus.found():
        if gpu.total and (free := gpu.total - gpu.used) < needed:
            raise MemoryError(
                f"GPU {gpu.index} has {free / 1e9:.1f} GB free, an engine takes {needed / 1e9:.1f} "
                "GB"
            )


# --- the device and the model ---


def _on_cpu(plan: Plan) -> bool:
    from vllm.platforms import current_platform

    built, wanted = current_platform.device_type, plan.device_of(plan.rollout.pools[0]).kind
    if built != wanted:
        raise UserError(
            f"the rollout runs on {wanted}, and the vLLM that is installed is built for "
            f"{built or 'no device here'}; "
            f"install one built for {wanted}, or plan with engine transformers"
        )
    return wanted == "cpu"


def eos_tokens(model: Model) -> list[int]:
    """The tokens that end a response; none for random weights."""
    if model.path is None:
        return []
    if (model.path / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(model.path, local_files_only=True).eos_token_id
        if found is not None:
            return models.listed(found)
    return models.listed(AutoConfig.from_pretrained(model.path, local_files_only=True).eos_token_id)


def _model_directory(model: Model) -> Path:
    """A directory with all that vLLM needs to know of a model before it has weights. What vLLM
    compiles it keeps by the directory's name, so that is the same at every start."""
    from vllm import envs

    text = _config(model)
    directory = (
        Path(envs.VLLM_CACHE_ROOT) / "splitplan" / hashlib.sha256(text.encode()).hexdigest()[:16]
    )
    write_atomic(directory / "config.json", text)
    return directory


def _config(model: Model) -> str:
    if model.path is not None:
        config = AutoConfig.from_pretrained(
            model.path, local_files_only=True, trust_remote_code=False
        )
    else:
        config = models.config_of(model.shape)
        config.architectures = ["Qwen2ForCausalLM"]
    config.dtype = torch.bfloat16
    text: str = config.to_json_string()
    return text
