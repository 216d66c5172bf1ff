"""Checkpoints that are verified: the whole state, the config, and a checksum of every array.

The one module that touches Orbax, whose own files carry no checksums: flipped bits come back as other numbers, a wrong
dtype is cast, and there is no second try. A checkpoint of step n is one Orbax composite:

    n/state   every array of the state by name (see ``leaves``)
    n/meta    JSON: {"crc32", "body"}, the body {"step", "config", "notes", "leaves": the record of each array}

Saves are asynchronous: ``save`` copies the state to the host and returns, so later steps may reuse its buffers.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import shutil
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from jflow import checks
from jflow.training import leaves
from jflow.training.state import TrainState
from jflow.types import Params

_log = logging.getLogger(__name__)
_ABSENT = object()


class Checkpoints:
    """The checkpoints of one run in one directory; a context manager that waits for pending saves when it ends.

    Args:
      directory: relative or absolute; made if missing.
      config: the run's config, of JSON types; saved, and compared on restore.
      notes: other JSON values worth keeping (versions of libraries); a difference on restore is only logged.
      keep: the number of newest checkpoints that are kept; more than one, to have another when the last is damaged.
      resume: the directory may hold checkpoints.
      overwrite: what the directory holds is deleted.

    Raises:
      FileExistsError: when the directory is not empty and neither ``resume`` nor ``overwrite`` is set.
      TypeError: for a config that is not of JSON types.
      ValueError: when both are set, or ``keep`` is not positive.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        config: Mapping[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
        keep: int = 3,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        if resume and overwrite:
            raise ValueError("resume, overwrite: expected at most one of them")
        self.directory = _absolute(directory)
        self._config = as_json("config", config or {})
        self._notes = as_json("notes", {**_versions(), **(notes or {})})
        checks.integer("keep", keep, low=1)
        if self.directory.exists() and any(self.directory.iterdir()) and not resume:
            if not overwrite:
                raise FileExistsError(f"{self.directory} is not empty; resume the run or overwrite it")
            shutil.rmtree(self.directory)
        self._manager = _manager(self.directory, keep)

    def save(self, state: TrainState) -> None:
        """Copies the state to the host, at once, and writes it, in the background.

        Raises:
          ValueError: when there is a checkpoint of this step or a later one already.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        arrays, records = leaves.to_host(state)
        body = {"step": step, "config": self._config, "notes": self._notes, "leaves": records}
        # Orbax refuses arrays without elements; their record says all there is.
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave({name: value for name, value in arrays.items() if value.size}),
                meta=ocp.args.JsonSave({"crc32": _crc_of_json(body), "body": body}),
            ),
        )
        if not saved:
            raise ValueError(f"step: {self.directory} holds step {self._manager.latest_step()}, not before {step}")

    def restore_latest(self, template: TrainState, *, ignore: Collection[str] = ()) -> TrainState:
        """The newest checkpoint that is whole.

        A damaged one is named in the log and set aside, as STEP.damaged, and the one before it is tried.

        Args:
          template: a state of the same structure, shapes and dtypes, placed as the result should be (``init_state``).
          ignore: config entries that may differ, by their dotted names ("total_steps").

        Raises:
          FileNotFoundError: when there is none, or none that is whole.
          ValueError: when the config differs, with the difference; when the template does, naming the leaves.
        """
        body, arrays, damaged = _read_newest(self.directory, sorted(self.steps(), reverse=True))
        _compare_configs(body["config"], self._config, ignore)
        _compare_notes(body["notes"], self._notes)
        state = leaves.to_tree(arrays, body["leaves"], template)
        self._set_aside(damaged)
        _log.info("%s: restored step %d", self.directory, body["step"])
        return state

    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, whole or not, oldest first."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Returns when all saves are on disk; raises what went wrong with one."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set_aside(self, steps: list[int]) -> None:
        # Left where they are, they would keep the steps from being saved again, and later runs from a whole one.
        for step in steps:
            aside = self.directory / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self.directory / str(step)).rename(aside)
        if steps:
            self._manager.reload()


def restore_params(
    directory: str | os.PathLike[str], which: str = "params", *, step: int | None = None, template: Params = None
) -> tuple[Params, dict[str, Any]]:
    """Only the parameters, or one average of them, and the config; no optimizer is needed.

    Args:
      directory: a run's directory, or the one with its checkpoints.
      which: "params", or the name of an average ("0.999").
      step: which checkpoint; by default the newest that is whole. Nothing on disk is changed.
      template: a pytree of the same structure, needed only where the parameters are not nested dictionaries.

    Returns:
      (params, config): the dtypes are those that were saved; an average of bfloat16 parameters is in float32.

    Raises:
      FileNotFoundError: when there is no such directory or checkpoint, or none that is whole.
      ValueError: for an unknown ``which``, listing those there are; for dtypes that this session cannot hold.
    """
    root = _absolute(directory)
    root = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such directory, so no checkpoint")
    with _manager(root, None) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{root}: no checkpoint of step {step}; there are {sorted(steps)}")
    body, arrays, _ = _read_newest(root, steps if step is None else [step], which)
    records, depth = _select(body["leaves"], which)
    if template is None:
        return leaves.to_dict(arrays, records, depth), body["config"]
    return leaves.to_tree(arrays, records, template, depth), body["config"]


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
    """The entries in which two JSON values differ, by dotted name: (before, now), "(absent)" where there is none."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*before, *(key for key in now if key not in before)]:
            inner = f"{name}.{key}" if name else key
            found |= difference(before.get(key, _ABSENT), now.get(key, _ABSENT), inner)
        return found
    if before is now or (type(before) is type(now) and before == now):
        return {}
    return {name: tuple("(absent)" if value is _ABSENT else value for value in (before, now))}


def _manager(directory: pathlib.Path, keep: int | None) -> Any:
    """A manager that writes and keeps the newest ``keep``, or, without, one for reading only."""
    import orbax.checkpoint as ocp

    # Orbax's own read_only warns at every start; a manager that keeps all and never saves changes nothing either.
    reading = keep is None
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=not reading,
        cleanup_tmp_directories=not reading,
        enable_async_checkpointing=not reading,
    )
    return ocp.CheckpointManager(directory, options=options)


