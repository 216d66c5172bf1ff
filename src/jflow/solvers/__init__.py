"""Diffrax solves of any Velocity: as a FlowMap, as a trajectory, and as an SDE with the same marginals."""

from jflow.solvers.ode import (
    ADAPTIVE,
    ADJOINTS,
    FIRST_STEP,
    METHODS,
    SolveStats,
    solve,
    solve_counted,
    tolerance_floor,
    trajectory,
)
from jflow.solvers.stochastic import SDE_METHODS, sde, sde_step

__all__ = [
    "ADAPTIVE",
    "ADJOINTS",
    "FIRST_STEP",
    "METHODS",
    "SDE_METHODS",
    "SolveStats",
    "sde",
    "sde_step",
    "solve",
    "solve_counted",
    "tolerance_floor",
    "trajectory",
]
