"""Means, intervals and distances of the evaluation."""

import math

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.special import stdtrit

from evaluation.statistics import ENOUGH_PROMPTS, interval, paired, ratio
from pocket.frechet import frechet


def table(values):
    """(prompts, seeds) values as runs."""
    return {(f"p{p}", str(s)): float(v) for (p, s), v in np.ndenumerate(np.asarray(values))}


def test_a_constant_has_an_interval_of_no_width():
    i = interval(table(np.full((7, 3), 0.3)))
    assert [i.mean, i.low, i.high] == pytest.approx([0.3] * 3, abs=1e-12)
    assert (i.runs, i.prompts) == (21, 7)


def test_a_large_gaussian_sample_agrees_with_the_closed_form():
    x = np.random.default_rng(0).normal(2, 3, (800, 1))
    i = interval(table(x))
    half = 1.96 * x.std() / math.sqrt(len(x))
    assert i.mean == pytest.approx(x.mean())
    assert i.low == pytest.approx(x.mean() - half, abs=0.06 * half)
    assert i.high == pytest.approx(x.mean() + half, abs=0.06 * half)


def test_intervals_cover_the_truth_because_prompts_are_clusters():
    """With prompts that differ much and seeds that differ little, runs taken for independent give
    intervals that miss the true mean half of the time."""
    rng = np.random.default_rng(1)
    covered = alone = 0
    for _ in range(300):
        x = rng.normal(size=(12, 1)) + 0.2 * rng.normal(size=(12, 6))
        i = interval(table(x), draws=1000)
        covered += i.low <= 0 <= i.high
        i = interval(table(x.reshape(-1, 1)), draws=1000)
        alone += i.low <= 0 <= i.high
    assert 0.92 <= covered / 300 <= 0.98
    assert alone / 300 < 0.7


@pytest.mark.parametrize("prompts, seeds", [(6, 1), (12, 1), (12, 3)])
def test_intervals_are_nearly_as_wide_as_students(prompts, seeds):
    """Also where all that varies are the seeds, whose noise is counted once."""
    rng, widths = np.random.default_rng(4), []
    for _ in range(100):
        x = rng.normal(size=(prompts, seeds))
        i = interval(table(x), draws=1000)
        means = x.mean(1)
        half = stdtrit(prompts - 1, 0.975) * means.std(ddof=1) / math.sqrt(prompts)
        widths.append((i.high - i.low) / (2 * half))
    assert 0.9 <= np.mean(widths) <= 1


def test_pairing_removes_what_a_prompt_does_to_both():
    rng = np.random.default_rng(2)
    prompt, noise = rng.normal(0, 10, (12, 1)), rng.normal(0, 0.1, (2, 12, 3))
    better, worse = table(prompt + 0.5 + noise[0]), table(prompt + noise[1])
    a, b = interval(better), interval(worse)
    assert a.low < b.high - 5 and b.low < a.low  # unpaired, nothing can be said
    i = paired(better, worse)
    assert i.sign == 1 and i.mean == pytest.approx(0.5, abs=0.1) and i.high - i.low < 0.3
    assert paired(worse, better).sign == -1


def test_a_ratio_weighs_easy_and_hard_prompts_alike():
    """Twice as good on seven easy prompts and somewhat worse on a hard one: the mean difference is
    the hard prompt's, the ratio is not."""
    worse = table([[1.0]] * 7 + [[1000.0]])
    better = table([[0.5]] * 7 + [[1100.0]])
    assert paired(better, worse).mean > 0
    i = ratio(better, worse)
    assert i.mean == pytest.approx((0.5**7 * 1.1) ** (1 / 8)) and i.sign == -1
    back = ratio(worse, better)
    assert back.mean == pytest.approx(1 / i.mean) and back.sign == 1
    assert [back.low, back.high] == pytest.approx([1 / i.high, 1 / i.low])
    same = ratio(worse, worse)
    assert (same.mean, same.low, same.high, same.sign) == (1.0, 1.0, 1.0, 0)
    # a distance of zero has no logarithm, and what has no pair no ratio
    assert ratio({**worse, ("p8", "0"): 0.0}, {**worse, ("p8", "0"): 1.0}).runs == 8
    assert math.isnan(ratio(worse, {}).mean)


