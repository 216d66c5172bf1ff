"""Datasets in files: sources that read one row at a time, and a pipeline that makes shuffled, resumable batches of them.

For example::

    source = images("faces", size=64)
    feed = Feed(pipeline(source, batch_size=256, seed=0), sharding=sharding.rows(mesh))

A source is any object with ``len(source)`` and ``source[i]``, a Batch of one row (numpy arrays without a leading axis).
Sources are read from several threads at once.
"""

from __future__ import annotations

import os
import pathlib
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jflow import checks
from jflow.datasets.paths import Path, existing, listed, place
from jflow.types import Batch, PyTree

Transform = Callable[[PyTree, np.random.Generator], PyTree]


class Source(Protocol):
    """A sequence of rows that can be read in any order."""

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def __getitem__(self, index: int) -> PyTree:
        """Row ``index``, from 0."""
        ...


class Rows:
    """The rows of arrays in one or several parts, one after another; made by ``npz`` and ``array_folder``.

    ``rows[i]`` is Batch(x1 ``[...]``, cond ``[...]`` or None), a copy in the dtypes of the arrays. An index past the end raises
    IndexError.

    Args:
      parts: for each part a Batch of arrays ``[n, ...]``; the parts differ only in n.
    """

    def __init__(self, parts: Sequence[Batch]) -> None:
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part.x1) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Batch:
        index = place(index, len(self))
        part = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[part])
        return jax.tree.map(lambda array: np.array(array[row]), self._parts[part])


def npz(path: Path, x1: str = "x1", cond: str | None = None) -> Rows:
    """The rows of arrays in one .npz file.

    Arrays of an uncompressed file (``np.savez``) are memory-mapped and read row by row. Arrays of a compressed file are loaded.

    Args:
      path: the file.
      x1: the name of the data array, [N, ...], in the file.
      cond: the name of the conditioning array, [N, ...]; None for none.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not an .npz file, an array is missing or holds objects, there are no rows, or the numbers of rows
        differ.

    Example:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> from jflow import datasets
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "data.npz"
      ...     np.savez(path, x1=np.zeros((5, 2), np.float32))
      ...     print(len(datasets.npz(path)))
      5
    """
    path = existing("npz", path, "an .npz file, as numpy.savez writes it", folder=False)
    try:
        with zipfile.ZipFile(path) as archive:
            batch = Batch(*(None if name is None else _member(path, archive, name) for name in (x1, None, cond)))
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"npz: {path} cannot be read as an .npz file: {error}") from error
    _check_lengths("npz", path, batch)
    if not len(batch.x1):
        raise ValueError(f"npz: {path}: {x1} has no rows")
    return Rows([batch])


def array_folder(directory: Path) -> Rows:
    """The rows of all .npy files in a folder, which are memory-mapped and read row by row.

    The folder contains::

        NAME.npy        x1, [n, ...]
        NAME.cond.npy   its conditioning, [n, ...]; for all files or for none

    The files are read in the natural order of their names (``2.npy`` before ``10.npy``). Hidden files, ``.NAME``, and files
    with other endings are ignored. Each file stays open, so the system's limit on open files (``ulimit -n``) must exceed their
    number.

    Args:
      directory: the folder; its sub-folders are ignored.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if the folder has no files or no rows, a file is an .npz file (or ends in .NPY) or cannot be read, only some
        files have conditioning, or shapes, dtypes or numbers of rows differ. The message names the file.
    """
    directory = existing("array_folder", directory, "a folder of .npy files", folder=True)
    names = [name for name in listed(directory) if name.lower().endswith((".npy", ".npz"))]
    for name in names:
        if not name.endswith(".npy"):
            raise ValueError(f"array_folder: expected the arrays in files NAME.npy, got {directory / name}")
    labels = {name for name in names if name.endswith(".cond.npy")}
    data = [name for name in names if name not in labels]
    if not data:
        raise ValueError(f"array_folder: expected files NAME.npy in {directory}, found none")
    expected = {f"{name.removesuffix('.npy')}.cond.npy" for name in data} if labels else set()
    for name in sorted(expected ^ labels):
        which = "is missing, while other files have theirs" if name in expected else "has no data file beside it"
        raise ValueError(f"array_folder: {directory / name} {which}")
    parts, kinds = [], []
    for name in data:
        cond = directory / f"{name.removesuffix('.npy')}.cond.npy" if labels else None
        part = Batch(x1=_mapped(directory / name), cond=None if cond is None else _mapped(cond))
        _check_lengths("array_folder", directory / name, part)
        kind = jax.tree.map(lambda array: f"{array.dtype}{list(array.shape[1:])}", part)
        kinds.append(kind)
        if kind != kinds[0]:
            raise ValueError(
                f"array_folder: {directory / name}: expected rows like those of {data[0]}, {kinds[0]}, got {kind}"
            )
        parts.append(part)
    if not sum(len(part.x1) for part in parts):
        raise ValueError(f"array_folder: expected rows in the files of {directory}, found none")
    return Rows(parts)


