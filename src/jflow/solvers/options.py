"""The options of a solve: names or Diffrax objects. They are checked on creation; Diffrax is imported only for objects."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack

import jax
import numpy as np

from jflow import checks
from jflow.solvers import adjoints, methods

if TYPE_CHECKING:
    import diffrax

SolverLike: TypeAlias = "str | diffrax.AbstractSolver"
AdjointLike: TypeAlias = "str | diffrax.AbstractAdjoint"


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of an ODE solve. A solve runs in rescaled time, from 0 at s to 1 at t.

    Attributes:
      solver: "euler", "heun", "midpoint", "rk4" (orders 1, 2, 2, 4; fixed steps), "tsit5", "dopri5" or "dopri8" (orders 5, 5,
        8; adaptive, or fixed if ``steps`` is given); or a Diffrax solver of one ODE term, explicit or implicit. A
        Diffrax solver without ``steps`` or controller is adaptive and must estimate its error.
      steps: the number of equal steps; not together with tolerances.
      rtol: the relative tolerance on the mean velocity, per sample and step; by default 1e-8 for x in float64, else 1e-5.
      atol: the absolute tolerance on the mean velocity; by default equal to ``rtol``. The error of the jump is smaller by the
        factor abs(t - s).
      stepsize_controller: a Diffrax controller instead of ``rtol`` and ``atol``: ``PIDController``,
        ``ClipStepSizeController`` or another ``AbstractAdaptiveStepSizeController``, whose first step is ``FIRST_STEP``;
        ``ConstantStepSize`` together with ``steps``; or ``StepTo`` from 0.0 to 1.0, which Diffrax checks in a host
        callback. Its times and step sizes are in rescaled time.
      max_steps: the largest number of steps, accepted or rejected, of an adaptive solve. It has no effect on fixed steps.
      adjoint: the method of differentiation, by default "direct" for fixed steps and "forward" for adaptive ones.
        "forward" supports ``jax.jvp`` only. "direct" supports both modes, with memory for ``max_steps`` steps. "recursive"
        supports ``jax.grad`` only, by checkpointing. "backsolve" supports ``jax.grad`` only, by solving the adjoint equation
        backward (1806.07366), in constant memory; its error is of the order of the tolerance or the steps, and it
        differentiates only with respect to the velocity's arguments, not closed-over values. A backward solve of more than
        ``max_steps`` raises an error from a host callback in the gradient's program. It may also be a Diffrax adjoint.

    Raises:
      ValueError: if a name is unknown, steps are missing, steps or tolerances are combined with a controller that has its
        own, a tolerance is not positive or above 1, the adjoint does not support the solve, or the solver does not: it has
        several terms, no error estimate for adaptive steps, or a root finder without tolerances for fixed steps.
      TypeError: if a value has a wrong type, or a Diffrax class is given instead of an instance.
    """

    solver: SolverLike = "tsit5"
    _: dataclasses.KW_ONLY
    steps: int | None = None
    rtol: float | None = None
    atol: float | None = None
    stepsize_controller: diffrax.AbstractStepSizeController | None = None
    max_steps: int = 4096
    adjoint: AdjointLike | None = None

    def __post_init__(self) -> None:
        _check_kind("solver", self.solver, methods.SOLVERS, "AbstractSolver")
        if self.adjoint is not None:
            _check_kind("adjoint", self.adjoint, adjoints.ADJOINTS, "AbstractAdjoint")
        if self.steps is not None:
            checks.integer("steps", self.steps, low=1)
        checks.integer("max_steps", self.max_steps, low=1)
        for name in ("rtol", "atol"):
            if getattr(self, name) is not None:
                self._check_tolerance(name, getattr(self, name))
        if self.stepsize_controller is not None:
            self._check_controller()
        elif self.steps is None and not self._adapts_alone():
            raise ValueError(f"steps: expected a number of steps, which solver {self.name!r} needs, got None")
        self._check_objects()

    @property
    def name(self) -> str:
        """The solver's name in error messages."""
        return self.solver if isinstance(self.solver, str) else type(self.solver).__name__

    @property
    def fixed_steps(self) -> int | None:
        """The number of steps if it is fixed; None for an adaptive solve."""
        if self.steps is not None or self.stepsize_controller is None:
            return self.steps
        import diffrax

        controller = self.stepsize_controller
        return controller.ts.shape[0] - 1 if isinstance(controller, diffrax.StepTo) else None

    @property
    def differentiation(self) -> AdjointLike:
        """The adjoint; if none was given, the name of the default."""
        if self.adjoint is not None:
            return self.adjoint
        return "forward" if self.fixed_steps is None else "direct"

    @property
    def has_reverse(self) -> bool:
        """Whether ``jax.grad`` can differentiate the solve."""
        return adjoints.has_reverse(self.differentiation)

    def make_solver(self) -> diffrax.AbstractSolver:
        """Returns the solver as a Diffrax object."""
        return methods.named(self.solver) if isinstance(self.solver, str) else self.solver

    def _adapts_alone(self) -> bool:
        if isinstance(self.solver, str):
            return self.solver in methods.ADAPTIVE
        return methods.estimates_error(self.solver)

    def _check_tolerance(self, name: str, value: float) -> None:
        if self.stepsize_controller is not None:
            kind = type(self.stepsize_controller).__name__
            raise ValueError(f"{name}: expected None together with a stepsize_controller ({kind}), got {value!r}")
        if self.steps is not None:
            raise ValueError(f"{name}: expected None with fixed steps (steps={self.steps}), got {value!r}")
        checks.number(name, value, low=0.0, high=1.0, open_low=True)

    def _check_controller(self) -> None:
        import diffrax

        controller, solver = self.stepsize_controller, self.make_solver()
        _check_kind("stepsize_controller", controller, (), "AbstractStepSizeController")
        kind = type(controller).__name__
        if isinstance(controller, diffrax.ConstantStepSize):
            if self.steps is None:
                raise ValueError("steps: expected a number of steps, which ConstantStepSize needs, got None")
            return
        if self.steps is not None:
            raise ValueError(f"steps: expected None together with {kind}, got {self.steps}")
        if isinstance(controller, diffrax.StepTo):
            times = checks.concrete(controller.ts)
            if times is not None and not (times[0] == 0.0 and times[-1] == 1.0 and np.all(np.diff(times) > 0.0)):
                raise ValueError(
                    "stepsize_controller: expected StepTo with strictly increasing times from 0 to 1, in rescaled time, "
                    f"got {times}"
                )
        elif not isinstance(controller, diffrax.AbstractAdaptiveStepSizeController):
            raise TypeError(
                "stepsize_controller: expected ConstantStepSize, StepTo or an AbstractAdaptiveStepSizeController, "
                f"got {kind}"
            )
        elif not methods.estimates_error(solver):
            raise ValueError(
                f"stepsize_controller: expected fixed steps with solver {self.name!r}, which estimates no error, got {kind}"
            )

    def _check_objects(self) -> None:
        """Checks that the Diffrax objects are compatible."""
        if not isinstance(self.solver, str):
            _check_solver(self.solver, self.name, self.fixed_steps is not None)
        if any(not isinstance(each, str | None) for each in (self.solver, self.stepsize_controller, self.adjoint)):
            on_grid = self.steps is None and self.fixed_steps is not None
            _check_adjoint(self.differentiation, self.make_solver(), on_grid)


