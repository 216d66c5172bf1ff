r"""Small noise: the squared errors of a diffusion as an estimator of the divergence; its limit is Hutchinson's estimator.

    python -m experiments.small_noise --out runs/small_noise

It takes seconds on a CPU, in float64. Nothing is trained: g is the exact velocity b_t of an asymmetric mixture in the plane
at one time, div g is known exactly, and all expectations over the noise are Gauss-Hermite sums, not samples.

One step of length h of dx' = g dt + eps dW from x, with z ~ N(0, I) and s = eps sqrt(h), is x' = x + h g(x) + s z. A
diffusion predicts x' - x by a velocity, forward from x or backward from x', and is scored by the squared errors

    F = |x' - x - h g(x)|^2 = s^2 |z|^2,     B = |x' - x - h g(x')|^2,     D = g(x') - g(x)

With x' - x - h g(x') = s z - h D,

    (F - B)/(2 eps^2 h^2) = z'D/s - |D|^2/(2 eps^2)                                                                  (1)

and h times (1) is log p(x | x') - log p(x' | x), the log-ratio of the backward and the forward transition with the same g
and eps. This is minus the step's term in a diffusion's bound on log rho (the evidence lower bound of its likelihood). The
mean of the first part of (1) is exact by Stein's identity E[z'f(s z)] = s E[(div f)(s z)]. With m = x + h g(x),

    E[z'D]/s = E[ div g(m + s z) ] = div g(m) + s^2/2 Lap div g(m) + O(s^4)                                            (2)

Hence, with J = grad g(x) and its Frobenius norm |J|_F,

    E[(1)] = div g + h ( g.grad div g + eps^2/2 Lap div g - |J|_F^2/2 ) - h^2 |J g|^2/(2 eps^2) + ...                  (3)

As h -> 0 at a fixed eps, D = s J z + O(h), and (1) is z'Jz - h |Jz|^2/2 + ... . The limit is Hutchinson's estimator of the
divergence with Gaussian probes, and the diffusion's bound becomes that of a continuous normalising flow (2110.07579 takes
the same limit for a flow whose noise is trained). The order of the limits matters. If eps -> 0 first, at a fixed h, the
last term of (3) grows without bound, and so does the variance h |J g|^2/eps^2 that the drift adds to z'D/s.

Without the drift, at m = x, (2) is a finite difference in a random direction. Three forms of it are compared:

    plain         z'g(x + s z)/s                  variance |g|^2/s^2 + O(1): without the term z'g(x)/s, of mean 0
    difference    z'(g(x + s z) - g(x))/s         variance 2 |(J + J')/2|_F^2 + O(s^2): the first part of (1)
    Hutchinson    z'Jz                            the limit, without bias

The first two have the same mean, whose bias is that of (2), of order s^2. With N draws the best s for the plain form is of
order N^{-1/6}, and the error is of order N^{-1/3}. The difference has Hutchinson's N^{-1/2} at any s that makes its bias
small enough; it costs two evaluations of g, and Hutchinson's form a value and a derivative. The divergence thus needs no
noise; the diffusion does.

Expected slopes, which ``tests/experiments/test_small_noise.py`` checks: in s, 2 for the bias, -1 (plain) and 0 (difference)
for the standard deviations; in h, 1 for the bias of (1), whose standard deviation tends to that of Hutchinson's form.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import mixtures, results, run
from jflow import likelihood, plots

# (g, x, z, size) -> an estimate of div g(x) from one draw of the noise.
Estimate = Callable[[Callable[[jax.Array], jax.Array], jax.Array, jax.Array, jax.Array], jax.Array]
Table = dict[float, dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the experiment."""

    out: pathlib.Path = pathlib.Path("runs/small_noise")
    """Directory for table.md, results.json and small_noise.png."""
    time: float = 0.6
    """The time t at which g = b_t."""
    points: int = 64
    """Points x, drawn from the law at that time."""
    nodes: int = 40
    """Nodes of the quadrature in each of the two dimensions."""
    noise: float = 0.5
    """eps of the diffusion's steps."""
    seed: int = 0
    """Seed of the points."""
    quick: bool = False
    """Few points and nodes, to show that everything works."""
    overwrite: bool = False
    """Replace earlier results in --out."""

    def check(self) -> None:
        """Refuses values out of range, and an output that is there.

        Raises:
          ValueError: naming the option, what came and what was expected.
          FileExistsError: without --overwrite.
        """
        if not 0.0 <= self.time <= 1.0:
            raise ValueError(f"--time: expected a number from 0 to 1, got {self.time}")
        for name in ("points", "nodes"):
            if getattr(self, name) < 2:
                raise ValueError(f"--{name}: expected at least 2, got {getattr(self, name)}")
        if not 0.0 < self.noise < float("inf"):
            raise ValueError(f"--noise: expected a positive number, got {self.noise}")
        if self.seed < 0:
            raise ValueError(f"--seed: expected a whole number from 0, got {self.seed}")
        results.refuse_existing(self.out, self.overwrite)


def plain(g: Any, x: jax.Array, z: jax.Array, size: jax.Array) -> jax.Array:
    """z'g(x + s z)/s."""
    return z @ g(x + size * z) / size


def difference(g: Any, x: jax.Array, z: jax.Array, size: jax.Array) -> jax.Array:
    """z'(g(x + s z) - g(x))/s."""
    return z @ (g(x + size * z) - g(x)) / size


def hutchinson(g: Any, x: jax.Array, z: jax.Array, size: jax.Array) -> jax.Array:
    """z'Jz; there is no size."""
    del size
    return z @ jax.jvp(g, (x,), (z,))[1]


