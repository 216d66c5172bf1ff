"""Terms on groups: what a group holds, its loss on each of its rows, one condition, on any number of devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bases, couplings, objectives, sharding, types
from tests.objectives.perturbed_map import MAP, PATH

clone = jax.random.clone


def net(params, s, t, x, cond=None, *, key=None):
    h = jnp.tanh(params["in"] @ jnp.concatenate([jnp.stack([s, t]), x]))
    return params["out"] @ h + (0.0 if cond is None else 0.1 * cond.astype(x.dtype) * x)


def params_of():
    keys = jax.random.split(jax.random.key(2), 2)
    return {"in": jax.random.normal(keys[0], (16, 5)), "out": 0.5 * jax.random.normal(keys[1], (3, 16))}


def batch_of(groups, size=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.integers(0, 10, size=groups), size)
    return types.Batch(jnp.asarray(rng.normal(size=(groups * size, 3))), cond=jnp.asarray(labels, jnp.int32))


OBJECTIVE = objectives.energy_distance(types.FlowMap(net), PATH, size=4)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [16, 6])
@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (8, 1), (8, 2), (8, 8)])
def test_one_device_and_eight_agree(devices, fsdp, groups, key):
    """As a training step lays the rows out; the number of groups need not be divisible by that of devices."""
    batch, params = batch_of(groups), params_of()

    def step(params, k, batch):
        return jax.value_and_grad(lambda p: OBJECTIVE(p, k, batch)[0].mean())(params)

    expected = jax.jit(step)(params, clone(key), batch)
    mesh = sharding.mesh(fsdp, jax.devices()[:devices])
    spread = sharding.rows(mesh) if (groups * 4) % devices == 0 else sharding.whole(mesh)
    state = sharding.parts(params, mesh, smallest=16)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = jax.jit(step, out_shardings=(sharding.whole(mesh), state))
        got = run(
            sharding.place(params, state),
            sharding.place(clone(key), sharding.whole(mesh)),
            sharding.place(batch, spread),
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), got, expected)


def test_each_row_carries_the_loss_of_its_group(key):
    batch = batch_of(8)
    loss, aux = jax.jit(OBJECTIVE)(params_of(), clone(key), batch)
    of_groups = np.asarray(loss).reshape(8, 4)
    np.testing.assert_array_equal(of_groups, np.repeat(of_groups[:, :1], 4, 1))
    assert len(np.unique(of_groups[:, 0])) == 8
    assert aux.state == ()
    np.testing.assert_allclose(aux.metrics["energy/loss"].value(), loss.mean(), rtol=1e-12)
    for name in ("energy/loss_by_t", "energy/loss_by_gap"):
        report = aux.metrics[name]
        assert report.count.sum() == 8
        np.testing.assert_allclose(report.total.sum() / 8, loss.mean(), rtol=1e-9)
    # The losses of other groups do not depend on what lies in one.
    moved = batch._replace(x1=batch.x1.at[5].add(1.0))
    changed = np.abs(np.asarray(jax.jit(OBJECTIVE)(params_of(), clone(key), moved)[0]) - loss).reshape(8, 4)
    assert np.all(changed[1] > 0) and np.all(np.delete(changed, 1, 0) == 0)


def test_the_loss_of_a_group_is_made_of_its_samples(key):
    """A term of one's own: everything that a group holds, against the objective's own draws."""
    seen = {}

    def loss(group):
        assert group.s.shape == group.t.shape == () and group.x.shape == group.y.shape == (4, 3)
        jax.debug.callback(
            lambda **kw: seen.setdefault("groups", []).append(kw), **group._asdict() | {"own": 0.0, "key": 0.0}
        )
        return jnp.sum(group.jumps() - group.y)

    objective = objectives.GroupObjective("mine", types.FlowMap(net), PATH, loss, 4)
    batch, params = batch_of(2), params_of()
    losses, aux = jax.jit(objective)(params, clone(key), batch)
    jax.effects_barrier()
    assert set(aux.metrics) == {"mine/loss", "mine/loss_by_t", "mine/loss_by_gap", "mine/mixed_groups"}
    assert len(seen["groups"]) == 2
    for group in seen["groups"]:
        s, t, x0, x1 = (group[name] for name in ("s", "t", "x0", "x1"))
        place = int(np.flatnonzero([np.array_equal(x1, batch.x1[i : i + 4]) for i in (0, 4)])[0])
        np.testing.assert_allclose(group["x"], (1 - s) * x0 + s * x1, rtol=1e-12)
        np.testing.assert_allclose(group["y"], (1 - t) * x0 + t * x1, rtol=1e-12)
        jumped = jax.vmap(lambda x, c, s=s, t=t: x + (t - s) * net(params, s, t, x, c))(group["x"], group["cond"])
        np.testing.assert_allclose(losses[4 * place], jnp.sum(jumped - group["y"]), rtol=1e-9)


@pytest.mark.slow
def test_a_group_of_two_conditions_is_refused(key):
    batch = batch_of(4)
    mixed = batch._replace(cond=batch.cond.at[9].add(1))
    message = r"^batch\.cond: groups of 4 samples share one condition; .*in 1 of 4 groups \(datasets\.grouped makes"
    with pytest.raises(ValueError, match=message):
        OBJECTIVE(params_of(), clone(key), mixed)
    # Under a gradient the batch is still concrete.
    with pytest.raises(ValueError, match=message):
        jax.grad(lambda p: OBJECTIVE(p, clone(key), mixed)[0].mean())(params_of())


def test_a_traced_group_of_two_conditions_has_neither_loss_nor_gradient(key):
    batch = batch_of(4)
    mixed = batch._replace(cond=batch.cond.at[9].add(1))

    @jax.jit
    def run(params, batch):
        def mean(params):
            losses, aux = OBJECTIVE(params, clone(key), batch)
            return losses.mean(), (losses, aux)

        return jax.grad(mean, has_aux=True)(params)

    # The gradient of the batch is NaN, so that the other groups do not train without it.
    for given, places in ((mixed, [False, False, True, False]), (batch, [False] * 4)):
        slope, (loss, aux) = run(params_of(), given)
        np.testing.assert_array_equal(np.isnan(loss), np.repeat(places, 4))
        assert all(np.isnan(leaf).all() == any(places) for leaf in jax.tree.leaves(slope))
        assert int(aux.metrics["energy/mixed_groups"].value()) == sum(places)
    assert "energy/mixed_groups" not in jax.eval_shape(OBJECTIVE, params_of(), key, batch.x1)[1].metrics


def test_the_base_is_that_of_the_pairs(key):
    """The loss made of x0 alone is the base's sample; base and coupling follow one another, as in every objective."""
    wide = bases.Normal(5.0, 0.01)
    make = functools.partial(objectives.GroupObjective, "mine", MAP, PATH, lambda g: jnp.mean(g.x0), 4)
    x1 = jnp.zeros((8, 1))
    for chosen in (
        {"base": wide},
        {"coupling": couplings.Independent(wide)},
        {"base": wide, "coupling": couplings.independent},
    ):
        objective = make(**chosen)
        assert objective.base == wide and objective.coupling == couplings.Independent(wide)
        np.testing.assert_allclose(jax.jit(objective)(jnp.zeros(2), clone(key), x1)[0], 5.0, atol=0.1)
    plain = make()
    assert plain.base is bases.STANDARD_NORMAL and plain.coupling == couplings.independent
    # A default gives way, a choice does not.
    assert dataclasses.replace(plain, base=wide).coupling == couplings.Independent(wide)
    assert dataclasses.replace(make(base=wide), coupling=couplings.Independent(wide)).base == wide
    with pytest.raises(ValueError, match=r"^base: expected that of the coupling"):
        dataclasses.replace(make(base=wide), coupling=couplings.Independent(bases.Normal(1.0)))
    with pytest.raises(TypeError, match=r"^base: expected a base"):
        objectives.energy_distance(MAP, PATH, size=4, base=bases.Normal)
    assert "base=Normal(mean=5.0" in repr(objectives.energy_distance(MAP, PATH, size=4, base=wide))


