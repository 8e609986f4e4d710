"""Reading and writing the files that outlive a run. What is read is checked strictly; a file is
written whole or not at all."""

import contextlib
import json
import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from planner.spec.errors import UserError
from planner.spec.limits import MOST_SEED, MOST_STEPS

MOST_BYTES = 2**29  # of a file that is read at once

# Larger numbers than any job has would only fill the memory or overflow.
Count = Annotated[int, Field(gt=0, le=2**20)]  # of sequences, GPUs, heads, ...
Tokens = Annotated[int, Field(gt=0, le=2**24)]
Steps = Annotated[int, Field(gt=0, le=MOST_STEPS)]
Bytes = Annotated[int, Field(ge=0, le=2**56)]
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]


class Spec(BaseModel):
    """Base of everything parsed from a file: immutable, and an unknown key, NaN or infinity is an
    error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def changed(self, **values: Any) -> Self:
        """A copy with other values for some keys. It is checked as a file with these values would
        be, which pydantic's `model_copy` does not do; parts that stay are not checked again.
        Raises ValidationError, which is a ValueError."""
        kept = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**kept, **values})


class File(Spec):
    """A file of its own. Its first key is `schema`: `splitplan/<kind>/<version>`."""

    SCHEMA: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _check_schema(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "schema" not in data:
            return data
        if data["schema"] != cls.SCHEMA:
            raise ValueError(
                f"schema is {shown(data['schema'])}, but this version of splitplan reads "
                f"{cls.SCHEMA!r}"
            )
        return {key: value for key, value in data.items() if key != "schema"}

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON Schema of the file, its `schema` key included."""
        found = cls.model_json_schema()
        found["properties"] = {"schema": {"const": cls.SCHEMA}, **found["properties"]}
        found["required"] = ["schema", *found.get("required", [])]
        return found

    def to_json(self) -> str:
        body = self.model_dump(mode="json")
        return json.dumps({"schema": self.SCHEMA, **body}, indent=1, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        write_atomic(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Parse a JSON or TOML file (by its suffix). Raises UserError naming the file, the key and
        what to do."""
        data = read_data(path)
        cls.check_schema(data, path)
        return cls.parse(data, path)

    @classmethod
    def check_schema(cls, data: dict[str, Any], path: Path) -> None:
        """Raise UserError unless this is a file of this kind and version."""
        schema = data.get("schema")
        if schema is None:
            raise UserError(
                f'{path}: no "schema" key; a file of this kind starts with "schema": "{cls.SCHEMA}"'
            )
        if schema != cls.SCHEMA:
            kind = cls.SCHEMA.rpartition("/")[0] + "/"
            what = "name a file of that kind"
            if isinstance(schema, str) and schema.startswith(kind):
                what = "regenerate it, or use the splitplan version that wrote it"
            raise UserError(
                f"{path}: schema is {shown(schema)}, but {cls.SCHEMA!r} is needed here; {what}"
            )

    @classmethod
    def parse(cls, data: dict[str, Any], path: Path) -> Self:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(f"{path}: {first_problem(error, data)}") from None


def first_problem(error: ValidationError, data: Any) -> str:
    """The most telling problem of a pydantic error with `data`, in one line: `key.path:
    message`."""
    problems = error.errors(include_url=False)
    # Our own messages have advice, and a misspelt key explains a missing one.
    telling = {"value_error": 0, "extra_forbidden": 1}
    problem = min(problems, key=lambda each: telling.get(each["type"], 2))
    path = ".".join(_keys(problem["loc"], data, missing=problem["type"] == "missing"))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return ": ".join(filter(None, (path, _what(problem)))) + more


def _what(problem: ErrorDetails) -> str:
    """The problem in words, and what to do."""
    given, said = problem["input"], problem["msg"]
    match problem["type"]:
        case "value_error":
            return said.removeprefix("Value error, ")
        case "extra_forbidden":
            return "unknown key; remove it or check its spelling"
        case "missing":
            return "is missing; add it"
        case "union_tag_not_found":
            return f"{problem['ctx']['discriminator']} is missing; add it"
        case "union_tag_invalid":
            told = problem["ctx"]
            return (
                f"{told['discriminator']} is {told['tag']!r}; choose one of {told['expected_tags']}"
            )
        case "model_type":
            return f"needs a mapping of keys, not {shown(given)}"
    needed = said.replace("Input should be", "must be")
    return f"{needed}, not {shown(given)}" if isinstance(given, str | int | float) else needed


def shown(value: Any) -> str:
    """A value of a file, in one line of 60 characters at most."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:59]}…"


def _keys(path: Sequence[int | str], data: Any, *, missing: bool) -> Iterator[str]:
    """The part of a pydantic path that is in the file, and the last one if that is missing there:
    pydantic also names which member of a union was tried."""
    for number, part in enumerate(path):
        match data, part:
            case dict(), _ if part in data:
                data = data[part]
            case list(), int() if part < len(data):
                data = data[part]
            case _ if not (missing and number == len(path) - 1):
                continue
        key = str(part)
        yield key if key.isprintable() else repr(key)


def by_key(key: str, tag: str, otherwise: str) -> Discriminator:
    """Choose the member of a union with this tag where the mapping (or the member itself) has this
    key."""
    return by_keys({key: tag}, otherwise)


def by_keys(tags: Mapping[str, str], otherwise: str) -> Discriminator:
    """Choose the member of a union with the tag of the first key that the mapping (or the member
    itself) has."""

    def choose(value: Any) -> str:
        for key, tag in tags.items():
            if key in value if isinstance(value, dict) else hasattr(value, key):
                return tag
        return otherwise

    return Discriminator(choose)


def names_a_file(name: str) -> bool:
    """Whether a name is a path, and not the name of something shipped, such as h200-1.5b."""
    return "/" in name or Path(name).suffix in (".toml", ".json")


def read_text(path: Path, *, damaged: bool = False) -> str:
    """The text of a file. Where it may be `damaged`, as a log that was cut, bytes that are no UTF-8
    are replaced. Raises UserError."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)  # of a device there is no end
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if len(content) > MOST_BYTES:
        raise UserError(f"{path}: larger than {MOST_BYTES // 2**20} MiB; check the path")
    try:
        return content.decode("utf-8-sig", errors="replace" if damaged else "strict")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text (byte {error.start} is no UTF-8)") from None


def read_data(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or TOML file. Raises UserError."""
    text = read_text(path)
    try:
        data = tomllib.loads(text) if path.suffix == ".toml" else _json(text)
    except (ValueError, RecursionError) as error:
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise UserError(
            f"{path}: not valid {kind} ({error}); fix it there, or write the file again"
        ) from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a {type(data).__name__}, not a mapping of keys")
    return data


def _json(text: str) -> Any:
    return json.loads(text, parse_constant=_not_a_number, object_pairs_hook=_without_doubles)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object and refuse keys that stand twice. TOML forbids them by itself."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} appears twice")
        found[key] = value
    return found


def _not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write the file whole or not at all: a temporary file next to it, then one rename. Raises
    UserError."""
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); choose another place"
        ) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); choose another place"
        ) from None
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def profiles_dir() -> Path:
    """The folder of the shipped devices, workloads and profiles: inside the wheel, or next to the
    package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "profiles"
    return shipped if shipped.is_dir() else package.parent / "profiles"
