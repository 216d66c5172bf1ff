r"""Parameterizations: how a flow map is computed from a network's output.

.. math::
    X_{s,t}(x) &= A(s,t)\, x + B(s,t)\, \mathrm{net}(s, t, x) \\
    v_{s,t}(x) &= a(s,t)\, x + c(s,t)\, \mathrm{net}(s, t, x), \qquad a = \frac{A - 1}{t - s}, \quad c = \frac{B}{t - s}

A(s,s) = 1 and B(s,s) = 0, so X_{s,s} is the identity by construction. a and c are finite at t = s: interpolants provide
divided differences in closed form, and the code never divides by t - s. ``flow_map`` makes a FlowMap from a network, and
``from_velocity`` makes one that starts from a velocity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jflow import bases, checks, interpolants, parts, trees, types
from jflow.interpolants import Interpolant
from jflow.types import FORWARD, Array, Cond, Domain, Event, FlowMap, Key, Params, Time, Velocity

NetworkApply = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Parameterization:
    """The coefficients a and c of the mean velocity v = a(s,t) x + c(s,t) net.

    Attributes:
      name: the key in ``PARAMETERIZATIONS``.
      coefficients: ``(s, t) -> (a, c)``, scalars.
      singular: the source times at which the form is singular, and where it is therefore clamped.
    """

    name: str
    coefficients: Callable[[Time, Time], tuple[Array, Array]]
    singular: tuple[float, ...] = ()

    def jump_coefficients(self, s: Time, t: Time) -> tuple[Array, Array]:
        """Returns A = 1 + (t - s) a and B = (t - s) c, the coefficients of X_{s,t}(x) = A x + B net.

        Example:
          >>> from jflow import parameterizations
          >>> a, b = parameterizations.mean_velocity_form().jump_coefficients(0.25, 0.75)
          >>> float(a), float(b)
          (1.0, 0.5)
        """
        a, c = self.coefficients(s, t)
        gap = jnp.asarray(t) - jnp.asarray(s)
        return 1.0 + gap * a, gap * c


def mean_velocity_form(interpolant: Interpolant | None = None) -> Parameterization:
    """The v-formulation: the network predicts the mean velocity v_{s,t}(x) (2505.13447, 2505.18825).

    The coefficients are A = 1 and B = t - s. They do not depend on the interpolant.

    Raises:
      TypeError: if ``interpolant`` is neither None nor an Interpolant.
    """
    if interpolant is not None:
        interpolants.check(interpolant)

    def coefficients(s: Time, t: Time) -> tuple[Array, Array]:
        gap = jnp.asarray(t) - jnp.asarray(s)
        return jnp.zeros_like(gap), jnp.ones_like(gap)

    return Parameterization("v", coefficients)


def data_form(interpolant: Interpolant, clamp: float = 0.05) -> Parameterization:
    r"""The x-formulation: the network predicts the data (DDIM, 2010.02502).

    .. math:: A = \frac{\alpha_t}{\alpha_s}, \qquad B = \beta_t - \frac{\alpha_t \beta_s}{\alpha_s}

    On the diagonal the network is the denoiser. The form is singular where alpha_s = 0 (s = 1 on the linear path), so
    max(alpha_s, clamp) replaces alpha_s in the denominators of a and c. X_{s,s} = id still holds, and the value for the exact
    network is finite. Where alpha_s < clamp, the same network gives a different map than without the clamp.

    On the linear path, pixel MeanFlow (2601.22158) clamps differently: v = (net - x)/max(1 - s, 0.05), regressed on the
    velocity of the pair clamped in the same way. The two forms agree where 1 - s is at least both clamps.

    Raises:
      ValueError: if the clamp is outside (0, 1].
      TypeError: if the clamp is not a number, or ``interpolant`` is not an Interpolant.

    Example:
      >>> from jflow import interpolants, parameterizations
      >>> form = parameterizations.data_form(interpolants.linear())
      >>> a, b = form.jump_coefficients(0.5, 1.0)
      >>> round(float(a), 4), round(float(b), 4)
      (0.0, 1.0)
    """
    interpolants.check(interpolant)
    checks.number("clamp", clamp, low=0.0, high=1.0, open_low=True)

    def coefficients(s: Time, t: Time) -> tuple[Array, Array]:
        alpha_dd, beta_dd = interpolant.alpha_dd(s, t), interpolant.beta_dd(s, t)
        a = alpha_dd / jnp.maximum(interpolant.alpha(s), clamp)
        return a, beta_dd - a * interpolant.beta(s)

    return Parameterization("x", coefficients, singular=(1.0,))


def noise_form(interpolant: Interpolant, clamp: float = 0.05) -> Parameterization:
    r"""The noise form: the network predicts the base point.

    .. math:: A = \frac{\beta_t}{\beta_s}, \qquad B = \alpha_t - \frac{\beta_t \alpha_s}{\beta_s}

    The form is singular where beta_s = 0 (s = 0 on the linear path), so max(beta_s, clamp) replaces beta_s in the
    denominators of a and c, as in ``data_form``.

    Raises:
      ValueError: if the clamp is outside (0, 1].
      TypeError: if the clamp is not a number, or ``interpolant`` is not an Interpolant.
    """
    interpolants.check(interpolant)
    checks.number("clamp", clamp, low=0.0, high=1.0, open_low=True)

    def coefficients(s: Time, t: Time) -> tuple[Array, Array]:
        alpha_dd, beta_dd = interpolant.alpha_dd(s, t), interpolant.beta_dd(s, t)
        a = beta_dd / jnp.maximum(interpolant.beta(s), clamp)
        return a, alpha_dd - a * interpolant.alpha(s)

    return Parameterization("noise", coefficients, singular=(0.0,))


def gaussian_form(interpolant: Interpolant, base: bases.Base = bases.STANDARD_NORMAL) -> Parameterization:
    r"""The Gaussian form: the network predicts v minus the mean velocity for data ~ N(0, I).

    .. math:: A = \frac{\sigma_t}{\sigma_s}, \qquad B = t - s, \qquad \sigma_t^2 = \alpha_t^2\, \mathrm{std}^2 + \beta_t^2

    If the data has mean zero and identity covariance, the linear part is the exact map of the Gaussian with the same moments,
    and the network learns the rest. This is the preconditioning of EDM (2206.00364) for two times. sigma is never zero.

    Args:
      interpolant: the path.
      base: a ``bases.Normal`` with mean 0, whose std is a number.

    Raises:
      ValueError: if the base is not such a Normal.
      TypeError: if ``interpolant`` is not an Interpolant, or ``base`` is not a base.
    """
    interpolants.check(interpolant)
    normal = bases.gaussian(base, "gaussian_form")
    if not isinstance(normal.std, (int, float)) or not isinstance(normal.mean, (int, float)) or normal.mean != 0:
        raise ValueError(f"base: gaussian_form expects a Normal with mean 0 and a number for its std, got {normal!r}")
    variance = float(normal.std) ** 2

    def coefficients(s: Time, t: Time) -> tuple[Array, Array]:
        a_s, a_t, b_s, b_t = interpolant.alpha(s), interpolant.alpha(t), interpolant.beta(s), interpolant.beta(t)
        sigma_s, sigma_t = jnp.sqrt(variance * a_s**2 + b_s**2), jnp.sqrt(variance * a_t**2 + b_t**2)
        variance_dd = variance * interpolant.alpha_dd(s, t) * (a_s + a_t) + interpolant.beta_dd(s, t) * (b_s + b_t)
        return variance_dd / ((sigma_s + sigma_t) * sigma_s), jnp.ones_like(sigma_s)

    return Parameterization("gaussian", coefficients)


def trigonometric_form(interpolant: Interpolant) -> Parameterization:
    r"""The trigonometric form, on the trigonometric path (2410.11081).

    .. math:: A = \cos\left( \tfrac{\pi}{2} (t-s) \right), \qquad B = \sin\left( \tfrac{\pi}{2} (t-s) \right)

    The network predicts -F of that paper, for data of unit scale. The velocity is (pi/2) net.

    Raises:
      ValueError: if the path is not the trigonometric one.
      TypeError: if ``interpolant`` is not an Interpolant.
    """
    interpolants.check(interpolant)
    if interpolant.name != "trigonometric":
        raise ValueError(f"interpolant: the trigonometric form needs the trigonometric path, got {interpolant.name!r}")
    half = 0.5 * jnp.pi

    def coefficients(s: Time, t: Time) -> tuple[Array, Array]:
        gap = jnp.asarray(t) - jnp.asarray(s)
        # cos h - 1 = -2 sin^2(h/2), with h = pi gap/2 and jnp.sinc(z) = sin(pi z)/(pi z).
        a = -half * jnp.sin(0.5 * half * gap) * jnp.sinc(0.25 * gap)
        return a, half * jnp.sinc(0.5 * gap)

    return Parameterization("trigonometric", coefficients)


PARAMETERIZATIONS: dict[str, Callable[..., Parameterization]] = {
    "v": mean_velocity_form,
    "x": data_form,
    "noise": noise_form,
    "gaussian": gaussian_form,
    "trigonometric": trigonometric_form,
}


def flow_map(
    apply: NetworkApply, parameterization: Parameterization, domain: Domain = FORWARD, null: Cond = None
) -> FlowMap:
    r"""Makes a FlowMap from a network and a parameterization.

    .. math:: v_{s,t}(x) = a(s,t)\, x + c(s,t)\, \mathrm{net}(s, t, x)

    Args:
      apply: the network, ``(params, s, t, x, cond=None, *, key=None) -> net``, for one sample; its output is shaped like x
        (see ``jflow.nets``) and is cast to the dtypes of x, leaf by leaf.
      parameterization: the meaning of the network's output.
      domain: the pairs of times on which the map will be trained.
      null: the null condition of one sample (``FlowMap.null``); by default that of the network: ``apply.null``, which the
        wrappers of ``jflow.nets`` set to the ``null_label`` of the module.

    Returns:
      The FlowMap. Its params are the network's.

    Raises:
      ValueError: when called, if a time is not a scalar, or the network's output is not shaped like x.
      TypeError: if ``apply`` is not a function of these arguments, or ``parameterization`` is not a Parameterization; when
        called, if x or the output is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import flow_map, interpolants, parameterizations
      >>> def net(params, s, t, x, cond=None, *, key=None):
      ...     return params * jnp.ones_like(x)
      >>> form = parameterizations.mean_velocity_form(interpolants.linear())
      >>> print(flow_map(net, form).jump(jnp.float32(2.0), 0.0, 0.5, jnp.zeros(2, jnp.float32)))
      [1. 1.]
    """
    _check_network(apply)
    if not isinstance(parameterization, Parameterization):
        kind = "a function that was not called" if callable(parameterization) else repr(parameterization)
        raise TypeError(
            f"parameterization: expected a Parameterization, as parameterizations.mean_velocity_form(), got {kind}"
        )

    def mean_velocity(
        params: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None
    ) -> Event:
        checks.scalar("s", s)
        checks.scalar("t", t)
        checks.floating("x", x)
        output = checks.output("network output", apply(params, s, t, x, cond, key=key), x)
        if parameterization.name == "v":
            return output
        a, c = parameterization.coefficients(s, t)
        return trees.combine(a, x, c, output)

    null = getattr(apply, "null", None) if null is None else null
    return FlowMap(mean_velocity, domain, form=parameterization.name, null=null)


def _check_network(apply: NetworkApply) -> None:
    signature = "(params, s, t, x, cond=None, *, key=None)"
    if isinstance(apply, (Parameterization, FlowMap)) or not callable(apply):
        raise TypeError(f"apply: expected a network {signature}, got {type(apply).__name__}")
    checks.accepts("apply", apply, f"{signature}, of two times", 5)


class Started(NamedTuple):
    """The parameters of a map made by ``from_velocity``.

    Attributes:
      velocity: the parameters of the velocity b.
      correction: the parameters of the network that learns the remainder.
    """

    velocity: Params
    correction: Params


def from_velocity(
    velocity: Velocity | FlowMap, apply: NetworkApply, *, frozen: bool = False, domain: Domain = FORWARD
) -> FlowMap:
    r"""Makes a FlowMap that starts from a velocity. Its diagonal is exactly this velocity, before and after training.

    .. math:: v_{s,t}(x) = b_s(x) + (t - s)\, \mathrm{net}(s, t, x), \qquad v_{t,t} = b_t

    The velocity is evaluated at s, because x is a point at time s. By Taylor's formula, the network's target is then finite:

    .. math:: \mathrm{net}(s, t, x) \to \tfrac12 \left( \partial_s b_s + \nabla b_s\, b_s \right)(x) \quad \text{as } t \to s.

    With an output layer that starts at zero (that of ``nets.MLP``), the map starts as one Euler step of b. If b is already
    trained, the objective needs few diagonal rows, or none if b is frozen.

    Cost: one pass of each network; on the diagonal, only one pass of the velocity. Only the network depends on t, so
    Lagrangian methods are the cheapest here. For a map of one pass in total, ``nets.MLP.decoupled`` starts from the weights
    of a velocity network.

    Args:
      velocity: b, a Velocity or a FlowMap, whose velocity v_{t,t} is used.
      apply: the network, ``(params, s, t, x, cond=None, *, key=None) -> net``, for one sample; its output is shaped like x
        (see ``jflow.nets``).
      frozen: whether to stop gradients to the velocity's parameters. An optimizer's weight decay must be masked as well.
      domain: the pairs of times on which the map will be trained.

    Returns:
      The FlowMap. Its params are ``Started(velocity, correction)``. Both networks get the same condition and key.

    Raises:
      TypeError: if ``velocity`` or ``apply`` does not have its signature; when called, if params is not a ``Started``, or x
        or an output is not floating-point.
      ValueError: when called, if a time is not a scalar, or an output is not shaped like x.
    """
    b = types.as_velocity("velocity", velocity)
    _check_network(apply)

    def start(weights: Params, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
        checks.scalar("t", t)
        checks.floating("x", x)
        return b(jax.lax.stop_gradient(weights) if frozen else weights, t, x, cond, key=key)

    diagonal, network = parts.on_part(Started, "velocity", start), parts.on_part(Started, "correction", apply)

    def mean_velocity(
        params: Started, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None
    ) -> Event:
        checks.scalar("s", s)
        checks.scalar("t", t)
        at_source = diagonal(params, s, x, cond, key=key)
        output = checks.output("network output", network(params, s, t, x, cond, key=key), x)
        return trees.axpy(jnp.asarray(t) - jnp.asarray(s), output, at_source)

    null = getattr(velocity, "null", None)
    null = getattr(apply, "null", None) if null is None else null
    return FlowMap(mean_velocity, domain, velocity_override=diagonal, null=null)
