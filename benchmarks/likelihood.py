"""Log-densities along the ODE: the speed of jflow and of ``compute_likelihood`` in Meta's package ``flow_matching``.

    pip install -e '.[experiments,flow-matching]'
    python -m benchmarks.likelihood [--out runs/likelihood]

Both packages get the same batch, network (an MLP in jax and in torch, with the same weights), base N(0, I), solver, steps,
threads and divergence (exact, or Hutchinson with one probe of signs that is fixed within a solve). Before any timing they
must agree in the number of evaluations, and to the rounding of float32 in the velocity, the base points and the
log-densities. Estimates are compared with the same probes; the mean of jflow's own estimates must agree within its standard
error.

The calls are interleaved, without compilation, and torch keeps no gradients of parameters. The times are in milliseconds
per sample. A ratio is the median of the ratios within a round, by the wall clock and by processor time, which other
programs on the machine distort less. The goal is a ratio of at least 1.5.

The column "passes" is the cost of one evaluation in jflow in units of a forward pass, by XLA's cost analysis. At most 1.02
(1 + d) is expected with the exact divergence, and 2.05 with a probe. The other package's reverse mode needs as many. The
matrix products of wide networks run at the processor's peak in both, so only the remaining time can differ.

Only this benchmark needs the package (licence: CC BY-NC). It takes four minutes and writes table.md, likelihood.png and
results.json.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import results, timing
from experiments.shared.run import main
from jflow import likelihood, plots
from jflow.types import Array, Cond, Event, Key, Params, Time

GOAL = 1.5
DIVERGENCES = {"exact": likelihood.exact_divergence(), "hutchinson": likelihood.hutchinson(1)}
# Evaluations per step, by either package.
STAGES = {"euler": 1, "midpoint": 2}
# How far apart values may be, relative to the largest: many roundings of float32.
ROUNDING = 1e-5
# How many standard errors an unbiased mean may be off.
ERRORS = 4.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    out: pathlib.Path = pathlib.Path("runs/likelihood")
    """Directory for table.md, likelihood.png and results.json."""
    dims: tuple[int, ...] = (2, 16, 64)
    """Dimensions d of a sample."""
    methods: tuple[Literal["euler", "midpoint"], ...] = ("midpoint", "euler")
    """Solvers to be timed."""
    steps: int = 10
    """Equal steps of a solve."""
    batch: int = 256
    """Samples per call."""
    features: int = 256
    """Width of the network."""
    depth: int = 4
    """Hidden layers."""
    repeats: int = 11
    """Timed calls of each package."""
    threads: int = 1
    """Processor cores and threads that each package may use."""
    seed: int = 0
    """Seed of the weights, the points and the probes."""
    quick: bool = False
    """A small network, few samples and repeats; the numbers mean nothing."""
    overwrite: bool = False
    """Replace earlier results in --out."""

    def check(self) -> None:
        """Refuses values out of range (ValueError), and an output that is there (FileExistsError)."""
        lows = {"steps": 1, "batch": 2, "features": 1, "depth": 1, "repeats": 1, "threads": 1, "seed": 0}
        for name, low in lows.items():
            if getattr(self, name) < low:
                raise ValueError(f"--{name}: expected a whole number from {low}, got {getattr(self, name)}")
        if min(self.dims, default=0) < 1:
            raise ValueError(f"--dims: expected positive whole numbers, got {self.dims}")
        if self.threads > (cores := len(os.sched_getaffinity(0))):
            raise ValueError(f"--threads: expected at most the {cores} cores of this process, got {self.threads}")
        results.refuse_existing(self.out, self.overwrite)


def network(config: Config, d: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights [in, out] and biases of an MLP from (t, x) to the velocity, float32."""
    rng, sizes = np.random.default_rng(config.seed), itertools.pairwise([d + 1, *[config.features] * config.depth, d])
    return [(np.float32(rng.normal(0, 1.5 / np.sqrt(m), (m, n))), np.float32(rng.normal(0, 0.1, n))) for m, n in sizes]


