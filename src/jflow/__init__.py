"""jflow: flow maps defined, trained, trusted and measured.

A flow map X_{s,t} takes the state of a probability-flow ODE at time s to its state at time t in one network call. See
``jflow.types`` for the two types and the time convention (t = 0 base, t = 1 data), and the README for an example.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jflow import (
    bases,
    conditions,
    conventions,
    couplings,
    domains,
    flops,
    guidance,
    identities,
    interpolants,
    objectives,
    parameterizations,
    reductions,
    reports,
    sharding,
    times,
    types,
)
from jflow.objectives import Objective
from jflow.parameterizations import flow_map
from jflow.types import Aux, Batch, BoundFlowMap, Context, Domain, FlowMap, Velocity

if TYPE_CHECKING:
    from jflow import (
        comparison,
        datasets,
        diagnostics,
        likelihood,
        metrics,
        nets,
        oracles,
        plots,
        sample,
        samplers,
        solvers,
        testing,
        training,
    )

__version__ = "0.2.0"

# Loaded at first use: they bring flax, diffrax, orbax or the like.
_LAZY = (
    "comparison",
    "datasets",
    "diagnostics",
    "likelihood",
    "metrics",
    "nets",
    "oracles",
    "plots",
    "sample",
    "samplers",
    "solvers",
    "testing",
    "training",
)

__all__ = [
    "Aux",
    "Batch",
    "BoundFlowMap",
    "Context",
    "Domain",
    "FlowMap",
    "Objective",
    "Velocity",
    "bases",
    "comparison",
    "conditions",
    "conventions",
    "couplings",
    "datasets",
    "diagnostics",
    "domains",
    "flops",
    "flow_map",
    "guidance",
    "identities",
    "interpolants",
    "likelihood",
    "metrics",
    "nets",
    "objectives",
    "oracles",
    "parameterizations",
    "plots",
    "reductions",
    "reports",
    "sample",
    "samplers",
    "sharding",
    "solvers",
    "testing",
    "times",
    "training",
    "types",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"jflow.{name}")
    raise AttributeError(f"module 'jflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
