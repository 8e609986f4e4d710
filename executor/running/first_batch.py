"""What is worth saying before and after the first batch of a run: settings that are seldom meant,
and what the batch shows of mistakes."""

from collections.abc import Iterator
from typing import Any

from planner.spec.workload import Workload

NEARLY_ALL = 0.9  # of the responses: so many are cut by mistake
# Mean |log pi - log mu| per token. Engine and trainer in bf16 differ by 0.02 on random weights,
# whose distributions are the flattest (`log_prob_gap` in reports/h200), and by less on others.
MOST_GAP = 0.1


def beforehand(workload: Workload) -> list[str]:
    """A line about what makes the engine's log-probs other ones than the trainers'."""
    if not (cuts := workload.sampling.cuts):
        return []
    return [
        f"sampling with {', '.join(cuts)} draws from other probabilities than the model's: "
        "importance weights put that right, and log_prob_gap holds what is cut off"
    ]


def warnings(metrics: dict[str, Any], workload: Workload) -> Iterator[str]:
    """One line for each thing in a first step's metrics that is nearly always a mistake."""
    step = metrics["step"]
    if metrics.get("truncated_share", 0.0) >= NEARLY_ALL:
        yield (
            f"{metrics['truncated_share']:.0%} of the responses of step {step} were cut at the "
            "longest length: if the model ends them with another token or text than its "
            "generation_config.json says, name it in data.stop; or raise response.max"
        )
    least, most = metrics.get("score_min"), metrics.get("score_max")
    if least is not None and least == most and workload.batch > 1:
        yield (
            f"all responses of step {step} have the same score, {least:g}: nothing can be learned "
            "from that; look at some of them with plan samples, and at what the rewards look for"
        )
    gap = metrics.get("log_prob_gap", 0.0)
    if gap > MOST_GAP and metrics.get("staleness") == 0 and not workload.sampling.cuts:
        yield (
            f"the engine's log-probs of step {step} are {gap:.2g} per token from the trainers' of "
            "the same weights, and bf16 explains 0.02: engine and trainers may compute different "
            "models; try the other engine, and report what differs"
        )
