r"""The density of a sampler that adds noise between its jumps, given the batch that ran: a mixture over its samples.

The density of the last state of ``samplers.renoise`` is an integral over all states before it. But of N samples drawn
together, the states before the last jump, at time t,

    x_n = c_n + sigma z_n,    c_n = (beta_t/beta_{t+}) X_{s,t+}(the state before),    sigma = RenoisePlan.noise

are, given those centres, one draw from each of the N components of

    m(x) = 1/N sum_n N(x; c_n, sigma^2 I)

and the last jump carries m as it would any base: log q(X_{t,1}(x)) = log m(x) - log|det grad X_{t,1}(x)|, where that jump does
not fold (where it does, ``weights`` says what the sign is for). Weights target/q are unbiased, E[ 1/N sum_n target(x_n)/q(x_n)
f(x_n) ] = int target f: importance sampling from several proposals with the balance heuristic. The samples are then one from
each proposal and vary less than independent ones, for which the standard errors of ``weights`` are: those are too large here.

The mean of q over batches is the density of the sampler, so that by Jensen's inequality KL(q | target), KL(target | q) and the
mean of -log q over data are, in expectation, upper bounds of the sampler's own. They tend to it as N grows, slowly where sigma
is small beside the distances between the samples, as in many dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks, samplers, trees
from jflow.interpolants import Interpolant
from jflow.likelihood.ode import Base
from jflow.samplers import Grid
from jflow.types import Array, BoundFlowMap, Cond, Event, Key


class Renoised(NamedTuple):
    """The states before the last jump, and their law given the batch.

    Attributes:
      states: ``[N, ...]``, at time grid[-2].
      base: x -> log m(x) in nats, of one event; its cost is N distances.
    """

    states: Event
    base: Base


def renoised(
    bound: BoundFlowMap,
    interpolant: Interpolant,
    keys: Key,
    x0: Event,
    grid: Grid,
    kappa: float = 1.0,
    cond: Cond = None,
) -> Renoised:
    """The states of a batch of ``samplers.renoise`` before the last jump, as a base of their own for what follows:

        before = renoised(bound, interpolant, keys, x0, grid)
        pushed = vmap(lambda x: push(bound, x, grid[-2:], base=before.base))(before.states)
        at_data = vmap(lambda x: log_density(bound, x, grid[-2:], base=before.base))(data)

    The samples are those of ``renoise`` with the same keys, a base of standard deviation 1 and a network without a key. Map
    the second and third line over blocks: all of them at once hold N times their number of distances.

    Args:
      bound: the flow map with its parameters.
      interpolant: the path that the map was made for.
      keys: one key per sample, ``[N]``.
      x0: states at grid[0], ``[N, ...]``.
      grid: strictly ascending concrete times, ``[K + 1]``, K at least 2, that end at 1.
      kappa: the share of noise made new, in (0, 1]; 1 for consistency sampling.
      cond: conditioning, the same for all samples.

    Returns:
      Renoised.

    Raises:
      ValueError: as ``samplers.renoise_path``, and for a grid that is traced, has less than two jumps or does not end at 1, or
        a kappa of 0; TypeError for x0 that is not floating-point, or a kappa that is no number.
    """
    checks.number("kappa", kappa, low=0.0, high=1.0, open_low=True)
    times = checks.concrete(grid)
    if times is None or np.ndim(times) != 1 or len(times) < 3 or not times[-1] == 1.0:
        raise ValueError(f"grid: expected concrete times of two jumps at least, of which the last is 1, got {grid}")

    def path(key: Key, x: Event) -> Event:
        return samplers.renoise_path(bound, interpolant, key, x, grid[:-1], kappa, cond)

    states = jax.vmap(path)(keys, x0)
    last, before = (jax.tree.map(lambda leaf, k=k: leaf[:, k], states) for k in (-1, -2))
    wide = jnp.asarray(times).astype(trees.at_least_float32(x0))
    plan = jax.tree.map(lambda leaf: leaf[0], samplers.renoise_plan(interpolant, wide[-2:-1], kappa))

    def centre(x: Event) -> Event:
        return trees.scale(plan.shrink, bound.jump(wide[-3], plan.target, x, cond))

    centres = jax.vmap(centre)(before)
    count, size = jax.tree.leaves(x0)[0].shape[0], sum(leaf[0].size for leaf in jax.tree.leaves(x0))
    constant = size * (jnp.log(plan.noise) + float(0.5 * np.log(2.0 * np.pi))) + float(np.log(count))

    def base(x: Event) -> Array:
        squares = jax.vmap(lambda c: trees.sq_norm(trees.axpy(-1.0, c, x)))(centres)
        return jax.nn.logsumexp(-0.5 * squares / plan.noise**2) - constant

    return Renoised(last, base)
