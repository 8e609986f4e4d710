"""The reward function of a user, asked so that a sample on which it fails costs that sample and not
the run."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from executor.data.prompts import Prompts
from executor.data.reward import RewardWorker
from executor.fleet.asking import Answers, ask, to_each
from executor.fleet.worker import Died, Record
from executor.running.processes import Processes
from executor.running.run_directory import log
from executor.running.supervise import ONE_IN
from planner.spec.errors import UserError
from planner.spec.workload import RewardFunction


def judge(
    processes: Processes, reward: RewardFunction, prompts: Prompts, responses: Sequence[str]
) -> tuple[NDArray[np.float32], list[Record]]:
    """Scores `[B]`, NaN for samples to be dropped. If the batch as a whole raises, hangs or returns
    no finite numbers, each sample is tried again alone. Raises UserError, with the prompt named, if
    more than one in `ONE_IN` fail."""
    try:
        outcome = _ask(processes, reward, prompts, responses, range(len(responses)))
        return np.array(outcome.results[0], dtype=np.float32), outcome.records
    except UserError as error:
        log.warning("%s. Each sample is tried again alone", error)
    scores, records, failed = np.full(len(responses), np.nan, dtype=np.float32), [], 0
    for row in range(len(responses)):
        try:
            outcome = _ask(processes, reward, prompts, responses, [row])
            scores[row] = outcome.results[0][0]
            records += outcome.records
        except UserError as error:
            failed += 1
            line = f"prompt {prompts.texts[row][:60]!r}: {error}"
            if failed > max(1, len(responses) // ONE_IN):
                raise UserError(
                    f"{failed} of the first {row + 1} samples failed twice, the last one {line}"
                ) from None
            log.warning("dropped the sample of %s", line)
    return scores, records


def _ask(
    processes: Processes,
    reward: RewardFunction,
    prompts: Prompts,
    responses: Sequence[str],
    rows: Sequence[int],
) -> Answers[list[float]]:
    """Raises UserError; the process is a fresh one then if it hung or died."""
    texts = [prompts.texts[row] for row in rows]
    answers = [prompts.answers[row] for row in rows]
    given = [responses[row] for row in rows]
    try:
        order = to_each(processes.judge, RewardWorker.score, texts, given, answers)
        return ask(order, timeout=reward.timeout_seconds)
    except TimeoutError:
        what = f"took longer than {reward.timeout_seconds:g} s for {len(rows)} responses"
    except Died:
        what = f"ended its process, for {len(rows)} responses"
    processes.restart_judge()
    raise UserError(
        f"reward function {reward.function!r} {what}; make it faster or raise timeout_seconds"
    )
