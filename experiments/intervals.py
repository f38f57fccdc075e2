"""The statistics of the tables: means over seeds and differences of means, each with its 95 % interval.

mean          m +- t_{0.975, n-1} s / sqrt(n)    s: sample standard deviation over n seeds
difference    Welch, 1947: the two standard deviations may differ

Shares of questions have the interval of `plainrl.several_samples.wilson_interval`.
"""

import math
import statistics
from collections.abc import Sequence

from scipy import stats


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % t-interval; the half width of one value is 0.

    >>> mean_and_half_width([0.5])
    (0.5, 0.0)
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, 0.0
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def difference_and_half_width(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Return the difference of two means, and half the width of its 95 % interval.

    Args:
        values: one value per seed, at least two.
        baseline: likewise; its mean is subtracted.

    Source: Welch, "The generalization of Student's problem", 1947.
    """
    if statistics.pstdev(values) == statistics.pstdev(baseline) == 0:
        return statistics.fmean(values) - statistics.fmean(baseline), 0.0
    low, high = stats.ttest_ind(values, baseline, equal_var=False).confidence_interval()
    return float(low + high) / 2, float(high - low) / 2