def velocity(params: Params, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Array:
    """b_t(x) of one sample [d], SiLU between the layers."""
    h = jnp.concatenate([jnp.asarray(t)[None], x])
    for w, b in params[:-1]:
        h = jax.nn.silu(h @ w + b)
    return h @ params[-1][0] + params[-1][1]


def torch_velocity(layers: list[tuple[np.ndarray, np.ndarray]]) -> Callable[..., Any]:
    """The same of a batch, ``(x [B, d], t) -> [B, d]``, as the package calls it."""
    import torch
    from torch.nn.functional import linear, silu

    # Laid out as torch.nn.Linear keeps them; plain tensors have no gradient.
    weights = [(torch.tensor(w.T.copy()), torch.tensor(b)) for w, b in layers]

    def batched(x: Any, t: Any) -> Any:
        h = torch.cat([t.expand(len(x), 1), x], dim=1)
        for w, b in weights[:-1]:
            h = silu(linear(h, w, b))
        return linear(h, *weights[-1])

    return batched


class Case:
    """A solver, a divergence and a dimension, with the network and a batch of points for both packages."""

    def __init__(self, config: Config, method: str, divergence: str, d: int) -> None:
        self.config, self.method, self.divergence, self.d = config, method, divergence, d
        self.name, self.layers = f"{method}, {divergence}, d = {d}", network(config, d)
        self.points = np.random.default_rng([config.seed, 1]).normal(size=(config.batch, d)).astype(np.float32)
        self.arguments = jax.tree.map(jnp.asarray, (self.layers, self.points, np.uint32(config.seed)))

    def ours(self, velocity: Any = velocity, divergence: Any = None) -> Callable[..., tuple[Array, Array]]:
        """``(params, x [B, d], seed) -> (x0 [B, d], log rho_1(x) [B])`` of jflow, jitted."""
        divergence = divergence or DIVERGENCES[self.divergence]
        density = likelihood.along_ode(velocity, divergence, solver=self.method, steps=self.config.steps)

        def of(params: Params, x: Array, seed: Array) -> tuple[Array, Array]:
            # Drawn within the program, because the package also draws its probes within the call.
            keys = jax.random.split(jax.random.key(seed), len(x))
            found = jax.vmap(lambda x, key: density.log_density(params, x, key=key))(x, keys)
            return found.x0, found.log_density

        return jax.jit(of)

    def theirs(self, batched: Any = None) -> Callable[[], tuple[Any, Any]]:
        """``() -> (x0 [B, d], log rho_1(x) [B])`` of the package."""
        import torch
        from flow_matching.solver import ODESolver

        solver, x = ODESolver(batched or torch_velocity(self.layers)), torch.tensor(self.points)
        options = {"step_size": 1.0 / self.config.steps, "method": self.method}
        log_p0 = lambda x: -0.5 * (x**2).sum(1) - 0.5 * self.d * float(np.log(2.0 * np.pi))  # noqa: E731
        return lambda: solver.compute_likelihood(x, log_p0, exact_divergence=self.divergence == "exact", **options)

    def evaluations(self) -> int:
        """How often jflow evaluates the velocity of the batch, counted in a run of the compiled program."""
        calls: list[None] = []

        def counted(*args: Any, **kwargs: Any) -> Array:
            # A callback without mapped arguments would be called once for the whole batch.
            jax.debug.callback(lambda: calls.append(None))
            return velocity(*args, **kwargs)

        jax.block_until_ready(self.ours(counted)(*self.arguments))
        jax.effects_barrier()
        return len(calls)

    def passes(self) -> float:
        """FLOPs of an evaluation of jflow over those of a forward pass, for one sample, by XLA's cost analysis."""

        def flops(function: Callable[..., Any]) -> float:
            return timing.flops(function, *self.arguments)

        # XLA counts the body of the loop over steps once, and Euler's holds one evaluation.
        density = likelihood.along_ode(velocity, DIVERGENCES[self.divergence], solver="euler", steps=5)
        solve = flops(lambda params, x, seed: density.log_density(params, x[0], key=jax.random.key(seed)))
        return solve / flops(lambda params, x, seed: velocity(params, jnp.float32(0.5), x[0]))

    def agree(self, run: Callable[..., Any]) -> dict[str, float]:
        """The largest differences between ``ours``, compiled or not, and the package, in units of the largest value; "mean":
        the standard errors between estimates and exact log-densities. ValueError when they are too large, or a package does
        not evaluate the velocity as often as it should.
        """
        import torch

        (params, x, seed), their_x, calls = self.arguments, torch.tensor(self.points), []
        batched = torch_velocity(self.layers)
        torch.manual_seed(self.config.seed)
        their_x0, theirs = (a.numpy() for a in self.theirs(lambda x, t: (calls.append(None), batched(x, t))[1])())
        x0, ours = (np.asarray(a) for a in run(params, x, seed))
        found = {}
        if self.divergence == "hutchinson":
            off = ours - np.asarray(self.ours(divergence=DIVERGENCES["exact"])(params, x, seed)[1], np.float64)
            # In one dimension a probe of signs is exact up to rounding.
            found["mean"] = float(abs(off.mean()) / (off.std() / np.sqrt(len(off)) + ROUNDING * np.abs(ours).max()))
            # The package draws its probes so, at the beginning of a call.
            torch.manual_seed(self.config.seed)
            z = jnp.asarray(((torch.randn_like(their_x) < 0) * 2.0 - 1.0).numpy())

            def probed(x: Array, z: Array) -> Array:
                def along(b: Callable[[Array], Array], x: Array, key: Key | None) -> tuple[Array, Array]:
                    value, jz = jax.jvp(b, (x,), (z,))
                    return value, z @ jz

                return self.ours(divergence=along)(params, x[None], seed)[1][0]

            ours = jax.jit(jax.vmap(probed))(x, z)
        b = jax.vmap(lambda x: velocity(params, jnp.float32(0.3), x))(x)
        their_b = batched(their_x, torch.tensor(0.3)).numpy()
        pairs = {"velocity": (b, their_b), "x0": (x0, their_x0), "log_density": (ours, theirs)}
        found |= {name: float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()) for name, (a, b) in pairs.items()}
        for name, difference in found.items():
            allowed = ERRORS if name == "mean" else ROUNDING
            # In this form the comparison also refuses numbers that are not finite.
            if not difference <= allowed:
                raise ValueError(f"{self.name}: expected {name} to differ by at most {allowed:g}, got {difference:.3g}")
        want, counts = STAGES[self.method] * self.config.steps, (self.evaluations(), len(calls))
        if counts != (want, want):
            raise ValueError(f"{self.name}: expected {want} evaluations by jflow and by the package, counted {counts}")
        return found

    def measure(self) -> dict[str, Any]:
        """A row of the results: agreement, cost, times and ratios."""
        compiled, compile_seconds = timing.compiled(self.ours(), *self.arguments)
        differences = self.agree(compiled)
        theirs = self.theirs()
        calls = {"ours": lambda _: compiled(*self.arguments), "theirs": lambda _: theirs()}
        times = timing.interleaved(calls, self.config.repeats)
        ratios = np.stack([times.ratios("theirs", "ours", clock) for clock in timing.CLOCKS])
        ms = [1e3 * times.median(name) / self.config.batch for name in calls]
        return {
            **{"method": self.method, "divergence": self.divergence, "d": self.d},
            "evaluations": STAGES[self.method] * self.config.steps,
            **{"ms_per_sample": float(ms[0]), "their_ms_per_sample": float(ms[1])},
            **{"ratio": float(np.median(ratios[0])), "ratio_processor": float(np.median(ratios[1]))},
            "passes": self.passes(),
            "limit": 1.02 * (1 + self.d) if self.divergence == "exact" else 2.05,
            "difference": differences["log_density"],
            "compile_seconds": compile_seconds,
            **{"ratios": ratios, "differences": differences},
        }


