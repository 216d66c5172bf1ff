r"""Samplers: one sample through a bound flow map, learned, solved or exact.

    jumps    x_{k+1} = X_{t_k, t_{k+1}}(x_k)
    renoise  x_t = (beta_t/beta_{t+}) X_{s,t+}(x_s) + kappa alpha_t z,  with t+ > t on the same path
    sde      the stochastic process with the same marginals, from the diagonal
    encode   data to noise

A grid is always the caller's: times in [0, 1], one jump between each two. Functions take one sample (a
pytree), and callers ``jax.vmap`` over x0 and keys. Deterministic baselines of K small steps are those of
``solvers.solve("euler", steps=K)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks, solvers, trees
from jflow.interpolants import Interpolant
from jflow.types import Array, BoundFlowMap, Cond, Event, Key, Time

Grid = Sequence[float] | np.ndarray | Array
# (bound, key, x0, grid, cond=None) -> x at grid[-1], of one sample.
Sampler = Callable[..., Event]

# Halvings of [t, 1] when a ratio alpha/beta is inverted: enough for float64.
_HALVINGS = 60


def uniform_grid(steps: int, *, start: float = 0.0, end: float = 1.0) -> np.ndarray:
    """``steps`` equal jumps from ``start`` to ``end``: float64 ``[steps + 1]``, concrete even under ``jit``.

    Raises:
      ValueError: for no steps or times outside [0, 1]; TypeError for numbers of the wrong type.
    """
    checks.integer("steps", steps, low=1)
    return np.linspace(
        checks.number("start", start, low=0.0, high=1.0),
        checks.number("end", end, low=0.0, high=1.0),
        steps + 1,
    )


def _times(grid: Grid, x0: Event) -> Array:
    """The grid as an array: a floating jax array as it is, numbers in the widest dtype of x0 or float32."""
    if isinstance(grid, jax.Array) and jnp.issubdtype(grid.dtype, jnp.floating):
        return grid
    return jnp.asarray(grid, trees.at_least_float32(x0))


def _check(x0: Event, grid: Grid) -> Event:
    checks.floating("x0", x0)
    shape = np.shape(grid)
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"grid: expected at least two times in one dimension, got shape {shape}")
    return jax.tree.map(jnp.asarray, x0)


def _fold(key: Key | None, index: Array) -> Key | None:
    # Keys split beforehand and scanned over trip jax's check for key reuse under vmap.
    return None if key is None else jax.random.fold_in(key, index)


def _indices(times: Array) -> Array:
    return jnp.arange(times.shape[0] - 1, dtype=jnp.uint32)


def jumps_path(bound: BoundFlowMap, x0: Event, grid: Grid, cond: Cond = None, *, key: Key | None = None) -> Event:
    """All states x_0, X_{t_0,t_1}(x_0), X_{t_1,t_2}(...), ... of one sample.

    Args:
      bound: the flow map with its parameters.
      x0: the state at grid[0], a pytree of floating-point arrays.
      grid: the times, ``[K + 1]``, every jump within ``bound.domain``; ascending generates.
      cond: conditioning of the sample.
      key: passed on to the network, one per jump (dropout and the like); None for none.

    Returns:
      Shaped like x0 with a leading axis K + 1.

    Raises:
      ValueError: for a grid with a jump outside the domain (a traced grid cannot be looked at).
      TypeError: for x0 that is not floating-point.
    """
    x0 = _check(x0, grid)
    bound.domain.check_grid(grid)
    times = _times(grid, x0)

    def jump(x: Event, leg: tuple[Array, Array, Array]) -> tuple[Event, Event]:
        index, s, t = leg
        x = bound.jump(s, t, x, cond, key=_fold(key, index))
        return x, x

    _, states = jax.lax.scan(jump, x0, (_indices(times), times[:-1], times[1:]))
    return _with_first(x0, states)


def jumps(bound: BoundFlowMap, x0: Event, grid: Grid, cond: Cond = None, *, key: Key | None = None) -> Event:
    """The state at grid[-1] after one jump between each two times of the grid, of one sample; shaped like x0.

    Arguments and errors: as ``jumps_path``.
    """
    return jax.tree.map(lambda leaf: leaf[-1], jumps_path(bound, x0, grid, cond, key=key))


class RenoisePlan(NamedTuple):
    """What ``renoise`` does for each time t = grid[1:] of a grid; arrays ``[K]``.

    Attributes:
      target: t+, the time that is jumped to.
      shrink: beta_t/beta_{t+}.
      noise: kappa alpha_t, with the kappa that the path can reach.
    """

    target: Array
    shrink: Array
    noise: Array


def renoise_plan(interpolant: Interpolant, times: Array, kappa: float | Array) -> RenoisePlan:
    """Targets and factors of ``renoise`` for the times t > 0, ``[K]``: alpha/beta is inverted by bisection.

    The ratio falls along a path, and at t = 1 it is alpha_1/beta_1. Where sqrt(1-kappa^2) alpha_t/beta_t lies
    below that (a path that ends with a little noise), t+ = 1 and kappa is lowered to what is left, so that
    the marginal is kept.
    """
    kappa = jnp.asarray(kappa).astype(times.dtype)
    alpha, beta = jax.vmap(interpolant.alpha), jax.vmap(interpolant.beta)
    alpha_t, beta_t = alpha(times), beta(times)
    end = jnp.ones_like(times)
    # The kappa at which t+ = 1 is sqrt(1 - smallest); at t = 1 itself it is zero, also where alpha_1 = 0.
    smallest = jnp.square(alpha(end) * beta_t / (jnp.where(alpha_t > 0, alpha_t, 1) * beta(end)))
    most = jnp.where((alpha_t > 0) & (times < 1), jnp.sqrt(jnp.maximum(1 - smallest, 0)), 0)
    share = jnp.minimum(kappa, most)
    ratio = jnp.sqrt(1 - share * share)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        # Multiplied out: nothing divides by a beta or an alpha that vanishes.
        above = alpha(middle) * beta_t > ratio * alpha_t * beta(middle)
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (times, end))
    target = jnp.where(share < most, 0.5 * (low + high), end)
    target = jnp.where(share > 0, target, times)
    return RenoisePlan(target, beta_t / beta(target), share * alpha_t)


def renoise_path(
    bound: BoundFlowMap,
    interpolant: Interpolant,
    key: Key,
    x0: Event,
    grid: Grid,
    kappa: float | Array,
    cond: Cond = None,
    *,
    base_std: float = 1.0,
    network_key: Key | None = None,
) -> Event:
    r"""Jumps with partial re-noising (the gamma-sampling of CTM, 2310.02279), of one sample.

    From s to the next time t of the grid: jump beyond t, to t+, and go back by adding noise,

        x_t = (beta_t/beta_{t+}) X_{s,t+}(x_s) + kappa alpha_t z
        alpha_{t+}/beta_{t+} = sqrt(1 - kappa^2) alpha_t/beta_t

    which keeps the marginal at t for the exact map of a centred normal base that is independent of the data.
    At kappa = 0 these are ``jumps``; at kappa = 1 every jump goes to t+ = 1 (consistency sampling,
    2303.01469). At t = 1 no noise is added. See ``renoise_plan`` for paths with alpha_1 > 0.

    Args:
      bound: the flow map with its parameters; its domain must hold the jumps from s to t+ (not to t).
      interpolant: the path that the map was made for.
      key: of the noise.
      x0: the state at grid[0].
      grid: strictly ascending times, ``[K + 1]``.
      kappa: the share of noise made new, in [0, 1].
      cond: conditioning of the sample.
      base_std: standard deviation of the base.
      network_key: passed on to the network, one per jump; None for none.

    Returns:
      All states, shaped like x0 with a leading axis K + 1; the first is x0.

    Raises:
      ValueError: for a grid that does not ascend, kappa outside [0, 1], or a jump outside the domain (values
        that are traced cannot be looked at).
      TypeError: for x0 that is not floating-point.
    """
    x0 = _check(x0, grid)
    values, share = checks.concrete(grid), checks.concrete(kappa)
    if values is not None and not (np.diff(values) > 0).all():
        raise ValueError(f"grid: expected strictly ascending times, got {values}")
    checks.scalar("kappa", kappa)
    if share is not None and not 0.0 <= float(share) <= 1.0:
        raise ValueError(f"kappa: expected a share in [0, 1], got {kappa!r}")
    if values is None or share is None:
        times = _times(grid, x0)
        plan = renoise_plan(interpolant, times[1:], kappa)
    else:
        # Computed now even under jit, so that the real jumps can be checked.
        with jax.ensure_compile_time_eval():
            times = _times(grid, x0)
            plan = renoise_plan(interpolant, times[1:], kappa)
        for s, target in zip(np.asarray(times)[:-1], np.asarray(plan.target), strict=True):
            bound.domain.check_grid([s, target])

    def leg(x: Event, inputs: tuple[Array, Array, RenoisePlan]) -> tuple[Event, Event]:
        index, s, (target, shrink, noise) = inputs
        y = bound.jump(s, target, x, cond, key=_fold(network_key, index))
        z = _normal_like(jax.random.fold_in(key, index), y)
        x = trees.combine(shrink, y, noise * base_std, z)
        return x, x

    _, states = jax.lax.scan(leg, x0, (_indices(times), times[:-1], plan))
    return _with_first(x0, states)


def renoise(
    bound: BoundFlowMap,
    interpolant: Interpolant,
    key: Key,
    x0: Event,
    grid: Grid,
    kappa: float | Array,
    cond: Cond = None,
    *,
    base_std: float = 1.0,
    network_key: Key | None = None,
) -> Event:
    """The state at grid[-1] of ``renoise_path``, of one sample; shaped like x0.

    Arguments and errors: as ``renoise_path``.
    """
    states = renoise_path(bound, interpolant, key, x0, grid, kappa, cond, base_std=base_std, network_key=network_key)
    return jax.tree.map(lambda leaf: leaf[-1], states)


def _with_first(x0: Event, states: Event) -> Event:
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), x0, states)


def _normal_like(key: Key, x: Event) -> Event:
    leaves, structure = jax.tree.flatten(x)
    keys = jax.random.split(key, len(leaves))
    noise = [jax.random.normal(keys[k], leaf.shape, leaf.dtype) for k, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, noise)


def sde(
    bound: BoundFlowMap,
    interpolant: Interpolant,
    key: Key,
    x0: Event,
    grid: Grid,
    cond: Cond = None,
    *,
    method: str = "euler",
    diffusion: float | Callable[[Time], Array] = 1.0,
) -> Event:
    """``solvers.sde`` from the map's diagonal, of one sample: the state at grid[-1], shaped like x0.

    Args:
      bound: the flow map with its parameters; only its velocity is used, whatever its domain.
      interpolant: the path, with a standard normal base.
      key: of the noise.
      x0: the state at grid[0].
      grid: strictly ascending times, ``[N]``: as many as the accuracy needs.
      cond: conditioning of the sample.
      method: as in ``solvers.sde``.
      diffusion: as in ``solvers.sde``.

    Returns:
      The state at grid[-1], shaped like x0.

    Raises:
      As ``solvers.sde``.
    """
    simulate = solvers.sde(bound.flow_map.velocity, interpolant, method=method, diffusion=diffusion)
    return simulate(bound.params, key, _times(grid, _check(x0, grid)), x0, cond)


def encode(
    bound: BoundFlowMap,
    x1: Event,
    grid: Grid,
    cond: Cond = None,
    *,
    key: Key | None = None,
    solver: solvers.SolverLike | None = None,
    **choices: Unpack[solvers.Choices],
) -> Event:
    """Data to noise along a descending grid, of one sample.

    A map whose domain goes backward jumps along the grid. Any other is solved: its diagonal is integrated
    from grid[0] to grid[-1] by an adaptive solve, and a UserWarning says so. The inner times of the grid then
    do not matter, the cost is that of the solve, and the diagonal must have been trained (a consistency
    model's may not be).

    Args:
      bound: the flow map with its parameters.
      x1: the state at grid[0].
      grid: strictly descending times, ``[K + 1]``.
      cond: conditioning of the sample.
      key: passed on to the network; None for none.
      solver, **choices: of the solve, as in ``solvers.solve``.

    Returns:
      The state at grid[-1], shaped like x1.

    Raises:
      ValueError: for a grid that does not descend, or a jump outside the domain of a map that goes backward.
      TypeError: for x1 that is not floating-point.
      RuntimeError: at an un-jitted call whose solve needs more than ``max_steps``.
    """
    checks.floating("x1", x1)
    x1 = _check(x1, grid)
    values = checks.concrete(grid)
    if values is not None and not (np.diff(values) < 0).all():
        raise ValueError(f"grid: expected strictly descending times, got {values}")
    if bound.domain.backward:
        return jumps(bound, x1, grid, cond, key=key)
    warnings.warn(
        f"encode: the map's domain, {bound.domain.name}, has no backward direction: its diagonal is solved",
        UserWarning,
        stacklevel=2,
    )
    solved = solvers.solve(bound.flow_map.velocity, solver, **choices)
    times = _times(grid, x1)
    return solved.bind(bound.params).jump(times[0], times[-1], x1, cond, key=key)


def _jumps(interpolant: Interpolant) -> Sampler:
    return lambda bound, key, x0, grid, cond=None: jumps(bound, x0, grid, cond)


def _renoise(kappa: float) -> Callable[[Interpolant], Sampler]:
    def maker(interpolant: Interpolant) -> Sampler:
        return lambda bound, key, x0, grid, cond=None: renoise(bound, interpolant, key, x0, grid, kappa, cond)

    return maker


def _sde(interpolant: Interpolant) -> Sampler:
    return lambda bound, key, x0, grid, cond=None: sde(bound, interpolant, key, x0, grid, cond)


# name -> maker: (interpolant) -> (bound, key, x0, grid, cond=None) -> x at grid[-1]
SAMPLERS: dict[str, Callable[[Interpolant], Sampler]] = {
    "jumps": _jumps,
    "renoise": _renoise(0.5),
    "consistency": _renoise(1.0),
    "sde": _sde,
}
