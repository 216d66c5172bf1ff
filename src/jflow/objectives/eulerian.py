r"""Methods of the Eulerian identity: the map does not change when its source moves along the flow.

In the formulas R is |.|^2 under the reduction, sg the stop-gradient, x = I_s, I_s' the velocity of the pair (or the estimate
that ``velocity`` chooses), b the teacher's velocity, d/ds v + grad v c the derivative of v along (1, c), and ``derivative``
may be replaced by a finite difference. A tangent term, where there is one, is on the ``diagonal`` share of the batch. Cost
is per off-diagonal sample, in forward passes of the network. ``warmup``, r, multiplies the derivative (1 by default).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jflow import identities, reductions, times
from jflow.identities import Derivative
from jflow.interpolants import Interpolant
from jflow.objectives.compose import Objective, OffDiagonal, Row
from jflow.objectives.curriculum import Schedule, value_at
from jflow.objectives.method import Method
from jflow.types import TO_DATA, Event, FlowMap


def _velocity(row: Row, which: str) -> Event:
    return row.conditional if which == "conditional" else row.leg(which).velocity(row.s, row.x)


def _eulerian(
    velocity: str, stop: str, derivative: Derivative, *, along: str | None = None, warmup: Schedule | None = None
) -> OffDiagonal:
    def residual(row: Row) -> identities.Residual:
        return identities.eulerian(
            row.own.v,
            row.s,
            row.t,
            row.x,
            _velocity(row, velocity),
            tangent_velocity=None if along is None else _velocity(row, along),
            stop=stop,
            derivative=derivative if warmup is None else identities.scaled(derivative, value_at(warmup, row.step)),
        )

    return residual


def esd(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    warmup: Schedule | None = None,
    derivative: Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """R( v_{s,t} - (t-s) d/ds v_{s,t} - sg[ v_{s,s} + (t-s) grad v_{s,t} v_{s,s} ] ) + tangent: Eulerian self-distillation
    (2505.18825).

    Cost: 8 passes (value and two derivatives 3, back 4, the diagonal 1).
    """
    residual = _eulerian("own", "spatial", derivative, warmup=warmup)
    return Objective("esd", flow_map, interpolant, residual, "eulerian", **choices)


def emd(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    warmup: Schedule | None = None,
    derivative: Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """R( d/ds X_{s,t} + grad X_{s,t} b_s ): Eulerian map distillation (2406.07507); nothing is stopped.

    Cost: 7 passes (the teacher 1, derivative with value 2, back 4).
    """
    residual = _eulerian("teacher", "none", derivative, warmup=warmup)
    return Objective("emd", flow_map, interpolant, residual, "eulerian", **{"diagonal": 0.0, **choices})


def ayf_emd(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    warmup: Schedule | None = None,
    derivative: Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """R( v_{s,t} - sg[ b_s + r (t-s) ( d/ds v_{s,t} + grad v_{s,t} b_s ) ] ): Align Your Flow, Eulerian (2506.14603).

    The paper normalises the tangent (``reductions.normalised``), lets r rise to 0.99, and guides the teacher
    (``guidance.autoguided``). Cost: 5 passes.
    """
    residual = _eulerian("teacher", "target", derivative, warmup=warmup)
    return Objective("ayf_emd", flow_map, interpolant, residual, "eulerian", **{"diagonal": 0.0, **choices})


def mean_flow(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    warmup: Schedule | None = None,
    derivative: Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """R( v_{s,t} - sg[ I_s' + r (t-s) ( d/ds v_{s,t} + grad v_{s,t} I_s' ) ] ) + tangent: MeanFlow (2505.13447).

    The default reduction is the squared one, under which the exact map is stationary. The published one,
    ``reductions.adaptive(1, 0.01)``, biases it. Cost: 4 passes.
    """
    residual = _eulerian("conditional", "target", derivative, warmup=warmup)
    return Objective("mean_flow", flow_map, interpolant, residual, "eulerian", **choices)


def improved_mean_flow(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    warmup: Schedule | None = None,
    derivative: Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """R( v_{s,t} - sg[ I_s' + r (t-s) ( d/ds v_{s,t} + grad v_{s,t} v_{s,s} ) ] ) + tangent: improved MeanFlow
    (2512.02012).

    As MeanFlow, but the derivative is along the map's own velocity, which lowers the variance of the target.
    Cost: 5 passes.
    """
    residual = _eulerian("conditional", "target", derivative, along="own", warmup=warmup)
    return Objective("improved_mean_flow", flow_map, interpolant, residual, "eulerian", **choices)


def pixel_mean_flow(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    warmup: Schedule | None = None,
    derivative: Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """Improved MeanFlow of a network that predicts the data end: pixel MeanFlow (2601.22158).

    The residual is that of ``improved_mean_flow``, in v; the map must be in the x-formulation, with its clamp (0.05).
    The paper's perceptual terms are not part of it. Cost: 5 passes.

    Raises:
      ValueError: for a map known to be of another form.
    """
    if flow_map.form not in ("", "x"):
        raise ValueError(f"flow_map: pixel MeanFlow's network predicts the data (form 'x'), got form {flow_map.form!r}")
    residual = _eulerian("conditional", "target", derivative, along="own", warmup=warmup)
    return Objective("pixel_mean_flow", flow_map, interpolant, residual, "eulerian", **choices)


def decoupled_mean_flow(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    warmup: Schedule | None = None,
    derivative: Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """MeanFlow of a network whose first layers see s and whose last see t: decoupled MeanFlow (2510.24474).

    The residual is ``mean_flow``'s. What is new is the network, ``nets.MLP(decoupled=...)``, which starts from a velocity
    network's weights as its diagonal, and the reduction, Cauchy of learned scale (``reductions.learned_cauchy``). With a
    ``teacher`` (guided or not) its velocity takes the place of I_s'. Cost: 4 passes, 5 with a teacher.
    """
    residual = _eulerian("conditional", "target", derivative, warmup=warmup)
    return Objective("decoupled_mean_flow", flow_map, interpolant, residual, "eulerian", **choices)


def facm(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    warmup: Schedule | None = None,
    derivative: Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """R( v_{s,1} - sg[ I_s' + (1-s) ( d/ds v_{s,1} + grad v_{s,1} I_s' ) ] ) + tangent: flow-anchored consistency
    (2507.03738).

    Half of the batch is the anchor, flow matching on the diagonal, which the network tells from the shortcut by its second
    time. With a ``teacher`` its velocity takes the place of I_s'. The paper clamps the residual's entries at 1
    (``reductions.clamped``). Cost: 4 passes, 5 with a teacher.
    """
    residual = _eulerian("conditional", "target", derivative, warmup=warmup)
    choices = {"diagonal": 0.5, **_to_data(choices)}
    return Objective("facm", flow_map, interpolant, residual, "eulerian", **choices)


def sct(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    warmup: Schedule | None = None,
    derivative: Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """R( k v_{s,1} - sg[ k v_{s,1} - cos(tau) (2/pi) ( v_{s,1} - I_s' - r (1-s)(d/ds v_{s,1} + grad v_{s,1} I_s') ) ] ):
    simplified continuous-time consistency training (2410.11081), with tau = pi (1-s)/2 and k = (1-s)/sin(tau).

    k v is the paper's -F up to a function of x, and the bracket its tangent, cos(tau) df/dtau. The paper normalises the
    tangent with c = 0.1 and learns a weight, ``reductions.learned(w, of=reductions.normalised(0.1))``, and lets r rise to
    1; its r multiplies x + dF/dtau, ours the derivative of v. Cost: 4 passes.

    Raises:
      ValueError: for another path than the trigonometric one.
    """
    return _scm("sct", "conditional", flow_map, interpolant, warmup, derivative, choices)


def scd(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    warmup: Schedule | None = None,
    derivative: Derivative = identities.forward_mode,
    **choices: Any,
) -> Objective:
    """``sct`` with the teacher's velocity: simplified continuous-time consistency distillation (2410.11081).

    Cost: 5 passes.

    Raises:
      ValueError: for another path than the trigonometric one.
    """
    return _scm("scd", "teacher", flow_map, interpolant, warmup, derivative, choices)


def _scm(
    name: str,
    velocity: str,
    flow_map: FlowMap,
    interpolant: Interpolant,
    warmup: Schedule | None,
    derivative: Derivative,
    choices: dict[str, Any],
) -> Objective:
    if interpolant.name != "trigonometric":
        raise ValueError(f"interpolant: {name} is defined on the trigonometric path, got {interpolant.name!r}")
    plain = _eulerian(velocity, "target", derivative, warmup=warmup)

    def residual(row: Row) -> identities.Residual:
        gap = row.t - row.s
        # k = gap/sin(pi gap/2), with jnp.sinc(z) = sin(pi z)/(pi z).
        k = (2.0 / jnp.pi) / jnp.sinc(0.5 * gap)
        return plain(row).rescaled(prediction=k, difference=(2.0 / jnp.pi) * jnp.cos(0.5 * jnp.pi * gap))

    return Objective(name, flow_map, interpolant, residual, "eulerian", **{"diagonal": 0.0, **_to_data(choices)})


def _to_data(choices: dict[str, Any]) -> dict[str, Any]:
    """t = 1 and the domain that goes with it, unless another law of times is chosen."""
    return choices if "pairs" in choices else {"pairs": times.to_data(), "domain": TO_DATA, **choices}


def _mean_flow_choices() -> dict[str, Any]:
    return {"reduction": reductions.adaptive(1.0, 0.01), "pairs": times.ordered(times.logit_normal(0.4, 1.0))}


def align_your_flow() -> dict[str, Any]:
    """The paper's choices (2506.14603), of both its methods."""
    return {"reduction": reductions.normalised(0.1), "warmup": lambda step: 0.99 * (step / 10_000.0).clip(0.0, 1.0)}


