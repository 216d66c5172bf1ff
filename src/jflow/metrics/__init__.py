r"""Distances between samples and a distribution, or between two sets of samples.

The distances::

    energy_distance       2 E|X-Y| - E|X-X'| - E|Y-Y'|
    mmd                   E k(X,X') + E k(Y,Y') - 2 E k(X,Y),  k a mixture of Gaussian kernels
    kernel_distance       the same with the cubic kernel of KID (1801.01401), over features
    frechet_distance      |m_x - m_y|² + tr(C_x + C_y - 2 (C_x C_y)^½), the FID (1706.08500), over features
    sliced_wasserstein    W_p of one-dimensional projections, averaged over directions
    histogram_kl          KL(ρ ‖ histogram) in the plane, the checkerboard's score (2505.18825)
    mass_off_support      share of the samples outside the support

These functions take batches: samples are ``[N, ...]``, flattened to ``[N, d]`` and cast to float32 or wider. The mean of the
first set is subtracted from both sets, in float64 if they are concrete, so that a large common offset costs no digits. All
functions also run under ``jax.jit``. The values of traced samples cannot be checked; samples that are not finite then give
NaN.
"""

from jflow.metrics.kernels import MEDIAN_MULTIPLES, energy_distance, kernel_distance, median_bandwidth, mmd
from jflow.metrics.plane import bin_centres, histogram_kl, histogram_kl_floor, mass_off_support
from jflow.metrics.samples import Estimate, as_points
from jflow.metrics.transport import frechet_distance, sliced_wasserstein

__all__ = [
    "MEDIAN_MULTIPLES",
    "Estimate",
    "as_points",
    "bin_centres",
    "energy_distance",
    "frechet_distance",
    "histogram_kl",
    "histogram_kl_floor",
    "kernel_distance",
    "mass_off_support",
    "median_bandwidth",
    "mmd",
    "sliced_wasserstein",
]
