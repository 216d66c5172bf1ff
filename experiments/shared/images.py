"""Image networks, data sets of images with labels, and scores of drawn images."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared.model import Model, Problem
from experiments.shared.options import between, positive
from jflow import conditions, datasets, interpolants, metrics, nets, objectives, parameterizations, reductions, times
from jflow.datasets import PIXELS, Split
from jflow.types import Batch, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageNetwork:
    """The network of images, and the flow map that it becomes."""

    network: Literal["mixer", "dit", "unet", "mlp"] = "mixer"
    """mixer: matmuls on overlapping windows, the fastest on CPUs. dit: a transformer of patches. unet: convolutions."""
    parameterization: Literal["v", "x", "gaussian"] = "gaussian"
    """What the network predicts: the mean velocity, the data end, or the mean velocity beyond a Gaussian's."""
    path: Literal["linear", "trigonometric", "cosine"] = "linear"
    """The interpolant."""
    features: int = 128
    """Width of the network; channels at the full resolution for unet."""
    depth: int = 5
    """Layers; residual blocks at each resolution for unet."""

    def check(self) -> None:
        """Raises ValueError for values out of range."""
        positive(self, "features", "depth")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageMethod:
    """The objective, how it draws its times, and guidance."""

    objective: Literal[
        "lsd", "esd", "psd_m", "psd_u", "mean_flow", "improved_mean_flow", "decoupled_mean_flow", "alpha_flow"
    ] = "lsd"
    """The training method (docs: jflow.objectives)."""
    recipe: Literal["ours", "published"] = "ours"
    """ours: squared reductions, uniform times and a start on the diagonal. published: the choices of the method's paper."""
    diagonal: float = 0.75
    """Share of each batch with s = t."""
    diagonal_start: float = 0.3
    """Share of the steps, at the beginning, in which the diagonal alone is trained."""
    full_jumps: float = 0.5
    """Share of the off-diagonal rows that start at s = 0; the others are uniform on the triangle."""
    guidance: Literal["none", "fixed", "drawn"] = "fixed"
    """Guidance in the target: none, at --scale, or at scales drawn from 1 to --scale, which the network receives."""
    scale: float = 2.0
    """The guidance scale that is trained, or the largest one."""
    label_dropout: float = 0.1
    """Share of the labels that become the null label."""
    conditional: bool = True
    """Whether the network receives the labels."""

    def check(self) -> None:
        """Raises ValueError for values out of range."""
        between(self, 0.0, 1.0, "diagonal", "diagonal_start", "full_jumps", "label_dropout")
        if not 1.0 <= self.scale < float("inf"):
            raise ValueError(f"--scale: expected a number from 1, got {self.scale}")
        if self.diagonal == 1.0:
            raise ValueError("--diagonal: expected less than 1: a flow map is learned on the off-diagonal rows")
        if not self.conditional and self.guidance != "none":
            raise ValueError(f"--guidance: expected none with --no-conditional, got {self.guidance}")

    @property
    def fed(self) -> bool:
        """Whether the network receives the scale."""
        return self.guidance == "drawn"


# --- data -------------------------------------------------------------------------------------------------------------