METHODS: dict[str, Method] = {
    "emd": Method(
        emd,
        "Eulerian map distillation",
        "2406.07507",
        "Eulerian, residual of X",
        "teacher",
        "none",
        "jvp",
        "as LMD, for smooth velocities; in the literature slower to converge",
        {"forward": 1, "jvp": 1, "jvp_backward": 1},
        needs=("teacher",),
        published_passes=7,
    ),
    "esd": Method(
        esd,
        "Eulerian self-distillation",
        "2505.18825",
        "Eulerian + tangent",
        "self",
        "spatial term and velocity",
        "jvp",
        "for comparison; unstable on images in the literature",
        {"jvp": 1, "tangent": 1, "jvp_backward": 1, "forward": 1},
        published_passes=10,
    ),
    "sct": Method(
        sct,
        "sCM, training",
        "2410.11081",
        "Eulerian at t = 1",
        "conditional",
        "target side",
        "jvp",
        "continuous-time consistency on the trigonometric path",
        {"jvp": 1, "backward": 1},
        paths=("trigonometric",),
        published=lambda: {"reduction": reductions.normalised(0.1)},
        published_passes=4,
    ),
    "scd": Method(
        scd,
        "sCM, distillation",
        "2410.11081",
        "Eulerian at t = 1",
        "teacher",
        "target side",
        "jvp",
        "as sCM, with a teacher's velocity instead of the pair's",
        {"forward": 1, "jvp": 1, "backward": 1},
        needs=("teacher",),
        paths=("trigonometric",),
        published=lambda: {"reduction": reductions.normalised(0.1)},
        published_passes=5,
    ),
    "mean_flow": Method(
        mean_flow,
        "MeanFlow",
        "2505.13447",
        "Eulerian + tangent",
        "conditional",
        "target side",
        "jvp",
        "the cheapest step with a derivative, from data alone; a noisy target",
        {"jvp": 1, "backward": 1},
        published=_mean_flow_choices,
        published_passes=4,
    ),
    "improved_mean_flow": Method(
        improved_mean_flow,
        "improved MeanFlow",
        "2512.02012",
        "Eulerian + tangent",
        "conditional; derivative along self",
        "target side",
        "jvp",
        "MeanFlow with a quieter target, for one more pass",
        {"jvp": 1, "backward": 1, "forward": 1},
        published=_mean_flow_choices,
        published_passes=5,
    ),
    "pixel_mean_flow": Method(
        pixel_mean_flow,
        "pixel MeanFlow",
        "2601.22158",
        "Eulerian + tangent",
        "conditional; derivative along self",
        "target side",
        "jvp",
        "data of high dimension, whose network should predict the data",
        {"jvp": 1, "backward": 1, "forward": 1},
        forms=("x",),
        published=_mean_flow_choices,
    ),
    "decoupled_mean_flow": Method(
        decoupled_mean_flow,
        "decoupled MeanFlow",
        "2510.24474",
        "Eulerian + tangent",
        "conditional, guided or teacher",
        "target side",
        "jvp",
        "a velocity network, turned into a flow map without new weights",
        {"jvp": 1, "backward": 1},
        published=lambda: {"reduction": reductions.cauchy()},
    ),
    "facm": Method(
        facm,
        "flow-anchored consistency model",
        "2507.03738",
        "Eulerian at t = 1, + tangent",
        "conditional or teacher",
        "target side",
        "jvp",
        "continuous-time consistency on any path, kept stable by flow matching",
        {"jvp": 1, "backward": 1},
        published=lambda: {"reduction": reductions.clamped(1.0)},
        published_passes=8,
    ),
    "ayf_emd": Method(
        ayf_emd,
        "Align Your Flow, Eulerian",
        "2506.14603",
        "Eulerian",
        "teacher, guided or not",
        "target side",
        "jvp",
        "distilling a (guided) velocity with a cheap step",
        {"forward": 1, "jvp": 1, "backward": 1},
        needs=("teacher",),
        published=align_your_flow,
        published_passes=6,
    ),
}
