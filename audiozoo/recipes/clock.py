"""How long a small model is trained: until a time is over, or for a number of steps."""

from __future__ import annotations

import math
import time

from audiozoo.errors import UsageError


class Clock:
    """Tells the share of the training that is over, and when a point of its curve is due: at first, and at last too.

    Attributes:
        step: steps that are done.
        elapsed: seconds since the start.
        share: of the training that is done, from 0 to 1.

    Args:
        seconds: of training.
        steps: instead of `seconds`.
        every: seconds between points of the curve (steps, where these are given).

    Raises:
        UsageError: unless one of `seconds` and `steps` is given.
    """

    def __init__(self, seconds: float | None, steps: int | None, every: float):
        if (seconds is None) == (steps is None):
            raise UsageError("Training ends after some seconds, or after some steps: give one of the two.")
        self._seconds, self._steps, self._every = seconds, steps, every
        self._last = -math.inf
        self.step, self.elapsed, self.share = 0, 0.0, 0.0
        self.start()

    def start(self) -> None:
        """Count seconds from now on."""
        self._begun = time.monotonic()

    def tick(self) -> bool:
        """Count a step, and say whether a point of the curve is due."""
        self.step += 1
        self.elapsed = time.monotonic() - self._begun
        if self._steps is not None:
            now, self.share = float(self.step), min(self.step / self._steps, 1.0)
        else:
            now, self.share = self.elapsed, min(self.elapsed / self._seconds, 1.0) if self._seconds else 1.0
        due = now - self._last >= self._every or self.share >= 1
        if due:
            self._last = now
        return due

    def stop(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begun
