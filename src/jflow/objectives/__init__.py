r"""Objectives: the training losses of the methods, as functions ``(params, key, batch, context) -> (loss [B], aux)``.

``METHODS`` is the catalogue of methods. A method is a function that makes an ``Objective`` from a ``Term``; the decorator
``method`` adds it to the catalogue. ``sequence`` and ``weighted_sum`` combine objectives.

The formulas of the methods use these symbols:

- :math:`R` is the reduction, by default the squared norm (``reductions.squared``), and sg the stop-gradient.
- :math:`\dot I_s` is the velocity of the pair, or the estimate chosen by ``velocity``. :math:`b` is the teacher's velocity.
- Maps are evaluated at :math:`x = I_s` unless their argument is given.
- :math:`u = \gamma s + (1-\gamma) t` is a middle time, and :math:`S_{s,u}` an ODE solver from s to u.
- :math:`D_c v_{s,t} = \partial_s v_{s,t} + \nabla v_{s,t}\, c` is the derivative along the velocity c.
- :math:`r` is the schedule ``warmup``, which multiplies the derivative; it is 1 by default.

A method with a tangent term also trains the velocity, by flow matching on the ``diagonal`` share of the batch. Costs are per
off-diagonal sample, in forward passes of the network. Methods with a derivative take ``derivative``, which is
``identities.forward_mode`` or a finite difference; ``pid`` and ``free_flow`` always use a finite difference.
"""

# Methods are listed in the catalogue in the order in which these modules are imported.
# isort: off
from jflow.objectives import regression as _regression  # noqa: F401
from jflow.objectives import lagrangian as _lagrangian  # noqa: F401
from jflow.objectives import eulerian as _eulerian  # noqa: F401
from jflow.objectives import semigroup as _semigroup  # noqa: F401
from jflow.objectives import consistency as _consistency  # noqa: F401

# isort: on
from jflow.objectives import curriculum, velocity_estimates
from jflow.objectives.calling import call, init
from jflow.objectives.choices import Choices
from jflow.objectives.combine import sequence, weighted_sum
from jflow.objectives.consistency import consistency_distillation, consistency_training, ect, ict
from jflow.objectives.distributions import energy_distance
from jflow.objectives.eulerian import (
    ayf_emd,
    decoupled_mean_flow,
    emd,
    esd,
    facm,
    improved_mean_flow,
    mean_flow,
    pixel_mean_flow,
    scd,
    sct,
)
from jflow.objectives.group import Group, GroupObjective
from jflow.objectives.guided import Guidance
from jflow.objectives.lagrangian import (
    ayf_lmd,
    fmm,
    free_flow,
    lmd,
    lsd,
    pid,
    tvm,
)
from jflow.objectives.method import METHODS, PASSES, Method, method
from jflow.objectives.objective import Objective
from jflow.objectives.regression import (
    flow_matching,
    reflow,
)
from jflow.objectives.row import Estimate, Leg, Row, Term
from jflow.objectives.semigroup import (
    alpha_flow,
    ctm,
    progressive_distillation,
    psd_m,
    psd_u,
    shortcut,
    soflow,
    split_mean_flow,
)

__all__ = [
    "METHODS",
    "PASSES",
    "Choices",
    "Estimate",
    "Group",
    "GroupObjective",
    "Guidance",
    "Leg",
    "Method",
    "Objective",
    "Row",
    "Term",
    "alpha_flow",
    "ayf_emd",
    "ayf_lmd",
    "call",
    "consistency_distillation",
    "consistency_training",
    "ctm",
    "curriculum",
    "decoupled_mean_flow",
    "ect",
    "emd",
    "energy_distance",
    "esd",
    "facm",
    "flow_matching",
    "fmm",
    "free_flow",
    "ict",
    "improved_mean_flow",
    "init",
    "lmd",
    "lsd",
    "mean_flow",
    "method",
    "pid",
    "pixel_mean_flow",
    "progressive_distillation",
    "psd_m",
    "psd_u",
    "reflow",
    "scd",
    "sct",
    "sequence",
    "shortcut",
    "soflow",
    "split_mean_flow",
    "tvm",
    "velocity_estimates",
    "weighted_sum",
]
