"""Objectives with a state of their own, and objectives made of objectives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import interpolants, objectives, reports, types

clone = jax.random.clone
PATH = interpolants.linear()
MAP = types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: jnp.sin(p * x + s) + t * p * x)
PARAMS = jnp.float64(0.7)


def batch_of(n=8, seed=0):
    x = np.random.default_rng(seed).normal(size=(2, n, 2))
    return types.Batch(jnp.asarray(x[0] + 0.5), jnp.asarray(x[1]))


class Scale(NamedTuple):
    """A running mean of |x1|^2, and how often it was updated."""

    square: jax.Array
    count: jax.Array


class Scaled:
    """Made up: flow matching over a running scale of the data."""

    def __init__(self, decay=0.9, name="scale"):
        self.decay, self.name = decay, name
        self.base = objectives.flow_matching(MAP, PATH)

    def init(self, key, params):
        return Scale(1.0 + jax.random.uniform(key, dtype=jnp.float64), jnp.int32(0))

    def __call__(self, params, key, batch, context=None):
        loss, aux = self.base(params, key, batch)
        state = context.state
        square = self.decay * state.square + (1 - self.decay) * jnp.mean(jnp.sum(batch.x1**2, 1))
        metrics = {
            **aux.metrics,
            f"{self.name}/square": square,
            f"{self.name}/last": reports.Last(square),
            f"{self.name}/calls": reports.Total(jnp.int32(1)),
            f"{self.name}/rows": reports.PerRow(jnp.sum(batch.x1**2, 1)),
        }
        return loss / square, types.Aux(Scale(square, state.count + 1), metrics)


class Opposed(NamedTuple):
    params: jax.Array
    opt_state: tuple


class TwoPlayers:
    """Made up: an opponent with a parameter and an optimizer of its own, which ascends what the map descends."""

    optimizer = optax.adam(0.1)

    def init(self, key, params):
        opponent = jax.random.normal(key, (2,))
        return Opposed(opponent, self.optimizer.init(opponent))

    def __call__(self, params, key, batch, context=None):
        def game(params, opponent):
            moved = jax.vmap(lambda x: MAP.jump(params, 0.0, 1.0, x))(batch.x0)
            return (moved - batch.x1) @ opponent - 0.5 * jnp.sum(opponent**2)

        opponent, opt_state = context.state
        slope = jax.grad(lambda o: -game(jax.lax.stop_gradient(params), o).mean())(opponent)
        with jax.numpy_dtype_promotion("standard"):
            update, opt_state = self.optimizer.update(slope, opt_state, opponent)
            new = optax.apply_updates(opponent, update)
        loss = game(params, jax.lax.stop_gradient(opponent))
        return loss, types.Aux(Opposed(new, opt_state), {"game/opponent": jnp.linalg.norm(new)})


def test_init_is_empty_for_an_objective_without_a_state(key):
    for objective in (
        *(objectives.METHODS[name].constructor(MAP, PATH) for name in ("lsd", "flow_matching")),
        objectives.energy_distance(MAP, PATH, size=2),
        lambda params, key, batch, context: (jnp.zeros(8), types.Aux()),
    ):
        assert objectives.init(objective, clone(key), PARAMS) == ()
    state = objectives.init(Scaled(), clone(key), PARAMS)
    assert isinstance(state, Scale) and state.count == 0


def run(objective, steps, key):
    """The states and losses of a number of steps of one program, each with the step in its context."""
    state = objectives.init(objective, clone(key), PARAMS)

    @jax.jit
    def step(state, index, batch):
        context = types.Context(step=index, state=state)
        loss, aux = objective(PARAMS, jax.random.fold_in(jax.random.key(9), index), batch, context)
        return aux.state, loss, reports.as_reports(aux.metrics)

    found = []
    for index in range(steps):
        before = state
        state, loss, metrics = step(state, jnp.int32(index), batch_of(seed=index))
        assert jax.tree.structure(state) == jax.tree.structure(before)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(lambda a: (a.shape, a.dtype), before)
        found.append(jax.device_get((before, state, loss, metrics)))
    return found


def test_a_state_moves_with_the_steps(key):
    objective = Scaled()
    found = run(objective, 4, key)
    expected = float(found[0][0].square)
    for index, (_, after, loss, _) in enumerate(found):
        batch = batch_of(seed=index)
        expected = 0.9 * expected + 0.1 * float(np.mean(np.sum(np.asarray(batch.x1) ** 2, 1)))
        assert after.count == index + 1
        np.testing.assert_allclose(after.square, expected, rtol=1e-12)
        plain = jax.jit(objective.base)(PARAMS, jax.random.fold_in(jax.random.key(9), index), batch)[0]
        np.testing.assert_allclose(loss, plain / expected, rtol=1e-12)


def test_the_state_of_a_stage_moves_in_its_stage_alone(key):
    """Every stage's metrics are there at every step; those of a stage not in force count nothing."""
    first, second = Scaled(0.9, "first"), Scaled(0.5, "second")
    whole = objectives.sequence([(0, first), (2, TwoPlayers()), (3, second)])
    found = run(whole, 5, key)
    initial = found[0][0]
    assert isinstance(initial, tuple) and len(initial) == 3 and isinstance(initial[1], Opposed)
    assert initial[0].square != initial[2].square
    in_force = [0, 0, 1, 2, 2]
    for index, (before, after, _, _) in enumerate(found):
        for place in range(3):
            same = all(
                np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before[place], after[place])), strict=True)
            )
            assert same == (place != in_force[index]), (index, place)
    # Merged over the steps, each metric is that of the steps of its own stage.
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(metrics for *_, metrics in found))
    merged = reports.values(reports.merged(stacked))
    assert merged["first/calls"] == 2 and merged["second/calls"] == 2
    for name, place, steps in (("first", 0, (0, 1)), ("second", 2, (3, 4))):
        squares = [found[i][1][place].square for i in steps]
        np.testing.assert_allclose(merged[f"{name}/square"], np.mean(squares), rtol=1e-12)
        np.testing.assert_allclose(merged[f"{name}/last"], squares[-1], rtol=1e-12)
        rows = [np.sum(np.asarray(batch_of(seed=i).x1) ** 2, 1) for i in steps]
        np.testing.assert_allclose(merged[f"{name}/rows"], np.mean(rows), rtol=1e-12)
    opponents = np.linalg.norm(found[2][1][1].params)
    np.testing.assert_allclose(merged["game/opponent"], opponents, rtol=1e-12)
    for name, report in found[0][3].items():
        if name.startswith(("second", "game")):
            value = np.asarray(report.value())
            assert np.isnan(value) or (value == 0 and isinstance(report, reports.Total)), name


