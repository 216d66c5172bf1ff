r"""Distances between samples and a distribution, or between two sets of samples.

- ``energy_distance``: :math:`2\,\mathbb{E}|X-Y| - \mathbb{E}|X-X'| - \mathbb{E}|Y-Y'|`
- ``mmd``: :math:`\mathbb{E}\,k(X,X') + \mathbb{E}\,k(Y,Y') - 2\,\mathbb{E}\,k(X,Y)` with a mixture k of Gaussian kernels
- ``kernel_distance``: the same with the cubic kernel of KID (1801.01401), for features
- ``frechet_distance``: the Fréchet distance of fitted Gaussians, as in the FID (1706.08500), for features
- ``sliced_wasserstein``: the Wasserstein distance of one-dimensional projections, averaged over directions
- ``histogram_kl``: the KL divergence of a histogram in the plane, the checkerboard's score (2505.18825)
- ``mass_off_support``: the share of the samples outside the support

Scores of images: ``features`` of a ``FeatureNet``, then ``frechet_score``, ``kernel_score``, ``manifold_scores`` and
``label_accuracy``. They run on the host and return a ``Score``, which says how many samples, which network and which data it
comes from.

The distances take batches: samples are ``[N, ...]``, flattened to ``[N, d]`` and cast to float32 or wider. The functions of
two sets subtract the mean of the first set from both, in float64 if they are concrete, so that a large common offset does not
reduce the accuracy. They also run under ``jax.jit``. The values of traced samples cannot be checked; samples that
are not finite then give NaN.
"""

from jflow.metrics.classifier import RECIPE, Recipe, load_classifier, save_classifier, train_classifier
from jflow.metrics.feature_nets import FeatureNet, Outputs
from jflow.metrics.features import Features, Statistics, features, statistics
from jflow.metrics.kernels import MEDIAN_MULTIPLES, energy_distance, kernel_distance, median_bandwidth, mmd
from jflow.metrics.moments import GroupedMoments, Moments, merge_by_label, moments_by_label
from jflow.metrics.neighbours import ManifoldScores, Neighbours, manifold_scores, nearest
from jflow.metrics.plane import bin_centres, histogram_kl, histogram_kl_floor, mass_off_support
from jflow.metrics.samples import Estimate, as_points
from jflow.metrics.scores import Score, by_label, frechet_score, kernel_score, kernel_score_of_blocks, label_accuracy
from jflow.metrics.transport import frechet_distance, sliced_wasserstein

__all__ = [
    "MEDIAN_MULTIPLES",
    "RECIPE",
    "Estimate",
    "FeatureNet",
    "Features",
    "GroupedMoments",
    "ManifoldScores",
    "Moments",
    "Neighbours",
    "Outputs",
    "Recipe",
    "Score",
    "Statistics",
    "as_points",
    "bin_centres",
    "by_label",
    "energy_distance",
    "features",
    "frechet_distance",
    "frechet_score",
    "histogram_kl",
    "histogram_kl_floor",
    "kernel_distance",
    "kernel_score",
    "kernel_score_of_blocks",
    "label_accuracy",
    "load_classifier",
    "manifold_scores",
    "mass_off_support",
    "median_bandwidth",
    "merge_by_label",
    "mmd",
    "moments_by_label",
    "nearest",
    "save_classifier",
    "sliced_wasserstein",
    "statistics",
    "train_classifier",
]
