"""Benchmarks: one module per question, run from the repository's root with ``python -m benchmarks.NAME --help``."""
