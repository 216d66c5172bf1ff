"""Writes the rows of a run as TensorBoard events."""

from __future__ import annotations

import os
import time
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from jflow.training import image_grids
from jflow.training.hooks import Hook, Row, Started

# A killed process loses the events of about this time.
FLUSH_SECONDS = 10


class TensorBoard(Hook):
    """A hook that writes every row to a directory of TensorBoard events.

    For example::

        fit(state, chunk, data, hooks=[TensorBoard(out / "tensorboard"), Progress()], ...)

    A number is written as the scalar ``KIND/NAME`` ("train/loss"). A vector (means by bins) is written as one scalar per
    entry, ``KIND/NAME/0`` and so on. A string, such as ``warning``, is written as text. In a resumed run TensorBoard hides
    the earlier events of later steps. With several processes only the first writes.

    Args:
      directory: the directory; created if it is missing.

    Raises:
      ImportError: if tensorboardX is not installed; it comes with ``jflow[tensorboard]``.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory, self._writer, self._make = os.fspath(directory), None, _summary_writer()

    def start(self, started: Started) -> None:
        """Opens a file of events."""
        if jax.process_index() == 0:
            # The names of event files contain the time in whole seconds. The suffix keeps a run that is resumed within the
            # same second from overwriting the earlier file. It is zero-padded, because files are read in order of their names.
            suffix = f".{time.time_ns() % 10**9:09d}"
            purge = started.step + 1 if started.step else None
            self._writer = self._make(
                self._directory, purge_step=purge, flush_secs=FLUSH_SECONDS, filename_suffix=suffix
            )

    def row(self, row: Row) -> None:
        """Writes every entry of rank 0 or 1, except ``kind`` and ``step``."""
        if self._writer is None:
            return
        for name, value in row.items():
            if name in ("kind", "step"):
                continue
            tag = f"{row['kind']}/{name}"
            if isinstance(value, str):
                self._writer.add_text(tag, value, row["step"])
                continue
            value = np.asarray(value, np.float64)
            if value.ndim == 0:
                self._writer.add_scalar(tag, float(value), row["step"])
            elif value.ndim == 1:
                # An empty bin is NaN; tensorboardX would print a warning for it each time.
                for place, entry in enumerate(value):
                    if np.isfinite(entry):
                        self._writer.add_scalar(f"{tag}/{place}", float(entry), row["step"])

    def images(self, step: int, name: str, images: ArrayLike) -> None:
        """Writes images [N, H, W, C] in [-1, 1] as one grid (``image_grids.tile``) with the given name.

        Images are written only during a run, for example in an evaluation; before and after it the call has no effect.

        Raises:
          ImportError: if Pillow is not installed; it comes with ``jflow[experiments]``.
          ValueError, TypeError: as ``image_grids.tile``.
        """
        if self._writer is None:
            return
        # TensorboardX encodes images with Pillow. Import it first, for an error message that says how to install it.
        image_grids.pillow()
        self._writer.add_image(name, image_grids.tile(images), step, dataformats="HWC")

    def __exit__(self, *_: object) -> None:
        """Writes pending events and closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _summary_writer() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard: events are written with tensorboardX, which is missing: pip install 'jflow[tensorboard]'"
        ) from error
    return SummaryWriter
