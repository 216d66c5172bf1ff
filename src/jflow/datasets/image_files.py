"""Image files as a source of rows: a folder of them, or a folder for each class."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jflow import checks
from jflow.datasets.paths import Path, existing, listed, place
from jflow.types import Batch

# Endings of image files, in any case, and Pillow's names of their formats.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# The tag of EXIF and TIFF data that says how an image is to be turned.
ORIENTATION = 0x0112
# Pillow's modes of at most 8 bits a channel: of others its conversion would cut values off.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


class Images:
    """Image files; made by ``images``.

    ``images[i]`` is Batch(x1 ``[H, W, C]`` float32 in [-1, 1], cond an int32 scalar, or None); IndexError past the end.

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
    ) -> None:
        self.paths, self.classes = tuple(paths), tuple(classes)
        self._labels = None if labels is None else np.asarray(labels, np.int32)
        self._size, self._mode = size, {1: "L", 3: "RGB"}[channels]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Batch:
        index = place(index, len(self))
        return Batch(
            x1=_pixels(self.paths[index], self._mode, self._size),
            cond=None if self._labels is None else np.array(self._labels[index]),
        )


def images(directory: Path, size: int | None = None, *, channels: int = 3) -> Images:
    """Image files, level/127.5 - 1 of 256 levels; where they lie in sub-folders, with labels.

    The files::

        directory/NAME.png            no labels
        directory/CLASS/.../NAME.png  cond = the place of CLASS among the names of the sub-folders

    PNG, JPEG, WebP, TIFF, BMP and GIF files are read, by their endings (``SUFFIXES``), turned upright by the orientation in
    their EXIF or XMP data. Hidden files and folders (``.DS_Store``) are left out, and nothing else is: any other file is
    refused by name.

    Names are in natural order: runs of digits compare as whole numbers, all else by code point, so that class ``2`` comes
    before ``10``, ``007`` beside ``7`` and ``a2`` before ``a10``. A label is a place in this order, not the number in a
    name; ``Images.classes`` has the names.

    Args:
      directory: the folder.
      size: the images' height and width: the largest square in the centre, resized (bicubic, antialiased). None to keep
        them as they are, all of one size when upright. The header of every file is then read at once, and all of an
        oblong image that has an orientation, or of an oblong PNG file, whose orientation may come last.
      channels: 3 for RGB or 1 for grey; other images are converted.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: naming the folder or file, when there are no images, a file has another ending, some images lie beside the
        sub-folders of others, a sub-folder has none, or, without ``size``, sizes differ; and when one is read, if it is
        damaged, not opaque, an animation or of several pages, or has more than 8 bits a channel. TypeError when ``size``
        is not a whole number.
      ImportError: if Pillow is missing.
    """
    _pillow()
    directory = existing("images", directory, "a folder of images, or of one such folder for each class", folder=True)
    checks.choice("channels", channels, (1, 3))
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
    return Images(paths, labels, classes, size, channels)


def _images_in(directory: pathlib.Path, deep: bool) -> list[str]:
    """The image files of a folder, in order; with ``deep`` those of the folders in it as well. No other file is there."""
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
    """The image of a file, of which only the header is read as yet; whatever Pillow raises then names the file."""
    image = _pillow()
    try:
        # A decoder raises whatever it meets in a damaged file.
        with image.open(path, formats=FORMATS) as opened:
            yield opened
    except _Refused:
        raise
    except Exception as error:
        raise ValueError(f"images: {path} cannot be read: {error}") from error


class _Refused(ValueError):
    """An image that could be read, and is not wanted."""


def _upright_size(path: str) -> tuple[int, int]:
    """Width and height of an image when it is turned upright."""
    with _opened(path) as picture:
        size = picture.size
        if size[0] == size[1]:
            return size
        try:
            return _upright(picture).size if picture.getexif().get(ORIENTATION, 1) != 1 else size
        except Exception:
            # A damaged image is named when it is read, as a square one is.
            return size


def _upright(picture: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.exif_transpose(picture)


def _check(picture: Any, path: str) -> None:
    """Refuses what the conversion to one image of 8 bits a channel would cut off."""
    # Pillow reads colours of 16 bits as 8, and says so in the raw mode alone.
    deep = any(re.search(";16[BLN]", str(tile)) for tile in picture.tile)
    if deep or picture.mode not in MODES:
        got = "16" if deep else f"Pillow's mode {picture.mode}"
        raise _Refused(f"images: {path}: expected at most 8 bits a channel, got {got}")
    # An MPO file is a JPEG whose further pictures are previews or views of the first.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise _Refused(f"images: {path}: expected one image, got several frames or pages")
    picture.load()
    if picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        raise _Refused(f"images: {path}: expected an opaque image; put it on a background of your choice")


def _pixels(path: str, mode: str, size: int | None) -> np.ndarray:
    """[H, W, C], float32."""
    image = _pillow()
    with _opened(path) as picture:
        _check(picture, path)
        picture = _upright(picture).convert(mode)
    if size is not None:
        side, (width, height) = min(picture.size), picture.size
        left, top = (width - side) // 2, (height - side) // 2
        # Cut first: resizing within a box lets pixels from outside in at its edges.
        square = picture.crop((left, top, left + side, top + side))
        picture = square.resize((size, size), image.Resampling.BICUBIC)
    pixels = np.asarray(picture, np.float32) / np.float32(127.5) - np.float32(1.0)
    return pixels.reshape(*pixels.shape[:2], -1)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images: they are read with Pillow, which is missing: pip install pillow") from error
    return Image
