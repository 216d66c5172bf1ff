"""Samples by jumps with partial re-noising: jump beyond the next time, and add noise to return (2310.02279, 2303.01469)."""

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

# The number of bisection steps on [t, 1] when alpha/beta is inverted; enough for float64.
_HALVINGS = 60


class RenoisePlan(NamedTuple):
    r"""The targets and factors of ``renoise`` for the times of a grid after the first, arrays ``[K]``.

    Attributes:
      target: :math:`t_+`, the target time of the jump.
      shrink: :math:`\beta_t/\beta_{t_+}`.
      noise: :math:`\kappa \alpha_t`, with kappa limited to the values that the path can reach.
      shift: :math:`\alpha_t (1 - \sqrt{1-\kappa^2}) = \alpha_t - \mathrm{shrink}\, \alpha_{t_+}`, the factor of the base's
        mean, which is added back.
    """

    target: Array
    shrink: Array
    noise: Array
    shift: Array


def renoise_plan(interpolant: Interpolant, times: Array, kappa: float | Array) -> RenoisePlan:
    r"""Computes the targets and factors of ``renoise`` for times t > 0, ``[K]``.

    The target :math:`t_+` solves the following equation, by bisection:

    .. math:: \frac{\alpha_{t_+}}{\beta_{t_+}} = \sqrt{1 - \kappa^2}\, \frac{\alpha_t}{\beta_t}

    The ratio alpha/beta decreases along a path, to alpha_1/beta_1 at t = 1. If the right-hand side is below this (on a path
    that ends with a little noise), :math:`t_+ = 1`, and kappa is reduced to the largest value that keeps the marginal.
    """
    interpolants.check(interpolant)
    kappa = jnp.asarray(kappa).astype(times.dtype)
    alpha, beta = jax.vmap(interpolant.alpha), jax.vmap(interpolant.beta)
    alpha_t, beta_t = alpha(times), beta(times)
    end = jnp.ones_like(times)
    # The kappa for which t+ = 1 is sqrt(1 - smallest). At t = 1 it is zero, also if alpha_1 = 0.
    smallest = jnp.square(alpha(end) * beta_t / (jnp.where(alpha_t > 0, alpha_t, 1) * beta(end)))
    most = jnp.where((alpha_t > 0) & (times < 1), jnp.sqrt(jnp.maximum(1 - smallest, 0)), 0)
    share = jnp.minimum(kappa, most)
    ratio = jnp.sqrt(1 - share * share)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        # Compare products instead of ratios, so that no division by a zero alpha or beta occurs.
        above = alpha(middle) * beta_t > ratio * alpha_t * beta(middle)
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (times, end))
    target = jnp.where(share < most, 0.5 * (low + high), end)
    target = jnp.where(share > 0, target, times)
    # 1 - sqrt(1-kappa^2) = kappa^2/(1 + sqrt(1-kappa^2)), without cancellation at a small kappa.
    shift = alpha_t * share * share / (1 + ratio)
    return RenoisePlan(target, beta_t / beta(target), share * alpha_t, shift)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Renoise:
    r"""The sampler of jumps with partial re-noising.

    From s to the next time t, it jumps to a time :math:`t_+` beyond t and adds noise z ~ N(0, I):

    .. math::
        x_t = \frac{\beta_t}{\beta_{t_+}} X_{s,t_+}(x_s) + \alpha_t \left( 1 - \sqrt{1-\kappa^2} \right) m
        + \kappa\, \alpha_t\, \mathrm{std}\, z, \qquad
        \frac{\alpha_{t_+}}{\beta_{t_+}} = \sqrt{1 - \kappa^2}\, \frac{\alpha_t}{\beta_t}.

    For the exact map and a base N(m, diag(std^2)) that is independent of the data, this keeps the marginal at t. With
    kappa = 0, the sampler is ``Jumps``; with kappa = 1, every jump goes to :math:`t_+ = 1` (consistency sampling). At t = 1
    no noise is added. For paths with alpha_1 > 0, see ``renoise_plan``.

    Attributes:
      bound: the flow map with its parameters; its domain must include the jumps from s to :math:`t_+` (not to t).
      interpolant: the path for which the map was made.
      kappa: the share of the noise that is replaced, in [0, 1].
      base: a ``bases.Normal``.
      keyed: whether to pass a key to the network, one per jump. If False, it is called without a key.
    """

    bound: BoundFlowMap
    interpolant: Interpolant = dataclasses.field(metadata={"static": True})
    kappa: float | Array
    base: bases.Base = bases.STANDARD_NORMAL
    keyed: bool = dataclasses.field(default=False, metadata={"static": True})

    def init(self, x0: Event, t: Time, cond: Cond = None) -> State:
        """Returns the state of a sample x0 at time t.

        Raises:
          ValueError: if the base is not a ``bases.Normal``, kappa is outside [0, 1], or t is not a scalar.
          TypeError: if x0 is not floating-point, or an attribute has a wrong type.
        """
        self._check_choices()
        return start(x0, t, cond)

    def step(self, key: Key, state: State, t: Time) -> tuple[State, Info]:
        """Makes one step to a time t > ``state.t`` with one call of the map. ``info.centre`` is the new x without its noise."""
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
        """Checks the options, and that a concrete grid ascends and needs only jumps inside the map's domain.

        Raises:
          ValueError, TypeError: if an option or the grid is not valid.
        """
        self._check_choices()
        times = checks.concrete(grid)
        if times is None:
            return
        if not (np.diff(times) > 0).all():
            raise ValueError(f"grid: expected strictly ascending times, got {times}")
        if checks.concrete(self.kappa) is None:
            return
        # Compute the plan with concrete values even under jit, so that its jumps can be checked.
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
    """Jumps with partial re-noising (``Renoise``) for one sample. Returns the state at grid[-1], shaped like x0.

    Args:
      bound: the flow map with its parameters; its domain must include the jumps from s to t+ (not to t).
      x0: the state at grid[0].
      grid: strictly ascending times, ``[K + 1]``.
      cond: conditioning of the sample.
      key: a PRNG key for the noise, and for the network if ``keyed``.
      interpolant: the path for which the map was made.
      kappa: the share of the noise that is replaced, in [0, 1].
      base: a ``bases.Normal``.
      keyed: whether to pass a key to the network, one per jump.

    Raises:
      ValueError: if the grid does not ascend, kappa is outside [0, 1], a jump is outside the domain, or the base is not a
        ``bases.Normal``. Traced values are not checked.
      TypeError: if ``bound`` is not a BoundFlowMap, ``interpolant`` is not an Interpolant, or x0 is not floating-point.

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
    """Returns all states of ``renoise`` for one sample, shaped like x0 with a leading axis K + 1. The first is x0.

    The arguments and errors are those of ``renoise``.

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
