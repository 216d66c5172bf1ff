"""Verified checkpoints: the whole state, the config, and a checksum of every array.

Only this module uses Orbax. Orbax's files carry no checksums, so it reads flipped bits as other numbers; it casts a wrong
dtype, and it does not fall back to an earlier checkpoint. A checkpoint of step n is one Orbax composite::

    n/state   every array of the state by name (see ``checkpoint_arrays``)
    n/meta    JSON: {"crc32", "body"}, the body {"step", "config", "notes", "position", "score", "leaves": the record of
              each array}

Saves are asynchronous: ``save`` copies the state and returns, so later steps may reuse its buffers. Values and checksums do
not depend on the sharding of the state, so it may be restored on any number of devices and processes. With several
processes, all must make the same calls. Each reads and writes the parts on its own devices, in a directory that all share.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import shutil
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jflow import checks
from jflow.training import checkpoint_arrays, checkpoint_config
from jflow.training.distributed import barrier, first_process
from jflow.types import Array, Params

_log = logging.getLogger(__name__)


class Stepped(Protocol):
    """The content of a checkpoint: a named tuple of arrays, one of which is the number of steps taken."""

    @property
    def step(self) -> Array | int:
        """The number of steps taken."""
        ...


State = TypeVar("State", bound=Stepped)


class Checkpoints:
    """The checkpoints of one run in one directory; a context manager that waits for pending saves when it ends.

    Args:
      directory: a relative or absolute path; created if it is missing.
      config: the run's config, of JSON types. It is saved, and compared on restore.
      notes: other JSON values to save, such as versions of libraries. A difference on restore is only logged.
      keep: the number of newest checkpoints to keep; None for all. With more than one, an earlier checkpoint remains if the
        last one is damaged.
      keep_best: the number of further checkpoints to keep, those with the lowest scores.
      resume: whether the directory may already hold checkpoints.
      overwrite: whether to delete the content of the directory.

    Raises:
      FileExistsError: if the directory is not empty and neither ``resume`` nor ``overwrite`` is set.
      NotADirectoryError: if ``directory`` is a file.
      TypeError: if the config or the notes are not of JSON types, or ``keep`` or ``keep_best`` is not a whole number.
      ValueError: if ``resume`` and ``overwrite`` are both set, or ``keep`` or ``keep_best`` is out of range.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        config: Mapping[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
        keep: int | None = 3,
        keep_best: int = 0,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        if resume and overwrite:
            raise ValueError("resume, overwrite: expected at most one of them")
        self.directory = absolute("directory", directory)
        self._config = checkpoint_config.as_json("config", config or {})
        self._notes = checkpoint_config.as_json("notes", {**checkpoint_config.versions(), **(notes or {})})
        if keep is not None:
            checks.integer("keep", keep, low=1)
        checks.integer("keep_best", keep_best)
        used = self.directory.exists() and any(self.directory.iterdir())
        if used and not (resume or overwrite):
            raise FileExistsError(f"{self.directory} is not empty; resume the run or overwrite it")
        barrier("looked at the directory")
        if used and overwrite and first_process():
            shutil.rmtree(self.directory)
        barrier("emptied the directory")
        self._scores = _read_scores(self.directory) if resume and keep_best else {}
        self._manager = _writer(self.directory, keep, keep_best, self._scores)

    def save(self, state: Stepped, *, position: Any = None, score: float | None = None) -> None:
        """Copies the state immediately and writes the copy in the background.

        Args:
          state: a ``TrainState``, or another named tuple of arrays with a ``step``.
          position: the position of a host iterator (``Feed.position``), of JSON types.
          score: the number that ``keep_best`` compares; lower is better. A checkpoint whose score is None or not finite is
            never among the best.

        Raises:
          ValueError: if there is already a checkpoint of this step or a later one, or, with several processes, if an array
            lies on one process alone.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        newest = self._manager.latest_step()
        if newest is not None and step <= newest:
            raise ValueError(f"step: {self.directory} holds step {newest}, not before {step}")
        score = None if score is None or not np.isfinite(score) else float(score)
        arrays, records = checkpoint_arrays.copies(state)
        body = {
            "step": step,
            "config": self._config,
            "notes": self._notes,
            "position": checkpoint_config.as_json("position", position),
            "score": score,
            "leaves": records,
        }
        if score is not None:
            self._scores[step] = score
        self._manager.save(
            step,
            # Orbax refuses arrays without elements; their record is enough to restore them.
            args=ocp.args.Composite(
                state=ocp.args.StandardSave({name: value for name, value in arrays.items() if value.size}),
                meta=ocp.args.JsonSave({"crc32": _crc_of_json(body), "body": body}),
            ),
        )

    def restore_latest(self, template: State, *, ignore: Collection[str] = ()) -> tuple[State, Any]:
        """Restores the newest checkpoint that is not damaged.

        A damaged checkpoint is logged and renamed to STEP.damaged, and the one before it is tried.

        Args:
          template: a state with the same structure, shapes and dtypes, and with the shardings that the result should have
            (``init_state``, ``sharding.place``); arrays or ``jax.ShapeDtypeStruct``.
          ignore: dotted names of config entries that may differ ("total_steps").

        Returns:
          (state, position): as they were saved.

        Raises:
          FileNotFoundError: if there is no checkpoint, or every one is damaged.
          TypeError: if ``ignore`` is a string.
          ValueError: if the config or the template differs from the checkpoint; the message names the entries or leaves.
        """
        if isinstance(ignore, str):
            raise TypeError(f"ignore: expected a collection of names, got the string {ignore!r}")
        damaged: list[int] = []
        self.wait()
        steps = _of_first(sorted(self.steps(), reverse=True))
        # Use a separate manager: once an Orbax manager has read part of an item, it keeps that way of reading and writing it.
        with _reader(self.directory) as manager:
            for step in steps:
                try:
                    body = _read_meta(manager, step)
                    checkpoint_config.compare(body["config"], self._config, ignore)
                    wanted = checkpoint_arrays.match(body["leaves"], template)
                    layouts = {name: checkpoint_arrays.layout(leaf) for name, leaf in wanted.items()}
                    arrays = _read_arrays(manager, step, body["leaves"], layouts)
                except checkpoint_arrays.DamagedError as error:
                    _log.warning("%s: step %d is damaged (%s); trying the one before it", self.directory, step, error)
                    damaged.append(step)
                    continue
                checkpoint_config.compare_notes(body["notes"], self._notes)
                state = checkpoint_arrays.to_tree(arrays, body["leaves"], template)
                self._set_aside(damaged)
                _log.info("%s: restored step %d", self.directory, step)
                return state, body["position"]
        raise _none_whole(self.directory, damaged)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, damaged or not, oldest first."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Waits until all saves are on disk, and raises the error of a save that failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending saves and closes the Orbax manager."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, which a run resumed from ``step`` will write again."""
        for later in [other for other in self.steps() if other > step]:
            self._manager.delete(later)

    def _set_aside(self, steps: list[int]) -> None:
        # If a damaged checkpoint kept its name, its step could not be saved again.
        for step in steps if first_process() else ():
            aside = self.directory / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self.directory / str(step)).rename(aside)
        barrier("set damaged checkpoints aside")
        if steps:
            self._manager.reload()