def test_pairs_are_the_runs_that_both_have():
    a, b = table(np.ones((8, 2))), table(np.zeros((8, 2)))
    a["p9", "0"], b["p0", "7"] = 1000.0, -1000.0
    i = paired(a, b)
    assert (i.mean, i.runs, i.prompts) == (1.0, 16, 8)
    assert paired(a, {}).runs == 0 and math.isnan(paired(a, {}).mean)


def test_the_order_of_rows_does_not_matter():
    runs = table(np.random.default_rng(3).normal(size=(6, 3)))
    shuffled = dict(reversed(runs.items()))
    assert list(shuffled) != list(runs) and interval(shuffled) == interval(runs)
    assert interval(runs, seed=1) != interval(runs)  # the bootstrap does draw


def test_every_prompt_weighs_the_same_however_many_of_its_runs_are_left():
    runs = {("a", "0"): 1.0, ("a", "1"): 1.0, ("a", "2"): 1.0, ("b", "0"): 3.0}
    assert interval(runs).mean == 2.0
    # and the seeds that are not there are never drawn
    lopsided = {**table(np.full((8, 3), 5.0)), ("q", "0"): 5.0}
    i = interval(lopsided)
    assert [i.low, i.high] == pytest.approx([5.0, 5.0])


def test_few_prompts_show_nothing():
    assert interval(table(np.ones((ENOUGH_PROMPTS - 1, 3)))).sign == 0
    assert interval(table(np.ones((ENOUGH_PROMPTS, 3)))).sign == 1
    assert interval(table(np.zeros((20, 3)))).sign == 0
    one = interval(table([[1.0, 2.0]]))
    assert one.mean == 1.5 and math.isnan(one.low) and one.sign == 0


def exactly(rng, count, mean, covariance):
    """Vectors whose mean and covariance are exactly these."""
    x = rng.normal(size=(count, len(mean)))
    x -= x.mean(0)
    white = np.linalg.solve(np.linalg.cholesky(np.atleast_2d(np.cov(x.T))), x.T).T
    return white @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(4)
    (a, b), means = rng.normal(size=(2, 4, 4)), rng.normal(size=(2, 4))
    a, b = a @ a.T + np.eye(4), b @ b.T + np.eye(4)
    assert np.abs(a @ b - b @ a).max() > 0.1  # the general case
    wanted = ((means[0] - means[1]) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    x, y = exactly(rng, 50, means[0], a), exactly(rng, 70, means[1], b)
    assert frechet(x, y) == pytest.approx(wanted, rel=1e-9)
    assert frechet(y, x) == pytest.approx(wanted, rel=1e-9)
    assert frechet(x, x) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_fewer_vectors_than_dimensions():
    rng = np.random.default_rng(5)
    v, w = 4.0, 9.0
    along = np.zeros((2, 6, 20))
    along[0, :, 3] = exactly(rng, 6, [1.0], np.array([[v]]))[:, 0]
    along[1, :, 8] = exactly(rng, 6, [0.0], np.array([[w]]))[:, 0]
    # across: nothing in common; along one axis: (sqrt v - sqrt w)^2
    assert frechet(along[0], along[1]) == pytest.approx(1 + v + w)
    assert frechet(along[0], 1.5 * along[0]) == pytest.approx(0.25 + (2 - 3) ** 2)
    few = rng.normal(size=(8, 128))
    assert 0 <= frechet(few, few) < 1e-10


@pytest.mark.parametrize("shapes", [((1, 3), (4, 3)), ((4, 3), (4, 2)), ((4,), (4,))])
def test_sets_without_a_covariance_are_refused(shapes):
    with pytest.raises(ValueError, match="two sets"):
        frechet(*(np.ones(s) for s in shapes))