@pytest.mark.slow
def test_groups_combine_with_other_objectives(key):
    lsd = objectives.lsd(types.FlowMap(net), PATH, diagonal=0.5)
    both = objectives.weighted_sum(lsd, energy=(OBJECTIVE, 0.5))
    batch, params = batch_of(8), params_of()
    loss, aux = jax.jit(both)(params, clone(key), batch)
    one, two = jax.random.split(clone(key))
    expected = jax.jit(lsd)(params, one, batch)[0] + 0.5 * jax.jit(OBJECTIVE)(params, two, batch)[0]
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    assert {"lagrangian/raw", "energy_energy/loss"} <= set(aux.metrics)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda k: objectives.energy_distance(MAP, PATH, size=1), ValueError, "^size"),
        (lambda k: objectives.energy_distance(MAP, PATH, size=2.0), TypeError, "^size"),
        (lambda k: OBJECTIVE(params_of(), k, types.Batch(jnp.ones((6, 3)))), ValueError, "^batch: expected a multiple"),
        (lambda k: OBJECTIVE(params_of(), types.Context(), batch_of(2), k), TypeError, "^context: expected a Context"),
        (lambda k: OBJECTIVE(params_of(), types.Context(), batch_of(2)), TypeError, "^key: expected a PRNG key"),
        (lambda k: objectives.energy_distance(MAP, PATH, size=4, pairs=0.5), TypeError, "^pairs: expected a function"),
        (lambda k: OBJECTIVE(params_of(), k, types.Batch(jnp.ones((8, 3), int))), TypeError, r"^batch\.x1"),
        (lambda k: OBJECTIVE(params_of(), k, types.Batch(jnp.ones((8, 3)), jnp.ones((8, 2)))), ValueError, r"^batch\.x0"),
        (lambda k: OBJECTIVE(params_of(), k, types.Batch(None, jnp.ones((8, 3)))), ValueError, r"^batch\.x1"),
        (lambda k: OBJECTIVE(params_of(), k, types.Batch(jnp.ones((8, 3)), cond=jnp.ones(4))), ValueError, "leading axis"),
        (lambda k: objectives.GroupObjective("x", MAP, PATH, 3.0, 4), TypeError, "^loss: expected a function"),
        (lambda k: objectives.energy_distance(MAP, PATH, size=4, coupling=1), TypeError, "^coupling"),
        (lambda k: objectives.GroupObjective("x", MAP, PATH, lambda g: g.x, 4)(jnp.zeros(2), k, types.Batch(jnp.ones((8, 1)))),
         ValueError, "^loss: expected a scalar"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message, key):
    with pytest.raises(error, match=message):
        call(key)
