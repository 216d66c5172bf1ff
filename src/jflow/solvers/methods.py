"""The named solvers as Diffrax objects, and the number of velocity evaluations of each kind of solver.

Diffrax is imported on first use.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jflow import trees
from jflow.types import Array, Event

if TYPE_CHECKING:
    import diffrax

# The Diffrax class of each name, or None for a solver of this module.
_CLASSES = {
    "euler": "Euler",
    "heun": "Heun",
    "midpoint": None,
    "rk4": None,
    "tsit5": "Tsit5",
    "dopri5": "Dopri5",
    "dopri8": "Dopri8",
}
SOLVERS = tuple(_CLASSES)
ADAPTIVE = ("tsit5", "dopri5", "dopri8")


class Cost(NamedTuple):
    """The number of velocity evaluations of a solver.

    Attributes:
      start: evaluations before the first step.
      step: evaluations per step, accepted or rejected.
      restart: additional evaluations of a step that cannot reuse a stage of the previous step: after a jump in the velocity
        and, if ``start`` is 0, at the start, until a step is accepted.
    """

    start: int
    step: int
    restart: int


def named(name: str) -> diffrax.AbstractSolver:
    """Returns the Diffrax solver of a name in ``SOLVERS``."""
    import diffrax

    if name == "midpoint":
        return _midpoint()()
    if name == "rk4":
        return _rk4()()
    return getattr(diffrax, str(_CLASSES[name]))()


def cost(solver: diffrax.AbstractSolver) -> Cost | None:
    """Returns the number of evaluations of a solver, or None for implicit and user-defined solvers, where it is not known.

    For explicit Runge-Kutta methods it follows from the tableau: a method whose first stage is the last stage of the previous
    step (first same as last) reuses it.
    """
    import diffrax

    if type(solver) is diffrax.HalfSolver:
        # One full step and two half steps; the second half reuses a stage of the first.
        inner = cost(solver.solver)
        return None if inner is None else Cost(inner.start, 3 * inner.step, 2 * inner.restart)
    if type(solver) is diffrax.ReversibleHeun:
        return Cost(start=1, step=1, restart=1)
    if type(solver) in (diffrax.Euler, diffrax.LeapfrogMidpoint):
        return Cost(start=0, step=1, restart=0)
    if isinstance(solver, _midpoint()):
        return Cost(start=0, step=2, restart=0)
    tableau = _explicit_tableau(solver)
    if tableau is None or type(solver).step is not diffrax.AbstractERK.step:
        return None
    inherited = int(tableau.fsal)
    return Cost(start=0, step=tableau.num_stages - inherited, restart=inherited)


def estimates_error(solver: diffrax.AbstractSolver) -> bool:
    """Returns whether a solver gives the error estimate that an adaptive controller needs."""
    import diffrax

    if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        return False
    tableau = _explicit_tableau(solver)
    return tableau is None or bool(np.any(tableau.b_error))


def _explicit_tableau(solver: diffrax.AbstractSolver) -> diffrax.ButcherTableau | None:
    import diffrax

    # A HalfSolver is an instance of the class of the solver that it wraps, but it has no tableau.
    tableau = getattr(solver, "tableau", None) if isinstance(solver, diffrax.AbstractERK) else None
    return tableau if isinstance(tableau, diffrax.ButcherTableau) and not tableau.implicit else None


@functools.cache
def _rk4() -> type[diffrax.AbstractERK]:
    """The classical Runge-Kutta method of order 4. It has four stages and no error estimate, so it needs fixed steps."""
    import diffrax

    class RK4(diffrax.AbstractERK):
        tableau = diffrax.ButcherTableau(
            c=np.array([0.5, 0.5, 1.0]),
            b_sol=np.array([1.0, 2.0, 2.0, 1.0]) / 6.0,
            b_error=np.zeros(4),
            a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        )
        interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

        def order(self, terms: diffrax.AbstractTerm) -> int:
            return 4

    return RK4


@functools.cache
def _midpoint() -> type[diffrax.AbstractSolver]:
    """The midpoint rule with its two stages written out; Diffrax's own implementation loops over them.

    The second stage depends only on the point of the first stage. The compiler therefore removes everything else that the
    first stage computes: for a log-density along the solve, half of the divergences.
    """
    import diffrax

    class Midpoint(diffrax.AbstractSolver):
        term_structure = diffrax.AbstractTerm
        interpolation_cls = diffrax.LocalLinearInterpolation

        def order(self, terms: diffrax.AbstractTerm) -> int:
            return 2

        def init(self, terms: diffrax.AbstractTerm, t0: Array, t1: Array, y0: Event, args: Any) -> None:
            return None

        def step(
            self,
            terms: diffrax.AbstractTerm,
            t0: Array,
            t1: Array,
            y0: Event,
            args: Any,
            solver_state: None,
            made_jump: bool | Array,
        ) -> tuple[Event, None, dict[str, Event], None, diffrax.RESULTS]:
            half = t0 + 0.5 * (t1 - t0)
            middle = trees.axpy(1.0, terms.vf_prod(t0, y0, args, terms.contr(t0, half)), y0)
            y1 = trees.axpy(1.0, terms.vf_prod(half, middle, args, terms.contr(t0, t1)), y0)
            return y1, None, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful

        def func(self, terms: diffrax.AbstractTerm, t0: Array, y0: Event, args: Any) -> Event:
            return terms.vf(t0, y0, args)

    return Midpoint