def pipeline(
    source: Source,
    batch_size: int,
    *,
    seed: int = 0,
    transform: Transform | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    threads: int = 16,
    buffer: int = 16,
) -> Iterator[PyTree]:
    """Makes endless batches of a source's rows, in a new random order every epoch, which Grain reads ahead.

    Every epoch is a random permutation of the N rows, and batch n consists of the positions n B, ..., n B + B - 1, which
    continue across epochs. Process p of P takes the p-th block of B/P rows. Neither the batches nor the iterator's state,
    {"next_index": n}, depend on P, so a run may be resumed with another number of processes. The batches depend on the source,
    B, the seed and the transform, which are not part of the state; do not change them when a run is resumed.

    Args:
      source: the rows, at most 2^32.
      batch_size: B, the rows per batch of all processes together.
      seed: the seed of the order and of the transform, below 2^32.
      transform: ``(row, rng) -> row``, applied to every row when it is read, for crops, flips and conversions. ``rng`` is a
        numpy Generator that depends only on the seed and the position; do not keep it. Called from several threads.
      process_index: p; by default that of jax.
      process_count: P, a divisor of B; by default that of jax.
      threads: the number of batches that are read at the same time; 0 to read each batch when it is requested.
      buffer: the number of batches that are read ahead; it also limits the number of busy threads.

    Returns:
      A Grain iterator of pytrees like the rows, with leaves ``[B/P, ...]`` and methods ``get_state``, ``set_state`` and
      ``close``. Its ``__next__`` raises the errors of the source and the transform.

    Raises:
      ValueError: if the source is empty, P does not divide B, only one of p and P is given, or a number is out of range.
      TypeError: if a number is not whole, the source has no ``len`` and ``[i]``, or the transform is not a function.
      ImportError: if Grain is not installed.
    """
    grain = _grain()
    if isinstance(source, (str, os.PathLike)) or not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise TypeError(f"source: expected rows with len() and [i], as images(path), got {type(source).__name__}")
    if transform is not None and not callable(transform):
        raise TypeError(f"transform: expected a function (row, rng) -> row, got {type(transform).__name__}")
    if (process_index is None) != (process_count is None):
        raise ValueError("process_index, process_count: expected both or neither")
    if process_index is None or process_count is None:
        process_index, process_count = jax.process_index(), jax.process_count()
    checks.integer("process_count", process_count, low=1)
    checks.integer("process_index", process_index, high=process_count - 1)
    checks.integer("batch_size", batch_size, low=1)
    checks.integer("seed", seed, high=2**32 - 1)
    checks.integer("threads", threads)
    checks.integer("buffer", buffer, low=1)
    if batch_size % process_count:
        raise ValueError(
            f"batch_size: expected a multiple of the number of processes, {process_count}, got {batch_size}"
        )
    if not 1 <= len(source) <= 2**32:
        raise ValueError(f"source: expected at least one row, and at most 2^32, got {len(source)}")
    share = batch_size // process_count
    offset = process_index * share

    class Share(grain.MapDataset):
        """The share of this process: its item n B/P + i is position n B + p B/P + i of all."""

        def __init__(self, rows: Any) -> None:
            super().__init__(rows)
            self.rows = rows

        def __len__(self) -> int:
            return sys.maxsize // batch_size * share

        def __getitem__(self, index: int) -> PyTree:
            step, place = divmod(index, share)
            return self.rows[step * batch_size + offset + place]

    rows = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if transform is not None:
        rows = rows.random_map(transform)
    # Make batches before the iterator, whose state then counts batches.
    batches = Share(rows).batch(share, drop_remainder=True)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)))


def _check_lengths(name: str, path: pathlib.Path, batch: Batch) -> None:
    for array in jax.tree.leaves(batch):
        if array.dtype.hasobject:
            raise ValueError(f"{name}: {path}: expected arrays of numbers, got dtype {array.dtype}")
    sizes = [array.shape[:1] for array in jax.tree.leaves(batch)]
    if () in sizes or len(set(sizes)) != 1:
        raise ValueError(
            f"{name}: {path}: expected arrays [n, ...] with one n, got shapes {jax.tree.map(np.shape, batch)}"
        )


def _member(path: pathlib.Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of an .npz file, memory-mapped if it is stored uncompressed, else loaded."""
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError:
        names = ", ".join(entry.removesuffix(".npy") for entry in archive.namelist())
        raise ValueError(f"npz: {path} has no array {name!r}, expected one of {names}") from None
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        if info.compress_type == zipfile.ZIP_STORED:
            with open(path, "rb") as file:
                # Skip the header of the member, whose last two numbers are the lengths of its name and its extra field.
                file.seek(info.header_offset)
                file.seek(sum(struct.unpack("<26xHH", file.read(30))), os.SEEK_CUR)
                read = readers.get(np.lib.format.read_magic(file))
                if read is not None:
                    shape, fortran, dtype = read(file)
                    if not dtype.hasobject and 0 not in shape:
                        order = "F" if fortran else "C"
                        return np.memmap(path, dtype, "r", offset=file.tell(), shape=shape, order=order)
        with archive.open(info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"npz: {path}: {name} cannot be read: {error}") from error


def _mapped(path: pathlib.Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"array_folder: {path} cannot be read as an .npy file: {error}") from error


def _grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise ImportError("pipeline: it needs Grain, which is missing: pip install 'jflow[grain]'") from error
    return grain
