"""Objectives: ``(params, key, batch, context) -> (loss [B], info)``, each method a choice of parts over the identities."""

from jflow.objectives import velocities
from jflow.objectives.compose import Leg, Objective, OffDiagonal, Row
from jflow.objectives.curriculum import sequence
from jflow.objectives.methods import (
    METHODS,
    Method,
    esd,
    flow_matching,
    improved_mean_flow,
    lsd,
    mean_flow,
    psd_m,
    psd_u,
)

__all__ = [
    "METHODS",
    "Leg",
    "Method",
    "Objective",
    "OffDiagonal",
    "Row",
    "esd",
    "flow_matching",
    "improved_mean_flow",
    "lsd",
    "mean_flow",
    "psd_m",
    "psd_u",
    "sequence",
    "velocities",
]