def test_a_stage_is_what_it_is_alone(key):
    """Losses, states and gradients of the stage in force, to the bit of its own program's arithmetic."""
    second = Scaled(0.5)
    whole = objectives.sequence([(0, objectives.flow_matching(MAP, PATH)), (3, second)])
    state = objectives.init(whole, clone(key), PARAMS)
    batch = batch_of()

    def value(objective, state):
        def loss(params):
            out, aux = objective(params, clone(key), batch, types.Context(step=jnp.int32(3), state=state))
            return out.mean(), (out, aux.state)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)

    (_, (loss, after)), slope = value(whole, state)
    (_, (expected, own)), own_slope = value(second, state[1])
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(slope, own_slope, rtol=1e-12)
    assert after[0] == () and after[1].count == own.count == 1
    np.testing.assert_allclose(after[1].square, own.square, rtol=1e-12)


def test_two_metrics_of_one_name_in_a_sum_are_refused(key):
    report = lambda name: lambda params, key, batch, context: (batch.x1[:, 0], {name: 1.0})  # noqa: E731
    whole = objectives.weighted_sum(report("head_loss"), head=(report("loss"), 1.0))
    with pytest.raises(ValueError, match=r"^head: expected another name, .*\['head_loss'\]"):
        jax.eval_shape(whole, None, key, types.Batch(jnp.ones((4, 2))), types.Context())


