"""Sizes of the task, and how it is told how far the making is."""

from collections.abc import Callable
from dataclasses import dataclass

SAY_EVERY = 250  # steps, between two lines on the screen
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes of the task and how long its models train; the defaults are what `plan task` makes."""

    digits: int = 4
    train_prompts: int = 8192
    held_out_prompts: int = 512
    hidden: int = 128
    layers: int = 2
    heads: int = 8
    kv_heads: int = 4
    batch: int = 64
    exact_match: float = 0.3  # held-out, of greedy decoding: where the actor's training stops
    teacher_steps: int = 300  # from there to the model that the reward model is made of
    reward_steps: int = 1000

    @property
    def answer_tokens(self) -> int:
        return self.digits + 1  # and the end of the sequence
