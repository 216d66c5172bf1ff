r"""Guidance in the target: the map learns the guided velocity, so that its jumps are guided at no cost in sampling.

With the velocity estimate c (by default that of the pair), the target's velocity at a row's point x = I_s is

.. math::
    \omega\, c + \kappa\, v_{s,s}(x \mid \mathrm{cond}) + (1 - \omega - \kappa)\, v_{s,s}(x \mid \mathrm{null}),
    \qquad \omega = (1 - \kappa)\, w.

The null rows of the batch keep their own velocity, so that v is b for the null condition. The fixed point is then the guided
velocity (``guidance.classifier_free``) of scale w, whatever kappa:

.. math::
    v_{s,s}(x \mid \mathrm{cond}) = b_s(x \mid \mathrm{null})
    + w \left( b_s(x \mid \mathrm{cond}) - b_s(x \mid \mathrm{null}) \right).

- MeanFlow (2505.13447) has a fixed scale. Its two numbers are omega and kappa; ``Guidance.mean_flow`` takes them.
- Improved MeanFlow (2512.02012) draws the scale and the interval for each row, gives both to the network, and has
  kappa = 1 - 1/w, hence omega = 1: the noise of the pair is not amplified. ``Guidance.improved_mean_flow`` has its laws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks, conditions, law_checks, times, trees
from jflow.named import described
from jflow.types import FORWARD, Array, Cond, Event, Key

if TYPE_CHECKING:
    from jflow.objectives.row import Row

# ``(key, n) -> [n]``: draws n guidance scales.
ScaleLaw = Callable[[Key, int], Array]
LEGS = ("own", "ema")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The choice ``guidance`` of an objective: its velocity estimate is replaced by a guided one.

    The velocity estimates of the data are replaced (``row.conditional`` and ``row.pair``), on and off the diagonal. The map's
    own velocity, as in Lagrangian self-distillation, is then guided as well, because the diagonal is. A teacher's velocity is
    not changed: guide the teacher itself. Rows with the null condition, which ``label_dropout`` makes, keep their own
    velocity.

    If the scale or the interval is a law, both are drawn for each row, and every network receives ``conditions.Scaled(cond,
    scale, interval)`` in place of ``cond``, without the interval if only the scale is drawn. A teacher receives it too, for
    example ``guidance.classifier_free(velocity, null=10)``, which reads the scale from it. In sampling, pass a ``Scaled`` as
    the condition to choose the scale. Improved MeanFlow's code differs: its diagonal rows always have the interval (0, 1), and
    the direction of a dropped row is the velocity of its label. Here the diagonal has the row's interval, and every row its own
    condition, so that the map of the guided velocity is stationary for every scale and interval.

    Cost: on the diagonal one pass, the null velocity; the conditional one is the pass that is trained. Off the diagonal one
    pass, and one more if kappa is not 0 (improved MeanFlow needs that pass anyway, for its direction).

    Attributes:
      scale: the scale w of the guided velocity that is learned, positive; or a law ``(key, n) -> [n]``.
      kappa: the share of the model's own conditional velocity, below 1; None for 1 - 1/w.
      interval: the first and the last time at which to guide, both included, 0 <= first <= last <= 1 (0 is the noise); or a law
        of pairs (``times.PairLaw``), which draws the first and the last time.
      leg: the model that gives the conditional and the null velocity: "own", under a stop-gradient, or "ema", its average.

    Raises:
      ValueError: if a number is out of range, or a law returns another shape or values out of range.
      TypeError: if an argument has a wrong type.
    """

    scale: float | ScaleLaw = 1.0
    kappa: float | None = None
    interval: tuple[float, float] | times.PairLaw = conditions.ALWAYS
    leg: str = "own"

    def __post_init__(self) -> None:
        checks.choice("leg", self.leg, LEGS)
        if self.kappa is not None:
            checks.number("kappa", self.kappa)
            if self.kappa >= 1.0:
                raise ValueError(f"kappa: expected a number below 1, got {self.kappa}")
        if callable(self.scale):
            _check_scales(self.scale)
        else:
            checks.number("scale", self.scale, low=0.0, open_low=True)
        if callable(self.interval):
            law_checks.check_pairs("interval", self.interval, FORWARD)
        else:
            if not isinstance(self.interval, tuple) or len(self.interval) != 2:
                raise TypeError(f"interval: expected a pair (first, last) or a law, got {described(self.interval)}")
            first = checks.number("interval: first", self.interval[0], low=0.0, high=1.0)
            checks.number("interval: last", self.interval[1], low=first, high=1.0)

    @classmethod
    def mean_flow(cls, omega: float, kappa: float = 0.0, interval: tuple[float, float] = conditions.ALWAYS) -> Guidance:
        """The guidance of MeanFlow (2505.13447) with its own two numbers; the scale w is omega/(1 - kappa).

        The interval is in jflow's time, which runs from the noise: MeanFlow's (a, b) is (1 - b, 1 - a) here.

        Raises:
          ValueError, TypeError: as the class.
        """
        checks.number("omega", omega, low=0.0, open_low=True)
        if checks.number("kappa", kappa) >= 1.0:
            raise ValueError(f"kappa: expected a number below 1, got {kappa}")
        return cls(omega / (1.0 - kappa), kappa, interval)

    @classmethod
    def improved_mean_flow(cls, highest: float = 8.0, power: float = 1.0) -> Guidance:
        """The guidance of improved MeanFlow (2512.02012): scales from ``power_law(highest, power)``, and random intervals.

        The first time is uniform on [0, 1/2], the last on [1/2, 1].
        """
        law = times.independent(times.uniform(0.0, 0.5), times.uniform(0.5, 1.0))
        return cls(power_law(highest, power), None, law)

    @property
    def fed(self) -> bool:
        """Whether the network receives the scale."""
        return callable(self.scale) or callable(self.interval)

    def feed(self, key: Key, cond: Cond, rows: int, dtype: Any) -> Cond:
        """Adds the scale and the interval of each row to its condition. Without laws, ``cond`` is returned unchanged."""
        if not self.fed:
            return cond
        scale_key, interval_key = jax.random.split(key)
        scale = self.scale(scale_key, rows) if callable(self.scale) else jnp.full((rows,), self.scale)
        interval = self.interval(interval_key, rows) if callable(self.interval) else None
        if not callable(self.interval) and self.interval != conditions.ALWAYS:
            interval = tuple(jnp.full((rows,), end) for end in self.interval)
        scale, interval = jax.tree.map(lambda leaf: leaf.astype(dtype), (scale, interval))
        return conditions.Scaled(cond, scale, None if interval is None else tuple(interval))

    def velocity(self, row: Row, estimate: Event) -> Event:
        """Returns the guided velocity at the row's point, given the velocity estimate; shaped like x."""
        scale, interval = self._of(row.cond)
        dtype = row.s.dtype
        first, last = (jnp.asarray(end).astype(dtype) for end in interval)
        active = (first <= row.s) & (row.s <= last) & ~conditions.is_null(row.cond, row.null)
        w = jnp.where(active, jnp.asarray(scale).astype(dtype), jnp.ones((), dtype))
        if self.kappa is None:
            omega, kappa = jnp.ones_like(w), 1.0 - 1.0 / w
        else:
            kappa = jnp.where(active, jnp.asarray(self.kappa, dtype), jnp.zeros((), dtype))
            omega = (1.0 - kappa) * w
        away = (1.0 - kappa) * (1.0 - w)
        null = conditions.null_like(row.null, row.cond)
        leg = row.leg("frozen" if self.leg == "own" else self.leg)
        if self.kappa == 0.0:
            return trees.combine(omega, estimate, away, leg._replace(cond=null).velocity(row.s, row.x))
        if row.here is not None and self.leg == "own":
            own, other = row.here, leg._replace(cond=null).velocity(row.s, row.x)
        else:
            both = jax.tree_util.tree_map_with_path(conditions.stack, row.cond, null)
            own, other = conditions.pair(jax.vmap(lambda c: leg._replace(cond=c).velocity(row.s, row.x))(both))
        return trees.axpy(kappa, own, trees.combine(omega, estimate, away, other))

    def _of(self, cond: Cond) -> tuple[Any, tuple[Any, Any]]:
        """Returns the scale and the interval of a row."""
        if self.fed:
            return cond.scale, conditions.ALWAYS if cond.interval is None else cond.interval
        assert not callable(self.interval)
        return self.scale, self.interval


