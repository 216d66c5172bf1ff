"""The rows of a run as events that TensorBoard shows."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from jflow import checks
from jflow.training import image_grids

# A killed process loses the events of about so long.
FLUSH_SECONDS = 10


class TensorBoard:
    """A callback that writes every row to a directory of events; a context manager that closes it.

        with TensorBoard(out / "tensorboard") as board:
            fit(state, chunk, data, callbacks=[board], ...)

    A number becomes ``KIND/NAME`` ("train/loss"), a vector (means by bins) one such per entry, ``KIND/NAME/0`` and so on,
    and a string, as ``warning``, a text. Of several processes only the first writes; in the others nothing happens.

    Args:
      directory: made if missing.
      after: on resume, the step restored: what the directory holds of later steps is hidden by TensorBoard. None to hide
        nothing.

    Raises:
      ImportError: without tensorboardX, which comes with ``jflow[tensorboard]``.
      ValueError: when ``after`` is negative; TypeError when it is no whole number.
    """

    def __init__(self, directory: str | os.PathLike[str], after: int | None = None) -> None:
        purge = None if after is None else checks.integer("after", after) + 1
        self._writer = None
        if jax.process_index() == 0:
            # The names of event files are distinct by the second only: without a suffix, a run resumed at once would
            # overwrite what it goes on from. Zeros in front, for they are read in the order of their names.
            suffix = f".{time.time_ns() % 10**9:09d}"
            self._writer = _summary_writer()(
                os.fspath(directory), purge_step=purge, flush_secs=FLUSH_SECONDS, filename_suffix=suffix
            )

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Writes a row of ``fit``: its ``kind``, its ``step``, and everything else it holds of rank 0 or 1."""
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
                for place, entry in enumerate(value):
                    self._writer.add_scalar(f"{tag}/{place}", float(entry), row["step"])

    def images(self, step: int, name: str, images: ArrayLike) -> None:
        """Writes images [N, H, W, C] in [-1, 1] as one grid (``image_grids.tile``) of that name.

        Raises:
          ImportError: without Pillow, which comes with ``jflow[experiments]``.
          ValueError, TypeError: as ``image_grids.tile``.
        """
        if self._writer is None:
            return
        # TensorboardX encodes with it, and would not say how to get it.
        image_grids.pillow()
        self._writer.add_image(name, image_grids.tile(images), step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is pending and closes the file."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _summary_writer() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard: events are written with tensorboardX, which is missing: pip install 'jflow[tensorboard]'"
        ) from error
    return SummaryWriter
