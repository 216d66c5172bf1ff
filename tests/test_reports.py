"""Reports: averages over rows, steps, chunks and devices; on the device and on the host."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import reports

RNG = np.random.default_rng(0)
# name -> the stacked report of twelve steps, and its value written out.
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


# The formulas are written once for both kinds of arrays.
@pytest.mark.representatives(*(f"{name}-numpy" for name in STEPS), "by bins-jax", "last that is known-jax")
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
    # Also for a report of shapes only, as ``sequence`` needs it.
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
    """For any name: names have no meaning."""

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


class Geometric(NamedTuple):
    """A geometric mean, a kind of report that the library does not have."""

    logs: Any
    count: Any

    def merged(self):
        return Geometric(self.logs.sum(0), self.count.sum(0))

    def neutral(self):
        return Geometric(jnp.zeros_like(self.logs), jnp.zeros_like(self.count))

    def value(self):
        return np.exp(self.logs / self.count)


def test_a_report_of_one_s_own_is_merged_by_its_own_rule():
    steps = jax.lax.map(
        lambda x: reports.as_reports({"own": Geometric(jnp.log(x), jnp.ones_like(x))}), jnp.array([2.0, 8.0])
    )
    assert isinstance(steps["own"], Geometric)
    np.testing.assert_allclose(reports.values(jax.device_get(reports.merged(steps)))["own"], 4.0, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits_are_summed_in_float32(dtype):
    """Halves by two bins, a count beyond 2048, and a sum beyond 65504."""
    by = jnp.linspace(0, 1, 5000).astype(dtype)
    halves = jnp.full(5000, 0.5, dtype)
    found = reports.binned(halves, by, 2)
    np.testing.assert_array_equal(found.value(), [0.5, 0.5])
    np.testing.assert_array_equal(
        found.count, [np.sum(np.asarray(by, float) < 0.5), np.sum(np.asarray(by, float) >= 0.5)]
    )
    rows = jnp.full(4096, 100.0, dtype)
    steps = reports.Mean(rows, jnp.ones_like(rows))
    roots = reports.RootMean(jnp.square(rows.astype(jnp.float32)).astype(jnp.bfloat16), jnp.ones_like(rows))
    of = (reports.mean(rows), reports.PerRow(rows), reports.PerRow(rows).mean(), steps.merged())
    host = (reports.Mean(*map(np.asarray, steps)).merged(), reports.PerRow(np.asarray(rows)))
    for report in (*of, *host):
        assert report.value() == 100.0 and report.value().dtype == np.float32
    np.testing.assert_allclose(roots.merged().value(), 100.0, rtol=2**-8)
    assert reports.Total(jnp.ones(4096, dtype)).merged().value() == 4096
    assert all(leaf.dtype == jnp.float32 for leaf in reports.as_reports({"a": steps, "b": rows})["a"])


ONE = reports.Mean(3, 2)
PLAIN = {
    "mean": (ONE, 1.5),
    "root mean": (reports.RootMean(9.0, 4), 1.5),
    "residual": (reports.Residual(ONE, {"t": ONE}), 1.5),
    "tangent": (reports.Tangent(reports.Mean(9.0, 4), {}), 1.5),
    "per row": (reports.PerRow([1, 2]), 1.5),
    "total": (reports.Total(3), 3),
    "largest": (reports.Largest(-2.5), -2.5),
    "largest truth": (reports.Largest(True), True),
    "first": (reports.First(3.0), 3.0),
    "last": (reports.Last(3.0), 3.0),
    "last unknown": (reports.Last(3.0, False), np.nan),
    "every": (reports.Every(True), True),
}


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_python_numbers_are_reports_outside_a_step_and_in_one(name):
    report, expected = PLAIN[name]
    np.testing.assert_equal(float(report.value()), float(expected))

    def step(left_out):
        return reports.leave_out(reports.as_reports({"x": report}), left_out)

    run = jax.jit(lambda: reports.merged(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), step(jnp.asarray(False)))))
    found = run()["x"].value()
    np.testing.assert_equal(float(found), float(expected) * (2 if name == "total" else 1))
    neutral = report.neutral()
    assert type(neutral) is type(report)
    if isinstance(report, reports.AVERAGES):
        assert np.isnan(neutral.value()) and np.isnan(step(jnp.asarray(True))["x"].value())


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"half": reports.Mean(None, 1.0)}, "under 'half', got NoneType"),
        ({"text": reports.Last("3")}, "under 'text', got str"),
        ({"own": Geometric("a", 1.0)}, "under 'own', got str"),
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
