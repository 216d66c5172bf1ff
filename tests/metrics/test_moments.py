"""Streaming moments against numpy, however the stream is cut; groups of the jackknife; Fréchet distances of moments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jflow import metrics
from jflow.metrics import moments


def stream(n=500, d=6, offset=0.0, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    return (x + offset).astype(dtype)


def exact(x):
    """Mean and centred second moment, from differences with the first row, in extended precision."""
    z = x.astype(np.longdouble) - x[0].astype(np.longdouble)
    mean = z.mean(axis=0)
    return x[0].astype(np.longdouble) + mean, (z - mean).T @ (z - mean)


def assert_moments(found, x, rtol=1e-9):
    mean, second = exact(x)
    assert found.count == len(x) and found.mean.dtype == found.second_moment.dtype == np.float64
    spread = np.sqrt(np.diag(second) / len(x)).astype(float)
    # Relative to the spread, plus the rounding of the mean itself.
    assert np.all(np.abs(found.mean - mean) <= rtol * spread + 2.3e-16 * np.abs(mean))
    assert np.abs(found.second_moment - second).max() <= rtol * np.abs(second).max()
    np.testing.assert_allclose(
        found.covariance, (second / (len(x) - 1)).astype(float), rtol=rtol, atol=rtol * spread.max() ** 2
    )


@pytest.mark.parametrize(
    ("offset", "dtype"), [(0.0, np.float32), (1e4, np.float32), (1e10, np.float64), (-3e30, np.float64)]
)
def test_moments_do_not_depend_on_the_cuts(offset, dtype):
    """Also with an offset so large that half, or all, of the digits of a squared value would be lost."""
    x = stream(offset=offset, dtype=dtype)
    if offset < -1e20:
        x = (np.round(stream() * 2.0**4) * 2.0**70 + offset).astype(dtype)
    whole = metrics.Moments.of(x)
    assert_moments(whole, x)
    for cuts in ([1], [499], [1, 2, 3], [100, 101, 400], range(1, 500, 7)):
        found = metrics.Moments.empty(6)
        for part in np.split(x, list(cuts)):
            found = found.add(part)
        assert_moments(found, x)
        assert metrics.frechet_distance(found, whole) <= 1e-24 * np.trace(whole.covariance)


def test_merging_is_associative_and_commutative_to_rounding():
    x = stream(offset=1e5, dtype=np.float64)
    parts = [metrics.Moments.of(part) for part in np.split(x, [3, 200])]
    for a, b, c in itertools.permutations(parts):
        assert_moments(a.merge(b).merge(c), x)
        assert_moments(a.merge(b.merge(c)), x)
    empty = metrics.Moments.empty(6)
    assert_moments(empty.merge(parts[0]), x[:3])
    assert_moments(parts[0].merge(empty), x[:3])


def test_blocks_of_a_long_stream(monkeypatch):
    monkeypatch.setattr(moments, "_BLOCK", 64)
    x = stream(offset=1e4)
    assert_moments(metrics.Moments.of(x), x)


def test_padding_is_left_out_even_if_it_is_not_finite():
    x = stream(n=40)
    padded = np.concatenate([x, np.full((5, 6), np.nan, np.float32)])[np.r_[:20, 40:45, 20:40]]
    keep = np.isfinite(padded[:, 0])
    assert_moments(metrics.Moments.of(padded, keep), x)
    assert_moments(metrics.Moments.of(padded[:22], keep[:22]).add(padded[22:], keep[22:]), x)
    found = metrics.GroupedMoments.of(padded, keep, groups=4)
    assert_moments(found.total, x)
    for a, b in zip(found.groups, metrics.GroupedMoments.of(x, groups=4).groups, strict=True):
        np.testing.assert_array_equal(a.mean, b.mean)


def test_moments_by_label():
    x = stream(n=90, offset=50.0)
    labels = np.random.default_rng(1).integers(-2, 3, size=90)
    found = metrics.moments_by_label(x[:37], labels[:37])
    found = metrics.moments_by_label(x[37:60], labels[37:60], found)
    found = metrics.merge_by_label(metrics.moments_by_label(x[60:], labels[60:]), found)
    assert list(found) == [-2, -1, 0, 1, 2]
    for label, each in found.items():
        assert_moments(each, x[labels == label])


@pytest.mark.parametrize("cuts", [[], [1], [13, 14, 250], range(1, 500, 9)])
def test_groups_do_not_depend_on_the_cuts(cuts):
    x = stream(offset=1e3)
    found = metrics.GroupedMoments.of(x[:0], groups=7)
    for part in np.split(x, list(cuts)):
        found = found.add(part)
    group = moments.group_of(0, 500, 7)
    for place, each in enumerate(found.groups):
        assert_moments(each, x[group == place])
    for place, each in enumerate(found.without()):
        assert_moments(each, x[group != place])
    assert (
        found.count == 500 and max(each.count for each in found.groups) - min(each.count for each in found.groups) == 1
    )


def test_groups_are_balanced_and_mix_periodic_streams():
    """Classes in turn, whose period is the number of groups, are spread over the groups; so are sorted classes."""
    group = moments.group_of(0, 1000, 10)
    assert all(sorted(group[start : start + 10]) == list(range(10)) for start in range(0, 1000, 10))
    np.testing.assert_array_equal(np.concatenate([moments.group_of(0, 333, 10), moments.group_of(333, 667, 10)]), group)
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (np.arange(1000) % 10, group), 1)
    # Each cell is binomial, of 100 trials and probability 1/10: six standard deviations around 10.
    assert np.abs(counts - 10).max() <= 18 and counts.min() > 0


def test_merged_groups_stay_balanced():
    x = stream(n=53)
    first, second = metrics.GroupedMoments.of(x[:26], groups=5), metrics.GroupedMoments.of(x[26:], groups=5)
    merged = first.merge(second)
    assert_moments(merged.total, x)
    assert sorted(each.count for each in merged.groups) == [10, 10, 11, 11, 11]


def test_frechet_distance_of_moments_is_that_of_the_rows():
    """Also of sets with fewer rows than features, and against the root of the product of covariances."""
    linalg = pytest.importorskip("scipy.linalg")
    x, y = stream(n=300, offset=20.0), stream(n=200, seed=1)
    a, b = metrics.Moments.of(x[:50]).add(x[50:]), metrics.Moments.of(y)
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    for first, second in [(a, b), (b, a), (x, b), (a, y), (x.astype(np.float64), y.astype(np.float64))]:
        np.testing.assert_allclose(metrics.frechet_distance(first, second), expected, rtol=1e-9)
    given = metrics.Moments.from_covariance(300, a.mean, a.covariance)
    np.testing.assert_allclose(metrics.frechet_distance(given, b), expected, rtol=1e-9)
    np.testing.assert_allclose(metrics.frechet_distance(given, a), 0.0, atol=1e-12 * np.trace(a.covariance))
    few, more = x[:4], y[:5]
    np.testing.assert_allclose(
        metrics.frechet_distance(metrics.Moments.of(few), metrics.Moments.of(more)),
        metrics.frechet_distance(few, more),
        rtol=1e-12,
    )


def test_a_covariance_of_low_rank():
    """Dimensions without variance add nothing, and rounding of the covariance does not become a negative distance."""
    x = stream(n=100, d=3, dtype=np.float64) @ np.random.default_rng(5).normal(size=(3, 20))
    a = metrics.Moments.of(x)
    given = metrics.Moments.from_covariance(100, a.mean, np.cov(x, rowvar=False))
    assert np.linalg.matrix_rank(given.root) == 3
    assert 0.0 <= metrics.frechet_distance(given, a) <= 1e-12 * np.trace(a.covariance)


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (ValueError, lambda x: metrics.Moments.of(x * np.float32(np.nan)), "^points: expected finite samples"),
        (TypeError, lambda x: metrics.Moments.of(x.astype(int)), "^points: expected floating-point"),
        (ValueError, lambda x: metrics.Moments.of(x).add(x[:, :2]), "^points: expected rows of dimension 6, got 2$"),
        (
            ValueError,
            lambda x: metrics.Moments.of(x).merge(metrics.Moments.empty(2)),
            "^other: expected rows of dimension 6",
        ),
        (TypeError, lambda x: metrics.Moments.of(x).merge(x), "^other: expected a Moments, got ndarray$"),
        (
            ValueError,
            lambda x: metrics.Moments.of(x[:1]).covariance,
            "^moments: expected moments of at least 2 samples, got 1$",
        ),
        (
            ValueError,
            lambda x: metrics.frechet_distance(x, metrics.Moments.of(x[:1])),
            "^y: expected moments of at least 2",
        ),
        (ValueError, lambda x: metrics.frechet_distance(x[:, :2], metrics.Moments.of(x)), "dimension 6, got 2$"),
        (TypeError, lambda x: metrics.Moments.of(x, np.ones(500)), "^keep: expected booleans, got dtype float64$"),
        (ValueError, lambda x: metrics.Moments.of(x, np.ones(3, bool)), "^keep: expected an array of shape"),
        (
            TypeError,
            lambda x: metrics.moments_by_label(x, x[:, 0]),
            "^labels: expected whole numbers, got dtype float32$",
        ),
        (ValueError, lambda x: metrics.moments_by_label(x, np.zeros(3, int)), "^labels: expected an array of shape"),
        (
            ValueError,
            lambda x: metrics.GroupedMoments.of(x, groups=1),
            "^groups: expected a whole number of at least 2, got 1$",
        ),
        (
            ValueError,
            lambda x: metrics.GroupedMoments.of(x).merge(metrics.GroupedMoments.of(x, groups=3)),
            "^other: expected 10 groups, got 3$",
        ),
        (
            ValueError,
            lambda x: metrics.Moments.from_covariance(9, np.zeros(2), np.array([[1.0, 0.0], [0.1, 1.0]])),
            "^covariance: expected a symmetric matrix$",
        ),
        (
            ValueError,
            lambda x: metrics.Moments.from_covariance(9, np.zeros(2), np.diag([1.0, -0.1])),
            "^covariance: expected no negative eigenvalues, got -0.1$",
        ),
    ],
)
def test_refusals(error, call, message):
    with pytest.raises(error, match=message):
        call(stream())
