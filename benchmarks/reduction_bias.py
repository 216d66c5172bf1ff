r"""The bias of reductions: how far a weight that depends on the residual moves MeanFlow's stationary point.

    python -m benchmarks.reduction_bias [--out runs/reduction_bias]

The data are skewed Gaussian mixtures in one dimension, and the path is linear. The exact map obeys v - (t-s) d/ds v = grad
X b. Its MeanFlow residual is therefore

    D = v_{s,t} - I_s' - (t-s)( d/ds v_{s,t} + grad v_{s,t} I_s' ) = - grad X_{s,t}(x) ( I_s' - b_s(x) ),  x = I_s,

which has mean zero given x. Let R be a per-sample loss and R' its derivative, as ``jax.grad`` gives it with the library's
stop-gradients. The loss is stationary at v + m if, at every x,

    G(m) = E[ R'(m + D) | I_s = x ] = 0.

Here m is the shift if the target stays that of the exact map: the first move of a student that may be any function of x. It
is not the shift of the trained map. The target of v + m differs by (t-s)( d/ds m + grad m I_s' ), which is left out here.
This term is zero on the diagonal; elsewhere it is of first order in m, as is m itself. If it is included and m is small, X
shifts by about the integral of m_{u,t} along the path, u from s to t, and v by the average of m_{u,t}. The effect has the
same sign, but is smaller where grad X_{s,t} is steep, because D and m_{u,t} grow with grad X_{u,t}, which falls to 1 at u =
t.

Given x, x1 is a Gaussian mixture in closed form, and so is D. The expectation is a trapezoidal sum over each component,
with nodes dense enough for scores R' that have a kink or a narrow peak. G has a root between 0 and minus the mean of an
outermost component, because an odd score with the sign of its argument integrates over one component to the sign of the
shifted mean. The reported root is the first one downhill from 0, where the gradient flow of m comes to rest if it starts at
the exact map. It is the only root for scores that grow with D. Scores that fall off (adaptive with p > 1/2, Cauchy) may
have further roots. The root is bracketed in steps of 1/32 of the interval and then bisected.

The relative bias is the RMS of m over the RMS of v_{s,t}, for x distributed as I_s; a share of 1e-4 of x is left out.
"Clipped" and "clamped" are the same in one dimension. The benchmark takes about a minute and writes table.md,
results.json and reduction_bias.png.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import reduction_table, results
from experiments.shared.reduction_table import UNBIASED
from experiments.shared.run import main
from jflow import interpolants, oracles, plots, reductions
from jflow.types import Array, Time

# name -> (weights, means, variances)
MIXTURES = {
    "broad": ((0.65, 0.35), (-0.4, 0.7), (0.35, 0.7)),
    "sharp": ((0.7, 0.3), (-0.8, 1.2), (0.09, 0.25)),
}
PAIRS = ((0.2, 0.7), (0.2, 1.0), (0.5, 1.0), (0.8, 1.0))
REDUCTIONS: dict[str, reductions.Reduction] = {
    "squared": reductions.squared,
    "adaptive(1, 0.01)": reductions.adaptive(1.0, 0.01),
    "adaptive(0.5, 0.01)": reductions.adaptive(0.5, 0.01),
    "pseudo_huber(0.03)": reductions.pseudo_huber(0.03),
    "cauchy(1)": reductions.cauchy(1.0),
    "normalised(0.1)": reductions.normalised(0.1),
    "clipped(1)": reductions.clipped(1.0),
    "clamped(1)": reductions.clamped(1.0),
}
ORACLE = oracles.quantile(interpolants.linear())
REACH = 8.5
SCAN, HALVINGS = 32, 40
DENSE = 4001
NUMBERS = ("relative_bias", "rms_shift", "rms_velocity", "largest_shift")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    out: pathlib.Path = pathlib.Path("runs/reduction_bias")
    """Directory for table.md, results.json and the figure."""
    points: int = 192
    """Points x at which the shift is found."""
    nodes: int = 4096
    """Nodes of the quadrature per component of D given x."""
    quick: bool = False
    """Few points and nodes, and the first mixture, reductions and pairs of times, to show that everything works."""
    overwrite: bool = False
    """Replace earlier results in --out."""

    def check(self) -> None:
        """Refuses values out of range, and an output that is there.

        Raises:
          ValueError: naming the option, what came and what was expected.
          FileExistsError: without --overwrite.
        """
        if self.points < 2:
            raise ValueError(f"--points: expected at least 2, got {self.points}")
        if self.nodes < 64:
            raise ValueError(f"--nodes: expected at least 64, got {self.nodes}")
        results.refuse_existing(self.out, self.overwrite)


class Residual(NamedTuple):
    """The law of MeanFlow's residual at the exact map given x, a mixture: all ``[K]``."""

    shares: Array
    means: Array
    widths: Array


