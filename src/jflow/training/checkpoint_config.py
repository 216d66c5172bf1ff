"""The config and the notes that a checkpoint stores as JSON, and their comparison."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from typing import Any

import jax

_log = logging.getLogger(__name__)
_ABSENT = object()


def as_json(name: str, value: Any) -> Any:
    """The value after a round trip through JSON, which turns tuples into lists.

    Raises:
      TypeError: if the value cannot be represented in JSON.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: expected dictionaries, lists, strings, finite numbers and None only: {error}"
        ) from None


def difference(before: Any, now: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """The entries in which two JSON values differ, as (before, now) by dotted name; "(absent)" stands for a missing one."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*before, *(key for key in now if key not in before)]:
            inner = f"{name}.{key}" if name else key
            found |= difference(before.get(key, _ABSENT), now.get(key, _ABSENT), inner)
        return found
    if before is now or (type(before) is type(now) and before == now):
        return {}
    old, new = ("(absent)" if value is _ABSENT else value for value in (before, now))
    return {name: (old, new)}


def compare(before: Any, now: Any, ignore: Collection[str]) -> None:
    """Checks that a config is equal to the checkpoint's, except for the entries named in ``ignore`` and what they contain.

    Raises:
      ValueError: if other entries differ; the message has the name and both values of each.
    """
    found = {
        name: values
        for name, values in difference(before, now).items()
        if not any(name == entry or name.startswith(entry + ".") for entry in ignore)
    }
    if found:
        lines = "".join(f"\n  {name}: checkpoint {old!r}, now {new!r}" for name, (old, new) in found.items())
        raise ValueError(f"config: it differs from the checkpoint's:{lines}")


def compare_notes(before: Any, now: Any) -> None:
    """Logs a warning for every note that differs from the checkpoint's."""
    for name, (old, new) in difference(before, now).items():
        _log.warning("%s was %s, now %s: the run continues, but not bit for bit", name, old, new)


def versions() -> dict[str, str]:
    """The jax version and the backend. A resumed run continues bit for bit only if these are unchanged."""
    return {"jax": jax.__version__, "backend": jax.default_backend()}
