"""Reports: what a number becomes over rows, steps, chunks and devices; on the device and on the host."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import reports

RNG = np.random.default_rng(0)
# Of twelve steps: the stacked report, and what it comes to, written out.
A, B = RNG.normal(size=12), RNG.integers(1, 9, size=12).astype(float)
BINS, COUNTS = RNG.normal(size=(12, 4)), RNG.integers(0, 3, size=(12, 4)) * np.array([1.0, 1.0, 0.0, 1.0])
EVENTS, TRUTH = RNG.integers(0, 5, size=12), np.array([True] * 7 + [False] + [True] * 4)
BY_BIN = np.array([t / c if c else np.nan for t, c in zip((BINS * (COUNTS > 0)).sum(0), COUNTS.sum(0), strict=True)])
STEPS = {
    "mean": (reports.Mean(A, B), A.sum() / B.sum()),
    "by bins": (reports.Mean(BINS * (COUNTS > 0), COUNTS), BY_BIN),
    "root mean": (reports.RootMean(A**2, B), np.sqrt((A**2).sum() / B.sum())),
    "total": (reports.Total(EVENTS), EVENTS.sum()),
    "largest": (reports.Largest(A), A.max()),
    "largest of whole numbers": (reports.Largest(-EVENTS - 1), -EVENTS.min() - 1),
    "last": (reports.Last(A, np.ones(12, bool)), A[-1]),
    "last by bins": (reports.Last(BINS, np.ones(12, bool)), BINS[-1]),
    "last that is known": (reports.Last(A, TRUTH & (np.arange(12) < 9)), A[8]),
    "every": (reports.Every(TRUTH), False),
    "every that holds": (reports.Every(TRUTH[:7]), True),
    "per row": (reports.PerRow(BINS), BINS.mean()),
}


def on(where, report):
    return jax.tree.map(jnp.asarray if where == "jax" else np.asarray, report)


@pytest.mark.parametrize("where", ["numpy", "jax"])
@pytest.mark.parametrize("name", sorted(STEPS))
def test_the_value_over_steps_in_chunks_of_any_lengths(name, where):
    stacked, expected = STEPS[name]
    stacked = on(where, stacked)
    length = len(jax.tree.leaves(stacked)[0])
    whole = stacked.merged()
    assert type(whole) is type(stacked) and isinstance(whole, reports.Report)
    np.testing.assert_allclose(whole.value(), expected, rtol=1e-12)
    for cuts in ((1,), (2, 5), (1, 2, 3, 4, 5, 6)):
        edges = [0, *cuts, length]
        parts = [jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], stacked).merged() for a, b in itertools.pairwise(edges)]
        if name == "per row":  # the chunks have different numbers of rows, and are joined and not stacked
            joined = reports.PerRow(np.concatenate([part.values for part in parts])[None]).merged()
        else:
            joined = jax.tree.map(lambda *leaves: np.stack(leaves), *parts).merged()
        np.testing.assert_allclose(joined.value(), expected, rtol=1e-12)
    if where == "numpy":
        assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((whole, whole.value())))


@pytest.mark.parametrize("name", sorted(set(STEPS) - {"per row"}))
def test_a_neutral_report_changes_nothing(name):
    """Before, between and after the others; of the shapes and dtypes of the report."""
    stacked, expected = STEPS[name]
    first = jax.tree.map(lambda leaf: leaf[0], on("jax", stacked))
    neutral = first.neutral()
    assert jax.tree.map(jnp.shape, neutral) == jax.tree.map(jnp.shape, first)
    assert jax.tree.map(lambda leaf: leaf.dtype, neutral) == jax.tree.map(lambda leaf: leaf.dtype, first)
    # Of a shape alone, too, as ``sequence`` asks for it.
    shaped = jax.eval_shape(lambda: first).neutral()
    jax.tree.map(np.testing.assert_array_equal, shaped, neutral)
    for place in (0, 3, len(jax.tree.leaves(stacked)[0])):
        more = jax.tree.map(lambda leaf, n, p=place: np.insert(leaf, p, n, axis=0), stacked, neutral)
        np.testing.assert_allclose(more.merged().value(), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", [reports.Mean, reports.RootMean])
def test_nothing_to_average_is_nan_and_no_warning(kind):
    zero = np.zeros(())
    with np.errstate(all="raise"):
        assert np.isnan(kind(zero, zero).value())
        np.testing.assert_array_equal(kind(np.array([0.0, 4.0]), np.array([0.0, 1.0])).value()[:1], [np.nan])
    assert np.isnan(jax.jit(lambda z: kind(z, z).value())(zero))


def test_a_number_that_is_not_finite_is_shown():
    for bad in (np.nan, np.inf):
        assert not np.isfinite(reports.Mean(np.array([1.0, bad]), np.array([1.0, 1.0])).merged().value())
        assert not np.isfinite(reports.Largest(np.array([bad, 1.0])).merged().value())


@pytest.mark.parametrize("name", sorted(STEPS))
def test_reports_go_through_jit_and_scan(name):
    stacked, expected = STEPS[name]
    stacked = on("jax", stacked)

    @jax.jit
    def run(stacked):
        _, again = jax.lax.scan(lambda carry, step: (carry, step), 0, stacked)
        return again.merged()

    out = run(stacked)
    assert type(out) is type(stacked)
    np.testing.assert_allclose(out.value(), expected, rtol=1e-12)


def test_rows_that_lie_on_eight_devices_are_averaged_over_all():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    values = RNG.normal(size=64)
    spread = jax.device_put(values, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    for report in (reports.PerRow(spread), reports.PerRow(spread).mean(), reports.mean(spread)):
        np.testing.assert_allclose(jax.jit(lambda r: r.value())(report), values.mean(), rtol=1e-12)


@pytest.mark.parametrize("values", [np.array([True, False, True]), np.array([1, 0, 1], np.int32)])
def test_a_share_of_truth_values(values):
    for found in (reports.PerRow(values).value(), reports.PerRow(jnp.asarray(values)).mean().value()):
        np.testing.assert_allclose(found, 2 / 3, rtol=1e-7)
    np.testing.assert_allclose(reports.mean(values).value(), 2 / 3, rtol=1e-7)


def test_means_by_bins():
    by = jnp.array([0.0, 0.12, 0.2, 0.99, 1.0, 0.5])
    values = jnp.array([1.0, 3.0, 5.0, 7.0, 9.0, 11.0])
    found = jax.jit(lambda v, b: reports.binned(v, b, 8))(values, by)
    np.testing.assert_array_equal(found.count, [2, 1, 0, 0, 1, 0, 0, 2])
    np.testing.assert_allclose(found.value(), [2.0, 5.0, np.nan, np.nan, 11.0, np.nan, np.nan, 8.0])


def test_a_bare_number_becomes_its_mean_over_steps():
    """Under a name of any spelling: the names mean nothing."""

    @jax.jit
    def of(step):
        return reports.as_reports(
            {
                "x_rows": step,
                "by_t": jnp.stack([step, 2.0 * step]),
                "whole": jnp.int32(3),
                "python": 2.5,
                "true": step > 1,
                "kept": reports.Total(jnp.int32(1)),
                "rows": reports.PerRow(step * jnp.ones(4)),
            }
        )

    stacked = jax.lax.map(of, jnp.array([1.0, 2.0, 3.0]))
    found = reports.values(reports.merged(stacked))
    expected = {"x_rows": 2.0, "by_t": [2.0, 4.0], "whole": 3.0, "python": 2.5, "true": 2 / 3, "kept": 3, "rows": 2.0}
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
    assert isinstance(stacked["rows"], reports.Mean) and isinstance(stacked["kept"], reports.Total)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({3: 1.0}, "names that are strings, got 3"),
        ({"text": "0.5"}, "under 'text', got str"),
        ({"key": jax.random.key(0)}, "under 'key', got"),
        ({"list": [1.0, 2.0]}, "under 'list', got list"),
        ({"none": None}, "under 'none', got NoneType"),
        ({"nested": {"a": 1.0}}, "under 'nested', got dict"),
        ({"kind": reports.Mean}, "under 'kind', got"),
    ],
)
def test_what_is_no_report_is_refused(metrics, message):
    with pytest.raises(TypeError, match=f"metrics: expected.*{message}"):
        reports.as_reports(metrics)
