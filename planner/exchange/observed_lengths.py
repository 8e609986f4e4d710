"""The distribution of lengths that fits what a log says of them: mean, least, greatest, and the
share that was cut at the limit."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import NormalDist, fmean

from planner.spec.errors import UserError
from planner.spec.lengths import Fixed, Lognormal

MOST_LENGTH = 2**24  # tokens
NORMAL = NormalDist()
LEAST_SIGMA, MOST_SIGMA_FITTED = 0.01, 3.0
HALVINGS = 60  # of the interval in which a figure is sought


@dataclass(frozen=True, kw_only=True)
class SeenLengths:
    """What the steps of a run say of their lengths, in tokens, where they are `named` so: a figure
    for each step; `cut` is the share of sequences of the greatest length that is allowed,
    `limit`."""

    named: str
    means: Sequence[float]
    least: Sequence[float]
    most: Sequence[float]
    cut: float
    limit: int
    batch: int


def fitted(seen: SeenLengths) -> Fixed | Lognormal:
    """A fixed length where all sequences have the same one; else a lognormal one, cut at the limit,
    with the mean that was seen. Its sigma gives as many sequences at the limit as were seen; where
    there were none, it puts the greatest of them at its place among so many draws. Raises UserError
    for figures that are no lengths."""
    figures = (*seen.means, *seen.least, *seen.most)
    wrong = [figure for figure in figures if not 0 <= figure <= MOST_LENGTH]
    if wrong or not min(seen.means):
        raise UserError(
            f"{seen.named} of {(wrong or [0])[0]:g} tokens: no step has such lengths; is the file "
            "damaged?"
        )
    mean, most = fmean(seen.means), max(seen.most)
    if min(seen.least) == most:
        return Fixed(tokens=max(1, round(mean)))
    limit = max(seen.limit, round(most))
    drawn = seen.batch * len(seen.means)
    share = seen.cut if seen.cut > 0 else 1 / (drawn + 1)
    at = limit if seen.cut > 0 else most
    sigma = _sigma_for(mean, min(at, limit), share)
    before = _mean_before_cut(mean, sigma, limit)
    return Lognormal(mean=round(min(before, limit), 2), sigma=round(sigma, 4), max=limit)


def _sigma_for(mean: float, at: float, share: float) -> float:
    """The sigma with which a share of a lognormal distribution, whose mean is `mean` when cut at
    `at`, is longer than that."""
    low, high = LEAST_SIGMA, MOST_SIGMA_FITTED
    for _ in range(HALVINGS):
        sigma = (low + high) / 2
        before = _mean_before_cut(mean, sigma, at)
        longer = 1 - NORMAL.cdf((log(at) - log(before)) / sigma + sigma / 2)
        low, high = (sigma, high) if longer < share else (low, sigma)
    return (low + high) / 2


def _mean_before_cut(mean: float, sigma: float, limit: float) -> float:
    """The mean of a lognormal distribution whose mean is `mean` once what is longer than `limit` is
    cut there."""
    low, high = mean, 1000 * mean
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if _mean_when_cut(middle, sigma, limit) < mean else (low, middle)
    return low


def _mean_when_cut(mean: float, sigma: float, limit: float) -> float:
    """E[min(X, limit)] of a lognormal X with this mean (Aitchison & Brown 1957, chapter 2.2)."""
    mu = log(mean) - sigma**2 / 2
    place = (log(limit) - mu) / sigma
    below = exp(mu + sigma**2 / 2) * NORMAL.cdf(place - sigma)
    return below + limit * (1 - NORMAL.cdf(place))
