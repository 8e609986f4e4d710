"""A reward function of the user's: `file.py:name`, called with prompts, responses and answers."""

import ast
import importlib.util
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from numbers import Real
from pathlib import Path
from typing import Any

from executor.fleet.worker import Worker
from planner.spec.errors import UserError
from planner.spec.workload import RewardFunction

Function = Callable[[list[str], list[str], list[str | None]], Sequence[float]]


def look(reward: RewardFunction) -> None:
    """Whether there is a Python file of that name, without running it. Raises UserError."""
    path, _ = _named(reward)
    try:
        ast.parse(path.read_bytes(), str(path))
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise UserError(
            f"reward function {reward.function!r} cannot be imported: {_one_line(error)}"
        ) from None


def _named(reward: RewardFunction) -> tuple[Path, str]:
    file, _, name = reward.function.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(
            f"reward function {reward.function!r}: there is no file {path}; check the path"
        )
    return path, name


def import_function(reward: RewardFunction) -> Function:
    """Import the function from the file that the user named. Raises UserError."""
    path, name = _named(reward)
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(
            f"reward function {reward.function!r}: {path} is no Python file; name one that ends in "
            ".py"
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"reward function {reward.function!r} cannot be imported: {_one_line(error)}"
        ) from None
    function: Function | None = getattr(module, name, None)
    if not callable(function):
        raise UserError(
            f"reward function {reward.function!r}: {path} has no function {name!r}; check its name"
        )
    _check_takes(reward, function)
    return function


def _check_takes(reward: RewardFunction, function: Function) -> None:
    """Raise UserError for a function that cannot be called with what it will be given."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # what is not written in Python may not tell
        return
    try:
        signature.bind([], [], [])
    except TypeError:
        raise UserError(
            f"reward function {reward.function!r} takes {signature}, and is called with (prompts, "
            "responses, answers); "
            "let it take these three lists"
        ) from None


def check(reward: RewardFunction) -> None:
    """Import the function once, within the time that the user gives it. Raises UserError."""
    outcome: Future[Function] = Future()

    def run() -> None:
        try:
            outcome.set_result(import_function(reward))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # one that hangs must not keep us from ending
    try:
        outcome.result(reward.timeout_seconds)
    except TimeoutError:
        raise import_hangs(reward) from None


def import_hangs(reward: RewardFunction) -> UserError:
    return UserError(
        f"reward function {reward.function!r}: its file took longer than "
        f"{reward.timeout_seconds:g} s to import; "
        "load what is slow in the function, or raise timeout_seconds"
    )


def score(
    reward: RewardFunction,
    function: Function,
    prompts: list[str],
    responses: list[str],
    answers: list[Any],
) -> list[float]:
    """The function's rewards, one finite number per response. Raises UserError if it fails or
    returns anything else."""
    called = f"reward function {reward.function!r}"
    try:
        rewards = list(function(prompts, responses, answers))
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{called} failed: {_one_line(error)}; it takes (prompts, responses, answers)"
        ) from None
    if len(rewards) != len(responses):
        raise UserError(
            f"{called} returned {len(rewards)} rewards for {len(responses)} responses; one each is "
            "needed"
        )
    for row, value in enumerate(rewards):
        if not (isinstance(value, Real) or hasattr(value, "item")) or not math.isfinite(
            _number(value)
        ):
            shown = repr(value)[:60]
            raise UserError(
                f"{called} returned {shown} for prompt {prompts[row][:60]!r}; it must be a finite "
                "number"
            )
    return [_number(value) for value in rewards]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class RewardWorker(Worker):
    """The process that runs the function, so that neither its time nor its end is the
    controller's."""

    def import_function(self, reward: RewardFunction) -> None:
        self.reward, self.function = reward, import_function(reward)

    def score(self, prompts: list[str], responses: list[str], answers: list[Any]) -> list[float]:
        return score(self.reward, self.function, prompts, responses, answers)
