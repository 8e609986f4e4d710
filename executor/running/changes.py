"""What may differ between a run and the plan under which it goes on, and the content of the files
that its workload names: they may lie elsewhere now, if they hold the same."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from planner.spec.data import Data, DataFile, files_of
from planner.spec.errors import UserError
from planner.spec.rewards import RewardFunction
from planner.spec.workload import MODEL_ROLES, TRAINED, Workload

# They say nothing of what is computed.
UNTOLD = ("name", "steps", "max_staleness", "tensor_parallel")
# The next step is computed with what they say then. What is in flight was made by these settings.
MADE_BY = ("algorithm.temperature", "algorithm.kl_kind", "algorithm.oversampling_factor")
MAY_CHANGE = ("prompt", "response", "algorithm.", "optimizer.", "data.evaluat", "evaluation")
# Of each reward: what it is made of may change, but neither a model nor how many rewards there are.
REWARD = re.compile(r"rewards?(\.\d+)?\.")
FIXED_OF_REWARDS = ("path", "random_weights", "shape.")
MODEL_PATHS = tuple(f"{role}.path" for role in MODEL_ROLES)
DATA_SOURCES = ("data.train", "data.evaluation")
PLACES = (*MODEL_PATHS, *DATA_SOURCES)
FREE_FILES = ("data.evaluation", "evaluation")  # they may hold something else than before
WHOLE = ("prompt", "response", *DATA_SOURCES)  # what is told as one thing
MODEL_FILES = ("*.safetensors", "config.json", "tokenizer.json")
# Larger files are compared by their size and by so many blocks, spread evenly.
WHOLE_BYTES, BLOCKS, BLOCK_BYTES = 2**26, 64, 2**20


def content_of(workload: Workload) -> dict[str, str]:
    """A digest of each model directory and each file that a workload names, by its key there;
    nothing of those that are not there."""
    found = {key: digest(path) for key, path in _paths(workload).items()}
    return {key: value for key, value in found.items() if value}


def digest(path: Path) -> str:
    """The SHA-256 of a file, or of the weights, the configuration and the tokenizer in a directory,
    or of all files in one without them; empty if there is none, or none that can be read."""
    try:
        if path.is_file():
            return _of_file(path)
        files = sorted(file for pattern in MODEL_FILES for file in path.glob(pattern))
        if not files:  # no model, but data
            files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.name} {_of_file(file)}\n" for file in files]
    except OSError:
        return ""
    return hashlib.sha256("".join(lines).encode()).hexdigest() if files else ""


def _of_file(path: Path) -> str:
    size, found = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found.update(str(size).encode())
        for number in range(BLOCKS):
            file.seek(number * (size - BLOCK_BYTES) // (BLOCKS - 1))
            found.update(file.read(BLOCK_BYTES))
    return found.hexdigest()


def check_there(workload: Workload, run: Path) -> None:
    """Raise UserError for a model or a file that is not where the workload has it."""
    for key, path in _paths(workload).items():
        if not path.exists():
            raise UserError(
                f"{key}: nothing is at {path}; if it was moved, write where it is now into the "
                f"run's plan.json, and go on with: plan execute --resume {run} --plan "
                f"{run / 'plan.json'}"
            )


def changes(ours: Workload, theirs: Workload, saved: Mapping[str, str]) -> list[str]:
    """One line for each thing that differs between the workload of a run and that under which it
    goes on. `saved` is the content that our files had (none of what is not known). Raises
    ValueError with what may not differ."""
    old, new = _settings(ours), _settings(theirs)
    differ = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    told = [f"{key}: {_shown(old.get(key))} becomes {_shown(new.get(key))}" for key in differ]
    wrong = [key for key in differ if not _may_change(key, ours)]
    here, there = _paths(ours), _paths(theirs)
    for key in here.keys() & there.keys():
        before, after = saved.get(key) or digest(here[key]), digest(there[key])
        if before and after and before != after:
            told.append(f"{key}: {there[key]} is not what it was")
            if not key.startswith(FREE_FILES) and not _is_function(key):
                wrong.append(f"the content of {key}")
        elif here[key] != there[key]:
            same = "as before" if before else "nothing is known of what it held before"
            told.append(f"{key}: now {there[key]} ({same})")
    if wrong:
        raise ValueError(", ".join(dict.fromkeys(wrong)))
    return sorted(told)


def _may_change(key: str, ours: Workload) -> bool:
    if key == "prompt" and ours.data is None:  # other lengths would make other prompts
        return False
    if (reward := REWARD.match(key)) is not None:
        return not key[reward.end() :].startswith(FIXED_OF_REWARDS)
    return key.startswith(MAY_CHANGE) and key not in MADE_BY


def _is_place(key: str) -> bool:
    """Whether a key names a model or data."""
    return key in PLACES or (key.startswith("rewards.") and key.endswith(".path"))


def _is_function(key: str) -> bool:
    """Whether a key names a reward function, whose file may hold something else than before."""
    return key.startswith("reward") and key.endswith(".function")


def _settings(workload: Workload) -> dict[str, Any]:
    """What is said of a job by key, without the places of models and files."""
    flat = dict(_flat(workload.model_dump(mode="json")))
    for key in filter(_is_function, flat):
        flat[key] = flat[key].rpartition(":")[2]
    for role in TRAINED:  # the steps of a run say something where a learning rate decays with them
        if workload.optimizer.of(role).schedule != "constant":
            key = f"optimizer.{role}.decay_steps"
            flat[key] = flat[key] or workload.steps
    found = {key: value for key, value in flat.items() if key not in UNTOLD and not _is_place(key)}
    if workload.data is not None:
        for key, sources in _sources(workload.data).items():
            told = [
                source.model_dump(exclude={"path"}, exclude_defaults=True) for source in sources
            ]
            found |= {key: told} if any(told) or len(told) > 1 else {}
    return found


def _sources(data: Data) -> dict[str, tuple[DataFile, ...]]:
    return {"data.train": data.files, "data.evaluation": files_of(data.evaluation)}


def _shown(value: Any) -> str:
    """A value in few words; of lengths their kind and most important figures."""
    if isinstance(value, dict):
        parts = [f"{name} {_shown(each)}" for name, each in value.items() if name != "kind"]
        return f"{value.get('kind', '')} ({', '.join(parts)})".strip()
    if isinstance(value, list | tuple):
        return f"{len(value):,} values"
    return "nothing" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _paths(workload: Workload) -> dict[str, Path]:
    """The places of the models and files that a workload names, by key."""
    flat = dict(_flat(workload.model_dump(mode="json")))
    models = [key for key in flat if _is_place(key) and key not in DATA_SOURCES]
    named = {key: Path(flat[key]) for key in models if flat[key]}
    for number, reward in enumerate(workload.all_rewards):
        if isinstance(reward, RewardFunction) and reward.file:
            where = f"rewards.{number}" if workload.rewards else "reward"
            named[f"{where}.function"] = Path(reward.file)
    several = _sources(workload.data) if workload.data else {}
    several |= {f"evaluation.{each.name}": files_of(each.files) for each in workload.evaluation}
    for key, sources in several.items():
        paths = [source.path for source in sources if source.path is not None]
        alone = len(sources) == 1
        named |= {key if alone else f"{key}[{at}]": path for at, path in enumerate(paths)}
    return named


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value with its key: `algorithm.clip` for what stands in `[algorithm]`. Lengths and
    sources of data are whole; of several rewards there is their number too."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in WHOLE:
            yield from _flat(value, f"{key}.")
        elif key == "rewards":
            yield key, len(value)
            for number, reward in enumerate(value):
                yield from _flat(reward, f"{key}.{number}.")
        else:
            yield key, value
