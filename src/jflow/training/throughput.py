"""How fast a run is: steps per second, the arithmetic of a step, and the share of the devices' peak that is used.

utilisation (MFU) = FLOPs per step * steps per second/(peak FLOPs per second of a device * devices)
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jflow.training.hooks import Hook, Row, Started
from jflow.training.state import TrainState
from jflow.types import Device, PyTree

# Vendors' figures in FLOPs per second: dense (no sparsity) bfloat16 with float32 sums, per jax device, by its device_kind.
# A TPU v2, v3 or 7x chip is two devices, so its figure is half the chip's; V100 and T4 have no bfloat16: float16.
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
    """The FLOPs of one optimizer step, the whole batch, over all devices together.

    Counted by XLA in the program as it was written, before it is optimised and divided among devices: so the number does
    not depend on the device or the sharding, and nothing is compiled. (After compilation XLA counts what one device does,
    and on some GPUs nothing for products that are calls to a library.) It holds the whole step: optimizer, averages and
    norms as well as the loss and its gradient. The body of a loop counts once, so that of a loop within the step, such as
    a scan over layers or a solve, is counted too little.

    Args:
      chunk: from ``make_chunk``, jitted; traced for one step.
      state: the state, or its shapes and dtypes (``jax.eval_shape``); not donated.
      data: as in ``chunk(state, data, steps)``, or its shapes and dtypes.

    Returns:
      The number, or None where the backend does not count.

    Raises:
      TypeError: when the chunk is no jitted function.
    """
    if not hasattr(chunk, "lower"):
        raise TypeError(f"chunk: expected a jitted function, as make_chunk returns, got {type(chunk).__name__}")
    try:
        cost = chunk.lower(state, data, 1).cost_analysis()
    except NotImplementedError:
        return None
    flops = (cost or {}).get("flops", 0.0)
    return float(flops) if flops > 0 else None


class CountFlops(Hook):
    """Adds ``flops_per_second`` to rows of training and, on devices whose peak is known, ``utilisation``.

    XLA counts the floating-point operations of a step (``flops_per_step``), for which the chunk is traced once more.
    """

    def __init__(self) -> None:
        self._flops: float | None = None

    def start(self, started: Started) -> None:
        """Counts the operations of a step."""
        self._flops = flops_per_step(started.chunk, started.state, started.data)

    def complete(self, row: Row) -> None:
        """Adds the entries, if the backend counts."""
        if self._flops is None:
            return
        row["flops_per_second"] = self._flops * row["steps_per_second"]
        share = utilisation(self._flops, row["steps_per_second"])
        if share is not None:
            row["utilisation"] = share


def peak_flops(device: Device | None = None) -> float | None:
    """The peak of a device, by default the first, in FLOPs per second, dense bfloat16 (``PEAK``); None if unknown."""
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
      flops: per step, over all devices (``flops_per_step``).
      steps_per_second: of the run (``steady_rate``).
      devices: those that the run uses, of one kind; by default all.
      peak: FLOPs per second of one device; by default that of the first.

    Returns:
      flops * steps_per_second/(peak * len(devices)), or None where ``flops`` or the peak is unknown.

    Raises:
      ValueError: for no devices.
    """
    devices = jax.devices() if devices is None else devices
    if not len(devices):
        raise ValueError("devices: expected at least one, got none")
    peak = peak_flops(devices[0]) if peak is None else peak
    if flops is None or peak is None:
        return None
    return flops * steps_per_second / (peak * len(devices))


def steady_rate(rows: Sequence[Mapping[str, Any]]) -> float:
    """Steps per second once a run has settled: the median over its rows of training.

    The first row of every call of ``fit``, which took all the ``seconds`` since the call, holds the compilation and is left
    out. Evaluations are in no row's time. A checkpoint, the few steps at the end, which are compiled by themselves, or
    another program on the machine slow single rows: hence the median rather than the mean.

    Args:
      rows: those of ``metrics.jsonl`` (``metrics_log.read``), or as hooks get them; other kinds may be among them.

    Raises:
      ValueError: when no row of training is left.
    """
    train = [row for row in rows if row["kind"] == "train"]
    rates = [
        row["steps_per_second"] for row in train if row["steps"] < 0.999 * row["seconds"] * row["steps_per_second"]
    ]
    if not rates:
        raise ValueError(f"rows: expected a second row of training from one call of fit, got {len(train)} first ones")
    return statistics.median(rates)
