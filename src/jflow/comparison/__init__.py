r"""Comparison: measures errors, sample distances, cost and time of models, against an accurate solve or the truth.

For example::

    table = comparison.compare(
        [
            comparison.Entry("map", flow_map, params, steps=(1, 2, 4, 8)),
            *comparison.solved(flow_map, params, solvers=("euler", "heun", "tsit5")),
        ],
        x0,
    )
    print(table.markdown())
    table.plot()

A row of the table is one way from noise to data: K jumps of a FlowMap, a Diffrax solve of a Velocity or of a FlowMap's
diagonal, or a stochastic sampler. All rows start from the same x0. There is a command line for a model made by a function, or
for the newest checkpoint of a run::

    python -m jflow.comparison my_module:make --steps 1 2 4 8 --solvers euler heun tsit5
    python -m jflow.comparison runs/digits --out runs/digits/comparison

``make()`` returns a ``Subject``.
"""

from jflow.comparison.distances import DISTANCES, Distance
from jflow.comparison.entries import Entry, solved
from jflow.comparison.measure import compare
from jflow.comparison.subjects import Subject, from_run, load
from jflow.comparison.table import Comparison, Row

__all__ = [
    "DISTANCES",
    "Comparison",
    "Distance",
    "Entry",
    "Row",
    "Subject",
    "compare",
    "from_run",
    "load",
    "solved",
]
