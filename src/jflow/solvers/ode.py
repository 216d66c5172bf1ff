r"""Solves the ODE of any Velocity with Diffrax, as a FlowMap or as a trajectory.

The mean velocity is the final value of an ODE in rescaled time (see ``solve``). The ODE is valid for s < t, s > t and s = t,
and the derivatives in s, t and x are correct on the diagonal.

A solve that does not finish under ``jit``, ``vmap`` or differentiation returns NaN, and ``SolveStats.success`` is False. The
compiled program therefore needs no host callback and returns no wrong numbers.

Diffrax is imported on first use.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks, trees
from jflow.solvers import adjoints, methods
from jflow.solvers.counting import Count, counting
from jflow.solvers.options import Choices, Options, SolverLike, choose
from jflow.types import BOTH, Array, Cond, Domain, Event, FlowMap, Key, Params, Time, Velocity

if TYPE_CHECKING:
    import diffrax

# The first step of an adaptive solve in rescaled time. Diffrax's own choice costs evaluations, or starts at 0.01.
FIRST_STEP = 0.1


class SolveStats(NamedTuple):
    """The cost and the outcome of one sample's solve; scalars.

    Attributes:
      nfe: the number of velocity evaluations, int32: the stages of accepted and rejected steps, without stages reused from
        the previous step. A vmapped batch runs as long as its slowest sample. None if the number is not known: for implicit
        solvers, whose root finder also evaluates the velocity, and for user-defined solvers other than an ``AbstractERK``,
        which is counted by its tableau.
      steps: the number of steps, accepted or rejected, int32.
      rejected: the number of rejected steps, int32.
      success: whether the end was reached within ``max_steps``, bool.
    """

    nfe: Array | None
    steps: Array
    rejected: Array
    success: Array


class CountedSolve(Protocol):
    """A function that returns the mean velocity of one sample together with the cost of the solve."""

    def __call__(
        self, params: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None
    ) -> tuple[Event, SolveStats]:
        """Returns the mean velocity v_{s,t}(x), shaped like x, and the SolveStats."""
        ...


def tolerance_floor(dtype: jax.typing.DTypeLike) -> float:
    """Returns the smallest tolerance that a solve in this dtype can reach: 16 times the machine epsilon."""
    return 16.0 * float(jnp.finfo(dtype).eps)


def solve(
    velocity: Velocity, solver: SolverLike | None = None, *, domain: Domain = BOTH, **choices: Unpack[Choices]
) -> FlowMap:
    r"""Returns the flow map of a velocity, computed by an ODE solve in rescaled time.

    The mean velocity is the final value of the following ODE, which needs no division by t - s:

    .. math::
        \frac{dy}{d\tau} = b_{s + \tau (t-s)}\big( x + (t-s)\, y \big), \quad y(0) = 0, \quad \tau \in [0, 1], \qquad
        v_{s,t}(x) = y(1).

    If a solve does not reach its end within ``max_steps``, a call outside ``jit`` raises RuntimeError. Under ``jit``,
    ``vmap`` or differentiation, the result and its derivatives are NaN instead.

    For example::

        solve(velocity)                                     # adaptive, Tsit5, at the default tolerance
        solve(velocity, "euler", steps=10)
        solve(velocity, diffrax.Tsit5(), stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-8))
        solve(velocity, options=solvers.Options("heun", steps=8, adjoint="recursive"))

    The velocity is called with x in its own dtypes and with a time in the widest of them (at least float32). The solver's
    state is kept in jax's default float, and the result has the dtypes of x. ``FlowMap.velocity`` calls the velocity
    directly. A jump with s = t also returns it, but costs a solve.

    Args:
      velocity: ``(params, t, x, cond=None, *, key=None) -> b_t(x)`` for one sample. The whole solve uses one ``key``.
      solver: a name or a Diffrax solver, by default "tsit5"; see ``Options``.
      domain: the domain of the FlowMap.
      **choices: steps, rtol, atol, stepsize_controller, max_steps, adjoint, as in ``Options``; or only ``options``.

    Returns:
      The FlowMap. Its params are the velocity's.

    Raises:
      ValueError: as ``Options``; when called, if a tolerance is finer than the dtype allows, or s or t is not a scalar in
        [0, 1]; from ``jax.grad``, if the solve has no reverse mode.
      TypeError: as ``Options``; when called, if x is not floating-point, or if an un-jitted ``jax.jvp`` meets an adjoint or a
        velocity without a forward mode.
      RuntimeError: outside ``jit``, if the solve fails, for example because it needs more than ``max_steps``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import solvers
      >>> flow_map = solvers.solve(lambda params, t, x, cond=None, *, key=None: -x, "heun", steps=16)
      >>> round(float(flow_map.jump(None, 0.0, 1.0, jnp.ones(1, jnp.float32))[0]), 3)
      0.368
    """
    counted = solve_counted(velocity, solver, **choices)

    def mean_velocity(
        params: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None
    ) -> Event:
        return counted(params, s, t, x, cond, key=key)[0]

    return FlowMap(mean_velocity, domain=domain, velocity_override=velocity)


def solve_counted(velocity: Velocity, solver: SolverLike | None = None, **choices: Unpack[Choices]) -> CountedSolve:
    """Returns the mean velocity of ``solve`` as a function that also returns the exact cost of each solve.

    The arguments and errors are those of ``solve``.

    Returns:
      ``(params, s, t, x, cond=None, *, key=None) -> (v_{s,t}(x), SolveStats)``.
    """
    solve_ode = _Solve(check_velocity(velocity), choose(solver, choices))

    def counted(
        params: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None
    ) -> tuple[Event, SolveStats]:
        return solve_ode.mean_velocity(params, s, t, x, cond, key)

    return counted


def trajectory(
    velocity: Velocity,
    params: Params,
    times: Array | np.ndarray,
    x: Event,
    cond: Cond = None,
    *,
    solver: SolverLike | None = None,
    key: Key | None = None,
    **choices: Unpack[Choices],
) -> Event:
    r"""Computes the states of an ODE at several times, by one adaptive solve or by fixed steps between the times.

    .. math:: \frac{dx}{dt} = b_t(x)

    In an adaptive solve, the tolerances apply to x. Tsit5 evaluates its interpolant at the times, whose error is that of its
    steps. The interpolants of other solvers are less accurate, so these solvers step exactly to every time. (Diffrax checks
    the times in a host callback of the compiled program.) With fixed steps, each interval has ``steps`` equal steps, or the
    steps of ``StepTo``.

    Args:
      velocity, params, cond, key: as in ``solve``.
      times: ``[N]``, strictly increasing or strictly decreasing, within [0, 1]; N >= 2.
      x: the state at times[0].
      solver, choices: as in ``solve``; ``steps`` is the number per interval.

    Returns:
      The states, shaped like x with a leading axis N. The first is x.

    Raises:
      ValueError: as ``solve``, and if the times are not strictly monotone within [0, 1].
      TypeError, RuntimeError: as ``solve``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import solvers
      >>> times = jnp.array([0.0, 0.5, 1.0], jnp.float32)
      >>> def velocity(params, t, x, cond=None, *, key=None):
      ...     return 2.0 * jnp.ones_like(x)
      >>> solvers.trajectory(velocity, None, times, jnp.zeros(1, jnp.float32), solver="euler", steps=2).tolist()
      [[0.0], [1.0], [2.0]]
    """
    check_velocity(velocity)
    check_times("times", times, increasing=False)
    checks.floating("x", x)
    x = jax.tree.map(jnp.asarray, x)
    solve_ode = _Solve(velocity, choose(solver, choices))
    times = jnp.asarray(times, trees.at_least_float32(x))
    if solve_ode.options.fixed_steps is None:
        return solve_ode.states(params, times, x, cond, key)

    def step(state: Event, pair: tuple[Array, Array]) -> tuple[Event, Event]:
        v, _ = solve_ode.mean_velocity(params, *pair, state, cond, key)
        state = trees.axpy(pair[1] - pair[0], v, state)
        return state, state

    _, later = jax.lax.scan(step, x, (times[:-1], times[1:]))
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), x, later)


@dataclasses.dataclass(frozen=True)
class _RescaledField:
    """The vector field b_{s + tau (t-s)}(x + (t-s) y) for Diffrax.

    Fields of equal velocities are equal, so that eager calls do not recompile.
    """

    velocity: Velocity

    def __call__(self, tau: Array, y: Event, args: tuple) -> Event:
        params, s, t, x, cond, key = args
        key = _as_key(key)
        moved = cast_like(trees.axpy(t - s, y, widen(x, tau.dtype)), x)
        b = self.velocity(params, s + tau.astype(s.dtype) * (t - s), moved, cond, key=key)
        return widen(b, tau.dtype)


@dataclasses.dataclass(frozen=True)
class _StateField:
    """The vector field (t-s) b_{s + tau (t-s)}(z) of the state z in rescaled time."""

    velocity: Velocity

    def __call__(self, tau: Array, z: Event, args: tuple) -> Event:
        params, s, t, x, cond, key = args
        key = _as_key(key)
        b = self.velocity(params, s + tau.astype(s.dtype) * (t - s), cast_like(z, x), cond, key=key)
        return trees.scale(t - s, widen(b, tau.dtype))


@dataclasses.dataclass(frozen=True)
class _Solve:
    """A velocity and the options of its solve."""

    velocity: Velocity
    options: Options

    def mean_velocity(
        self, params: Params, s: Time, t: Time, x: Event, cond: Cond, key: Key | None
    ) -> tuple[Event, SolveStats]:
        """Returns v_{s,t}(x) and its cost."""
        _check_time("s", s)
        _check_time("t", t)
        checks.floating("x", x)
        x = jax.tree.map(jnp.asarray, x)
        dtype = trees.at_least_float32(x)
        s, t = jnp.asarray(s).astype(dtype), jnp.asarray(t).astype(dtype)
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, float), x)
        ys, stats = self._run(_RescaledField(self.velocity), start, (params, s, t, x, cond, _as_data(key)), None)
        return cast_like(jax.tree.map(lambda leaf: leaf[-1], ys), x), stats

    def states(self, params: Params, times: Array, x: Event, cond: Cond, key: Key | None) -> Event:
        """Returns the states at the times, computed by one adaptive solve."""
        s, t = times[0], times[-1]
        save = ((times - s) / (t - s)).astype(float)
        ys, _ = self._run(_StateField(self.velocity), widen(x, float), (params, s, t, x, cond, _as_data(key)), save)
        return cast_like(ys, x)

    def _run(
        self, field: Callable[..., Event], start: Event, args: tuple[Any, ...], save: Array | None
    ) -> tuple[Event, SolveStats]:
        import diffrax

        solver, adjoint = self.options.make_solver(), adjoints.make(self.options.differentiation)
        cost = methods.cost(solver)
        controller, first, max_steps = self._steps(solver, cost, args[1].dtype, save)
        if adjoints.is_reverse_only(adjoint):
            start = adjoints.batched_like(start, args)
        with adjoints.explained(adjoint):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                solver,
                # Diffrax checks Python numbers while tracing, but arrays in a host callback of the compiled program.
                0.0,
                1.0,
                first,
                start,
                args,
                saveat=diffrax.SaveAt(t1=save is None, ts=save, controller_state=True),
                stepsize_controller=controller,
                adjoint=adjoint,
                max_steps=max_steps,
                throw=False,
            )
        success = solution.result == diffrax.RESULTS.successful
        self._raise_if_concrete(success)
        # Multiply instead of using ``where``, so that the derivatives become NaN as well.
        ys = trees.scale(jnp.where(success, 1.0, jnp.nan), solution.ys)
        tried, rejected = (jnp.asarray(solution.stats[name], jnp.int32) for name in ("num_steps", "num_rejected_steps"))
        if cost is None:
            nfe = None
        elif self.options.fixed_steps is None:
            nfe = cast(Count, solution.controller_state).evaluations
        else:
            nfe = cost.start + tried * cost.step + (cost.restart if cost.start == 0 else 0)
        ys = ys if self.options.has_reverse else adjoints.forward_only(ys)
        return ys, SolveStats(nfe, tried, rejected, success)

    def _steps(
        self, solver: diffrax.AbstractSolver, cost: methods.Cost | None, dtype: jnp.dtype, save: Array | None
    ) -> tuple[diffrax.AbstractStepSizeController, float | None, int]:
        """Returns the controller, the first step and the largest number of steps."""
        import diffrax

        options, given = self.options, self.options.stepsize_controller
        if options.steps is not None:
            return diffrax.ConstantStepSize(), 1.0 / options.steps, options.steps
        if isinstance(given, diffrax.StepTo):
            return given, None, given.ts.shape[0] - 1
        if isinstance(given, diffrax.AbstractAdaptiveStepSizeController):
            controller = given
        else:
            default = 1e-8 if dtype == jnp.float64 else 1e-5
            rtol = default if options.rtol is None else options.rtol
            controller = diffrax.PIDController(rtol, rtol if options.atol is None else options.atol)
        _check_floor(controller, dtype)
        if save is not None and not isinstance(solver, diffrax.Tsit5):
            controller = diffrax.ClipStepSizeController(controller, step_ts=save)
        return controller if cost is None else counting(controller, cost), FIRST_STEP, options.max_steps

    def _raise_if_concrete(self, success: Array) -> None:
        value = checks.concrete(success)
        if value is None or value:
            return
        options = self.options
        if options.fixed_steps is not None:
            raise RuntimeError(f"{options.name}: the solver failed at one of its {options.fixed_steps} fixed steps")
        raise RuntimeError(
            f"{options.name}: the end was not reached within max_steps={options.max_steps}; the velocity is stiff, not "
            f"finite, or the tolerance (rtol={options.rtol}, atol={options.atol}; None is the dtype's default or the "
            "controller's) too fine"
        )


def check_velocity(velocity: Velocity) -> Velocity:
    """Checks that an argument is a Velocity, and returns it.

    Raises:
      TypeError: if it is not a Velocity, for example a FlowMap or a network of two times.
    """
    what = "(params, t, x, cond=None, *, key=None) -> b_t(x), such as the method velocity of a FlowMap"
    checks.accepts("velocity", velocity, what, 4)
    return velocity


def _check_floor(controller: diffrax.AbstractAdaptiveStepSizeController, dtype: jnp.dtype) -> None:
    """Raises ValueError if concrete tolerances are finer than the dtype allows."""
    rtol, atol = checks.concrete(controller.rtol), checks.concrete(controller.atol)
    floor = tolerance_floor(dtype)
    if rtol is not None and atol is not None and max(np.max(rtol), np.max(atol)) < floor:
        raise ValueError(
            f"rtol: expected at least {floor:.1e}, all that {dtype} can hold, got rtol={rtol:g}, atol={atol:g}; "
            "pass x in float64 for a finer solve"
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["bits"], meta_fields=["impl"])
@dataclasses.dataclass(frozen=True)
class _KeyData:
    """The data of a typed key. A solve uses its one key at every stage, which jax's key-reuse check would reject."""

    bits: Array
    impl: Any


