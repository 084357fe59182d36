"""Means and paired differences over runs, with 95 % bootstrap intervals that respect clusters.

Runs of one prompt are alike, so more seeds do not stand for more prompts. A bootstrap sample takes
as many prompts as there are, with replacement, and from each as many of its runs as it has, with
replacement; the interval lies between the 2.5th and 97.5th percentile of the samples' means. Every
prompt has the same weight, however many of its runs failed. With a dozen prompts such intervals
are somewhat narrower than Student's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

DRAWS = 4000
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
    if not groups:
        return Interval(math.nan, math.nan, math.nan, 0, 0)
    counts = np.array([len(group) for group in groups.values()])
    values = np.zeros((len(groups), counts.max()))
    for row, group in zip(values, groups.values()):
        row[: len(group)] = group
    mean = float((values.sum(1) / counts).mean())
    low = high = math.nan
    if len(groups) > 1:
        rng = np.random.default_rng(seed)
        prompts = rng.integers(len(groups), size=(draws, len(groups)))
        which = rng.random((*prompts.shape, values.shape[1])) * counts[prompts][..., None]
        drawn = values[prompts[..., None], which.astype(int)]
        drawn *= (np.arange(values.shape[1]) < counts[:, None])[prompts]
        means = (drawn.sum(-1) / counts[prompts]).mean(-1)
        low, high = (float(x) for x in np.percentile(means, (2.5, 97.5)))
    return Interval(mean, low, high, int(counts.sum()), len(groups))


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
