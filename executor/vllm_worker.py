"""What an engine asks of its processes on the GPUs besides what vLLM knows. Imports vLLM, so it is imported there."""

import ctypes
import signal
from typing import Any

import torch

from executor import memory
from executor.vllm_transfer import ENGINES

PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent ends


class Extension:
    """A base that vLLM adds to its worker's, of which each process has one."""

    weight_transfer_engine: Any
    vllm_config: Any
    device: torch.device
    model_runner: Any

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Before the worker uses its GPU. vLLM itself would let a process finish what it does when the engine is gone,
        and it may wait for that engine."""
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # as in the trainer
        return super().__new__(cls)

    def receive_by(self, channel: str) -> None:
        """Take weights over by this channel from here on."""
        self.weight_transfer_engine.shutdown()
        self.weight_transfer_engine = ENGINES[channel](
            self.vllm_config.weight_transfer_config, self.vllm_config, self.device, self.model_runner.get_model()
        )

    def forget_peak(self) -> None:
        memory.forget_peak()

    def peak(self) -> dict[str, int]:
        return memory.peak()
