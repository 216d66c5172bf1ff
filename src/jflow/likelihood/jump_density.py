r"""The density of a sampler of K jumps of a flow map, from the determinants of the Jacobians of the jumps.

The density after K jumps is

.. math::

    \log \rho_1(x_K) = \log \rho_0(x_0) - \sum_{k=0}^{K-1} \log|\det \nabla X_{t_k,t_{k+1}}(x_k)|, \qquad
    x_{k+1} = X_{t_k,t_{k+1}}(x_k).

It is exact for any learned map that is injective; no identity needs to hold. A Jacobian whose determinant is zero or negative
shows that the map is not injective, since determinants of the exact map are positive. Positive determinants do not prove that
it is.

``push`` gives a sample with its density. The density at given data depends on the map that is used. On an ascending grid
``log_density`` inverts the jumps. On a descending grid it uses the trained encoder E as the inverse:

.. math::

    \log \rho_1(x) = \log \rho_0(E(x)) + \log|\det \nabla E(x)|.

For an exact map the two agree.

For an event of d entries, each jump costs 1 + d forward passes and a determinant of cost d^3. Its inverse by Newton's method
costs 1 + d + 8 passes per iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import autodiff, bases, checks, solvers, trees
from jflow.bases import Base
from jflow.likelihood.jacobian import flatten, linearise
from jflow.likelihood.ode_density import LogDensity, check_event, log_base
from jflow.samplers import Grid
from jflow.samplers.steps import check_bound, check_length
from jflow.types import Array, BoundFlowMap, Cond, Event, Key

# The number of Heun steps along the diagonal for the initial guess of an inverse; they are cheap compared with a Jacobian.
GUESS_STEPS = 8
# Each Newton step is tried with these lengths, and the best is taken.
LENGTHS = 0.5 ** np.arange(8)


class _Leg(NamedTuple):
    """The contribution of one jump from s to t; scalars.

    Attributes:
      log_det: ``log|det grad X_{s,t}|``.
      sign: the sign of the determinant, or 0 if log_det is not finite.
      inverted: whether an inverse was found.
    """

    log_det: Array
    sign: Array
    inverted: Array


def push(
    bound: BoundFlowMap,
    x0: Event,
    grid: Grid,
    cond: Cond = None,
    *,
    key: Key | None = None,
    base: Base = bases.STANDARD_NORMAL,
) -> LogDensity:
    """The sample ``samplers.jumps(bound, x0, grid, cond, key=key)`` and its log-density in nats.

    Args:
      bound: the flow map with its parameters.
      x0: the state at grid[0], drawn from ``base``; a pytree of floating-point arrays.
      grid: the times, ``[K + 1]``, with every jump within ``bound.domain``.
      cond: conditioning of the sample.
      key: a key from which each jump gets one for the network, or None.
      base: the law at time grid[0].

    Returns:
      LogDensity. ``valid`` is False if a determinant is zero, negative or not finite.

    Raises:
      ValueError: if the grid has a jump outside the domain (the values of a traced grid are not checked), x0 is not finite, or
        the base density is not a scalar; without ``jax.jit`` also if ``valid`` would be False.
      TypeError: if ``bound`` is not a BoundFlowMap, or x0 is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import FlowMap, likelihood, samplers
      >>> bound = FlowMap(lambda params, s, t, x, cond=None, *, key=None: x).bind(None)  # one jump doubles x
      >>> density = likelihood.push(bound, jnp.zeros(1, jnp.float32), samplers.uniform_grid(1))
      >>> round(float(density.log_density), 4)  # -log 2 - (log 2 pi)/2
      -1.6121
    """
    check_bound(bound)
    x0 = check_event("x0", x0)
    bound.domain.check_grid(grid)
    times = _times(grid, x0)

    def leg(x: Event, inputs: tuple[Array, Array, Array]) -> tuple[Event, _Leg]:
        return _jump(_jump_of(bound, inputs, cond, key), x)

    x, legs = jax.lax.scan(leg, x0, _inputs(times))
    return _checked(log_base(base, x0), legs, -1.0, x, x0, times)


def log_density(
    bound: BoundFlowMap,
    x: Event,
    grid: Grid,
    cond: Cond = None,
    *,
    key: Key | None = None,
    base: Base = bases.STANDARD_NORMAL,
    iterations: int = 50,
) -> LogDensity:
    """The log-density of given data in nats, through the inverse of the sampler or through the encoder.

    On an **ascending** grid it is the density of ``samplers.jumps`` on that grid with that key. Each jump is inverted by
    Newton's method with a dense Jacobian. The initial guess is a backward solve along the diagonal. Each step takes the best
    of eight lengths, and the result must have a residual of at most ``eps^(2/3) (1 + max|x|)``. If the map is not injective,
    only one preimage is counted. Derivatives of all orders exist, except in the grid; they are those of the implicit function.

    On a **descending** grid, for a map that also goes backward, it is the density that the encoder defines. This is the
    density of the sampler only if the encoder and the sampler are inverse to each other.

    Args:
      bound: the flow map with its parameters.
      x: an event, at grid[-1] of an ascending grid and at grid[0] of a descending one.
      grid: strictly monotone concrete times, ``[K + 1]``, with every jump within ``bound.domain``.
      cond: conditioning of the sample.
      key: as in ``push``.
      base: the law at the lowest time.
      iterations: the largest number of Newton steps per jump.

    Returns:
      LogDensity. ``x0`` is the state at the lowest time. ``valid`` is False if a determinant is zero, negative or not finite,
      or an inverse was not found.

    Raises:
      ValueError: if the grid is traced, not strictly monotone or has a jump outside the domain, x is not finite, the base
        density is not a scalar, or ``iterations`` is below 1; without ``jax.jit`` also if ``valid`` would be False.
      TypeError: if ``bound`` is not a BoundFlowMap, x is not floating-point, or ``iterations`` is not a whole number.
    """
    check_bound(bound)
    x = check_event("x", x)
    checks.integer("iterations", iterations, low=1)
    ascending = _ascending(grid)
    bound.domain.check_grid(grid)
    times = _times(grid, x)

    def backward(y: Event, inputs: tuple[Array, Array, Array]) -> tuple[Event, _Leg]:
        jump = _jump_of(bound, inputs, cond, key)
        if not ascending:
            return _jump(jump, y)
        before = _invert(jump, y, _guess(bound, inputs, y, cond, key), iterations)
        after, leg = _jump(jump, before)
        miss = jnp.linalg.norm(flatten(after)[0] - flatten(y)[0])
        return before, leg._replace(inverted=miss <= _tolerance(y))

    x0, legs = jax.lax.scan(backward, x, _inputs(times), reverse=ascending)
    return _checked(log_base(base, x0), legs, -1.0 if ascending else 1.0, x, x0, times)


def refine(
    bound: BoundFlowMap,
    x0: Event,
    grid: Grid,
    cond: Cond = None,
    *,
    step_size: float | Array,
    steps: int = 1,
    key: Key | None = None,
    base: Base = bases.STANDARD_NORMAL,
) -> Event:
    r"""Moves base points by gradient ascent to points at which the sampler's density is higher.

    With the step size eta it repeats ``steps`` times

    .. math::

        x_0 \leftarrow x_0 + \eta\, \nabla_{x_0} \log \rho_1(X(x_0)).

    To sample from the new points: ``samplers.jumps(bound, refine(bound, x0, grid, step_size=0.05), grid)``. The results are
    **not samples of the model**: each step moves them towards a mode, so they have less spread and lighter tails.

    The density is that of ``push``. It is differentiated in reverse mode, so the map needs derivatives in both modes (a solve
    has these with fixed steps or ``adjoint="direct"``).

    Args:
      bound, x0, grid, cond, key, base: as in ``push``.
      step_size: eta, in squared units of x0 per nat; a scalar, which may be traced.
      steps: the number of steps.

    Returns:
      An event shaped like x0.

    Raises:
      ValueError: as ``push``, and if the step size is not a finite scalar of at least 0, or ``steps`` is below 1.
      TypeError: as ``push``, and if the step size is not a number, or ``steps`` is not a whole number.
    """
    check_bound(bound)
    x0 = check_event("x0", x0)
    checks.integer("steps", steps, low=1)
    checks.scalar("step_size", step_size)
    size = checks.concrete(step_size)
    if size is not None:
        checks.number("step_size", size.item(), low=0.0)

    def log_rho(x0: Event) -> Array:
        return push(bound, x0, grid, cond, key=key, base=base).log_density

    return jax.lax.fori_loop(0, steps, lambda _, x0: trees.axpy(step_size, jax.grad(log_rho)(x0), x0), x0)


def _jump_of(
    bound: BoundFlowMap, inputs: tuple[Array, Array, Array], cond: Cond, key: Key | None
) -> Callable[[Event], Event]:
    """The function x -> X_{s,t}(x) that ``samplers.jumps`` runs."""
    index, s, t = inputs
    folded = _anew(None if key is None else jax.random.fold_in(key, index))
    return lambda x: bound.jump(s, t, x, cond, key=folded())


def _anew(key: Key | None) -> Callable[[], Key | None]:
    """A function that returns a copy of the key, since jax's key-reuse check rejects the many calls of an inverse."""
    if key is None or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return lambda: key
    data, impl = jax.random.key_data(key), jax.random.key_impl(key)
    return lambda: jax.random.wrap_key_data(data, impl=impl)


