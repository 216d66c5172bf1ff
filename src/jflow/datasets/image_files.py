"""Image files as a source of rows, from one folder or from one folder per class."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from jflow import checks
from jflow.datasets.paths import Path, existing, listed, place
from jflow.types import Batch

# The endings of image files, in upper or lower case, and the names of their formats in Pillow.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# The tag of EXIF and TIFF data for the orientation of an image.
ORIENTATION = 0x0112
# The modes of Pillow with at most 8 bits per channel; its conversion would clip the values of other modes.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


class Images:
    """A source of image files, made by ``images``.

    ``images[i]`` is Batch(x1 ``[H, W, C]`` float32 in [-1, 1] or uint8, cond an int32 scalar, or None). An index past
    the end raises IndexError.

    Attributes:
      paths: the files, in order.
      classes: the names of the classes, in the order of their labels; empty without sub-folders.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int] | None,
        classes: Sequence[str],
        size: int | None,
        channels: int,
        dtype: str = "float32",
    ) -> None:
        self.paths, self.classes = tuple(paths), tuple(classes)
        self._labels = None if labels is None else np.asarray(labels, np.int32)
        self._size, self._mode, self._dtype = size, {1: "L", 3: "RGB"}[channels], dtype

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Batch:
        index = place(index, len(self))
        return Batch(
            x1=_pixels(self.paths[index], self._mode, self._size, self._dtype),
            cond=None if self._labels is None else np.array(self._labels[index]),
        )


def images(
    directory: Path,
    size: int | None = None,
    *,
    channels: int = 3,
    dtype: Literal["float32", "uint8"] = "float32",
) -> Images:
    """A source of image files with 256 levels, scaled to level/127.5 - 1. Images in sub-folders have labels.

    The folder contains::

        directory/NAME.png            no labels
        directory/CLASS/.../NAME.png  cond = the index of CLASS among the names of the sub-folders

    PNG, JPEG, WebP, TIFF, BMP and GIF files are recognised by their endings (``SUFFIXES``). They are rotated to the orientation
    in their EXIF or XMP data. Hidden files and folders (``.DS_Store``) are ignored; any other file raises an error.

    Names are sorted in natural order: digits are compared as whole numbers, and other characters by code point. Class ``2``
    comes before ``10``, ``007`` next to ``7``, and ``a2`` before ``a10``. A label is the index in this order, not the number
    in the name; ``Images.classes`` has the names.

    Args:
      directory: the folder.
      size: the height and width to which the largest central square is resized (bicubic, antialiased). With None the images
        are not resized, and must all have the same size when upright. To check this, the header of every file is read at
        once, and the whole file for images that are not square and have an orientation or are PNG files.
      channels: 3 for RGB or 1 for grey; other images are converted.
      dtype: "float32" for pixels in [-1, 1], or "uint8" for the levels, a quarter of the size, which ``datasets.PIXELS``
        maps to the same numbers.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if there are no images, a file has another ending, there are images both in sub-folders and beside them, a
        sub-folder has none, or, without ``size``, sizes differ. When an image is read, also if it is damaged, not opaque, an
        animation, of several pages, or has more than 8 bits per channel. The message names the folder or file.
      TypeError: if ``size`` is not a whole number.
      ImportError: if Pillow is not installed.
    """
    _pillow()
    directory = existing("images", directory, "a folder of images, or of one such folder for each class", folder=True)
    checks.choice("channels", channels, (1, 3))
    checks.choice("dtype", dtype, ("float32", "uint8"))
    if size is not None:
        checks.integer("size", size, low=1)
    folders = [name for name in listed(directory) if (directory / name).is_dir()]
    found = {name: _images_in(directory / name, deep=True) for name in folders}
    paths, labels, classes = _images_in(directory, deep=False), None, []
    if any(found.values()):
        for name in folders:
            if not found[name]:
                raise ValueError(f"images: expected images in every sub-folder, {directory / name} has none")
        if paths:
            raise ValueError(
                f"images: expected images in sub-folders alone, since there are such, got {paths[0]} as well"
            )
        classes = folders
        paths = [path for name in folders for path in found[name]]
        labels = [label for label, name in enumerate(folders) for _ in found[name]]
    if not paths:
        raise ValueError(f"images: expected images ({', '.join(SUFFIXES)}) in {directory}, found none")
    if size is None:
        sizes = {}
        for path in paths:
            sizes.setdefault(_upright_size(path), path)
            if len(sizes) > 1:
                (first, other), names = sizes, list(sizes.values())
                raise ValueError(
                    f"images: expected one size of image, or size=..., to which all are brought; {names[0]} is "
                    f"{first[0]}x{first[1]} pixels, {names[1]} is {other[0]}x{other[1]}"
                )
    return Images(paths, labels, classes, size, channels, dtype)