def restore_params(
    directory: str | os.PathLike[str], which: str = "params", *, step: int | str | None = None, template: Params = None
) -> tuple[Params, dict[str, Any]]:
    """Restores only the parameters, or one average of them, and the config.

    It needs no optimizer and changes nothing on disk. A single process may call it.

    Args:
      directory: a run's directory, or its directory of checkpoints.
      which: "params", or the name of an average ("0.999").
      step: the step of the checkpoint, or "best" for the one with the lowest score; by default the newest one that is not
        damaged.
      template: a pytree of the same structure. It is needed only if the parameters are not nested dictionaries, or to give
        them the shardings of its leaves.

    Returns:
      (params, config): the parameters in the dtypes that were saved (an average of bfloat16 parameters is in float32), and
      the config.

    Raises:
      FileNotFoundError: if there is no such directory or checkpoint, or every checkpoint tried is damaged.
      ValueError: if ``which`` is unknown (the message lists the names), the template does not match, or a dtype needs x64.
      TypeError: if ``step`` is neither None, a whole number nor "best".
    """
    root = absolute("directory", directory)
    if step is not None and step != "best":
        checks.integer("step", step)
    root = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such directory, so no checkpoint")
    damaged: list[int] = []
    with _reader(root) as manager:
        for this in _chosen(root, sorted(manager.all_steps(), reverse=True), step):
            try:
                body = _read_meta(manager, this, alone=True)
                # An unknown name is the caller's mistake, not damage.
                records, depth = _select(body["leaves"], which)
                wanted = {} if template is None else checkpoint_arrays.match(records, template, depth)
                layouts = {name: checkpoint_arrays.layout(leaf) for name, leaf in wanted.items()}
                arrays = _read_arrays(manager, this, records, layouts, alone=True)
            except checkpoint_arrays.DamagedError as error:
                _log.warning("%s: step %d is damaged (%s); trying the one before it", root, this, error)
                damaged.append(this)
                continue
            if template is None:
                return checkpoint_arrays.to_dict(arrays, records, depth), body["config"]
            return checkpoint_arrays.to_tree(arrays, records, template, depth), body["config"]
    raise _none_whole(root, damaged)


