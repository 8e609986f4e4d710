"""Figures of a step besides those of the algorithm: spreads, and versions of weights."""

from collections import Counter
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.data.batch import Sequences
from executor.running.step_data import StepData


def version_figures(number: int, sequences: Sequences) -> dict[str, Any]:
    """Figures of the weights that sampled the sequences of a step: mean staleness of a token and
    newest version; sequences by the staleness of their oldest token, and the version of that in the
    order of the batch, as runs of [version, sequences]."""
    versions = sequences.weights_versions
    oldest, of_tokens = versions[:, 0].tolist(), versions[sequences.mask]
    staleness = Counter(number - version for version in oldest)
    return {
        "staleness": number - float(np.mean(of_tokens if len(of_tokens) else oldest)),
        "staleness_histogram": {str(lag): staleness[lag] for lag in sorted(staleness)},
        "weights_version": int(of_tokens.max()) if len(of_tokens) else max(oldest),
        "weights_versions": [[version, len(list(run))] for version, run in groupby(oldest)],
    }


def stream_figures(
    number: int, step: StepData, ledger: tuple[int, int, int], complete: int
) -> dict[str, Any]:
    """How far the tokens of a step lag behind, and the ledger of a stream (`RolloutStream.ledger`):
    all tokens that were sampled so far, and those of them that no step has yet been trained on.
    `complete` are the latter in steps whose batch is complete."""
    sequences, tokens, sampled = ledger
    of_tokens = step.sequences.weights_versions[step.sequences.mask]
    return {
        "staleness_max": number - int(of_tokens.min(initial=number)),
        "segments": step.sequences.mean_segments,
        "in_flight_sequences": sequences,
        "in_flight_tokens": tokens + complete,
        "sampled_tokens": sampled,
        "step_sampled_tokens": step.sampled,
        "trained_tokens": int(step.sequences.response_lengths.sum()),
    }


def spread_of(name: str, values: NDArray[Any]) -> dict[str, float]:
    """Standard deviation, least and largest of some values, by `<name>_std` and so on; nothing of
    none."""
    if not len(values):
        return {}
    found = {"std": values.std(), "min": values.min(), "max": values.max()}
    return {f"{name}_{kind}": float(value) for kind, value in found.items()}
