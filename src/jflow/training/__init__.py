"""Training: the state, the step, averages, checkpoints and the loop."""

from jflow.training import ema
from jflow.training.checkpoints import Checkpoints, restore_params
from jflow.training.loop import NonFiniteError, fit
from jflow.training.metrics_log import MetricsLog
from jflow.training.state import Extras, TrainState, init_state
from jflow.training.step import make_chunk, make_step

__all__ = [
    "Checkpoints",
    "Extras",
    "MetricsLog",
    "NonFiniteError",
    "TrainState",
    "ema",
    "fit",
    "init_state",
    "make_chunk",
    "make_step",
    "restore_params",
]
