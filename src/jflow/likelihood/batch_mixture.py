r"""The density of a batch from a sampler that adds noise between its jumps: a mixture with one component per sample.

The density of the last state of ``samplers.renoise`` is an integral over all earlier states. For N samples drawn together, the
states at the time t of the last jump are

.. math::

    x_n = c_n + \sigma z_n, \qquad z_n \sim N(0, I),

where :math:`c_n` is the ``Info.centre`` of ``samplers.Renoise`` (the step without its noise), and :math:`\sigma` its
``Info.noise``. Given the centres, the states are one draw from each of the N components of the mixture

.. math::

    m(x) = \frac{1}{N} \sum_n N(x; c_n, \sigma^2).

The last jump transports m like any other base. If that jump does not fold (otherwise see ``jflow.likelihood.importance`` on
the sign), the density q of its images is

.. math::

    \log q(X_{t,1}(x)) = \log m(x) - \log|\det \nabla X_{t,1}(x)|.

The importance weights target/q are unbiased:

.. math::

    \mathbb{E}\Big[ \frac{1}{N} \sum_n \frac{\text{target}(x_n)}{q(x_n)} f(x_n) \Big] = \int \text{target}(x)\, f(x)\, dx,

where :math:`x_n` are the final samples. This is importance sampling from several proposals with the balance heuristic. With
one sample per proposal, the variance is below that of independent samples, so the standard errors of
``jflow.likelihood.importance`` are too large here.

The mean of q over batches is the density of the sampler. By Jensen's inequality KL(q | target), KL(target | q) and the mean
of -log q over data are therefore, in expectation, upper bounds on those of the sampler. The bounds become tighter as N grows,
but slowly if sigma is small compared with the distances between the samples, as in many dimensions.
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
    r"""A base that is a mixture of N normal laws with independent entries.

    .. math::

        m(x) = \frac{1}{N} \sum_n N(x; c_n, \text{std}^2)

    A log-density or a score costs N distances.

    Attributes:
      centres: c_n, an event with a leading axis N.
      std: a number, or an event of numbers or arrays, as of ``bases.Normal``.
    """

    centres: Event
    std: Event

    @property
    def name(self) -> str:
        """The name in error messages."""
        return "batch mixture"

    def sample(self, key: Key, like: Event, shape: tuple[int, ...] = ()) -> Event:
        """Draws independent points, each from a random component. See ``bases.Base.sample``."""
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
    """The states before the last jump, and their law given the centres of the batch.

    Attributes:
      states: ``[N, ...]``, at time grid[-2].
      base: their law, which is a base for the last jump.
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
    """The states of a batch of ``samplers.renoise`` before the last jump, and their law as a base for that jump.

    For example::

        before = renoised(bound, x0, grid, keys=keys, interpolant=path)
        pushed = vmap(lambda x: push(bound, x, grid[-2:], base=before.base))(before.states)
        at_data = vmap(lambda x: log_density(bound, x, grid[-2:], base=before.base))(data)

    The samples are those of ``samplers.renoise`` with the same keys, for a network without a key. Each jump costs one call of
    the map. Evaluate the second and third line in blocks, because a block of M points needs N M distances.

    Args:
      bound: the flow map with its parameters.
      x0: states at grid[0], ``[N, ...]``.
      grid: strictly ascending concrete times, ``[K + 1]``, K at least 2, that end at 1.
      cond: conditioning, the same for all samples.
      keys: one key per sample, ``[N]``.
      interpolant: the path that the map was made for.
      kappa: the share of the noise that is drawn anew, in (0, 1]; 1 for consistency sampling.
      base: the law at time 0, a ``bases.Normal``.

    Returns:
      Renoised.

    Raises:
      ValueError: as ``samplers.renoise``, and if the grid is traced, has fewer than two jumps or does not end at 1, or kappa
        is 0.
      TypeError: if x0 is not floating-point, or kappa is not a number.
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
