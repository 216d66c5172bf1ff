"""The model of any experiment's checkpoint, rebuilt from the config that the run keeps."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.shared import model, options
from jflow import comparison

# Entries of a checkpoint's config that are no options of an experiment.
NO_OPTIONS = ("experiment", "make", "average")


def make(config: Mapping[str, Any]) -> comparison.Subject:
    """The Subject of a run: its model without parameters, its labels, its data and the features of its samples.

    Args:
      config: what the checkpoint keeps (``options.Training.kept``).

    Raises:
      ValueError: for a config of no experiment of this version, and for an experiment of many models.
    """
    values = {name: value for name, value in config.items() if name not in NO_OPTIONS}
    try:
        module = importlib.import_module(f"experiments.{config.get('experiment')}")
        choices = options.make(module.Config, out=pathlib.Path("unused"), **values)
        problem = module.problem(choices)
        built = (
            module.model_of(choices, problem) if hasattr(module, "model_of") else model.build(choices.model, problem)
        )
    except (ImportError, TypeError, AttributeError) as error:
        raise ValueError(f"config: expected that of an experiment of this version with one model: {error}") from error
    return comparison.Subject(
        built.flow_map,
        None,
        jax.ShapeDtypeStruct(problem.event, jnp.float32),
        cond=problem.labels,
        data=lambda key, n: jnp.asarray(problem.reference(key, n)),
        features=problem.features,
        scale=problem.scale,
    )
