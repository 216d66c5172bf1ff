r"""The speed of a run: steps per second, floating-point operations per step, and the utilisation of the devices.

The utilisation (model FLOPs utilisation, MFU) is

.. math::

    \frac{\text{FLOPs per step} \cdot \text{steps per second}}
         {\text{peak FLOPs per second of a device} \cdot \text{number of devices}}.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jflow import flops
from jflow.training.hooks import Hook, Row, Started
from jflow.training.state import TrainState
from jflow.types import Device, PyTree

# The vendors' peak FLOPs per second per jax device, by device_kind: dense (no sparsity) bfloat16 with float32 sums.
# A TPU v2, v3 or 7x chip is two devices, so the value is half the chip's. V100 and T4 have no bfloat16; theirs is float16.
PEAK = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12,
    "Tesla T4": 65e12,
}


def flops_per_step(chunk: Any, state: TrainState, data: PyTree) -> float | None:
    """The floating-point operations (FLOPs) of one optimizer step, for the whole batch on all devices.

    They are counted in the traced program (``jflow.flops``), and the bodies of loops are multiplied by their iterations. The
    number therefore does not depend on the device or the sharding, and nothing is compiled. (A compiled program counts one
    device only, and on some GPUs omits products that are library calls.) The count includes the whole step: loss, gradient,
    optimizer, averages and norms. It is that before optimisation: what is recomputed (``jax.checkpoint``) counts again.

    Args:
      chunk: the jitted function from ``make_chunk``; it is traced for one step.
      state: the state, or its shapes and dtypes (``jax.eval_shape``); not donated.
      data: as in ``chunk(state, data, steps)``, or its shapes and dtypes.

    Returns:
      The number, or None if the step has a while loop whose number of iterations is not known, such as an adaptive solve.

    Raises:
      TypeError: if the chunk is not a jitted function.
    """
    if not hasattr(chunk, "trace"):
        raise TypeError(f"chunk: expected a jitted function, as make_chunk returns, got {type(chunk).__name__}")
    try:
        return flops.count(chunk, state, data, 1)
    except flops.UnknownTripCountError:
        return None


class CountFlops(Hook):
    """A hook that adds ``flops_per_second`` and, on devices with a known peak, ``utilisation`` to training rows.

    To count the operations of a step (``flops_per_step``) the chunk is traced one more time.
    """

    def __init__(self) -> None:
        self._flops: float | None = None

    def start(self, started: Started) -> None:
        """Counts the operations of a step."""
        self._flops = flops_per_step(started.chunk, started.state, started.data)

    def complete(self, row: Row) -> None:
        """Adds the entries, if the number of operations is known."""
        if self._flops is None:
            return
        row["flops_per_second"] = self._flops * row["steps_per_second"]
        share = utilisation(self._flops, row["steps_per_second"])
        if share is not None:
            row["utilisation"] = share


def peak_flops(device: Device | None = None) -> float | None:
    """The peak FLOPs per second of a device in dense bfloat16 (``PEAK``), or None if unknown; by default the first device."""
    device = jax.devices()[0] if device is None else device
    return PEAK.get(device.device_kind)


def utilisation(
    flops: float | None,
    steps_per_second: float,
    devices: Sequence[Device] | None = None,
    peak: float | None = None,
) -> float | None:
    """The share of the devices' peak that a run uses (MFU).

    Args:
      flops: FLOPs per step, over all devices (``flops_per_step``).
      steps_per_second: the rate of the run (``steady_rate``).
      devices: the devices that the run uses, all of the same kind; by default all devices.
      peak: the peak FLOPs per second of one device; by default that of the first.

    Returns:
      flops * steps_per_second/(peak * len(devices)), or None if ``flops`` or the peak is unknown.

    Raises:
      ValueError: if ``devices`` is empty.
    """
    devices = jax.devices() if devices is None else devices
    if not len(devices):
        raise ValueError("devices: expected at least one, got none")
    peak = peak_flops(devices[0]) if peak is None else peak
    if flops is None or peak is None:
        return None
    return flops * steps_per_second / (peak * len(devices))


def steady_rate(rows: Sequence[Mapping[str, Any]]) -> float:
    """The steps per second of a run without compilation: the median over its training rows.

    The first row of every call of ``fit`` includes the compilation and is left out. Such a row is recognised because it took
    all the ``seconds`` since the call. The time of evaluations is in no row. The median is used because single rows are slower:
    those with a checkpoint, or with the last few steps, which are compiled separately, or while another program runs.

    Args:
      rows: the rows of ``metrics.jsonl`` (``metrics_log.read``), or those passed to hooks; other kinds of rows are skipped.

    Raises:
      ValueError: if no training row is left.
    """
    train = [row for row in rows if row["kind"] == "train"]
    rates = [
        row["steps_per_second"] for row in train if row["steps"] < 0.999 * row["seconds"] * row["steps_per_second"]
    ]
    if not rates:
        raise ValueError(f"rows: expected a second row of training from one call of fit, got {len(train)} first ones")
    return statistics.median(rates)
