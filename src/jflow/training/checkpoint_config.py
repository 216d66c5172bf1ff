"""What a checkpoint says of its run beside the arrays, the config and the notes, as JSON; and how two of them differ."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from typing import Any

import jax

_log = logging.getLogger(__name__)
_ABSENT = object()


def as_json(name: str, value: Any) -> Any:
    """The value as it comes back from JSON (tuples as lists).

    Raises:
      TypeError: when it is not made of JSON types.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: expected dictionaries, lists, strings, finite numbers and None only: {error}"
        ) from None


def difference(before: Any, now: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """The entries in which two JSON values differ, by dotted name: (before, now), with "(absent)" for a missing one."""
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
    """Refuses a config that is not the checkpoint's, but for the entries of these dotted names and what lies in them.

    Raises:
      ValueError: naming every entry that differs, with both values.
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
    """What a resumed run must have in common with the saved one to continue bit for bit, beside its config."""
    return {"jax": jax.__version__, "backend": jax.default_backend()}
