"""The file of a user's reward function: imported and called as ordinary Python.

Loads little, for it also runs in a process of its own that only tries whether a file can be
imported (`reward.check`)."""

import ast
import importlib.util
import inspect
import json
import math
import os
import signal
import sys
import traceback
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from executor.data.math_verify import check_math_verify, verified
from executor.data.reward_forms import (
    FORMS,
    Function,
    Samples,
    call,
    form_of,
    misfit,
    needed_columns,
)
from planner.spec.errors import UserError
from planner.spec.rewards import MATH_VERIFY, Form, RewardFunction

VERLS_NAME = "compute_score"


class Rewarded(NamedTuple):
    """A reward function and how it is called."""

    function: Function
    form: Form


def look(reward: RewardFunction) -> None:
    """Whether there is a Python file of that name, without running it. Raises UserError."""
    path, _ = _named(reward)
    try:
        ast.parse(path.read_bytes(), str(path))
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise _not_imported(reward, error) from None


def import_function(reward: RewardFunction) -> Rewarded:
    """Import the function from the file that the user named, or find it by its name. Raises
    UserError."""
    if reward.function == MATH_VERIFY:
        check_math_verify()
        return Rewarded(verified, "splitplan")
    path, name = _named(reward)
    module = _module(reward, path)
    function = getattr(module, name, None) if name else _only(reward, module)
    if not callable(function):
        raise UserError(
            f"reward function {reward.function!r}: {path} has no function {name!r}; check its name"
        )
    found = Rewarded(function, reward.form or form_of(function))
    _check_takes(reward, found)
    return found


def _named(reward: RewardFunction) -> tuple[Path, str]:
    path = Path(reward.file)
    if not path.is_file():
        raise UserError(
            f"reward function {reward.function!r}: there is no file {path}; check the path"
        )
    return path, reward.in_file


def _only(reward: RewardFunction, module: ModuleType) -> Any:
    """The one function that a file defines, or the one that has the name that verl asks for."""
    there = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
    if len(there) != 1 and VERLS_NAME not in there:
        what = f"has the functions {', '.join(there)}" if there else "has no function"
        raise UserError(
            f"reward function {reward.function!r}: {reward.file} {what}; name one with "
            f'"{Path(reward.file).name}:function"'
        )
    return getattr(module, VERLS_NAME if VERLS_NAME in there else there[0])


def _module(reward: RewardFunction, path: Path) -> ModuleType:
    """The file as a module that it finds itself under in `sys.modules`, as dataclasses and pickling
    ask for, with its folder where imports look first, as that of a script."""
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(
            f"reward function {reward.function!r}: {path} is no Python file; name one that ends in "
            ".py"
        )
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _not_imported(reward, error) from None
    return module


def _module_name(path: Path) -> str:
    """The file's own name, by which a fresh process can import it too, unless that means another
    module."""
    name = path.stem
    there = sys.modules.get(name)
    taken = name in sys.stdlib_module_names or (
        there is not None and getattr(there, "__file__", None) != str(path)
    )
    return name if name.isidentifier() and not taken else f"reward_{name.replace('.', '_')}"


def _check_takes(reward: RewardFunction, found: Rewarded) -> None:
    """Raise UserError for a function that cannot be called with what it will be given."""
    if misfit(found.function, found.form):
        raise UserError(
            f"reward function {reward.function!r} takes {inspect.signature(found.function)}, and "
            f"is called with {FORMS[found.form]}; let it take these, or set form"
        )


def score(reward: RewardFunction, found: Rewarded, samples: Samples) -> list[float]:
    """The function's rewards, one finite number per response. Raises UserError if it fails or
    returns anything else."""
    called = f"reward function {reward.function!r}"
    try:
        rewards = call(found.function, found.form, samples)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{called} failed: {_told(reward, error)}; it is called with {FORMS[found.form]}"
        ) from None
    return checked(called, rewards, samples)


def checked(called: str, rewards: list[Any], samples: Samples) -> list[float]:
    """One finite number per response. Raises UserError for anything else."""
    if len(rewards) != len(samples):
        raise UserError(
            f"{called} returned {len(rewards)} rewards for {len(samples)} responses; one each is "
            "needed"
        )
    numbers = [_number(value) for value in rewards]
    for prompt, value, number in zip(samples.prompts, rewards, numbers, strict=True):
        if not math.isfinite(number):
            raise UserError(
                f"{called} returned {repr(value)[:60]} for prompt {prompt[:60]!r}; it must be a "
                "finite number of float32"
            )
    return numbers


def _number(value: Any) -> float:
    """The value, NaN or infinity where float32, in which scores are kept, holds no such number."""
    if not isinstance(value, Real) and not hasattr(value, "item"):
        return math.nan
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan
    with np.errstate(over="ignore"):
        return found if np.isfinite(np.float32(found)) else math.inf


def _not_imported(reward: RewardFunction, error: BaseException) -> UserError:
    return UserError(
        f"reward function {reward.function!r} cannot be imported: {_told(reward, error)}"
    )


def _told(reward: RewardFunction, error: BaseException) -> str:
    """An error in one line, with the last line of the user's file that it came through, or where
    it was raised."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    path = Path(reward.file)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) == path]
    if own:
        line += f" ({path.name}:{own[-1].lineno})"
    elif frames and Path(frames[-1].filename).parent == path.parent:
        line += f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return line


def try_import(given: str, seconds: float, reply: str) -> None:
    """Import a function, which is given as JSON of a `RewardFunction`, and write into the file
    `reply` what is wrong with it, if anything, and the columns that it asks for. The kernel ends
    this process if that takes longer than so many seconds."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    problem, columns = "", list[str]()
    try:
        found = import_function(RewardFunction.model_validate_json(given))
        columns = needed_columns(found.function) if found.form == "trl" else []
    except UserError as error:
        problem = str(error)
    answer = json.dumps({"problem": problem, "columns": columns})
    Path(reply).write_text(answer, encoding="utf-8")
    os._exit(0)  # whatever threads the file has started
