"""Kernels that have only a reverse rule: the error of forward mode names alternatives, and these work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import autodiff, identities, likelihood, objectives, parameterizations, types
from jflow.interpolants import linear

X = jnp.asarray([0.3, -0.7, 1.1])
W = jnp.asarray([[0.4, 1.0, -0.5], [-0.7, 0.5, 0.2], [0.4, -1.1, 0.3]])
P = jnp.asarray(1.3)


@jax.custom_vjp
def kernel(x):
    return jnp.sin(x)


kernel.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
INNER = {
    "bare": kernel,
    "jit": jax.jit(kernel),
    "remat": jax.checkpoint(kernel),
    "scan": lambda x: jax.lax.scan(lambda c, _: (kernel(c), None), x, None, length=1)[0],
    "cond": lambda x: jax.lax.cond(x[0] > -9.0, kernel, kernel, x),
    "vmap": jax.vmap(kernel),
}


def net(inner):
    return lambda p, s, t, x: inner(p * (W @ x) + s - 2.0 * t)


def loss(value):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(value))


def eulerian(p, inner, stop="target", derivative=identities.forward_mode):
    s, t = jnp.asarray(0.2), jnp.asarray(0.6)
    f = net(inner)
    return loss(identities.eulerian(lambda *a: f(p, *a), s, t, X, X, stop=stop, derivative=derivative).difference)


def spatial(p, inner, derivative=identities.forward_mode):
    return eulerian(p, inner, "spatial", derivative)


def lagrangian(p, inner, derivative=identities.forward_mode):
    s, t = jnp.asarray(0.2), jnp.asarray(0.6)
    f = net(inner)
    at = lambda t, x: f(p, t, t, x)  # noqa: E731
    return loss(identities.lagrangian(lambda *a: f(p, *a), s, t, X, at, derivative=derivative).difference)


def divergence(estimate):
    def of(p, inner, **_):
        return estimate(lambda x: net(inner)(p, 0.2, 0.6, x), X, jax.random.key(0))[1]

    return of


FORWARD = {
    "eulerian": eulerian,
    "spatial": spatial,
    "lagrangian": lagrangian,
    "exact": divergence(likelihood.exact_divergence()),
    "hutchinson": divergence(likelihood.hutchinson(2)),
    "hutch++": divergence(likelihood.hutch_pp(2)),
}
OUTER = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda p: jax.vmap(f)(p[None]),
    "grad": jax.grad,
    "jit of grad of vmap": lambda f: jax.jit(jax.grad(lambda p: jnp.sum(jax.vmap(f)(p[None])))),
    "shapes": lambda f: lambda p: jax.eval_shape(f, p),
}


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("method", FORWARD)
def test_forward_mode_of_a_reverse_rule_names_what_to_use(method, outer):
    with pytest.raises(TypeError, match=r"central_difference\(step\).*mode='reverse'.*adjoint='direct'"):
        OUTER[outer](lambda p: FORWARD[method](p, kernel))(P)


@pytest.mark.parametrize("inner", INNER)
def test_the_reverse_rule_is_found_inside_of_other_operations(inner):
    for outer in ("eager", "jit", "grad"):
        with pytest.raises(TypeError, match="central_difference"):
            OUTER[outer](lambda p: lagrangian(p, INNER[inner]))(P)


@pytest.mark.parametrize("method", ["eulerian", "spatial", "lagrangian"])
def test_the_central_difference_trains_it_as_forward_mode_trains_the_plain_function(method):
    f = FORWARD[method]
    expected = jax.value_and_grad(lambda p: f(p, jnp.sin))(P)
    found = jax.jit(jax.value_and_grad(lambda p: f(p, kernel, derivative=identities.central_difference(1e-4))))(P)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_other_errors_and_unused_reverse_rules_are_left_alone():
    with pytest.raises(ValueError, match=r"^mine"):
        autodiff.jvp(lambda x: (_ for _ in ()).throw(ValueError("mine")), (X,), (X,))
    # The kernel sees nothing that is differentiated.
    value, out = jax.jit(lambda x: autodiff.jvp(lambda x: x * kernel(P), (x,), (x,)))(X)
    np.testing.assert_allclose(value, out, rtol=1e-14)
    expected = jax.jvp(lambda x, y: {"a": x * y, "b": jax.nn.relu(y)}, (X, X), (X, W[0]))
    found = autodiff.jvp(lambda x, y: {"a": x * y, "b": jax.nn.relu(y)}, (X, X), (X, W[0]))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_jvp_calls_the_function_once_and_its_derivative_has_derivatives():
    calls = []

    def f(x):
        calls.append(None)
        return jnp.sin(x) * x

    along = jax.jit(lambda x: autodiff.jvp(f, (x,), (jnp.ones_like(x),))[1])
    along(X)
    assert len(calls) == 1
    second = jax.jvp(lambda x: autodiff.jvp(f, (x,), (jnp.ones_like(x),))[1], (X,), (jnp.ones_like(X),))[1]
    np.testing.assert_allclose(second, 2 * jnp.cos(X) - X * jnp.sin(X), rtol=1e-12)
    back = jax.vmap(jax.grad(lambda x: autodiff.jvp(f, (x,), (jnp.ones_like(x),))[1]))(X)
    np.testing.assert_allclose(back, second, rtol=1e-12)


@pytest.mark.representatives("lsd")
@pytest.mark.parametrize(
    "method",
    ["lsd", "esd", "mean_flow", "improved_mean_flow", "tvm", "lmd", "emd", "ayf_lmd", "ayf_emd", "facm", "fmm"],
)
def test_methods_of_either_identity_train_such_a_kernel_by_central_differences(method):
    def apply(function):
        return lambda p, s, t, x, cond=None, *, key=None: function(p * (W @ x) + s - 2.0 * t)

    batch = types.Batch(jax.random.normal(jax.random.key(1), (8, 3)))
    context = types.Context(ema=P, teacher=jnp.asarray(0.4))

    def gradient(function, **choices):
        flow_map = parameterizations.flow_map(apply(function), parameterizations.mean_velocity_form(), types.BOTH)
        objective = objectives.METHODS[method].constructor(flow_map, linear(), **choices)
        return jax.jit(jax.grad(lambda p: jnp.mean(objective(p, jax.random.key(0), batch, context)[0])))(P)

    with pytest.raises(TypeError, match="central_difference"):
        gradient(kernel)
    found = gradient(kernel, derivative=identities.central_difference(1e-4))
    np.testing.assert_allclose(found, gradient(jnp.sin), rtol=1e-5)
