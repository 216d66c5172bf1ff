"""Real images: a class-conditional flow map of Fashion-MNIST (28x28), drawn in one jump and held against the 100-step solve.

    python -m experiments.fashion --out runs/fashion

It needs the 70,000 images of the Debian package dataset-fashion-mnist, or a folder of IDX files (--data). A small classifier is
trained first; its 64 features measure the distances. With --quick, drawn shapes take the place of the clothes. The default is
for two CPU cores; ``--preset gpu`` chooses a UNet, more steps and larger batches.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import drawing, images, options, results, run, solver_table, timing
from experiments.shared.images import ImageMethod, ImageNetwork, Scores
from experiments.shared.model import Model, Problem
from experiments.shared.options import Flat, Optimizer
from jflow import conditions, guidance, metrics, plots, samplers, sharding, solvers, training
from jflow.datasets import PIXELS, Split
from jflow.training import distributed, image_grids
from jflow.types import BoundFlowMap, FlowMap

JUMPS = (1, 2, 4, 8)
EULER = (4, 8, 25, 100)
SCALES = (1.0, 1.5, 2.0, 3.0)
NAMES = "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
# The options that --preset gpu changes.
GPU: dict[str, Any] = {
    "network": "unet",
    "features": 96,
    "depth": 2,
    "steps": 100_000,
    "batch": 256,
    "learning_rate": 4e-4,
}
QUICK = {
    "features": 16,
    "depth": 2,
    "steps": 20,
    "batch": 16,
    "log_every": 10,
    "warmup": 5,
    "samples": 60,
    "score_every": 10,
    "drawn": True,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Training):
    """Options of the experiment of clothes."""

    model: Flat[ImageNetwork] = dataclasses.field(default=ImageNetwork())  # pyright: ignore[reportIncompatibleVariableOverride]
    method: Flat[ImageMethod] = dataclasses.field(default=ImageMethod())
    optimizer: Flat[Optimizer] = dataclasses.field(
        default=Optimizer(steps=9000, batch=128, learning_rate=1e-3, warmup=300, clip=2000.0)
    )
    preset: Literal["cpu", "gpu"] = "cpu"
    """cpu: the defaults below. gpu: a UNet for an accelerator; options that are given override it."""
    data: pathlib.Path | None = None
    """Folder of IDX files (MNIST's format); by default Fashion-MNIST of the Debian package."""
    drawn: bool = False
    """Drawn shapes in place of clothes, as in a quick run."""
    classifier: pathlib.Path | None = None
    """An .npz file of metrics.save_classifier; by default one is trained on the data, to OUT/classifier.npz."""
    samples: int = 5000
    """Images drawn for each score."""
    score_every: int = 1000
    """Steps between scores and pictures during training; a multiple of --log-every, 0 for none."""
    machine: options.Machine = dataclasses.field(default=options.Machine())

    def check(self) -> None:
        """As ``Training.check``."""
        super().check()
        options.positive(self, "samples")
        if self.score_every % self.output.log_every or self.score_every < 0:
            raise ValueError(f"--score-every: expected a multiple of --log-every, got {self.score_every}")

    def kept(self) -> dict[str, Any]:
        """As ``Training.kept``, with the paths of the data and of the classifier."""
        paths = {
            "data": None if self.data is None else str(self.data.absolute()),
            "classifier": str((self.classifier or self.out / "classifier.npz").absolute()),
        }
        values = {name: value for name, value in super().kept().items() if name not in ("score_every", "preset")}
        return {**values, **paths}


def numbers(config: Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The numbers of jumps and of Euler steps; a quick run compiles fewer programs."""
    return ((1, 4), (8,)) if config.output.quick else (JUMPS, EULER)


@functools.cache
def _classifier(config: Config) -> metrics.FeatureNet:
    """The feature network: read, or trained on the data."""
    path = pathlib.Path(config.classifier or config.out / "classifier.npz")
    if path.exists() or config.classifier is not None:
        return metrics.load_classifier(path)
    split = _split(config)
    recipe = dataclasses.replace(metrics.RECIPE, epochs=2, width=64) if config.output.quick else metrics.RECIPE
    found = metrics.train_classifier(split.train.x1, np.asarray(split.train.cond), recipe=recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics.save_classifier(path, found)
    return found


def _split(config: Config) -> Split:
    return images.load(config.data, config.drawn)


def problem(config: Config) -> Problem:
    """The data and how samples are compared."""

    def features(x: jax.Array) -> jax.Array:
        net = _classifier(config)
        return net.apply(net.params, jnp.clip(x, -1.0, 1.0)).features

    split = _split(config)
    found = images.problem(split, config.optimizer.batch, config.seed, config.method.conditional, features)
    labels = found.labels
    if labels is None:
        return found
    return found._replace(labels=lambda key, n: conditions_of(config, labels(key, n)))


def model_of(config: Config, this: Problem) -> Model:
    """The model of a configuration."""
    return images.build(config.model, config.method, this)


def conditions_of(config: Config, labels: jax.Array | None, scale: float | None = None) -> Any:
    """What the network receives for these labels: with the scale, if it was trained at several."""
    if labels is None or not config.method.fed:
        return labels
    w = jnp.full(labels.shape, config.method.scale if scale is None else scale, jnp.float32)
    return conditions.Scaled(labels, w)


def draw(config: Config, flow_map: FlowMap, params: Any, jumps: int, n: int, scale: float | None = None) -> np.ndarray:
    """n images of all classes in turn, from the same noise for every map and number of jumps."""
    labels = jnp.arange(n, dtype=jnp.int32) % len(NAMES) if config.method.conditional else None
    like = jax.ShapeDtypeStruct(_split(config).train.x1.shape[1:], jnp.float32)
    drawn = samplers.draw(
        samplers.Jumps(flow_map.bind(params)),
        jax.random.key(config.seed + 1),
        n,
        samplers.uniform_grid(jumps),
        conditions_of(config, labels, scale),
        like=like,
        block=1000,
    )
    return np.asarray(drawn, np.float32)


def main(config: Config) -> None:
    """Trains, scores, draws, and writes everything to ``config.out``."""
    config = _chosen(config)
    split = _split(config)
    this = problem(config)
    model = model_of(config, this)
    results.refuse_existing(config.out, config.output.overwrite or config.output.resume != "no")
    scores = Scores.of(_classifier(config), split)
    objective = images.objective_of(config.method, model, config.optimizer.steps)
    labels = np.arange(config.samples) % len(NAMES) if config.method.conditional else None

    def watched(state: training.TrainState) -> dict[str, float]:
        params = sharding.local(training.ema.as_params(state.ema[run.AVERAGE], state.params))
        drawn = draw(config, model.flow_map, params, 1, min(config.samples, 1000))
        if distributed.first_process():
            (config.out / "grids").mkdir(exist_ok=True)
            image_grids.write_png(config.out / "grids" / f"{int(state.step)}.png", image_grids.tile(drawn[:100]))
        return {"frechet_of_one_jump": scores.quick(drawn)}

    evaluation = training.Evaluation(watched, config.score_every) if config.score_every else None
    trainer = run.trainer(config, this, model, objective)
    bound, seconds = run.train(config, this, model, trainer, evaluation=evaluation)
    jumps_of, steps_of = numbers(config)
    last = f"{steps_of[-1]} Euler steps"
    drawn = {jumps: draw(config, model.flow_map, bound.params, jumps, config.samples) for jumps in jumps_of}
    solved = {steps: draw(config, _euler(model, steps), bound.params, 1, config.samples) for steps in steps_of}
    table: dict[str, dict[str, float]] = {
        **{drawing.named(jumps): {"nfe": jumps, **scores.all(x, labels)} for jumps, x in drawn.items()},
        **{f"{steps} Euler steps": {"nfe": steps, **scores.all(x, labels)} for steps, x in solved.items()},
        "training images (floor)": {"nfe": 0, **scores.floor(split)},
    }
    times = _times(config, model, bound)
    found: dict[str, Any] = {
        "scores": table,
        "trace": scores.trace,
        "classifier": {
            "name": scores.network.name,
            "hash": scores.network.hash,
            "accuracy": metrics.label_accuracy(scores.reference).value,
        },
        "sweep": _sweep(config, model, bound, scores, labels),
        "seconds": times,
        f"one jump / {last}": table["1 jump"]["frechet"] / table[last]["frechet"],
        f"four jumps / {last}": table["4 jumps"]["frechet"] / table[last]["frechet"],
        "speed-up": times[last] / times["1 jump"],
        "data": "drawn shapes" if config.drawn else str(config.data or "Fashion-MNIST"),
        **run.speed(config, seconds),
        "config": config.kept(),
    }
    for jumps, x in drawn.items():
        np.save(config.out / f"samples_{jumps}.npy", x[:1000])
    results.write(config.out, found, results.labelled("fashion", table))
    _figures(config, split, scores, drawn, solved[steps_of[-1]], bound, table)
    if not config.output.quick:  # it would take as long as everything else
        solver_table.write(config.out, config.out / "solver_vs_map")
    print(f"pictures: {config.out}")


def _chosen(config: Config) -> Config:
    """The configuration with the values of --quick or of the preset, where an option has its default."""
    chosen = QUICK if config.output.quick else GPU if config.preset == "gpu" else {}
    default, given = options.flat(Config(out=config.out)), options.flat(config)
    return options.replace(config, **{name: value for name, value in chosen.items() if given[name] == default[name]})


def _euler(model: Model, steps: int) -> FlowMap:
    return solvers.solve(model.flow_map.velocity, "euler", steps=steps)


def _times(config: Config, model: Model, bound: BoundFlowMap) -> dict[str, float]:
    """Median seconds for a batch of 256, interleaved; compilation apart."""
    batch = 16 if config.output.quick else 256
    labels = jnp.arange(batch, dtype=jnp.int32) % len(NAMES) if config.method.conditional else None
    cond = conditions_of(config, labels)
    noise = drawing.noise(jax.random.key(0), batch, _split(config).train.x1.shape[1:])

    def jumps_of(flow_map: FlowMap, jumps: int) -> Any:
        ends = np.linspace(0.0, 1.0, jumps + 1, dtype=np.float32)

        def one(params: Any, x: jax.Array, cond: Any) -> jax.Array:
            for s, t in itertools.pairwise(ends):
                x = flow_map.jump(params, s, t, x, cond)
            return x

        every = jax.jit(jax.vmap(one, (None, 0, None if cond is None else 0)))
        return lambda _: every(bound.params, noise, cond)

    jumps, steps = numbers(config)
    calls = {drawing.named(n): jumps_of(model.flow_map, n) for n in jumps[:: len(jumps) - 1]}
    calls |= {f"{n} Euler steps": jumps_of(_euler(model, n), 1) for n in steps[-1:]}
    spent = timing.interleaved(calls, rounds=1 if config.output.quick else 7)
    return {name: spent.median(name) for name in calls}


def _sweep(
    config: Config, model: Model, bound: BoundFlowMap, scores: Scores, labels: np.ndarray | None
) -> dict[str, dict[str, float]]:
    """One jump and a solve at several scales of guidance; without drawn scales, beyond the guidance that was trained."""
    if labels is None:
        return {}
    found, n = {}, min(config.samples, 2000)
    steps = 4 if config.output.quick else 25
    for w in (1.5,) if config.output.quick else SCALES:
        if config.method.fed:
            maps, scale = {"1 jump": model.flow_map, f"{steps} Euler steps": _euler(model, steps)}, w
        else:
            guided = guidance.classifier_free(model.flow_map, w)
            maps = {
                "1 jump, extrapolated": guidance.extrapolated_jumps(model.flow_map, w),
                f"{steps} Euler steps": solvers.solve(guided, "euler", steps=steps),
            }
            scale = None
        for name, flow_map in maps.items():
            drawn = draw(config, flow_map, bound.params, 1, n, scale)
            x = scores.features(drawn, labels[:n])
            found[f"{name}, w = {w:g}"] = {
                "frechet": metrics.frechet_score(x, scores.reference).value,
                "accuracy": metrics.label_accuracy(x).value,
            }
    return found


# --- figures ----------------------------------------------------------------------------------------------------------


def _figures(
    config: Config,
    split: Split,
    scores: Scores,
    drawn: dict[int, np.ndarray],
    solved: np.ndarray,
    bound: BoundFlowMap,
    table: dict[str, dict[str, float]],
) -> None:
    columns = 8
    real = np.asarray(PIXELS.forward(jnp.asarray(split.held_out.x1)))
    by_class = [np.flatnonzero(np.asarray(split.held_out.cond) == c)[:columns] for c in range(len(NAMES))]
    shown = {"real, held out": np.concatenate([real[rows] for rows in by_class])}
    # Drawn images are of all classes in turn.
    order = np.concatenate([np.arange(columns) * len(NAMES) + c for c in range(len(NAMES))])
    order = order[order < len(solved)]
    for jumps in sorted({1, 2, 4} & set(drawn)):
        shown[drawing.named(jumps)] = drawn[jumps][order]
    shown[f"{numbers(config)[1][-1]} Euler steps"] = solved[order]
    figure, axes = plots.panels(1, len(shown), size=(3.2, 4.2))
    for axis, (title, pictures) in zip(axes[0], shown.items(), strict=True):
        plots.image_grid(np.clip(pictures, -1.0, 1.0), columns=columns, vmin=1.0, vmax=-1.0, ax=axis)
        axis.set(title=title)
    figure.savefig(config.out / "fashion.png", dpi=150)
    _score_figure(config, table)
    _neighbours(config, split, scores, drawn[1])
    _interpolation(config, bound, real)


def _score_figure(config: Config, table: dict[str, dict[str, float]]) -> None:
    figure, axes = plots.panels(1, 3, size=(4.0, 3.2))
    jumps, steps = numbers(config)
    names = {"jumps": [drawing.named(n) for n in jumps], "Euler steps": [f"{n} Euler steps" for n in steps]}
    for axis, measure in zip(axes[0], ("frechet/trace", "kid", "recall"), strict=True):
        for label, rows in names.items():
            axis.plot([table[row]["nfe"] for row in rows], [table[row][measure] for row in rows], "o-", label=label)
        axis.axhline(table["training images (floor)"][measure], color="grey", linestyle=":", label="training images")
        axis.set(xscale="log", xlabel="network calls", ylabel=measure)
    axes[0, 0].legend()
    figure.savefig(config.out / "scores.png", dpi=150)


def _neighbours(config: Config, split: Split, scores: Scores, one_jump: np.ndarray) -> None:
    """Beside each drawn image the three nearest training images, in features."""
    train = metrics.features(scores.network, split.train.x1)
    found = metrics.nearest(scores.features(one_jump[:20], None), train, k=3)
    nearest = np.asarray(PIXELS.forward(jnp.asarray(split.train.x1[found.indices])))
    rows = np.concatenate([one_jump[:20, None], nearest], axis=1).reshape(-1, *one_jump.shape[1:])
    figure = plots.image_grid(np.clip(rows, -1.0, 1.0), columns=16, vmin=1.0, vmax=-1.0)
    figure.savefig(config.out / "neighbours.png", dpi=150)


def _interpolation(config: Config, bound: BoundFlowMap, real: np.ndarray) -> None:
    """Real images are encoded by the solve from 1 to 0, and points between their codes are decoded by one jump."""
    labels = jnp.asarray([0, 0, 7, 7], jnp.int32) if config.method.conditional else None
    cond = conditions_of(config, labels)
    held_out = np.asarray(_split(config).held_out.cond)
    rows = np.concatenate([np.flatnonzero(held_out == c)[:2] for c in (0, 7)])
    encode = solvers.solve(bound.flow_map.velocity, "heun", steps=4 if config.output.quick else 50)
    vmapped = jax.jit(
        jax.vmap(lambda x, c: encode.jump(bound.params, 1.0, 0.0, x, c), (0, None if cond is None else 0))
    )
    codes = vmapped(jnp.asarray(real[rows]), cond)
    angles = jnp.linspace(0.0, jnp.pi / 2, 8)

    def between(a: jax.Array, b: jax.Array, c: Any) -> jax.Array:
        # On the great circle, so that the norm stays that of noise.
        codes = jnp.cos(angles)[:, None, None, None] * a[None] + jnp.sin(angles)[:, None, None, None] * b[None]
        return jax.vmap(lambda x: bound.jump(0.0, 1.0, x, c))(codes)

    of_pairs = [between(codes[i], codes[i + 1], jax.tree.map(lambda leaf, i=i: leaf[i], cond)) for i in (0, 2)]
    ends = [(real[[rows[i]]], real[[rows[i + 1]]]) for i in (0, 2)]
    lines = np.concatenate([part for (a, b), x in zip(ends, of_pairs, strict=True) for part in (a, np.asarray(x), b)])
    figure = plots.image_grid(np.clip(lines, -1.0, 1.0), columns=10, vmin=1.0, vmax=-1.0)
    figure.savefig(config.out / "interpolation.png", dpi=150)


if __name__ == "__main__":
    run.main(Config, main)
