"""Samples and densities of what is made up; the digits."""

from __future__ import annotations

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import datasets

draw = jax.jit(datasets.checkerboard, static_argnums=1)


def test_checkerboard_samples():
    n = 40_000
    x = np.asarray(draw(jax.random.key(0), n))
    assert x.dtype == np.float32 and np.abs(x).max() < 1
    cells = np.floor((x + 1) / 0.5).astype(int)
    assert (cells.sum(axis=1) % 2 == 0).all()
    count = np.bincount(cells[:, 0] * 4 + cells[:, 1], minlength=16)
    assert (count > 0).sum() == 8
    # Eight cells of probability 1/8, to five standard errors.
    assert np.abs(count[count > 0] - n / 8).max() < 5 * np.sqrt(n * 7 / 64)
    inside = (x + 1) / 0.5 - cells
    assert np.abs(inside.mean(axis=0) - 0.5).max() < 5 / np.sqrt(12 * n)
    # Of x^2, uniform x: variance 4/45. Of xy: at most 1/9.
    variance = datasets.CHECKERBOARD_STD**2
    assert np.abs((x**2).mean(axis=0) - variance).max() < 5 * np.sqrt(4 / 45 / n)
    assert abs((x[:, 0] * x[:, 1]).mean() - 1 / 16) < 5 / np.sqrt(9 * n)


def test_checkerboard_density():
    log_density = jax.jit(jax.vmap(datasets.checkerboard_log_density))
    # 32 points per unit length: no edge of a cell falls on one.
    centres = (np.arange(96) + 0.5) / 32 - 1.5
    grid = np.stack(np.meshgrid(centres, centres, indexing="ij"), axis=-1).reshape(-1, 2)
    density = np.exp(np.asarray(log_density(grid)))
    assert density.sum() / 32**2 == pytest.approx(1.0, abs=1e-12)
    assert (density[np.abs(grid).max(axis=1) > 1] == 0).all() and set(np.round(density, 12)) == {0.0, 0.5}
    np.testing.assert_allclose(log_density(draw(jax.random.key(1), 9216)), np.log(0.5), rtol=1e-6)
    points = np.full((9216, 2), -0.75)
    points[:5] = [[-0.75, -0.75], [-0.75, -0.25], [1.0, 1.0], [1.0, 0.25], [1.01, 0.75]]
    np.testing.assert_array_equal(np.isfinite(log_density(points))[:5], [True, False, True, False, False])


def test_digits():
    train, held_out = datasets.digits()
    assert train.x1.shape == (1438, 8, 8, 1) and held_out.x1.shape == (359, 8, 8, 1)
    assert train.x1.dtype == np.float32 and train.cond.dtype == np.int32
    everything = np.concatenate([train.x1, held_out.x1])
    assert everything.min() == -1 and everything.max() == 1
    np.testing.assert_array_equal(everything * 8, np.round(everything * 8))
    whole = np.bincount(np.concatenate([train.cond, held_out.cond]))
    np.testing.assert_array_equal(np.bincount(held_out.cond), np.round(0.2 * whole))
    again, other = datasets.digits(), datasets.digits(seed=1)
    np.testing.assert_array_equal(again.held_out.x1, held_out.x1)
    assert not np.array_equal(other.held_out.x1[:50], held_out.x1[:50])
    # No image is in both: the split is of rows, so the two together hold as many different images as the source.
    assert len(np.unique(everything.reshape(1797, -1), axis=0)) == len(everything)


def test_digits_says_what_is_missing(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        datasets.digits()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: datasets.digits(held_out=1.5), "held_out"),
        (lambda: datasets.checkerboard_log_density(jnp.zeros((4, 2))), "x"),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda: datasets.digits(held_out=20),
            ValueError,
            r"^held_out: expected a number in \[0, 1\], got 20$",
            id="all held out and more",
        ),
    ],
)
def test_refused_in_words(attempt, error, message):
    with pytest.raises(error, match=message) as caught:
        attempt()
    # Not by a sub-class that means something else.
    assert caught.type is error