def _jump(jump: Callable[[Event], Event], x: Event) -> tuple[Event, _Leg]:
    """The image X(x), and the determinant of the Jacobian."""
    linear = linearise("X(x)", jump, x)
    # The matrix is transposed, which does not change the determinant.
    sign, log_det = jnp.linalg.slogdet(linear.columns())
    sign = jnp.where(jnp.isfinite(log_det), sign, 0.0)
    return linear.value, _Leg(log_det, sign, jnp.bool_(True))


def _guess(bound: BoundFlowMap, inputs: tuple[Array, Array, Array], y: Event, cond: Cond, key: Key | None) -> Array:
    """The point at s that the diagonal's flow carries to y at t: ``[d]``, or y itself if that point is not finite."""
    index, s, t = inputs
    solved = solvers.solve(bound.flow_map.velocity, "heun", steps=GUESS_STEPS).bind(bound.params)
    jump_key = None if key is None else jax.random.fold_in(key, index)
    guess, end = flatten(solved.jump(t, s, y, cond, key=jump_key))[0], flatten(y)[0]
    return jnp.where(jnp.all(jnp.isfinite(guess)), guess, end)


def _invert(jump: Callable[[Event], Event], y: Event, guess: Array, iterations: int) -> Event:
    """Solves X(x) = y by Newton's method from a guess ``[d]``; without convergence, the best x found."""
    target, unflatten = flatten(y)
    tolerance = _tolerance(y)
    lengths = jnp.asarray(LENGTHS, target.dtype)

    def gap(x: Array) -> Array:
        return flatten(jump(unflatten(x)))[0] - target

    def search(gap: Callable[[Array], Array], start: Array) -> Array:
        def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            x, miss, count, _ = state
            residual, column = autodiff.linearize(gap, x)
            direction = _solve(column, residual)
            tries = x[None] - lengths[:, None] * direction[None]
            misses = jnp.linalg.norm(jax.vmap(gap)(tries), axis=1)
            misses = jnp.where(jnp.isfinite(misses), misses, jnp.inf)
            best = jnp.argmin(misses)
            # Accept any decrease above the tolerance; below it only a clear one, which is not rounding.
            closer = misses[best] < jnp.where(miss > tolerance, miss, 0.5 * miss)
            return jnp.where(closer, tries[best], x), jnp.where(closer, misses[best], miss), count + 1, closer

        def going(state: tuple[Array, Array, Array, Array]) -> Array:
            return state[3] & (state[2] < iterations)

        first = (start, jnp.linalg.norm(gap(start)), jnp.int32(0), jnp.bool_(True))
        return jax.lax.while_loop(going, step, first)[0]

    # Differentiate the implicit function, not the search.
    return unflatten(jax.lax.custom_root(gap, guess, search, _solve))


