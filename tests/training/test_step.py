"""The step against optax by hand; chunks against steps; one trace; one device against eight."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jflow import reports, sharding
from jflow.reports import values
from jflow.training import init_state, make_chunk, make_step
from jflow.types import Aux, Batch, Context
from tests.training import runs


def test_a_step_is_one_optimizer_step_on_the_mean_loss(problem64):
    state = problem64.state()
    batch = jax.jit(problem64.dataset.batch)(problem64.dataset.data, jnp.int32(0))
    new, metrics = jax.jit(problem64.step)(state, batch)

    @jax.jit
    def by_hand(state):
        key = jax.random.fold_in(jax.random.key(1), 0)
        context = Context(jnp.int32(0), state.ema["0.9"])
        loss, grads = jax.value_and_grad(
            lambda params: problem64.objective(params, key, batch, context)[0].mean(), has_aux=False
        )(state.params)
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = problem64.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return loss, [optax.tree.norm(tree) for tree in (grads, updates, params)], params

    loss, norms, params = jax.device_get(by_hand(state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), new.params, params)
    for name, decay in (("0.9", 0.9), ("0.99", 0.99)):
        expected = jax.tree.map(lambda old, p, d=decay: d * np.asarray(old) + (1 - d) * p, state.params, params)
        # The weight of an average is a float32.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), new.ema[name], expected)
    metrics = values(metrics)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-12)
    np.testing.assert_allclose(metrics["grad_norm"], norms[0], rtol=1e-10)
    np.testing.assert_allclose(metrics["update_norm"], norms[1], rtol=1e-8)
    np.testing.assert_allclose(metrics["param_norm"], norms[2], rtol=1e-10)
    assert int(new.step) == 1 and bool(metrics["finite"])


def test_what_the_objective_reports_becomes_metrics(problem):
    state, data = problem.state(), problem.dataset.data
    batch = jax.jit(problem.dataset.batch)(data, state.step)
    _, metrics = jax.jit(problem.step)(state, batch)
    assert isinstance(metrics["fit/raw"], reports.Residual) and metrics["fit/raw"].by["t"].value().shape == (2,)
    # What is reported per row is a mean over the rows, and a bare number a mean over steps.
    assert float(metrics["diagonal_rows"].value()) == np.mean(np.asarray(batch.x1)[:, 1] > 0)
    assert isinstance(metrics["plain"], reports.Mean)
    assert float(metrics["plain"].value()) == pytest.approx(16 * float(metrics["fit/raw"].value()), rel=1e-6)


def test_chunks_equal_steps(problem, assert_same):
    step = jax.jit(problem.step)
    take = jax.jit(problem.dataset.batch)
    state, rows = problem.state(), []
    for n in range(6):
        state, metrics = step(state, take(problem.dataset.data, jnp.int32(n)))
        rows.append(metrics)
    # Fused otherwise than one step, a chunk may round otherwise.
    chunked, metrics = problem.chunk(problem.state(), problem.dataset.data, 6)
    assert int(chunked.step) == 6
    for a, b in zip(jax.tree.leaves(chunked.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    shown, each = values(metrics), [values(row) for row in rows]
    for name in ("loss", "grad_norm", "diagonal_rows", "fit/raw"):
        np.testing.assert_allclose(shown[name], np.mean([row[name] for row in each]), rtol=1e-5)
    np.testing.assert_allclose(shown["largest"], np.max([row["largest"] for row in each]), rtol=1e-5)
    for name, last in (("last_loss", "loss"), ("param_norm", "param_norm")):
        np.testing.assert_allclose(shown[name], each[-1][last], rtol=1e-5)
    np.testing.assert_allclose(shown["first_loss"], each[0]["loss"], rtol=1e-5)
    count = np.stack([row["fit/raw"].by["t"].count for row in rows])
    raw = np.stack([row["fit/raw_by_t"] for row in each])
    np.testing.assert_allclose(shown["fit/raw_by_t"], (raw * count).sum(0) / count.sum(0), rtol=1e-5)
    # Chunks of chunks are the same to the bit.
    twice = problem.chunk(problem.chunk(problem.state(), problem.dataset.data, 6)[0], problem.dataset.data, 6)[0]
    again = problem.chunk(chunked, problem.dataset.data, 6)[0]
    assert_same(twice, again)


def test_one_trace_for_repeated_calls(problem, compilations):
    traces = []

    def counted(*args):
        traces.append(1)
        return problem.objective(*args)

    optimizer = optax.adam(1e-3)
    chunk = make_chunk(make_step(counted, optimizer), problem.dataset.batch)
    state = init_state(problem.params, optimizer, jax.random.key(0))
    state, _ = chunk(state, problem.dataset.data, 2)
    assert traces and compilations
    traces.clear()
    compilations.clear()
    for _ in range(3):
        state, _ = chunk(state, problem.dataset.data, 2)
    assert not traces and not compilations
    assert int(state.step) == 8


def test_weak_types_become_strong():
    state = init_state({"a": jnp.asarray(0.5)}, optax.sgd(0.1), jax.random.key(0), ema=(0.9,))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((state.params, state.ema)))


def test_the_caller_keeps_parameters_and_key(problem):
    key = jax.random.key(3)
    # Schedule-free keeps the parameters themselves in its state: the same buffer must not be donated twice.
    optimizer = optax.contrib.schedule_free_sgd(1e-2)
    state = init_state(problem.params, optimizer, key, ema=(0.9,), teacher=problem.params)
    chunk = make_chunk(make_step(problem.objective, optimizer, ema=(0.9,)), problem.dataset.batch)
    chunk(state, problem.dataset.data, 2)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(problem.params)) and not key.is_deleted()


def test_key_and_step_decide_the_noise(problem):
    batch = jax.jit(problem.dataset.batch)(problem.dataset.data, jnp.int32(0))
    step = jax.jit(problem.step)
    loss = lambda state: float(step(state, batch)[1]["loss"].value())  # noqa: E731
    assert loss(problem.state(1)) == loss(problem.state(1))
    assert loss(problem.state(1)) != loss(problem.state(2))
    assert loss(problem.state(1)) != loss(problem.state(1)._replace(step=jnp.int32(1)))


class Remembering(NamedTuple):
    """An objective with a state, which keeps the contexts that it has seen."""

    seen: list

    def init(self, key, params):
        return {"mean": jnp.zeros(())}

    def __call__(self, params, key, batch, context):
        self.seen.append(context)
        loss = jnp.sum((batch.x1 * params["w"] - context.teacher["w"]) ** 2, axis=1)
        return loss, Aux({"mean": 0.5 * context.state["mean"] + 0.5 * jnp.mean(loss)})


def test_the_context_holds_teacher_ema_and_state():
    objective, optimizer = Remembering([]), optax.sgd(0.1)
    state = init_state(
        {"w": jnp.ones(())},
        optimizer,
        jax.random.key(0),
        ema={"fast": lambda n: jnp.float32(0.5), "slow": lambda n: jnp.float32(0.1)},
        teacher={"w": jnp.full((), 2.0)},
        objective=objective,
    )
    assert state.objective_state == {"mean": 0.0}
    ema = {"fast": lambda n: jnp.float32(0.5), "slow": lambda n: jnp.float32(0.1)}
    step = make_step(objective, optimizer, ema=ema, context_ema="slow")
    state, _ = step(state, Batch(jnp.full((4, 1), 3.0)))
    # loss (3 - 2)^2 = 1, gradient 2 * 3 * (3 - 2) = 6
    assert float(state.params["w"]) == pytest.approx(1 - 0.6)
    assert float(state.ema["fast"]["w"]) == pytest.approx(0.7)
    assert float(state.objective_state["mean"]) == pytest.approx(0.5)
    step(state, Batch(jnp.full((4, 1), 3.0)))
    assert float(objective.seen[1].ema["w"]) == pytest.approx(0.94) and int(objective.seen[1].step) == 1
    # A state prints its shapes, not its numbers.
    assert "w" in repr(state) and "float64[]" in repr(state) and len(repr(state)) < 600


def teaching(params, key, batch, context):
    """A loss that is 1/2 (w - teacher - 1)^2 in every row; what it saw in its info."""
    loss = 0.5 * (params["w"] - context.teacher["w"] - 1.0) ** 2
    return jnp.broadcast_to(loss, batch.x1.shape[:1]), {"teacher": context.teacher["w"], "w": params["w"]}


def taught(steps, **kwargs):
    """The teacher and the weight before each step, the average after each, and the last state."""
    optimizer, ema = optax.sgd(0.5), kwargs.get("ema", ())
    step = make_step(teaching, optimizer, **kwargs)
    one = jnp.ones((), jnp.float32)
    state = init_state({"w": one}, optimizer, jax.random.key(0), ema=ema, teacher={"w": 10 * one})

    def body(state, _):
        state, metrics = step(state, Batch(jnp.ones((2, 1), jnp.float32)))
        shown = values(metrics)
        return state, (shown["teacher"], shown["w"], {name: value["w"] for name, value in state.ema.items()})

    state, rows = jax.jit(lambda state: jax.lax.scan(body, state, None, length=steps))(state)
    return [np.asarray(row) for row in rows[:2]], rows[2], state


def test_the_teacher_becomes_the_parameters_at_its_steps_and_is_seen_from_then_on():
    (teacher, w), _, state = taught(6, teacher_updates=(2, 5))
    np.testing.assert_array_equal(teacher, [10, 10, w[2], w[2], w[2], w[5]])
    assert len(set(w)) == 6 and float(state.teacher["w"]) == w[5]
    # The loss is towards that teacher from that step on: by hand, one step of size 1/2.
    np.testing.assert_allclose(w[1:], (w - 0.5 * (w - teacher - 1.0))[:-1], rtol=1e-6)
    (never, _), _, _ = taught(6)
    np.testing.assert_array_equal(never, np.full(6, 10.0))


def test_the_teacher_becomes_the_average_that_the_context_holds():
    ema = {"fast": lambda n: jnp.float32(0.5), "slow": lambda n: jnp.float32(0.1)}
    (teacher, _), averages, _ = taught(4, ema=ema, context_ema="slow", teacher_updates=[0, 3])
    # The average after three steps is the one before the fourth; at first it is the parameters.
    np.testing.assert_array_equal(teacher, [1.0, 1.0, 1.0, averages["slow"][2]])
    (first, _), averages, _ = taught(4, ema=ema, teacher_updates=lambda step: step == 3)
    np.testing.assert_array_equal(first, [10.0, 10.0, 10.0, averages["fast"][2]])


def test_the_update_of_the_teacher_is_a_branch():
    """So that the other steps pay nothing; and without updates there is none."""
    optimizer, weights = optax.sgd(0.5), {"w": jnp.ones(())}
    state, batch = init_state(weights, optimizer, jax.random.key(0), teacher=weights), Batch(jnp.ones((2, 1)))
    for updates, branches in (((2, 5), 1), ((), 0)):
        jaxpr = jax.make_jaxpr(make_step(teaching, optimizer, teacher_updates=updates))(state, batch)
        assert str(jaxpr).count("cond[") == branches


def test_refusals_of_teacher_updates(problem):
    optimizer = optax.sgd(0.1)
    batch = jax.jit(problem.dataset.batch)(problem.dataset.data, jnp.int32(0))
    for updates, error in (((-1,), ValueError), ((0.5,), TypeError), ("12", TypeError)):
        with pytest.raises(error, match="teacher_updates: expected a whole number"):
            make_step(problem.objective, optimizer, teacher_updates=updates)
    step = make_step(problem.objective, optimizer, teacher_updates=(1,))
    state = init_state(problem.params, optimizer, jax.random.key(0))
    with pytest.raises(ValueError, match="teacher_updates: expected a teacher in the state"):
        step(state, batch)
    with_teacher = lambda teacher: state._replace(teacher=teacher)  # noqa: E731
    for teacher, message in (
        ({"w": jnp.ones(2)}, "the pytree structure of the parameters"),
        (jax.tree.map(lambda leaf: leaf[:1], problem.params), "the shape of the parameters"),
        (jax.tree.map(lambda leaf: leaf.astype(jnp.float16), problem.params), "the parameters' dtypes"),
    ):
        with pytest.raises(ValueError, match=rf"state\.teacher: expected {message}"):
            step(with_teacher(teacher), batch)
    number = make_step(problem.objective, optimizer, teacher_updates=lambda step: step)
    with pytest.raises(TypeError, match="teacher_updates: expected a function step -> scalar bool"):
        number(with_teacher(problem.params), batch)


def test_non_finite_is_flagged_and_stays(problem):
    broken = Batch(problem.dataset.data.x1.at[7].set(jnp.nan), problem.dataset.data.x0, problem.dataset.data.cond)
    _, metrics = problem.chunk(problem.state(), broken, 6)
    assert not metrics["finite"].value() and np.isnan(metrics["loss"].value())
    _, metrics = problem.chunk(problem.state(), problem.dataset.data, 6)
    assert metrics["finite"].value()


# test_sharding.test_loss_gradient_and_average_do_not_depend_on_the_layout is its quick counterpart.
@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (virtual) devices")
def test_eight_devices_agree_with_one(problem64, compilations):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    spread = make_chunk(problem64.step, problem64.dataset.batch, batch_sharding=rows)
    state, data = jax.device_put((problem64.state(), problem64.dataset.data), whole)
    many, metrics8 = spread(state, data, 5)
    one, metrics1 = problem64.chunk(problem64.state(), problem64.dataset.data, 5)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(many.params))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)  # noqa: E731
    jax.tree.map(close, (many.params, many.ema, many.opt_state), (one.params, one.ema, one.opt_state))
    jax.tree.map(close, metrics8, metrics1)
    # The state that comes out goes in again, with the same shardings.
    compilations.clear()
    many, _ = spread(many, data, 5)
    assert not compilations
    assert int(many.step) == 10


def test_refusals(problem):
    step = make_step(problem.objective, problem.optimizer, ema=(0.5,))
    batch = jax.jit(problem.dataset.batch)(problem.dataset.data, jnp.int32(0))
    with pytest.raises(ValueError, match=r"state.ema: expected the averages \['0.5'\]"):
        step(problem.state(), batch)
    with pytest.raises(ValueError, match="context_ema"):
        make_step(problem.objective, problem.optimizer, ema=(0.5,), context_ema="0.9")
    with pytest.raises(TypeError, match="key: expected one typed PRNG key"):
        init_state(problem.params, problem.optimizer, jnp.zeros(2, jnp.uint32))
    scalar = make_step(lambda params, *_: (jnp.sum(params["out"]["bias"]), {}), problem.optimizer, ema=(0.9, 0.99))
    with pytest.raises(ValueError, match=r"loss of shape \[B\]"):
        scalar(problem.state(), batch)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, batch: p.step(batch, p.state()), "^state: expected a TrainState, .*got Batch: a step takes"),
        (lambda p, batch: p.step(Context(), batch), "^state: expected a TrainState, .*got Context"),
        (lambda p, batch: make_chunk(p.dataset.batch, p.step)(p.state(), p.dataset.data, 1), "^state: expected a TrainState"),
        (
            lambda p, batch: make_chunk(lambda a, b: batch, lambda a, b: batch)(p.state(), p.dataset.data, 1),
            "^step: expected a function .*it returned Batch; make_chunk takes",
        ),
        (lambda p, batch: make_chunk(p.optimizer.update, p.dataset), "^batch_fn: expected a function"),
        (lambda p, batch: make_chunk(3, p.dataset.batch), "^step: expected a function"),
        (lambda p, batch: make_chunk(p.chunk, p.dataset.batch), "^step: expected a function .*got one of"),
        (lambda p, batch: make_chunk(p.step, lambda data: batch), "^batch_fn: expected a function .*got one of"),
    ],
)  # fmt: skip
def test_swapped_arguments_are_refused_by_name(problem, call, message):
    with pytest.raises(TypeError, match=message):
        call(problem, problem.dataset.data)


def test_decay_outside_multi_steps_makes_every_step_an_update(problem):
    """As documented: inside it the decay is part of the update, after it a change of its own."""
    batch = jax.jit(problem.dataset.batch)(problem.dataset.data, jnp.int32(0))
    decay = optax.add_decayed_weights(-1e-2)
    inside = optax.MultiSteps(optax.chain(optax.sgd(1e-2), decay), 2)
    outside = optax.chain(optax.MultiSteps(optax.sgd(1e-2), 2).gradient_transformation(), decay)
    for optimizer, updates in ((inside, 1), (outside, 2)):
        step = jax.jit(make_step(lambda p, k, b, c: (jnp.square(b.x1 @ p["w"]), {}), optimizer))
        state = init_state({"w": jnp.ones((3,), jnp.float32)}, optimizer, jax.random.key(0))
        for _ in range(2):
            state, _ = step(state, batch)
        assert int(state.updates) == updates


class Growing:
    """An objective whose state grows."""

    def init(self, key, params):
        return jnp.zeros((1,), jnp.float32)

    def __call__(self, params, key, batch, context):
        return batch.x1[:, 0], Aux(jnp.zeros((2,), jnp.float32))


def traced(problem, objective=None, start=None, **options):
    """A step, traced but not compiled."""
    step = make_step(objective or problem.objective, problem.optimizer, **{"ema": runs.DECAYS, **options})
    return jax.eval_shape(step, start or problem.state(), problem.dataset.batch(problem.dataset.data, jnp.int32(0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda p: make_step(p.objective, optax.adam),
            TypeError,
            "^optimizer: expected an optax GradientTransformation, .*got function$",
            id="an optimizer without its numbers",
        ),
        pytest.param(
            lambda p: traced(p, start=runs.state(p, optimizer=optax.sgd(0.1))),
            ValueError,
            r"^state\.opt_state: expected that of this optimizer, .*got ",
            id="the state of another optimizer",
        ),
        pytest.param(
            lambda p: make_step(p.objective, p.optimizer, teacher_updates=100),
            TypeError,
            "^teacher_updates: expected a sequence of steps, or a function of the step, got 100$",
            id="updates at one step",
        ),
        pytest.param(
            lambda p: traced(p, lambda params, key, batch, context: batch.x1[:, 0]),
            TypeError,
            r"^objective: expected it to return \(loss \[B\], Aux\) or \(loss \[B\], a mapping of metrics\), got ",
            id="a loss without an aux",
        ),
        pytest.param(
            lambda p: make_chunk(p.step, p.dataset),
            TypeError,
            r"^batch_fn: expected a function \(data, step\) -> batch, as dataset\.batch, got ArrayDataset$",
            id="the dataset instead of its batches",
        ),
        pytest.param(
            lambda p: make_chunk(p.step, p.dataset.batch, batch_sharding=sharding.mesh()),
            TypeError,
            "^batch_sharding: expected a NamedSharding, got Mesh$",
            id="a mesh for the batches",
        ),
        pytest.param(
            lambda p: runs.train(p, state=runs.state(p, ema=(0.999,))),
            ValueError,
            r"^state\.ema: expected the averages \['0\.9', '0\.99'\], got \['0\.999'\]",
            id="a state with other averages",
        ),
        pytest.param(
            lambda p: make_step(p.objective, p.optimizer, ema=runs.DECAYS, context_ema="0.999"),
            ValueError,
            r"^context_ema: expected one of '0\.9', '0\.99', got '0\.999'$",
            id="an average that is not there for the objective",
        ),
        pytest.param(
            lambda p: traced(p, teacher_updates=(100,)),
            ValueError,
            r"^teacher_updates: expected a teacher in the state \(init_state\(\.\.\., teacher=\.\.\.\)\), got None",
            id="updates of no teacher",
        ),
        pytest.param(
            lambda p: traced(p, teacher_updates=(100,), start=p.state(teacher=p.params["out"])),
            ValueError,
            r"^state\.teacher: expected the pytree structure of the parameters, .*got .*'bias'",
            id="updates of another network",
        ),
        pytest.param(
            lambda p: make_step(p.objective, p.optimizer, teacher_updates=(-1,)),
            ValueError,
            "^teacher_updates: expected a whole number of at least 0, got -1$",
            id="updates before the start",
        ),
        pytest.param(
            lambda p: traced(p, teacher_updates=lambda step: step % 100, start=p.state(teacher=p.params)),
            TypeError,
            r"^teacher_updates: expected a function step -> scalar bool, it returned .*int32\[\]",
            id="updates by a number",
        ),
        pytest.param(
            lambda p: traced(p, lambda *_: (jnp.float32(0.0), {})),
            ValueError,
            r"^objective: expected a loss of shape \[B\], got \(\)",
            id="a mean as the loss",
        ),
        pytest.param(
            lambda p: traced(p, Growing(), p.state(objective=Growing())),
            ValueError,
            r"^aux\.state: expected the state's own kind, float32\[1\], got float32\[2\]",
            id="a state that grows",
        ),
        pytest.param(
            lambda p: traced(p, Growing()),
            ValueError,
            r"^state\.objective_state: expected what the objective's init makes, .* make the state with init_state\(",
            id="a state that was not made",
        ),
        pytest.param(
            lambda p: traced(p, lambda params, key, batch, context: (batch.x1[:, 0], {"name": "text"})),
            TypeError,
            "^metrics: expected a report or a number under 'name', got str",
            id="a metric that is not a number",
        ),
    ],
)
def test_refused_in_words(attempt, error, message, problem):
    with pytest.raises(error, match=message) as caught:
        attempt(problem)
    # Not by a sub-class that means something else.
    assert caught.type is error
