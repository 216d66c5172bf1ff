r"""Samplers: one sample through a bound flow map, learned, solved or exact.

The samplers::

    Jumps    x_{k+1} = X_{t_k, t_{k+1}}(x_k)
    Renoise  x_t = (beta_t/beta_{t+}) X_{s,t+}(x_s) + new noise,  with t+ > t on the same path
    SDE      the stochastic process with the same marginals, from the diagonal

Each is an object with ``init`` and ``step``. ``run`` steps it along a grid of times in [0, 1], from each time to the next.
``jumps``, ``renoise``, ``sde`` and their ``_path`` call ``run`` and ``run_path``, all with the arguments ``(bound, x0, grid,
cond=None, *, ...)``; ``encode`` goes from data to noise. Functions take one sample (a pytree), and callers ``jax.vmap`` over x0
and keys; ``draw`` makes any number. For a deterministic baseline of K small steps, use ``solvers.solve(velocity, "euler",
steps=K)``.
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

# name -> maker: (bound, interpolant) -> Sampler, for run(sampler, key, x0, grid, cond=None).
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
