"""Samplers as steps: the same numbers by hand and by ``run``, states in a batch, and calls of the map."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bases, likelihood, oracles, samplers, types
from tests.samplers.gaussian_oracle import BOUND, GRID, ORACLE, PARAMS, PATH, X

SAMPLERS = {
    "jumps": samplers.Jumps(BOUND),
    "renoise": samplers.Renoise(BOUND, PATH, kappa=0.5, base=bases.Normal(0.2, np.array([0.5, 1.5]))),
    "consistency": samplers.Renoise(BOUND, PATH, kappa=1.0),
    "euler": samplers.SDE(BOUND, PATH),
    "heun": samplers.SDE(BOUND, PATH, method="heun", diffusion=0.5),
}


@pytest.mark.representatives("renoise")
@pytest.mark.parametrize("name", SAMPLERS)
def test_run_is_the_steps_one_after_the_other(name):
    sampler, key = SAMPLERS[name], jax.random.key(0)
    path, info = jax.jit(lambda key: samplers.run_path(sampler, key, X, GRID))(key)
    np.testing.assert_array_equal(path[0], X)
    np.testing.assert_array_equal(path[-1], jax.jit(lambda key: samplers.run(sampler, key, X, GRID))(key))
    state, step = sampler.init(X, GRID[0]), jax.jit(sampler.step)
    for k, t in enumerate(GRID[1:]):
        state, now = step(jax.random.fold_in(key, k), state, t)
        np.testing.assert_allclose(state.x, path[k + 1], rtol=1e-12)
        assert state.t == t and now.calls == (2 if name == "heun" else 1)
        jax.tree.map(lambda one, all_, k=k: np.testing.assert_allclose(one, all_[k], rtol=1e-12), now, info)


def test_info_says_where_the_map_jumped_and_what_noise_was_added():
    sampler, key = SAMPLERS["renoise"], jax.random.key(1)
    state, info = sampler.step(key, sampler.init(X, 0.1), 0.35)
    plan = samplers.renoise_plan(PATH, jnp.array([0.35]), 0.5)
    np.testing.assert_allclose(info.target, plan.target[0], rtol=1e-12)
    assert info.target > 0.35
    np.testing.assert_allclose(info.noise, 0.5 * PATH.alpha(0.35) * np.array([0.5, 1.5]), rtol=1e-12)
    z = bases.STANDARD_NORMAL.sample(jax.random.clone(key), X)
    np.testing.assert_allclose(state.x, info.centre + info.noise * z, rtol=1e-12)
    _, info = SAMPLERS["consistency"].step(jax.random.key(2), state, 0.6)
    assert info.target == 1.0
    _, info = SAMPLERS["consistency"].step(jax.random.key(2), state, 1.0)
    assert info.target == 1.0 and info.noise == 0.0
    _, info = SAMPLERS["jumps"].step(None, state, 0.6)
    assert info.target == 0.6 and info.noise == 0.0 and info.centre is None
    _, info = SAMPLERS["euler"].step(jax.random.key(3), state, 0.6)
    c = PATH.coefficients(0.35)
    np.testing.assert_allclose(info.noise, np.sqrt(2 * c.alpha * c.w * 0.25), rtol=1e-12)


@pytest.mark.representatives("renoise")
@pytest.mark.parametrize("name", SAMPLERS)
def test_states_are_pytrees_for_a_batch_of_particles_at_traced_times(name):
    """Steering needs this: it resamples between two steps, and each particle may be at its own time."""
    sampler, n = SAMPLERS[name], 5
    x0 = jax.random.normal(jax.random.key(4), (n, 2))
    labels = jnp.arange(n)

    @jax.jit
    def steps(x0, times):
        states = jax.vmap(lambda x, c: sampler.init(x, 0.1, c))(x0, labels)
        states, _ = jax.vmap(sampler.step, (0, 0, None))(jax.random.split(jax.random.key(5), n), states, times[0])
        states = jax.tree.map(lambda leaf: leaf[jnp.array([3, 3, 1, 0, 4])], states)
        again, _ = jax.vmap(sampler.step)(jax.random.split(jax.random.key(6), n), states, jnp.linspace(0.4, 0.8, n))
        return states, again

    states, again = steps(x0, jnp.array([0.3]))
    np.testing.assert_array_equal(states.cond, [3, 3, 1, 0, 4])
    np.testing.assert_array_equal(again.t, np.linspace(0.4, 0.8, n))
    key = jax.random.split(jax.random.key(6), n)[2]
    alone, _ = sampler.step(key, jax.tree.map(lambda leaf: leaf[2], states), np.linspace(0.4, 0.8, n)[2])
    np.testing.assert_allclose(again.x[2], alone.x, rtol=1e-12)
    assert np.all(again.x[0] != again.x[1])


def test_renoise_draws_the_same_numbers_as_before_steps():
    """x_t = shrink X + noise z, z of fold_in(key, k) split over the leaves: the streams of earlier versions."""
    key, x = jax.random.key(7), X
    plan = samplers.renoise_plan(PATH, jnp.array(GRID[1:]), 0.5)
    for k, (s, (target, shrink, noise, _)) in enumerate(zip(GRID, zip(*plan, strict=True), strict=False)):
        leaf_key = jax.random.split(jax.random.fold_in(key, k), 1)[0]
        x = shrink * BOUND.jump(s, target, x) + noise * jax.random.normal(leaf_key, (2,))
    found = samplers.renoise(BOUND, X, GRID, key=key, interpolant=PATH, kappa=0.5)
    np.testing.assert_allclose(found, x, rtol=1e-14)


def test_a_keyed_network_gets_a_key_of_its_own():
    def noisy(params, s, t, x, cond=None, *, key=None):
        return (0.0 if key is None else jax.random.normal(key, x.shape)) + 0.0 * x

    bound = types.FlowMap(noisy, types.BOTH).bind(None)
    key = jax.random.key(8)
    plain = samplers.renoise(bound, X, [0.0, 0.5], key=key, interpolant=PATH, kappa=1.0)
    keyed = samplers.renoise(bound, X, [0.0, 0.5], key=key, interpolant=PATH, kappa=1.0, keyed=True)
    assert np.all(plain != keyed)
    _, info = samplers.run_path(samplers.Renoise(bound, PATH, 1.0, keyed=True), key, X, [0.0, 0.5])
    added = (keyed - info.centre[0]) / info.noise[0]
    moved = (info.centre[0] / PATH.beta(0.5) - X) / 1.0
    assert np.all(np.abs(added - moved) > 1e-6)


class Counted:
    """A flow map that counts how often it runs."""

    def __init__(self):
        self.calls = 0
        self.bound = types.FlowMap(self.mean_velocity, types.BOTH).bind(None)

    def mean_velocity(self, params, s, t, x, cond=None, *, key=None):
        jax.debug.callback(self.count)
        return -0.5 * x

    def count(self):
        self.calls += 1


@pytest.mark.representatives("3")
@pytest.mark.parametrize("jumps", [2, 3, 5])
def test_renoised_calls_the_map_once_for_each_jump_before_the_last(jumps):
    counted, n = Counted(), 3
    keys, x0 = jax.random.split(jax.random.key(11), n), jnp.ones((n, 2))
    grid = samplers.uniform_grid(jumps)
    found = likelihood.renoised(counted.bound, x0, grid, keys=keys, interpolant=PATH)
    jax.block_until_ready(found)
    jax.effects_barrier()
    # Of the whole batch at once.
    assert counted.calls == jumps - 1


@pytest.mark.representatives("renoise", "heun")
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_calls_the_map_as_often_as_its_info_says(name):
    counted, key = Counted(), jax.random.key(12)
    sampler = {
        "jumps": lambda b: samplers.Jumps(b),
        "renoise": lambda b: samplers.Renoise(b, PATH, 0.5),
        "consistency": lambda b: samplers.Renoise(b, PATH, 1.0),
        "euler": lambda b: samplers.SDE(b, PATH),
        "heun": lambda b: samplers.SDE(b, PATH, method="heun"),
    }[name](counted.bound)
    _, info = jax.block_until_ready(samplers.run_path(sampler, key, X, GRID))
    jax.effects_barrier()
    assert counted.calls == int(jnp.sum(info.calls))


class Walk(NamedTuple):
    x: jax.Array
    count: jax.Array


class Drift:
    """A sampler of one's own, which has a state and consumes the key that it gets."""

    def init(self, x0, t, cond=None):
        return Walk(x0, jnp.int32(0))

    def step(self, key, state, t):
        x = state.x + t + jax.random.normal(key, state.x.shape, state.x.dtype)
        return Walk(x, state.count + 1), state.count

    def check(self, grid):
        if len(grid) > 4:
            raise ValueError("grid: too long")


