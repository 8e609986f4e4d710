"""Shapes of models that a log names: by a directory, a published name, or the parameters that it
counts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.spec.errors import UserError
from planner.spec.files import profiles_dir, read_data
from planner.spec.workload import Model, Shape
from planner.spec.workload_file import shape_of

CLOSE = 0.006  # relative: logs give three digits, and shapes leave out biases


@dataclass(frozen=True, kw_only=True)
class CountedModel:
    """A model as a log names it: its class and billions of parameters, rounded to hundredths."""

    architecture: str
    billions: float


def published() -> dict[str, dict[str, Any]]:
    """The models of profiles/models.toml by name."""
    return read_data(profiles_dir() / "models.toml")


def model_of(
    said: str, counted: Sequence[CountedModel], given: str | None, option: str
) -> tuple[Model, str]:
    """The model of a path or name in a log, and where its shape is from. `given` is what the user
    says of it, by `option`. Raises UserError, which asks for it, where nothing tells."""
    if given is not None:
        return _given(given, option)
    if (directory := Path(said).expanduser()).joinpath("config.json").is_file():
        return Model(shape=shape_of(directory, said), path=directory.resolve()), f"{said} here"
    known = published()
    name = Path(said).name.removesuffix("-Instruct")
    if name in known:
        return _random(known[name]), f"the published {name}"
    fits = [name for model in counted for name in known if _is(model, known[name])]
    if len(set(fits)) == 1:
        count = f"{counted[0].billions:g}B parameters of {counted[0].architecture}"
        return _random(known[fits[0]]), f"{fits[0]}, which has the {count} that the log counts"
    raise UserError(
        f"the log does not say the shape of {said!r}; give {option} with its directory, or one of "
        f"{', '.join(known)}"
    )


def _given(given: str, option: str) -> tuple[Model, str]:
    known = published()
    if given in known:
        return _random(known[given]), f"the published {given}"
    directory = Path(given)
    if not directory.is_dir():
        raise UserError(
            f"{option} {given}: no such directory, and no such model; known are {', '.join(known)}"
        )
    return Model(shape=shape_of(directory, option), path=directory.resolve()), f"{option} {given}"


def _random(entry: dict[str, Any]) -> Model:
    return Model(shape=Shape.model_validate(entry["shape"]), random_weights=True)


def _is(model: CountedModel, entry: dict[str, Any]) -> bool:
    """Whether a log's class and count are those of a published model, with or without its head."""
    family = re.match(r"[A-Z][a-z]+\d*", model.architecture)
    if family is None or family[0] != entry["architecture"]:
        return False
    shape = Shape.model_validate(entry["shape"])
    counts = (shape.parameters("lm"), shape.parameters("scalar"))
    counted = model.billions * 1e9
    return any(abs(count - counted) <= max(CLOSE * count, 0.006e9) for count in counts)
