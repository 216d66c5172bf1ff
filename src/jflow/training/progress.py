"""Shows the progress of training: a bar in terminals and notebooks, one line per row elsewhere."""

from __future__ import annotations

from typing import Any

import jax

from jflow.training.hooks import Hook, Row, Started


class Progress(Hook):
    """A hook that shows the steps taken, the loss, the rate, the time left and warnings.

    In a terminal or a notebook it shows a progress bar of rich; elsewhere it prints one line per row. With several processes
    only the first shows anything.
    """

    def __init__(self) -> None:
        self._total = 0
        self._bar: Any = None
        self._task: Any = None

    def start(self, started: Started) -> None:
        """Shows an empty bar."""
        self._total = started.total_steps
        if jax.process_index() != 0:
            return
        from rich.console import Console

        console = Console()
        if console.is_terminal or console.is_jupyter:
            self._bar = _bar(console)
            self._bar.start()
            self._task = self._bar.add_task(
                "training", total=self._total, completed=started.step, rate=0.0, loss=float("nan"), left=""
            )

    def row(self, row: Row) -> None:
        """Shows a training row."""
        if row["kind"] != "train" or jax.process_index() != 0:
            return
        step, rate, loss, warning = row["step"], row["steps_per_second"], float(row["loss"]), row.get("warning")
        left = _left(self._total, step, rate)
        if self._bar is None:
            if warning is not None:
                print(f"warning: {warning}", flush=True)
            width = len(str(self._total))
            print(f"step {step:{width}d}/{self._total}  loss {loss:.5g}  {rate:.4g} steps/s  {left}", flush=True)
            return
        if warning is not None:
            # Above the bar; without markup, because rich would interpret brackets.
            self._bar.console.print(f"warning: {warning}", markup=False, highlight=False)
        self._bar.update(self._task, completed=step, rate=rate, loss=loss, left=left)
        self._bar.refresh()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _left(total: int, step: int, rate: float) -> str:
    seconds = round((total - step) / rate) if rate > 0 else 0
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d} left"


def _bar(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    # Disable the automatic refresh, whose thread would compete with the thread that feeds the device.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.5g}  {task.fields[rate]:.4g} steps/s  {task.fields[left]}"),
        console=console,
        auto_refresh=False,
    )
