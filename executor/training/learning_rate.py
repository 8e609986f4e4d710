"""The learning rate of a step."""

import math

from planner.spec.algorithm import Optimizer


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """The learning rate of the update of a step, counted from 0, in a run of `steps` steps.

    It rises in `warmup_steps` equal parts to `lr` and is lr at the last of them. From there it
    stays, or falls to lr * min_lr_ratio at the end of the last of `decay_steps` (or else `steps`)
    steps, along a line or half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983). It depends on
    the step alone: nothing needs to be kept in a checkpoint.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    decaying = (settings.decay_steps or steps) - settings.warmup_steps
    done = min(1.0, (step - settings.warmup_steps) / decaying) if decaying > 0 else 1.0
    match settings.schedule:
        case "linear":
            left = 1.0 - done
        case "cosine":
            left = (1.0 + math.cos(math.pi * done)) / 2
        case _:
            left = 1.0
    return settings.lr * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * left)
