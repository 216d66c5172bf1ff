r"""Samplers: draw samples with a bound flow map, which may be learned, solved or exact.

- ``Jumps`` applies the map between the times of a grid: :math:`x_{k+1} = X_{t_k, t_{k+1}}(x_k)`.
- ``Renoise`` jumps beyond the next time and adds new noise.
- ``SDE`` simulates the stochastic process with the same marginals, with the velocity on the map's diagonal.

Each sampler is an object with ``init`` and ``step``. ``run`` applies it along a grid of times in [0, 1]. The functions
``jumps``, ``renoise``, ``sde`` and their ``_path`` variants call ``run`` and ``run_path``, all with the arguments ``(bound,
x0, grid, cond=None, *, ...)``. ``encode`` maps data to noise. These functions take one sample (a pytree); use ``jax.vmap``
over x0 and keys. ``draw`` makes any number of samples. For a deterministic baseline of K small steps, use
``solvers.solve(velocity, "euler", steps=K)``.
"""

from __future__ import annotations

from collections.abc import Callable

from jflow.interpolants import Interpolant
from jflow.samplers.diffusing import SDE, sde, sde_path
from jflow.samplers.drawing import draw
from jflow.samplers.jumping import Jumps, encode, jumps, jumps_path
from jflow.samplers.renoising import Renoise, RenoisePlan, renoise, renoise_path, renoise_plan
from jflow.samplers.steps import Grid, Info, Sampler, State, run, run_path, uniform_grid
from jflow.types import BoundFlowMap, Key

# Functions (bound, interpolant) -> Sampler by name, for run(sampler, key, x0, grid, cond=None).
SAMPLERS: dict[str, Callable[[BoundFlowMap, Interpolant], Sampler[Key]]] = {
    "jumps": lambda bound, interpolant: Jumps(bound),
    "renoise": lambda bound, interpolant: Renoise(bound, interpolant, kappa=0.5),
    "consistency": lambda bound, interpolant: Renoise(bound, interpolant, kappa=1.0),
    "sde": lambda bound, interpolant: SDE(bound, interpolant),
}

__all__ = [
    "SAMPLERS",
    "SDE",
    "Grid",
    "Info",
    "Jumps",
    "Renoise",
    "RenoisePlan",
    "Sampler",
    "State",
    "draw",
    "encode",
    "jumps",
    "jumps_path",
    "renoise",
    "renoise_path",
    "renoise_plan",
    "run",
    "run_path",
    "sde",
    "sde_path",
    "uniform_grid",
]
