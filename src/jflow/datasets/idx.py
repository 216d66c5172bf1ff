"""MNIST's IDX files: arrays of any of the format's six dtypes and of any rank, plain or compressed by gzip.

A file holds two zero bytes, a byte for the dtype (``DTYPES``), a byte for the rank r, r big-endian uint32 sizes, and the values
in C order, big-endian. The data sets MNIST, Fashion-MNIST and KMNIST each consist of four such files, which ``mnist_folder``
finds in a folder.
"""

from __future__ import annotations

import gzip
import math
import pathlib
import zlib

import numpy as np

from jflow.datasets.examples import Split
from jflow.datasets.paths import Path, existing
from jflow.types import Batch

# The byte for each dtype. Multi-byte values are big-endian.
DTYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
CODES = {name: code for code, name in DTYPES.items()}
GZIP_MAGIC = b"\x1f\x8b"
# The folder into which the Debian package dataset-fashion-mnist installs its files.
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
# The largest rank of a numpy array.
MAX_RANK = 64


def read_idx(path: Path) -> np.ndarray:
    """Reads an array from an IDX file. Whether it is compressed is seen from its first bytes, not from its name.

    Args:
      path: the file.

    Returns:
      The array, with the file's shape and values, in the native byte order; it is writable.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the path is a folder, or the file is not a complete IDX file: a wrong magic number, little-endian
        numbers, a truncated header, missing or trailing bytes, or damaged compression. The message names the file.

    Example:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> from jflow import datasets
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "labels-idx1-ubyte.gz"
      ...     datasets.write_idx(path, np.array([3, 1, 4], np.uint8))
      ...     print(datasets.read_idx(path))
      [3 1 4]
    """
    path = existing("read_idx", path, "an IDX file", folder=False)
    content = _content(path)
    dtype, shape, start = _header(path, content)
    expected = math.prod(shape) * dtype.itemsize
    if (got := len(content) - start) != expected:
        wrong = "is truncated" if got < expected else "has trailing bytes"
        swapped = [int.from_bytes(size.to_bytes(4, "big"), "little") for size in shape]
        hint = "; its sizes fit in little-endian order" if math.prod(swapped) * dtype.itemsize == got else ""
        raise ValueError(
            f"read_idx: {path} {wrong}: expected {expected} bytes after the header for {dtype.name}{list(shape)}, got "
            f"{got}{hint}"
        )
    values = np.frombuffer(content, dtype, offset=start).astype(dtype.newbyteorder("="))
    try:
        return values.reshape(shape)
    except ValueError as error:
        # An array without values may still have axes whose product is too large for numpy.
        raise ValueError(f"read_idx: {path}: numpy cannot hold the shape {list(shape)}: {error}") from error


