"""The data of a job: where prompts come from, how they are put to the model, how responses are
sampled, and on what the model is evaluated."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from planner.spec.files import Spec

StopToken = Annotated[int, Field(strict=True, ge=0, lt=2**24)]
StopText = Annotated[str, Field(strict=True, min_length=1)]
ColumnName = Annotated[str, Field(strict=True, min_length=1)]
TooLong = Literal["error", "drop", "truncate"]


class DataFile(Spec):
    """One source of rows: a file or a directory (`path`), or a data set of the Hugging Face hub.
    `split` chooses among several parts of it, `config` one of a hub's. With a `weight` for any
    source of a list, sources are mixed by weight."""

    path: Path | None = None
    hub: Annotated[str, Field(min_length=1)] | None = None
    config: str | None = None
    split: str | None = None
    weight: PositiveFloat | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either a path or the name of a data set of the hub")
        if self.config is not None and self.hub is None:
            raise ValueError("config is for a data set of the hub; choose a part by its split")
        return self

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.path) if self.hub is None else f"{self.hub} (of the hub)"


OneOrMore = (
    Path | DataFile | Annotated[tuple[Path | DataFile, ...], Field(min_length=1, max_length=1000)]
)


def files_of(given: OneOrMore | None) -> tuple[DataFile, ...]:
    """The sources that a key names."""
    if given is None:
        return ()
    several = given if isinstance(given, tuple) else (given,)
    return tuple(each if isinstance(each, DataFile) else DataFile(path=each) for each in several)


def with_paths(given: Any, written: Callable[[Path], str]) -> Any:
    """Write the paths of sources in another way, in what was parsed and in what was not yet."""
    match given:
        case str() | Path():
            return type(given)(written(Path(given)))
        case DataFile(path=Path() as path):
            return given.changed(path=Path(written(path)))
        case {"path": str(path)}:
            return {**given, "path": written(Path(path))}
        case list() | tuple():
            return type(given)(with_paths(each, written) for each in given)
    return given


class Sampling(Spec):
    """What an engine cuts off before it draws a token: all but the likeliest tokens that together
    have the probability `top_p`, all but the `top_k` likeliest (0: none), all that are less than
    `min_p` times as likely as the likeliest one, and what would end a response before it has
    `min_tokens` other tokens."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**24)] = 0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    min_tokens: Annotated[int, Field(ge=0, lt=2**24)] = 0

    @property
    def cuts(self) -> list[str]:
        """What is set, in words: each makes other log-probs than a trainer computes."""
        cutting = {name: getattr(self, name) for name in Sampling.model_fields}
        default = Sampling()
        return [f"{key} = {x:g}" for key, x in cutting.items() if x != getattr(default, key)]


class Sampler(Sampling):
    """All that an engine is told of sampling. At a temperature of 0 it takes the likeliest token
    always."""

    temperature: NonNegativeFloat = 0.0


class EvaluationSet(Sampler):
    """One set of held-out prompts, with `samples` responses to each. A response counts as right
    from a score of `passing` on. Columns are those of the training data unless named here."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
    files: OneOrMore
    prompt: ColumnName | None = None
    answer: ColumnName | None = None
    samples: Annotated[int, Field(gt=0, le=1024)] = 1
    passing: float = 1.0

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples = {self.samples} at temperature 0 are equal ones; set a temperature"
            )
        return self


class Data(Spec):
    """Where prompts come from. `prompt` and `answer` are names of columns, with dots for what is
    nested; by default an `answer` may be missing. A prompt is a text or a list of messages with
    `role` and `content`; the tokenizer's chat `template` is applied to messages, and to texts if
    it is asked for."""

    train: OneOrMore
    prompt: ColumnName = "prompt"
    answer: ColumnName | None = None
    template: Literal["chat", "none"] | None = None
    system: Annotated[str, Field(min_length=1)] | None = None
    template_args: dict[str, Any] = {}
    overlong: TooLong = "error"  # what happens to prompts that are too long
    # What ends a response besides the model's EOS: tokens, and strings.
    stop: tuple[StopToken | StopText, ...] = ()
    evaluation: OneOrMore | None = None
    evaluate_every: Annotated[int, Field(ge=0, le=100_000)] = 0  # 0: never
    evaluate_first: bool = False  # before the first step too
    evaluation_responses: Annotated[int, Field(ge=0, le=2**40)] | None = None  # of one evaluation

    @model_validator(mode="after")
    def _template_is_used(self) -> Self:
        if self.template == "none" and (self.system is not None or self.template_args):
            raise ValueError('system and template_args need template = "chat"')
        if self.evaluate_first and not self.evaluate_every:
            raise ValueError("evaluate_first is set but evaluate_every is not")
        return self

    @property
    def files(self) -> tuple[DataFile, ...]:
        """The sources of the prompts to train on."""
        return files_of(self.train)


def count_evaluation(data: Data, sets: tuple[EvaluationSet, ...]) -> int | None:
    """The responses that an evaluation generates, from the lines of its files; None where one is
    not here, or not of JSON lines."""
    total = 0
    named = [(file, 1) for file in files_of(data.evaluation)]
    for file, samples in named + [(file, s.samples) for s in sets for file in files_of(s.files)]:
        if file.path is None or file.path.suffix != ".jsonl" or not file.path.is_file():
            return None
        try:
            with file.path.open("rb") as lines:
                total += samples * sum(1 for line in lines if line.strip())
        except OSError:
            return None
    return total


def check_evaluation(data: Data | None, sets: tuple[EvaluationSet, ...]) -> None:
    """Raise ValueError for evaluations that never come, and for those of nothing."""
    names = [each.name for each in sets]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two evaluations are called {min(doubled)!r}; give each its own name")
    if sets and (data is None or not data.evaluate_every):
        raise ValueError("there are evaluations, but data.evaluate_every does not say when")
    if data is not None and data.evaluate_every and not sets and data.evaluation is None:
        raise ValueError("data.evaluate_every is set but there is no evaluation file")


def check_sampling(sampling: Sampling, longest: int, *, weighted: bool) -> None:
    """Raise ValueError for sampling under which the loss would be wrong. The engine's log-probs are
    of what it drew from, those of trainers are of all tokens. Importance weights put that right,
    where samples are `weighted`: by log-probs that a trainer recomputes."""
    if sampling.cuts and not weighted:
        raise ValueError(
            f"{sampling.cuts[0]} makes the engine's log-probs other ones than a trainer's, which "
            'only importance weights put right; set proximal = "recompute" and '
            f'algorithm.importance = "token", or leave out {sampling.cuts[0].split(" ")[0]}'
        )
    if sampling.min_tokens > longest:
        raise ValueError(
            f"min_tokens = {sampling.min_tokens} is above the longest response ({longest})"
        )
