r"""Exact distributions: density, score, velocity and flow map of Gaussians and Gaussian mixtures, at every time.

The data is a mixture of Gaussians with weights w_k, and the base, drawn independently, is a Gaussian (by default N(0, I)).
The eigenvectors Q_k and eigenvalues of the covariances are taken in units of the base:

.. math::
    x_1 &\sim \sum_k w_k N(m_k, C_k), \qquad S^{-1} C_k S^{-1} = Q_k\, \mathrm{diag}(\lambda_k)\, Q_k^\top \\
    x_0 &\sim N(m_0, S^2), \qquad S = \mathrm{diag}(\mathrm{std}).

I_t is then a mixture as well:

.. math::
    I_t &\sim \sum_k w_k N\big( m_k(t),\, S Q_k\, \mathrm{diag}(\sigma_k^2)\, Q_k^\top S \big) \\
    m_k(t) &= \alpha_t m_0 + \beta_t m_k, \qquad \sigma_k^2 = \alpha_t^2 + \beta_t^2 \lambda_k.

With :math:`z_k = Q_k^\top S^{-1} (x - m_k(t))` and the responsibilities :math:`r_k(t, x)`, the score, the denoiser and the
velocity are

.. math::
    \nabla \log \rho_t(x) &= -\sum_k r_k\, S^{-1} Q_k \frac{z_k}{\sigma_k^2} \\
    \mathbb{E}[x_1 \mid I_t = x] &= \sum_k r_k \Big( m_k + S Q_k \frac{\beta_t \lambda_k}{\sigma_k^2} z_k \Big) \\
    b_t(x) &= \sum_k r_k \Big( \dot\alpha_t m_0 + \dot\beta_t m_k
    + S Q_k \frac{\alpha_t \dot\alpha_t + \beta_t \dot\beta_t \lambda_k}{\sigma_k^2} z_k \Big).

All are finite at both ends, except where a path is singular. The functions that make an oracle differ in the flow map:
``gaussian`` (closed form), ``mixture`` (a Diffrax solve at a given tolerance) and ``quantile`` (one dimension, by matching
quantiles). They do not use the identities of a flow map, so tests can check the identities with them.
"""

from jflow.oracles.exact import ORACLES, Oracle, gaussian, mixture, quantile
from jflow.oracles.mixtures import MixtureParams, gaussian_params, mixture_params, posterior, tilt

__all__ = [
    "ORACLES",
    "MixtureParams",
    "Oracle",
    "gaussian",
    "gaussian_params",
    "mixture",
    "mixture_params",
    "posterior",
    "quantile",
    "tilt",
]