def test_a_sampler_of_ones_own_runs():
    path, counts = samplers.run_path(Drift(), jax.random.key(13), X, GRID)
    np.testing.assert_array_equal(counts, [0, 1, 2])
    noise = np.diff(path, axis=0) - np.asarray(GRID[1:])[:, None]
    assert len(np.unique(noise)) == 6
    with pytest.raises(ValueError, match="too long"):
        samplers.run(Drift(), jax.random.key(13), X, [0.0, 0.1, 0.2, 0.3, 0.4])


LIKE = jax.ShapeDtypeStruct((2,), jnp.float64)


def test_steps_check_their_arguments():
    renoise = SAMPLERS["renoise"]
    with pytest.raises(ValueError, match="t: expected a scalar"):
        renoise.init(X, jnp.zeros(2))
    with pytest.raises(TypeError, match="x0: expected floating"):
        samplers.Jumps(BOUND).init(jnp.arange(2), 0.0)
    with pytest.raises(ValueError, match="t: expected a scalar"):
        renoise.step(jax.random.key(0), renoise.init(X, 0.0), jnp.zeros(2))
    with pytest.raises(ValueError, match="kappa: expected a share"):
        samplers.Renoise(BOUND, PATH, 1.5).init(X, 0.0)
    with pytest.raises(ValueError, match="method: "):
        samplers.SDE(BOUND, PATH, method="milstein").init(X, 0.0)
    for grid in ([0.5, 0.1], [0.0, 1.2]):
        with pytest.raises(ValueError, match="grid: "):
            samplers.sde(BOUND, X, grid, key=jax.random.key(0), interpolant=PATH)


