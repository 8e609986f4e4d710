"""All that is used of vLLM besides its documented interface, but for the group over NCCL that
trainers use too (`executor/training/nccl_group.py`). `tests/test_vllm_engine.py` says whether it is
there, in the oldest and the newest version that pyproject.toml allows. Imports vLLM, so it is
imported where an engine runs."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vllm.config import set_current_vllm_config as within
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

__all__ = [
    "AsyncScheduler",
    "Internals",
    "OncePerPrompt",
    "prepare_heads",
    "unlink_broadcaster",
    "within",
]


class Internals:
    """The inside of an `LLM` whose engine runs in this process."""

    def __init__(self, llm: Any) -> None:
        self._engine: Any = llm.llm_engine
        self.executor: Any = self._engine.model_executor
        core = self._engine.engine_core.engine_core
        self.scheduler: Any = core.scheduler
        if core.request_block_hasher is not None:
            core.request_block_hasher = OncePerPrompt(core.request_block_hasher)

    @property
    def failed(self) -> bool:
        """Whether a process of a GPU has ended."""
        return bool(self.executor.is_failed)

    def add(self, requests: Iterable[tuple[str, list[int], Any]], salt: str = "") -> None:
        """Queue requests: the name of each, the tokens of its prompt, and its SamplingParams. They
        share cached beginnings with those of the same salt alone."""
        tasks = self._engine.get_supported_tasks()
        for name, tokens, params in requests:
            prompt = {"type": "token", "prompt_token_ids": tokens}
            if salt:
                prompt["cache_salt"] = salt
            request = self._engine.input_processor.process_inputs(name, prompt, params, tasks)
            self._engine.engine_core.add_request(request)

    def forget_prefixes(self) -> None:
        """Compute the beginnings of prompts anew, whose keys and values may be cached."""
        assert self.scheduler.reset_prefix_cache(), "an engine that works on nothing holds blocks"

    def abort(self, names: list[str]) -> None:
        """Forget requests. A step that is queued may still compute for them."""
        self._engine.engine_core.abort_requests(names)

    def recompute(self) -> None:
        """Drop all keys and values. The sequences that have some are set aside and computed again;
        of a step that is queued they have no tokens."""
        self.scheduler.reset_prefix_cache(reset_running_requests=True)

    def step(self) -> list[Any]:
        """What the next step yields: some tokens of each sequence in it. Nothing for a first step,
        whose tokens come when the second one has been queued."""
        outputs: list[Any] = self._engine.engine_core.get_output().outputs
        return outputs

    def unlink_queues(self) -> None:
        """Remove the names of the queues between this process and those of the GPUs."""
        for queue in (self.executor.rpc_broadcast_mq, *self.executor.response_mqs):
            _unlink(queue)


class OncePerPrompt:
    """Hashes the blocks of a prompt once for its samples, which are queued one after the other.
    Hashing 2,000 tokens takes 0.2 ms, and eight samples of 64 prompts a tenth of a second."""

    def __init__(self, hash_blocks: Callable[[Any], list[Any]]) -> None:
        self._hash_blocks = hash_blocks
        self._hashed: tuple[Any, list[int]] = (None, [])  # the salt and the tokens of a prompt
        self._hashes: list[Any] = []

    def __call__(self, request: Any) -> list[Any]:
        """The hashes of a request's full blocks that are not hashed yet."""
        if request.num_tokens > request.num_prompt_tokens or request.block_hashes:
            return self._hash_blocks(request)
        prompt = request.cache_salt, request.prompt_token_ids
        if prompt != self._hashed:
            self._hashes, self._hashed = self._hash_blocks(request), prompt
        return list(self._hashes)


def prepare_heads(model: Any) -> None:
    """Bring the weights of the vocabulary's head into the format that vLLM computes with."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def unlink_broadcaster() -> None:
    """Remove the names of the queue to its peers, if this process of a GPU made them."""
    queue = get_tp_group().mq_broadcaster
    if queue is not None and queue.buffer.is_creator:
        _unlink(queue)


def _unlink(queue: Any) -> None:
    """The names of a message queue's shared memory and sockets; who has opened them goes on."""
    queue.buffer.shared_memory.unlink()
    for address in (queue.handle.local_subscribe_addr, queue.handle.local_notify_addr):
        Path(address.removeprefix("ipc://")).unlink(missing_ok=True)
