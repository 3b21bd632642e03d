"""How well a model does what it is for: recordings in, numbers and predictions out.

    model, processor = audiozoo.load(source), audiozoo.load_processor(source)
    result = evaluate(model, processor, find_items("corpus/"))
    result.metrics["wer"], result.predictions[0]

The recordings come in the forms that training reads (`audiozoo.training.data.find_items`). Each task in `tasks.TASKS`
says which models it is for, what it needs to know of a recording, and what it counts. A recording that cannot be heard
is left out, counted and named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from audiozoo.audio import files as audio
from audiozoo.errors import AudioError, AudiozooError, UsageError
from audiozoo.evaluation.tasks import TASKS, Heard, Task
from audiozoo.training.data import Item

__all__ = ["TASKS", "Evaluation", "evaluate", "task_for"]


@dataclass(frozen=True)
class Evaluation:
    """What came of it.

    Attributes:
        task: its name.
        metrics: by name; error rates and accuracies from 0 to 1, BLEU and chrF from 0 to 100.
        predictions: for each recording, or pair of them, what was wanted and what came.
        count: recordings that were heard.
        unreadable: why the others were not, by name.
    """

    task: str
    metrics: dict[str, float]
    predictions: list[dict[str, Any]]
    count: int
    unreadable: dict[str, str] = field(default_factory=dict)


def task_for(model: Any, items: Sequence[Item], name: str | None = None) -> type[Task]:
    """The task by its name, or the first one that the model does and the recordings tell enough for.

    Raises:
        UsageError: there is none, or the model does not do it.
    """
    kind = type(model).__name__
    fitting = [task for task in TASKS.values() if task.fits(model)]
    if name is not None:
        if name not in TASKS:
            raise UsageError(f"There is no task {name!r}; there are {', '.join(TASKS)}.")
        if TASKS[name] not in fitting:
            can = ", ".join(task.name for task in fitting) or "no task that is measured here"
            raise UsageError(f"A {kind} does no {name}; it does {can}.")
        return TASKS[name]
    if not fitting:
        raise UsageError(f"A {kind} does nothing that is measured here; there are {', '.join(TASKS)}.")
    for task in fitting:
        if not task.known_by or any(key in item.fields for item in items for key in task.known_by):
            return task
    wanted = "; ".join(f"{task.name} by {' or '.join(task.known_by)}" for task in fitting)
    raise UsageError(f"Nothing is known of the recordings that a {kind} could be measured by: {wanted}.")


def evaluate(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    task: str | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Callable[[float, float], None] | None = None,
    **options: Any,
) -> Evaluation:
    """Measure a model.

    Args:
        model: what `audiozoo.load` gives.
        processor: its processor.
        items: recordings and what is known of them.
        task: its name; by default what the model does and the recordings allow.
        limit: hear only the first so many recordings.
        batch_size: recordings at a time.
        progress: called with the recordings done and the recordings in all.
        options: of the task: the fields of its class in `tasks`.

    Raises:
        UsageError: the model does no such task, a recording lacks what it is measured by, or an option does not exist.
        AudioError: not one recording can be heard.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UsageError("At least one recording is to be heard, and one at a time.")
    items = items[:limit]
    cls = task_for(model, items, task)
    known = {f.name for f in dataclasses.fields(cls)} - {"model", "processor", "batch_size"}
    if unknown := sorted(set(options) - known):
        raise UsageError(f"{unknown[0]!r} is no option of {cls.name}; there are {', '.join(sorted(known))}.")
    doing = cls(model, processor, batch_size=batch_size, **options)
    wanted = [doing.reference(item) for item in items]  # what is missing is said before anything is computed
    doing.prepare(items, wanted)
    rows: list[dict[str, Any]] = []
    unreadable: dict[str, str] = {}
    for first in range(0, len(items), batch_size):
        batch: list[Heard] = []
        for item, reference in zip(items[first : first + batch_size], wanted[first : first + batch_size], strict=True):
            try:
                waveform = audio.read(item.source(), doing.sampling_rate, mono=doing.mono) if doing.hears else None
            except (AudiozooError, OSError) as error:
                unreadable[item.name] = str(error)
            else:
                batch.append(Heard(item.name, waveform, reference))
        rows += _predicted(doing, batch, unreadable)
        if progress is not None:
            progress(min(first + batch_size, len(items)), len(items))
    if not rows:
        name, reason = next(iter(unreadable.items()))
        raise AudioError(f"Of {len(items)} recordings none can be heard; the first, {name}: {reason}")
    metrics = doing.score(rows)
    return Evaluation(cls.name, metrics, doing.predictions(rows), len(rows), unreadable)


def _predicted(task: Task, batch: Sequence[Heard], unreadable: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each recording; where one of a batch cannot be used, each is tried alone."""
    if not batch:
        return []
    try:
        rows = task.predict(batch)
    except AudioError as error:
        if len(batch) > 1:
            return [row for heard in batch for row in _predicted(task, [heard], unreadable)]
        unreadable[batch[0].name] = str(error)
        return []
    return [{"audio": heard.name} | row for heard, row in zip(batch, rows, strict=True)]
