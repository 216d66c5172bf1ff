"""Checks for user-defined methods, networks, paths and oracles; jflow's own tests use them too.

Each check raises AssertionError if a property does not hold; the message has the value, its limit and its meaning. The checks
need float64 (``jax.config.update("jax_enable_x64", True)``) but no test framework; call them from any test.

The checks are::

    check_method        calls the next three checks
    check_stationary    the expected gradient at the exact map is zero, or of the declared order
    check_report        loss and metrics near the exact map
    check_cost          FLOPs of the gradient against the sum of the declared parts
    check_network       derivatives, dtypes, finite values at s = t and at both ends, vmap
    check_interpolant   ends, derivatives, divided differences and conversions of a path
    check_flow_map      an exact map against the flow's identities and an accurate solve
    check_oracle        check_flow_map for an oracle's map, and its density, score, denoiser and velocity

Example:
  A method is a function that makes an ``Objective``, with a decorator that declares its row in the catalogue. This check takes
  some ten seconds; without ``paths`` it covers two paths.

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
