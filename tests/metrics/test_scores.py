"""Scores against closed forms and naive implementations; what a score says about itself."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from jflow import metrics


def gaussians(n, m, d, seed=0):
    """Two sets of Gaussian rows, and the squared Fréchet distance of their laws, whose covariances commute."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    shift, first, second = 0.3 * rng.normal(size=d), rng.uniform(0.5, 1.5, d), rng.uniform(0.5, 1.5, d)
    x = (rng.normal(size=(n, d)) * first) @ turn.T
    y = (rng.normal(size=(m, d)) * second) @ turn.T + shift
    return x, y, shift @ shift + np.sum((first - second) ** 2)


def test_frechet_score_at_four_dimensions_is_the_closed_form():
    x, y, exact = gaussians(20_000, 20_000, 4)
    score = metrics.frechet_score(x, y)
    assert abs(score.value - exact) < 4 * score.standard_error < 0.1 * exact
    np.testing.assert_allclose(score.value, metrics.frechet_distance(x, y), rtol=1e-12)


@pytest.mark.representatives("True")
@pytest.mark.parametrize("equal", [True, False])
def test_frechet_score_at_64_dimensions_needs_its_bias_subtracted(equal):
    """Also if both laws are equal, where all of the value is bias."""
    x, y, exact = gaussians(20_000, 20_000, 64)
    if equal:
        rng = np.random.default_rng(1)
        x, y, exact = rng.normal(size=(20_000, 64)), rng.normal(size=(20_000, 64)), 0.0
    score = metrics.frechet_score(x, y)
    assert abs(score.corrected - exact) < 4 * score.standard_error
    assert score.bias > 4 * score.standard_error if equal else score.bias > 0.02


def test_the_standard_error_and_the_bias_are_those_of_repeated_samples():
    """Over independent sets: the mean of the corrected values is exact, and their spread is the standard error."""
    found, exact = [], 0.0
    for seed in range(60):
        # The laws are the same in each repeat; only the samples differ.
        rng = np.random.default_rng(1000 + seed)
        x, y = rng.normal(size=(400, 8)), 1.3 * rng.normal(size=(300, 8)) + 0.2
        exact = 8 * (0.3**2 + 0.2**2)
        found.append(metrics.frechet_score(x, y, groups=10))
    corrected, values = np.array([s.corrected for s in found]), np.array([s.value for s in found])
    spread = corrected.std(ddof=1)
    assert abs(corrected.mean() - exact) < 4 * spread / math.sqrt(60)
    assert abs(values.mean() - exact) > 4 * spread / math.sqrt(60)
    # The ratio of the two has a relative error of about 1/sqrt(2 * 60), and that of the jackknife.
    assert 0.6 < math.sqrt(np.mean([s.standard_error**2 for s in found])) / spread < 1.6


def test_frechet_score_of_a_set_with_itself_and_of_moments():
    x, y, _ = gaussians(300, 200, 6)
    own = metrics.frechet_score(x, x)
    assert 0.0 <= own.value < 1e-25 and math.isfinite(own.corrected)
    rows = metrics.frechet_score(x, y)
    grouped = metrics.frechet_score(metrics.GroupedMoments.of(x[:99]).add(x[99:]), metrics.GroupedMoments.of(y))
    for name in ("value", "standard_error", "bias"):
        np.testing.assert_allclose(getattr(grouped, name), getattr(rows, name), rtol=1e-7)
    law = metrics.frechet_score(x, metrics.Moments.of(y))
    assert law.options == {"dimension": 6, "groups": [10, 0]} and (law.samples, law.reference) == (300, 200)
    # The variances and biases of the two sets add up.
    other = metrics.frechet_score(metrics.Moments.of(x), y)
    np.testing.assert_allclose(law.bias + other.bias, rows.bias, rtol=1e-9)
    np.testing.assert_allclose(math.hypot(law.standard_error, other.standard_error), rows.standard_error, rtol=1e-9)
    exact = metrics.frechet_score(metrics.Moments.of(x), metrics.Moments.of(y))
    assert exact.bias is None and exact.standard_error is None
    np.testing.assert_allclose(exact.value, law.value, rtol=1e-12)
    with pytest.raises(ValueError, match=r"^frechet: expected an estimate of the bias"):
        _ = exact.corrected
    few = metrics.frechet_score(x[:5], y[:4])
    assert few.bias is None and few.value > 0


def naive_kid(x, y):
    """The unbiased squared MMD with the cubic kernel, as its definition says."""
    d = x.shape[1]
    k = lambda a, b: (a @ b.T / d + 1) ** 3  # noqa: E731
    xx, yy, xy = k(x, x), k(y, y), k(x, y)
    n, m = len(x), len(y)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return within - 2 * xy.mean()


def test_kernel_score_is_the_mean_of_naive_blocks():
    x, y, _ = gaussians(43, 91, 5)
    score = metrics.kernel_score(x, y, block=10, seed=3)
    random = np.random.default_rng(3)
    rows, others = random.permutation(43)[:40].reshape(4, 10), random.permutation(91)[:88].reshape(4, 22)
    expected = np.array([naive_kid(x[i], y[j]) for i, j in zip(rows, others, strict=True)])
    np.testing.assert_allclose(score.value, expected.mean(), rtol=1e-9)
    np.testing.assert_allclose(score.standard_error, expected.std(ddof=1) / 2, rtol=1e-9)
    assert (score.samples, score.reference, score.bias, score.options) == (40, 88, 0.0, {"blocks": 4})
    streamed = metrics.kernel_score_of_blocks((x[i], y[j]) for i, j in zip(rows, others, strict=True))
    assert streamed == score


