"""Arranges images in a grid, and writes images to files."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jflow import checks

# The grey level between the images, and of empty cells in the last row.
GREY = 128


def tile(images: ArrayLike, columns: int | None = None, gap: int = 1) -> np.ndarray:
    """Arranges images in a grid, row by row.

    Args:
      images: [N, H, W, C] with C = 1 (grey) or 3 (red, green, blue), floating point in [-1, 1]; values outside are clipped.
      columns: images per row; by default the square root of N, rounded up.
      gap: pixels between images.

    Returns:
      [rows (H + gap) - gap, columns (W + gap) - gap, 3], uint8; -1 becomes 0, and 1 becomes 255.

    Raises:
      ValueError: if the shape is another, an axis has length 0, a value is not finite, or a number is out of range.
      TypeError: if the images are not floating point, or ``columns`` or ``gap`` is not a whole number.
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
    # Every cell has a gap below and to the right; the gaps of the last row and column are cut off.
    cells = np.full((rows * columns, height + gap, width + gap, 3), GREY, np.uint8)
    cells[:count, :height, :width] = pixels
    grid = cells.reshape(rows, columns, height + gap, width + gap, 3).swapaxes(1, 2)
    grid = grid.reshape(rows * (height + gap), columns * (width + gap), 3)
    return grid[: grid.shape[0] - gap, : grid.shape[1] - gap]


def write_png(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Writes an image [H, W, 3], uint8, as a PNG file. The file is replaced in one step, so it is never incomplete.

    Raises:
      ImportError: if Pillow is not installed; it comes with ``jflow[experiments]``.
      ValueError: if the shape is another.
      TypeError: if the dtype is not uint8.
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
      ImportError: if Pillow is not installed; the message says how to install it.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "images are written with Pillow, which is missing: pip install 'jflow[experiments]'"
        ) from error
    return Image
