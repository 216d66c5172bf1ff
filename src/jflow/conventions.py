r"""Converters for networks that follow the signs and time direction of other papers.

The converters::

    theirs                                          to ours
    MeanFlow, improved and pixel MeanFlow, alpha-Flow (source t', target r')   s = 1 - t', t = 1 - r', v = -u
    terminal velocity matching, Align Your Flow, IMM  (source t', target s')   s = 1 - t', t = 1 - s', v = -u
    sCM: x_tau = cos(tau) data + sin(tau) noise       trigonometric path, t = 1 - 2 tau/pi, b = -(pi/2) dx/dtau
    EDM, CTM: x_sigma = data + sigma noise            alpha/beta = sigma, after rescaling x by 1/beta

Boffi et al., shortcut models and the flow_matching package already run from noise at 0 to data at 1.

What their functions return is cast to the dtypes of x, leaf by leaf. When called, the converted functions raise ValueError
for an output that is not shaped like x, and TypeError for one that is not floating-point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jflow import checks, trees
from jflow.interpolants import Interpolant, convert, trigonometric
from jflow.parameterizations import flow_map, trigonometric_form
from jflow.types import FORWARD, TO_DATA, Cond, Domain, Event, FlowMap, Key, Params, Time, Velocity


def from_reversed_time(mean_velocity: Callable[..., Event], domain: Domain = FORWARD) -> FlowMap:
    """Converts ``u(params, source, target, x, cond, *, key)``, whose time is 0 at the data and 1 at the noise, to a FlowMap.

    v_{s,t}(x) = -u(1 - s, 1 - t, x). (source, target) is MeanFlow's (t', r') and terminal velocity matching's (t', s').
    ``domain`` is in our times.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import conventions
      >>> def u(params, r, t, z, *args, **kwargs):  # MeanFlow's: time 0 is the data
      ...     return jnp.ones_like(z)
      >>> print(conventions.from_reversed_time(u).jump(None, 0.0, 1.0, jnp.zeros(2, jnp.float32)))
      [-1. -1.]
    """

    def ours(params: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        theirs = mean_velocity(params, 1.0 - jnp.asarray(s), 1.0 - jnp.asarray(t), x, cond, key=key)
        return trees.scale(-1.0, checks.output("mean_velocity's output", theirs, x))

    return FlowMap(ours, domain)


def velocity_from_reversed_time(velocity: Callable[..., Event]) -> Velocity:
    """Converts ``u(params, t', x, cond, *, key)`` with t' = 0 at the data to a Velocity: b_t(x) = -u(1 - t, x).

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import conventions
      >>> ours = conventions.velocity_from_reversed_time(lambda params, t, x, *args, **kwargs: t * x)
      >>> print(ours(None, 0.25, jnp.ones(2, jnp.float32)))
      [-0.75 -0.75]
    """

    def ours(params: Params, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        theirs = velocity(params, 1.0 - jnp.asarray(t), x, cond, key=key)
        return trees.scale(-1.0, checks.output("velocity's output", theirs, x))

    return ours


def from_scm(network: Callable[..., Event]) -> FlowMap:
    """Converts sCM's ``F(params, tau, x, cond, *, key)`` for data of unit scale, tau = pi (1 - t)/2 (2410.11081), to a FlowMap.

    X_{s,1}(x) = cos(tau) x - sin(tau) F and b_t = -(pi/2) F, on the trigonometric path; its domain is t = 1.
    """

    def apply(params: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Any:
        del t
        tau = 0.5 * jnp.pi * (1.0 - jnp.asarray(s))
        return trees.scale(-1.0, checks.output("network output", network(params, tau, x, cond, key=key), x))

    return flow_map(apply, trigonometric_form(trigonometric()), TO_DATA)


def velocity_from_edm(denoiser: Callable[..., Event], interpolant: Interpolant) -> Velocity:
    """Converts EDM's denoiser ``D(params, sigma, x, cond, *, key)`` to a Velocity on any of our paths (2206.00364).

    With sigma = alpha_t/beta_t, D(x/beta_t, sigma) predicts the data. If beta_t = 0 there is no finite sigma; therefore
    beta_t is clamped to at least 1e-6.
    """

    def ours(params: Params, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        beta = jnp.maximum(interpolant.beta(t), 1e-6)
        data = denoiser(params, interpolant.alpha(t) / beta, trees.scale(1.0 / beta, x), cond, key=key)
        return convert(interpolant, t, x, checks.output("denoiser's output", data, x), "data", "velocity")

    return ours
