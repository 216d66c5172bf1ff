"""Likelihood: log-densities along the solve, through jumps, and by a learned head; maximum likelihood; weights."""

from jflow.likelihood.divergence import Divergence, State, augment, exact, hutch_pp, hutchinson

__all__ = ["Divergence", "State", "augment", "exact", "hutch_pp", "hutchinson"]
