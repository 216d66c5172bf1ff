"""A mode of differentiation that a solve does not have is refused by the name of the argument."""

from __future__ import annotations

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import solvers
from jflow.solvers import adjoints

P, X = jnp.asarray(0.2), jnp.asarray([-0.7, 0.2, 0.9])


def velocity(params, t, x, cond=None, *, key=None):
    return jax.tree.map(lambda leaf: params * (1.0 + 2.0 * t) * (1.0 + leaf * leaf), x)


FLOW = solvers.solve(velocity, "euler", steps=2, adjoint="forward")


def total(p, x=X):
    return jnp.sum(FLOW.mean_velocity(p, 0.1, 0.8, x))


REVERSE = {
    "grad": lambda: jax.grad(total)(P),
    "jit of grad": lambda: jax.jit(jax.grad(total))(P),
    "grad of jit": lambda: jax.grad(jax.jit(total))(P),
    "vmap of grad": lambda: jax.vmap(jax.grad(total), (None, 0))(P, jnp.stack([X, X])),
    "grad of vmap": lambda: jax.grad(lambda p: jnp.sum(jax.vmap(total, (None, 0))(p, jnp.stack([X, X]))))(P),
    "vjp": lambda: jax.vjp(total, P)[1](jnp.ones_like(P)),
    "jacrev": lambda: jax.jacrev(lambda x: FLOW.mean_velocity(P, 0.1, 0.8, x))(X),
    "reverse over forward": lambda: jax.grad(lambda p: jax.jvp(total, (p,), (p,))[1])(P),
    "checkpoint": lambda: jax.grad(jax.checkpoint(total))(P),
    "scan": lambda: jax.grad(lambda p: jax.lax.scan(lambda c, _: (c * total(p), None), p, None, length=2)[0])(P),
    "trajectory": lambda: jax.grad(lambda p: jnp.sum(solvers.trajectory(velocity, p, np.array([0.1, 0.5, 0.9]), X)))(P),
    "object": lambda: jax.grad(
        lambda p: jnp.sum(solvers.solve(velocity, adjoint=diffrax.ForwardMode()).mean_velocity(p, 0.1, 0.8, X))
    )(P),
    "default": lambda: jax.jit(jax.grad(lambda p: jnp.sum(solvers.solve(velocity).mean_velocity(p, 0.1, 0.8, X))))(P),
}


@pytest.mark.representatives("grad of vmap", "default")
@pytest.mark.parametrize("mode", REVERSE)
def test_reverse_mode_through_a_forward_only_solve_names_adjoint(mode):
    with pytest.raises(ValueError, match=r"^adjoint: .*no reverse mode.*'recursive'.*'direct'"):
        REVERSE[mode]()


@pytest.mark.slow
def test_forward_mode_is_not_touched():
    """jvp of jvp, jacfwd and linearize against the same solve through the adjoint that has both modes."""
    both = solvers.solve(velocity, "euler", steps=2, adjoint="direct")

    def derivatives(flow):
        f = lambda x: flow.mean_velocity(P, 0.1, 0.8, x)  # noqa: E731
        first = lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]  # noqa: E731
        return jax.jit(
            lambda x: (first(x), jax.jvp(first, (x,), (x,))[1], jax.jacfwd(f)(x), jax.linearize(f, x)[1](x))
        )(X)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), derivatives(FLOW), derivatives(both))


def test_the_guard_leaves_nothing_in_a_compiled_program():
    x = {"a": X, "b": X[0]}

    def second(guard):
        def f(x):
            return guard(jax.tree.map(jnp.sin, x))

        return lambda x: jax.jvp(lambda x: jax.jvp(f, (x,), (x,))[1], (x,), (x,))

    with_guard, without = (jax.jit(second(g)).lower(x).compile() for g in (adjoints.forward_only, lambda x: x))
    assert with_guard.cost_analysis()["flops"] == without.cost_analysis()["flops"]
    assert "custom-call" not in with_guard.as_text()
    assert "callback" not in str(jax.make_jaxpr(second(adjoints.forward_only))(x))
    # Derivatives that are not finite pass through as they are.
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, x)
    assert np.isnan(jax.jit(lambda x: jax.jvp(adjoints.forward_only, (x,), (nan,))[1])(x)["b"])


