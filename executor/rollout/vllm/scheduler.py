"""vLLM's scheduler, except for its handling of log-probs. Imports vLLM, so it is imported where an
engine runs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.rollout.vllm.private import AsyncScheduler


class Scheduler(AsyncScheduler):
    """Leaves the log-probs of a step in one array. vLLM cuts three arrays into slices for every
    token of every sequence, on the processor that the GPU waits for."""

    log_probs: NDArray[np.float32]  # of the tokens in the outputs of the last step, in their order

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        found, model_runner_output.logprobs = model_runner_output.logprobs, None
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if 0 in outputs and outputs[0].outputs:
            places = model_runner_output.req_id_to_index
            rows = [places[output.request_id] for output in outputs[0].outputs]
            self.log_probs = found.logprobs[rows, 0]
        return outputs
