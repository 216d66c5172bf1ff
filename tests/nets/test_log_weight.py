"""The log weight: zero at first, of two times, trained with a map to the residual's own scale."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import interpolants, nets, objectives, parameterizations, reductions, types

SMALL = {"features": 16, "time_features": 8}


def test_it_starts_at_zero_and_tells_two_times_apart():
    module = nets.LogWeight(**SMALL)
    params = jax.jit(module.init)(jax.random.key(0), 0.0, 0.0)["params"]
    times = jnp.linspace(0.0, 1.0, 5)
    run = jax.jit(jax.vmap(module.apply, (None, 0, 0)))
    assert np.all(run({"params": params}, times, times[::-1]) == 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    one = jnp.float32(0.3)
    assert module.apply({"params": params}, one, one).dtype == jnp.float32
    assert module.apply({"params": params}, one, jnp.float64(0.3)).dtype == jnp.float64
    moved = jax.tree.map(lambda p: p + jax.random.normal(jax.random.key(1), p.shape, p.dtype), params)
    a, b, c = (module.apply({"params": moved}, *pair) for pair in ((0.2, 0.7), (0.7, 0.2), (0.2, 0.2)))
    assert a.shape == () and min(abs(a - b), abs(a - c), abs(b - c)) > 1e-3


def test_it_learns_the_logarithm_of_the_mean_square():
    """At the optimum of e^{-w} r + w, e^w = E[r]; here r = 4 (1 + t)^2."""
    module = nets.LogWeight(**SMALL)
    log_weight = nets.with_log_weight(types.FlowMap(lambda *_, key=None: None), module)[1]
    reduction = reductions.learned(log_weight)
    params = nets.Weighted(jnp.zeros(1), jax.jit(module.init)(jax.random.key(0), 0.0, 0.0)["params"])
    optimizer = optax.adam(1e-2)

    def step(carry, key):
        params, state = carry
        s, t = jnp.sort(jax.random.uniform(key, (2, 64), jnp.float32), axis=0)

        def loss(params):
            return jnp.mean(jax.vmap(lambda s, t: reduction(params, s, t, 2 * (1 + t)[None]))(s, t))

        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
    (params, _), _ = jax.jit(lambda c, k: jax.lax.scan(step, c, k))(
        (params, state), jax.random.split(jax.random.key(1), 600)
    )
    for s, t in ((0.1, 0.3), (0.2, 0.9), (0.5, 0.5)):
        assert float(log_weight(params, s, t)) == pytest.approx(2 * np.log(2 * (1 + t)), abs=0.1)


@pytest.mark.slow
def test_a_pair_of_parameters_goes_through_an_objective():
    def net(params, s, t, x, cond=None, *, key=None):
        return params["w"] * x + (t - s)

    path = interpolants.linear()
    flow_map = parameterizations.flow_map(net, parameterizations.mean_velocity_form(), types.BOTH)
    module = nets.LogWeight(**SMALL)
    flow, log_weight = nets.with_log_weight(flow_map, module)
    assert flow.domain is types.BOTH and flow.velocity_override is None
    weights = jax.jit(module.init)(jax.random.key(0), 0.0, 0.0)["params"]
    params = nets.Weighted({"w": jnp.float64(0.7)}, weights)
    x = jnp.array([0.5, -1.0])
    np.testing.assert_array_equal(flow.bind(params).jump(0.2, 0.6, x), flow_map.jump(params.map, 0.2, 0.6, x))
    np.testing.assert_array_equal(flow.bind(params).velocity(0.2, x), flow_map.velocity(params.map, 0.2, x))

    batch = types.Batch(jax.random.normal(jax.random.key(2), (16, 2)))
    learned = objectives.lsd(flow, path, reduction=reductions.learned(log_weight))
    plain = objectives.lsd(flow_map, path)

    def loss(params):
        losses, _ = learned(params, jax.random.key(3), batch)
        return jnp.mean(losses), losses

    gradient, losses = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(losses, jax.jit(plain)(params.map, jax.random.key(3), batch)[0], rtol=1e-12)  # w = 0
    assert float(jnp.abs(gradient.log_weight["output"]["bias"])[0]) > 0 and float(jnp.abs(gradient.map["w"])) > 0


def test_overrides_are_kept():
    flow_map = types.FlowMap(
        lambda p, s, t, x, cond=None, *, key=None: p * x,
        jump_override=lambda p, s, t, x, cond=None, *, key=None: p + x,
        velocity_override=lambda p, t, x, cond=None, *, key=None: p - x,
    )
    flow, _ = nets.with_log_weight(flow_map, nets.LogWeight())
    params = nets.Weighted(3.0, None)
    assert flow.jump(params, 0.0, 1.0, 2.0) == 5.0 and flow.velocity(params, 0.0, 2.0) == 1.0
    assert flow.mean_velocity(params, 0.0, 1.0, 2.0) == 6.0


def test_refusals():
    with pytest.raises(ValueError, match="features"):
        nets.LogWeight(features=0)
    module = nets.LogWeight(**SMALL)
    with pytest.raises(ValueError, match="t: expected a scalar"):
        module.init(jax.random.key(0), 0.0, jnp.zeros(2))
    flow, log_weight = nets.with_log_weight(types.FlowMap(lambda p, s, t, x, cond=None, *, key=None: x), module)
    for call in (lambda: log_weight({}, 0.0, 1.0), lambda: flow.velocity({}, 0.0, jnp.zeros(1))):
        with pytest.raises(TypeError, match=r"params: expected Weighted\(map, log_weight\), got dict"):
            call()
