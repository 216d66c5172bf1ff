"""What the experiments and the benchmarks share: options, models, training, timing, sweeps, and the files of results."""
