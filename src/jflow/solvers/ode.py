r"""Diffrax solves of any Velocity: as a FlowMap, and as a trajectory.

The mean velocity is itself the end of an ODE in rescaled time tau,

    dy/dtau = b_{s + tau (t-s)}( x + (t-s) y ),   y(0) = 0,   tau in [0, 1],       v_{s,t}(x) = y(1),

for s < t, s > t and s = t alike: nothing divides by t - s, and the derivatives in s, t and x are right on the diagonal.

What happens when a solve does not reach its end within ``max_steps``: at an un-jitted call RuntimeError is raised; under
``jit``, ``vmap`` or differentiation the result and all its derivatives are NaN and ``SolveStats.success`` is False, so
that no host callback is compiled into the program and no wrong number leaves it.

Diffrax is imported on first use.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks, trees
from jflow.types import BOTH, Array, Cond, Domain, Event, FlowMap, Key, Params, Time, Velocity

# name -> (diffrax class, stages of one step, how many of them a step inherits from the one before)
METHODS = {
    "euler": ("Euler", 1, 0),
    "heun": ("Heun", 2, 0),
    "midpoint": ("Midpoint", 2, 0),
    "tsit5": ("Tsit5", 7, 1),
    "dopri8": ("Dopri8", 14, 1),
}
ADAPTIVE = ("tsit5", "dopri8")
ADJOINTS = ("forward", "direct", "recursive", "backsolve")
# An adaptive solve's first step in rescaled time. Diffrax's own choice spends evaluations, or starts at 0.01.
FIRST_STEP = 0.1


class SolveStats(NamedTuple):
    """What one sample's solve took; scalars.

    Attributes:
      nfe: evaluations of the velocity, int32: the stages of kept and rejected steps, less those that a step inherits
        from the one before. A vmapped batch runs as long as its slowest sample.
      steps: steps tried, kept or not, int32.
      rejected: steps whose error was too large, int32.
      success: whether the end was reached within ``max_steps``, bool.
    """

    nfe: Array
    steps: Array
    rejected: Array
    success: Array


def tolerance_floor(dtype: Any) -> float:
    """The smallest relative tolerance that a solve in this dtype can hold: 16 units of rounding."""
    return 16.0 * float(jnp.finfo(dtype).eps)


def solve(
    velocity: Velocity,
    method: str = "tsit5",
    *,
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 4096,
    adjoint: str | None = None,
    domain: Domain = BOTH,
) -> FlowMap:
    """The flow map of a velocity, by an ODE solve in rescaled time (see the module's formula).

    The velocity is called with x in its own dtypes and with a time in the widest of them (float32 at least); sums are
    kept in jax's default float, and the result has the dtypes of x. ``FlowMap.velocity`` is the velocity itself, which
    a solve at s = t also returns, at the price of its steps.

    Args:
      velocity: ``(params, t, x, cond=None, *, key=None) -> b_t(x)`` of one sample. One ``key`` serves the whole solve.
      method: "euler", "heun", "midpoint" (orders 1, 2, 2; fixed steps), "tsit5" or "dopri8" (orders 5 and 8; adaptive,
        or fixed when ``steps`` is given).
      steps: the number of equal steps; with it there is no tolerance.
      rtol: relative tolerance on the mean velocity, per sample and step; by default 1e-8 for x in float64, else 1e-5.
      atol: absolute tolerance on the mean velocity; by default as ``rtol``. The error of the jump is t - s times smaller.
      max_steps: the most steps, kept or not, of an adaptive solve.
      adjoint: which derivatives exist. "forward": ``jax.jvp`` only. "direct": both modes, with memory for ``max_steps``
        steps. "recursive": ``jax.grad`` only, by checkpointing. "backsolve": ``jax.grad`` only, by solving back with the
        adjoint's equation (1806.07366), in constant memory and with an error of its own, of the order of the tolerance or
        of the steps'; what is differentiated must reach the velocity through its arguments, and a way back that takes more
        than ``max_steps`` raises, by a host callback in the gradient's program. By default "direct" for fixed
        steps, "forward" for adaptive ones.
      domain: the domain of the FlowMap.

    Returns:
      The FlowMap; its params are the velocity's.

    Raises:
      ValueError: for an unknown method or adjoint, missing steps, steps together with a tolerance, a tolerance that is
        not positive (or, at a call, finer than the dtype); at a call, for s or t that are no scalars or outside [0, 1].
      TypeError: for numbers of the wrong type; at a call, for x that is not floating-point.
      RuntimeError: at an un-jitted call that needs more than ``max_steps``.
    """
    solver = _solver(velocity, method, steps, rtol, atol, max_steps, adjoint)

    def mean_velocity(
        params: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None
    ) -> Event:
        return solver.mean_velocity(params, s, t, x, cond, key)[0]

    return FlowMap(mean_velocity, domain=domain, velocity_override=velocity)


def solve_counted(
    velocity: Velocity,
    method: str = "tsit5",
    *,
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 4096,
    adjoint: str | None = None,
) -> Callable[..., tuple[Event, SolveStats]]:
    """The mean velocity of ``solve`` with the exact cost of each solve.

    Args and errors: as ``solve``.

    Returns:
      ``(params, s, t, x, cond=None, *, key=None) -> (v_{s,t}(x), SolveStats)``.
    """
    solver = _solver(velocity, method, steps, rtol, atol, max_steps, adjoint)

    def counted(
        params: Params, s: Time, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None
    ) -> tuple[Event, SolveStats]:
        return solver.mean_velocity(params, s, t, x, cond, key)

    return counted


def trajectory(
    velocity: Velocity,
    params: Params,
    times: Array,
    x: Event,
    cond: Cond = None,
    *,
    method: str = "tsit5",
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 4096,
    adjoint: str | None = None,
    key: Key | None = None,
) -> Event:
    """States of dx/dt = b_t(x) at many times, by one adaptive solve or by fixed steps between them.

    Adaptive: the tolerances are on x. "tsit5" saves through its interpolant, whose error is that of its steps;
    "dopri8" has an interpolant of lower order and therefore steps on to every time. (Diffrax checks the times in a host
    callback of the compiled program.) Fixed: ``steps`` equal steps in each interval.

    Args:
      velocity, params, cond, key: as in ``solve``.
      times: ``[N]``, strictly increasing or strictly decreasing, within [0, 1]; N >= 2.
      x: the state at times[0].
      method, steps, rtol, atol, max_steps, adjoint: as in ``solve``, ``steps`` per interval.

    Returns:
      Shaped like x with a leading axis N; the first entry is x.

    Raises:
      As ``solve``, and ValueError for times that are not strictly monotone in [0, 1].
    """
    check_times("times", times, increasing=False)
    checks.floating("x", x)
    x = jax.tree.map(jnp.asarray, x)
    solver = _solver(velocity, method, steps, rtol, atol, max_steps, adjoint)
    if solver.steps is not None:
        times = jnp.asarray(times, trees.at_least_float32(x))

        def step(state: Event, pair: tuple[Array, Array]) -> tuple[Event, Event]:
            v, _ = solver.mean_velocity(params, *pair, state, cond, key)
            state = trees.axpy(pair[1] - pair[0], v, state)
            return state, state

        _, later = jax.lax.scan(step, x, (times[:-1], times[1:]))
        return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), x, later)
    return solver.states(params, times, x, cond, key)


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
class _Solver:
    """A checked choice of method; ``steps`` is None for an adaptive solve."""

    velocity: Velocity
    method: str
    steps: int | None
    rtol: float | None
    atol: float | None
    max_steps: int
    adjoint: str

    def mean_velocity(
        self, params: Params, s: Time, t: Time, x: Event, cond: Cond, key: Key | None
    ) -> tuple[Event, SolveStats]:
        """v_{s,t}(x), and what it took."""
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
        dtype = trees.at_least_float32(x)
        times = jnp.asarray(times, dtype)
        s, t = times[0], times[-1]
        save = ((times - s) / (t - s)).astype(float)
        ys, _ = self._run(_StateField(self.velocity), widen(x, float), (params, s, t, x, cond, _as_data(key)), save)
        return cast_like(ys, x)

    def _run(self, field: Callable, start: Event, args: tuple, save: Array | None) -> tuple[Event, SolveStats]:
        import diffrax

        name, stages, inherits = METHODS[self.method]
        if self.steps is not None:
            controller, first, max_steps = diffrax.ConstantStepSize(), 1.0 / self.steps, self.steps
        else:
            controller = _counting_controller()(*self._tolerances(args[1].dtype))
            first, max_steps = FIRST_STEP, self.max_steps
            if save is not None and self.method == "dopri8":
                controller = diffrax.ClipStepSizeController(controller, step_ts=save)
        adjoint = {
            "forward": diffrax.ForwardMode,
            "direct": diffrax.DirectAdjoint,
            "recursive": diffrax.RecursiveCheckpointAdjoint,
            # A way back that does not reach its end would give a wrong gradient in silence.
            "backsolve": functools.partial(diffrax.BacksolveAdjoint, throw=True),
        }[self.adjoint]()
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            _midpoint()() if self.method == "midpoint" else getattr(diffrax, name)(),
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
        tried = jnp.asarray(solution.stats["num_steps"], jnp.int32)
        nfe = tried * (stages - inherits) + inherits
        if self.steps is None and save is None:
            # Until a first step is kept there is nothing to inherit.
            nfe = nfe + inherits * solution.controller_state[1]
        rejected = jnp.asarray(solution.stats["num_rejected_steps"], jnp.int32)
        self._raise_if_concrete(success)
        # A factor, not a where: it makes the derivatives NaN as well.
        poison = jnp.where(success, 1.0, jnp.nan)
        return trees.scale(poison, solution.ys), SolveStats(nfe, tried, rejected, success)

    def _tolerances(self, dtype: Any) -> tuple[float, float]:
        default = 1e-8 if dtype == jnp.float64 else 1e-5
        rtol = default if self.rtol is None else self.rtol
        atol = rtol if self.atol is None else self.atol
        floor = tolerance_floor(dtype)
        if max(rtol, atol) < floor:
            raise ValueError(
                f"rtol: expected at least {floor:.1e}, all that {dtype} can hold, got rtol={rtol:g}, atol={atol:g}; "
                "pass x in float64 for a finer solve"
            )
        return rtol, atol

    def _raise_if_concrete(self, success: Array) -> None:
        value = checks.concrete(success)
        if value is not None and not value:
            raise RuntimeError(
                f"{self.method}: the end was not reached within max_steps={self.max_steps}; the velocity is stiff, not "
                f"finite, or the tolerance (rtol={self.rtol}, atol={self.atol}; None is the dtype's default) too fine"
            )


@functools.cache
def _midpoint() -> type:
    """The midpoint rule with its two stages written out, not looped over as in Diffrax's own.

    What the first stage gives beyond the point of the second is then no part of the program: of a log-density along the
    solve, half of the divergences.
    """
    import diffrax

    class Midpoint(diffrax.AbstractSolver):
        term_structure = diffrax.AbstractTerm
        interpolation_cls = diffrax.LocalLinearInterpolation

        def order(self, terms: Any) -> int:
            return 2

        def init(self, terms: Any, t0: Array, t1: Array, y0: Event, args: Any) -> None:
            return None

        def step(
            self, terms: Any, t0: Array, t1: Array, y0: Event, args: Any, solver_state: None, made_jump: Any
        ) -> tuple[Event, None, dict[str, Event], None, Any]:
            half = t0 + 0.5 * (t1 - t0)
            middle = trees.axpy(1.0, terms.vf_prod(t0, y0, args, terms.contr(t0, half)), y0)
            y1 = trees.axpy(1.0, terms.vf_prod(half, middle, args, terms.contr(t0, t1)), y0)
            return y1, None, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful

        def func(self, terms: Any, t0: Array, y0: Event, args: Any) -> Event:
            return terms.vf(t0, y0, args)

    return Midpoint


@functools.cache
def _counting_controller() -> type:
    """Diffrax's PIDController, counting the rejections before the first step that is kept."""
    import diffrax

    class CountingController(diffrax.PIDController):
        def init(self, *args: Any) -> tuple:
            first, state = super().init(*args)
            return first, (state, jnp.zeros((), jnp.int32))

        def adapt_step_size(self, t0: Array, *args: Any) -> tuple:
            *others, (state, count) = args
            keep, after, end, jump, state, result = super().adapt_step_size(t0, *others, state)
            count = count + (jnp.logical_not(keep) & (t0 == 0.0)).astype(jnp.int32)
            return keep, after, end, jump, (state, count), result

    return CountingController


def _solver(
    velocity: Velocity,
    method: str,
    steps: int | None,
    rtol: float | None,
    atol: float | None,
    max_steps: int,
    adjoint: str | None,
) -> _Solver:
    if not callable(velocity):
        raise TypeError(f"velocity: expected a function (params, t, x, cond) -> b, got {type(velocity).__name__}")
    checks.choice("method", method, METHODS)
    if steps is not None:
        checks.integer("steps", steps, low=1)
    elif method not in ADAPTIVE:
        raise ValueError(f"steps: expected a number of steps, which method {method!r} needs, got None")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is None:
            continue
        if steps is not None:
            raise ValueError(f"{name}: expected None with fixed steps (steps={steps}), got {value!r}")
        checks.number(name, value, low=0.0, high=1.0, open_low=True)
    checks.integer("max_steps", max_steps, low=1)
    if adjoint is None:
        adjoint = "forward" if steps is None else "direct"
    checks.choice("adjoint", adjoint, ADJOINTS)
    return _Solver(velocity, method, steps, rtol, atol, max_steps, adjoint)


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


def _check_time(name: str, value: Any) -> None:
    checks.scalar(name, value)
    number = checks.concrete(value)
    if number is not None and not 0.0 <= float(number) <= 1.0:
        raise ValueError(f"{name}: expected a time in [0, 1], got {float(number):g}")


def check_times(name: str, times: Any, *, increasing: bool) -> None:
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


def widen(x: Event, dtype: Any) -> Event:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), x)


def cast_like(x: Event, like: Event) -> Event:
    return jax.tree.map(lambda leaf, model: leaf.astype(model.dtype), x, like)