def absolute(name: str, directory: str | os.PathLike[str]) -> pathlib.Path:
    """The absolute path of a directory.

    Raises:
      ValueError: if it is the address of an object store, which would create a local directory of that name.
      NotADirectoryError: if it is a file.
    """
    if "://" in os.fspath(directory):
        raise ValueError(f"{name}: expected a path of a mounted file system, got {os.fspath(directory)!r}")
    path = pathlib.Path(directory).expanduser().absolute()
    if path.is_file():
        raise NotADirectoryError(f"{name}: {path} is a file; expected a directory")
    return path


def _writer(directory: pathlib.Path, keep: int | None, keep_best: int, scores: Mapping[int, float]) -> Any:
    import orbax.checkpoint as ocp

    policies = ocp.checkpoint_managers
    policy = policies.AnyPreservationPolicy([policies.LatestN(keep), _Best(keep_best, scores)])
    return ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(preservation_policy=policy))


class _Best:
    """An Orbax preservation policy that keeps the ``count`` steps with the lowest scores; of equal scores, the newer."""

    def __init__(self, count: int, scores: Mapping[int, float]) -> None:
        self._count, self._scores = count, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [info.step for info in checkpoints]
        scored = sorted((step for step in steps if step in self._scores), key=lambda step: (self._scores[step], -step))
        return [step in scored[: self._count] for step in steps]


def _reader(directory: pathlib.Path) -> Any:
    import orbax.checkpoint as ocp

    # Orbax's read_only option warns at every start; a manager that keeps everything and never saves changes nothing either.
    # It runs on this process alone: if it failed on a damaged file, the other processes would wait at Orbax's barriers.
    me = jax.process_index()
    options = ocp.CheckpointManagerOptions(
        create=False,
        cleanup_tmp_directories=False,
        enable_async_checkpointing=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader_{me}"
        ),
    )
    return ocp.CheckpointManager(directory, options=options)


def _read_meta(manager: Any, step: int, alone: bool = False) -> dict[str, Any]:
    """The verified body of a step's metadata. Unless ``alone``, an error on one process is raised on all."""
    import orbax.checkpoint as ocp

    failure = None
    try:
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        body = meta["body"]
        if _crc_of_json(body) != meta["crc32"]:
            raise checkpoint_arrays.DamagedError("meta has another checksum than when it was written")
        if body["step"] != step:
            raise checkpoint_arrays.DamagedError(f"it holds step {body['step']}")
    except Exception as error:
        failure = _as_damage(error)
    _raise_on_all(failure, alone)
    return body


