r"""The density of a sampler that adds noise between its jumps, given the batch that ran: a mixture over its samples.

The density of the last state of ``samplers.renoise`` is an integral over all states before it. But of N samples drawn
together, the states before the last jump, at time t::

    x_n = c_n + sigma z_n,    c_n = Info.centre of ``samplers.Renoise`` (the step without its noise),    sigma = Info.noise

are, given those centres, one draw from each of the N components of::

    m(x) = 1/N sum_n N(x; c_n, sigma^2)

and the last jump carries m as it would any base: ``log q(X_{t,1}(x)) = log m(x) - log|det grad X_{t,1}(x)|``, where that jump
does not fold (where it does, ``weights`` says what the sign is for). Weights target/q are unbiased, E[ 1/N sum_n
target(x_n)/q(x_n) f(x_n) ] = int target f: importance sampling from several proposals with the balance heuristic. The samples
are then one from each proposal and vary less than independent ones, for which the standard errors of ``weights`` are: those
are too large here.

The mean of q over batches is the density of the sampler. By Jensen's inequality KL(q | target), KL(target | q) and the mean of
-log q over data are therefore, in expectation, upper bounds of those of the sampler. The bounds tighten as N grows, slowly
where sigma is small compared with the distances between the samples, as in many dimensions.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from jflow import bases, checks, samplers, trees
from jflow.bases import Base
from jflow.interpolants import Interpolant
from jflow.samplers import Grid
from jflow.types import Array, BoundFlowMap, Cond, Event, Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchMixture:
    """The base m(x) = 1/N sum_n N(x; c_n, std^2), independent entries; a log-density or score costs N distances.

    Attributes:
      centres: c_n, an event with a leading axis N.
      std: a number, or an event of numbers or arrays, as of ``bases.Normal``.
    """

    centres: Event
    std: Event

    @property
    def name(self) -> str:
        """Its name in error messages."""
        return "batch mixture"

    def sample(self, key: Key, like: Event, shape: tuple[int, ...] = ()) -> Event:
        """Independent points; each chooses its component. See ``bases.Base.sample``."""
        choice_key, normal_key = jax.random.split(key)
        chosen = jax.random.randint(choice_key, shape, 0, self._count())
        noise = bases.Normal(0.0, self.std).sample(normal_key, like, shape)
        return jax.tree.map(lambda c, z: c[chosen].astype(z.dtype) + z, self.centres, noise)

    def log_density(self, x: Event) -> Array:
        """log m(x) in nats, a scalar."""
        normal = bases.Normal(0.0, self.std)
        each = jax.vmap(lambda centre: normal.log_density(trees.sub(x, centre)))(self.centres)
        return jax.nn.logsumexp(each) - float(np.log(self._count()))

    def score(self, x: Event) -> Event:
        """grad log m(x), shaped like x."""
        return jax.grad(self.log_density)(x)

    def _count(self) -> int:
        return jax.tree.leaves(self.centres)[0].shape[0]


class Renoised(NamedTuple):
    """The states before the last jump, and their law given the batch.

    Attributes:
      states: ``[N, ...]``, at time grid[-2].
      base: their law, for what follows.
    """

    states: Event
    base: BatchMixture


def renoised(
    bound: BoundFlowMap,
    x0: Event,
    grid: Grid,
    cond: Cond = None,
    *,
    keys: Key,
    interpolant: Interpolant,
    kappa: float = 1.0,
    base: Base = bases.STANDARD_NORMAL,
) -> Renoised:
    """The states of a batch of ``samplers.renoise`` before the last jump, as a base of their own for what follows::

        before = renoised(bound, x0, grid, keys=keys, interpolant=path)
        pushed = vmap(lambda x: push(bound, x, grid[-2:], base=before.base))(before.states)
        at_data = vmap(lambda x: log_density(bound, x, grid[-2:], base=before.base))(data)

    The samples are those of ``samplers.renoise`` with the same keys and a network without a key, at one call of the map for
    each jump. Map the second and third line over blocks: all of them at once hold N times their number of distances.

    Args:
      bound: the flow map with its parameters.
      x0: states at grid[0], ``[N, ...]``.
      grid: strictly ascending concrete times, ``[K + 1]``, K at least 2, that end at 1.
      cond: conditioning, the same for all samples.
      keys: one key per sample, ``[N]``.
      interpolant: the path that the map was made for.
      kappa: the share of noise made new, in (0, 1]; 1 for consistency sampling.
      base: the law at time 0, a ``bases.Normal``.

    Returns:
      Renoised.

    Raises:
      ValueError: as ``samplers.renoise``, and for a grid that is traced, has less than two jumps or does not end at 1, or a
        kappa of 0.
      TypeError: for x0 that is not floating-point, or a kappa that is not a number.
    """
    checks.number("kappa", kappa, low=0.0, high=1.0, open_low=True)
    times = checks.concrete(grid)
    if times is None or np.ndim(times) != 1 or len(times) < 3 or not times[-1] == 1.0:
        raise ValueError(f"grid: expected concrete times of two jumps at least, of which the last is 1, got {grid}")
    sampler = samplers.Renoise(bound, interpolant, kappa, base)

    def last(key: Key, x: Event) -> tuple[Event, Event, Event]:
        path, info = samplers.run_path(sampler, key, x, grid[:-1], cond)
        return jax.tree.map(lambda leaf: leaf[-1], (path, info.centre, info.noise))

    states, centres, noise = jax.vmap(last)(keys, x0)
    # The noise depends on the grid alone.
    return Renoised(states, BatchMixture(centres, jax.tree.map(lambda leaf: leaf[0], noise)))
