"""What engines hold, against a simulation of every token of every slot."""

import numpy as np
import pytest
from conftest import make_workload

from planner.predict.kv_cache import BLOCK_TOKENS, held_tokens
from planner.spec.lengths import sample
from planner.spec.workload import Workload


def most_held(workload: Workload, slots: int, seed: int) -> int:
    """Tokens that slots hold at most together, step by step; the next request takes the place of
    one that ends. Keys and values lie in blocks of 16 tokens."""
    prompts = sample(workload.prompt, workload.batch, seed, 0)
    responses = sample(workload.response, workload.batch, seed, 1)
    waiting = slots
    prompt, left = prompts[:slots].copy(), responses[:slots].copy()
    age, most = np.zeros(slots, dtype=np.int64), 0
    while (left > 0).any():
        running = left > 0
        age[running] += 1
        left[running] -= 1
        blocks = -(-(prompt + age) // 16)
        most = max(most, int(16 * blocks[running].sum()))
        for slot in np.flatnonzero(running & (left == 0)):
            if waiting < workload.batch:
                prompt[slot], left[slot], age[slot] = prompts[waiting], responses[waiting], 0
                waiting += 1
    return most


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("slots", [8, 64])
def test_what_is_reserved_suffices_and_is_not_much_more(sigma: float, slots: int) -> None:
    response = {"kind": "lognormal", "mean": 200, "sigma": sigma, "max": 800}
    prompt = {"kind": "lognormal", "mean": 100, "sigma": 0.4, "max": 300}
    workload = make_workload(batch=8 * slots, minibatch=slots, prompt=prompt, response=response)
    planned = held_tokens(workload, slots)
    held = [most_held(workload, slots, seed) for seed in range(12)]
    assert max(held) <= planned <= 1.5 * max(held)
    assert planned < slots * workload.longest


def test_equal_lengths_take_as_much_as_they_say() -> None:
    lengths = {
        "prompt": {"kind": "fixed", "tokens": 64},
        "response": {"kind": "fixed", "tokens": 96},
    }
    workload = make_workload(batch=64, minibatch=64, **lengths)
    assert held_tokens(workload, 16) == 16 * 160 == most_held(workload, 16, 0)
    assert held_tokens(workload, 500) == 64 * 160  # there are no more sequences


def test_the_last_block_of_each_sequence_has_its_room() -> None:
    """1,013 tokens lie in 64 blocks of 16."""
    lengths = {
        "prompt": {"kind": "fixed", "tokens": 500},
        "response": {"kind": "fixed", "tokens": 513},
    }
    workload = make_workload(batch=64, minibatch=64, **lengths)
    assert held_tokens(workload, 16) == 16 * 1024 == most_held(workload, 16, 0)


def test_long_responses_that_are_rare_leave_room_for_more_slots() -> None:
    """2,048 tokens of prompt and up to 8,192 of response: room for 64 longest sequences suffices
    for 160 slots."""
    response = {"kind": "lognormal", "mean": 1500, "sigma": 0.8, "max": 8192}
    prompt = {"kind": "fixed", "tokens": 2048}
    workload = make_workload(batch=512, minibatch=512, prompt=prompt, response=response)
    assert held_tokens(workload, 160) < 64 * 10240
    assert held_tokens(workload, 1) == 10240
    rising = [held_tokens(workload, slots) for slots in range(1, 400)]
    assert (np.diff(rising) >= 0).all()
    assert rising[1] >= 10240 + BLOCK_TOKENS  # the longest one always has room
