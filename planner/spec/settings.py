"""Settings of a workload that the command line gives: `--set algorithm.clip=0.3`."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planner.spec.errors import UserError

STARTING_HERE = ("path", "train", "evaluation", "files")  # keys of paths, which start where one is
# What is predicted of a plan holds while all else is as it was.
COSTLESS = ("name", "steps", "algorithm.", "optimizer.", "data.", "sampling.", "evaluation")
COSTLY = ("algorithm.epochs", "algorithm.oversampling_factor", "data.evaluate_every")


def set_in(data: dict[str, Any], settings: Sequence[str]) -> None:
    """Set keys of a workload as it is read from a file, in place. A value is written as in TOML;
    what is no TOML is a string, and nothing removes the key. Raises UserError."""
    for setting in settings:
        key, equals, text = setting.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise UserError(
                f"--set {setting}: write KEY=VALUE, such as algorithm.clip=0.3 or steps=50"
            )
        section: Any = data
        for number, part in enumerate(path[:-1]):
            section = _within(section, part, f"--set {setting}: {'.'.join(path[: number + 1])}")
        _put(section, path[-1], text.strip(), setting)


def _within(section: Any, part: str, named: str) -> Any:
    """The section of this name, made if there is none; one of a list by its number."""
    if isinstance(section, dict) and not part.isdigit():
        if section.get(part) is None:
            section[part] = {}
        found = section[part]
    elif isinstance(section, list) and part.isdigit() and int(part) < len(section):
        found = section[int(part)]
    else:
        found = None
    if not isinstance(found, dict | list):
        raise UserError(f"{named} is no section; check its spelling")
    return found


def _put(section: Any, name: str, text: str, setting: str) -> None:
    if not isinstance(section, dict):
        raise UserError(f"--set {setting}: name a key, such as rewards.0.weight=2")
    if not text:
        section.pop(name, None)
        return
    value = _value(text)
    if name == "path":
        section.pop("shape", None)  # which is the other model's
    in_file = name == "function" and ".py" in text
    if isinstance(value, str) and (name in STARTING_HERE or in_file):
        value = str(Path.cwd() / value)
    section[name] = value


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text


def forget_evaluation(data: dict[str, Any], settings: Sequence[str]) -> None:
    """Leave out how much an evaluation generates where settings change what it is of."""
    changed = any(setting.startswith(("evaluation", "data.evaluation")) for setting in settings)
    if changed and isinstance(files := data.get("data"), dict):
        files.pop("evaluation_responses", None)


def keep_costs(settings: Sequence[str]) -> bool:
    """Whether what is predicted of a plan still holds under other settings."""
    keys = [setting.partition("=")[0].strip() for setting in settings]
    return all(key.startswith(COSTLESS) and key not in COSTLY for key in keys)
