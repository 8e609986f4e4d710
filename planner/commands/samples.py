"""`plan samples`."""

import heapq
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import click
from pydantic import ValidationError

from planner.report.samples import SampleLine, told
from planner.spec.errors import UserError

FILE = "samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which samples to show: of one step or of all, of training or of evaluations (of all of them,
    or of one set), and of these the best or the worst ones."""

    step: int | None = None
    evaluation: bool = False
    only: str | None = None
    best: int | None = None
    worst: int | None = None

    def takes(self, sample: SampleLine) -> bool:
        right_kind = (sample.evaluation is not None) == (self.evaluation or self.only is not None)
        right_set = self.only is None or sample.evaluation == self.only
        return right_kind and right_set and self.step in (None, sample.step)

    def order(self, samples: Iterable[SampleLine]) -> Iterator[SampleLine]:
        """The samples in the order in which they are shown."""
        if self.best is not None:
            return iter(heapq.nlargest(self.best, samples, key=lambda each: _score(each, -1)))
        if self.worst is not None:
            return iter(heapq.nsmallest(self.worst, samples, key=lambda each: _score(each, 1)))
        return iter(samples)


def _score(sample: SampleLine, sign: int) -> float:
    """The score, behind all others where there is none."""
    return sign * math.inf if sample.score is None else sample.score


def samples(run: Path, choice: Choice) -> None:
    """Page through what the model said in a run. Raises UserError."""
    if choice.best is not None and choice.worst is not None:
        raise UserError("--best and --worst exclude each other; give one of them")
    chosen = choice.order(each for each in _read(run) if choice.takes(each))
    first = next(chosen, None)
    if first is None:
        raise UserError(f"{run / FILE}: {_what_there_is(run)}; ask for something of that")
    click.echo_via_pager(chain([told(first)], ("\n" + told(sample) for sample in chosen)))


def _read(run: Path) -> Iterator[SampleLine]:
    """The samples of a run; a last line that is being written is left out."""
    if not run.is_dir():
        raise UserError(
            f"{run}: no such run directory; give the one that `plan execute` named at its end"
        )
    path = run / FILE
    if not path.is_file():
        raise UserError(
            f"{run}: has no {FILE}; it is written as a run goes on, unless that has --samples 0"
        )
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield SampleLine.model_validate(json.loads(line))
            except (ValueError, ValidationError, RecursionError):
                raise UserError(
                    f"{path}:{number}: is no sample of this version of splitplan; remove the line"
                ) from None


def _what_there_is(run: Path) -> str:
    """The steps and evaluations of which there are samples, in words."""
    steps: dict[str, set[int]] = {}
    for sample in _read(run):
        steps.setdefault(sample.evaluation or "samples", set()).add(sample.step)
    parts = [
        f"{name} of step{'s' if len(found) > 1 else ''} {', '.join(map(str, sorted(found)))}"
        for name, found in steps.items()
    ]
    return f"has {'; '.join(parts)}" if parts else "is empty so far"
