"""Objectives: ``(params, key, batch, context) -> (loss [B], info)``, each method a choice of parts over the identities."""

from jflow.objectives import curriculum, velocities
from jflow.objectives.compose import Leg, Objective, OffDiagonal, Row
from jflow.objectives.consistency import consistency_distillation, consistency_training, ect, ict
from jflow.objectives.curriculum import sequence
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
from jflow.objectives.lagrangian import (
    ayf_lmd,
    fmm,
    free_flow,
    lmd,
    lsd,
    pid,
    tvm,
)
from jflow.objectives.method import PASSES, Method
from jflow.objectives.registry import METHODS
from jflow.objectives.regression import (
    flow_matching,
    reflow,
)
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
    "Leg",
    "Method",
    "Objective",
    "OffDiagonal",
    "Row",
    "alpha_flow",
    "ayf_emd",
    "ayf_lmd",
    "consistency_distillation",
    "consistency_training",
    "ctm",
    "curriculum",
    "decoupled_mean_flow",
    "ect",
    "emd",
    "esd",
    "facm",
    "flow_matching",
    "fmm",
    "free_flow",
    "ict",
    "improved_mean_flow",
    "lmd",
    "lsd",
    "mean_flow",
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
    "velocities",
]
