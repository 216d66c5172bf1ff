r"""Methods of the Eulerian identity: the map does not change when its source moves along the flow.

Every method takes ``derivative``, which is ``identities.forward_mode`` or a finite difference, and ``warmup``, a schedule r
that multiplies the derivative (1 by default). ``jflow.objectives`` explains the symbols of the formulas.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NotRequired, TypedDict, Unpack

import jax.numpy as jnp

from jflow import identities, reductions, times
from jflow.identities import Derivative
from jflow.interpolants import Interpolant
from jflow.objectives.choices import DerivativeChoices
from jflow.objectives.curriculum import Schedule, value_at
from jflow.objectives.lagrangian import align_your_flow
from jflow.objectives.method import method
from jflow.objectives.objective import Objective
from jflow.objectives.row import Row, Term, near_source
from jflow.types import TO_DATA, Event, FlowMap


class Reads(TypedDict):
    """The options of an Eulerian residual.

    Attributes:
      velocity: the velocity estimate: "conditional", or the leg whose diagonal is used.
      along: the velocity along which v is differentiated; by default that of ``velocity``.
      stop: as in ``identities.eulerian``.
    """

    velocity: str
    stop: str
    along: NotRequired[str]


def eulerian_term(reads: Reads, warmup: Schedule | None = None, derivative: Derivative | None = None) -> Term:
    """Makes a term of the Eulerian residual."""
    derivative = identities.forward_mode if derivative is None else derivative
    velocity, along, stop = reads["velocity"], reads.get("along"), reads["stop"]

    def of(row: Row, which: str) -> Event:
        if which == "own" and row.here is not None:
            return row.here
        return row.conditional if which == "conditional" else row.leg(which).velocity(row.s, row.x)

    def residual(row: Row) -> identities.Residual:
        if along == "own" and stop == "target":
            # Guidance needs the map's velocity too, so it is computed once.
            row = row._replace(here=row.frozen.velocity(row.s, row.x))
        return identities.eulerian(
            row.own.v,
            row.s,
            row.t,
            row.x,
            of(row, velocity),
            tangent_velocity=None if along is None else of(row, along),
            stop=stop,
            derivative=derivative if warmup is None else identities.scaled(derivative, value_at(warmup, row.step)),
        )

    asked = {"conditional": "velocity", "teacher": "teacher"}

    return Term("eulerian", residual, tuple(asked[which] for which in (velocity, along) if which in asked), near_source)


def _eulerian(
    name: str, flow_map: FlowMap, interpolant: Interpolant, choices: dict[str, Any], reads: Reads, **defaults: Any
) -> Objective:
    """Makes a method with the Eulerian residual."""
    term = eulerian_term(reads, choices.pop("warmup", None), choices.pop("derivative", None))
    return Objective(name, flow_map, interpolant, term, defaults=defaults, **choices)


@method(
    title="Eulerian map distillation",
    source="2406.07507",
    identity="Eulerian, residual of X",
    velocity="teacher",
    stop_gradient="none",
    derivative="jvp",
    when="as LMD, with the velocity asked at the sampled points and a derivative in space",
    cost={"forward": 1, "jvp": 1, "jvp_backward": 1},
    needs=("teacher",),
    published_passes=7,
)
def emd(flow_map: FlowMap, interpolant: Interpolant, **choices: Unpack[DerivativeChoices]) -> Objective:
    r"""Eulerian map distillation (2406.07507): the Eulerian residual of X with the teacher's velocity.

    .. math:: R\big( \partial_s X_{s,t} + \nabla X_{s,t}\, b_s \big)

    There is no stop-gradient. Cost: 7 passes (the teacher 1, value and derivative 2, backward 4).
    """
    reads: Reads = {"velocity": "teacher", "stop": "none"}
    return _eulerian("emd", flow_map, interpolant, {**choices}, reads, diagonal=0.0)


@method(
    title="Eulerian self-distillation",
    source="2505.18825",
    identity="Eulerian + tangent",
    velocity="self",
    stop_gradient="spatial term and velocity",
    derivative="jvp",
    when="from data alone, by the Eulerian identity, with a derivative in space of the map",
    cost={"jvp": 1, "tangent": 1, "jvp_backward": 1, "forward": 1},
    published_passes=10,
)
def esd(
    flow_map: FlowMap,
    interpolant: Interpolant,
    *,
    leg: str = "own",
    stop: str = "spatial",
    **choices: Unpack[DerivativeChoices],
) -> Objective:
    r"""Eulerian self-distillation (2505.18825): the Eulerian residual with the map's own velocity, and a tangent term.

    .. math:: R\big( v_{s,t} - (t-s)\, \partial_s v_{s,t} - \mathrm{sg}[ v_{s,s} + (t-s) \nabla v_{s,t}\, v_{s,s} ] \big)

    ``leg`` selects the model that gives v_{s,s}: "own", "ema" or "teacher". ``stop`` selects the parts under a
    stop-gradient, as in ``identities.eulerian``. Cost: 8 passes (value and two derivatives 3, backward 4, the diagonal 1).
    """
    return _eulerian("esd", flow_map, interpolant, {**choices}, {"velocity": leg, "stop": stop})


def _normalised_tangent() -> dict[str, Any]:
    return {"reduction": reductions.normalised(0.1)}


@method(
    title="sCM, training",
    source="2410.11081",
    identity="Eulerian at t = 1",
    velocity="conditional",
    stop_gradient="target side",
    derivative="jvp",
    when="continuous-time consistency on the trigonometric path",
    cost={"jvp": 1, "backward": 1},
    paths=("trigonometric",),
    published=_normalised_tangent,
    published_passes=4,
)
def sct(flow_map: FlowMap, interpolant: Interpolant, **choices: Unpack[DerivativeChoices]) -> Objective:
    r"""Simplified continuous-time consistency training, sCT (2410.11081), on the trigonometric path.

    .. math::
        R\big( k v_{s,1} - \mathrm{sg}[ k v_{s,1} - \Delta ] \big), \qquad
        \Delta = \tfrac{2}{\pi} \cos\tau \left( v_{s,1} - \dot I_s - r (1-s)\, D_{\dot I_s} v_{s,1} \right), \\
        \tau = \tfrac{\pi}{2} (1-s), \qquad k = \frac{1-s}{\sin\tau}.

    k v is the paper's -F plus a function of x, and :math:`\Delta` is its tangent :math:`\cos\tau\, df/d\tau`. The paper
    normalises the tangent with c = 0.1 and learns a weight (``reductions.learned(w, of=reductions.normalised(0.1))``), and r
    rises to 1. In the paper, r multiplies :math:`x + dF/d\tau`; here it multiplies the derivative of v. Cost: 4 passes.

    Raises:
      ValueError: if the path is not the trigonometric one.
    """
    return _scm("sct", flow_map, interpolant, {**choices}, "conditional")


@method(
    title="sCM, distillation",
    source="2410.11081",
    identity="Eulerian at t = 1",
    velocity="teacher",
    stop_gradient="target side",
    derivative="jvp",
    when="as sCM, with a teacher's velocity instead of the pair's",
    cost={"forward": 1, "jvp": 1, "backward": 1},
    needs=("teacher",),
    paths=("trigonometric",),
    published=_normalised_tangent,
    published_passes=5,
)
def scd(flow_map: FlowMap, interpolant: Interpolant, **choices: Unpack[DerivativeChoices]) -> Objective:
    """Simplified continuous-time consistency distillation, sCD (2410.11081): ``sct`` with the teacher's velocity.

    Cost: 5 passes.

    Raises:
      ValueError: if the path is not the trigonometric one.
    """
    return _scm("scd", flow_map, interpolant, {**choices}, "teacher")


def _scm(name: str, flow_map: FlowMap, interpolant: Interpolant, choices: dict[str, Any], velocity: str) -> Objective:
    if isinstance(interpolant, Interpolant) and interpolant.name != "trigonometric":
        raise ValueError(f"interpolant: {name} is defined on the trigonometric path, got {interpolant.name!r}")
    plain = eulerian_term(
        {"velocity": velocity, "stop": "target"}, choices.pop("warmup", None), choices.pop("derivative", None)
    )

    def residual(row: Row) -> identities.Residual:
        gap = row.t - row.s
        # k = gap/sin(pi gap/2), with jnp.sinc(z) = sin(pi z)/(pi z).
        k = (2.0 / jnp.pi) / jnp.sinc(0.5 * gap)
        return plain.residual(row).rescaled(prediction=k, difference=(2.0 / jnp.pi) * jnp.cos(0.5 * jnp.pi * gap))

    term = dataclasses.replace(plain, residual=residual)
    return Objective(name, flow_map, interpolant, term, defaults={"diagonal": 0.0, **TO_DATA_PAIRS}, **choices)


# The default pairs and domain of a method that trains only jumps to the data.
TO_DATA_PAIRS: dict[str, Any] = {"pairs": times.to_data(), "domain": TO_DATA}


def _mean_flow_recipe(diagonal: float) -> dict[str, Any]:
    """The adaptive weight on all rows; s is the smaller of two logit-normal times, also on the diagonal."""
    pairs, weight = times.ordered(times.logit_normal(0.4, 1.0)), reductions.adaptive(1.0, 0.01)
    return {
        "diagonal": diagonal,
        "pairs": pairs,
        "times": times.source(pairs),
        "reduction": weight,
        "diagonal_reduction": weight,
    }


@method(
    title="MeanFlow",
    source="2505.13447",
    identity="Eulerian + tangent",
    velocity="conditional",
    stop_gradient="target side",
    derivative="jvp",
    when="from data alone, with one pass and its derivative; the target has the pair's noise",
    cost={"jvp": 1, "backward": 1},
    published=lambda: _mean_flow_recipe(0.75),
    published_passes=4,
)
def mean_flow(flow_map: FlowMap, interpolant: Interpolant, **choices: Unpack[DerivativeChoices]) -> Objective:
    r"""MeanFlow (2505.13447): the Eulerian residual with the velocity of the pair, and a tangent term.

    .. math:: R\big( v_{s,t} - \mathrm{sg}[ \dot I_s + r (t-s)\, D_{\dot I_s} v_{s,t} ] \big)

    With the default reduction, ``reductions.squared``, the exact map is stationary. With the published reduction,
    ``reductions.adaptive(1, 0.01)`` on all rows, it is not. Cost: 4 passes.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import flow_map, interpolants, objectives, parameterizations
      >>> def net(params, s, t, x, cond=None, *, key=None):
      ...     return params * x
      >>> path = interpolants.linear()
      >>> model = flow_map(net, parameterizations.mean_velocity_form(path))
      >>> objective = objectives.mean_flow(model, path)
      >>> losses, aux = jax.jit(objective)(jnp.float32(0.5), jax.random.key(0), jnp.ones((8, 2), jnp.float32))
      >>> losses.shape, bool(jnp.isfinite(losses).all())
      ((8,), True)
    """
    return _eulerian("mean_flow", flow_map, interpolant, {**choices}, {"velocity": "conditional", "stop": "target"})


_IMPROVED: Reads = {"velocity": "conditional", "along": "own", "stop": "target"}


@method(
    title="improved MeanFlow",
    source="2512.02012",
    identity="Eulerian + tangent",
    velocity="conditional; derivative along self",
    stop_gradient="target side",
    derivative="jvp",
    when="MeanFlow with its own velocity in the derivative instead of the pair's, for one more pass",
    cost={"jvp": 1, "backward": 1, "forward": 1},
    published=lambda: _mean_flow_recipe(0.5),
    published_passes=5,
)
def improved_mean_flow(flow_map: FlowMap, interpolant: Interpolant, **choices: Unpack[DerivativeChoices]) -> Objective:
    r"""Improved MeanFlow (2512.02012): MeanFlow with the derivative along the map's own velocity.

    .. math:: R\big( v_{s,t} - \mathrm{sg}[ \dot I_s + r (t-s)\, D_{v_{s,s}} v_{s,t} ] \big)

    This lowers the variance of the target. There is a tangent term. The published recipe has half of the rows on the
    diagonal. Cost: 5 passes.
    """
    return _eulerian("improved_mean_flow", flow_map, interpolant, {**choices}, _IMPROVED)


@method(
    title="pixel MeanFlow",
    source="2601.22158",
    identity="Eulerian + tangent",
    velocity="conditional; derivative along self",
    stop_gradient="target side",
    derivative="jvp",
    when="data of high dimension, whose network should predict the data",
    cost={"jvp": 1, "backward": 1, "forward": 1},
    forms=("x",),
    published=lambda: _mean_flow_recipe(0.5),
)
def pixel_mean_flow(flow_map: FlowMap, interpolant: Interpolant, **choices: Unpack[DerivativeChoices]) -> Objective:
    """Pixel MeanFlow (2601.22158): improved MeanFlow of a network that predicts the data.

    The residual is that of ``improved_mean_flow``, in v. The map must be in the x-formulation (``data_form``). Its clamp
    near s = 1 differs from the paper's: the paper divides its network's output by max(1 - s, 0.05) and regresses on the
    clamped target. The paper's perceptual terms are not included. Cost: 5 passes.

    Raises:
      ValueError: if the map is known to have another form.
    """
    if getattr(flow_map, "form", "") not in ("", "x"):
        raise ValueError(f"flow_map: pixel MeanFlow's network predicts the data (form 'x'), got form {flow_map.form!r}")
    return _eulerian("pixel_mean_flow", flow_map, interpolant, {**choices}, _IMPROVED)


def _decoupled_recipe() -> dict[str, Any]:
    """The paper's choices: ``log(|D|^2/d + .01)`` up to a constant on all rows, and separate laws of times."""
    logarithm = reductions.scaled(200.0, reductions.per_entry(reductions.cauchy(0.1)))
    return {
        "diagonal": 0.5,
        "times": times.logit_normal(0.4, 1.0),
        "pairs": times.ordered(times.logit_normal(0.2, 1.0), times.logit_normal(-0.2, 1.0)),
        "reduction": logarithm,
        "diagonal_reduction": logarithm,
    }


