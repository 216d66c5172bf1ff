"""Checkpoints that are verified: the whole state, the config, and a checksum of every array.

The one module that touches Orbax, whose own files carry no checksums: flipped bits come back as other numbers, a wrong
dtype is cast, and there is no second try. A checkpoint of step n is one Orbax composite::

    n/state   every array of the state by name (see ``checkpoint_arrays``)
    n/meta    JSON: {"crc32", "body"}, the body {"step", "config", "notes", "position", "score", "leaves": the record of
              each array}

Saves are asynchronous: ``save`` copies the state and returns, so later steps may reuse its buffers. Values and checksums do
not depend on how the state is laid out, so it may be restored on any number of devices and processes. Of several processes
each makes the same calls; each reads and writes the parts that lie on its own devices, in a directory that all see.
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
    """What a checkpoint holds: a named tuple of arrays, one of which is the number of steps taken."""

    @property
    def step(self) -> Array | int:
        """The steps taken, a whole number."""
        ...


State = TypeVar("State", bound=Stepped)


class Checkpoints:
    """The checkpoints of one run in one directory; a context manager that waits for pending saves when it ends.

    Args:
      directory: relative or absolute; made if missing.
      config: the run's config, of JSON types; saved, and compared on restore.
      notes: other JSON values worth keeping (versions of libraries); a difference on restore is only logged.
      keep: the number of newest checkpoints that are kept; more than one, to have another when the last is damaged. None
        for all.
      keep_best: the number of checkpoints with the lowest scores that are kept beside them.
      resume: the directory may hold checkpoints.
      overwrite: what the directory holds is deleted.

    Raises:
      FileExistsError: when the directory is not empty and neither ``resume`` nor ``overwrite`` is set.
      NotADirectoryError: when there is a file of that name.
      TypeError: for a config that is not of JSON types.
      ValueError: when both are set, or a number of checkpoints is out of range.
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
        """Copies the state, at once, and writes it, in the background.

        Args:
          state: a ``TrainState``, or another named tuple of arrays with a ``step``.
          position: of data that come from the host (``Feed.position``), of JSON types.
          score: what ``keep_best`` compares, lower being better; without one (or with one that is not finite) a
            checkpoint is never among the best.

        Raises:
          ValueError: when there is a checkpoint of this step or a later one already; of several processes, when an array
            lies on one alone.
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
            # Orbax refuses arrays without elements; their record says all there is.
            args=ocp.args.Composite(
                state=ocp.args.StandardSave({name: value for name, value in arrays.items() if value.size}),
                meta=ocp.args.JsonSave({"crc32": _crc_of_json(body), "body": body}),
            ),
        )

    def restore_latest(self, template: State, *, ignore: Collection[str] = ()) -> tuple[State, Any]:
        """The newest checkpoint that is whole.

        A damaged one is named in the log and set aside, as STEP.damaged, and the one before it is tried.

        Args:
          template: a state of the same structure, shapes and dtypes, laid out as the result should be (``init_state``,
            ``sharding.place``), on whatever devices; arrays or ``jax.ShapeDtypeStruct``.
          ignore: config entries that may differ, by their dotted names ("total_steps").

        Returns:
          (state, position): as they were saved.

        Raises:
          FileNotFoundError: if there is no checkpoint, or every one is damaged.
          TypeError: when ``ignore`` is one string.
          ValueError: when the config differs, with the difference; when the template does, naming the leaves.
        """
        if isinstance(ignore, str):
            raise TypeError(f"ignore: expected a collection of names, got the string {ignore!r}")
        damaged: list[int] = []
        self.wait()
        steps = _of_first(sorted(self.steps(), reverse=True))
        # A manager of its own: Orbax ties one that has read a part of an item to that way of reading and writing it.
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

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, which a run that goes on from ``step`` will write again."""
        for later in [other for other in self.steps() if other > step]:
            self._manager.delete(later)

    def _set_aside(self, steps: list[int]) -> None:
        # Left where they are, they would keep the steps from being saved again, and later runs from a whole one.
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
    """Only the parameters, or one average of them, and the config; no optimizer is needed. One process may call it alone.

    Args:
      directory: a run's directory, or the one with its checkpoints.
      which: "params", or the name of an average ("0.999").
      step: which checkpoint; by default the newest that is whole; "best" for the one with the lowest score. Nothing on disk
        is changed.
      template: a pytree of the same structure, needed only where the parameters are not nested dictionaries, or to lay
        them out as its leaves are.

    Returns:
      (params, config): the dtypes are those that were saved; an average of bfloat16 parameters is in float32.

    Raises:
      FileNotFoundError: when there is no such directory or checkpoint, or none that is whole.
      ValueError: for an unknown ``which``, listing those there are; for dtypes that this session cannot hold; TypeError for a
        step of another type.
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
                # Asking for what was never saved is the caller's mistake, not damage.
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
      ValueError: for the address of an object store, which would become a local directory of that name.
      NotADirectoryError: when it is a file.
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
    """A preservation policy of Orbax: the ``count`` steps of lowest score, the newer of two that are equal."""

    def __init__(self, count: int, scores: Mapping[int, float]) -> None:
        self._count, self._scores = count, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [info.step for info in checkpoints]
        scored = sorted((step for step in steps if step in self._scores), key=lambda step: (self._scores[step], -step))
        return [step in scored[: self._count] for step in steps]


def _reader(directory: pathlib.Path) -> Any:
    import orbax.checkpoint as ocp

    # Orbax's own read_only warns at every start; a manager that keeps all and never saves changes nothing either. It is
    # this process's alone: one that fails on a damaged file would leave the others at Orbax's barriers.
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
    """The verified body of a step's record; the same for all processes, unless ``alone``."""
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
    """The verified arrays of these records, each in its layout, or as a numpy array if it has no layout."""
    import orbax.checkpoint as ocp

    empty = {name for name, record in records.items() if 0 in record["shape"]}
    wanted = {
        name: jax.ShapeDtypeStruct(record["shape"], checkpoint_arrays.dtype_of(record))
        for name, record in records.items()
        if name not in empty
    }

    def how(name: str, like: jax.ShapeDtypeStruct) -> Any:
        # Without the dtypes that were saved, Orbax would cast in silence.
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
    """Raises on every process what failed on one: apart, they would go on from different steps, or wait for one another."""
    if jax.process_count() > 1 and not alone:
        failed = multihost_utils.process_allgather(np.asarray(failure is not None))
        if failure is None and failed.any():
            failure = checkpoint_arrays.DamagedError(f"processes {np.flatnonzero(failed).tolist()} could not read it")
    if failure is not None:
        raise failure


def _of_first(steps: list[int]) -> list[int]:
    """What the first process sees: on a shared file system another may see a change late."""
    if jax.process_count() == 1:
        return steps
    padded = np.full(4096, -1, np.int32)
    padded[: len(steps)] = steps[: len(padded)]
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded) if step >= 0]


def _chosen(directory: pathlib.Path, steps: list[int], step: int | str | None) -> list[int]:
    """The steps to try, in this order."""
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
    """The scores of the checkpoints that have one that can be read."""
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
    """Broken files make Orbax and TensorStore fail in many ways; only running out of memory says nothing about them."""
    if isinstance(error, (checkpoint_arrays.DamagedError, MemoryError)):
        return error
    return checkpoint_arrays.DamagedError(
        f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    )


def _select(records: checkpoint_arrays.Records, which: str) -> tuple[checkpoint_arrays.Records, int]:
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
