"""Training: the state, the step, averages, checkpoints and the loop."""

from jflow.training import distributed, ema, ema_posthoc, image_grids, prefetch, throughput
from jflow.training.checkpoints import Checkpoints, restore_params
from jflow.training.distributed import PreemptedError
from jflow.training.loop import fit
from jflow.training.metrics_log import MetricsLog
from jflow.training.prefetch import Feed
from jflow.training.recorder import NonFiniteError
from jflow.training.state import TrainState, init_state
from jflow.training.step import make_chunk, make_step
from jflow.training.tensorboard import TensorBoard

__all__ = [
    "Checkpoints",
    "Feed",
    "MetricsLog",
    "NonFiniteError",
    "PreemptedError",
    "TensorBoard",
    "TrainState",
    "distributed",
    "ema",
    "ema_posthoc",
    "fit",
    "image_grids",
    "init_state",
    "make_chunk",
    "make_step",
    "prefetch",
    "restore_params",
    "throughput",
]