@method(
    title="decoupled MeanFlow",
    source="2510.24474",
    identity="Eulerian + tangent",
    velocity="conditional, guided or teacher",
    stop_gradient="target side",
    derivative="jvp",
    when="a velocity network, turned into a flow map without new weights",
    cost={"jvp": 1, "backward": 1},
    published=_decoupled_recipe,
)
def decoupled_mean_flow(flow_map: FlowMap, interpolant: Interpolant, **choices: Unpack[DerivativeChoices]) -> Objective:
    r"""Decoupled MeanFlow (2510.24474): MeanFlow of a network whose first layers see s and whose last layers see t.

    The residual is that of ``mean_flow``. The method differs in the network, ``nets.MLP(decoupled=...)``, whose diagonal
    starts as a trained velocity network, and in the published reduction of the residual D with d entries, on all rows:

    .. math:: \log\left( |D|^2/d + 0.01 \right).

    The paper adds a learned scale (``reductions.learned_cauchy``). If there is a ``teacher`` (guided or not), its velocity
    replaces :math:`\dot I_s`. Cost: 4 passes, 5 with a teacher.
    """
    return _eulerian(
        "decoupled_mean_flow", flow_map, interpolant, {**choices}, {"velocity": "conditional", "stop": "target"}
    )


def _facm_recipe() -> dict[str, Any]:
    return {
        "reduction": reductions.clamped(1.0, then=reductions.per_entry(reductions.adaptive(0.5, 1e-3))),
        "diagonal_reduction": reductions.per_entry(),
    }


