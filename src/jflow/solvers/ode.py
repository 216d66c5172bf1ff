r"""Diffrax solves of any Velocity: as a FlowMap, and as a trajectory.

The mean velocity is itself the end of an ODE in rescaled time tau,

.. math:: dy/d\tau = b_{s + \tau (t-s)}(x + (t-s) y), \quad y(0) = 0, \quad \tau \in [0, 1], \qquad v_{s,t}(x) = y(1),

for s < t, s > t and s = t alike: nothing divides by t - s, and the derivatives in s, t and x are right on the diagonal.

If a solve does not reach its end within ``max_steps``, an un-jitted call raises RuntimeError. Under ``jit``, ``vmap`` or
differentiation the result and all its derivatives are NaN instead, and ``SolveStats.success`` is False: no host callback is
compiled into the program, and it returns no wrong number.

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

# An adaptive solve's first step in rescaled time. Diffrax's own choice spends evaluations, or starts at 0.01.
FIRST_STEP = 0.1


class SolveStats(NamedTuple):
    """The cost and the outcome of one sample's solve; scalars.

    Attributes:
      nfe: evaluations of the velocity, int32: the stages of kept and rejected steps, less those that a step inherits
        from the one before. A vmapped batch runs as long as its slowest sample. None where the number is not known: with
        implicit solvers, whose root finder evaluates the velocity too, and with solvers that users write, unless they are
        an ``AbstractERK``, which is counted by its tableau.
      steps: steps tried, kept or not, int32.
      rejected: steps whose error was too large, int32.
      success: whether the end was reached within ``max_steps``, bool.
    """

    nfe: Array | None
    steps: Array
    rejected: Array
    success: Array


class CountedSolve(Protocol):
    """A solve with its cost, of one sample: (v_{s,t}(x), SolveStats)."""

    def __call__(
        self, params: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None
    ) -> tuple[Event, SolveStats]:
        """The mean velocity, shaped like x, and its cost."""
        ...


def tolerance_floor(dtype: jax.typing.DTypeLike) -> float:
    """The smallest relative tolerance that a solve in this dtype can hold: 16 units of rounding."""
    return 16.0 * float(jnp.finfo(dtype).eps)


def solve(
    velocity: Velocity, solver: SolverLike | None = None, *, domain: Domain = BOTH, **choices: Unpack[Choices]
) -> FlowMap:
    """The flow map of a velocity, by an ODE solve in rescaled time (see the module's formula).

    For example::

        solve(velocity)                                     adaptive, Tsit5, at the default tolerance
        solve(velocity, "euler", steps=10)
        solve(velocity, diffrax.Tsit5(), stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-8))
        solve(velocity, options=solvers.Options("heun", steps=8, adjoint="recursive"))

    The velocity is called with x in its own dtypes and with a time in the widest of them (float32 at least); sums are
    kept in jax's default float, and the result has the dtypes of x. ``FlowMap.velocity`` is the velocity itself, which
    a solve at s = t also returns, at the price of its steps.

    Args:
      velocity: ``(params, t, x, cond=None, *, key=None) -> b_t(x)`` of one sample. One ``key`` serves the whole solve.
      solver: a name or a Diffrax solver, by default "tsit5"; see ``Options``.
      domain: the domain of the FlowMap.
      **choices: steps, rtol, atol, stepsize_controller, max_steps, adjoint, as in ``Options``; or ``options`` alone.

    Returns:
      The FlowMap; its params are the velocity's.

    Raises:
      ValueError: as ``Options``; at a call, for a tolerance finer than the dtype, and for s or t that are not scalars or
        outside [0, 1].
      TypeError: as ``Options``; at a call, for x that is not floating-point, and where an un-jitted ``jax.jvp`` meets an
        adjoint or a velocity without a forward mode.
      RuntimeError: at an un-jitted call whose solve fails, as one that needs more than ``max_steps`` does.
      From ``jax.grad``, ValueError naming ``adjoint`` where the solve has no reverse mode.

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
    """The mean velocity of ``solve`` with the exact cost of each solve.

    Args and errors: as ``solve``.

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
    """States of dx/dt = b_t(x) at many times, by one adaptive solve or by fixed steps between them.

    Adaptive: the tolerances are on x. Tsit5 saves through its interpolant, whose error is that of its steps; the
    interpolants of other solvers are less accurate, and these step on to every time. (Diffrax checks the times in a host
    callback of the compiled program.) Fixed: ``steps`` equal steps, or those of ``StepTo``, in each interval.

    Args:
      velocity, params, cond, key: as in ``solve``.
      times: ``[N]``, strictly increasing or strictly decreasing, within [0, 1]; N >= 2.
      x: the state at times[0].
      solver, choices: as in ``solve``, ``steps`` per interval.

    Returns:
      Shaped like x with a leading axis N; the first entry is x.

    Raises:
      As ``solve``, and ValueError for times that are not strictly monotone in [0, 1].

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
    """b_{s + tau (t-s)}(x + (t-s) y) as Diffrax calls it; equal velocities give equal fields, which eager calls need
    in order not to compile anew.
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
    """(t-s) b_{s + tau (t-s)}(z): the state itself in rescaled time."""

    velocity: Velocity

    def __call__(self, tau: Array, z: Event, args: tuple) -> Event:
        params, s, t, x, cond, key = args
        key = _as_key(key)
        b = self.velocity(params, s + tau.astype(s.dtype) * (t - s), cast_like(z, x), cond, key=key)
        return trees.scale(t - s, widen(b, tau.dtype))


@dataclasses.dataclass(frozen=True)
class _Solve:
    """A velocity and how it is solved."""

    velocity: Velocity
    options: Options

    def mean_velocity(
        self, params: Params, s: Time, t: Time, x: Event, cond: Cond, key: Key | None
    ) -> tuple[Event, SolveStats]:
        """v_{s,t}(x), and its cost."""
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
        """The states at the times, by one adaptive solve."""
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
                # Python numbers: Diffrax checks them while tracing, and arrays in a host callback of the compiled program.
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
        # A factor, not a where: it makes the derivatives NaN as well.
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
        """The controller, the first step and the most steps."""
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
    """The velocity, if it can be called as one.

    Raises:
      TypeError: for anything else: a FlowMap, a network of two times, an argument in the wrong place.
    """
    what = "(params, t, x, cond=None, *, key=None) -> b_t(x), such as the method velocity of a FlowMap"
    checks.accepts("velocity", velocity, what, 4)
    return velocity


def _check_floor(controller: diffrax.AbstractAdaptiveStepSizeController, dtype: jnp.dtype) -> None:
    """Refuses concrete tolerances that the dtype cannot hold."""
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
    """A typed key as numbers: a solve uses its one key at every stage, which jax's check of keys would take for reuse."""

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
    """Refuses times that are not a strictly monotone ``[N]`` within [0, 1], N >= 2.

    Raises:
      ValueError: naming the argument; the values of traced times are not checked.
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
    """x with all its leaves in one dtype."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), x)


def cast_like(x: Event, like: Event) -> Event:
    """x with the dtypes of another event."""
    return jax.tree.map(lambda leaf, model: leaf.astype(model.dtype), x, like)