def write_idx(path: Path, array: np.ndarray) -> None:
    """Writes an array to an IDX file, compressed if the name ends in ``.gz``. Equal arrays give equal files.

    Args:
      path: the file, which is replaced if it exists.
      array: an array of uint8, int8, int16, int32, float32 or float64, of rank 0 to 64.

    Raises:
      TypeError: if the array has another dtype; it is not cast.
      ValueError: if an axis is longer than the format can say (2^32 - 1).
    """
    array = np.asarray(array)
    code = CODES.get(array.dtype.name)
    if code is None:
        raise TypeError(f"array: expected a dtype of the IDX format, {', '.join(CODES)}, got {array.dtype}")
    if max(array.shape, default=0) >= 2**32:
        raise ValueError(f"array: expected axes shorter than 2^32, got shape {array.shape}")
    header = bytes([0, 0, code, array.ndim]) + np.asarray(array.shape, ">u4").tobytes()
    content = header + array.astype(array.dtype.newbyteorder(">")).tobytes()
    path = pathlib.Path(path).expanduser()
    # With its default, gzip would write the time of day.
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def mnist_folder(directory: Path, *, package: str | None = None) -> Split:
    """Reads images and labels from a folder with the four files of MNIST, Fashion-MNIST or KMNIST.

    The files are ``train-images``, ``train-labels``, ``t10k-images`` and ``t10k-labels``, each followed by ``-`` or ``.``, by
    ``idx3-ubyte`` (images) or ``idx1-ubyte`` (labels), and optionally by ``.gz``. If a file is there
    twice, the plain one is read.

    Args:
      directory: the folder.
      package: the name of a system package with the files, to be named in an error when they are missing.

    Returns:
      A Split of Batch(x1 [n, H, W, 1] uint8, cond = labels [n] int32), numpy arrays; ``held_out`` holds the t10k files.
      ``datasets.PIXELS`` maps the levels to [-1, 1].

    Raises:
      FileNotFoundError: if the folder or a file is missing.
      ValueError: as ``read_idx``, and if images are not uint8 [n, H, W], labels are not whole numbers [n], there are no images,
        or numbers or sizes of images differ. The message names the file.
    """
    hint = "" if package is None else f"; they are in the Debian package {package}: apt install {package}"
    try:
        directory = existing("mnist_folder", directory, "a folder of IDX files, as of MNIST", folder=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{hint}") from None
    train, held_out = (_images_and_labels(directory, part, hint) for part in ("train", "t10k"))
    if train.x1.shape[1:] != held_out.x1.shape[1:]:
        raise ValueError(
            f"mnist_folder: {directory}: expected images of one size, got {list(train.x1.shape[1:3])} for train and "
            f"{list(held_out.x1.shape[1:3])} for t10k"
        )
    return Split(train, held_out)


def fashion_mnist(directory: Path = FASHION_MNIST) -> Split:
    """Reads Fashion-MNIST (1708.07747): 60,000 training and 10,000 test images of 28 x 28 grey pixels in 10 classes.

    Args:
      directory: the folder of its four IDX files; by default that of the Debian package ``dataset-fashion-mnist``.

    Returns:
      As ``mnist_folder``.

    Raises:
      FileNotFoundError: if the folder or a file is missing; the message names the Debian package.
      ValueError: as ``mnist_folder``.
    """
    return mnist_folder(directory, package="dataset-fashion-mnist")


def _content(path: pathlib.Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"read_idx: {path} is damaged or truncated: {error}") from error


def _header(path: pathlib.Path, content: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    """The dtype in the file's byte order, the shape, and the place of the first value."""
    magic = content[:4]
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in DTYPES:
        reversed_magic = magic[2:] == b"\0\0" and len(magic) == 4 and magic[1] in DTYPES
        hint = "; it is in little-endian order" if reversed_magic else ""
        wanted = ", ".join(f"{code:02x}" for code in DTYPES)
        raise ValueError(
            f"read_idx: {path} is not an IDX file: expected the bytes 00 00, one of {wanted}, and the rank, got "
            f"{magic.hex(' ') or 'an empty file'}{hint}"
        )
    rank = magic[3]
    if rank > MAX_RANK:
        raise ValueError(f"read_idx: {path}: expected a rank of at most {MAX_RANK}, got {rank}")
    start = 4 + 4 * rank
    if len(content) < start:
        raise ValueError(
            f"read_idx: {path} is truncated: expected a header of {start} bytes for rank {rank}, got {len(content)}"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=rank, offset=4))
    return np.dtype(DTYPES[magic[2]]).newbyteorder(">"), shape, start


def _images_and_labels(directory: pathlib.Path, part: str, hint: str) -> Batch:
    images_path = _find(directory, f"{part}-images", "idx3-ubyte", hint)
    labels_path = _find(directory, f"{part}-labels", "idx1-ubyte", hint)
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or images.dtype != np.uint8 or images.size == 0:
        raise ValueError(f"mnist_folder: {images_path}: expected images uint8[n, H, W], got {_kind(images)}")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"mnist_folder: {labels_path}: expected whole numbers [n], got {_kind(labels)}")
    if len(images) != len(labels):
        raise ValueError(
            f"mnist_folder: {labels_path}: expected a label for each of the {len(images)} images of {images_path.name}, "
            f"got {len(labels)}"
        )
    return Batch(x1=images[..., None], cond=labels.astype(np.int32))


def _find(directory: pathlib.Path, name: str, kind: str, hint: str) -> pathlib.Path:
    names = [f"{name}{mark}{kind}{ending}" for ending in ("", ".gz") for mark in "-."]
    for each in names:
        if (directory / each).is_file():
            return directory / each
    raise FileNotFoundError(f"mnist_folder: {directory} has none of {', '.join(names)}{hint}")


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype}{list(array.shape)}"
