r"""Converters for networks that use the signs and the time direction of other papers.

In the following, primed times are those of the papers:

- MeanFlow, improved MeanFlow, pixel MeanFlow, alpha-Flow (source t', target r'): s = 1 - t', t = 1 - r', v = -u
- terminal velocity matching, Align Your Flow, IMM (source t', target s'): s = 1 - t', t = 1 - s', v = -u
- sCM, :math:`x_\tau = \cos\tau \cdot \mathrm{data} + \sin\tau \cdot \mathrm{noise}`: the trigonometric path with
  :math:`t = 1 - 2\tau/\pi` and :math:`b = -\tfrac{\pi}{2}\, dx/d\tau`
- EDM, CTM, :math:`x_\sigma = \mathrm{data} + \sigma \cdot \mathrm{noise}`: :math:`\alpha/\beta = \sigma`, after rescaling x by
  :math:`1/\beta`

Boffi et al., shortcut models and the flow_matching package already run from noise at time 0 to data at time 1.

The outputs of the networks are cast to the dtypes of x, leaf by leaf. When called, the converted functions raise ValueError
if an output is not shaped like x, and TypeError if it is not floating-point.
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
    r"""Converts a mean velocity u whose time is 0 at the data and 1 at the noise to a FlowMap.

    .. math:: v_{s,t}(x) = -u(1 - s, 1 - t, x)

    The signature of u is ``u(params, source, target, x, cond, *, key)``, where (source, target) is (t', r') in MeanFlow and
    (t', s') in terminal velocity matching. ``domain`` is in jflow's times.

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

    return FlowMap(ours, domain, null=getattr(mean_velocity, "null", None))


def velocity_from_reversed_time(velocity: Callable[..., Event]) -> Velocity:
    r"""Converts a velocity u whose time is 0 at the data and 1 at the noise to a Velocity.

    .. math:: b_t(x) = -u(1 - t, x)

    The signature of u is ``u(params, t, x, cond, *, key)``.

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
    r"""Converts the network F of an sCM (2410.11081), for data of unit scale, to a FlowMap to t = 1.

    .. math::
        X_{s,1}(x) &= \cos(\tau)\, x - \sin(\tau)\, F(\tau, x), \qquad \tau = \tfrac{\pi}{2} (1 - s) \\
        b_t(x) &= -\tfrac{\pi}{2}\, F\big( \tfrac{\pi}{2} (1 - t), x \big)

    The path is the trigonometric one. The signature of F is ``F(params, tau, x, cond, *, key)``.
    """

    def apply(params: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Any:
        del t
        tau = 0.5 * jnp.pi * (1.0 - jnp.asarray(s))
        return trees.scale(-1.0, checks.output("network output", network(params, tau, x, cond, key=key), x))

    return flow_map(apply, trigonometric_form(trigonometric()), TO_DATA)


def velocity_from_edm(denoiser: Callable[..., Event], interpolant: Interpolant) -> Velocity:
    r"""Converts a denoiser D of EDM (2206.00364) to a Velocity on any interpolant.

    The expected data is

    .. math:: \mathbb{E}[x_1 \mid I_t = x] = D(x/\beta_t, \sigma), \qquad \sigma = \alpha_t/\beta_t.

    The signature of D is ``D(params, sigma, x, cond, *, key)``. beta_t is clamped to at least 1e-6, because sigma is infinite
    at beta_t = 0.
    """

    def ours(params: Params, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        beta = jnp.maximum(interpolant.beta(t), 1e-6)
        data = denoiser(params, interpolant.alpha(t) / beta, trees.scale(1.0 / beta, x), cond, key=key)
        return convert(interpolant, t, x, checks.output("denoiser's output", data, x), "data", "velocity")

    return ours