def _solve(column: Callable[[Array], Array], value: Array) -> Array:
    """Solves J z = value, where ``column`` is z -> J z."""
    return jnp.linalg.solve(jax.vmap(column)(jnp.eye(value.size, dtype=value.dtype)).T, value)


def _tolerance(y: Event) -> Array:
    """The tolerance of an inverse, ``eps^(2/3) (1 + max|y|)``, with eps of the narrowest dtype."""
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(y))
    return eps ** (2 / 3) * (1.0 + jnp.max(jnp.abs(flatten(y)[0])))


def _inputs(times: Array) -> tuple[Array, Array, Array]:
    """The (index, s, t) of each jump."""
    return jnp.arange(times.shape[0] - 1, dtype=jnp.uint32), times[:-1], times[1:]


def _times(grid: Grid, x: Event) -> Array:
    check_length(grid)
    return jnp.asarray(grid).astype(trees.at_least_float32(x))


def _ascending(grid: Grid) -> bool:
    values = checks.concrete(grid)
    if values is None:
        raise ValueError("grid: expected concrete times, whose order says which map is meant, got traced ones")
    checks.shape("grid", values, (None,))
    gaps = np.diff(values)
    if not gaps.size or not (np.all(gaps > 0) or np.all(gaps < 0)):
        raise ValueError(f"grid: expected strictly ascending or strictly descending times, got {values}")
    return bool(gaps[0] > 0)


def _checked(base: Array, legs: _Leg, sign: float, x: Event, x0: Event, times: Array) -> LogDensity:
    """The LogDensity base + sign times the sum of log-determinants; raises ValueError if it is concrete and not valid."""
    log_density = base + sign * jnp.sum(legs.log_det).astype(base.dtype)
    valid = jnp.all((legs.sign > 0) & legs.inverted) & (log_density < jnp.inf)
    if checks.concrete(valid) is not None and not valid:
        for k, leg in enumerate(zip(*legs, strict=True)):
            log_det, sign, inverted = leg
            where = f"bound: the jump from {float(times[k]):g} to {float(times[k + 1]):g}"
            if not inverted:
                raise ValueError(
                    f"{where} was not inverted: Newton's method found no point that jumps to the given one"
                )
            if not sign > 0:
                raise ValueError(
                    f"{where} is not invertible at this sample: expected a Jacobian of positive determinant, got a negative, "
                    f"zero or infinite one (log|det| = {float(log_det):g})"
                )
        raise ValueError(f"base.log_density(x): expected a number of nats, got {float(base):g}")
    return LogDensity(log_density, x, x0, valid, jnp.prod(legs.sign).astype(log_density.dtype))