KEY, LIST = jax.random.key(0), [0.0, 1.0]
WRONG_CALLS = {
    "unbound": (lambda: samplers.jumps(ORACLE.flow_map, X, GRID), TypeError, "bound: .*bind.*got FlowMap"),
    "swapped": (lambda: samplers.jumps(X, BOUND, GRID), TypeError, "bound: expected a BoundFlowMap"),
    "path": (lambda: samplers.jumps_path(ORACLE.flow_map, X, GRID), TypeError, "bound: expected a BoundFlowMap"),
    "encode": (lambda: samplers.encode(ORACLE.flow_map, X, [1.0, 0.0]), TypeError, "bound: expected a BoundFlowMap"),
    "state": (lambda: samplers.Jumps(ORACLE.flow_map).init(X, 0.0), TypeError, "bound: expected a BoundFlowMap"),
    "renoise": (
        lambda: samplers.renoise(ORACLE.flow_map, X, GRID, key=KEY, interpolant=PATH, kappa=0.5),
        TypeError,
        "bound: expected a BoundFlowMap",
    ),
    "renoise, path": (
        lambda: samplers.renoise(BOUND, X, GRID, key=KEY, interpolant="linear", kappa=0.5),
        TypeError,
        "interpolant: expected an Interpolant.*'linear'",
    ),
    "plan": (
        lambda: samplers.renoise_plan("linear", jnp.ones(1), 0.5),
        TypeError,
        "interpolant: expected an Interpolant.*'linear'",
    ),
    "renoise, swapped": (
        lambda: samplers.Renoise(PATH, BOUND, 0.5).init(X, 0.0),
        TypeError,
        "bound: .*got Interpolant",
    ),
    "sde": (lambda: samplers.sde(ORACLE.flow_map, X, GRID, key=KEY, interpolant=PATH), TypeError, "bound: expected"),
    "sde, path": (lambda: samplers.sde(BOUND, X, GRID, key=KEY, interpolant="linear"), TypeError, "interpolant: expec"),
    "no key": (lambda: samplers.run(SAMPLERS["renoise"], None, X, GRID), TypeError, "key: expected a PRNG key"),
    "no key, sde": (lambda: samplers.run(SAMPLERS["euler"], None, X, GRID), TypeError, "key: expected a PRNG key"),
    "no key, keyed": (
        lambda: samplers.run(samplers.Jumps(BOUND, keyed=True), None, X, GRID),
        TypeError,
        "key: expected a PRNG key",
    ),
    "a number": (lambda: samplers.jumps(BOUND, X, GRID, key=0), TypeError, "key: expected a PRNG key.*int"),
    "keys": (lambda: samplers.jumps(BOUND, X, GRID, key=jax.random.split(KEY, 3)), ValueError, "key: expected one key"),
    "draw, keys": (lambda: samplers.draw(SAMPLERS["jumps"], 0, 3, GRID, like=LIKE), TypeError, "key: expected a PRNG"),
    "draw, swapped": (lambda: samplers.draw(KEY, SAMPLERS["jumps"], 3, GRID, like=LIKE), TypeError, "sampler: expec"),
    "run, swapped": (lambda: samplers.run(KEY, SAMPLERS["jumps"], X, GRID), TypeError, "sampler: expected a sampler"),
    "run, a map": (lambda: samplers.run(BOUND, KEY, X, GRID), TypeError, "sampler: expected a sampler"),
    "run, a class": (lambda: samplers.run(samplers.Jumps, KEY, X, GRID), TypeError, "sampler: expected a sampler"),
    "run, key last": (lambda: samplers.run(SAMPLERS["jumps"], X, KEY, GRID), TypeError, "key: expected a PRNG key"),
    "run, grid": (
        lambda: samplers.run(SAMPLERS["renoise"], KEY, X, 4),
        ValueError,
        "grid: expected at least two times",
    ),
    "push": (lambda: likelihood.push(ORACLE.flow_map, X, LIST), TypeError, "bound: expected a BoundFlowMap"),
    "density": (lambda: likelihood.log_density(X, BOUND, LIST), TypeError, "bound: expected a BoundFlowMap"),
    "refine": (
        lambda: likelihood.refine(ORACLE.flow_map, X, LIST, step_size=0.1),
        TypeError,
        "bound: expected a BoundFlowMap",
    ),
    "oracle": (lambda: oracles.gaussian("linear"), TypeError, "interpolant: expected an Interpolant"),
    "oracle, key": (lambda: ORACLE.sample(PARAMS, 5, KEY), TypeError, "key: expected a PRNG key"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_arguments_are_named(case):
    call, error, message = WRONG_CALLS[case]
    with pytest.raises(error, match=f"^{message}"):
        call()


@pytest.mark.slow
def test_states_may_be_resampled_between_steps():
    """As in the example of ``samplers.steps``: copies of one particle differ by the noise of the next step alone."""
    sampler, n = samplers.Renoise(BOUND, PATH, kappa=0.5), 3
    states = jax.vmap(lambda x: sampler.init(x, GRID[0]))(jnp.arange(6.0).reshape(n, 2))
    states = jax.tree.map(lambda leaf: leaf[jnp.array([2, 2, 0])], states)
    with jax.debug_key_reuse(False):
        for t in GRID[1:]:
            states, _ = jax.vmap(sampler.step, (None, 0, None))(KEY, states, t)
    np.testing.assert_array_equal(states.x[0], states.x[1])
    assert np.abs(states.x[0] - states.x[2]).min() > 1e-3
