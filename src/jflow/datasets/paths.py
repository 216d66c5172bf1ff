"""Checks of paths, and the names in a folder in natural order."""

from __future__ import annotations

import operator
import os
import pathlib
import re

Path = str | os.PathLike[str]


def existing(name: str, path: Path, what: str, folder: bool) -> pathlib.Path:
    """The path, after a check that it exists and is a folder or a file as expected.

    Raises:
      FileNotFoundError: if it does not exist.
      ValueError: if it is a file instead of a folder, or a folder instead of a file.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{name}: {path} does not exist; jflow brings no data sets, pass the path of {what}")
    if path.is_dir() != folder:
        raise ValueError(f"{name}: expected {what}, got the {'file' if folder else 'folder'} {path}")
    return path


def listed(directory: pathlib.Path) -> list[str]:
    """The names in a folder that are not hidden, in natural order."""
    return sorted((name for name in os.listdir(directory) if not name.startswith(".")), key=_natural)


def _natural(name: str) -> tuple[list[str | int], str]:
    """A sort key that compares text by code point and digits as whole numbers; equal keys are ordered by the name itself."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split("([0-9]+)", name))], name


def place(index: int, length: int) -> int:
    """The index of a row, from 0 to length - 1.

    Raises:
      IndexError: if it is negative or past the end.
    """
    index = operator.index(index)
    if not 0 <= index < length:
        raise IndexError(f"row {index} of {length}")
    return index
