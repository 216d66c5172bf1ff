"""What a person sees while a run goes on: a bar in a terminal, a line per log interval elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

# (step, steps per second, loss, warning=None): the warning, where there is one, gets a line of its own.
Report = Callable[..., None]


@contextlib.contextmanager
def progress(total: int, start: int, shown: bool = True) -> Iterator[Report]:
    """Yields ``report(step, steps_per_second, loss, warning=None)``, to be called once per log interval.

    Of several processes only the first shows anything.

    Args:
      total: the step at which the run ends.
      start: the step at which it begins.
      shown: False to show nothing.
    """
    if not shown or jax.process_index() != 0:
        yield lambda step, rate, loss, warning=None: None
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        yield lambda step, rate, loss, warning=None: _line(total, step, rate, loss, warning)
        return
    with _bar(console) as bar:
        task = bar.add_task("training", total=total, completed=start, rate=0.0, loss=float("nan"), left="")

        def report(step: int, rate: float, loss: float, warning: str | None = None) -> None:
            if warning is not None:
                # Above the bar; as it is, for rich would read a bracket as markup.
                bar.console.print(f"warning: {warning}", markup=False, highlight=False)
            bar.update(task, completed=step, rate=rate, loss=loss, left=_left(total, step, rate))
            bar.refresh()

        yield report


def _line(total: int, step: int, rate: float, loss: float, warning: str | None) -> None:
    if warning is not None:
        print(f"warning: {warning}", flush=True)
    width = len(str(total))
    print(f"step {step:{width}d}/{total}  loss {loss:.5g}  {rate:.4g} steps/s  {_left(total, step, rate)}", flush=True)


def _left(total: int, step: int, rate: float) -> str:
    seconds = round((total - step) / rate) if rate > 0 else 0
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d} left"


def _bar(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    # No refresh of its own: a thread that redraws would take turns with the one that feeds the device.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.5g}  {task.fields[rate]:.4g} steps/s  {task.fields[left]}"),
        console=console,
        auto_refresh=False,
    )