def power_law(highest: float = 8.0, power: float = 1.0) -> ScaleLaw:
    r"""Returns the law of scales on [1, highest] with density proportional to :math:`w^{-\mathrm{power}}` (2512.02012).

    With ``power=1`` the logarithm of the scale is uniform.

    Raises:
      ValueError: if ``highest`` is below 1, or a number is not finite.

    Example:
      >>> import jax
      >>> from jflow.objectives import guided
      >>> scales = guided.power_law(8.0)(jax.random.key(0), 1000)
      >>> bool(scales.min() >= 1.0), bool(scales.max() <= 8.0)
      (True, True)
    """
    checks.number("highest", highest, low=1.0)
    checks.number("power", power)
    top = float(np.log(highest))

    def law(key: Key, n: int) -> Array:
        u = jax.random.uniform(key, (n,))
        rate = (1.0 - power) * top
        # expm1 and log1p keep the accuracy for powers near 1.
        exponent = u * top if rate == 0.0 else jnp.log1p(u * np.expm1(rate)) / (1.0 - power)
        return jnp.exp(exponent)

    return law


def _check_scales(law: ScaleLaw) -> None:
    checks.accepts("scale", law, "(key, n) -> scales [n], such as guided.power_law(8.0)", 2, model=False)
    with jax.ensure_compile_time_eval():
        drawn = checks.concrete(law(jax.random.key(0), 64))
    if drawn is None or drawn.shape != (64,) or not np.all(np.isfinite(drawn)) or not np.all(drawn > 0.0):
        got = "a traced value" if drawn is None else f"shape {drawn.shape} for n = 64"
        if drawn is not None and drawn.shape == (64,):
            got = f"values from {drawn.min():g} to {drawn.max():g}"
        raise ValueError(f"scale: expected a law (key, n) -> [n] of positive finite scales, got {got}")