def test_kernel_score_of_sorted_rows_is_unbiased():
    """Equal laws, one set sorted by class: the blocks are drawn at random."""
    rng = np.random.default_rng(2)
    classes = np.repeat(np.arange(4.0), 60)[:, None] * 3.0
    x, y = (rng.normal(size=(240, 2)) + classes for _ in range(2))
    score = metrics.kernel_score(x, y, block=40)
    assert abs(score.value) < 4 * score.standard_error
    assert metrics.kernel_score(x, y[::-1], block=40).value < score.value + 8 * score.standard_error


def features(n, seed, network="net", **fields):
    rng = np.random.default_rng(seed)
    labels, logits = rng.integers(0, 3, n), rng.normal(size=(n, 3))
    values = rng.normal(size=(n, 4)) + labels[:, None]
    return metrics.Features(values, network, f"hash of {network}", f"data {seed}", logits, labels, **fields)


def test_scores_say_where_they_come_from_and_by_label():
    x, y = features(120, 0), features(150, 1)
    for score in (metrics.frechet_score(x, y), metrics.kernel_score(x, y, block=40)):
        assert (score.network, score.network_hash) == ("net", "hash of net")
        assert (score.samples_hash, score.reference_hash) == ("data 0", "data 1")
        assert metrics.Score.from_json(score.to_json()) == score
        assert "\n" not in score.to_json() and json.loads(score.to_json())["value"] == score.value
    found = metrics.by_label(metrics.frechet_score, x, y)
    assert list(found) == [0, 1, 2]
    for label, score in found.items():
        expected = metrics.frechet_distance(x.values[x.labels == label], y.values[y.labels == label])
        np.testing.assert_allclose(score.value, expected, rtol=1e-12)
        assert score.samples == sum(x.labels == label) and score.network == "net"
    with pytest.raises(ValueError, match=r"^x, y: expected features of one network, got net \(hash of net\) and other"):
        metrics.frechet_score(x, features(50, 2, network="other"))


def test_label_accuracy():
    x = features(200, 4)
    share = np.mean(x.logits.argmax(1) == x.labels)
    score = metrics.label_accuracy(x)
    assert score.value == share and score.samples == 200 and score.samples_hash == "data 4" and score.reference == 0
    np.testing.assert_allclose(score.standard_error, math.sqrt(share * (1 - share) / 200))
    assert metrics.label_accuracy(x, x.logits.argmax(1)).value == 1.0


def test_numbers_that_are_not_finite_become_null():
    text = metrics.Score("a", math.nan, math.inf, options={"b": [np.float32(1.5), np.int64(2), (math.nan,)]}).to_json()
    assert json.loads(text)["options"] == {"b": [1.5, 2, [None]]}
    found = metrics.Score.from_json(text)
    assert math.isnan(found.value) and found.standard_error is None
    for wrong in ("", "{}", '{"value": 1}', '{"name": "a", "value": 1, "other": 2}'):
        with pytest.raises(ValueError, match=r"^text: expected a score as to_json writes it"):
            metrics.Score.from_json(wrong)


X = np.random.default_rng(0).normal(size=(20, 3))


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (TypeError, lambda: metrics.frechet_score([1.0], X), "^x: expected features or their moments, got list$"),
        (ValueError, lambda: metrics.frechet_score(X, X[:1]), "^y: expected at least 2 samples"),
        (ValueError, lambda: metrics.frechet_score(X, X[:, :2]), "dimension"),
        (ValueError, lambda: metrics.frechet_score(X * np.nan, X), "^x: expected finite samples"),
        (ValueError, lambda: metrics.kernel_score(X, X[:5]), "^y: expected at least 6 samples"),
        (ValueError, lambda: metrics.kernel_score(X, X, block=2), "^block: expected a whole number of at least 3"),
        (ValueError, lambda: metrics.kernel_score_of_blocks([(X, X)]), "^blocks: expected at least two pairs"),
        (ValueError, lambda: metrics.by_label(metrics.kernel_score, X, X), "^x: expected Features with labels$"),
        (
            ValueError,
            lambda: metrics.label_accuracy(features(5, 0), np.full(5, 3)),
            "^labels: expected one or more from 0 to 2, got 3 to 3$",
        ),
        (TypeError, lambda: metrics.label_accuracy(X, np.zeros(20, int)), "^x: expected Features, got ndarray$"),
        (
            TypeError,
            lambda: metrics.kernel_score(X, metrics.GroupedMoments.of(X)),
            "^x, y: expected Features or rows .* because the score needs rows, got GroupedMoments$",
        ),
        (TypeError, lambda: metrics.label_accuracy(features(5, 0), np.zeros(5)), "^labels: expected whole numbers"),
    ],
)
def test_refusals(error, call, message):
    with pytest.raises(error, match=message):
        call()
