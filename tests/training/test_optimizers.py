"""Optimizers that skip steps, ask for the loss, or survive a broken step: what follows them, and how a run goes on."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jflow import objectives, reports, training
from jflow.training import NonFiniteError, RunDirectory, ema, fit, init_state, make_chunk, make_step
from jflow.training.metrics_log import read
from jflow.types import Aux, Batch

ROWS = 64
TIMES = ("seconds", "steps_per_second")


def objective(params, key, batch, context):
    """Noisy regression on the sine."""
    noise = 0.1 * jax.random.normal(key, batch.x1.shape, batch.x1.dtype)
    predicted = batch.x1 * params["w"][None] + params["b"][None]
    return jnp.sum((predicted - jnp.sin(batch.x1) - noise) ** 2, axis=1), {"at": jnp.asarray(context.step, float)}


def batches(broken=(), scale=1.0):
    """``batch_fn``: the rows in an order that depends on the step; all of them NaN at the steps that are broken."""

    def batch_fn(data, step):
        x = jnp.roll(data, step, axis=0)[: ROWS // 2]
        bad = jnp.any(step == jnp.asarray(broken, jnp.int32))
        return Batch(x1=jnp.where(bad, jnp.nan, scale * x))

    return batch_fn


def params(dtype=jnp.float64):
    return {"w": jnp.full((3,), 2.0, dtype), "b": jnp.linspace(-1.0, 1.0, 3, dtype=dtype)}


def data(dtype=jnp.float64):
    return jax.random.normal(jax.random.key(5), (ROWS, 3), dtype)


def walk(optimizer, steps, *, broken=(), averages=(0.9,), objective=objective, start=None, **kwargs):
    """The state before each step and after the last, and the metrics of each step."""
    step = jax.jit(make_step(objective, optimizer, ema=averages, **kwargs))
    state = init_state(params() if start is None else start, optimizer, jax.random.key(1), ema=averages)
    take, rows, states, metrics = jax.jit(batches(broken)), data(), [state], []
    for n in range(steps):
        state, found = step(state, take(rows, jnp.int32(n)))
        states.append(state)
        metrics.append(reports.values(found))
    return states, metrics


def geometric(points, decay=0.9):
    """The average with a constant decay of p_0, p_1, ..., in closed form."""
    n = len(points) - 1
    weights = np.array([decay**n] + [(1 - decay) * decay ** (n - k) for k in range(1, n + 1)])
    return jax.tree.map(lambda *leaves: np.tensordot(weights, np.stack(leaves), 1), *points)


def close(a, b, rtol=1e-6, atol=1e-9):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def every(k, optimizer=None, **kwargs):
    return optax.MultiSteps(optax.adam(1e-1) if optimizer is None else optimizer, k, **kwargs)


def growing(n):
    """Two steps for each of the first two updates, then three."""
    return jnp.where(n < 2, 2, 3)


def with_hyperparams(learning_rate):
    return every(4, optax.adam(learning_rate)).gradient_transformation()


# An optimizer, and after which of 16 steps (counted from 1) it has made an update.
SKIPPING = {
    "multi_steps": (every(4), (4, 8, 12, 16)),
    "as a transformation": (every(4).gradient_transformation(), (4, 8, 12, 16)),
    "with a schedule": (every(growing), (2, 4, 7, 10, 13, 16)),
    "in a chain": (optax.chain(optax.clip(1.0), every(4).gradient_transformation()), (4, 8, 12, 16)),
    "with extra arguments": (optax.with_extra_args_support(every(4).gradient_transformation()), (4, 8, 12, 16)),
    "with hyperparameters": (optax.inject_hyperparams(with_hyperparams)(learning_rate=0.1), (4, 8, 12, 16)),
    "one in another": (every(2, every(3)), (6, 12)),
    "beside frozen ones": (
        optax.partition(
            {"on": every(4).gradient_transformation(), "off": optax.set_to_zero()}, {"w": "on", "b": "off"}
        ),
        (4, 8, 12, 16),
    ),
    "one group of two": (
        optax.partition({"a": every(4).gradient_transformation(), "b": optax.sgd(0.1)}, {"w": "a", "b": "b"}),
        tuple(range(1, 17)),
    ),
    "if finite, within": (every(4, optax.apply_if_finite(optax.adam(0.1), 3)), (4, 8, 12, 16)),
    "if finite, around": (optax.apply_if_finite(every(4).gradient_transformation(), 3), (4, 8, 12, 16)),
    "masked": (optax.conditionally_mask(optax.adam(0.1), lambda step: step % 2 == 1), (2, 4, 6, 8, 10, 12, 14, 16)),
    "applied every fourth": (optax.chain(optax.adam(0.1), optax.apply_every(4)), (4, 8, 12, 16)),
    # It transforms at some steps only, and moves the parameters at each.
    "transformed": (
        optax.chain(optax.conditionally_transform(optax.scale(0.5), lambda step: step % 2 == 1), optax.sgd(0.1)),
        tuple(range(1, 17)),
    ),
}


@pytest.mark.representatives("multi_steps", "if finite, around")
@pytest.mark.parametrize("name", SKIPPING)
def test_averages_and_counts_move_when_the_optimizer_does(name):
    optimizer, at = SKIPPING[name]
    schedules = {"constant": ema.constant(0.9), "power": ema.power(2.0)}
    states, metrics = walk(optimizer, 16, averages=schedules)
    points = [states[0].params, *(states[n].params for n in at)]
    for before, after in itertools.pairwise(points):
        assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True))
    close(states[-1].ema["constant"], geometric(points))
    # The weights of p_1, ..., p_n that ``power`` promises, n being the number of updates.
    k = np.arange(len(at) + 1) / len(at)
    close(
        states[-1].ema["power"],
        jax.tree.map(lambda *leaves: np.tensordot(np.diff(k**3.0), np.stack(leaves), 1), *points[1:]),
    )
    updates = [sum(n <= step for n in at) for step in range(17)]
    assert [int(state.updates) for state in states] == updates
    assert [int(state.step) for state in states] == list(range(17))
    assert [int(found["updates"]) for found in metrics] == updates[1:]
    # The objective is told the number of updates.
    assert [int(found["at"]) for found in metrics] == updates[:-1]


def test_the_lag_of_an_average_of_a_straight_walk():
    """Parameters that move by one at each of 8 updates: after them the average lags by 9 (1 - .9^8) behind the last."""
    linear = lambda params, key, batch, context: (batch.x1[:, 0] * 0 - params["w"][0], {})  # noqa: E731
    start = {"w": jnp.zeros((1,))}
    for micro in (1, 4):
        optimizer = optax.sgd(1.0) if micro == 1 else every(micro, optax.sgd(1.0))
        states, _ = walk(optimizer, 8 * micro, objective=linear, start=start)
        assert float(states[-1].params["w"][0]) == pytest.approx(8.0)
        assert 8.0 - float(states[-1].ema["0.9"]["w"][0]) == pytest.approx(9 * (1 - 0.9**8), rel=1e-6)


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, lambda optimizer: every(2, optimizer)])
def test_an_update_of_length_zero_is_one(wrap):
    """The learning rate of a warm-up starts at zero: the parameters stay, and the count goes on."""
    states, _ = walk(wrap(optax.sgd(optax.linear_schedule(0.0, 0.1, 3))), 4)
    one, two = states[1:3] if states[1].updates else states[2:4]
    close(one.params, states[0].params, rtol=0, atol=0)
    assert [int(state.updates) for state in states] in ([0, 1, 2, 3, 4], [0, 0, 1, 1, 2])
    assert int(one.updates) == 1 and int(two.updates) >= 1


def test_steps_that_are_left_out_do_not_count():
    skip = every(2, should_skip_update_fn=optax.skip_not_finite)
    states, metrics = walk(skip, 8, broken=(1, 5))
    # Of steps 1 to 8 the second and the sixth are left out: pairs are (1, 3), (4, 5), (7, 8).
    assert [int(state.updates) for state in states] == [0, 0, 0, 1, 1, 2, 2, 2, 3]
    close(states[-1].ema["0.9"], geometric([states[n].params for n in (0, 3, 5, 8)]))
    assert [int(found["broken_steps"]) for found in metrics] == [0, 1, 0, 0, 0, 1, 0, 0]
    large = functools.partial(optax.skip_large_updates, max_squared_norm=0.0)
    states, _ = walk(every(2, should_skip_update_fn=large), 4)
    assert int(states[-1].updates) == 0
    close(states[-1].ema["0.9"], states[0].params, rtol=0, atol=0)
    if_finite = optax.apply_if_finite(optax.adam(0.1), 3)
    states, _ = walk(if_finite, 6, broken=(0, 3))
    assert [int(state.updates) for state in states] == [0, 0, 1, 2, 2, 3, 4]
    close(states[-1].ema["0.9"], geometric([states[n].params for n in (0, 2, 3, 5, 6)]))


def test_teachers_and_curricula_go_by_updates():
    seen = []

    def taught(params, key, batch, context):
        loss, _ = objective(params, key, batch, context)
        return loss, {"teacher": context.teacher["w"][0], "w": params["w"][0]}

    step = jax.jit(make_step(taught, every(3), teacher_updates=(2,)))
    state = init_state(params(), every(3), jax.random.key(1), teacher={**params(), "w": jnp.full((3,), 10.0)})
    for n in range(9):
        state, metrics = step(state, jax.jit(batches())(data(), jnp.int32(n)))
        shown = reports.values(metrics)
        seen.append((float(shown["teacher"]), float(shown["w"])))
    # Two updates have been made before the seventh step.
    assert [teacher for teacher, _ in seen] == [10.0] * 6 + [seen[6][1]] * 3
    assert seen[6][1] != seen[5][1]

    def stage(which):
        return lambda p, key, batch, context: (objective(p, key, batch, context)[0], {"stage": jnp.asarray(which)})

    staged = objectives.sequence([(0, stage(0.0)), (2, stage(1.0))])
    _, metrics = walk(every(3), 9, objective=staged)
    assert [float(found["stage"]) for found in metrics] == [0.0] * 6 + [1.0] * 3


@pytest.mark.slow
def test_the_length_of_an_update_is_averaged_over_updates():
    optimizer = every(4)
    _, metrics = walk(optimizer, 8)
    chunk = make_chunk(make_step(objective, optimizer, ema=(0.9,)), batches())
    state, found = chunk(init_state(params(), optimizer, jax.random.key(1), ema=(0.9,)), data(), 8)
    expected = np.mean([float(metrics[n]["update_norm"]) for n in (3, 7)])
    assert float(found["update_norm"].value()) == pytest.approx(expected, rel=1e-6)
    assert float(found["update_norm"].count) == 2 and int(found["updates"].value()) == int(state.updates) == 2
    # Chunks of three steps have zero, one or no updates; the row is the same.
    state, parts = init_state(params(), optimizer, jax.random.key(1), ema=(0.9,)), []
    for length in (3, 3, 2):
        state, part = chunk(state, data(), length)
        parts.append(jax.device_get(part))
    row = reports.values(reports.merged(jax.tree.map(lambda *leaves: np.stack(leaves), *parts)))
    assert row["update_norm"] == pytest.approx(expected, rel=1e-6) and row["updates"] == 2


# Optimizers that ask for the loss, its gradient or the loss elsewhere.
ASKING = {
    "lbfgs": optax.lbfgs(),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15, store_grad=True)),
    "zoom": optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(15)),
    "plateau": optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=1, factor=0.5)),
    "polyak": optax.polyak_sgd(),
    "momo": optax.contrib.momo(),
    "lbfgs if finite": optax.apply_if_finite(optax.lbfgs(), 3),
}


@pytest.mark.representatives("plateau")
@pytest.mark.parametrize("name", ASKING)
def test_optimizers_get_what_they_ask_for(name):
    optimizer = ASKING[name]
    states, metrics = walk(optimizer, 6)
    take = jax.jit(batches())

    @jax.jit
    def by_hand(weights, opt_state, n, batch):
        def value(weights):
            key = jax.random.fold_in(jax.random.key(1), n)
            return objective(weights, key, batch, states[0])[0].mean()

        loss, grads = jax.value_and_grad(value)(weights)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optax.with_extra_args_support(optimizer).update(
                grads, opt_state, weights, value=loss, grad=grads, value_fn=value
            )
            return optax.apply_updates(weights, updates), opt_state, loss

    weights, opt_state = params(), states[0].opt_state
    for n in range(6):
        weights, opt_state, loss = by_hand(weights, opt_state, jnp.int32(n), take(data(), jnp.int32(n)))
        assert float(metrics[n]["loss"]) == pytest.approx(float(loss), rel=1e-9)
        close(states[n + 1].params, weights, rtol=1e-8)
    assert int(states[-1].updates) == 6


def test_a_plateau_is_noticed_through_multi_steps():
    """The wrapped optimizer gets the loss too, which optax.with_extra_args_support alone would drop."""
    inner = optax.chain(optax.sgd(0.0), optax.contrib.reduce_on_plateau(patience=1, factor=0.5))
    for optimizer in (every(2, inner), every(2, inner).gradient_transformation()):
        constant = lambda params, key, batch, context: (batch.x1[:, 0] * 0 + 1.0 + 0 * params["w"][0], {})  # noqa: E731
        states, _ = walk(optimizer, 8, objective=constant)
        assert float(optax.tree.get(states[-1].opt_state, "scale")) == 0.5**3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_line_searches_in_the_parameters_own_dtype(dtype, compilations):
    rows = data(dtype)
    for optimizer in (ASKING["lbfgs"], ASKING["backtracking"]):
        chunk = make_chunk(make_step(objective, optimizer), batches())
        state = init_state(params(dtype), optimizer, jax.random.key(1))
        state, first = chunk(state, rows, 6)
        compilations.clear()
        state, second = chunk(state, rows, 6)
        assert not compilations
        assert state.params["w"].dtype == dtype and float(second["loss"].value()) < float(first["loss"].value())


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (virtual) devices")
@pytest.mark.parametrize("name", ["lbfgs", "backtracking", "zoom"])
def test_line_searches_agree_on_eight_devices(name):
    step = make_step(objective, ASKING[name], ema=(0.9,))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    start = lambda: init_state(params(), ASKING[name], jax.random.key(1), ema=(0.9,))  # noqa: E731
    one, metrics1 = make_chunk(step, batches())(start(), data(), 6)
    spread = make_chunk(step, batches(), batch_sharding=rows)
    many, metrics8 = spread(*jax.device_put((start(), data()), whole), 6)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(many.params))
    close((many.params, many.ema, metrics8), (one.params, one.ema, metrics1), rtol=1e-7)


@functools.cache
def chunk_of(optimizer, broken):
    """Compiled once for all runs."""
    return make_chunk(make_step(objective, optimizer, ema=(0.9,)), batches(broken))


def run(optimizer, out, steps, *, broken=(), **kwargs):
    """``fit`` in chunks of 4 steps, with rows and checkpoints every 4."""
    chunk = chunk_of(optimizer, broken)
    state = init_state(params(), optimizer, jax.random.key(1), ema=(0.9,))
    loop = {"log_every": 4, "hooks": ()}
    loop |= {name: kwargs.pop(name) for name in (*loop, "chunk_steps", "forgive") if name in kwargs}
    directory = None if out is None else RunDirectory(out, **{"checkpoint_every": 4, **kwargs})
    return fit(state, chunk, data(), total_steps=steps, run=directory, **loop)


def rows_of(out):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read(out / "metrics.jsonl")]


@pytest.mark.slow
def test_resumed_in_the_middle_of_an_accumulation(tmp_path, assert_same):
    for name, optimizer in (("three", every(3)), ("lbfgs", ASKING["lbfgs"])):
        whole = run(optimizer, tmp_path / name / "whole", 16)
        part = run(optimizer, tmp_path / name / "part", 8)
        # The eighth step is the second of three.
        assert name == "lbfgs" or (int(part.opt_state.mini_step), int(part.updates)) == (2, 2)
        assert_same(run(optimizer, tmp_path / name / "part", 16, resume=True), whole)
        assert rows_of(tmp_path / name / "part") == rows_of(tmp_path / name / "whole")


SURVIVORS = {
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 10),
    "zero_nans": optax.chain(optax.zero_nans(), optax.adam(0.1)),
    "skip_not_finite": every(1, should_skip_update_fn=optax.skip_not_finite),
}


@pytest.mark.representatives("skip_not_finite")
@pytest.mark.parametrize("name", SURVIVORS)
def test_broken_steps_are_forgiven(name, tmp_path):
    optimizer, broken = SURVIVORS[name], (2, 5, 6)
    with pytest.raises(NonFiniteError, match=r"within steps 1 to 4 .*without 1 broken step, up to 1 in a row"):
        run(optimizer, None, 12, broken=broken)
    with pytest.raises(NonFiniteError, match=r"within steps 5 to 8 .*without 2 broken steps, up to 2 in a row"):
        run(optimizer, None, 12, broken=broken, forgive=1)
    state = run(optimizer, tmp_path, 12, broken=broken, forgive=2)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state.params, state.ema)))
    rows = rows_of(tmp_path)
    assert [row["broken_steps"] for row in rows] == [1, 2, 0]
    assert [row["broken_run"] for row in rows] == [1, 2, 0]
    assert [row["finite"] for row in rows] == [False, False, True]
    # The means are over the other steps.
    _, metrics = walk(optimizer, 12, broken=broken)
    for first, row in zip((0, 4, 8), rows, strict=True):
        sound = [n for n in range(first, first + 4) if n not in broken]
        for entry in ("loss", "grad_norm"):
            assert row[entry] == pytest.approx(np.mean([float(metrics[n][entry]) for n in sound]), rel=1e-9)


@pytest.mark.slow
def test_runs_of_broken_steps_are_counted_over_chunks_and_resumptions(tmp_path, assert_same):
    optimizer, broken = SURVIVORS["apply_if_finite"], (2, 3, 4, 5, 6)
    for forgive in (3, 4):
        with pytest.raises(NonFiniteError, match=r"within steps 5 to 8 .* up to 5 in a row"):
            run(optimizer, tmp_path / f"never {forgive}", 12, broken=broken, forgive=forgive)
        # Rows of eight steps are judged chunk by chunk as well.
        with pytest.raises(NonFiniteError, match="within steps 5 to 8 "):
            run(optimizer, None, 16, broken=broken, forgive=forgive, log_every=8, chunk_steps=4)
    whole = run(optimizer, tmp_path / "whole", 12, broken=broken, forgive=5)
    part = run(optimizer, tmp_path / "part", 4, broken=broken, forgive=5)
    assert int(part.broken) == 2
    assert_same(run(optimizer, tmp_path / "part", 12, broken=broken, forgive=5, resume=True), whole)
    assert rows_of(tmp_path / "part") == rows_of(tmp_path / "whole")
    assert [row["broken_run"] for row in rows_of(tmp_path / "whole")] == [2, 5, 0]
    run(optimizer, tmp_path / "other", 4, broken=broken, forgive=4)
    with pytest.raises(NonFiniteError, match=r"up to 5 in a row.*; the last good checkpoint is of step 4"):
        run(optimizer, tmp_path / "other", 12, broken=broken, forgive=4, resume=True)


def test_a_chunk_of_broken_steps_alone_has_no_mean(tmp_path):
    run(SURVIVORS["apply_if_finite"], tmp_path / "chunks", 8, broken=(0, 1, 2, 3), forgive=4)
    rows = rows_of(tmp_path / "chunks")
    assert [row["loss"] is None for row in rows] == [True, False] and rows[0]["broken_steps"] == 4
    run(SURVIVORS["apply_if_finite"], tmp_path / "rows", 8, broken=(0, 1, 2, 3), forgive=4, log_every=8, chunk_steps=4,
        checkpoint_every=8)  # fmt: skip
    (row,) = rows_of(tmp_path / "rows")
    assert row["loss"] == pytest.approx(rows[1]["loss"], rel=1e-12) and row["broken_steps"] == 4


@pytest.mark.representatives("optimizer0")
@pytest.mark.parametrize(
    "optimizer",
    [optax.adam(0.1), optax.apply_if_finite(optax.adam(0.1), 1), optax.chain(optax.adam(0.1), optax.clip(1.0))],
)
def test_parameters_that_are_not_finite_are_never_forgiven(optimizer):
    with pytest.raises(NonFiniteError, match="within steps 1 to 4"):
        run(optimizer, None, 12, broken=(1, 2, 3), forgive=1000)
    states, _ = walk(optimizer, 6, broken=(1, 2, 3))
    assert np.any(np.isnan(states[-1].params["w"]))
    # The averages stay where they were.
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(states[-1].ema))


def test_a_loss_that_is_not_finite_with_a_finite_update_is_a_broken_step(tmp_path):
    def lossless(params, key, batch, context):
        loss, metrics = objective(params, key, batch, context)
        return loss + jax.lax.stop_gradient(jnp.where(context.step == 1, jnp.inf, 0.0)), metrics

    optimizer = optax.adam(0.1)
    states, metrics = walk(optimizer, 3, objective=lossless)
    assert [int(found["broken_steps"]) for found in metrics] == [0, 1, 0]
    assert [int(state.broken) for state in states] == [0, 0, 1, 0]
    assert int(states[-1].updates) == 3


class Running:
    """An objective with a running mean of its loss."""

    def init(self, key, params):
        return jnp.ones(())

    def __call__(self, params, key, batch, context):
        loss, _ = objective(params, key, batch, context)
        return loss, Aux(0.9 * context.state + 0.1 * jax.lax.stop_gradient(jnp.mean(loss)))


def test_a_broken_step_leaves_the_state_of_the_objective():
    optimizer = SURVIVORS["apply_if_finite"]
    step = jax.jit(make_step(Running(), optimizer))
    state = init_state(params(), optimizer, jax.random.key(1), objective=Running())
    seen = []
    for n in range(3):
        state, _ = step(state, jax.jit(batches(broken=(1,)))(data(), jnp.int32(n)))
        seen.append(float(state.objective_state))
    assert seen[0] == seen[1] != seen[2] and np.all(np.isfinite(seen))


def test_the_number_to_forgive_is_checked():
    for value, error in ((-1, ValueError), (1.5, TypeError), (None, TypeError)):
        with pytest.raises(error, match="forgive: expected a whole number"):
            run(optax.adam(0.1), None, 4, forgive=value)


def test_forced_weight_normalisation_keeps_marked_kernels_at_magnitude_one():
    """EDM2's: after an update the weights of each output have root mean square 1; other parameters move as they did."""
    rng = np.random.RandomState(0)
    start = {
        "block": {"mp_kernel": 3.0 * rng.normal(size=(3, 3, 2, 4)), "gain": np.float64(0.2)},
        "kernel": np.ones((2, 2)),
    }
    start = jax.tree.map(jnp.asarray, start)
    gradient = jax.tree.map(lambda leaf: 0.1 * jnp.ones_like(leaf), start)

    def after(*transforms):
        optimizer = optax.chain(optax.sgd(0.5), *transforms)
        updates, _ = optimizer.update(gradient, optimizer.init(start), start)
        return optax.apply_updates(start, updates)

    plain, forced = after(), after(training.forced_weight_normalisation())
    moved = plain["block"]["mp_kernel"]
    rms = np.sqrt(np.mean(np.square(moved), axis=(0, 1, 2), keepdims=True))
    np.testing.assert_allclose(forced["block"]["mp_kernel"], moved / (1e-4 + rms), rtol=1e-12)
    np.testing.assert_array_equal(forced["kernel"], plain["kernel"])
    np.testing.assert_array_equal(forced["block"]["gain"], plain["block"]["gain"])
    by_name = after(training.forced_weight_normalisation(lambda path: path == ("kernel",)))
    np.testing.assert_allclose(by_name["kernel"], 0.95 / 0.9501 * np.ones((2, 2)), rtol=1e-12)
    np.testing.assert_array_equal(by_name["block"]["mp_kernel"], moved)
    with pytest.raises(ValueError, match="params: expected the parameters"):
        optax.chain(training.forced_weight_normalisation()).update(gradient, (optax.EmptyState(),))