def shapes(n: int, seed: int, size: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """Drawn shapes in 10 classes: uint8 ``[n, size, size]`` and labels ``[n]``, uint8.

    Class c is a disc, square, bar, ring or cross, filled or as a grey outline, at a random place and of a random size.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, n).astype(np.uint8)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    images = np.zeros((n, size, size), np.uint8)
    for i, label in enumerate(labels):
        a, b = y - rng.uniform(10, size - 10), x - rng.uniform(10, size - 10)
        r, far = rng.uniform(5, 9), np.hypot(a, b)
        inside = (
            far < r,
            np.maximum(abs(a), abs(b)) < r,
            (abs(a) < r / 3) & (abs(b) < r),
            (far < r) & (far > r / 2),
            np.minimum(abs(a), abs(b)) < r / 4,
        )[label % 5]
        images[i] = np.where(inside, 255 if label < 5 else 128, 0) * rng.uniform(0.8, 1.0)
    return images, labels


def write_shapes(directory: pathlib.Path, train: int = 1000, held_out: int = 500) -> None:
    """Writes drawn shapes as the four files of MNIST's format."""
    for name, n, seed in (("train", train, 0), ("t10k", held_out, 1)):
        images, labels = shapes(n, seed)
        datasets.write_idx(directory / f"{name}-images-idx3-ubyte.gz", images)
        datasets.write_idx(directory / f"{name}-labels-idx1-ubyte.gz", labels)


@functools.cache
def load(data: pathlib.Path | None, drawn: bool) -> Split:
    """Labelled images, uint8: of a folder of IDX files, of Fashion-MNIST, or drawn shapes.

    Raises:
      FileNotFoundError: if files are missing; the message names the Debian package and ``--data``.
    """
    if drawn:
        with tempfile.TemporaryDirectory() as folder:
            write_shapes(pathlib.Path(folder))
            return datasets.mnist_folder(folder)
    try:
        return datasets.fashion_mnist() if data is None else datasets.mnist_folder(data)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, or pass the folder of your own IDX files as --data") from None


def problem(
    split: Split, batch: int, seed: int, conditional: bool, features: Callable[[jax.Array], jax.Array]
) -> Problem:
    """The data: uint8 on the device, converted in the training step."""
    labels = np.asarray(split.train.cond)
    rows = Batch(jnp.asarray(split.train.x1), cond=jnp.asarray(labels) if conditional else None)
    dataset = datasets.transformed(datasets.ArrayDataset(rows, batch, seed), datasets.each_row(PIXELS))
    count = int(labels.max()) + 1
    return Problem(
        dataset=dataset,
        event=split.train.x1.shape[1:],
        scale=1.0,
        reference=lambda key, n: np.asarray(PIXELS.forward(jnp.asarray(split.held_out.x1[:n]))),
        # Every class equally often, in turn.
        labels=(lambda key, n: jnp.arange(n, dtype=jnp.int32) % count) if conditional else None,
        classes=count if conditional else 0,
        features=features,
    )


# --- model ------------------------------------------------------------------------------------------------------------


def module_of(network: ImageNetwork, classes: int, cond_features: int) -> Any:
    """The flax module of a configuration."""
    shared = {"num_classes": classes, "cond_features": cond_features}
    if network.network == "mixer":
        return nets.Mixer(features=network.features, depth=network.depth, **shared)
    if network.network == "dit":
        return nets.DiT(features=network.features, depth=network.depth, patch=4, **shared)
    if network.network == "unet":
        return nets.UNet(features=network.features, blocks=network.depth, **shared)
    return nets.MLP(features=network.features, depth=network.depth, **shared)


def build(network: ImageNetwork, method: ImageMethod, this: Problem) -> Model:
    """The network of a configuration as a FlowMap."""
    module = module_of(network, this.classes, 1 if method.fed else 0)
    path = interpolants.INTERPOLANTS[network.path]()
    form = parameterizations.PARAMETERIZATIONS[network.parameterization](path)

    def init(key: Key) -> Any:
        cond = jnp.int32(0) if this.classes else None
        if method.fed:
            cond = conditions.Scaled(cond, jnp.float32(1.0))
        x = jnp.zeros(this.event, jnp.float32)
        return module.init(key, jnp.float32(0.0), jnp.float32(1.0), x, cond)["params"]

    return Model(parameterizations.flow_map(nets.from_linen(module), form), jax.jit(init), path)


def objective_of(method: ImageMethod, model: Model, steps: int) -> Callable[..., Any]:
    """The objective of a configuration, with its start on the diagonal alone."""
    row = objectives.METHODS[method.objective]
    guided: dict[str, Any] = {}
    if method.conditional:
        guided["label_dropout"] = method.label_dropout
        if method.guidance != "none":
            scale = method.scale if method.guidance == "fixed" else objectives.guided.power_law(method.scale)
            guided["guidance"] = objectives.Guidance(scale)
    if method.recipe == "published":
        return row.constructor(model.flow_map, model.interpolant, **row.published(), **guided)
    single = times.uniform(stratified=True)
    pairs = times.triangle(stratified=True)
    if method.full_jumps:
        from_noise = times.independent(times.constant(0.0), single)
        pairs = times.mixed([pairs, from_noise], [1.0 - method.full_jumps, method.full_jumps])
    whole = row.constructor(
        model.flow_map,
        model.interpolant,
        diagonal=method.diagonal,
        times=single,
        pairs=pairs,
        reduction=reductions.squared,
        **guided,
    )
    first = round(method.diagonal_start * steps)
    if first == 0:
        return whole
    alone = objectives.flow_matching(model.flow_map, model.interpolant, times=single, **guided)
    return objectives.sequence([(0, alone), (first, whole)])


# --- scores -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of drawn images in the features of one network.

    Attributes:
      network: the feature network.
      reference: the features of the held-out images.
      trace: the trace of their covariance, the unit of the Fréchet distance.
    """

    network: metrics.FeatureNet
    reference: metrics.Features
    trace: float

    @classmethod
    def of(cls, network: metrics.FeatureNet, split: Split) -> Scores:
        """The reference of a data set."""
        found = metrics.features(network, split.held_out.x1, labels=np.asarray(split.held_out.cond))
        return cls(network, found, float(np.var(found.values.astype(np.float64), axis=0).sum()))

    def features(self, images: np.ndarray, labels: np.ndarray | None) -> metrics.Features:
        """The features of drawn images in [-1, 1]."""
        return metrics.features(self.network, np.clip(images, -1.0, 1.0), labels=labels)

    def quick(self, images: np.ndarray) -> float:
        """The Fréchet distance alone, for scores during training."""
        return metrics.frechet_score(self.features(images, None), self.reference).value

    def all(self, images: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        """Fréchet distance, plain and as a share of the trace, KID, precision, recall and the accuracy of the labels."""
        found = self.features(images, labels)
        frechet = metrics.frechet_score(found, self.reference)
        kernel = metrics.kernel_score(found, self.reference, block=min(1000, len(found), len(self.reference)))
        rows = min(len(found), len(self.reference), 5000)
        manifold = metrics.manifold_scores(found.where(np.arange(rows)), self.reference.where(np.arange(rows)), k=3)
        values = {
            "frechet": frechet.value,
            "frechet_error": frechet.standard_error or 0.0,
            "frechet_bias": frechet.bias or 0.0,
            "frechet/trace": frechet.value / self.trace,
            "kid": kernel.value,
            "precision": manifold.precision.value,
            "recall": manifold.recall.value,
        }
        if labels is not None:
            values["accuracy"] = metrics.label_accuracy(found).value
        return values

    def floor(self, split: Split) -> dict[str, float]:
        """The scores of as many training images as there are held-out ones."""
        n = min(len(split.held_out.x1), len(split.train.x1))
        images = np.asarray(PIXELS.forward(jnp.asarray(split.train.x1[:n])))
        return self.all(images, np.asarray(split.train.cond[:n]))