def squared_errors(noise: float) -> Estimate:
    """(F - B)/(2 eps^2 h^2), the errors of a diffusion's step of length h = ``size``."""

    def estimate(g: Any, x: jax.Array, z: jax.Array, size: jax.Array) -> jax.Array:
        there = x + size * g(x) + noise * jnp.sqrt(size) * z
        forward = jnp.sum((there - x - size * g(x)) ** 2)
        backward = jnp.sum((there - x - size * g(there)) ** 2)
        return (forward - backward) / (2.0 * noise**2 * size**2)

    return estimate


SIZES = tuple(0.4 * 2.0**-k for k in range(7))
STEPS = tuple(0.02 * 2.0**-k for k in range(7))


class Setting(NamedTuple):
    """A velocity at one time, and where its divergence is asked for.

    Attributes:
      g: ``x [2] -> [2]``.
      points: ``[P, 2]``.
      truth: div g there, ``[P]``, exact.
    """

    g: Callable[[jax.Array], jax.Array]
    points: jax.Array
    truth: jax.Array


def setting(config: Config) -> Setting:
    """The mixture's velocity at the configuration's time, and points of its law."""
    oracle, params = mixtures.oracle("linear"), mixtures.target()
    t = jnp.asarray(config.time)

    def g(x: jax.Array) -> jax.Array:
        return oracle.velocity(params, t, x)

    points = oracle.sample(oracle.marginal(params, t), jax.random.key(config.seed), config.points)
    exact = likelihood.exact_divergence()
    return Setting(g, points, jax.vmap(lambda x: exact(g, x, None)[1])(points))


def moments(this: Setting, estimate: Estimate, sizes: tuple[float, ...], nodes: int) -> dict[str, np.ndarray]:
    """Root mean squares over the points of an estimate's bias and standard deviation, at each size: ``[sizes]`` each."""
    axis, weights = np.polynomial.hermite_e.hermegauss(nodes)
    z = jnp.asarray(np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2))
    weights = jnp.asarray(np.outer(weights, weights).ravel() / weights.sum() ** 2)

    def at(size: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(x: jax.Array, truth: jax.Array) -> tuple[jax.Array, jax.Array]:
            errors = jax.vmap(lambda z_: estimate(this.g, x, z_, size))(z) - truth
            mean = weights @ errors
            return mean**2, weights @ (errors - mean) ** 2

        bias, variance = jax.vmap(one)(this.points, this.truth)
        return jnp.sqrt(jnp.mean(bias)), jnp.sqrt(jnp.mean(variance))

    bias, deviation = jax.jit(lambda sizes: jax.lax.map(at, sizes))(jnp.asarray(sizes))
    return {"bias": np.asarray(bias), "deviation": np.asarray(deviation)}


def slope(sizes: tuple[float, ...], values: np.ndarray, last: int = 4) -> float:
    """The order in the size, by regression over the smallest ``last`` sizes."""
    return float(np.polyfit(np.log(sizes[-last:]), np.log(values[-last:]), 1)[0])


def tables(config: Config) -> dict[str, Table]:
    """By noise s, the three forms; by step h, the diffusion's squared errors, with Hutchinson's beside them."""
    this = setting(config)

    def table(sizes: tuple[float, ...], estimates: dict[str, Estimate]) -> Table:
        found = {name: moments(this, estimate, sizes, config.nodes) for name, estimate in estimates.items()}
        return {
            size: {f"{name}_{what}": float(v[k]) for name, both in found.items() for what, v in both.items()}
            for k, size in enumerate(sizes)
        }

    return {
        "noise": table(SIZES, {"plain": plain, "difference": difference, "hutchinson": hutchinson}),
        "step": table(STEPS, {"squared_errors": squared_errors(config.noise), "hutchinson": hutchinson}),
    }


def main(config: Config) -> None:
    """Writes the tables, the figure and the slopes to ``config.out``."""
    if config.quick:
        config = dataclasses.replace(config, points=8, nodes=24)
    jax.config.update("jax_enable_x64", True)
    found = tables(config)
    slopes, texts = {}, []
    for name, rows in found.items():
        sizes, columns = tuple(rows), next(iter(rows.values()))
        series = {column: np.array([row[column] for row in rows.values()]) for column in columns}
        # Hutchinson's bias is rounding error and has no order.
        kept = {column: values for column, values in series.items() if column != "hutchinson_bias"}
        slopes[name] = {column: slope(sizes, values) for column, values in kept.items()}
        body = [[size, *row.values()] for size, row in rows.items()]
        texts.append(
            results.markdown([name, *columns], [*body, ["slope", *[slopes[name].get(c, "-") for c in columns]]])
        )
    settings = {**dataclasses.asdict(config), "out": str(config.out)}
    values = {"tables": found, "slopes": slopes, "config": settings}
    results.write(config.out, values, "\n\n".join(texts))
    _figure(config, found)


def _figure(config: Config, found: dict[str, Table]) -> None:
    figure, axes = plots.panels(1, 2, size=(5.5, 4.0))
    labels = {"noise": "size s of the noise", "step": f"step h, at eps = {config.noise:g}"}
    for axis, (name, rows) in zip(axes[0], found.items(), strict=True):
        columns = [column for column in next(iter(rows.values())) if column != "hutchinson_bias"]
        lines = {c.replace("_", " "): (list(rows), [row[c] for row in rows.values()]) for c in columns}
        plots.curves(lines, formats={c: "o-" if c.endswith("bias") else "s--" for c in lines}, ax=axis)
        axis.set(xscale="log", yscale="log", xlabel=labels[name], ylabel="root mean square over points")
    figure.savefig(config.out / "small_noise.png", dpi=120)


if __name__ == "__main__":
    run.main(Config, main)
