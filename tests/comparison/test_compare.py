"""``comparison.compare`` against closed forms: errors, NFE, FLOPs, distances, speed-up; user-given models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import comparison, interpolants, metrics, oracles, samplers, solvers
from jflow.comparison import Entry
from jflow.types import dyadic

ORACLE = oracles.gaussian(interpolants.linear())
PARAMS = oracles.gaussian_params([1.0, -0.5], [[0.5, 0.2], [0.2, 0.3]])
N = 21


def noise(n=N):
    return jax.random.normal(jax.random.key(1), (n, 2))


@pytest.fixture(scope="module")
def table():
    exact = Entry("exact", ORACLE.flow_map, PARAMS, steps=(1, 2))
    euler = Entry("euler", ORACLE.flow_map, PARAMS, solver="euler", steps=(32, 128))
    adaptive = Entry("tsit5", ORACLE.velocity, PARAMS, solver="tsit5", tolerances=(1e-4,))
    failing = Entry("cut short", ORACLE.velocity, PARAMS, solver=solvers.Options("tsit5", max_steps=1))
    reference = Entry("truth", ORACLE.flow_map, PARAMS, steps=(1,))
    entries = [exact, euler, adaptive, failing]
    return comparison.compare(entries, noise(), reference=reference, batch=8, repeats=2)


def test_errors_are_those_of_the_closed_form(table):
    assert [row.name for row in table.rows][:3] == ["exact, 1 jump", "exact, 2 jumps", "euler, 32 steps"]
    assert table.reference == "truth, 1 jump"
    assert max(table.row(f"exact, {n}").rmse for n in ("1 jump", "2 jumps")) < 1e-14
    coarse, fine = (table.row(f"euler, {n} steps") for n in (32, 128))
    assert np.log(coarse.rmse / fine.rmse) / np.log(4) == pytest.approx(1.0, abs=0.03)
    # The errors themselves, of one row, by a loop written out here.
    step = 1.0 / 32

    @jax.jit
    def difference(x0):
        velocity = jax.vmap(lambda t, x: ORACLE.velocity(PARAMS, t, x), (None, 0))
        x, _ = jax.lax.scan(lambda x, t: (x + step * velocity(t, x), None), x0, step * jnp.arange(32.0))
        return x - jax.vmap(lambda x: ORACLE.flow_map.jump(PARAMS, 0.0, 1.0, x))(x0)

    squares = np.mean(np.square(difference(noise())), axis=1)
    assert coarse.rmse == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-9)
    assert coarse.median_error == pytest.approx(np.median(np.sqrt(squares)), rel=1e-9)
    jackknife = [np.sqrt(np.mean(np.delete(squares, i))) for i in range(N)]
    assert coarse.rmse_error == pytest.approx(np.sqrt((N - 1) * np.var(jackknife)), rel=0.1)


def test_nfe_and_flops_are_counted(table):
    nfe = {row.name: row.nfe for row in table.rows}
    assert (nfe["exact, 2 jumps"], nfe["euler, 32 steps"], nfe["euler, 128 steps"]) == (2, 32, 128)
    count = solvers.solve_counted(ORACLE.velocity, "tsit5", rtol=1e-4, atol=1e-4)
    stats = jax.jit(jax.vmap(lambda x: count(PARAMS, 0.0, 1.0, x)[1]))(noise())
    assert nfe["tsit5, tolerance 0.0001"] == pytest.approx(np.mean(stats.nfe))
    euler = table.row("euler, 32 steps")
    assert table.row("euler, 128 steps").flops == 4 * euler.flops > 0


def test_a_speed_up_is_over_the_cheapest_solve_that_is_as_accurate(table):
    solved = [row for row in table.rows if row.kind == "solver"]
    for row in table.rows:
        as_good = [each.seconds for each in solved if each.rmse <= row.rmse]
        assert row.speedup == (min(as_good) / row.seconds if as_good else None)
        assert 0 < row.seconds_low <= row.seconds <= row.seconds_high and row.compile_seconds > 0
        assert row.samples_per_second * row.microseconds_per_sample == pytest.approx(1e6)
    assert table.row("exact, 1 jump").speedup is None and 0 < table.row("euler, 128 steps").speedup <= 1


def test_a_failed_solve_is_shown_and_ends_nothing(table):
    failed = table.row("cut short")
    assert failed.failed == N and np.isnan([failed.rmse, failed.distances["energy"].value]).all()
    assert failed.speedup is None and table.row("exact, 1 jump").failed == 0
    assert table.markdown().splitlines()[0].endswith("| failed |")


def test_markdown_and_json(table):
    lines = table.markdown().splitlines()
    assert len(lines) == 2 + len(table.rows) and len({line.count("|") for line in lines}) == 1
    row = next(line for line in lines if line.startswith("| euler, 32 steps | 32 |"))
    assert f"| {table.row('euler, 32 steps').rmse:.3g} |" in row
    again = comparison.Comparison.from_json(table.to_json())
    assert again.to_json() == table.to_json() and "NaN" not in table.to_json()
    assert again.rows[:4] == table.rows[:4] and np.isnan(again.row("cut short").rmse)
    with pytest.raises(ValueError, match="of format 1"):
        comparison.Comparison.from_json("{}")
    with pytest.raises(KeyError, match="expected one of 'exact, 1 jump'"):
        table.row("exact")


def test_the_plot_is_drawn_on_the_given_axes(table, tmp_path):
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots(1, 2)
    assert table.plot(axes) is figure
    labels = [text.get_text() for text in axes[1].get_legend().get_texts()]
    assert labels == ["exact", "euler", "tsit5", "cut short"]
    np.testing.assert_array_equal(axes[0].containers[1].lines[0].get_xdata(), [32, 128])
    assert axes[1].get_xlabel().startswith("time per sample")
    table.save_figure(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
    with pytest.raises(ValueError, match="axes: expected two"):
        table.plot(axes[:1])


def moved(params, t, x, cond=None, *, key=None):
    """The velocity of a user: a matrix, a condition and sampling noise."""
    v = params["matrix"] @ x + cond["shift"]
    return v if key is None else v + jax.random.normal(key, x.shape)


def test_a_velocity_with_parameters_condition_and_sampling_noise():
    matrix = jnp.arange(16.0).reshape(4, 4) / 16
    x0 = jax.random.normal(jax.random.key(2), (7, 4))
    shift = np.arange(28.0).reshape(7, 4)
    key = jax.random.key(3)
    drawn = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), (4,)) for i in range(7)])
    # One Euler step, by hand. Blocks of three: the last one is filled up.
    quiet = x0 + x0 @ matrix.T + shift
    entries = [
        Entry("quiet", moved, {"matrix": matrix}, solver="euler", steps=(1,)),
        Entry("noisy", moved, {"matrix": matrix}, solver="euler", steps=(1,), key=key, cond={"shift": 2 * shift}),
    ]
    table = comparison.compare(entries, x0, cond={"shift": shift}, reference=quiet, distances=(), batch=3, repeats=1)
    assert table.row("quiet, 1 step").rmse < 1e-14 and table.reference == "given end points"
    expected = np.sqrt(np.mean(np.square(np.asarray(drawn) + shift)))
    assert table.row("noisy, 1 step").rmse == pytest.approx(expected, rel=1e-12)
    # The product of a matrix and a vector, and the sum of two vectors.
    assert table.row("quiet, 1 step").flops == 2 * 16 + 4


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


def test_events_may_be_pytrees_of_several_dtypes():
    def velocity(params, t, x, cond=None, *, key=None):
        return {"a": jnp.full_like(x["a"], 2.0), "b": jnp.full_like(x["b"], -1.0)}

    x0 = {"a": np.zeros((5, 3)), "b": np.zeros((5, 2, 2), np.float32)}
    table = comparison.compare(Entry("two", velocity, solver="euler", steps=(1,)), x0, reference=x0, repeats=1)
    (row,) = table.rows
    assert row.rmse == pytest.approx(((3 * 4 + 4 * 1) / 7) ** 0.5) and row.rmse_error == 0.0
    # The energy distance of two points: twice the distance between them.
    assert row.distances["energy"].value == pytest.approx(2 * (3 * 4 + 4) ** 0.5)


@pytest.mark.parametrize("name", sorted(comparison.DISTANCES))
def test_every_named_distance_grows_with_a_shift(name):
    x, y = noise(), np.asarray(noise())[::-1] + 0.5
    near, far = (comparison.DISTANCES[name](x, y + shift) for shift in (0.0, 1.0))
    near, far = (each.value if isinstance(each, metrics.Estimate) else each for each in (near, far))
    assert float(far) > float(near)


def test_a_sampler_is_counted_by_its_steps():
    def make(bound):
        return samplers.SDE(bound, ORACLE.interpolant, method="heun")

    entry = Entry("sde", ORACLE.velocity, PARAMS, sampler=make, steps=(3,), key=jax.random.key(4))
    (row,) = comparison.compare(entry, noise(4), reference=noise(4), distances=(), repeats=1).rows
    assert (row.kind, row.nfe, row.speedup) == ("sampler", 6, None) and np.isfinite(row.rmse)


def test_a_model_with_a_loop_has_no_count_of_flops():
    def looped(params, t, x, cond=None, *, key=None):
        return jax.lax.fori_loop(0, 3, lambda _, y: 0.5 * y, x)

    entry = Entry("looped", looped, solver="euler", steps=(2,))
    (row,) = comparison.compare(entry, noise(3), reference=noise(3), distances=(), repeats=1).rows
    assert row.flops is None and row.nfe == 2


def test_by_default_the_first_velocity_is_solved_tightly():
    x0 = noise(3)
    table = comparison.compare(Entry("exact", ORACLE.flow_map, PARAMS, steps=(1,)), x0, distances=(), repeats=1)
    assert table.reference == "dopri8, tolerance 1e-08, of the velocity of exact"
    assert 0 < table.rows[0].rmse < 1e-7


def entry(**changes):
    return Entry("exact", ORACLE.flow_map, PARAMS, **{"steps": (1,), **changes})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"entries": []}, "entries: expected at least one"),
        ({"entries": [ORACLE.flow_map]}, "entries: expected comparison.Entry"),
        ({"entries": [entry(), entry()]}, r"entries: expected rows of different names, got \['exact, 1 jump'\]"),
        ({"x0": np.ones((3, 2), int)}, "x0: expected floating"),
        ({"cond": np.ones(2)}, "cond: expected leaves with a leading axis of N = 3"),
        ({"entries": entry(cond=np.ones(4))}, "entry 'exact': cond: expected leaves"),
        ({"reference": entry(steps=(1, 2))}, "reference: expected an entry of one row, got 2"),
        ({"reference": np.ones((3, 1))}, "reference: expected the shape of x0"),
        ({"batch": 0}, "batch: expected a whole number"),
        ({"repeats": 0}, "repeats: expected a whole number"),
        ({"scale": 0.0}, "scale: expected a number"),
        ({"distances": "energy"}, "distances: expected a sequence of names"),
        ({"distances": ("fid",)}, "distances: expected one of 'energy'"),
        ({"distances": {"mine": 3}}, r"distances\['mine'\]: expected a function"),
        ({"features": 3}, "features: expected a function"),
        ({"data": np.ones((3, 2), int)}, "data: expected floating"),
    ],
)
def test_mistakes_are_named_before_anything_runs(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        comparison.compare(**{"entries": entry(), "x0": np.ones((3, 2)), "reference": np.ones((3, 2)), **arguments})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": 3}, "name: expected a string"),
        ({"model": ORACLE.flow_map.bind(PARAMS)}, "model: expected a Velocity or a FlowMap, got a BoundFlowMap"),
        ({"model": ORACLE.velocity}, "solver: expected a solver or a sampler for a Velocity"),
        ({"solver": "magic"}, "solver: expected one of"),
        ({"solver": "euler", "tolerances": (0.1,)}, "steps"),
        ({"solver": "tsit5", "tolerances": (0.0,)}, "tolerances: expected a number"),
        ({"tolerances": (0.1,)}, "tolerances: expected none without a solver"),
        ({"solver": solvers.Options("tsit5"), "steps": (1,)}, "steps: expected None beside Options"),
        ({"steps": (0,)}, "steps: expected a whole number"),
        ({"steps": ()}, "steps, tolerances: expected at least one"),
        ({"sampler": samplers.Jumps, "solver": "euler"}, "solver, sampler: expected at most one"),
        ({"sampler": samplers.Jumps.step}, "key: expected a PRNG key for a sampler"),
        ({"key": 3}, "key: expected a PRNG key"),
    ],
)
def test_an_entry_refuses_what_cannot_run(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Entry(**{"name": "exact", "model": ORACLE.flow_map, "params": PARAMS, **fields})


def test_jumps_outside_the_domain_are_refused():
    one_step = solvers.solve(ORACLE.velocity, "euler", steps=1, domain=dyadic(2))
    with pytest.raises(
        ValueError, match=r"steps: expected numbers of equal jumps within the map's domain, got 3; grid"
    ):
        Entry("shortcut", one_step, PARAMS, steps=(1, 2, 3))