def _as_data(key: Key | None) -> _KeyData | Key | None:
    if key is None or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return _KeyData(jax.random.key_data(key), jax.random.key_impl(key))


def _as_key(key: _KeyData | Key | None) -> Key | None:
    return jax.random.wrap_key_data(key.bits, impl=key.impl) if isinstance(key, _KeyData) else key


def _check_time(name: str, value: Time) -> None:
    checks.scalar(name, value)
    number = checks.concrete(value)
    if number is not None and not 0.0 <= float(number) <= 1.0:
        raise ValueError(f"{name}: expected a time in [0, 1], got {float(number):g}")


def check_times(name: str, times: Sequence[float] | Array | np.ndarray, *, increasing: bool) -> None:
    """Checks that times are strictly monotone within [0, 1], of shape ``[N]`` with N >= 2.

    Raises:
      ValueError: if the times are not of this form. The values of traced times are not checked.
    """
    shape = np.shape(times)
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"{name}: expected at least two times in one dimension, got shape {shape}")
    values = checks.concrete(times)
    if values is None:
        return
    gaps = np.diff(values)
    if not (np.all(gaps > 0) or (not increasing and np.all(gaps < 0))):
        order = "strictly increasing" if increasing else "strictly increasing or strictly decreasing"
        raise ValueError(f"{name}: expected {order} times, got {values}")
    if values.min() < 0.0 or values.max() > 1.0:
        raise ValueError(f"{name}: expected times in [0, 1], got {values}")


def widen(x: Event, dtype: jax.typing.DTypeLike) -> Event:
    """Casts all leaves of x to one dtype."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), x)


def cast_like(x: Event, like: Event) -> Event:
    """Casts the leaves of x to the dtypes of another event."""
    return jax.tree.map(lambda leaf, model: leaf.astype(model.dtype), x, like)