@pytest.mark.representatives("recursive")
@pytest.mark.parametrize("adjoint", ["recursive", "backsolve", diffrax.RecursiveCheckpointAdjoint()])
def test_an_eager_jvp_through_a_reverse_only_solve_names_adjoint(adjoint):
    flow = solvers.solve(velocity, "heun", steps=2, adjoint=adjoint)
    f = lambda x: flow.mean_velocity(P, 0.1, 0.8, x)  # noqa: E731
    for forward in (lambda: jax.jvp(f, (X,), (X,)), lambda: jax.jacfwd(f)(X)):
        with pytest.raises(TypeError, match=r"^adjoint: .*no forward mode.*'forward'.*'direct'"):
            forward()


@pytest.mark.slow
def test_an_eager_jvp_through_a_kernel_with_a_reverse_rule_alone_names_the_velocity():
    @jax.custom_vjp
    def kernel(x):
        return jnp.sin(x)

    kernel.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    fused = lambda params, t, x, cond=None, *, key=None: kernel(x)  # noqa: E731
    flow = solvers.solve(fused, "heun", steps=2, adjoint="forward")
    with pytest.raises(TypeError, match=r"^velocity: .*custom_vjp"):
        jax.jvp(lambda x: flow.mean_velocity(None, 0.1, 0.8, x), (X,), (X,))
    back = solvers.solve(fused, "heun", steps=2, adjoint="recursive")
    assert np.all(np.isfinite(jax.jit(jax.grad(lambda x: jnp.sum(back.mean_velocity(None, 0.1, 0.8, x))))(X)))


def test_other_type_errors_pass_unchanged():
    flow = solvers.solve(lambda params, t, x, cond=None, *, key=None: x + "1")
    with pytest.raises(TypeError) as caught:
        flow.mean_velocity(None, 0.1, 0.8, X)
    assert "adjoint" not in str(caught.value)


def test_a_failing_way_back_of_a_callers_own_adjoint_raises_too():
    assert adjoints.make(diffrax.BacksolveAdjoint(solver=diffrax.Dopri5())).kwargs["throw"] is True
    assert adjoints.make(diffrax.BacksolveAdjoint(throw=False)).kwargs["throw"] is False


@pytest.mark.representatives("fixed-backsolve-x")
@pytest.mark.parametrize("batched", ["x", "cond"])
@pytest.mark.parametrize("adjoint", ["direct", "recursive", "backsolve"])
@pytest.mark.parametrize(
    ("solver", "choices"),
    [("heun", {"steps": 2}), pytest.param("tsit5", {"rtol": 1e-7}, marks=pytest.mark.slow)],
    ids=["fixed", "adaptive"],
)
def test_gradients_of_a_part_that_does_not_depend_on_the_batch(batched, adjoint, solver, choices):
    """Diffrax's own gradient of such a part, vmapped, is too large by the size of the batch."""

    def apart(params, t, x, cond=None, *, key=None):
        return {"moves": params * x["moves"] + (0.0 if cond is None else cond), "same": -2.0 * params}

    flow = solvers.solve(apart, solver, adjoint=adjoint, max_steps=32, **choices)

    def same(p, x, cond):
        return flow.mean_velocity(p, 0.1, 0.9, {"moves": x, "same": jnp.zeros(())}, cond)["same"]

    batch = jnp.arange(1.0, 4.0)
    axes, args = {"x": ((None, 0, None), (batch, None)), "cond": ((None, None, 0), (jnp.ones(()), batch))}[batched]
    gradient = jax.jit(jax.grad(lambda p: jnp.mean(jax.vmap(same, axes)(p, *args))))(P)
    np.testing.assert_allclose(gradient, -2.0, rtol=1e-9)
