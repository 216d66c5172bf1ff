"""Experiments: one module each, run from the repository's root with ``python -m experiments.NAME --help``."""
