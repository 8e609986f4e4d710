"""Steps under way and sequences in flight, as a run that goes on finds them in a checkpoint."""

import numpy as np

from executor.data.prompts import PromptSource
from executor.running.checkpoint import Manifest, metric
from executor.running.growing import Kept
from executor.running.step_data import StepData
from executor.running.stream import RolloutStream
from planner.spec.data import Sampler


def restored_steps(
    manifest: Manifest, arrays: Kept, prompts: PromptSource, *, refills: bool
) -> tuple[dict[int, StepData], int]:
    """The data of the steps under way, by their numbers. Where the pipeline `refills`, those that
    are generated again are left out; the tokens that had been sampled of them come beside."""
    steps: dict[int, StepData] = {}
    dropped = 0
    for number, metrics in manifest.metrics.items():
        own = _below(arrays, f"{number}/")
        kept = {name: metric(value) for name, value in metrics.items()}
        step = StepData.restored(prompts.step(number), own, kept)
        if refills and number >= manifest.step:
            dropped += step.sampled
        else:
            steps[number] = step
    return steps, dropped


def restore_stream(
    stream: RolloutStream, arrays: Kept, prompts: PromptSource, sampler: Sampler, *, refills: bool
) -> None:
    """Let the stream go on with the sequences of a checkpoint. Those that are generated again leave
    the ledger."""
    of_stream = _below(arrays, "stream/")
    stream.sampled = int(of_stream.pop("sampled", np.zeros(1))[0])
    of_steps: dict[int, Kept] = {}
    for name, array in of_stream.items():
        step, _, part = name.partition("/")
        of_steps.setdefault(int(step), {})[part] = array
    for number in sorted(of_steps):
        if refills:
            stream.sampled -= int(of_steps[number]["lengths"].sum())
        else:
            stream.restore(number, prompts.step(number), sampler, of_steps[number])


def _below(arrays: Kept, prefix: str) -> Kept:
    """The arrays whose names begin with a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
