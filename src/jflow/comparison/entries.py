"""Entries of a comparison: a model with its parameters, and how it is run from noise to data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jflow import checks, samplers, trees
from jflow import solvers as solving
from jflow.named import described
from jflow.samplers import Sampler
from jflow.solvers import Options, SolverLike
from jflow.types import Array, BoundFlowMap, Cond, Event, FlowMap, Key, Params, Velocity, as_flow_map, as_velocity

STEPS = (1, 2, 4, 8)
TOLERANCES = (1e-1, 1e-2, 1e-3)

MakeSampler = Callable[[BoundFlowMap], Sampler[Any]]


class RunFn(Protocol):
    """A function that takes one sample from noise to data, and may count the evaluations of the velocity."""

    def __call__(self, params: Params, key: Key | None, x0: Event, cond: Cond) -> tuple[Event, Array | None]:
        """The end point, and the number of evaluations, or None if ``Way.calls`` gives it."""
        ...


@dataclasses.dataclass(frozen=True)
class Way:
    """One way from noise to data, which is a row of the table.

    Attributes:
      name: the name of the row.
      kind: "map" (jumps), "solver" or "sampler".
      run: the function that takes one sample to the data.
      unit: ``(params, key, x0, cond)``, the program that is called ``units`` times per sample; its FLOPs are counted.
      units: the number of calls of ``unit``; None if it is the number of evaluations that ``run`` counts.
      calls: ``(params, key, x0, cond) -> calls of the model``; None if ``run`` counts them.
    """

    name: str
    kind: str
    run: RunFn
    unit: Callable[[Params, Key | None, Event, Cond], Any]
    units: int | None = None
    calls: Callable[[Params, Key | None, Event, Cond], Array | int] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """A model and how it is run: one line of the figure, with a row of the table for each number of steps or tolerance.

    For example::

        Entry("map", flow_map, params)                                      1, 2, 4 and 8 jumps
        Entry("euler", velocity, params, solver="euler", steps=(8, 100))    solves of fixed steps
        Entry("tsit5", flow_map, params, solver="tsit5", tolerances=(1e-2, 1e-4))
        Entry("sde", velocity, params, sampler=lambda bound: samplers.SDE(bound, interpolant), steps=(50,), key=key)

    Attributes:
      name: the name of the entry. The name of a row consists of it and the number of steps or the tolerance.
      model: a FlowMap (learned, solved or exact), or a Velocity, which needs a solver or a sampler. A jump of a FlowMap
        counts as one call of the model; to count the evaluations inside a solve, pass its velocity and a solver.
      params: the model's parameters.
      solver: a name or a Diffrax solver, with ``steps`` or ``tolerances``; or ``solvers.Options``, which makes one row. For
        a FlowMap the diagonal is solved. None for jumps.
      sampler: ``bound flow map -> sampler``, run with equal steps from 0 to 1. None for jumps.
      steps: the numbers of equal jumps or steps, one row for each; by default (1, 2, 4, 8) if there are no tolerances.
      tolerances: the tolerances, both relative and absolute, of adaptive solves, one row for each.
      cond: conditioning of each sample, leaves ``[N, ...]``; None for that of ``compare``.
      key: a PRNG key for models and samplers that draw random numbers, or None. Sample i gets ``fold_in(key, i)``.

    Raises:
      ValueError: if steps are outside the map's domain, a solver is given together with a sampler, a Velocity has neither,
        steps or tolerances have no effect, a sampler has no key, and as ``solvers.Options``. The message names the field.
      TypeError: if a field has the wrong type.

    Example:
      >>> from jflow import FlowMap, comparison
      >>> flow_map = FlowMap(lambda params, s, t, x, cond=None, *, key=None: x)
      >>> entry = comparison.Entry("map", flow_map, steps=(1, 2))
      >>> entry.name, entry.steps
      ('map', (1, 2))
    """

    name: str
    model: FlowMap | Velocity
    params: Params = None
    _: dataclasses.KW_ONLY
    solver: SolverLike | Options | None = None
    sampler: MakeSampler | None = None
    steps: Sequence[int] | None = None
    tolerances: Sequence[float] = ()
    cond: Cond = None
    key: Key | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name: expected a string, got {described(self.name)}")
        velocity = as_velocity("model", self.model)
        if not isinstance(self.model, FlowMap):
            object.__setattr__(self, "model", velocity)
        if self.key is not None:
            checks.key("key", self.key)
        if self.solver is not None and self.sampler is not None:
            raise ValueError("solver, sampler: expected at most one of them")
        if not isinstance(self.model, FlowMap) and self.solver is None and self.sampler is None:
            raise ValueError("solver: expected a solver or a sampler for a Velocity, which has no jumps, got None")
        if self.tolerances and (self.solver is None or isinstance(self.solver, Options)):
            raise ValueError(f"tolerances: expected none without a solver that takes them, got {self.tolerances}")
        if self.steps is not None and isinstance(self.solver, Options):
            raise ValueError(f"steps: expected None beside Options, which have their own, got {self.steps}")
        if self.sampler is not None:
            checks.function("sampler", self.sampler, "(bound) -> sampler")
            if self.key is None:
                raise ValueError("key: expected a PRNG key for a sampler, got None")
        steps = (() if self.tolerances else STEPS) if self.steps is None else tuple(self.steps)
        for n in steps:
            checks.integer("steps", n, low=1)
        if not steps and not self.tolerances:
            raise ValueError("steps, tolerances: expected at least one number, got none")
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "tolerances", tuple(self.tolerances))
        # Check that every way can be run, before anything is compiled.
        self.ways()

    def ways(self) -> list[Way]:
        """The rows of the entry."""
        return list(self._ways())

    def _ways(self) -> Iterator[Way]:
        steps = self.steps or ()
        if isinstance(self.solver, Options):
            yield self._solve(self.name, self.solver)
        elif self.solver is not None:
            for n in steps:
                yield self._solve(f"{self.name}, {_plural(n, 'step')}", Options(self.solver, steps=n))
            for tol in self.tolerances:
                checks.number("tolerances", tol, low=0.0, open_low=True)
                yield self._solve(f"{self.name}, tolerance {tol:g}", Options(self.solver, rtol=tol, atol=tol))
        elif self.sampler is not None:
            for n in steps:
                yield self._sample(f"{self.name}, {_plural(n, 'step')}", n, self.sampler)
        else:
            for n in steps:
                yield self._jump(f"{self.name}, {_plural(n, 'jump')}", n)

    def _jump(self, name: str, jumps: int) -> Way:
        flow_map, grid = as_flow_map("model", self.model), samplers.uniform_grid(jumps)
        try:
            flow_map.domain.check_grid(grid)
        except ValueError as error:
            raise ValueError(
                f"steps: expected numbers of equal jumps within the map's domain, got {jumps}; {error}"
            ) from None

        def run(params: Params, key: Key | None, x0: Event, cond: Cond) -> tuple[Event, None]:
            return samplers.jumps(flow_map.bind(params), x0, grid, cond, key=key), None

        def jump(params: Params, key: Key | None, x0: Event, cond: Cond) -> Event:
            return flow_map.jump(params, _time(0.0, x0), _time(1.0, x0), x0, cond, key=key)

        return Way(name, "map", run, jump, units=jumps, calls=lambda *_: jumps)

    def _solve(self, name: str, options: Options) -> Way:
        velocity = as_velocity("model", self.model)
        count = solving.solve_counted(velocity, options=options)

        def run(params: Params, key: Key | None, x0: Event, cond: Cond) -> tuple[Event, Array | None]:
            v, stats = count(params, 0.0, 1.0, x0, cond, key=key)
            return trees.axpy(1.0, v, x0), stats.nfe

        def evaluate(params: Params, key: Key | None, x0: Event, cond: Cond) -> Event:
            return velocity(params, _time(0.5, x0), x0, cond, key=key)

        return Way(name, "solver", run, evaluate)

    def _sample(self, name: str, steps: int, make: MakeSampler) -> Way:
        flow_map, grid = as_flow_map("model", self.model), samplers.uniform_grid(steps)
        make(flow_map.bind(self.params)).check(grid)

        def run(params: Params, key: Key | None, x0: Event, cond: Cond) -> tuple[Event, None]:
            return samplers.run(make(flow_map.bind(params)), key, x0, grid, cond), None

        def step(params: Params, key: Key | None, x0: Event, cond: Cond) -> Event:
            sampler = make(flow_map.bind(params))
            return sampler.step(key, sampler.init(x0, _time(0.0, x0), cond), _time(1.0 / steps, x0))[0].x

        @jax.jit
        def calls(params: Params, key: Key | None, x0: Event, cond: Cond) -> Array:
            info = samplers.run_path(make(flow_map.bind(params)), key, x0, grid, cond)[1]
            return jnp.sum(info.calls)

        return Way(name, "sampler", run, step, units=steps, calls=calls)


def solved(
    model: FlowMap | Velocity,
    params: Params = None,
    *,
    solvers: Sequence[str] = ("euler", "heun", "tsit5"),
    steps: Sequence[int] = (1, 2, 4, 8, 16, 32, 100),
    tolerances: Sequence[float] = TOLERANCES,
    cond: Cond = None,
    key: Key | None = None,
) -> list[Entry]:
    """Makes entries that solve a velocity, or the diagonal of a FlowMap, with several solvers.

    Args:
      model, params, cond, key: as in ``Entry``.
      solvers: names in ``solvers.SOLVERS``; each makes an entry with this name.
      steps: the numbers of fixed steps, for solvers without an error estimate (not in ``solvers.ADAPTIVE``).
      tolerances: the tolerances, for adaptive solvers (in ``solvers.ADAPTIVE``).

    Raises:
      ValueError: as ``Entry``, and if a name is unknown.
      TypeError: as ``Entry``.
    """
    found = []
    for name in solvers:
        checks.choice("solvers", name, solving.SOLVERS)
        choice: dict[str, Any] = {"tolerances": tolerances} if name in solving.ADAPTIVE else {"steps": steps}
        found.append(Entry(name, model, params, solver=name, cond=cond, key=key, **choice))
    return found


def _time(t: float, x: Event) -> Array:
    return jnp.asarray(t, trees.at_least_float32(x))


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'s' if n > 1 else ''}"
