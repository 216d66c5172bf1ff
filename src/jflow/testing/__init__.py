"""Checks that hold a method, a network, a path or an oracle of one's own to what jflow's are held to.

Each check raises AssertionError if a property does not hold; the message has the figure, its limit and what it means. The
checks need float64 (``jax.config.update("jax_enable_x64", True)``) and no test framework: call them in a test of your own.

The checks::

    check_method        stationarity as declared, reports, and cost: calls the next three
    check_stationary    the expected gradient at the exact map is zero, or of the declared order
    check_report        loss and metrics near the exact map
    check_cost          FLOPs of the gradient against the sum of the declared parts
    check_network       derivatives, dtypes, finiteness at s = t and at both ends, vmap
    check_interpolant   ends, derivatives, divided differences, conversions of a path
    check_flow_map      an exact map against the flow's identities and a fine solve
    check_oracle        the same of an oracle's map, and its density, score, denoiser and velocity

Example:
  A method is a function that makes an ``Objective``, with its row above it. This check takes some ten seconds; without
  ``paths`` it covers two paths.

  >>> import jax
  >>> from jflow import identities, interpolants, objectives, testing
  >>> @objectives.method(
  ...     title="Thirds", source="-", identity="semigroup", velocity="self", when="as an example",
  ...     stop_gradient="both legs", cost={"forward": 3, "backward": 1},
  ... )
  ... def thirds(flow_map, interpolant, **choices):
  ...     def residual(row):
  ...         return identities.semigroup(row.own.v, row.s, row.t, row.x, 1.0 / 3.0)
  ...     term = objectives.Term("semigroup", residual)
  ...     return objectives.Objective("thirds", flow_map, interpolant, term, **choices)
  >>> with jax.enable_x64(True):
  ...     testing.check_method(objectives.METHODS.pop("thirds"), paths=[interpolants.linear()])
"""

from jflow.testing.maps import check_flow_map, check_oracle
from jflow.testing.methods import check_cost, check_method, check_report, check_stationary
from jflow.testing.networks import check_network
from jflow.testing.paths import check_interpolant

__all__ = [
    "check_cost",
    "check_flow_map",
    "check_interpolant",
    "check_method",
    "check_network",
    "check_oracle",
    "check_report",
    "check_stationary",
]
