"""How fast an engine is: the seconds of its steps and of its prefills."""

from dataclasses import dataclass

import numpy as np

from planner.predict.columns import Integers, Seconds
from planner.predict.memory import compute_bytes, kv_bytes_per_token
from planner.predict.roofline import LINK_LATENCY_SECONDS
from planner.spec.cluster import Device
from planner.spec.workload import Shape

# Seconds of a decoding step in addition to the roofline (scheduling, sampling with
# log-probabilities, launching the graph), those of each layer that is launched by itself, and those
# of each sequence. On a GPU as engines of 1.5B and 7B models with 64 to 512 sequences each had it
# (profiles/h200/README.md). On a core as models of 2, 8 and 30 layers (0.3M, 5M and 135M
# parameters) with 1 to 128 sequences had it.
STEP_SECONDS = {"cuda": 1.5e-3, "cpu": 1e-4}
LAYER_SECONDS = {"cuda": 0.0, "cpu": 1e-4}
SEQUENCE_SECONDS = {"cuda": 1e-5, "cpu": 5e-6}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Coefficients in seconds of one engine. Matrices of a step with n sequences take max(weights,
    n * arithmetic)."""

    weights: float
    arithmetic: float
    attention: float  # per token of context in a step
    step: float
    sequence: float
    prefill_token: float
    prefill_square: float  # times the square of a prompt's length

    def matrices(self, active: int) -> float:
        """Seconds of a step with `active` sequences, attention apart."""
        return max(self.weights, self.arithmetic * active) + self.step + self.sequence * active

    def matrices_each(self, active: Integers) -> Seconds:
        """The same of several steps, by their numbers of sequences."""
        seconds: Seconds = np.maximum(self.weights, self.arithmetic * active)
        seconds += self.step + self.sequence * active
        return seconds

    def prefill(self, prompt: int) -> float:
        return self.prefill_token * prompt + self.prefill_square * prompt * prompt


def engine_speed(shape: Shape, tensor_parallel: int, device: Device) -> Speed:
    """The roofline of one engine: bytes over the memory's rate against operations over the matrix
    rate, each at its efficiency, and two all-reduces per layer between the GPUs of the engine
    (Shoeybi et al. 2019, arXiv:1909.08053)."""
    flops = device.flops * device.efficiency_compute * tensor_parallel
    bandwidth = device.memory_bandwidth * device.efficiency_memory
    size, peers = compute_bytes(device), tensor_parallel - 1
    matrices = shape.layers * shape.block_parameters + shape.embedding_parameters
    read = kv_bytes_per_token(shape, tensor_parallel, device) / bandwidth
    scores = (
        4 * shape.layers * shape.heads * shape.head_dim
    )  # FLOPs per query and key, both products
    reduced = 2 * shape.layers * 2 * size * shape.hidden * peers / tensor_parallel
    reduce_token = reduced / (device.link_bandwidth * device.efficiency_link)
    layer = LAYER_SECONDS[device.kind]
    layer += 2 * LINK_LATENCY_SECONDS if peers else 0.0
    return Speed(
        weights=size * matrices / tensor_parallel / bandwidth,
        arithmetic=2 * matrices / flops,
        attention=max(read, scores / flops),
        step=STEP_SECONDS[device.kind] + shape.layers * layer,
        sequence=SEQUENCE_SECONDS[device.kind] + reduce_token,
        prefill_token=2 * shape.layers * shape.block_parameters / flops + reduce_token,
        prefill_square=scores / 2 / flops,
    )
