"""The catalogue: the rows that the methods' modules declare beside their constructors."""

from __future__ import annotations

from jflow.objectives import consistency, eulerian, lagrangian, regression, semigroup
from jflow.objectives.method import Method

METHODS: dict[str, Method] = {
    name: method
    for module in (regression, lagrangian, eulerian, semigroup, consistency)
    for name, method in module.METHODS.items()
}
