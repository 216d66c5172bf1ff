"""Data: arrays in memory and synthetic distributions, whose batches are traced, and files, whose batches are read.

``arrays`` and ``examples`` need no iterator: a batch is a pure function of a seed and the step. What does not fit in
memory comes from ``files``, through Grain, to ``jflow.training.Feed``.
"""

from jflow.datasets.arrays import ArrayDataset, CoupledDataset, SampledDataset, coupled
from jflow.datasets.examples import CHECKERBOARD_STD, Split, checkerboard, checkerboard_log_density, digits
from jflow.datasets.files import array_folder, npz, pipeline
from jflow.datasets.grouped import GroupedDataset, grouped
from jflow.datasets.image_files import images

__all__ = [
    "CHECKERBOARD_STD",
    "ArrayDataset",
    "CoupledDataset",
    "GroupedDataset",
    "SampledDataset",
    "Split",
    "array_folder",
    "checkerboard",
    "checkerboard_log_density",
    "coupled",
    "digits",
    "grouped",
    "images",
    "npz",
    "pipeline",
]