@method(
    title="flow-anchored consistency model",
    source="2507.03738",
    identity="Eulerian at t = 1, + tangent",
    velocity="conditional or teacher",
    stop_gradient="target side",
    derivative="jvp",
    when="continuous-time consistency on any path, with flow matching on the diagonal",
    cost={"jvp": 1, "backward": 1},
    published=_facm_recipe,
    published_passes=8,
)
def facm(flow_map: FlowMap, interpolant: Interpolant, **choices: Unpack[DerivativeChoices]) -> Objective:
    r"""Flow-anchored consistency model (2507.03738): MeanFlow's residual for jumps to t = 1, and a tangent term.

    .. math:: R\big( v_{s,1} - \mathrm{sg}[ \dot I_s + r (1-s)\, D_{\dot I_s} v_{s,1} ] \big)

    Half of the batch is the anchor, flow matching on the diagonal; the network distinguishes the two tasks by its second
    time. If there is a ``teacher``, its velocity replaces :math:`\dot I_s`. The published recipe clamps the residual's
    entries at 1, takes means over entries and weights with (mean + 1e-3)^-1/2. The published code also weights with
    cos(pi s/2), relaxes the target by a power of s, and adds a cosine similarity to the anchor; these are not included.
    Cost: 4 passes, 5 with a teacher.
    """
    reads: Reads = {"velocity": "conditional", "stop": "target"}
    return _eulerian("facm", flow_map, interpolant, {**choices}, reads, diagonal=0.5, **TO_DATA_PAIRS)


@method(
    title="Align Your Flow, Eulerian",
    source="2506.14603",
    identity="Eulerian",
    velocity="teacher, guided or not",
    stop_gradient="target side",
    derivative="jvp",
    when="distilling a (guided) velocity, without a gradient through the derivative",
    cost={"forward": 1, "jvp": 1, "backward": 1},
    needs=("teacher",),
    published=align_your_flow,
    published_passes=6,
)
def ayf_emd(flow_map: FlowMap, interpolant: Interpolant, **choices: Unpack[DerivativeChoices]) -> Objective:
    r"""Align Your Flow, Eulerian (2506.14603): MeanFlow's residual with the teacher's velocity.

    .. math:: R\big( v_{s,t} - \mathrm{sg}[ b_s + r (t-s)\, D_{b_s} v_{s,t} ] \big)

    In the paper, the tangent is normalised (``reductions.normalised``), r rises to 0.99, and the teacher is guided
    (``guidance.autoguided``). Cost: 5 passes.
    """
    reads: Reads = {"velocity": "teacher", "stop": "target"}
    return _eulerian("ayf_emd", flow_map, interpolant, {**choices}, reads, diagonal=0.0)
