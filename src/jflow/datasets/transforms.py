"""Traced transforms of batches: levels of images to [-1, 1] and back, and random flips, shifts and crops.

Images stay uint8 in memory and on the devices, a quarter of the size of float32, and are converted in the training step::

    dataset = transformed(ArrayDataset(images, 128), each_row(flip, partial(shift, most=2), PIXELS), seed=0)
    chunk = make_chunk(step, dataset.batch)
    fit(state, chunk, dataset.data, ...)

The random numbers of a batch depend on the seed and the step alone, so a resumed run sees the same batches as an uninterrupted
one. ``flip``, ``shift`` and ``crop`` take one image; ``each_row`` gives every row of a batch a key of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jflow import checks
from jflow.types import Array, Batch, Key, PyTree, as_batch

# A transform of one image: flip, shift, crop, or a function of one's own.
RowTransform = Callable[[Key, Array], Array]
BatchTransform = Callable[[Key, Batch], Batch]
BatchFn = Callable[[PyTree, Array], Any]
Fill = float | Literal["edge", "reflect"]

# Separates the keys of transforms from those of datasets that draw their rows with the same seed.
_STREAM = 0x7472616E


@dataclasses.dataclass(frozen=True)
class Affine:
    """The map x = level / divisor + offset and its inverse, level = (x - offset) * divisor, for each entry.

    Args:
      divisor: a positive number.
      offset: a number.

    Raises:
      ValueError: if a number is not finite, or the divisor is not positive.
      TypeError: if an argument is not a number.

    Example:
      >>> import numpy as np
      >>> from jflow import datasets
      >>> datasets.PIXELS
      Affine(divisor=127.5, offset=-1.0)
      >>> x = datasets.PIXELS.forward(np.array([0, 51, 255], np.uint8))
      >>> [round(float(value), 3) for value in x], datasets.PIXELS.to_levels(x).tolist()
      ([-1.0, -0.6, 1.0], [0, 51, 255])
    """

    divisor: float
    offset: float

    def __post_init__(self) -> None:
        checks.number("divisor", self.divisor, low=0.0, open_low=True)
        checks.number("offset", self.offset)

    def forward(self, levels: Array | np.ndarray) -> Array:
        """x = level / divisor + offset; float32 for integers, else in the dtype of ``levels``.

        For uint8 it has the bits of numpy's float32 arithmetic, and so of ``datasets.images``, with and without ``jit``.
        """
        levels = jnp.asarray(levels)
        if levels.dtype == jnp.uint8:
            # Look the value up: under jit, XLA divides by a constant as it multiplies by the rounded reciprocal.
            table = np.arange(256, dtype=np.float32) / np.float32(self.divisor) + np.float32(self.offset)
            return jnp.take(jnp.asarray(table), levels.astype(jnp.int32), axis=0)
        x = levels if jnp.issubdtype(levels.dtype, jnp.floating) else levels.astype(jnp.float32)
        return x / jnp.asarray(self.divisor, x.dtype) + jnp.asarray(self.offset, x.dtype)

    def inverse(self, x: Array | np.ndarray) -> Array:
        """level = (x - offset) * divisor, not rounded, in the dtype of x.

        Raises:
          TypeError: if x is not floating-point.
        """
        checks.floating("x", x)
        x = jnp.asarray(x)
        return (x - jnp.asarray(self.offset, x.dtype)) * jnp.asarray(self.divisor, x.dtype)

    def to_levels(self, x: Array | np.ndarray) -> Array:
        """The nearest levels from 0 to 255, uint8; x beyond them is clipped. NaN becomes 0.

        Raises:
          TypeError: if x is not floating-point.
        """
        levels = jnp.round(self.inverse(x))
        return jnp.where(jnp.isnan(levels), 0, jnp.clip(levels, 0, 255)).astype(jnp.uint8)


# The map of 256 levels to [-1, 1], x = level / 127.5 - 1.
PIXELS = Affine(127.5, -1.0)


def flip(key: Key, image: Array, *, probability: float = 0.5) -> Array:
    """Mirrors an image ``[H, W, C]``, left to right, with a probability.

    Raises:
      ValueError: if the image does not have 3 axes, or the probability is outside [0, 1].

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import datasets
      >>> image = jnp.array([[[1], [2], [3]]], jnp.uint8)
      >>> datasets.flip(jax.random.key(0), image, probability=1.0)[0, :, 0].tolist()
      [3, 2, 1]
    """
    _check_image(image)
    checks.number("probability", probability, low=0.0, high=1.0)
    image = jnp.asarray(image)
    return jnp.where(jax.random.bernoulli(key, probability), image[:, ::-1], image)


def crop(key: Key, image: Array, *, size: int | tuple[int, int], padding: int = 0, fill: Fill = "edge") -> Array:
    """Cuts a window out of an image at a place drawn uniformly, after padding all four sides.

    Args:
      key: a PRNG key.
      image: ``[H, W, C]``.
      size: the height and width of the window, or one number for both.
      padding: the pixels added on each side.
      fill: the value of the added pixels, in the image's units; "edge" to repeat the outermost pixel, "reflect" to mirror
        the image without repeating it.

    Returns:
      The window ``[h, w, C]``, in the dtype of the image.

    Raises:
      ValueError: if the image does not have 3 axes, the window is larger than the padded image, or a number is out of range.
      TypeError: if a number has the wrong type.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import datasets
      >>> datasets.crop(jax.random.key(0), jnp.zeros((32, 32, 3), jnp.uint8), size=28).shape
      (28, 28, 3)
    """
    _check_image(image)
    padding = checks.integer("padding", padding)
    height, width = _sides(size)
    image = jnp.asarray(image)
    most = [side + 2 * padding - window for side, window in zip(image.shape, (height, width), strict=False)]
    for window, room in zip((height, width), most, strict=True):
        checks.integer("size", window, low=1, high=window + room)
    rows, columns = (jax.random.randint(k, (), 0, n + 1) for k, n in zip(jax.random.split(key), most, strict=True))
    padded = _padded(image, padding, fill)
    return jax.lax.dynamic_slice(padded, (rows, columns, jnp.zeros_like(rows)), (height, width, image.shape[2]))


def shift(key: Key, image: Array, *, most: int, fill: Fill = "edge") -> Array:
    """Moves an image by whole pixels, up to ``most`` along each axis, uniformly: ``crop`` to its own size.

    Args:
      key: a PRNG key.
      image: ``[H, W, C]``.
      most: the largest shift; every pair of shifts from -most to most has the same probability.
      fill: the value of uncovered pixels, as in ``crop``.

    Raises:
      ValueError: as ``crop``.
      TypeError: as ``crop``.
    """
    _check_image(image)
    height, width, _ = np.shape(image)
    return crop(key, image, size=(height, width), padding=checks.integer("most", most), fill=fill)


def each_row(*steps: RowTransform | Affine) -> BatchTransform:
    """A transform of batches that applies steps to x1, row by row, each with independent keys; x0 and cond are unchanged.

    Args:
      steps: in order: functions ``(key, image) -> image`` of one row, or an Affine, whose ``forward`` is used.

    Returns:
      ``(key, batch) -> batch``, traced.

    Raises:
      TypeError: if a step is not a function.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jflow import Batch, datasets
      >>> transform = datasets.each_row(datasets.flip, datasets.PIXELS)
      >>> batch = transform(jax.random.key(0), Batch(jnp.zeros((4, 8, 8, 1), jnp.uint8)))
      >>> batch.x1.shape, batch.x1.dtype
      ((4, 8, 8, 1), dtype('float32'))
    """
    for step in steps:
        if not isinstance(step, Affine):
            checks.accepts("steps", step, "(key, image) -> image, or an Affine", 2, model=False)

    def one(key: Key, image: Array) -> Array:
        for place, step in enumerate(steps):
            image = step.forward(image) if isinstance(step, Affine) else step(jax.random.fold_in(key, place), image)
        return image

    def transform(key: Key, batch: Batch) -> Batch:
        keys = jax.random.split(key, checks.rows("batch", batch))
        batch = as_batch(batch)
        return batch._replace(x1=jax.vmap(one)(keys, jnp.asarray(batch.x1)))

    return transform


def transformed_batch(batch_fn: BatchFn, transform: BatchTransform, seed: int = 0) -> Callable[[PyTree, Array], Batch]:
    """A batch function followed by a transform whose key depends on the seed and the step.

    For a Feed: ``make_chunk(step, transformed_batch(prefetch.batch, each_row(flip, PIXELS)))``.

    Args:
      batch_fn: ``(data, step) -> batch``, as ``dataset.batch`` or ``prefetch.batch``.
      transform: ``(key, batch) -> batch``, traced, such as ``each_row(...)``.
      seed: the seed of the keys.

    Raises:
      ValueError: if the seed is out of range.
      TypeError: if an argument is not a function, or the seed is not a whole number.
    """
    checks.accepts("batch_fn", batch_fn, "(data, step) -> batch", 2, model=False)
    checks.accepts("transform", transform, "(key, batch) -> batch, as each_row(...)", 2, model=False)
    checks.integer("seed", seed, high=2**32 - 1)

    def batch(data: PyTree, step: Array) -> Batch:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _STREAM)
        return transform(jax.random.fold_in(key, step), as_batch(batch_fn(data, step)))

    return batch


class Transformable(Protocol):
    """A dataset with data and batch, as ``training.train`` takes it."""

    @property
    def data(self) -> PyTree:
        """The arrays passed to ``batch``."""

    def batch(self, data: PyTree, step: Array) -> Any:
        """The batch of a step."""
        ...


@dataclasses.dataclass(frozen=True)
class TransformedDataset:
    """A dataset whose batches are transformed in the training step; made by ``transformed``.

    Attributes:
      dataset: the dataset before the transform.
      transform: ``(key, batch) -> batch``.
      seed: the seed of the transform's keys.
    """

    dataset: Transformable
    transform: BatchTransform
    seed: int

    @property
    def data(self) -> PyTree:
        """The arrays of the dataset, in their own dtypes."""
        return self.dataset.data

    @property
    def batch_size(self) -> int:
        """The rows per batch."""
        return self.dataset.batch_size  # pyright: ignore[reportAttributeAccessIssue]

    def batch(self, data: PyTree, step: Array) -> Batch:
        """The transformed batch of a step."""
        return transformed_batch(self.dataset.batch, self.transform, self.seed)(data, step)


def transformed(dataset: Transformable, transform: BatchTransform, seed: int = 0) -> TransformedDataset:
    """A dataset whose batches are transformed, by random augmentations and conversions, in the training step.

    In a ``CoupledDataset`` the rows of x1 change after they were paired with x0.

    Args:
      dataset: a dataset such as ``ArrayDataset``.
      transform: ``(key, batch) -> batch``, traced, such as ``each_row(...)``.
      seed: the seed of its keys, which also depend on the step.

    Raises:
      ValueError: if the seed is out of range.
      TypeError: if the dataset has no ``data`` and ``batch``, the transform is not a function of two arguments, or the seed is
        not a whole number.

    Example:
      >>> import jax.numpy as jnp
      >>> from jflow import datasets
      >>> images = jnp.full((5, 8, 8, 1), 255, jnp.uint8)
      >>> dataset = datasets.transformed(datasets.ArrayDataset(images, 4), datasets.each_row(datasets.PIXELS))
      >>> dataset.data.dtype, float(dataset.batch(dataset.data, jnp.int32(0)).x1.max())
      (dtype('uint8'), 1.0)
    """
    if not (callable(getattr(dataset, "batch", None)) and hasattr(dataset, "data")):
        raise TypeError(f"dataset: expected one with data and batch(data, step), got {type(dataset).__name__}")
    transformed_batch(dataset.batch, transform, seed)
    return TransformedDataset(dataset, transform, seed)


def _check_image(image: Array) -> None:
    """Checks that an image has three axes, and is not a batch, as it is if ``each_row`` was forgotten."""
    if isinstance(image, Batch):
        raise TypeError("image: expected one image, got a Batch; each_row(...) makes a transform of batches")
    checks.shape("image", image, (None, None, None))


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """The height and the width of a window."""
    pair = size if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"size: expected a whole number or a pair (height, width), got {size!r}")
    return checks.integer("size", pair[0], low=1), checks.integer("size", pair[1], low=1)


def _padded(image: Array, padding: int, fill: Fill) -> Array:
    widths = ((padding, padding), (padding, padding), (0, 0))
    if padding == 0:
        return image
    if isinstance(fill, str):
        mode = checks.choice("fill", fill, ("edge", "reflect"))
        if mode == "reflect" and padding >= min(image.shape[:2]):
            raise ValueError(
                f"padding: expected less than the image's sides, {image.shape[:2]}, to reflect, got {padding}"
            )
        return jnp.pad(image, widths, mode=mode)
    value = checks.number("fill", fill)
    if jnp.issubdtype(image.dtype, jnp.integer):
        limits = jnp.iinfo(image.dtype)
        value = checks.integer("fill", int(value) if value == int(value) else value, low=limits.min, high=limits.max)
    return jnp.pad(image, widths, constant_values=jnp.asarray(value, image.dtype))
