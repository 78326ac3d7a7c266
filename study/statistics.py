"""Paired comparisons: two arms, seed by seed, so that what a seed does to both cancels."""

import math
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Comparison:
    """Of n paired differences: their mean, its 95 % interval by Student's t, and the two-sided p of a mean of zero.

    Below two pairs there is no interval: low, high and p are NaN. Equal pairs differ by exactly 0, with p = 1.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float


def compare(ours, theirs):
    """The Comparison of ours − theirs; both seed -> loss, paired where both have the seed."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    n = len(differences)
    if n == 0:
        return Comparison(0, *[math.nan] * 4)
    mean = math.fsum(differences) / n
    if n == 1:
        return Comparison(1, mean, *[math.nan] * 3)
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    if error == 0:
        return Comparison(n, mean, mean, mean, 1.0 if mean == 0 else 0.0)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return Comparison(n, mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, n - 1)))


def holm(ps):
    """The p-values corrected for their number (Holm 1979): those below 0.05 are found at a family-wise rate of 5 %.

    NaN, a planned test that is not done yet, stays; it counts, so that what is found remains so when it is done, where
    no p of the others changes.
    """
    tested = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    corrected, highest = list(ps), 0.0
    for rank, (p, i) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(ps) - rank)))
        corrected[i] = highest
    return corrected
