"""The numbers of a recipe: rates, schedules, optimisers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from audiozoo.errors import UsageError

SCHEDULES = ("constant", "linear", "tri_stage", "cosine", "exponential", "inverse_sqrt", "stairs")
OPTIMIZERS = ("adamw", "adam", "adafactor", "dadapt_adamw")


@dataclass(frozen=True)
class Settings:
    r"""How a paper trained.

    Attributes:
        source: where the numbers are from.
        steps: updates.
        batch_size: recordings an update.
        learning_rate: the highest.
        schedule: "constant"; "linear" (to 0), "tri_stage" (up, level, down by a factor of 20), "cosine" (to 0),
            "exponential" (by `decay` every `decay_steps`), "inverse_sqrt", "stairs" (`exponential`, in steps).
        warmup: share of the steps over which the rate rises, or, above 1, how many steps.
        hold: share of the steps at the highest rate (tri_stage).
        decay: see `schedule`.
        decay_steps: see `schedule`.
        decay_start: steps, warm-up included, from which on `decay_steps` are counted.
        optimizer: "adamw", "adam", "adafactor", or "dadapt_adamw", which finds its rate by itself: D-Adaptation (arXiv
            2301.07733), whose learning rate is a factor.
        beta1: of Adam.
        beta2: of Adam.
        epsilon: of Adam.
        weight_decay: of AdamW; of Adam an L2 penalty, which is part of the gradient, as in PyTorch.
        decays: what weight decay is for: "matrices" (no biases, scales and single vectors), or "all", as in fairseq and
            PyTorch where nothing else is said, and always in D-Adaptation.
        clip: largest norm of the gradient.
        frozen: a regular expression of the parameters that are never trained.
        held: one of those that are not trained in the first `held_steps`.
        held_steps: share of the steps, or, above 1, how many.
        seconds: recordings are cut to this length, or left out if they have a text.
        average: decay of the moving average of the parameters.
    """

    source: str
    steps: int
    batch_size: int
    learning_rate: float
    schedule: str = "constant"
    warmup: float = 0.0
    hold: float = 0.4
    decay: float = 1.0
    decay_steps: int = 1
    decay_start: int = 0
    optimizer: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    decays: str = "matrices"
    clip: float | None = None
    frozen: str | None = None
    held: str | None = None
    held_steps: float = 0.0
    seconds: float = 15.0
    average: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UsageError(f"{name} is a whole number of at least 1, not {getattr(self, name)}.")
        if self.seconds <= 0:
            raise UsageError(f"Recordings are cut to a length above 0 s, not {self.seconds}.")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"There is no schedule {self.schedule!r}; there are {', '.join(SCHEDULES)}.")
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"There is no optimiser {self.optimizer!r}; there are {', '.join(OPTIMIZERS)}.")
        if self.decays not in ("matrices", "all"):
            raise UsageError(f"Weight decay is for matrices or for all, not for {self.decays!r}.")
        if self.weight_decay and self.optimizer == "adafactor":
            raise UsageError("adafactor has no weight decay: take adamw, or a weight_decay of 0.")

    def _counted(self, steps: float) -> int:
        """How many steps a share of them is, or, above 1, a number of them."""
        return round(steps if steps > 1 else steps * self.steps)

    def rate(self) -> optax.Schedule:
        """The learning rate of every step."""
        peak, steps = self.learning_rate, self.steps
        warmup = min(self._counted(self.warmup), max(steps - 1, 0))
        left = max(steps - warmup, 1)
        if self.schedule == "inverse_sqrt":
            # Vaswani et al. (arXiv 1706.03762, Eq. 3), scaled to its peak
            return lambda step: peak * jnp.minimum((step + 1) / max(warmup, 1), jnp.sqrt(max(warmup, 1) / (step + 1)))
        after: optax.Schedule
        if self.schedule == "linear":
            after = optax.linear_schedule(peak, 0.0, left)
        elif self.schedule == "cosine":
            after = optax.cosine_decay_schedule(peak, left)
        elif self.schedule == "tri_stage":
            hold = round(self.hold * steps)
            down = max(left - hold, 1)
            fall = optax.exponential_decay(peak, down, 0.05, end_value=0.05 * peak)
            after = optax.join_schedules([optax.constant_schedule(peak), fall], [hold])
        elif self.schedule in ("exponential", "stairs"):
            level, stairs = max(self.decay_start - warmup, 0), self.schedule == "stairs"
            after = optax.exponential_decay(peak, self.decay_steps, self.decay, level, staircase=stairs)
        else:
            after = optax.constant_schedule(peak)
        if not warmup:
            return after
        begin = 0.01 * peak if self.schedule == "tri_stage" else 0.0
        if self.optimizer == "dadapt_adamw":
            begin = peak / warmup  # D-Adaptation divides by it
        return optax.join_schedules([optax.linear_schedule(begin, peak, warmup), after], [warmup])

    def transformation(self) -> optax.GradientTransformation:
        """Clipping, what is held, and the optimiser with its schedule."""
        held = self._counted(self.held_steps)
        holding = [hold(self.held, held)] if self.held and held else []
        chain: list[optax.GradientTransformation] = [*holding]
        if self.clip is not None:
            chain.append(optax.clip_by_global_norm(self.clip))
        if self.optimizer == "adafactor":
            chain.append(optax.adafactor(self.rate()))
        elif self.optimizer == "dadapt_adamw":
            betas = (self.beta1, self.beta2)
            chain.append(optax.contrib.dadapt_adamw(self.rate(), betas, self.epsilon, weight_decay=self.weight_decay))
        else:
            decay, mask = self.weight_decay, decayed if self.decays == "matrices" else None
            if self.optimizer == "adam" and decay:
                chain.append(optax.add_decayed_weights(decay, mask))
                decay = 0.0
            chain.append(optax.adamw(self.rate(), self.beta1, self.beta2, self.epsilon, weight_decay=decay, mask=mask))
        return optax.chain(*chain, *holding)  # which weight decay does not move either


def decayed(params: dict[str, Any]) -> dict[str, bool]:
    """Which parameters are matrices: no biases, scales and single vectors, be they of a stack of blocks or not."""
    return {
        name: value.ndim > 1 + (".stacked." in name) and not name.endswith("kernel_g") for name, value in params.items()
    }


def hold(pattern: str, steps: int) -> optax.GradientTransformation:
    """No gradient, or no update, for the parameters that a regular expression finds, in the first steps."""

    def init(params: Any) -> jax.Array:
        return jnp.zeros((), jnp.int32)

    def update(updates: dict[str, Any], count: jax.Array, params: Any = None) -> tuple[dict[str, Any], jax.Array]:
        kept = {
            name: jnp.where(count < steps, jnp.zeros_like(value), value) if re.search(pattern, name) else value
            for name, value in updates.items()
        }
        return kept, count + 1

    return optax.GradientTransformation(init, update)
