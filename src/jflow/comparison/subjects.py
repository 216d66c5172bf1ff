"""Subjects: a model and all that is needed to sample from it, made by a named function or from a checkpoint."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jflow import bases, checks, training
from jflow.comparison.distances import Features
from jflow.comparison.entries import Entry
from jflow.named import described
from jflow.types import Cond, Event, FlowMap, Key, Params, Velocity, as_velocity

# The keys of a run's config for the function that makes its Subject, and for the average of the parameters to use.
MAKE, AVERAGE = "make", "average"


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model with its base, conditioning and data, as returned by a ``make`` function.

    Attributes:
      model: a FlowMap or a Velocity.
      params: its parameters. With a checkpoint None, or a template if the parameters are not nested dictionaries.
      event: one sample, a pytree of arrays or of ``jax.ShapeDtypeStruct``.
      base: the law of x0.
      cond: ``(key, n) -> conditioning of n samples``, leaves ``[n, ...]``; None for no conditioning.
      data: ``(key, n) -> samples of the data``, at most n, in units of the data; None to compare with the reference's samples.
      features: as in ``compare``.
      scale: as in ``compare``.
      key: the PRNG key of the model's sampling noise, as in ``Entry``.
      reference: as in ``compare``.
      entries: further entries to compare.
    """

    model: FlowMap | Velocity
    params: Params
    event: Event
    _: dataclasses.KW_ONLY
    base: bases.Base = bases.STANDARD_NORMAL
    cond: Callable[[Key, int], Cond] | None = None
    data: Callable[[Key, int], Event] | None = None
    features: Features | None = None
    scale: float = 1.0
    key: Key | None = None
    reference: Entry | None = None
    entries: Sequence[Entry] = ()

    def __post_init__(self) -> None:
        as_velocity("model", self.model)
        checks.floating("event", self.event)
        bases.check(self.base)
        for name in ("cond", "data"):
            if (function := getattr(self, name)) is not None:
                checks.function(name, function, "(key, n) -> n samples")

    def noise(self, key: Key, n: int) -> Event:
        """Draws n base points, ``[n, ...]``."""
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.event)
        return self.base.sample(key, like, (n,))


def load(name: str, *arguments: Any) -> Subject:
    """Calls the function "module:function" with these arguments and returns its Subject.

    Raises:
      ValueError: if the name does not have this form, or the function cannot be imported.
      TypeError: if the function does not return a Subject.
    """
    if not isinstance(name, str) or name.count(":") != 1:
        raise ValueError(f"make: expected a function by name, as 'module:function', got {name!r}")
    try:
        function = pkgutil.resolve_name(name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"make: expected a function that can be imported, got {name!r}: {error}") from error
    checks.function(f"make {name}", function, "() -> comparison.Subject")
    subject = function(*arguments)
    if not isinstance(subject, Subject):
        raise TypeError(f"make {name}: expected a function that returns comparison.Subject, got {described(subject)}")
    return subject


def from_run(
    directory: str | os.PathLike[str],
    *,
    make: str | None = None,
    average: str | None = None,
    step: int | str | None = None,
) -> Subject:
    """The Subject of a run, with the parameters of a checkpoint.

    Args:
      directory: a run's directory, with the checkpoints of ``training.fit``.
      make: "module:function", a function that takes the run's config, a dictionary, and returns the Subject; by default the
        entry "make" of the config.
      average: "params", or the name of an average of the parameters; by default the entry "average" of the config, or
        "params" if there is none.
      step: the checkpoint, as in ``training.restore_params``.

    Raises:
      FileNotFoundError: if there is no such directory or checkpoint.
      ValueError: if neither ``make`` nor the config names a function, as ``load``, and as ``training.restore_params``.
      TypeError: as ``load`` and ``training.restore_params``.
    """
    params, config = training.restore_params(directory, step=step)
    name = config.get(MAKE) if make is None else make
    if name is None:
        raise ValueError(
            f"make: expected a function 'module:function', which the config in {directory} does not name in its entry "
            f"{MAKE!r}, got None"
        )
    subject = load(name, dict(config))
    which = average or config.get(AVERAGE) or "params"
    if which != "params" or subject.params is not None:
        params, _ = training.restore_params(directory, which, step=step, template=subject.params)
    return dataclasses.replace(subject, params=jax.tree.map(jnp.asarray, params))


def find(source: str, *, make: str | None = None, average: str | None = None) -> Subject:
    """The Subject of a run's directory, or of a function "module:function".

    Raises:
      ValueError: as ``from_run`` and ``load``, and if ``make`` or ``average`` is given together with a function.
      FileNotFoundError, TypeError: as ``from_run`` and ``load``.
    """
    if ":" not in source or pathlib.Path(source).is_dir():
        return from_run(source, make=make, average=average)
    if make is not None or average is not None:
        raise ValueError("make, average: expected None beside a function, because they apply to a run's directory")
    return load(source)
