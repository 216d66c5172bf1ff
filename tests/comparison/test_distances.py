"""Distances of samples by name: they grow with a shift, and are over features in units of the data."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jflow import comparison, metrics
from jflow.comparison import Entry
from tests.comparison.cases import noise


@pytest.mark.parametrize("name", sorted(comparison.DISTANCES))
def test_every_named_distance_grows_with_a_shift(name):
    x, y = noise(), np.asarray(noise())[::-1] + 0.5
    near, far = (comparison.DISTANCES[name](x, y + shift) for shift in (0.0, 1.0))
    near, far = (each.value if isinstance(each, metrics.Estimate) else each for each in (near, far))
    assert float(far) > float(near)


def test_distances_are_over_the_features_of_samples_in_units_of_the_data():
    identity = Entry("move", lambda params, t, x, cond=None, *, key=None: 0 * x + 1.0, None, solver="euler", steps=(1,))
    x0, data = noise(9), np.asarray(noise(12))[:, ::-1] * 2.0
    distances = {"energy": metrics.energy_distance, "gap": lambda x, y: jnp.mean(x) - jnp.mean(y)}

    def first(samples):
        return samples[:, :1]

    table = comparison.compare(
        identity, x0, reference=x0, data=data, features=first, distances=distances, scale=3.0, repeats=1
    )
    (row,) = table.rows
    expected = metrics.energy_distance(3.0 * (x0[:, :1] + 1.0), data[:, :1])
    assert row.distances["energy"] == pytest.approx((float(expected.value), float(expected.standard_error)), rel=1e-9)
    gap = float(3.0 * (jnp.mean(x0[:, 0]) + 1.0) - np.mean(data[:, 0]))
    assert row.distances["gap"].value == pytest.approx(gap, rel=1e-9) and row.distances["gap"].standard_error is None
    assert row.rmse == pytest.approx(3.0) and table.floor["gap"].value == pytest.approx(gap - 3.0, rel=1e-9)
    assert table.markdown().splitlines()[-1].startswith("| reference |")
    assert comparison.Comparison.from_json(table.to_json()) == table
