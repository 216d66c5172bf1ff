"""The catalogue: one row for every method, with its parts in words and in numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jflow import reductions, times
from jflow.objectives import consistency, eulerian, lagrangian, regression, semigroup
from jflow.objectives.compose import Objective

# What a piece of work costs, in forward passes of the network on one sample.
PASSES = {
    "forward": 1,
    "backward": 2,  # of one forward pass, to the parameters
    "jvp": 2,  # the value and one derivative
    "tangent": 1,  # a further derivative at the same point
    "jvp_backward": 4,  # through the value and the derivative
    "input_backward": 1,  # of one forward pass, to its point alone
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the catalogue.

    Attributes:
      constructor: ``(flow_map, interpolant, **choices) -> Objective``.
      title: the method's name in its paper.
      source: arXiv ids.
      identity, velocity, stop_gradient, derivative: the parts, in words.
      when: when to use it, in a sentence.
      cost: of one off-diagonal sample, as numbers of the pieces of ``PASSES``; empty without such samples.
      stationary: how the exact map is stationary under the squared reduction: "exact", the expected gradient is zero;
        "order", it is of order ``order`` in a small number h; "limit", the same where h is the method's own parameter.
      order: see ``stationary``.
      at: ``h -> choices`` under which h is that small number.
      needs: what must be there: "teacher" (a velocity), "map teacher" (a FlowMap), "ema", "pairs" (x0 in the batch),
        "backward" (a map with both directions).
      paths: the interpolants on which it is defined; empty for all.
      forms: the parameterizations with which it is defined; empty for all.
      published: the paper's choices, to be passed to the constructor, where they differ from its defaults.
      published_passes: the forward passes of a sample with every term on the full batch, as counted in the literature.
    """

    constructor: Callable[..., Objective]
    title: str
    source: str
    identity: str
    velocity: str
    stop_gradient: str
    derivative: str
    when: str
    cost: Mapping[str, int] = dataclasses.field(default_factory=dict)
    stationary: str = "exact"
    order: int = 0
    at: Callable[[Any], dict[str, Any]] | None = None
    needs: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    published: Callable[[], dict[str, Any]] = dict
    published_passes: int | None = None

    @property
    def off_diagonal_passes(self) -> int | None:
        """The cost of one off-diagonal sample in forward passes, None without such samples."""
        return sum(PASSES[piece] * count for piece, count in self.cost.items()) or None


def _mean_flow_choices() -> dict[str, Any]:
    return {"reduction": reductions.adaptive(1.0, 0.01), "pairs": times.ordered(times.logit_normal(0.4, 1.0))}


def _ayf_choices() -> dict[str, Any]:
    return {"reduction": reductions.normalised(0.1), "warmup": lambda step: 0.99 * (step / 10_000.0).clip(0.0, 1.0)}


def _fraction(h: Any) -> dict[str, Any]:
    return {"fraction": h}


