"""The data of an experiment, its network as a flow map, and its objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared.options import MapTraining, Network
from jflow import interpolants, nets, objectives, parameterizations, reductions, times
from jflow.types import FORWARD, Domain, FlowMap, Key


class Problem(NamedTuple):
    """The data that an experiment learns.

    Attributes:
      dataset: a dataset of ``jflow.datasets``: ``batch(data, step)`` and ``data``; in the model's units.
      event: the shape of one sample.
      scale: data units per model unit.
      reference: ``(key, n) -> [n, *event]``, samples to compare with, in data units; may return fewer.
      labels: ``(key, n) -> [n]`` class labels to sample with, or None.
      classes: their number, or 0.
      features: ``[N, *event] -> [N, f]``: where distances between samples are measured, on data units.
    """

    dataset: Any
    event: tuple[int, ...]
    scale: float
    reference: Callable[[Key, int], np.ndarray]
    labels: Callable[[Key, int], jax.Array] | None = None
    classes: int = 0
    features: Callable[[jax.Array], jax.Array] = lambda x: x.reshape(x.shape[0], -1)


class Model(NamedTuple):
    """A network as a flow map, with the path it was made for.

    Attributes:
      flow_map: params are the network's.
      init: ``key -> params``.
      interpolant: the path.
    """

    flow_map: FlowMap
    init: Callable[[Key], Any]
    interpolant: interpolants.Interpolant


def build(network: Network, problem: Problem, domain: Domain = FORWARD) -> Model:
    """The network of a configuration as a FlowMap."""
    fields = {"features": network.features, "depth": network.depth, "num_classes": problem.classes}
    if network.octaves:
        fields |= {"points": "octaves", "point_frequencies": network.octaves, "point_damping": 0.3}
    module = (
        nets.MLP.plain(**fields)
        if network.network == "plain"
        else nets.MLP(residual=network.residual, decoupled=network.decoupled, **fields)
    )
    interpolant = interpolants.INTERPOLANTS[network.path]()
    form = parameterizations.PARAMETERIZATIONS[network.parameterization](interpolant)

    def init(key: Key) -> Any:
        return module.init(key, jnp.float32(0.0), jnp.float32(1.0), jnp.zeros(problem.event, jnp.float32))["params"]

    return Model(parameterizations.flow_map(nets.from_linen(module), form, domain), jax.jit(init), interpolant)


def objective_of(config: MapTraining, model: Model) -> Callable[..., Any]:
    """The objective of a configuration, with its start on the diagonal alone."""
    choices = config.method
    pairs = times.triangle(stratified=choices.stratified)
    if choices.full_jumps:
        from_noise = times.independent(times.constant(0.0), times.uniform(stratified=choices.stratified))
        pairs = times.mixed([pairs, from_noise], [1.0 - choices.full_jumps, choices.full_jumps])
    single = times.uniform(stratified=choices.stratified)
    estimate = objectives.velocity_estimates.ESTIMATES[choices.velocity]
    method = objectives.METHODS[choices.objective].constructor(
        model.flow_map,
        model.interpolant,
        diagonal=choices.diagonal,
        times=single,
        pairs=pairs,
        velocity=estimate,
        reduction=reductions.REDUCTIONS[choices.reduction](),
    )
    first = round(choices.diagonal_start * config.optimizer.steps)
    if first == 0:
        return method
    alone = objectives.flow_matching(model.flow_map, model.interpolant, times=single, velocity=estimate)
    return objectives.sequence([(0, alone), (first, method)])