class Choices(TypedDict, total=False):
    """The keywords of every function that solves: the fields of ``Options`` except the solver, or only ``options``."""

    steps: int | None
    rtol: float | None
    atol: float | None
    stepsize_controller: diffrax.AbstractStepSizeController | None
    max_steps: int
    adjoint: AdjointLike | None
    options: Options | None


def choose(solver: SolverLike | None, choices: Choices, **defaults: Unpack[Choices]) -> Options:
    """Returns the Options that a caller gave, as an object or as keywords.

    Args:
      solver: the solver, or None if it was not given.
      choices: the other keywords.
      defaults: the values of fields that were not given; ignored if ``options`` is given.

    Raises:
      ValueError: as ``Options``, and if ``options`` is given together with another choice.
      TypeError: as ``Options``, and if a keyword is unknown or ``options`` is not an Options.
    """
    fields = dict(choices)
    options = fields.pop("options", None)
    if solver is not None:
        fields["solver"] = solver
    known = [field.name for field in dataclasses.fields(Options)]
    for name in fields:
        if name not in known:
            raise TypeError(
                f"{name}: expected one of the choices {', '.join(known)}, options; got {name}={fields[name]!r}"
            )
    if options is None:
        given: dict[str, Any] = {**defaults, **fields}
        return Options(**given)
    if not isinstance(options, Options):
        raise TypeError(f"options: expected solvers.Options, got {type(options).__name__}")
    if fields:
        raise ValueError(f"options: expected no other choice beside options, got {', '.join(sorted(fields))}")
    return options