def mixture(weights: Any, means: Any, variances: Any) -> oracles.MixtureParams:
    """A mixture in one dimension."""
    return oracles.mixture_params(weights, np.asarray(means)[:, None], np.asarray(variances)[:, None])


def residual(params: oracles.MixtureParams, s: Time, t: Time, x: Array) -> Residual:
    """The law of D given I_s = x, a scalar, for s < 1."""
    log_weights, means, variances = params.log_weights, params.means[:, 0], params.variances[:, 0]
    marginal = (1 - s) ** 2 + s**2 * variances
    offset = x - s * means
    shares = jax.nn.softmax(log_weights - 0.5 * (offset**2 / marginal + jnp.log(marginal)))
    x1, x1_width = means + s * variances / marginal * offset, (1 - s) * jnp.sqrt(variances / marginal)
    b = ORACLE.velocity(params, s, x[None])[0]
    slope = 1 + (t - s) * jax.grad(lambda x: _mean_velocity(params, s, t, x))(x)
    # I_s' = x1 - x0 = (x1 - x)/(1 - s).
    return Residual(shares, -slope * ((x1 - x) / (1 - s) - b), slope * x1_width / (1 - s))


def score_of(reduction: reductions.Reduction) -> Callable[[Array], Array]:
    """R'(D) of a scalar D, by the library's own stop-gradients."""
    return jax.grad(lambda difference: reduction(None, 0.0, 0.0, difference))


def expected_score(score: Callable[[Array], Array], law: Residual, m: Array, nodes: int) -> Array:
    """G(m) = E[R'(m + D)], a scalar."""
    z = jnp.linspace(-REACH, REACH, nodes)
    weights = jnp.exp(-0.5 * z**2)
    each = jax.vmap(jax.vmap(score))(m + law.means[:, None] + law.widths[:, None] * z[None])
    return jnp.sum(law.shares * jnp.sum(each * weights[None], axis=1)) / jnp.sum(weights)