def run(config: Config) -> None:
    """Measures every case and writes everything to ``config.out``; ValueError without the package, or as ``agree``."""
    # Before jax and torch make their threads, which inherit it.
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: config.threads]))
    try:
        import flow_matching.solver  # noqa: F401
        import torch
    except ImportError as error:
        install = "pip install 'jflow[flow-matching]', or in a checkout pip install -e '.[experiments,flow-matching]'"
        raise ValueError(f"the extra flow-matching is not installed ({error}): {install}") from error
    torch.set_num_threads(config.threads)
    if config.quick:
        small = {"dims": (2, 5), "methods": ("midpoint",), "steps": 4, "batch": 64, "features": 32, "repeats": 3}
        config = dataclasses.replace(config, **small)
    cases = itertools.product(config.methods, DIVERGENCES, config.dims)
    rows = [Case(config, *case).measure() for case in cases]
    header = ["solver", "divergence", "d", "evaluations", "jflow, ms/sample", "flow_matching, ms/sample", "ratio"]
    header += ["ratio, processor", "passes", "at most", "difference", "compile s"]
    # The first entries of a row are the table's.
    table = results.markdown(header, [list(row.values())[: len(header)] for row in rows])
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("out", "overwrite")}
    record = {"benchmark": "likelihood", "results": rows, "goal": GOAL, "config": options}
    record["reached"] = all(row["ratio"] >= GOAL and row["passes"] <= row["limit"] for row in rows)
    versions = results.environment()["versions"]
    record["versions"] = versions | {
        name: importlib.metadata.version(name) for name in ("torch", "torchdiffeq", "flow_matching")
    }
    results.write(config.out, record, table)
    _figure(config, rows)
    print(f"goal of {GOAL}, and limits of passes: " + ("reached" if record["reached"] else "missed"))


def _figure(config: Config, rows: list[dict[str, Any]]) -> None:
    lines, formats = {}, {}
    cases = itertools.product(zip(config.methods, "os", strict=False), enumerate(DIVERGENCES))
    for (method, marker), (colour, divergence) in cases:
        mine = [row for row in rows if (row["method"], row["divergence"]) == (method, divergence)]
        label = f"{divergence}, {method}"
        lines[label] = [row["d"] for row in mine], [row["ratio"] for row in mine]
        formats[label] = f"C{colour}{marker}-"
    figure, axes = plots.panels(size=(6.0, 4.2))
    axis = axes[0, 0]
    plots.curves(lines, formats=formats, ax=axis)
    axis.set_xscale("log", base=2)
    axis.axhline(GOAL, color="gray", linewidth=1, linestyle=":")
    axis.set(ylim=(0.0, None), xlabel="entries of an event, d", ylabel="time of flow_matching over that of jflow")
    figure.savefig(config.out / "likelihood.png", dpi=130)


if __name__ == "__main__":
    main(Config, run)