def _check_kind(name: str, value: Any, names: tuple[str, ...], base: str) -> None:
    """Raises an error if the value is neither an allowed name nor an instance of a Diffrax base class."""
    if isinstance(value, str) and names:
        checks.choice(name, value, names)
        return
    import diffrax

    expected = f"{'a name or ' if names else ''}an instance of diffrax.{base}"
    if isinstance(value, type):
        raise TypeError(
            f"{name}: expected {expected}, got the class {value.__name__}; an instance is {value.__name__}(...)"
        )
    if not isinstance(value, getattr(diffrax, base)):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__} {value!r}")


def _check_solver(solver: diffrax.AbstractSolver, name: str, fixed: bool) -> None:
    import diffrax

    structure = typing.get_origin(solver.term_structure) or solver.term_structure
    if not (isinstance(structure, type) and issubclass(diffrax.ODETerm, structure)):
        raise ValueError(
            f"solver: expected a solver of one ODE term, got {name}, whose terms are {solver.term_structure}"
        )
    if fixed and type(solver) is diffrax.HalfSolver:
        raise ValueError(
            "solver: expected the solver inside HalfSolver for fixed steps, with twice their number; got HalfSolver, whose "
            "error estimate would be of no use"
        )
    if fixed and isinstance(solver, diffrax.AbstractImplicitSolver):
        tolerances = (getattr(solver.root_finder, key, 0.0) for key in ("rtol", "atol"))
        if not all(isinstance(value, float | int | np.ndarray | np.number | jax.Array) for value in tolerances):
            raise ValueError(
                f"solver: expected a root finder with tolerances of its own for the implicit {name} at fixed steps, got none; "
                "give root_finder=diffrax.VeryChord(rtol=..., atol=..., norm=...), or no steps"
            )


def _check_adjoint(adjoint: AdjointLike, solver: diffrax.AbstractSolver, on_grid: bool) -> None:
    import diffrax

    made = adjoints.make(adjoint)
    name = type(made).__name__
    if isinstance(made, diffrax.ImplicitAdjoint):
        raise ValueError(
            "adjoint: expected an adjoint of a solve over a fixed time, got ImplicitAdjoint, of steady states"
        )
    if on_grid and isinstance(made, diffrax.BacksolveAdjoint):
        raise ValueError(
            "adjoint: expected another adjoint with StepTo, whose times do not run backward, got BacksolveAdjoint"
        )
    wrapped = isinstance(solver, diffrax.AbstractRungeKutta) and not hasattr(solver, "scan_kind")
    if wrapped and isinstance(made, diffrax.ForwardMode | diffrax.DirectAdjoint):
        raise ValueError(
            f"adjoint: expected 'recursive' or 'backsolve' with {type(solver).__name__} around a Runge-Kutta solver, "
            f"got {name}; Diffrax has no forward mode for it"
        )
