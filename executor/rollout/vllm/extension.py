"""The methods that an engine needs of its processes on the GPUs and vLLM does not have. Imports
vLLM, so it is imported there.

Weights go straight into the parameters that vLLM computes with. Its own ways build each layer again
next to the old one, because a quantized layer has another format than a checkpoint. Ours are bf16
and have the checkpoint's format, so the copy can be spared: most of a transfer's time was spent on
it. And those ways change with vLLM's versions.
"""

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from executor.fleet import gpu_memory, torch_private
from executor.rollout.vllm import private
from executor.training import nccl_group
from executor.training.weights import Described

PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when the thread that started it ends


class Extension:
    """vLLM appends this class to the bases of its worker's, of which each process has one."""

    rank: int  # of this GPU in the engine
    vllm_config: Any
    device: torch.device
    model_runner: Any
    reload_weights: Any
    trainers_group: Any = None  # over NCCL, with a trainer on another GPU

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Prepare the process before the worker uses its GPU. It is to end with the engine: vLLM
        itself would let it finish its work when the engine is gone, and it may wait for that
        engine."""
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (
            False  # as in the trainer
        )
        if file := os.environ.get("SPLITPLAN_ENGINE_FAILURE"):
            logging.getLogger("vllm").addHandler(_Failures(Path(file)))
        return super().__new__(cls)

    def unlink_queues(self) -> None:
        """Once all have opened them: they would outlive processes that are killed."""
        private.unlink_broadcaster()

    def install(self, weights: list[tuple[str, Tensor]]) -> None:
        """Take over all weights. On a CPU vLLM computes with another format than theirs, so it
        builds its layers again; a tied head has no weights of its own, and would be left out."""
        with private.within(self.vllm_config):
            self.reload_weights(weights_iterator=weights)
            private.prepare_heads(self.model_runner.get_model())

    # --- weights from trainers on GPUs ---

    def join_group(self, host: str, port: int, first: int, world: int) -> None:
        """Join a trainer's NCCL group, with ranks from `first` on for the engine's GPUs. It is
        formed again when an engine in it was started again."""
        self.leave_group()
        self.trainers_group = nccl_group.join(host, port, first + self.rank, world)

    def leave_group(self) -> None:
        if self.trainers_group is not None:
            nccl_group.leave(self.trainers_group)
        self.trainers_group = None

    def receive(self, weights: Sequence[Described]) -> None:
        """Take over all weights, which the group's trainer sends."""
        arriving = nccl_group.receive(self.trainers_group, weights)
        self._load(arriving)
        nccl_group.exhaust(arriving)
        torch.cuda.synchronize()

    def read(self, weights: Sequence[Described], handles: dict[str, Any]) -> None:
        """Take over some weights, where they lie in the window of the trainer on this GPU."""
        gpu = str(torch.cuda.get_device_properties(self.device.index).uuid)
        window = torch_private.open_ipc(handles[gpu], self.device.index)
        self._load(_in_window(window, weights))
        torch.cuda.synchronize()

    @torch.no_grad()
    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        with private.within(self.vllm_config):
            self.model_runner.get_model().load_weights(weights)

    # --- memory ---

    def forget_peak(self) -> None:
        gpu_memory.forget_peak()

    def peak(self) -> dict[str, int]:
        return gpu_memory.peak()


def _in_window(window: Tensor, weights: Sequence[Described]) -> Iterator[tuple[str, Tensor]]:
    """The weights that lie end to end in a buffer of bytes, in bf16."""
    begin = 0
    for weight in weights:
        end = begin + weight.bytes
        yield weight.name, window[begin:end].view(torch.bfloat16).view(weight.shape)
        begin = end


class _Failures(logging.Handler):
    """Writes an exception that vLLM logs to a file: while it starts, the engine learns only that
    there was one."""

    def __init__(self, file: Path) -> None:
        super().__init__(logging.ERROR)
        self.file = file

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and (error := record.exc_info[1]) is not None:
            with contextlib.suppress(
                OSError
            ):  # the engine has started, and the file's directory is gone
                self.file.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
