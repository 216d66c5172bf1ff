"""Datasets: arrays in memory, synthetic distributions, and files.

``arrays`` and ``examples`` need no iterator: a batch is a pure, traced function of a seed and the step. ``files`` reads data
that do not fit in memory, through Grain, for ``jflow.training.Feed``. ``idx`` reads MNIST's files. ``transforms`` converts and
augments batches in the training step.
"""

from jflow.datasets.arrays import ArrayDataset, CoupledDataset, SampledDataset, coupled
from jflow.datasets.examples import CHECKERBOARD_STD, Split, checkerboard, checkerboard_log_density, digits
from jflow.datasets.files import array_folder, npz, pipeline
from jflow.datasets.grouped import GroupedDataset, grouped
from jflow.datasets.idx import fashion_mnist, mnist_folder, read_idx, write_idx
from jflow.datasets.image_files import images
from jflow.datasets.transforms import (
    PIXELS,
    Affine,
    TransformedDataset,
    crop,
    each_row,
    flip,
    shift,
    transformed,
    transformed_batch,
)

__all__ = [
    "CHECKERBOARD_STD",
    "PIXELS",
    "Affine",
    "ArrayDataset",
    "CoupledDataset",
    "GroupedDataset",
    "SampledDataset",
    "Split",
    "TransformedDataset",
    "array_folder",
    "checkerboard",
    "checkerboard_log_density",
    "coupled",
    "crop",
    "digits",
    "each_row",
    "fashion_mnist",
    "flip",
    "grouped",
    "images",
    "mnist_folder",
    "npz",
    "pipeline",
    "read_idx",
    "shift",
    "transformed",
    "transformed_batch",
    "write_idx",
]