def _read_newest(
    directory: pathlib.Path, steps: list[int], which: str | None = None
) -> tuple[dict[str, Any], leaves.Arrays, list[int]]:
    """The body and arrays of the first of these steps that is whole, and the damaged ones before it."""
    damaged: list[int] = []
    # A manager of its own: Orbax ties one that has read a part of an item to that way of reading and writing it.
    with _manager(directory, None) as manager:
        for step in steps:
            try:
                return *_read(manager, step, which), damaged
            except leaves.DamagedError as error:
                _log.warning("%s: step %d is damaged (%s); trying the one before it", directory, step, error)
                damaged.append(step)
    if damaged:
        raise FileNotFoundError(f"{directory}: no checkpoint is whole; damaged: steps {damaged}")
    raise FileNotFoundError(f"{directory}: there is no checkpoint")


def _read(manager: Any, step: int, which: str | None = None) -> tuple[dict[str, Any], leaves.Arrays]:
    """The verified body and arrays of a step: all of them, or those of ``which`` only."""
    import orbax.checkpoint as ocp

    try:
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        body = meta["body"]
        if _crc_of_json(body) != meta["crc32"]:
            raise leaves.DamagedError("meta has another checksum than when it was written")
        records = body["leaves"]
    except Exception as error:
        raise _as_damage(error) from error
    # Outside the try: asking for what was never saved is the caller's mistake, not damage.
    if which is not None:
        records, _ = _select(records, which)
    wanted = {
        name: jax.ShapeDtypeStruct(record["shape"], leaves.dtype_of(record))
        for name, record in records.items()
        if 0 not in record["shape"]
    }
    try:
        # Restored as numpy arrays, of the dtypes that were saved.
        restore = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted),
            partial_restore=True,
        )
        arrays = dict(manager.restore(step, args=ocp.args.Composite(state=restore))["state"]) if wanted else {}
        arrays |= {
            name: np.zeros(record["shape"], leaves.dtype_of(record))
            for name, record in records.items()
            if name not in wanted
        }
        leaves.verify(arrays, records)
    except Exception as error:
        raise _as_damage(error) from error
    return body, arrays


def _as_damage(error: Exception) -> Exception:
    """Broken files make Orbax and TensorStore fail in many ways; only running out of memory says nothing about them."""
    if isinstance(error, (leaves.DamagedError, MemoryError)):
        return error
    return leaves.DamagedError(f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")


def _select(records: leaves.Records, which: str) -> tuple[leaves.Records, int]:
    """The records of the parameters or of one average, and the number of keys that lead to them."""
    prefix, depth = ("params", 1) if which == "params" else (f"ema/{which}", 2)
    # A bare array as parameters is a leaf of that very name.
    selected = {name: record for name, record in records.items() if name == prefix or name.startswith(prefix + "/")}
    if not selected:
        names = sorted({name.split("/")[1] for name in records if name.startswith("ema/")})
        raise ValueError(f"which: expected one of {', '.join(map(repr, ['params', *names]))}, got {which!r}")
    return selected, depth


def _crc_of_json(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _compare_configs(before: Any, now: Any, ignore: Collection[str]) -> None:
    found = {
        name: values
        for name, values in difference(before, now).items()
        if not any(name == entry or name.startswith(entry + ".") for entry in ignore)
    }
    if found:
        lines = "".join(f"\n  {name}: checkpoint {old!r}, now {new!r}" for name, (old, new) in found.items())
        raise ValueError(f"config: it differs from the checkpoint's:{lines}")


def _compare_notes(before: Any, now: Any) -> None:
    for name, (old, new) in difference(before, now).items():
        _log.warning("%s was %s, now %s: the run continues, but not bit for bit", name, old, new)


def _versions() -> dict[str, str]:
    return {"jax": jax.__version__, "backend": jax.default_backend()}


def _absolute(directory: str | os.PathLike[str]) -> pathlib.Path:
    return pathlib.Path(directory).expanduser().absolute()
