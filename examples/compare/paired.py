"""Paired differences between two arms, with confidence intervals by Student's t distribution."""

import math
import statistics
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Difference:
    """Arm minus baseline over seeds that both ran.

    Attributes:
        values: of each seed.
        mean: of them.
        half_width: of the confidence interval around the mean; infinite with one seed.
    """

    values: tuple
    mean: float
    half_width: float

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def difference(arm: dict, baseline: dict, confidence: float = 0.95) -> Difference:
    """Of {seed: value} of an arm and of the baseline.

    Raises:
        ValueError: they share no seed.
    """
    values = tuple(arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys()))
    if not values:
        raise ValueError("the two arms share no seed")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Difference(values, mean, math.inf)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Difference(values, mean, float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1)) * error)
