"""Length distributions of prompts and responses, in tokens."""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from planner.spec.files import Spec, Tokens

MOST_SIGMA = 10.0


class Fixed(Spec):
    """Every sequence has the same length."""

    kind: Literal["fixed"] = "fixed"
    tokens: Tokens

    @property
    def longest(self) -> int:
        return self.tokens

    def sample(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return np.full(count, self.tokens, dtype=np.int64)


class Lognormal(Spec):
    """Lognormal with `mean` before truncation and `sigma` of the logarithm; longer draws are cut at
    `max`."""

    kind: Literal["lognormal"] = "lognormal"
    mean: Annotated[float, Field(gt=0, le=2**24)]
    sigma: Annotated[float, Field(gt=0, le=MOST_SIGMA)]
    max: Tokens

    @model_validator(mode="after")
    def _mean_fits(self) -> "Lognormal":
        if self.mean > self.max:
            raise ValueError(
                f"mean = {self.mean:g} is above max = {self.max}; lower mean or raise max"
            )
        return self

    @property
    def longest(self) -> int:
        return self.max

    def sample(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        drawn = rng.lognormal(np.log(self.mean) - self.sigma**2 / 2, self.sigma, count)
        return np.clip(np.rint(drawn), 1, self.max).astype(np.int64)


class Empirical(Spec):
    """Lengths drawn with equal chance from a list of observed ones, cut at `max`. What is really
    generated may be longer than any that was observed, up to `max`."""

    kind: Literal["empirical"] = "empirical"
    values: Annotated[tuple[Tokens, ...], Field(min_length=1)]
    max: Tokens

    @model_validator(mode="after")
    def _some_fit(self) -> "Empirical":
        if min(self.values) > self.max:
            raise ValueError(f"every value is above max = {self.max}; raise max")
        return self

    @property
    def longest(self) -> int:
        return self.max

    def sample(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        drawn: NDArray[np.int64] = rng.choice(np.asarray(self.values, dtype=np.int64), count)
        return np.minimum(drawn, self.max)


Lengths = Annotated[Fixed | Lognormal | Empirical, Field(discriminator="kind")]


def sample(lengths: Fixed | Lognormal | Empirical, count: int, *key: int) -> NDArray[np.int64]:
    """`count` lengths [count] in tokens that depend on the key (seed, step, ...) alone."""
    return lengths.sample(count, np.random.default_rng(key))
