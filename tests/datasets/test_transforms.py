"""Levels and their inverse; flips, shifts and crops against numpy; keys that depend on the seed and the step alone."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import datasets, sharding
from jflow.datasets import transforms
from jflow.types import Batch

IMAGE = np.arange(5 * 4 * 2, dtype=np.uint8).reshape(5, 4, 2)


def test_levels_and_their_inverse():
    levels = np.arange(256, dtype=np.uint8)
    x = jax.jit(datasets.PIXELS.forward)(levels)
    # The readers of image files convert on the host; both give the same bits.
    np.testing.assert_array_equal(x, levels.astype(np.float32) / np.float32(127.5) - np.float32(1.0))
    assert x.dtype == jnp.float32 and x[0] == -1.0 and x[255] == 1.0
    np.testing.assert_array_equal(jax.jit(datasets.PIXELS.to_levels)(x), levels)
    far = jnp.asarray([-3.0, 1.01, np.nan, np.inf, 0.4 / 127.5 - 1.0, 1.6 / 127.5 - 1.0])
    np.testing.assert_array_equal(datasets.PIXELS.to_levels(far), np.array([0, 255, 0, 255, 0, 2], np.uint8))
    wide = np.linspace(0.0, 255.0, 7)
    found = datasets.Affine(16.0, 0.25).forward(wide)
    assert found.dtype == jnp.float64
    np.testing.assert_array_equal(found, wide / 16.0 + 0.25)
    np.testing.assert_allclose(datasets.Affine(16.0, 0.25).inverse(found), wide, rtol=1e-15)


@pytest.mark.representatives("reflect")
@pytest.mark.parametrize("fill", ["edge", "reflect", 7])
def test_shifts_and_crops_are_windows_of_the_padded_image(fill):
    """Every window occurs, equally often, and nothing else does."""
    mode = {"mode": fill} if isinstance(fill, str) else {"constant_values": fill}
    padded = np.pad(IMAGE, ((2, 2), (2, 2), (0, 0)), **mode)
    windows = [padded[i : i + 5, j : j + 4] for i in range(5) for j in range(5)]
    n = 2500
    found = jax.jit(jax.vmap(partial(datasets.shift, image=IMAGE, most=2, fill=fill)))(
        jax.random.split(jax.random.key(1), n)
    )
    assert found.dtype == np.uint8
    counts = np.array([(np.asarray(found) == window).all(axis=(1, 2, 3)).sum() for window in windows])
    assert counts.sum() == n
    # Binomial counts, of probability 1/25.
    assert np.abs(counts - n / 25).max() < 4.5 * np.sqrt(n * 24) / 25
    cropped = jax.jit(partial(datasets.crop, image=IMAGE, size=(2, 3), padding=2, fill=fill))(jax.random.key(2))
    assert any((cropped == padded[i : i + 2, j : j + 3]).all() for i in range(8) for j in range(6))


def test_flips():
    n = 1000
    found = jax.jit(jax.vmap(partial(datasets.flip, image=IMAGE, probability=0.3)))(
        jax.random.split(jax.random.key(3), n)
    )
    mirrored = (np.asarray(found) == IMAGE[:, ::-1]).all(axis=(1, 2, 3))
    assert ((np.asarray(found) == IMAGE).all(axis=(1, 2, 3)) != mirrored).all()
    assert abs(mirrored.sum() - 0.3 * n) < 4.5 * np.sqrt(n * 0.21)


def dataset(seed=5, mesh=None):
    rows = np.random.default_rng(0).integers(0, 256, (24, 6, 6, 1), dtype=np.uint8)
    data = datasets.ArrayDataset(Batch(rows, cond=np.arange(24)), batch_size=16, mesh=mesh)
    steps = datasets.each_row(partial(datasets.shift, most=1), datasets.flip, datasets.PIXELS)
    return datasets.transformed(data, steps, seed)


def test_a_transformed_batch_is_a_function_of_the_seed_and_the_step():
    """Rows get keys of their own; the labels and the order are those of the dataset."""
    one, other = dataset(), dataset(seed=6)
    assert one.data.x1.dtype == jnp.uint8 and one.batch_size == 16
    batch = jax.jit(one.batch)
    first, again, second = (batch(one.data, jnp.int32(step)) for step in (3, 3, 4))
    np.testing.assert_array_equal(first.x1, again.x1)
    plain = one.dataset.batch(one.data, jnp.int32(3))
    np.testing.assert_array_equal(first.cond, plain.cond)
    assert not np.array_equal(first.x1, second.x1)
    assert not np.array_equal(first.x1, jax.jit(other.batch)(other.data, jnp.int32(3)).x1)
    # Each row is one of the 18 transforms of its image, and the rows do not all have the same one.
    used = set()
    for row, image in zip(datasets.PIXELS.to_levels(first.x1), np.asarray(plain.x1), strict=True):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
        choices = [padded[i : i + 6, j : j + 6][:, ::way] for i in range(3) for j in range(3) for way in (1, -1)]
        matches = [place for place, choice in enumerate(choices) if np.array_equal(row, choice)]
        assert matches
        used.update(matches)
    assert len(used) > 6


@pytest.mark.slow
def test_a_transformed_batch_does_not_depend_on_the_devices():
    one, spread = dataset(), dataset(mesh=sharding.mesh())
    expected = jax.jit(one.batch)(one.data, jnp.int32(3)).x1
    np.testing.assert_array_equal(jax.jit(spread.batch)(spread.data, jnp.int32(3)).x1, expected)


def test_keys_differ_from_those_of_a_sampled_dataset_with_the_same_seed():
    drawn = datasets.SampledDataset(lambda key, n: jax.random.normal(key, (n, 2)), batch_size=4)
    same = transforms.transformed_batch(drawn.batch, lambda key, batch: Batch(jax.random.normal(key, (4, 2)), batch.x1))
    found = same(None, jnp.int32(0))
    assert not np.any(found.x1 == found.x0)


def test_rows_may_be_an_array():
    found = datasets.each_row(datasets.PIXELS)(jax.random.key(0), IMAGE[None])
    np.testing.assert_array_equal(found.x1[0], datasets.PIXELS.forward(IMAGE))


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (ValueError, lambda k: datasets.Affine(0.0, 1.0), r"^divisor: expected a number in \(0, inf\], got 0.0$"),
        (TypeError, lambda k: datasets.PIXELS.inverse(IMAGE), "^x: expected floating-point arrays, got dtype uint8$"),
        (ValueError, lambda k: datasets.flip(k, IMAGE[0]), "^image: expected an array of shape"),
        (ValueError, lambda k: datasets.flip(k, IMAGE, probability=1.5), "^probability: expected a number"),
        (ValueError, lambda k: datasets.crop(k, IMAGE, size=5), "^size: expected a whole number .* at most 4, got 5$"),
        (TypeError, lambda k: datasets.crop(k, IMAGE, size=2.0), "^size: expected a whole number, got float 2.0$"),
        (ValueError, lambda k: datasets.crop(k, IMAGE, size=(2, 2, 2)), "^size: expected a whole number or a pair"),
        (
            TypeError,
            lambda k: datasets.flip(k, Batch(IMAGE[None])),
            r"^image: expected one image, got a Batch; each_row",
        ),
        (
            ValueError,
            lambda k: datasets.shift(k, IMAGE, most=4, fill="reflect"),
            "^padding: expected less than the image's",
        ),
        (
            ValueError,
            lambda k: datasets.shift(k, IMAGE, most=1, fill="wrap"),
            "^fill: expected one of 'edge', 'reflect'",
        ),
        (
            ValueError,
            lambda k: datasets.shift(k, IMAGE, most=1, fill=-1.0),
            "^fill: expected a whole number of at least 0",
        ),
        (
            TypeError,
            lambda k: datasets.shift(k, IMAGE, most=1, fill=0.5),
            "^fill: expected a whole number, got float 0.5$",
        ),
        (TypeError, lambda k: datasets.each_row(lambda image: image), "^steps: expected a function"),
        (
            TypeError,
            lambda k: datasets.transformed(IMAGE, datasets.each_row()),
            "^dataset: expected one with data and batch",
        ),
        (
            TypeError,
            lambda k: datasets.transformed(dataset().dataset, datasets.PIXELS),
            "^transform: expected a function",
        ),
    ],
)
def test_refusals(error, call, message, key):
    with pytest.raises(error, match=message):
        call(key)
