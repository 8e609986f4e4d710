"""A workload as it is read from its file: paths, shapes of models and what can be counted are found
before it is checked."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from planner.spec.algorithm import bring_up_to_date
from planner.spec.architectures import check_length, read_config, sizes
from planner.spec.data import count_evaluation, with_paths
from planner.spec.errors import UserError
from planner.spec.files import read_data
from planner.spec.rewards import MATH_VERIFY
from planner.spec.settings import set_in
from planner.spec.tokenizers import check_tokenizers
from planner.spec.workload import MODEL_ROLES, Shape, Workload


def load_workload(path: Path, settings: Sequence[str] = ()) -> Workload:
    """Read a workload from TOML or JSON, with other `settings` (`set_in`). Relative paths start at
    the file's folder; a model that is given by path alone gets its shape from its `config.json`.
    Raises UserError, also for a model that is not supported or has no positions for the longest
    sequence."""
    data = read_data(path)
    try:
        bring_up_to_date(data)  # before the settings, which name the keys of today
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    set_in(data, settings)
    find_files(data, path.resolve().parent, path)
    Workload.check_schema(data, path)
    workload = Workload.parse(data, path)
    check_lengths(workload)
    check_tokenizers(workload)
    return with_evaluation_counted(workload)


def with_evaluation_counted(workload: Workload) -> Workload:
    """The workload, which says how much an evaluation generates if that is known."""
    data = workload.data
    if data is None or not data.evaluate_every or data.evaluation_responses is not None:
        return workload
    counted = count_evaluation(data, workload.evaluation)
    return workload.changed(data=data.changed(evaluation_responses=counted))


def find_files(data: dict[str, Any], base: Path, path: Path) -> None:
    """Let the paths in a workload as it was read from `path` start at a folder, and give models
    that have a path alone their shapes. Raises UserError."""
    named = [(role, data.get(role)) for role in MODEL_ROLES]
    several = data.get("rewards")
    if isinstance(several, list):
        named += [(f"rewards.{number}", reward) for number, reward in enumerate(several)]
    for key, model in named:
        if isinstance(model, dict):
            _find_files_of(model, base, f"{path}: {key}")
    _resolve_data(data, base)


def _find_files_of(model: dict[str, Any], base: Path, named_by: str) -> None:
    """Let the paths of a model or a reward function start at `base`, and give a model that has a
    path alone its shape."""
    function = model.get("function")
    if isinstance(function, str) and function != MATH_VERIFY:
        file, _, name = function.rpartition(":")
        if file or function.endswith(".py"):
            model["function"] = f"{base / file}:{name}" if file else str(base / function)
    if isinstance(model.get("path"), str):
        model["path"] = str(base / model["path"])
        directory, named_by = Path(model["path"]), f"{named_by}.path"
        if "shape" not in model:
            model["shape"] = shape_of(directory, named_by).model_dump()
        elif (directory / "config.json").is_file():
            shape_of(directory, named_by)


def _resolve_data(data: dict[str, Any], base: Path) -> None:
    """Let the paths of data in a workload as it was read start at a folder."""
    sets = data.get("evaluation")
    named: list[tuple[Any, tuple[str, ...]]] = [(data.get("data"), ("train", "evaluation"))]
    named += [(each, ("files",)) for each in (sets if isinstance(sets, list) else [])]
    for part, keys in named:
        for key in keys:
            if isinstance(part, dict) and key in part:
                part[key] = with_paths(part[key], lambda path: str(base / path))


def shape_of(directory: Path, named_by: str) -> Shape:
    """The shape of a Hugging Face model directory, from its `config.json`. Raises UserError, also
    for a model that is not supported."""
    config = read_config(directory, named_by)
    try:
        return Shape(**sizes(config))
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"])) or "its sizes"
        problem = f"{where}: {wrong['msg'].removeprefix('Value error, ')}"
    except (KeyError, TypeError, ValueError) as error:
        problem = json.dumps(str(error).splitlines()[0])
    raise UserError(
        f"{directory / 'config.json'}: not a decoder-only transformer that splitplan knows "
        f"({problem})"
    )


def check_lengths(workload: Workload) -> None:
    """Whether the models have positions for the longest sequence; of a directory that is not here
    nothing is known. Raises UserError."""
    for role, model in workload.models.items():
        if model.path is not None and (model.path / "config.json").is_file():
            check_length(model.path, role, workload.longest, workload.prompt.longest)