def test_a_weighted_sum_by_hand(key):
    """Loss, gradient, states and metrics: each part with its own key and its own state."""
    parts = (objectives.lsd(MAP, PATH, diagonal=0.5), Scaled(), TwoPlayers())
    whole = objectives.weighted_sum(parts[0], scaled=(parts[1], 0.25), game=(parts[2], 3.0))
    state = objectives.init(whole, clone(key), PARAMS)
    batch = batch_of()
    keys = list(jax.random.split(clone(key), 3))
    alone = [types.Context(step=jnp.int32(2), state=own) for own in state]

    @jax.jit
    def by_hand(params):
        found = [part(params, clone(k), batch, c) for part, k, c in zip(parts, keys, alone, strict=True)]
        (a, _), (b, _), (c, _) = found
        return a + 0.25 * b + 3.0 * c, [aux for _, aux in found]

    @jax.jit
    def summed(params):
        return whole(params, clone(key), batch, types.Context(step=jnp.int32(2), state=state))

    (loss, aux), (expected, own) = summed(PARAMS), by_hand(PARAMS)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), aux.state, tuple(a.state for a in own))
    names = [*own[0].metrics, *(f"scaled_{n}" for n in own[1].metrics), *(f"game_{n}" for n in own[2].metrics)]
    assert set(aux.metrics) == set(names) and len(names) == len(set(names))
    np.testing.assert_allclose(
        aux.metrics["scaled_tangent/raw"].value(), own[1].metrics["tangent/raw"].value(), rtol=1e-12
    )
    slopes = [jax.jit(jax.grad(lambda p, f=f: f(p)[0].mean()))(PARAMS) for f in (summed, by_hand)]
    np.testing.assert_allclose(*slopes, rtol=1e-10)


def test_a_sum_within_a_sequence_keeps_its_states(key):
    inner = objectives.weighted_sum(objectives.flow_matching(MAP, PATH), scaled=(Scaled(), 0.5))
    whole = objectives.sequence([(0, objectives.flow_matching(MAP, PATH)), (1, inner)])
    found = run(whole, 3, key)
    assert [after[1][1].count for _, after, *_ in found] == [0, 1, 2]


@pytest.mark.slow
def test_one_device_and_eight_agree_on_loss_and_state(key):
    whole = objectives.weighted_sum(
        objectives.lsd(MAP, PATH, blocks=8), scaled=(Scaled(), 0.25), game=(TwoPlayers(), 0.1)
    )
    state = objectives.init(whole, clone(key), PARAMS)
    run = jax.jit(lambda s, b: whole(PARAMS, clone(key), b, types.Context(state=s)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    one, eight = run(state, batch_of(64)), run(state, jax.device_put(batch_of(64), rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), one, eight)


@pytest.mark.parametrize(
    "make",
    [lambda o: objectives.sequence([(0, o), (5, Scaled())]), lambda o: objectives.weighted_sum(o, s=(Scaled(), 1.0))],
)
@pytest.mark.parametrize("state", [(), ((),), ((), (), ())])
def test_states_that_are_not_those_of_init_are_refused(make, state, key):
    whole = make(objectives.flow_matching(MAP, PATH))
    with pytest.raises(ValueError, match=r"context\.state: expected"):
        whole(PARAMS, key, batch_of(), types.Context(step=jnp.int32(0), state=state))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda o: objectives.sequence([]), ValueError, "stages"),
        (lambda o: objectives.sequence([(0, o), (0, o)]), ValueError, "stages"),
        (lambda o: objectives.sequence([(0.0, o), (1, o)]), TypeError, "stages"),
        (lambda o: objectives.sequence([(0, o), (1, 3.0)]), TypeError, "stages: expected a function"),
        (lambda o: objectives.weighted_sum(o, head=(o, -1.0)), ValueError, "head"),
        (lambda o: objectives.weighted_sum(o, head=(o, np.inf)), ValueError, "head"),
        (lambda o: objectives.weighted_sum(o, head=(o, "1")), TypeError, "head"),
        (lambda o: objectives.weighted_sum(o, head=(3.0, 1.0)), TypeError, "head: expected a function"),
        (lambda o: objectives.weighted_sum(o, head=o), TypeError, "head: expected a pair"),
        (lambda o: objectives.weighted_sum(3.0), TypeError, "objective: expected a function"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(objectives.flow_matching(MAP, PATH))
