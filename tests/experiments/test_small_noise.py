"""The experiment on small noise: the orders that its derivation promises, in both of its limits."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import small_noise


@pytest.fixture(scope="module")
def found():
    """Each table as its sizes and its columns."""
    rows = small_noise.tables(small_noise.Config(points=8, nodes=24))
    return {
        name: (tuple(table), {c: np.array([r[c] for r in table.values()]) for c in next(iter(table.values()))})
        for name, table in rows.items()
    }


@pytest.mark.slow
def test_the_noise_brings_a_bias_of_second_order_and_the_plain_form_a_variance_without_bound(found):
    sizes, columns = found["noise"]
    assert np.max(columns["hutchinson_bias"]) < 1e-10
    np.testing.assert_allclose(columns["plain_bias"], columns["difference_bias"], rtol=1e-5)
    assert abs(small_noise.slope(sizes, columns["difference_bias"]) - 2.0) < 0.1
    assert abs(small_noise.slope(sizes, columns["plain_deviation"]) + 1.0) < 0.05
    np.testing.assert_allclose(columns["difference_deviation"][-1], columns["hutchinson_deviation"][-1], rtol=0.01)


@pytest.mark.slow
def test_the_squared_errors_of_a_diffusion_tend_to_hutchinsons_estimator_as_its_steps_shrink(found):
    sizes, columns = found["step"]
    assert abs(small_noise.slope(sizes, columns["squared_errors_bias"]) - 1.0) < 0.15
    np.testing.assert_allclose(columns["squared_errors_deviation"][-1], columns["hutchinson_deviation"][-1], rtol=0.05)


@pytest.mark.slow
def test_a_quick_run_writes_its_tables_and_figure(tmp_path, found):
    """In this process, which has compiled the same programs for the tables above."""
    del found
    small_noise.main(small_noise.Config(quick=True, out=tmp_path))
    assert all((tmp_path / name).stat().st_size > 0 for name in ("table.md", "small_noise.png"))
    assert set(json.loads((tmp_path / "results.json").read_text())["tables"]) == {"noise", "step"}
