"""Neighbours, precision, recall, density and coverage against naive numpy, closed cases, ties and copies."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jflow import metrics


def sets(n=70, m=90, d=5, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) + offset).astype(np.float32), (1.1 * rng.normal(size=(m, d)) + offset).astype(
        np.float32
    )


def distances(x, y):
    return np.sqrt(np.sum(np.square(x[:, None].astype(np.float64) - y[None].astype(np.float64)), axis=2))


def naive(x, y, k, closed):
    """The four definitions, from the full matrices of distances."""
    radius = lambda z: np.sort(distances(z, z) + np.diag(np.full(len(z), np.inf)), axis=1)[:, k - 1]  # noqa: E731
    less = np.less_equal if closed else np.less
    d = distances(x, y)
    in_y, in_x = less(d, radius(y)[None, :]), less(d, radius(x)[:, None])
    return in_y.any(axis=1).mean(), in_x.any(axis=0).mean(), in_y.sum() / (k * len(x)), in_y.any(axis=0).mean()


@pytest.mark.representatives("33-300.0")
@pytest.mark.parametrize(("block", "offset"), [(16, 0.0), (1024, 0.0), (33, 300.0)])
def test_scores_are_the_naive_ones(block, offset):
    x, y = sets(offset=offset)
    for k in (1, 5):
        for closed in (True, False):
            found = metrics.manifold_scores(x, y, k=k, closed=closed, block=block)
            np.testing.assert_allclose([score.value for score in found], naive(x, y, k, closed), rtol=1e-12)
    assert [score.name for score in found] == ["precision", "recall", "density", "coverage"]
    assert (
        found.recall.options == {"k": 5, "closed": False}
        and found.recall.samples == 70
        and found.recall.reference == 90
    )
    share = found.precision.value
    np.testing.assert_allclose(found.precision.standard_error, math.sqrt(share * (1 - share) / 70))


def test_a_set_with_itself_and_far_sets():
    """At every k-th neighbour there is a tie; closed balls hold it, open ones do not."""
    x, y = sets()
    for closed, density in ((True, 6 / 5), (False, 1.0)):
        found = metrics.manifold_scores(y, y[::-1], k=5, closed=closed, block=32)
        np.testing.assert_allclose([score.value for score in found], [1.0, 1.0, density, 1.0], rtol=1e-12)
    apart = metrics.manifold_scores(x, y + np.float32(50.0), k=3)
    assert [score.value for score in apart] == [0.0, 0.0, 0.0, 0.0]


def test_ties_on_a_grid():
    """Integer rows, where the distances of many pairs are equal, and copies, whose radius is zero."""
    rng = np.random.default_rng(3)
    x, y = (rng.integers(0, 4, size=(n, 2)).astype(np.float64) for n in (40, 60))
    for closed in (True, False):
        found = metrics.manifold_scores(x, y, k=3, closed=closed, block=16)
        np.testing.assert_allclose([score.value for score in found], naive(x, y, 3, closed), rtol=1e-12)
    copies = np.zeros((4, 2))
    assert [s.value for s in metrics.manifold_scores(copies, copies, k=2)] == [1.0, 1.0, 2.0, 1.0]
    assert [s.value for s in metrics.manifold_scores(copies, copies, k=2, closed=False)] == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("block", [16, 1024])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_nearest_rows_are_the_naive_ones(block, offset):
    x, y = sets(offset=offset)
    y[17], y[60] = x[3], x[3]
    found = metrics.nearest(x, y, k=4, block=block)
    d = distances(x, y)
    order = np.argsort(d, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(found.indices, order)
    np.testing.assert_allclose(found.distances, np.take_along_axis(d, order, axis=1), rtol=1e-12)
    assert found.indices[3, 0] == 17 and found.indices[3, 1] == 60 and (found.distances[3, :2] == 0.0).all()
    assert found.indices.dtype == np.int64 and found.distances.dtype == np.float64


def test_equal_distances_are_in_the_order_of_the_reference():
    reference = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [3.0, 0.0], [0.0, -1.0]])
    found = metrics.nearest(np.zeros((1, 2)), reference, k=5)
    assert found.indices.tolist() == [[0, 1, 2, 4, 3]] and found.distances.tolist() == [[1.0, 1.0, 1.0, 1.0, 3.0]]


def test_features_keep_their_origin():
    x, y = sets()
    a = metrics.Features(x, "net", "hash", "samples")
    found = metrics.manifold_scores(a, metrics.Features(y, "net", "hash", "training"), k=3)
    assert (found.density.network, found.density.samples_hash, found.density.reference_hash) == (
        "net",
        "samples",
        "training",
    )
    with pytest.raises(ValueError, match=r"^x, y: expected features of one network"):
        metrics.nearest(a, metrics.Features(y, "other", "other hash", "training"))


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (
            ValueError,
            lambda x, y: metrics.nearest(x, y, k=91),
            "^k: expected a whole number of at least 1 and at most 90, got 91$",
        ),
        (ValueError, lambda x, y: metrics.manifold_scores(x[:5], y), "^x: expected at least 6 samples"),
        (ValueError, lambda x, y: metrics.manifold_scores(x, y[:, :2]), "^y: expected samples of the dimension of x"),
        (ValueError, lambda x, y: metrics.nearest(x * np.float32(np.inf), y), "^x: expected finite samples"),
        (TypeError, lambda x, y: metrics.nearest(x.astype(int), y), "^x: expected floating-point"),
        (ValueError, lambda x, y: metrics.nearest(x, y, block=0), "^block: expected a whole number of at least 1"),
    ],
)
def test_refusals(error, call, message):
    with pytest.raises(error, match=message):
        call(*sets())
