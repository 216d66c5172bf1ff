"""Many images as one, and as a file."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jflow import checks

# Between the images, and where the last row has none.
GREY = 128


def tile(images: ArrayLike, columns: int | None = None, gap: int = 1) -> np.ndarray:
    """Images side by side, row after row.

    Args:
      images: [N, H, W, C] with C = 1 (grey) or 3 (red, green, blue), floating point in [-1, 1]; what lies outside is clipped.
      columns: images per row; by default as many as make the grid about square.
      gap: pixels between images.

    Returns:
      [rows (H + gap) - gap, columns (W + gap) - gap, 3], uint8: -1 is 0 and 1 is 255.

    Raises:
      ValueError: for another shape, no images, values that are not finite, or numbers out of range.
      TypeError: for images that are not floating point, or numbers that are none.
    """
    checks.floating("images", images)
    checks.shape("images", images, (None, None, None, None))
    images = np.asarray(images, np.float32)
    count, height, width, channels = images.shape
    if channels not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images: expected [N, H, W, C] with C = 1 or 3 and no axis of length 0, got {images.shape}")
    if not np.all(np.isfinite(images)):
        raise ValueError("images: expected finite values")
    columns = int(np.ceil(np.sqrt(count))) if columns is None else checks.integer("columns", columns, low=1)
    checks.integer("gap", gap)
    rows = -(-count // columns)
    pixels = np.round((np.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    # Every cell has its gap below and to the right; those of the last row and column are cut off.
    cells = np.full((rows * columns, height + gap, width + gap, 3), GREY, np.uint8)
    cells[:count, :height, :width] = pixels
    grid = cells.reshape(rows, columns, height + gap, width + gap, 3).swapaxes(1, 2)
    grid = grid.reshape(rows * (height + gap), columns * (width + gap), 3)
    return grid[: grid.shape[0] - gap, : grid.shape[1] - gap]


def write_png(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Writes an image [H, W, 3], uint8, so that a file of this name is whole at any time.

    Raises:
      ImportError: without Pillow, which comes with ``jflow[experiments]``.
      ValueError: for another shape; TypeError for another dtype.
    """
    checks.shape("image", image, (None, None, 3))
    if np.asarray(image).dtype != np.uint8:
        raise TypeError(f"image: expected uint8, got {np.asarray(image).dtype}")
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        pillow().fromarray(np.ascontiguousarray(image)).save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def pillow() -> Any:
    """The module PIL.Image.

    Raises:
      ImportError: where it is missing, saying what brings it.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "images are written with Pillow, which is missing: pip install 'jflow[experiments]'"
        ) from error
    return Image
