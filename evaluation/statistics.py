"""Means and paired differences over runs, with 95 % bootstrap intervals that respect clusters.

Runs of one prompt are alike, so more seeds do not stand for more prompts: a bootstrap sample takes
as many prompts as there are, with replacement, each with the mean of its runs, so that every prompt
has the same weight, however many of its runs failed. (Drawing runs again too would count the seeds'
noise, which is in these means, twice.) The percentiles are those of Hesterberg (arXiv:1411.5279,
"expanded percentile"), Phi(-sqrt(n / (n - 1)) t) and its complement with t the 97.5 % quantile of
Student's distribution with n - 1 degrees of freedom: plain ones are too narrow for few prompts.
Differences that are nothing then exclude zero in 5 to 7 % of normal samples of 12 to 6 prompts, in
more of skewed ones.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

DRAWS = 10_000
# With fewer prompts even differences of one sign throughout are no evidence at the level of 5 %:
# the sign test of n prompts cannot go below 2 / 2^n.
ENOUGH_PROMPTS = 6

Runs = Mapping[tuple[str, str], float]  # (prompt, seed) -> value


@dataclass(frozen=True)
class Interval:
    """A mean over ``runs`` runs of ``prompts`` prompts; ``low`` and ``high`` are its 95 % interval,
    not a number with fewer than two prompts. ``neutral`` is the value that says "no difference"."""

    mean: float
    low: float
    high: float
    runs: int
    prompts: int
    neutral: float = 0.0

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval is above or below ``neutral`` and there are enough prompts
        to say so, else 0."""
        if self.prompts < ENOUGH_PROMPTS:
            return 0
        return int(self.low > self.neutral) - int(self.high < self.neutral)


def interval(runs: Runs, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean over prompts of the mean over each prompt's runs; the order of ``runs`` does not
    matter."""
    groups: dict[str, list[float]] = {}
    for key in sorted(runs):
        groups.setdefault(key[0], []).append(runs[key])
    n = len(groups)
    if not n:
        return Interval(math.nan, math.nan, math.nan, 0, 0)
    means = np.array([sum(group) / len(group) for group in groups.values()])
    low = high = math.nan
    if n > 1:
        drawn = means[np.random.default_rng(seed).integers(n, size=(draws, n))].mean(1)
        tail = 100 * ndtr(-math.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.975))
        low, high = (float(x) for x in np.percentile(drawn, (tail, 100 - tail)))
    return Interval(float(means.mean()), low, high, len(runs), n)


def paired(runs: Runs, reference: Runs, **options) -> Interval:
    """``interval`` of ``runs - reference`` over the (prompt, seed) that both have, in which what a
    prompt does to both cancels."""
    return interval({k: runs[k] - reference[k] for k in runs if k in reference}, **options)


def ratio(runs: Runs, reference: Runs, **options) -> Interval:
    """Geometric mean of ``runs / reference`` over the (prompt, seed) at which both are positive,
    exp(mean(log(runs / reference))) as ``interval`` takes means. Where prompts differ by factors, a
    mean difference is that of the few hardest; here all count alike."""
    logs = {
        k: math.log(runs[k] / reference[k])
        for k in runs
        if runs[k] > 0 and reference.get(k, 0.0) > 0
    }
    i = interval(logs, **options)
    return Interval(*(math.exp(x) for x in (i.mean, i.low, i.high)), i.runs, i.prompts, 1.0)
