"""Entries: what cannot be run is refused by the name of the field, and a sampler counts its steps."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jflow import comparison, samplers, solvers
from jflow.comparison import Entry
from jflow.types import dyadic
from tests.comparison.cases import ORACLE, PARAMS, noise


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": 3}, "name: expected a string"),
        ({"model": ORACLE.flow_map.bind(PARAMS)}, "model: expected a Velocity or a FlowMap, got a BoundFlowMap"),
        ({"model": ORACLE.velocity}, "solver: expected a solver or a sampler for a Velocity"),
        ({"solver": "magic"}, "solver: expected one of"),
        ({"solver": "euler", "tolerances": (0.1,)}, "steps"),
        ({"solver": "tsit5", "tolerances": (0.0,)}, "tolerances: expected a number"),
        ({"tolerances": (0.1,)}, "tolerances: expected none without a solver"),
        ({"solver": solvers.Options("tsit5"), "steps": (1,)}, "steps: expected None beside Options"),
        ({"steps": (0,)}, "steps: expected a whole number"),
        ({"steps": ()}, "steps, tolerances: expected at least one"),
        ({"sampler": samplers.Jumps, "solver": "euler"}, "solver, sampler: expected at most one"),
        ({"sampler": samplers.Jumps.step}, "key: expected a PRNG key for a sampler"),
        ({"key": 3}, "key: expected a PRNG key"),
    ],
)
def test_an_entry_refuses_what_cannot_run(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Entry(**{"name": "exact", "model": ORACLE.flow_map, "params": PARAMS, **fields})


def test_jumps_outside_the_domain_are_refused():
    one_step = solvers.solve(ORACLE.velocity, "euler", steps=1, domain=dyadic(2))
    with pytest.raises(
        ValueError, match=r"steps: expected numbers of equal jumps within the map's domain, got 3; grid"
    ):
        Entry("shortcut", one_step, PARAMS, steps=(1, 2, 3))


def test_a_sampler_is_counted_by_its_steps():
    def make(bound):
        return samplers.SDE(bound, ORACLE.interpolant, method="heun")

    entry = Entry("sde", ORACLE.velocity, PARAMS, sampler=make, steps=(3,), key=jax.random.key(4))
    (row,) = comparison.compare(entry, noise(4), reference=noise(4), distances=(), repeats=1).rows
    assert (row.kind, row.nfe, row.speedup) == ("sampler", 6, None) and np.isfinite(row.rmse)
