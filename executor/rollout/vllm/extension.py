"""The methods that an engine needs of its processes on the GPUs and vLLM does not have. Imports
vLLM, so it is imported there."""

import contextlib
import ctypes
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from executor.fleet import gpu_memory
from executor.rollout.vllm import private
from executor.rollout.vllm.transfer import TRANSFERS

PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when the thread that started it ends


class Extension:
    """vLLM appends this class to the bases of its worker's, of which each process has one."""

    weight_transfer_engine: Any
    vllm_config: Any
    device: torch.device
    model_runner: Any

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

    def receive_by(self, channel: str) -> None:
        """Take weights over by this channel from here on."""
        self.weight_transfer_engine.shutdown()
        self.weight_transfer_engine = TRANSFERS[channel](
            self.vllm_config.weight_transfer_config,
            self.vllm_config,
            self.device,
            self.model_runner.get_model(),
        )

    def forget_peak(self) -> None:
        gpu_memory.forget_peak()

    def peak(self) -> dict[str, int]:
        return gpu_memory.peak()


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
