"""What rates responses: one reward, or several with weights. Each is a Python function, a server or
a penalty on length; a model is one too (`RewardModel`, which is beside the other models)."""

from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator

from planner.spec.files import Count, Spec, Tokens

MATH_VERIFY = "math-verify"  # the function that is known by name
Form = Literal["splitplan", "verl", "trl"]
# Without a number one process scores the batch as a whole, once it is generated.
Processes = Annotated[
    Annotated[int, Field(ge=1, le=4096)] | None, Field(exclude_if=lambda count: count is None)
]

TimeLimit = Annotated[float, Field(gt=0, le=1e6)]


class Weighed(Spec):
    """What every reward may say: its `name` in the metrics, and what its scores become before they
    are added up. They are bounded (`clip`), then shifted and divided so that the batch has mean 0
    and standard deviation 1 (`normalize`), then multiplied by `weight`."""

    name: Annotated[str, Field(exclude_if=lambda name: not name)] = ""
    weight: Annotated[float, Field(exclude_if=lambda weight: weight == 1.0)] = 1.0
    clip: Annotated[tuple[float, float] | None, Field(exclude_if=lambda clip: clip is None)] = None
    normalize: Annotated[bool, Field(exclude_if=lambda normalize: not normalize)] = False

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip = {list(self.clip)}: the first bound has to be the lower one")
        return self

    @property
    @abstractmethod
    def default_name(self) -> str:
        """What the reward is called where it has no name of its own."""

    @property
    def label(self) -> str:
        return self.name or self.default_name


class RewardFunction(Weighed):
    """A Python function: `function = "file.py:name"`, or `"file.py"` where it has one only, or
    `"math-verify"`. Its `form` says how it is called, where its signature does not tell: with
    (prompts, responses, answers), as verl calls it, or as TRL does. The other keys are those of
    every `HostReward`."""

    function: str
    form: Annotated[Form | None, Field(exclude_if=lambda form: form is None)] = None
    seconds_per_sequence: NonNegativeFloat = 0.0
    timeout_seconds: TimeLimit = 60.0
    processes: Processes = None

    @model_validator(mode="after")
    def _file_and_name(self) -> Self:
        file, _, name = self.function.rpartition(":")
        known = self.function == MATH_VERIFY or self.function.endswith(".py")
        if not known and not (file and name):
            raise ValueError(
                f'{self.function!r} does not name a function; write "path/to/file.py:function", or '
                f'"{MATH_VERIFY}"'
            )
        return self

    @property
    def file(self) -> str:
        """The path of its file; empty for a function that is known by name."""
        if self.function == MATH_VERIFY:
            return ""
        return self.function if self.function.endswith(".py") else self.function.rpartition(":")[0]

    @property
    def in_file(self) -> str:
        """The function's name in its file; empty where the file is to have one only."""
        return self.function.removeprefix(self.file).removeprefix(":")

    def at(self, file: Path | str) -> str:
        """`function` with its file somewhere else."""
        return f"{file}:{self.in_file}" if self.in_file else str(file)

    @property
    def default_name(self) -> str:
        """The function without the folder that its file is in."""
        return Path(self.function).name


class RewardServer(Weighed):
    """An HTTP server at `url`, asked for `samples_per_request` samples at once, and up to `retries`
    times more where it does not answer."""

    url: str
    samples_per_request: Count = 32
    retries: Annotated[NonNegativeInt, Field(le=100)] = 3
    seconds_per_sequence: NonNegativeFloat = 0.0
    timeout_seconds: TimeLimit = 60.0
    processes: Processes = None

    @model_validator(mode="after")
    def _is_http(self) -> Self:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f'{self.url!r} is no address; write "http://host:port/path"')
        return self

    @property
    def default_name(self) -> str:
        return urlsplit(self.url).netloc.rpartition("@")[2]


# A reward that is asked from the host. With `processes` it scores samples as they finish, each
# alone and so many at a time; else the batch as a whole, once it is generated. A call may take
# `timeout_seconds`; the planner takes `seconds_per_sequence` for a sample.
HostReward = RewardFunction | RewardServer


class Overlong(Weighed):
    """A penalty on length: 0 up to `overlong_buffer` tokens before the longest response that is
    allowed, and from there falling to -1 at that length. DAPO's soft overlong punishment (Yu et al.
    2025, arXiv:2503.14476, eq. 13)."""

    overlong_buffer: Tokens

    @property
    def default_name(self) -> str:
        return "overlong"
