r"""Maximum likelihood of a continuous normalising flow, through a solve and its adjoint: the reference without bias.

The loss of one sample::

    loss(x1) = -log rho_1(x1) + kinetic int |b_t(x_t)|^2 dt + jacobian int |z' grad b_t(x_t)|^2 dt,    x_1 = x1

with log rho_1(x1) = log rho_0(x_0) - int div b_t(x_t) dt (1806.07366; Hutchinson's estimate of the divergence 1810.01367),
and the two regularisers of 2002.02798, which keep the paths short and straight, so that a solve takes few steps. All
integrals run from t = 0 to 1 along one path, and are entries of the one state (x, log rho, kinetic, jacobian) that is solved
back from t = 1. z has independent entries of mean 0 and variance 1, drawn once per sample: ``E|z'J|^2 = |J|_F^2``, the sum of
the squares of the Jacobian's entries, and so is ``E|Jz|^2``, which is what is computed, forward-mode as all here.

The gradient is that of the solve ("recursive": of its very steps, with checkpoints, the default; "direct": the same with all
steps in memory) or that of the adjoint's ODE solved back beside the state ("backsolve", 1806.07366: constant memory, and the
error of a solve of its own).
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
      kinetic: ``int |b|^2 dt``, a scalar, or None where it is not asked for.
      jacobian: ``int |Jz|^2 dt``, a scalar, or None where it is not asked for.
    """

    state: WithLogDensity
    kinetic: Array | None
    jacobian: Array | None


@dataclasses.dataclass(frozen=True)
class MaximumLikelihood:
    """The objective of a flow's likelihood, made by ``maximum_likelihood``; it is called like every other objective.

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
          params: the velocity's.
          key: a PRNG key, split over the samples.
          batch: data x1, ``[B, ...]``, floating point, and cond; x0 is not used.
          context: not used.

        Returns:
          (loss [B], aux). Its metrics: "likelihood/raw", the mean of -log rho_1 in nats; "likelihood/loss", with the
          regularisers; "likelihood/kinetic" and "likelihood/jacobian", their means without weight, where they have one;
          "likelihood/nfe", the mean number of evaluations of the velocity, where it is known (``solvers.SolveStats``);
          "likelihood/steps", the most steps of a sample; "likelihood/failed", the number of samples whose solve did not
          reach the base or whose loss is not finite.

        Raises:
          ValueError, TypeError: while tracing, for data that is not floating-point, leaves of different lengths, or a
            velocity that is not shaped like x.
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
        # Solved back, an integral from 0 to 1 comes with the other sign.
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
    """-log rho_1(x1) in nats of the flow of a velocity, with the regularisers above; of a FlowMap, pass its ``velocity``.

    The loss is unbiased with an estimated divergence, whose probes are fixed within a solve. With few fixed steps, training
    exploits the error of the solve, and the loss falls below the entropy, which no density can do (four steps of Tsit5 in the
    plane: -119 nats, where the entropy was 1.34): prefer tolerances.

    An evaluation costs 1 + d passes with the exact divergence of an event of d entries, 1 + m with m probes, and 2 more for
    ``jacobian``.

    Args:
      velocity: ``(params, t, x, cond=None, *, key=None) -> b_t(x)`` of one sample.
      divergence: ``exact_divergence()`` by default; or ``hutchinson`` or ``hutch_pp``.
      base: the law of x0.
      kinetic: weight of ``int |b|^2 dt``, at least 0; at 0 it is not computed.
      jacobian: weight of ``int |Jz|^2 dt``, at least 0; at 0 it is not computed.
      solver, choices: as in ``solvers.solve``, with ``max_steps`` 256 and ``adjoint`` "recursive" unless they or
        ``options`` are given; the adjoint must have a reverse mode. Tolerances are on all entries of the state together.

    Returns:
      The objective.

    Raises:
      ValueError, TypeError: as ``solvers.solve``, and for weights that are negative, not finite, or not numbers.
      TypeError: for a base that is not one.
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
            # ``MaximumLikelihood`` has a key for every sample.
            assert probe is not None
            flat, cut = ravel_pytree(along.state.x)
            z = cut(jax.random.rademacher(probe, flat.shape, flat.dtype))
            jz = autodiff.jvp(lambda x: velocity(params, t, x, cond, key=model), (along.state.x,), (z,))[1]
            steep = trees.sq_norm(jz)
        return Along(state, speed, steep)

    solve = solvers.solve_counted(rates, options=options)
    return MaximumLikelihood(solve, base, kinetic, jacobian)
