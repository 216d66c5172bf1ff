r"""Exact distributions: density, score, velocity and flow map of Gaussians and Gaussian mixtures, at every time.

Data is sum_k w_k N(m_k, C_k), the base N(m_0, S^2) with S = diag(s) (by default N(0, I)), drawn independently. In units of
the base, S^-1 C_k S^-1 = Q_k diag(lambda_k) Q_k'. Then I_t has the law sum_k w_k N(m_k(t), S Q_k diag(sigma_k^2) Q_k' S) with
m_k(t) = alpha m_0 + beta m_k and sigma_k^2 = alpha^2 + beta^2 lambda_k, and with z_k = Q_k' S^-1 (x - m_k(t)) and the
responsibilities r_k(t, x)::

    score     - sum_k r_k S^-1 Q_k (z_k / sigma_k^2)
    denoiser    sum_k r_k ( m_k + S Q_k (beta lambda_k / sigma_k^2) z_k )
    velocity    sum_k r_k ( alpha' m_0 + beta' m_k + S Q_k ((alpha alpha' + beta beta' lambda_k) / sigma_k^2) z_k )

all finite at both ends, where a path is not declared singular. Three makers differ in their flow map: ``gaussian`` (closed
form), ``mixture`` (a Diffrax solve at a stated tolerance) and ``quantile`` (one dimension, by matching quantiles). None of
them uses the identities of a flow, so that tests can check these.
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
