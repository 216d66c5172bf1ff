"""Jumps with partial re-noising: beyond the next time, and back to it by adding noise (2310.02279, 2303.01469)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import bases, checks, interpolants, trees
from jflow.interpolants import Interpolant
from jflow.samplers.steps import Grid, Info, State, check_bound, check_key, next_time, run, run_path, start
from jflow.types import Array, BoundFlowMap, Cond, Event, Key, Time

# Halvings of [t, 1] when a ratio alpha/beta is inverted: enough for float64.
_HALVINGS = 60


class RenoisePlan(NamedTuple):
    """The targets and factors of ``renoise`` for the times of a grid after the first; arrays ``[K]``.

    Attributes:
      target: t+, the time that is jumped to.
      shrink: beta_t/beta_{t+}.
      noise: kappa alpha_t, with the kappa that the path can reach.
      shift: alpha_t (1 - sqrt(1-kappa^2)) = alpha_t - shrink alpha_{t+}, the share of the base's mean that is put back.
    """

    target: Array
    shrink: Array
    noise: Array
    shift: Array


def renoise_plan(interpolant: Interpolant, times: Array, kappa: float | Array) -> RenoisePlan:
    """Targets and factors of ``renoise`` for the times t > 0, ``[K]``: alpha/beta is inverted by bisection.

    The ratio falls along a path, and at t = 1 it is alpha_1/beta_1. Where sqrt(1-kappa^2) alpha_t/beta_t lies
    below that (a path that ends with a little noise), t+ = 1 and kappa is lowered to the largest value that keeps
    the marginal.
    """
    interpolants.check(interpolant)
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
    # 1 - sqrt(1-kappa^2), without cancellation at a small kappa.
    shift = alpha_t * share * share / (1 + ratio)
    return RenoisePlan(target, beta_t / beta(target), share * alpha_t, shift)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Renoise:
    r"""The sampler of jumps with partial re-noising. From s to the next time t: jump beyond t, to t+, and add noise::

        x_t = (beta_t/beta_{t+}) X_{s,t+}(x_s) + alpha_t (1 - sqrt(1-kappa^2)) m + kappa alpha_t std z
        alpha_{t+}/beta_{t+} = sqrt(1 - kappa^2) alpha_t/beta_t

    which keeps the marginal at t for the exact map of a base N(m, diag(std^2)) that is independent of the data. At kappa = 0
    these are ``Jumps``; at kappa = 1 every jump goes to t+ = 1 (consistency sampling). At t = 1 no noise is added. See
    ``renoise_plan`` for paths with alpha_1 > 0.

    Attributes:
      bound: the flow map with its parameters; its domain must hold the jumps from s to t+ (not to t).
      interpolant: the path that the map was made for.
      kappa: the share of noise made new, in [0, 1].
      base: a ``bases.Normal``.
      keyed: whether the network gets a key of its own, one per jump; else it is called without one.
    """

    bound: BoundFlowMap
    interpolant: Interpolant = dataclasses.field(metadata={"static": True})
    kappa: float | Array
    base: bases.Base = bases.STANDARD_NORMAL
    keyed: bool = dataclasses.field(default=False, metadata={"static": True})

    def init(self, x0: Event, t: Time, cond: Cond = None) -> State:
        """The state of a sample x0 at time t.

        Raises:
          ValueError: for a base that is not a ``bases.Normal``, kappa outside [0, 1], or a t that is not a scalar;
            TypeError for x0 that is not floating-point.
        """
        self._check_choices()
        return start(x0, t, cond)

    def step(self, key: Key, state: State, t: Time) -> tuple[State, Info]:
        """To a time t > ``state.t``; one call. ``info.centre`` is the new state without its noise."""
        check_key(key)
        t = next_time(state, t)
        target, shrink, noise, shift = (leaf[0] for leaf in renoise_plan(self.interpolant, t[None], self.kappa))
        key, network_key = jax.random.split(key) if self.keyed else (key, None)
        y = self.bound.jump(state.t, target, state.x, state.cond, key=network_key)
        mean, std = bases.gaussian(self.base, "samplers.renoise").moments(y)
        z = bases.STANDARD_NORMAL.sample(key, y)
        centre = trees.combine(shrink, y, shift, mean)
        x = trees.add(centre, jax.tree.map(lambda s, z: noise.astype(z.dtype) * s * z, std, z))
        deviation = jax.tree.map(lambda s: noise * s.astype(noise.dtype), std)
        return state._replace(x=x, t=t), Info(target, deviation, jnp.int32(1), centre)

    def check(self, grid: Grid) -> None:
        """Refuses a concrete grid that does not ascend or needs a jump outside the map's domain, a wrong kappa or base.

        Raises:
          ValueError, TypeError: naming what came.
        """
        self._check_choices()
        times = checks.concrete(grid)
        if times is None:
            return
        if not (np.diff(times) > 0).all():
            raise ValueError(f"grid: expected strictly ascending times, got {times}")
        if checks.concrete(self.kappa) is None:
            return
        # Computed now even under jit, so that the jumps that will be made can be checked.
        with jax.ensure_compile_time_eval():
            wide = jnp.asarray(times, None if jnp.issubdtype(times.dtype, jnp.floating) else float)
            targets = np.asarray(renoise_plan(self.interpolant, wide[1:], self.kappa).target)
        for s, target in zip(np.asarray(wide)[:-1], targets, strict=True):
            self.bound.domain.check_grid([s, target])

    def _check_choices(self) -> None:
        check_bound(self.bound)
        interpolants.check(self.interpolant)
        bases.gaussian(self.base, "samplers.renoise")
        checks.scalar("kappa", self.kappa)
        share = checks.concrete(self.kappa)
        if share is not None and not 0.0 <= float(share) <= 1.0:
            raise ValueError(f"kappa: expected a share in [0, 1], got {self.kappa!r}")


def renoise(
    bound: BoundFlowMap,
    x0: Event,
    grid: Grid,
    cond: Cond = None,
    *,
    key: Key,
    interpolant: Interpolant,
    kappa: float | Array,
    base: bases.Base = bases.STANDARD_NORMAL,
    keyed: bool = False,
) -> Event:
    """The state at grid[-1] of jumps with partial re-noising, ``Renoise``, of one sample; shaped like x0.

    Args:
      bound: the flow map with its parameters; its domain must hold the jumps from s to t+ (not to t).
      x0: the state at grid[0].
      grid: strictly ascending times, ``[K + 1]``.
      cond: conditioning of the sample.
      key: of the noise.
      interpolant: the path that the map was made for.
      kappa: the share of noise made new, in [0, 1].
      base: a ``bases.Normal``.
      keyed: whether the network gets a key of its own, one per jump.

    Raises:
      ValueError: for a grid that does not ascend, kappa outside [0, 1], a jump outside the domain (traced values are not
        checked), or another base.
      TypeError: for anything but a BoundFlowMap and an Interpolant, or x0 that is not floating-point.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import FlowMap, interpolants, samplers
      >>> bound = FlowMap(lambda params, s, t, x, cond=None, *, key=None: params * jnp.ones_like(x)).bind(jnp.float32(2.0))
      >>> x0 = jnp.zeros(2, jnp.float32)
      >>> samplers.renoise(
      ...     bound, x0, samplers.uniform_grid(2), key=jax.random.key(0), interpolant=interpolants.linear(), kappa=0.5
      ... ).shape
      (2,)
    """
    return run(Renoise(bound, interpolant, kappa, base, keyed), key, x0, grid, cond)


def renoise_path(
    bound: BoundFlowMap,
    x0: Event,
    grid: Grid,
    cond: Cond = None,
    *,
    key: Key,
    interpolant: Interpolant,
    kappa: float | Array,
    base: bases.Base = bases.STANDARD_NORMAL,
    keyed: bool = False,
) -> Event:
    """All states of ``renoise``, of one sample: shaped like x0 with a leading axis K + 1; the first is x0.

    Arguments and errors: as ``renoise``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import FlowMap, interpolants, samplers
      >>> bound = FlowMap(lambda params, s, t, x, cond=None, *, key=None: params * jnp.ones_like(x)).bind(jnp.float32(2.0))
      >>> x0 = jnp.zeros(2, jnp.float32)
      >>> samplers.renoise_path(
      ...     bound, x0, samplers.uniform_grid(2), key=jax.random.key(0), interpolant=interpolants.linear(), kappa=0.5
      ... ).shape
      (3, 2)
    """
    return run_path(Renoise(bound, interpolant, kappa, base, keyed), key, x0, grid, cond)[0]
