"""How a reward function is called: in our form, as verl calls it, or as TRL does. Files that people
have run as they are.

    splitplan   f(prompts, responses, answers) -> a number per response
    verl        f(data_source, solution_str, ground_truth, extra_info) -> a number, or a dictionary
                with "score"; called once per response
    trl         f(prompts, completions, **columns) -> a number per response, or None for one that it
                does not judge; completions of prompts that are messages are messages too

verl: https://verl.readthedocs.io/en/latest/preparation/reward_function.html
TRL: https://huggingface.co/docs/trl/main/en/rewards"""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from planner.spec.rewards import Form

Function = Callable[..., Any]
VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
TRL = ("prompts", "completions")
FORMS: dict[Form, str] = {
    "splitplan": "(prompts, responses, answers)",
    "verl": "(data_source, solution_str, ground_truth, extra_info) by name",
    "trl": "(prompts, completions) and the columns of the data by name",
}


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Responses and what rewards are told of them, a row each: the prompt as the model got it and
    as the data has it (a text or messages), the answer, and all columns."""

    prompts: list[str]
    asked: list[Any]
    responses: list[str]
    answers: list[Any]
    columns: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.responses)

    def take(self, rows: Sequence[int]) -> "Samples":
        def chosen(given: list[Any]) -> list[Any]:
            return [given[row] for row in rows]

        return Samples(
            prompts=chosen(self.prompts),
            asked=chosen(self.asked),
            responses=chosen(self.responses),
            answers=chosen(self.answers),
            columns=chosen(self.columns),
        )


def form_of(function: Function) -> Form:
    """The form that the names of a function's parameters tell; ours if they tell nothing."""
    names = set(_parameters(function))
    if names & {"solution_str", "solution_strs", "ground_truth", "data_source"}:
        return "verl"
    return "trl" if "completions" in names else "splitplan"


def misfit(function: Function, form: Form) -> bool:
    """Whether a function cannot be called in a form, whatever the data."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # what is not written in Python may not tell
        return False
    try:
        if form == "splitplan":
            signature.bind([], [], [])
        elif form == "verl":
            signature.bind(**dict.fromkeys(VERL))
        else:  # whatever it names it may be given
            signature.bind(**dict.fromkeys(signature.parameters))
    except TypeError:
        return True
    return False


def needed_columns(function: Function) -> list[str]:
    """The columns of the data that a function of TRL's form cannot do without."""
    empty = inspect.Parameter.empty
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        name
        for name, each in _parameters(function).items()
        if each.kind in named and each.default is empty and name not in (*TRL, "answer")
    ]


def _parameters(function: Function) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def call(function: Function, form: Form, samples: Samples) -> list[Any]:
    """What a function returns for each response."""
    if form == "verl":
        return _as_verl(function, samples)
    if form == "trl":
        return _as_trl(function, samples)
    return list(_returned(function(samples.prompts, samples.responses, samples.answers)))


def _as_verl(function: Function, samples: Samples) -> list[Any]:
    found = []
    rows = zip(samples.columns, samples.responses, samples.answers, strict=True)
    for columns, response, answer in rows:
        source, extra = columns.get("data_source"), columns.get("extra_info")
        given = dict(zip(VERL, (source, response, answer, extra), strict=True))
        score = _returned(function(**given))
        if isinstance(score, dict):
            score = score["score"]
        found.append(score[0] if isinstance(score, tuple | list) else score)
    return found


def _as_trl(function: Function, samples: Samples) -> list[Any]:
    asked = samples.asked
    completions = [
        response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]
        for prompt, response in zip(asked, samples.responses, strict=True)
    ]
    names = dict.fromkeys(name for columns in samples.columns for name in columns)
    given: dict[str, Any] = {"answer": samples.answers}
    given |= {name: [columns.get(name) for columns in samples.columns] for name in names}
    given |= {"prompts": asked, "completions": completions}
    parameters = _parameters(function)
    if not any(each.kind == inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        given = {name: values for name, values in given.items() if name in parameters}
    return [0.0 if score is None else score for score in _returned(function(**given))]


def _returned(found: Any) -> Any:
    """What a function returned, or what it will, where it is asynchronous."""
    return asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found


async def _awaited(found: Any) -> Any:
    return await found
