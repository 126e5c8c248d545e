"""Paired differences between two arms, with confidence intervals by Student's t distribution."""

import math
import statistics
from dataclasses import dataclass
from functools import lru_cache


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
    return Difference(values, mean, t_quantile(0.5 + confidence / 2, len(values) - 1) * error)


@lru_cache
def t_quantile(probability: float, degrees: int) -> float:
    """The value below which Student's t with these degrees of freedom lies with a probability >= 1/2."""
    low, high = 0.0, 1.0
    while t_distribution(high, degrees) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_distribution(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def t_distribution(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0, by the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    if degrees % 2:
        term, total = cosine, (cosine if degrees > 1 else 0.0)
        for n in range(3, degrees - 1, 2):
            term *= cosine**2 * (n - 1) / n
            total += term
        return 0.5 + (angle + sine * total) / math.pi
    term = total = 1.0
    for n in range(2, degrees - 1, 2):
        term *= cosine**2 * (n - 1) / n
        total += term
    return 0.5 + sine * total / 2
