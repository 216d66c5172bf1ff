"""Likelihood: log-densities along an ODE solve, through jumps and by a learned head; maximum likelihood; importance weights."""

from jflow.likelihood.batch_mixture import BatchMixture, Renoised, renoised
from jflow.likelihood.divergence import Divergence, WithLogDensity, augment, exact_divergence, hutch_pp, hutchinson
from jflow.likelihood.head import (
    Headed,
    HeadObjective,
    head_objective,
    scalar_head,
    shared_network,
    with_head,
    without_head,
)
from jflow.likelihood.images import bits_per_dim, dequantise, quantise
from jflow.likelihood.importance import Weights, effective_sample_size, expectation, normalised
from jflow.likelihood.jump_density import log_density, push, refine
from jflow.likelihood.max_likelihood import MaximumLikelihood, maximum_likelihood
from jflow.likelihood.ode_density import LogDensity, ODEDensity, along_ode

__all__ = [
    "BatchMixture",
    "Divergence",
    "HeadObjective",
    "Headed",
    "LogDensity",
    "MaximumLikelihood",
    "ODEDensity",
    "Renoised",
    "Weights",
    "WithLogDensity",
    "along_ode",
    "augment",
    "bits_per_dim",
    "dequantise",
    "effective_sample_size",
    "exact_divergence",
    "expectation",
    "head_objective",
    "hutch_pp",
    "hutchinson",
    "log_density",
    "maximum_likelihood",
    "normalised",
    "push",
    "quantise",
    "refine",
    "renoised",
    "scalar_head",
    "shared_network",
    "with_head",
    "without_head",
]
