"""The processes of a reward function: one that tries whether its file can be imported, and those
that score."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from executor.data.reward_file import import_function, look, score
from executor.data.reward_forms import Samples
from executor.fleet.worker import Worker
from planner.spec.errors import UserError
from planner.spec.rewards import RewardFunction
from planner.spec.workload import Workload

__all__ = ["RewardWorker", "check", "import_function", "import_hangs", "look_at_all", "score"]

STARTING_SECONDS = 60.0  # of a process that imports no more than our own modules
TRY_IMPORT = """
import json, sys
sys.path[:], given, seconds, reply = json.loads(sys.argv[1])
from executor.data.reward_file import try_import
try_import(given, seconds, reply)
"""


def look_at_all(workload: Workload) -> None:
    """Whether the files of a workload's reward functions are Python, without running them. Raises
    UserError."""
    for reward in workload.host_rewards:
        if isinstance(reward, RewardFunction) and reward.file:
            look(reward)


def check(reward: RewardFunction) -> list[str]:
    """Import the function once, within the time that the user gives it, in a process of its own:
    what the file does then is not done to ours. The columns of the data that it asks for. Raises
    UserError."""
    with tempfile.TemporaryDirectory() as directory:
        reply = Path(directory) / "reply.json"
        told = reward.model_dump_json()
        given = json.dumps([sys.path, told, reward.timeout_seconds, str(reply)])
        ended_by = _run([sys.executable, "-P", "-c", TRY_IMPORT, given], reward.timeout_seconds)
        if reply.exists():
            answer = json.loads(reply.read_text(encoding="utf-8"))
            if answer["problem"]:
                raise UserError(answer["problem"])
            columns: list[str] = answer["columns"]
            return columns
    if ended_by in (None, signal.SIGALRM):
        raise import_hangs(reward)
    raise UserError(
        f"reward function {reward.function!r}: importing its file ended the process "
        f"({getattr(ended_by, 'name', ended_by)}); run the file with python alone to see why"
    )


def _run(command: list[str], seconds: float) -> signal.Signals | str | None:
    """What ended the process of a command: a signal or, in words, a status; None if it did not
    end. What it has started is ended with it."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        status = process.wait(seconds + STARTING_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return signal.Signals(-status) if status < 0 else f"exit status {status}"


def import_hangs(reward: RewardFunction) -> UserError:
    return UserError(
        f"reward function {reward.function!r}: its file took longer than "
        f"{reward.timeout_seconds:g} s to import; "
        "load what is slow in the function, or raise timeout_seconds"
    )


class RewardWorker(Worker):
    """The process that runs the function, so that neither its time nor its end is the
    controller's."""

    def import_function(self, reward: RewardFunction) -> None:
        self.reward, self.found = reward, import_function(reward)

    def score(self, samples: Samples) -> list[float]:
        return score(self.reward, self.found, samples)