METHODS: dict[str, Method] = {
    "flow_matching": Method(
        regression.flow_matching,
        "flow matching, rectified flow",
        "2210.02747, 2209.03003",
        "tangent",
        "conditional",
        "-",
        "-",
        "the velocity, from data alone: the baseline, and the teacher of the distillations",
        published_passes=3,
    ),
    "reflow": Method(
        regression.reflow,
        "reflow",
        "2209.03003",
        "tangent",
        "conditional, of pairs from a solve",
        "-",
        "-",
        "straighter paths for a solver of few steps, when solving for pairs once is affordable",
        needs=("pairs",),
    ),
    "progressive_distillation": Method(
        semigroup.progressive_distillation,
        "progressive distillation, PFMM",
        "2202.00512, 2406.07507",
        "semigroup, midpoint",
        "teacher legs",
        "both legs",
        "-",
        "no derivative at all and targets that stand still; the steps halve with each stage",
        {"forward": 3, "backward": 1},
        needs=("map teacher",),
        published_passes=5,
    ),
    "lmd": Method(
        lagrangian.lmd,
        "Lagrangian map distillation",
        "2406.07507",
        "Lagrangian",
        "teacher",
        "none",
        "jvp",
        "a trusted velocity is at hand and the map should be accurate",
        {"jvp": 1, "jvp_backward": 1, "forward": 1, "input_backward": 1},
        needs=("teacher",),
        published_passes=9,
    ),
    "emd": Method(
        eulerian.emd,
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
    "fmm": Method(
        lagrangian.fmm,
        "flow map matching",
        "2406.07507",
        "Lagrangian at the returned point, and the cycle",
        "conditional",
        "none",
        "jvp",
        "a map of both directions (encoding) from data alone",
        {"forward": 1, "backward": 1, "jvp": 1, "jvp_backward": 1},
        needs=("backward",),
        published_passes=9,
    ),
    "lsd": Method(
        lagrangian.lsd,
        "Lagrangian self-distillation",
        "2505.18825",
        "Lagrangian + tangent",
        "self",
        "velocity leg",
        "jvp",
        "the first choice from data alone: accurate at one jump and stable",
        {"jvp": 1, "jvp_backward": 1, "forward": 1},
        published_passes=10,
    ),
    "esd": Method(
        eulerian.esd,
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
    "psd_m": Method(
        semigroup.psd_m,
        "progressive self-distillation, midpoint",
        "2505.18825",
        "semigroup, midpoint, + tangent",
        "self legs",
        "both legs",
        "-",
        "networks that refuse forward mode; cheap steps",
        {"forward": 3, "backward": 1},
        published_passes=8,
    ),
    "psd_u": Method(
        semigroup.psd_u,
        "progressive self-distillation, uniform",
        "2505.18825",
        "semigroup, random middle, + tangent",
        "self legs",
        "both legs",
        "-",
        "as PSD-M, with every split of a jump",
        {"forward": 3, "backward": 1},
        published_passes=8,
    ),
    "shortcut": Method(
        semigroup.shortcut,
        "shortcut model",
        "2410.12557",
        "semigroup, midpoint, on a dyadic grid, + tangent",
        "self legs (average)",
        "both legs",
        "-",
        "step counts that are powers of two are all that is wanted",
        {"forward": 3, "backward": 1},
        needs=("ema",),
        published_passes=8,
    ),
    "split_mean_flow": Method(
        semigroup.split_mean_flow,
        "SplitMeanFlow",
        "2507.16884",
        "semigroup, random middle, + tangent",
        "self legs; teacher on the diagonal",
        "both legs",
        "-",
        "PSD-U with a teacher's diagonal",
        {"forward": 3, "backward": 1},
        published_passes=9,
    ),
    "consistency_training": Method(
        consistency.consistency_training,
        "consistency training",
        "2303.01469",
        "Eulerian at t = 1, as a difference",
        "conditional",
        "target side",
        "finite difference along the pair",
        "one jump to the data without derivatives; biased by the step",
        {"forward": 2, "backward": 1},
        stationary="order",
        order=1,
        at=_fraction,
        published=lambda: {"leg": "ema"},
        published_passes=4,
    ),
    "consistency_distillation": Method(
        consistency.consistency_distillation,
        "consistency distillation",
        "2303.01469",
        "Eulerian at t = 1, as a difference",
        "teacher's solver step",
        "target side",
        "finite difference along the teacher",
        "one jump to the data from a trusted velocity, with less noise than training",
        {"forward": 4, "backward": 1},
        stationary="order",
        order=2,
        at=_fraction,
        needs=("teacher",),
        published=lambda: {"leg": "ema"},
        published_passes=5,
    ),
    "ict": Method(
        consistency.ict,
        "improved consistency training",
        "2310.14189",
        "Eulerian at t = 1, as a difference",
        "conditional",
        "target side",
        "finite difference along the pair, doubling grid",
        "consistency training with a curriculum of steps",
        {"forward": 2, "backward": 1},
        stationary="order",
        order=1,
        at=lambda h: {"cells": 1.0 / h},
        published=lambda: {"reduction": reductions.pseudo_huber(0.00054)},
        published_passes=4,
    ),
    "ect": Method(
        consistency.ect,
        "easy consistency tuning",
        "2406.14548",
        "Eulerian at t = 1, as a difference",
        "conditional",
        "target side",
        "finite difference along the pair, from the whole to a small step",
        "tuning a velocity network into a consistency model on a small budget",
        {"forward": 2, "backward": 1},
        stationary="order",
        order=1,
        at=_fraction,
        published_passes=4,
    ),
    "sct": Method(
        eulerian.sct,
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
        eulerian.scd,
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
    "ctm": Method(
        semigroup.ctm,
        "consistency trajectory model",
        "2310.02279",
        "semigroup compared at t = 1, + tangent",
        "teacher's solver step, self legs",
        "target side",
        "-",
        "any-to-any jumps from a teacher, compared where they matter, at the data",
        {"forward": 6, "backward": 1, "input_backward": 1},
        stationary="order",
        order=3,
        at=_fraction,
        needs=("teacher",),
        published_passes=7,
    ),
    "mean_flow": Method(
        eulerian.mean_flow,
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
        eulerian.improved_mean_flow,
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
        eulerian.pixel_mean_flow,
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
    "alpha_flow": Method(
        semigroup.alpha_flow,
        "alpha-Flow",
        "2510.20771",
        "semigroup with a conditional first leg, + tangent",
        "conditional, self",
        "target side",
        "-",
        "from flow matching to MeanFlow by one parameter, without derivatives",
        {"forward": 2, "backward": 1},
        stationary="limit",
        order=1,
        at=lambda h: {"alpha": h},
    ),
    "soflow": Method(
        semigroup.soflow,
        "SoFlow",
        "2512.15657",
        "Eulerian, as a difference, + tangent",
        "conditional",
        "target side",
        "finite difference along the velocity",
        "MeanFlow without forward mode",
        {"forward": 2, "backward": 1},
        stationary="order",
        order=1,
        at=_fraction,
        published_passes=7,
    ),
    "decoupled_mean_flow": Method(
        eulerian.decoupled_mean_flow,
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
        eulerian.facm,
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
        eulerian.ayf_emd,
        "Align Your Flow, Eulerian",
        "2506.14603",
        "Eulerian",
        "teacher, guided or not",
        "target side",
        "jvp",
        "distilling a (guided) velocity with a cheap step",
        {"forward": 1, "jvp": 1, "backward": 1},
        needs=("teacher",),
        published=_ayf_choices,
        published_passes=6,
    ),
    "ayf_lmd": Method(
        lagrangian.ayf_lmd,
        "Align Your Flow, Lagrangian",
        "2506.14603",
        "Lagrangian",
        "teacher, guided or not",
        "target side",
        "jvp",
        "as its Eulerian sibling, with the teacher asked at the map's own images",
        {"jvp": 1, "backward": 1, "forward": 1},
        needs=("teacher",),
        published=_ayf_choices,
        published_passes=6,
    ),
    "tvm": Method(
        lagrangian.tvm,
        "terminal velocity matching",
        "2511.19797",
        "Lagrangian + tangent",
        "average of self",
        "velocity leg",
        "jvp",
        "LSD with a steadier target",
        {"jvp": 1, "jvp_backward": 1, "forward": 1},
        needs=("ema",),
        published_passes=10,
    ),
    "pid": Method(
        lagrangian.pid,
        "physics-informed distillation",
        "2411.08378",
        "Lagrangian at s = 0",
        "teacher",
        "teacher leg",
        "finite difference",
        "a teacher and no data",
        {"forward": 3, "backward": 2},
        stationary="order",
        order=1,
        at=lambda h: {"step": h},
        needs=("teacher",),
        published_passes=7,
    ),
    "free_flow": Method(
        lagrangian.free_flow,
        "FreeFlow, predictor",
        "2511.19428",
        "Lagrangian at s = 0",
        "teacher",
        "target side",
        "finite difference",
        "a teacher and no data, with a cheaper step",
        {"forward": 3, "backward": 1},
        stationary="order",
        order=1,
        at=lambda h: {"step": h},
        needs=("teacher",),
        published_passes=12,
    ),
}
