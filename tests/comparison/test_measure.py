"""``comparison.compare`` against closed forms: errors, NFE, FLOPs, distances, speed-up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import comparison, solvers
from jflow.comparison import Entry
from tests.comparison.cases import ORACLE, PARAMS, N, noise


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


def test_events_may_be_pytrees_of_several_dtypes():
    def velocity(params, t, x, cond=None, *, key=None):
        return {"a": jnp.full_like(x["a"], 2.0), "b": jnp.full_like(x["b"], -1.0)}

    x0 = {"a": np.zeros((5, 3)), "b": np.zeros((5, 2, 2), np.float32)}
    table = comparison.compare(Entry("two", velocity, solver="euler", steps=(1,)), x0, reference=x0, repeats=1)
    (row,) = table.rows
    assert row.rmse == pytest.approx(((3 * 4 + 4 * 1) / 7) ** 0.5) and row.rmse_error == 0.0
    # The energy distance of two points: twice the distance between them.
    assert row.distances["energy"].value == pytest.approx(2 * (3 * 4 + 4) ** 0.5)


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
