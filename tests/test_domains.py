"""The domains of flow maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import domains


@pytest.mark.parametrize(
    ("domain", "inside", "outside"),
    [
        (domains.FORWARD, [(0.0, 1.0), (0.3, 0.3)], [(0.5, 0.2), (-0.1, 0.5), (0.0, 1.2)]),
        (domains.BOTH, [(0.0, 1.0), (0.9, 0.1)], [(0.0, 1.1)]),
        (domains.TO_DATA, [(0.0, 1.0), (0.4, 0.4)], [(0.0, 0.5), (1.0, 0.0)]),
        (domains.FROM_NOISE, [(0.0, 1.0), (0.0, 0.3), (0.4, 0.4)], [(0.2, 0.7), (0.5, 0.0), (0.0, 1.2)]),
        (domains.Domain("encoder", backward=True, source=1.0), [(1.0, 0.0), (1.0, 0.4)], [(0.0, 1.0), (0.9, 0.1)]),
        (domains.dyadic(3), [(0.0, 1.0), (0.25, 0.5), (0.125, 0.25)], [(0.0, 0.375), (0.1, 0.6), (0.0, 0.0625)]),
    ],
)
def test_domains(domain, inside, outside):
    for s, t in inside:
        assert domain.contains(s, t)
        domain.check_grid([s, t])
    for s, t in outside:
        assert not domain.contains(s, t)
        with pytest.raises(ValueError, match="outside the map's domain"):
            domain.check_grid(jnp.array([s, t]))


@pytest.mark.parametrize("domain", [domains.FORWARD, domains.TO_DATA, domains.FROM_NOISE, domains.dyadic(2)], ids=repr)
def test_rounding_is_no_step_out_of_a_domain(domain):
    """What arithmetic leaves of equal times, and of the ends, is inside; what is further is not."""
    one = np.float32(1.0) + np.finfo(np.float32).eps
    for s, t in ((0.0, one), (one, 1.0), (-1e-9, 1.0), (0.75 + 1e-9, 0.75), (0.0, 1.0 - 1e-8)):
        assert domain.contains(s, t), (s, t)
        assert domain.contains_all(np.array([s]), np.array([t])).all()
    for s, t in ((0.0, 1.0 + 1e-4), (-1e-4, 1.0), (0.75 + 1e-4, 0.75), (1.0001, 1.0001)):
        assert not domain.contains(s, t), (s, t)


def test_a_map_from_noise_jumps_once():
    """A grid of two jumps leaves s = 0 at its middle time; the message says so."""
    domains.FROM_NOISE.check_grid([0.0, 1.0])
    with pytest.raises(ValueError, match=r"from 0\.5 to 1 is outside the map's domain, s = 0 only"):
        domains.FROM_NOISE.check_grid([0.0, 0.5, 1.0])


def test_grids():
    with pytest.raises(ValueError, match="at least two times"):
        domains.FORWARD.check_grid([0.0])
    with pytest.raises(ValueError, match="levels"):
        domains.dyadic(0)

    @jax.jit
    def traced(grid):
        domains.FORWARD.check_grid(grid)  # a traced grid cannot be looked at
        return grid

    traced(jnp.array([1.0, 0.0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: domains.Domain(True), "^name: expected a string"),
        (lambda: domains.dyadic(2.5), "^levels: expected a whole number"),
        (lambda: domains.dyadic(24), "^levels: expected a whole number"),
    ],
)
def test_what_a_domain_is_made_of_is_checked(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
