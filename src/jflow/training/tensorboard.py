"""The rows of a run as events that TensorBoard shows."""

from __future__ import annotations

import os
import time
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from jflow.training import image_grids
from jflow.training.hooks import Hook, Row, Started

# A killed process loses the events of about so long.
FLUSH_SECONDS = 10


class TensorBoard(Hook):
    """A hook that writes every row to a directory of events.

    For example::

        fit(state, chunk, data, hooks=[TensorBoard(out / "tensorboard"), Progress()], ...)

    A number becomes ``KIND/NAME`` ("train/loss"), a vector (means by bins) one such number per entry, ``KIND/NAME/0`` and so
    on, and a string, such as ``warning``, a text. In a resumed run TensorBoard hides what the directory holds of later steps.
    Of several processes only the first writes.

    Args:
      directory: made if it is missing.

    Raises:
      ImportError: without tensorboardX, which comes with ``jflow[tensorboard]``.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory, self._writer, self._make = os.fspath(directory), None, _summary_writer()

    def start(self, started: Started) -> None:
        """Opens a file of events."""
        if jax.process_index() == 0:
            # The names of event files differ by the second only. A suffix keeps a run that is resumed within that second from
            # overwriting the earlier file; zeros in front, because files are read in the order of their names.
            suffix = f".{time.time_ns() % 10**9:09d}"
            purge = started.step + 1 if started.step else None
            self._writer = self._make(
                self._directory, purge_step=purge, flush_secs=FLUSH_SECONDS, filename_suffix=suffix
            )

    def row(self, row: Row) -> None:
        """Writes every entry of rank 0 or 1, but for ``kind`` and ``step``."""
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
                # A bin without rows is NaN, of which tensorboardX warns each time.
                for place, entry in enumerate(value):
                    if np.isfinite(entry):
                        self._writer.add_scalar(f"{tag}/{place}", float(entry), row["step"])

    def images(self, step: int, name: str, images: ArrayLike) -> None:
        """Writes images [N, H, W, C] in [-1, 1] as one grid (``image_grids.tile``) of that name.

        Within a run only, for example in an evaluation; before and after it nothing is written.

        Raises:
          ImportError: without Pillow, which comes with ``jflow[experiments]``.
          ValueError, TypeError: as ``image_grids.tile``.
        """
        if self._writer is None:
            return
        # TensorboardX encodes with it, and would not say how to get it.
        image_grids.pillow()
        self._writer.add_image(name, image_grids.tile(images), step, dataformats="HWC")

    def __exit__(self, *_: object) -> None:
        """Writes what is pending and closes the file."""
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
