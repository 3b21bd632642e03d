"""Where a run's numbers go: a line a report in the terminal, `metrics.jsonl`, and TensorBoard's event files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from audiozoo.errors import CheckpointError, UsageError


class Reporter:
    """Writes reports; `with Reporter(...) as report: trainer.fit(…, report=report)`.

    Args:
        directory: for `metrics.jsonl`, and `tensorboard/`.
        steps: of the whole run, for the progress bar.
        start: the step that is gone on from: what an earlier process reported after it is taken back.
        tensorboard: write event files too (the package tensorboardX).
        console: where to show; standard error by default, None for nowhere.

    Raises:
        CheckpointError: the directory cannot be written to.
        UsageError: tensorboardX is not installed.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        steps: int,
        start: int = 0,
        tensorboard: bool = False,
        console: Console | None = None,
    ):
        directory = Path(directory)
        self.console = console
        path = directory / "metrics.jsonl"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            kept = [line for line in lines if _step(line) <= start]
            temporary = path.with_name(".metrics.jsonl.tmp")
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            temporary.replace(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error.strerror}.") from None
        self._events: Any = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise UsageError('TensorBoard\'s files need tensorboardX: pip install "audiozoo[train]".') from None
            self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}", markup=False),
            console=console,
            transient=True,
            disable=console is None or not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, completed=start, loss="")

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report a step."""
        numbers = {name: float(value) for name, value in metrics.items()}
        plain = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        try:
            self._file.write(json.dumps({"step": step, **plain}) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(f"{self._file.name} cannot be written: {error.strerror}.") from None
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        if self.console is not None:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            self.console.print(f"step {step:>7}  {shown}", highlight=False, markup=False, soft_wrap=True)
        loss = next((f"{name} {value:.4g}" for name, value in numbers.items() if name.endswith("loss")), "")
        self._progress.update(self._task, completed=step, loss=loss)

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()
        if self._events is not None:
            self._events.close()


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line, from a process that was killed
