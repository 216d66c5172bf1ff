r"""Maximum likelihood of a continuous normalising flow, through an ODE solve and its adjoint.

The loss of one sample is

.. math::

    \ell(x_1) = -\log \rho_1(x_1) + \text{kinetic} \int_0^1 |b_t(x_t)|^2\, dt
        + \text{jacobian} \int_0^1 |\nabla b_t(x_t)\, z|^2\, dt

with (1806.07366; 1810.01367 with an estimated divergence)

.. math::

    \log \rho_1(x_1) = \log \rho_0(x_0) - \int_0^1 \nabla \cdot b_t(x_t)\, dt.

The two regularisers (2002.02798) keep the paths short and straight, so that a solve takes few steps. All integrals are taken
along one path. They are entries of the state (x, log rho, kinetic, jacobian), which is solved backward from t = 1. The entries
of z are independent random signs, drawn once per sample, so the mean of :math:`|\nabla b\, z|^2` is the sum of the squares of
the entries of the Jacobian. The paper uses :math:`|z^\top \nabla b|^2`, which has the same mean; the product with z is computed
in forward mode.

The gradient depends on ``adjoint``. "recursive" (the default) differentiates the steps of the solve, with checkpoints; "direct"
does the same with all steps in memory. "backsolve" (1806.07366) solves the adjoint ODE backward together with the state; it
needs constant memory, and has the error of a second solve.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jflow import autodiff, bases, checks, reports, solvers, trees
from jflow.bases import Base
from jflow.likelihood.divergence import Divergence, WithLogDensity, augment
from jflow.likelihood.ode_density import log_base
from jflow.types import Array, Aux, BatchLike, Cond, Context, Event, Key, Params, Time, Velocity, as_batch, move


class Along(NamedTuple):
    """The state of a solve along a path.

    Attributes:
      state: the point and its log-density.
      kinetic: ``int |b|^2 dt``, a scalar, or None if its weight is 0.
      jacobian: ``int |Jz|^2 dt``, a scalar, or None if its weight is 0.
    """

    state: WithLogDensity
    kinetic: Array | None
    jacobian: Array | None


@dataclasses.dataclass(frozen=True)
class MaximumLikelihood:
    """The maximum-likelihood objective, made by ``maximum_likelihood`` and called like every other objective.

    Attributes:
      solve: ``(params, s, t, along, cond, key=) -> (mean velocity, SolveStats)`` of ``Along``.
      base: the law of x0.
      kinetic, jacobian: the weights of the regularisers.
    """

    solve: solvers.CountedSolve
    base: Base
    kinetic: float
    jacobian: float

    def __call__(self, params: Params, key: Key, batch: BatchLike, context: Context | None = None) -> tuple[Array, Aux]:
        """The loss of each sample in nats, and metrics.

        Args:
          params: the parameters of the velocity.
          key: a PRNG key, split over the samples.
          batch: data x1, ``[B, ...]``, floating point, and cond; x0 is not used.
          context: not used.

        Returns:
          (loss [B], aux). The metrics are "likelihood/raw", the mean of -log rho_1 in nats; "likelihood/loss", with the
          regularisers; "likelihood/kinetic" and "likelihood/jacobian", the means of the regularisers without their weights,
          if these are not 0; "likelihood/nfe", the mean number of function evaluations (NFE) of the velocity, if known
          (``solvers.SolveStats``); "likelihood/steps", the largest number of steps of a sample; and "likelihood/failed", the
          number of samples whose solve did not reach the base or whose loss is not finite.

        Raises:
          ValueError: while tracing, if leaves of the batch have different lengths, or the velocity is not shaped like x.
          TypeError: while tracing, if the data are not floating-point.
        """
        del context
        batch = as_batch(batch)
        checks.floating("batch.x1", batch.x1)
        keys = jax.random.split(key, checks.rows("batch", (batch.x1, batch.cond)))
        loss, nll, kinetic, jacobian, stats = jax.vmap(lambda *row: self._one(params, *row))(batch.x1, batch.cond, keys)
        means = {"raw": nll, "loss": loss, "kinetic": kinetic, "jacobian": jacobian, "nfe": stats.nfe}
        found = jax.lax.stop_gradient({name: value for name, value in means.items() if value is not None})
        metrics: dict[str, reports.Report] = {
            f"likelihood/{name}": reports.mean(value.astype(loss.dtype)) for name, value in found.items()
        }
        metrics["likelihood/steps"] = reports.Largest(jnp.max(stats.steps))
        failed = jnp.logical_not(stats.success & jnp.isfinite(loss))
        metrics["likelihood/failed"] = reports.Total(jnp.sum(failed))
        return loss, Aux((), metrics)

    def _one(self, params: Params, x1: Event, cond: Cond, key: Key) -> tuple[Any, ...]:
        zero = jnp.zeros((), trees.at_least_float32(x1))
        start = Along(WithLogDensity(x1, zero), *(zero if weight else None for weight in (self.kinetic, self.jacobian)))
        v, stats = self.solve(params, 1.0, 0.0, start, cond, key=key)
        end = move(start, 1.0, 0.0, v)
        base = log_base(self.base, end.state.x)
        nll = end.state.log_density.astype(base.dtype) - base
        # The backward solve gives the integrals from 1 to 0, so change their sign.
        kinetic, jacobian = jax.tree.map(jnp.negative, (end.kinetic, end.jacobian))
        loss = nll
        for weight, value in ((self.kinetic, kinetic), (self.jacobian, jacobian)):
            loss = loss if value is None else trees.axpy(weight, value, loss)
        return loss, nll, kinetic, jacobian, stats


def maximum_likelihood(
    velocity: Velocity,
    *,
    divergence: Divergence | None = None,
    base: Base = bases.STANDARD_NORMAL,
    kinetic: float = 0.0,
    jacobian: float = 0.0,
    solver: solvers.SolverLike | None = None,
    **choices: Unpack[solvers.Choices],
) -> MaximumLikelihood:
    r"""The maximum-likelihood objective of the flow of a velocity, -log rho_1(x1) in nats, with optional regularisers.

    .. math::

        \ell(x_1) = -\log \rho_1(x_1) + \text{kinetic} \int_0^1 |b_t(x_t)|^2\, dt
            + \text{jacobian} \int_0^1 |\nabla b_t(x_t)\, z|^2\, dt

    For a FlowMap, pass its ``velocity``. The loss is unbiased with an estimated divergence, whose probes are fixed within a
    solve. Prefer tolerances to a few fixed steps, with which training exploits the error of the solve: the loss falls below the
    entropy, which is impossible for a density (four steps of Tsit5 in the plane: -119 nats, where the entropy was 1.34).

    For an event of d entries, an evaluation costs 1 + d passes with the exact divergence or 1 + m with m probes, and 2 more
    with ``jacobian``.

    Args:
      velocity: ``(params, t, x, cond=None, *, key=None) -> b_t(x)`` of one sample.
      divergence: ``exact_divergence()`` by default; or ``hutchinson`` or ``hutch_pp``.
      base: the law of x0.
      kinetic: the weight of ``int |b|^2 dt``, at least 0; at 0 the integral is not computed.
      jacobian: the weight of ``int |Jz|^2 dt``, at least 0; at 0 the integral is not computed.
      solver, choices: as in ``solvers.solve``, with ``max_steps`` 256 and ``adjoint`` "recursive" unless they or
        ``options`` are given. The adjoint must support reverse mode. Tolerances apply to all entries of the state together.

    Returns:
      The objective.

    Raises:
      ValueError: as ``solvers.solve``, and if the adjoint has no reverse mode, or a weight is negative or not finite.
      TypeError: as ``solvers.solve``, and if ``base`` is not a base, or a weight is not a number.
    """
    bases.check(base)
    options = solvers.choose(solver, choices, max_steps=256, adjoint="recursive")
    if not options.has_reverse:
        raise ValueError(f"adjoint: expected one with a reverse mode, as 'recursive', got {options.differentiation!r}")
    checks.number("kinetic", kinetic, low=0.0)
    checks.number("jacobian", jacobian, low=0.0)
    with_density = augment(velocity, divergence)

    def rates(params: Params, t: Time, along: Along, cond: Cond = None, *, key: Key | None = None) -> Along:
        t = jnp.asarray(t).astype(trees.at_least_float32(along.state.x))
        both, probe, model = (None if key is None else jax.random.fold_in(key, i) for i in range(3))
        state = with_density(params, t, along.state, cond, key=both)
        speed = None if along.kinetic is None else trees.sq_norm(state.x)
        steep = None
        if along.jacobian is not None:
            # ``MaximumLikelihood`` passes a key for every sample.
            assert probe is not None
            flat, cut = ravel_pytree(along.state.x)
            z = cut(jax.random.rademacher(probe, flat.shape, flat.dtype))
            jz = autodiff.jvp(lambda x: velocity(params, t, x, cond, key=model), (along.state.x,), (z,))[1]
            steep = trees.sq_norm(jz)
        return Along(state, speed, steep)

    solve = solvers.solve_counted(rates, options=options)
    return MaximumLikelihood(solve, base, kinetic, jacobian)
