"""Solves the ODE of any Velocity with Diffrax: as a FlowMap, as a trajectory, or as an SDE with the same marginals."""

from jflow.solvers.adjoints import ADJOINTS
from jflow.solvers.methods import ADAPTIVE, SOLVERS
from jflow.solvers.ode import (
    FIRST_STEP,
    CountedSolve,
    SolveStats,
    solve,
    solve_counted,
    tolerance_floor,
    trajectory,
)
from jflow.solvers.options import AdjointLike, Choices, Options, SolverLike, choose
from jflow.solvers.stochastic import SDE_METHODS, sde, sde_step

__all__ = [
    "ADAPTIVE",
    "ADJOINTS",
    "FIRST_STEP",
    "SDE_METHODS",
    "SOLVERS",
    "AdjointLike",
    "Choices",
    "CountedSolve",
    "Options",
    "SolveStats",
    "SolverLike",
    "choose",
    "sde",
    "sde_step",
    "solve",
    "solve_counted",
    "tolerance_floor",
    "trajectory",
]
