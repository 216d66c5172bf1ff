"""Features of images over devices and batches, and the cache on disk."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jflow import datasets, metrics, sharding

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (37, 4, 4, 1), dtype=np.uint8)
LABELS = RANDOM.integers(0, 3, 37)
MATRIX = RANDOM.normal(size=(16, 5)).astype(np.float32)


def apply(params, x):
    flat = x.reshape(x.shape[0], -1)
    return metrics.Outputs(flat @ params, (flat @ params)[:, :3])


NET = metrics.FeatureNet("linear", MATRIX, apply)
EXPECTED = (IMAGES.reshape(37, -1) / 127.5 - 1.0) @ MATRIX.astype(np.float64)


def with_logits(logits):
    return metrics.FeatureNet(
        "a", MATRIX, lambda p, x: metrics.Outputs(apply(p, x).features, logits(apply(p, x).features))
    )


def halved(x):
    return x.astype(jnp.float32) / 2


def test_padding_and_devices_do_not_matter():
    """The last batch is padded; one device and eight give the same features."""
    one = metrics.features(NET, IMAGES, labels=LABELS, batch_size=16)
    np.testing.assert_allclose(one.values, EXPECTED, atol=2e-6)
    assert one.values.dtype == np.float32 and one.values.shape == (37, 5) and one.logits.shape == (37, 3)
    eight = metrics.features(NET, IMAGES, labels=LABELS, batch_size=10, mesh=sharding.mesh())
    np.testing.assert_allclose(eight.values, one.values, atol=1e-6)
    assert (one.network, one.network_hash, one.data_hash) == ("linear", NET.hash, eight.data_hash)
    some = one.where(LABELS == 1)
    np.testing.assert_array_equal(some.values, one.values[LABELS == 1])
    assert len(some) == sum(LABELS == 1) == len(some.logits) and set(some.labels) == {1}
    x = IMAGES.astype(np.float32)
    found = metrics.features(NET, x, transform=datasets.PIXELS, batch_size=16)
    np.testing.assert_allclose(found.values, one.values, atol=2e-6)
    np.testing.assert_allclose(
        metrics.features(NET, x, transform=halved).values, x.reshape(37, -1) / 2 @ MATRIX, rtol=1e-4
    )


def test_statistics_are_the_moments_of_the_features():
    one = metrics.statistics(NET, IMAGES, labels=LABELS, batch_size=16, groups=4)
    rows = metrics.features(NET, IMAGES, batch_size=16).values
    np.testing.assert_allclose(one.moments.total.covariance, np.cov(rows, rowvar=False), rtol=1e-9)
    for label in range(3):
        assert one.by_label[label].count == sum(LABELS == label)
        np.testing.assert_allclose(
            one.by_label[label].mean, rows[LABELS == label].mean(0, np.float64), rtol=1e-9, atol=1e-12
        )
    eight = metrics.statistics(NET, IMAGES, batch_size=8, mesh=sharding.mesh(), groups=4)
    for a, b in zip(one.moments.groups, eight.moments.groups, strict=True):
        np.testing.assert_allclose(a.mean, b.mean, atol=1e-6)
        assert a.count == b.count
    assert eight.by_label == {} and eight.data_hash != one.data_hash


def test_the_cache_is_read_and_tells_every_change(tmp_path, monkeypatch):
    options = {"labels": LABELS, "batch_size": 16, "cache": tmp_path}
    one, moments = metrics.features(NET, IMAGES, **options), metrics.statistics(NET, IMAGES, groups=4, **options)
    assert len(list(tmp_path.iterdir())) == 2
    refused = metrics.FeatureNet("linear", MATRIX, lambda *_: pytest.fail("computed again"))
    again, same = metrics.features(refused, IMAGES, **options), metrics.statistics(refused, IMAGES, groups=4, **options)
    np.testing.assert_array_equal(again.values, one.values)
    np.testing.assert_array_equal(again.logits, one.logits)
    np.testing.assert_array_equal(again.labels, LABELS)
    assert metrics.frechet_score(again, same).to_json() == metrics.frechet_score(one, moments).to_json()
    assert list(same.by_label) == [0, 1, 2]
    np.testing.assert_array_equal(same.by_label[2].root, moments.by_label[2].root)
    other = IMAGES.copy()
    other[3, 2, 1] += np.uint8(1)
    changes = [
        (metrics.FeatureNet("linear", MATRIX + 1, apply), IMAGES, {}),
        (metrics.FeatureNet("other", MATRIX, apply), IMAGES, {}),
        (NET, other, {}),
        (NET, IMAGES, {"labels": LABELS + 1}),
        (NET, IMAGES, {"transform": datasets.Affine(127.5, -1.5)}),
        (NET, IMAGES, {"transform": halved}),
    ]
    for count, (net, images, change) in enumerate(changes):
        metrics.features(net, images, **options | change)
        assert len(list(tmp_path.iterdir())) == 3 + count


@pytest.mark.parametrize("damage", ["truncated", "renamed", "changed", "empty"])
def test_a_cache_that_is_not_valid_is_refused_by_name(tmp_path, damage):
    options = {"cache": tmp_path}
    metrics.features(NET, IMAGES, **options)
    (path,) = tmp_path.iterdir()
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "renamed":
        metrics.features(NET, IMAGES[:5], **options)
        (other,) = set(tmp_path.iterdir()) - {path}
        other.rename(path)
    else:
        with np.load(path) as archive:
            arrays = dict(archive)
        arrays["values"][0, 0] += np.float32(1e-6)
        np.savez(path, **arrays)
    with pytest.raises(ValueError, match=rf"^cache: .*{path.name} .*delete it to compute it again"):
        metrics.features(NET, IMAGES, **options)


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (
            ValueError,
            lambda d: metrics.features(NET, IMAGES, transform=lambda x: x, cache=d),
            "^transform: expected an Affine",
        ),
        (TypeError, lambda d: metrics.features(apply, IMAGES), "^network: expected a FeatureNet, got function$"),
        (ValueError, lambda d: metrics.features(NET, IMAGES[:0]), "^images: expected arrays with"),
        (TypeError, lambda d: metrics.features(NET, IMAGES.astype(int)), "^images: expected floating-point"),
        (ValueError, lambda d: metrics.features(NET, IMAGES, labels=LABELS[:3]), "^labels: expected an array of shape"),
        (
            ValueError,
            lambda d: metrics.features(NET, np.full((3, 16), np.inf, np.float32)),
            "^the network's features: expected f",
        ),
        (
            TypeError,
            lambda d: metrics.features(metrics.FeatureNet("a", MATRIX, lambda p, x: x), IMAGES),
            "^network: expected one that returns Outputs",
        ),
        (
            ValueError,
            lambda d: metrics.features(with_logits(lambda x: x * np.nan), IMAGES),
            "^the network's logits: expected f",
        ),
        (
            ValueError,
            lambda d: metrics.features(with_logits(lambda x: x[0, 0]), IMAGES),
            "^the network's logits: expected an",
        ),
    ],
)
def test_refusals(error, call, message, tmp_path):
    with pytest.raises(error, match=message):
        call(tmp_path)