def shift(score: Callable[[Array], Array], law: Residual, nodes: int) -> Array:
    """The first root of G downhill of 0, a scalar."""
    sign = jnp.sign(expected_score(score, law, jnp.zeros_like(law.means[0]), nodes))
    far = jnp.where(sign > 0, -jnp.max(law.means), jnp.where(sign < 0, -jnp.min(law.means), 0.0))
    beyond = lambda part: sign * expected_score(score, law, part * far, nodes) <= 0  # noqa: E731
    parts = jnp.linspace(0.0, 1.0, SCAN + 1)[1:]
    # The far end counts as beyond the root, whatever its rounding error.
    first = parts[jnp.argmax(jax.lax.map(beyond, parts).at[-1].set(True))]

    def halve(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = 0.5 * (bracket[0] + bracket[1])
        past = beyond(middle)
        return jnp.where(past, bracket[0], middle), jnp.where(past, middle, bracket[1])

    low, high = jax.lax.fori_loop(0, HALVINGS, halve, (first - 1 / SCAN, first))
    return 0.5 * (low + high) * far


def points(params: oracles.MixtureParams, s: Time, t: Time, count: int) -> tuple[Array, Array]:
    """x over four deviations of every component of I_s, denser where the map is steep, and their probabilities, of sum 1."""
    law = ORACLE.marginal(params, s)
    reach = 4 * jnp.sqrt(law.variances)
    fine = jnp.linspace(jnp.min(law.means - reach), jnp.max(law.means + reach), DENSE)
    # Even in x + X_{s,t}(x), which grows with x.
    along = 2 * fine + (t - s) * jax.vmap(lambda x: _mean_velocity(params, s, t, x))(fine)
    x = jnp.interp(jnp.linspace(along[0], along[-1], count), along, fine)
    density = jnp.exp(jax.vmap(lambda x: ORACLE.log_density(params, s, x[None]))(x)) * jnp.gradient(x)
    return x, density / jnp.sum(density)


def measure(config: Config) -> list[dict[str, Any]]:
    """A row for every mixture, reduction and pair of times.

    Raises:
      RuntimeError: when the squared residual's shift is not zero to rounding.
    """
    # A quick run takes the first two or fewer of each, because every reduction is compiled.
    few = 2 if config.quick else None
    names, mixtures, pairs = list(REDUCTIONS)[:few], list(MIXTURES)[: few and 1], PAIRS[:few]
    found = {}
    for name in names:
        biases = jax.jit(functools.partial(_biases, score_of(REDUCTIONS[name]), config))
        for mixture_name in mixtures:
            choice = MIXTURES[mixture_name]
            for s, t in pairs:
                values = [float(value) for value in biases(mixture(*choice), jnp.asarray(s), jnp.asarray(t))]
                found[mixture_name, name, s, t] = dict(zip(NUMBERS, values, strict=True))
                if name == "squared" and not values[-1] <= UNBIASED:
                    raise RuntimeError(f"expected the squared residual's shift to vanish, got {values[-1]:.3g}")
    return [
        {"mixture": which, "reduction": name, "s": s, "t": t, **found[which, name, s, t]}
        for which in mixtures
        for name in names
        for s, t in pairs
    ]


def run(config: Config) -> None:
    """Measures in double precision and writes everything to ``config.out``."""
    config.check()
    jax.config.update("jax_enable_x64", True)
    if config.quick:
        config = dataclasses.replace(config, points=8, nodes=256)
    rows = measure(config)
    text = "Relative bias and largest |m|, by (s, t).\n\n" + reduction_table.table(rows)
    settings = {"points": config.points, "nodes": config.nodes, "quick": config.quick}
    mixtures = {name: dict(zip(("weights", "means", "variances"), m, strict=True)) for name, m in MIXTURES.items()}
    results.write(config.out, {"rows": rows, "mixtures": mixtures, **settings}, text)
    _figure(config.out / "reduction_bias.png", rows)


def _figure(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """The relative bias over the pairs of times, one panel for each mixture."""
    mixtures, names = (dict.fromkeys(row[key] for row in rows) for key in ("mixture", "reduction"))
    figure, axes = plots.panels(1, len(mixtures), size=(5.6, 4.0))
    for which, axis in zip(mixtures, axes[0], strict=True):
        for name in names:
            if name != "squared":  # it has no bias
                these = [row for row in rows if (row["mixture"], row["reduction"]) == (which, name)]
                pairs = [f"({row['s']:g}, {row['t']:g})" for row in these]
                axis.plot(pairs, [row["relative_bias"] for row in these], "o-", label=name)
        axis.set(title=which, xlabel="(s, t)", ylabel="relative bias")
    axes[0][0].legend()
    figure.savefig(path, dpi=110)


def _biases(score: Callable[[Array], Array], config: Config, params: Any, s: Array, t: Array) -> tuple[Array, ...]:
    """The ``NUMBERS`` of one row."""
    x, probability = points(params, s, t, config.points)
    m = jax.lax.map(lambda x: shift(score, residual(params, s, t, x), config.nodes), x)
    v = jax.vmap(lambda x: _mean_velocity(params, s, t, x))(x)
    m_rms, v_rms = (jnp.sqrt(jnp.sum(probability * value**2)) for value in (m, v))
    return m_rms / v_rms, m_rms, v_rms, jnp.max(jnp.abs(m))


def _mean_velocity(params: oracles.MixtureParams, s: Time, t: Time, x: Array) -> Array:
    return ORACLE.flow_map.mean_velocity(params, s, t, x[None])[0]


if __name__ == "__main__":
    main(Config, run)
