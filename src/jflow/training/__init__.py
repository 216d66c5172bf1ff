"""Training: the state, the step, averages, checkpoints and the loop."""

from jflow.training import distributed, ema, ema_posthoc, image_grids, prefetch, throughput
from jflow.training.checkpoints import Checkpoints, restore_params
from jflow.training.distributed import PreemptedError, Watchdog
from jflow.training.hooks import Hook, Profile
from jflow.training.loop import Evaluation, fit
from jflow.training.metrics_log import MetricsLog
from jflow.training.optimizers import forced_weight_normalisation
from jflow.training.prefetch import Feed
from jflow.training.progress import Progress
from jflow.training.recorder import NonFiniteError
from jflow.training.run_directory import RunDirectory
from jflow.training.state import TrainState, init_state
from jflow.training.step import make_chunk, make_step
from jflow.training.tensorboard import TensorBoard
from jflow.training.throughput import CountFlops
from jflow.training.train import train
from jflow.training.weights_and_biases import Wandb

__all__ = [
    "Checkpoints",
    "CountFlops",
    "Evaluation",
    "Feed",
    "Hook",
    "MetricsLog",
    "NonFiniteError",
    "PreemptedError",
    "Profile",
    "Progress",
    "RunDirectory",
    "TensorBoard",
    "TrainState",
    "Wandb",
    "Watchdog",
    "distributed",
    "ema",
    "ema_posthoc",
    "fit",
    "forced_weight_normalisation",
    "image_grids",
    "init_state",
    "make_chunk",
    "make_step",
    "prefetch",
    "restore_params",
    "throughput",
    "train",
]
