"""Checks of a method of the catalogue: stationarity, reports, and cost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow import flops as counter
from jflow import interpolants, nets, objectives, parameterizations, types
from jflow.interpolants import Interpolant
from jflow.objectives import batch_split
from jflow.testing import expect
from jflow.testing.quadrature import (
    FEATURES,
    OFF,
    context_of,
    expected_gradient,
    objective_of,
    setting,
    solved_pairs,
    student,
    times_within,
)

# Values of the small number h for methods that are exact only in the limit h -> 0.
STEPS = np.array([0.08, 0.04, 0.02, 0.01])
FORMS = ("v", "x")
BATCH, DIM = 512, 2


def check_method(
    method: objectives.Method,
    *,
    paths: Sequence[Interpolant] | None = None,
    forms: Sequence[str] = FORMS,
    **choices: Any,
) -> None:
    """Checks a method against its row in the catalogue: ``check_stationary`` on each path, ``check_report``, ``check_cost``.

    Args:
      method: the row made by ``objectives.method``, for instance ``objectives.METHODS["lsd"]``.
      paths: the paths for ``check_stationary``; by default the linear and the trigonometric path, if the method allows them.
      forms: the parameterizations for ``check_stationary``.
      **choices: arguments of the method's constructor, for those without a default.

    Raises:
      AssertionError: if a property does not hold; the message has the value, its limit and its meaning.
      RuntimeError: if ``jax_enable_x64`` is off.
      TypeError: if ``method`` is not a Method.
    """
    _check_arguments(method)
    if paths is None:
        names = [name for name in ("linear", "trigonometric") if name in (method.paths or (name,))] or method.paths[:1]
        paths = [interpolants.INTERPOLANTS[name]() for name in names]
    for path in paths:
        check_stationary(method, path, forms=forms, **choices)
    check_report(method, **choices)
    if method.cost:
        check_cost(method, **choices)


def check_stationary(
    method: objectives.Method, interpolant: Interpolant, *, forms: Sequence[str] = FORMS, **choices: Any
) -> None:
    """Checks that the exact map is a stationary point of the expected loss, as its row declares, and another map is not.

    The expected gradient is a finite sum over pairs of a nonlinear flow without symmetry (``jflow.testing.quadrature``), at
    two pairs of times. If the row declares "exact", the gradient must be zero up to rounding. If it declares "order" or
    "limit", the gradient must be of order h^order, by regression over four values of h.

    Args:
      method: the row.
      interpolant: the path.
      forms: "v", "x" or both. The error of the student is an error of the mean velocity ("v") or of predicted data ("x").
      **choices: arguments of the method's constructor.

    Raises:
      AssertionError, RuntimeError, TypeError: as in ``check_method``.
    """
    _check_arguments(method)
    interpolants.check(interpolant)
    this = setting(method, interpolant)
    probe = objective_of(method, student(this, interpolant, False), interpolant, this.exact, **choices)
    _check_cost_is_declared(method, probe)
    pairs = jnp.asarray(times_within(probe.domain))
    by_x = jnp.asarray([form == "x" for form in forms])

    @jax.jit
    def run(thetas: jax.Array, steps: jax.Array) -> jax.Array:
        def one(theta: jax.Array, step: jax.Array, pair: jax.Array, by_x: jax.Array) -> jax.Array:
            own = {} if method.at is None else method.at(step)
            at = (pair[0], pair[1])
            return expected_gradient(method, interpolant, theta, at, by_x, this=this, **{**choices, **own})[0]

        over_forms = jax.vmap(one, (None, None, None, 0))
        over_pairs = jax.vmap(over_forms, (None, None, 0, None))
        return jax.lax.map(lambda z: over_pairs(z[0], z[1], pairs, by_x), (thetas, steps))

    small = STEPS if method.at is not None else STEPS[-1:]
    thetas = np.stack([np.zeros(FEATURES)] * len(small) + [OFF])
    gradients = np.asarray(run(jnp.asarray(thetas), jnp.asarray(np.append(small, small[-1]))))
    sizes, beside = np.linalg.norm(gradients[:-1], axis=-1), np.linalg.norm(gradients[-1], axis=-1)
    expect.above("gradient beside the exact map", beside, 1e-3, "the loss does not notice an error of the map")
    relative = "expected gradient at the exact map, over that beside it"
    if method.stationary == "exact":
        meaning = (
            "the exact map is not stationary: an identity with a wrong sign or factor, a gradient that should be stopped, or "
            'a row that should declare stationary="order"'
        )
        expect.at_most(relative, sizes / beside, 1e-12, meaning)
        return
    expect.true(method.at is not None, f'at: expected h -> choices with stationary="{method.stationary}", got None')
    # One regression for each form and pair of times.
    slopes = np.polyfit(np.log(STEPS), np.log(sizes).reshape(len(STEPS), -1), 1)[0]
    meaning = f"the gradient at the exact map is not of the declared order {method.order} in h"
    expect.at_most("|order found - order declared|", np.abs(slopes - method.order), 0.2, meaning)
    expect.at_most(f"{relative}, at h = {STEPS[-1]}", sizes[-1] / beside, 0.2, "the gradient does not vanish with h")


def check_report(method: objectives.Method, **choices: Any) -> None:
    """Checks the loss and the metrics of a method near the exact map.

    The loss must be finite, with one number for each of 32 samples. Each term must report positive raw residuals, whose bins
    by t count each of its rows once. The method's own term must also report a positive tangent norm, and bins by gap that
    count each of its rows once.

    Args:
      method: the row.
      **choices: arguments of the method's constructor.

    Raises:
      AssertionError, RuntimeError, TypeError: as in ``check_method``.
    """
    _check_arguments(method)
    path = interpolants.INTERPOLANTS[method.paths[0] if method.paths else "linear"]()
    # Any map can be used here; this one is the fastest to compile.
    this = solved_pairs(path)
    objective = objective_of(method, student(this, path, False), path, this.exact, **choices)
    theta, middle = jnp.asarray(OFF), len(this.weights) // 2
    batch = jax.tree.map(lambda leaf: leaf[middle - 16 : middle + 16], this.batch(0.0))
    loss, aux = jax.device_get(
        jax.jit(lambda k: objective(theta, k, batch, context_of(this, theta)))(jax.random.key(1))
    )
    expect.true(loss.shape == (32,), f"loss: expected one number per sample, shape (32,), got {loss.shape}")
    expect.finite("loss", loss, "the method fails near the exact map")
    expect.true(aux.state == (), f"aux.state: expected (), got {aux.state!r}")
    metrics, rows = aux.metrics, aux.metrics["diagonal_rows"].values
    own = set() if objective.term is None else {objective.term.name}
    _check_cost_is_declared(method, objective)
    terms = {name.split("/")[0] for name in metrics if "/" in name}
    expected = ({"tangent"} if objective.diagonal > 0 else set()) | own
    expect.true(terms == expected, f"metrics: expected the terms {sorted(expected)}, got {sorted(terms)}")
    for term in sorted(terms):
        raw = metrics[f"{term}/raw"]
        expect.above(f"{term}/raw", raw.value(), 1e-5, "the residual does not notice an error of the map")
        counts = raw.by["t"].count.sum(), np.sum(rows == (term == "tangent"))
        expect.true(counts[0] == counts[1], f"{term}/raw by t: expected {counts[1]} rows, got {counts[0]}")
    for term in own:
        expect.above(
            f"{term}/tangent_norm", metrics[f"{term}/tangent_norm"].value(), 0.0, "the tangent is not reported"
        )
        by_gap = metrics[f"{term}/raw"].by["gap"]
        expect.finite(f"{term}/raw by gap", by_gap.total, "a residual of one gap fails")
        counts = by_gap.count.sum(), np.sum(~rows)
        expect.true(counts[0] == counts[1], f"{term}/raw by gap: expected {counts[1]} rows, got {counts[0]}")


def check_cost(
    method: objectives.Method,
    *,
    tolerance: float = 0.02,
    on_extra: int = 0,
    off_extra: int = 0,
    teacher: bool = False,
    **choices: Any,
) -> None:
    """Checks that the cost of the loss's gradient, in FLOPs (``jflow.flops.compiled``), is the cost that the row declares.

    The network is a plain MLP with 5 layers of 512. The parts that the row counts in ``cost`` are compiled separately.

    Args:
      method: a row with a cost.
      tolerance: the relative difference that passes, in both directions.
      on_extra, off_extra: the numbers of forward passes of a diagonal and of an off-diagonal row that the row does not declare.
      teacher: whether to give the method a teacher, a FlowMap with the same network.
      **choices: arguments of the method's constructor.

    Raises:
      AssertionError: if the FLOPs differ by more than the tolerance.
      TypeError: if ``method`` is not a Method.
    """
    if not isinstance(method, objectives.Method):
        raise TypeError(f"method: expected an objectives.Method, got {type(method).__name__}")
    path = interpolants.INTERPOLANTS[(method.paths or ("linear",))[0]]()
    form = parameterizations.PARAMETERIZATIONS[(method.forms or ("v",))[0]](path)
    flow_map = parameterizations.flow_map(nets.from_linen(_network()), form, domain=types.BOTH)
    if teacher:
        choices["teacher"] = flow_map
    objective = method.constructor(flow_map, path, **choices)
    params, points = _params(), _floats(BATCH, DIM)
    taught = teacher or set(method.needs) & {"teacher", "map teacher"}
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    averaged = params if "ema" in method.needs else None
    context = types.Context(step, ema=averaged, teacher=params if taught else None)
    batch = types.Batch(points, x0=points if "pairs" in method.needs else None)

    def loss(params: Any, key: Any, batch: types.Batch, context: types.Context) -> Any:
        per_sample, aux = objective(params, key, batch, context)
        return jnp.mean(per_sample), aux

    key = jax.eval_shape(lambda: jax.random.key(0))
    found = flops(jax.value_and_grad(loss, has_aux=True), params, key, batch, context)
    on, off = batch_split.split_batch(jax.random.key(0), BATCH, objective.diagonal, objective.blocks).counts
    part = pieces()
    on_cost = (1 + on_extra) * part["forward"] + part["backward"]
    off_cost = off_extra * part["forward"] + sum(part[piece] * count for piece, count in method.cost.items())
    ratio = found / (on * on_cost + off * off_cost)
    meaning = f"the gradient costs {ratio:.3f} times the declared {dict(method.cost)}"
    expect.at_most("|FLOPs over those of the declared parts - 1|", abs(ratio - 1.0), tolerance, meaning)


def flops(function: Callable[..., Any], *args: Any) -> float:
    """The FLOPs of the compiled program of a function, loops included; the arguments may be ``jax.ShapeDtypeStruct``."""
    return counter.compiled(function, *args)


@functools.cache
def pieces() -> Mapping[str, float]:
    """The FLOPs per row of each piece of ``objectives.PASSES``, each compiled separately."""
    network: Callable[..., Any] = jax.vmap(nets.from_linen(_network()), (None, 0, 0, 0))
    params, points = _params(), (_floats(BATCH), _floats(BATCH), _floats(BATCH, DIM))
    out = points[2]

    def backward(params: Any, point: Any, out: Any) -> Any:
        return jax.value_and_grad(lambda p: jnp.vdot(network(p, *point), out))(params)

    def jvp(params: Any, point: Any, direction: Any) -> Any:
        return jax.jvp(functools.partial(network, params), point, direction)

    def tangent(params: Any, point: Any, *directions: Any) -> Any:
        value, linear = jax.linearize(functools.partial(network, params), *point)
        return value, [linear(*direction) for direction in directions]

    def jvp_backward(params: Any, point: Any, direction: Any, out: Any, out_dot: Any) -> Any:
        def both(p: Any) -> Any:
            value, derivative = jvp(p, point, direction)
            return jnp.vdot(value, out) + jnp.vdot(derivative, out_dot)

        return jax.value_and_grad(both)(params)

    def input_backward(params: Any, point: Any, out: Any) -> Any:
        return jax.value_and_grad(lambda x: jnp.vdot(network(params, *point[:2], x), out))(point[2])

    forward = flops(network, params, *points)
    with_jvp = flops(jvp, params, points, points)
    whole = {
        "forward": forward,
        "backward": flops(backward, params, points, out) - forward,
        "jvp": with_jvp,
        "tangent": flops(tangent, params, points, points, points) - with_jvp,
        "jvp_backward": flops(jvp_backward, params, points, points, out, out) - with_jvp,
        "input_backward": flops(input_backward, params, points, out) - forward,
    }
    return {name: count / BATCH for name, count in whole.items()}


def _check_cost_is_declared(method: objectives.Method, objective: objectives.Objective) -> None:
    has_term = objective.term is not None
    expect.true(has_term == bool(method.cost), f"cost: expected one exactly if there is a term, got {method.cost!r}")


def _check_arguments(method: objectives.Method) -> None:
    expect.require_x64()
    if not isinstance(method, objectives.Method):
        raise TypeError(
            f"method: expected an objectives.Method, such as objectives.METHODS['lsd'], got {type(method).__name__}"
        )


def _network() -> Any:
    return nets.MLP.plain(features=512, depth=5)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _params() -> Any:
    variables: Any = jax.eval_shape(_network().init, jax.random.key(0), _floats(), _floats(), _floats(DIM))
    return variables["params"]
