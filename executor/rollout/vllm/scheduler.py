"""vLLM's scheduler, except for its handling of log-probs and of the version of the weights. Imports
vLLM, so it is imported where an engine runs."""

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.rollout.vllm.private import AsyncScheduler


class Scheduler(AsyncScheduler):
    """Leaves the log-probs of a step in one array. vLLM cuts three arrays into slices for every
    token of every sequence, on the processor that the GPU waits for.

    A step is scheduled while the one before is computed, so weights may come between the scheduling
    of a step and its outputs. They are of the version by which it was scheduled: the processes of
    the GPUs do what they are told in that order."""

    log_probs: NDArray[np.float32]  # of the tokens in the outputs of the last step, in their order
    version = 0  # of the weights that a step is scheduled by
    version_of_outputs = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._versions: deque[int] = deque()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._versions.append(self.version)
        return super().schedule(*args, **kwargs)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self.version_of_outputs = self._versions.popleft()
        found, model_runner_output.logprobs = model_runner_output.logprobs, None
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if 0 in outputs and outputs[0].outputs:
            places = model_runner_output.req_id_to_index
            rows = [places[output.request_id] for output in outputs[0].outputs]
            self.log_probs = found.logprobs[rows, 0]
        return outputs