def _read_arrays(
    manager: Any, step: int, records: checkpoint_arrays.Records, layouts: Mapping[str, Any], alone: bool = False
) -> checkpoint_arrays.Arrays:
    """The verified arrays of these records, each with its sharding in ``layouts``, or as a numpy array if it has none."""
    import orbax.checkpoint as ocp

    empty = {name for name, record in records.items() if 0 in record["shape"]}
    wanted = {
        name: jax.ShapeDtypeStruct(record["shape"], checkpoint_arrays.dtype_of(record))
        for name, record in records.items()
        if name not in empty
    }

    def how(name: str, like: jax.ShapeDtypeStruct) -> Any:
        # Pass the saved dtypes; otherwise Orbax casts silently.
        if layouts.get(name) is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=like.dtype)
        return ocp.ArrayRestoreArgs(sharding=layouts[name], global_shape=tuple(like.shape), dtype=like.dtype)

    failure = None
    try:
        restore = ocp.args.PyTreeRestore(
            item=wanted, restore_args={name: how(name, like) for name, like in wanted.items()}, partial_restore=True
        )
        arrays = dict(manager.restore(step, args=ocp.args.Composite(state=restore))["state"]) if wanted else {}
    except Exception as error:
        failure = _as_damage(error)
    _raise_on_all(failure, alone)
    arrays |= {name: np.zeros(records[name]["shape"], checkpoint_arrays.dtype_of(records[name])) for name in empty}
    checkpoint_arrays.verify(arrays, records)
    return arrays


def _raise_on_all(failure: Exception | None, alone: bool) -> None:
    """Raises the failure of one process on all; otherwise they would resume from different steps, or deadlock."""
    if jax.process_count() > 1 and not alone:
        failed = multihost_utils.process_allgather(np.asarray(failure is not None))
        if failure is None and failed.any():
            failure = checkpoint_arrays.DamagedError(f"processes {np.flatnonzero(failed).tolist()} could not read it")
    if failure is not None:
        raise failure


def _of_first(steps: list[int]) -> list[int]:
    """The steps that the first process sees; on a shared file system other processes may see changes later."""
    if jax.process_count() == 1:
        return steps
    padded = np.full(4096, -1, np.int32)
    padded[: len(steps)] = steps[: len(padded)]
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded) if step >= 0]


def _chosen(directory: pathlib.Path, steps: list[int], step: int | str | None) -> list[int]:
    """The steps to try, in order."""
    if step is None:
        return steps
    if step == "best":
        scores = _read_scores(directory)
        if not scores:
            raise FileNotFoundError(f"{directory}: no checkpoint has a score")
        return [min(scores, key=lambda step: (scores[step], -step))]
    if step not in steps:
        raise FileNotFoundError(f"{directory}: no checkpoint of step {step}; there are {sorted(steps)}")
    return [step]


def _read_scores(directory: pathlib.Path) -> dict[int, float]:
    """The scores of all checkpoints that have a readable score."""
    scores = {}
    if not directory.is_dir():
        return scores
    with _reader(directory) as manager:
        for step in manager.all_steps():
            try:
                score = _read_meta(manager, step, alone=True)["score"]
            except checkpoint_arrays.DamagedError:
                continue
            if score is not None:
                scores[step] = score
    return scores


def _none_whole(directory: pathlib.Path, damaged: list[int]) -> FileNotFoundError:
    if damaged:
        return FileNotFoundError(f"{directory}: no checkpoint is whole; damaged: steps {damaged}")
    return FileNotFoundError(f"{directory}: there is no checkpoint")


def _as_damage(error: Exception) -> Exception:
    """The error as a DamagedError: damaged files make Orbax and TensorStore raise many types. MemoryError is kept."""
    if isinstance(error, (checkpoint_arrays.DamagedError, MemoryError)):
        return error
    return checkpoint_arrays.DamagedError(
        f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    )


def _select(records: checkpoint_arrays.Records, which: str) -> tuple[checkpoint_arrays.Records, int]:
    """The records of the parameters or of one average, and the number of keys that lead to them."""
    prefix, depth = ("params", 1) if which == "params" else (f"ema/{which}", 2)
    # If the parameters are a single array, the leaf's name is the prefix itself.
    selected = {name: record for name, record in records.items() if name == prefix or name.startswith(prefix + "/")}
    if not selected:
        names = sorted({name.split("/")[1] for name in records if name.startswith("ema/")})
        raise ValueError(f"which: expected one of {', '.join(map(repr, ['params', *names]))}, got {which!r}")
    return selected, depth


def _crc_of_json(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