def _images_in(directory: pathlib.Path, deep: bool) -> list[str]:
    """The image files of a folder, in order, and with ``deep`` those of its sub-folders; other files raise ValueError."""
    found = []
    for name in listed(directory):
        path = directory / name
        if path.is_dir():
            found += _images_in(path, deep) if deep else []
        elif path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"images: expected images alone ({', '.join(SUFFIXES)}), or hidden files, got {path}")
        else:
            found.append(str(path))
    return found


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Opens an image and reads its header; any error of Pillow in the context becomes a ValueError that names the file."""
    image = _pillow()
    try:
        # On a damaged file a decoder may raise any type of error.
        with image.open(path, formats=FORMATS) as opened:
            yield opened
    except _Refused:
        raise
    except Exception as error:
        raise ValueError(f"images: {path} cannot be read: {error}") from error


class _Refused(ValueError):
    """An image that can be read but is not accepted."""


def _upright_size(path: str) -> tuple[int, int]:
    """The width and height of an image in its upright orientation."""
    with _opened(path) as picture:
        size = picture.size
        if size[0] == size[1]:
            return size
        try:
            return _upright(picture).size if picture.getexif().get(ORIENTATION, 1) != 1 else size
        except Exception:
            # A damaged image raises an error later, when it is read.
            return size


def _upright(picture: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.exif_transpose(picture)


def _check(picture: Any, path: str) -> None:
    """Rejects images that lose information when converted to a single image with 8 bits per channel."""
    # Pillow reads 16-bit colours as 8 bits; only the raw mode shows it.
    deep = any(re.search(";16[BLN]", str(tile)) for tile in picture.tile)
    if deep or picture.mode not in MODES:
        got = "16" if deep else f"Pillow's mode {picture.mode}"
        raise _Refused(f"images: {path}: expected at most 8 bits a channel, got {got}")
    # An MPO file is a JPEG whose other pictures are previews or other views of the first.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise _Refused(f"images: {path}: expected one image, got several frames or pages")
    picture.load()
    if picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        raise _Refused(f"images: {path}: expected an opaque image; put it on a background of your choice")


def _pixels(path: str, mode: str, size: int | None, dtype: str) -> np.ndarray:
    """The pixels of an image, [H, W, C]: in [-1, 1] for float32, levels for uint8."""
    image = _pillow()
    with _opened(path) as picture:
        _check(picture, path)
        picture = _upright(picture).convert(mode)
    if size is not None:
        side, (width, height) = min(picture.size), picture.size
        left, top = (width - side) // 2, (height - side) // 2
        # Crop before resizing: resizing with a box would mix in pixels from outside the box at its edges.
        square = picture.crop((left, top, left + side, top + side))
        picture = square.resize((size, size), image.Resampling.BICUBIC)
    pixels = np.array(picture)
    if dtype != "uint8":
        pixels = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
    return pixels.reshape(*pixels.shape[:2], -1)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images: they are read with Pillow, which is missing: pip install pillow") from error
    return Image
