"""Paired differences between two arms over seeds, and families of tests."""

import math
import statistics
from dataclasses import dataclass, replace

from scipy import stats

from examples.compare.experiments import Hypothesis
from examples.compare.table import Table


@dataclass(frozen=True)
class Difference:
    """Arm minus the one that it is compared with, over seeds that both ran.

    Attributes:
        hypothesis: what is tested.
        ours, theirs: values of the arm and of the other one, in the order of seeds.
        values: their differences.
        mean: of these.
        low, high: Student's 95 % interval of it, not corrected; infinite with one seed.
        p: of the paired t test, two-sided; nan with one seed, or where all values are the same.
        corrected: the same after Holm's correction over the family.
        signed_rank: p of Wilcoxon's test.
    """

    hypothesis: Hypothesis
    ours: tuple
    theirs: tuple
    low: float
    high: float
    p: float
    corrected: float
    signed_rank: float

    @property
    def values(self) -> tuple:
        return tuple(a - b for a, b in zip(self.ours, self.theirs))

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def lower(self) -> int:
        """Seeds in which the arm's value is the lower one."""
        return sum(value < 0 for value in self.values)


def family(table: Table, hypotheses) -> list:
    """Differences of the hypotheses of a family that have a shared seed, corrected for as many as it has in all."""
    found = []
    for hypothesis in hypotheses:
        arm, against = (table.of(name, hypothesis.measure) for name in (hypothesis.arm, hypothesis.against))
        if seeds := sorted(arm.keys() & against.keys()):
            found.append(difference(hypothesis, *(tuple(of[seed] for seed in seeds) for of in (arm, against))))
    corrected = holm([one.p for one in found], len(hypotheses))
    return [one if math.isnan(one.p) else replace(one, corrected=p) for one, p in zip(found, corrected)]


def difference(hypothesis: Hypothesis, ours: tuple, theirs: tuple) -> Difference:
    """A difference by itself, corrected for nothing."""
    if len(ours) == 1:
        return Difference(hypothesis, ours, theirs, -math.inf, math.inf, math.nan, math.nan, math.nan)
    test = stats.ttest_rel(ours, theirs)
    low, high = map(float, test.confidence_interval())
    signed_rank = float(stats.wilcoxon(ours, theirs).pvalue) if ours != theirs else math.nan
    return Difference(hypothesis, ours, theirs, low, high, float(test.pvalue), float(test.pvalue), signed_rank)


def holm(p_values: list, number: int) -> list:
    """Holm's step-down correction (Scand. J. Statist. 6, 1979) of p values, for a family of ``number`` hypotheses."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (number - rank) * p_values[i]))
        corrected[i] = least
    return corrected
