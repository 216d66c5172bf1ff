"""Calls that a type checker must accept, and calls that it must refuse; ``make types`` reads this file, and nothing runs it.

A refused call carries the rule that refuses it. An ignore that is not needed is an error, so a typo that the annotations no
longer see fails the check.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=error

from __future__ import annotations

from collections.abc import Callable

import diffrax
import equinox as eqx
import flax.linen as nn
import jax
import numpy as np
import optax
from flax import nnx

import jflow
from jflow import (
    bases,
    comparison,
    couplings,
    interpolants,
    likelihood,
    metrics,
    nets,
    objectives,
    oracles,
    parameterizations,
    reductions,
    samplers,
    sharding,
    solvers,
    times,
    training,
)
from jflow.types import Batch, Cond, Event, FlowMap, Key, ObjectiveFn, Params, Time, Velocity


def velocity(params: Params, t: Time, x: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
    return x


def renamed(theta: Params, time: Time, points: Event, cond: Cond = None, *, key: Key | None = None) -> Event:
    return points


def objective_choices(flow_map: FlowMap, path: interpolants.Interpolant, key: Key, x: jax.Array) -> ObjectiveFn:
    lsd = objectives.lsd(flow_map, path, diagonal=0.5, reduction=reductions.adaptive(), base=bases.Normal(0.0, 2.0))
    objectives.lsd(flow_map, path, pairs=times.ByStep(lambda step: times.triangle()), coupling=couplings.independent)
    objectives.lsd(flow_map, path, teacher=renamed)
    objectives.flow_matching(velocity, path, times=times.ByStep(lambda step: times.uniform()))
    energy = objectives.energy_distance(flow_map, path, size=4, pairs=times.triangle())
    for batch in (Batch(x), x, np.ones((4, 2)), {"x1": x}):
        lsd({}, key, batch)
        energy({}, key, batch)

    objectives.lsd(flow_map, path, diagnal=0.5)  # pyright: ignore[reportCallIssue]
    objectives.lsd(flow_map, path, diagonal="half")  # pyright: ignore[reportArgumentType]
    objectives.mean_flow(flow_map, path, warm_up=None)  # pyright: ignore[reportCallIssue]
    objectives.energy_distance(flow_map, path, size=4, pair=times.triangle())  # pyright: ignore[reportCallIssue]
    objectives.lsd(flow_map, path, pairs=times.uniform())  # pyright: ignore[reportArgumentType]
    objectives.lsd(flow_map, path, times=times.triangle())  # pyright: ignore[reportArgumentType]
    objectives.lsd(flow_map, path, pairs=times.ByStep(lambda step: times.uniform()))  # pyright: ignore[reportArgumentType]
    lsd({}, key, [x])  # pyright: ignore[reportArgumentType]
    return objectives.weighted_sum(objectives.sequence([(0, lsd)]), energy=(energy, 0.1))


def likelihood_choices(flow_map: FlowMap, path: interpolants.Interpolant) -> ObjectiveFn:
    head = likelihood.head_objective(flow_map, path, teacher=velocity, diagonal=0.3, times=times.uniform())
    likelihood.head_objective(flow_map, path, velocity=None)  # pyright: ignore[reportCallIssue]
    likelihood.maximum_likelihood(velocity, rtoll=1e-3)  # pyright: ignore[reportCallIssue]
    return objectives.weighted_sum(head, likelihood=(likelihood.maximum_likelihood(velocity, rtol=1e-3), 1.0))


def solver_choices(flow_map: FlowMap) -> FlowMap:
    solvers.solve(velocity, rtoll=1e-3)  # pyright: ignore[reportCallIssue]
    solvers.solve(velocity, "tsit5", rtol="small")  # pyright: ignore[reportArgumentType]
    solvers.solve(flow_map.velocity, options=solvers.Options("rk4", steps=8))
    return solvers.solve(renamed, diffrax.Tsit5(), rtol=1e-3, adjoint=diffrax.DirectAdjoint())


def samples(flow_map: FlowMap, path: interpolants.Interpolant, key: Key, x: jax.Array) -> metrics.Estimate:
    bound = flow_map.bind({})
    jumps, renoise, sde = samplers.Jumps(bound), samplers.Renoise(bound, path, 0.5), samplers.SDE(bound, path)
    samplers.run(jumps, None, x, [0.0, 1.0])
    samplers.run(renoise, key, x, samplers.uniform_grid(4))
    samplers.run_path(sde, key, x, np.linspace(0.0, 1.0, 9))
    samplers.run(renoise, None, x, [0.0, 1.0])  # pyright: ignore[reportArgumentType]
    samplers.run(flow_map, key, x, [0.0, 1.0])  # pyright: ignore[reportArgumentType]
    oracles.gaussian_params([0.0, 1.0], np.eye(2))
    drawn = samplers.draw(samplers.SAMPLERS["sde"](bound, path), key, 100, [0.0, 1.0], like=x)
    return metrics.energy_distance(drawn, np.ones((4, 2)))


def networks(
    module: nn.Module, function: Callable[..., jax.Array], path: interpolants.Interpolant
) -> tuple[FlowMap, FlowMap]:
    network: nets.Network = nets.from_linen(module)
    b: Velocity = nets.from_function(function, signature="x t")
    both: Velocity = nets.from_linen(module)  # pyright: ignore[reportAssignmentType]
    del both
    return jflow.flow_map(network, parameterizations.data_form(path)), solvers.solve(b)


def compared(flow_map: FlowMap, path: interpolants.Interpolant, params: Params, x: jax.Array) -> comparison.Comparison:
    entries = [
        comparison.Entry("map", flow_map, params, steps=(1, 2)),
        comparison.Entry("euler", velocity, params, solver="euler", steps=(8,)),
        comparison.Entry("sde", flow_map, params, sampler=lambda bound: samplers.SDE(bound, path), steps=(8,)),
        *comparison.solved(renamed, params, solvers=("heun", "tsit5"), tolerances=(1e-3,)),
    ]
    comparison.compare(entries[0], x, reference=entries[1], distances=["energy"])
    comparison.Entry("map", "flow_map", params)  # pyright: ignore[reportArgumentType]
    comparison.Entry("map", flow_map, params, steps=4)  # pyright: ignore[reportArgumentType]
    comparison.solved(flow_map, params, tolerance=1e-3)  # pyright: ignore[reportCallIssue]
    comparison.compare([flow_map], x)  # pyright: ignore[reportArgumentType]
    table = comparison.compare(entries, x, data=np.ones((4, 2)), batch=4)
    table.row(0)  # pyright: ignore[reportArgumentType]
    rmse: str = table.rows[0].rmse  # pyright: ignore[reportAssignmentType]
    del rmse
    return table


def returned(module: nn.Module, nnx_module: nnx.Linear, eqx_module: eqx.nn.MLP, params: Params) -> eqx.nn.MLP:
    linear: nnx.Linear = nets.to_nnx(nnx_module, params)
    nets.to_nnx(module, params)  # pyright: ignore[reportArgumentType]
    del linear
    return nets.to_equinox(eqx_module, params)


def trained(objective: ObjectiveFn, params: Params, key: Key, directory: str) -> training.TrainState:
    for optimizer in (optax.adam(1e-3), optax.MultiSteps(optax.adam(1e-3), 4), optax.lbfgs()):
        training.make_step(objective, optimizer, ema=(0.999,))
    training.init_state(params, 1e-3, key)  # pyright: ignore[reportArgumentType]
    training.init_state(params, optax.adam, key)  # pyright: ignore[reportArgumentType]
    state = training.init_state(params, optax.adam(1e-3), key, objective=objective)
    with training.Checkpoints(directory, resume=True) as checkpoints:
        checkpoints.save(state, position={"batch": 3}, score=0.1)
        checkpoints.save({"params": params})  # pyright: ignore[reportArgumentType]
        state, _ = checkpoints.restore_latest(sharding.place(state, sharding.whole(sharding.mesh())))
    return state
