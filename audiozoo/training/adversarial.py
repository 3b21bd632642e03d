"""Adversarial training: a generator and its judge, each with a compiled step of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def adamw(learning_rate: float | Callable[[Any], Any] = 2e-4, epsilon: float = 1e-9) -> Any:
    r"""HiFi-GAN's and VITS' optimiser: AdamW with $\beta$ = (0.8, 0.99) and a weight decay of 0.01.

    Both papers let the rate of 2e-4 fall by a constant factor in every epoch: 0.999 and $0.999^{1/8}$.
    """
    import optax

    return optax.adamw(learning_rate, b1=0.8, b2=0.99, eps=epsilon, weight_decay=0.01)


@jax.tree_util.register_dataclass
@dataclass
class AdversarialState:
    """Everything that training changes: both networks' parameters and statistics, and both optimisers' states."""

    generator: Any
    generator_statistics: Any
    discriminator: Any
    discriminator_statistics: Any
    generator_optimizer: Any
    discriminator_optimizer: Any


class AdversarialTrainer:
    """Alternating training of two networks, one compiled step for each.

        from audiozoo.models import vits
        trainer = AdversarialTrainer(
            model, vits.VitsDiscriminator(rngs=nnx.Rngs(1)), vits.generator_losses, vits.discriminator_losses
        )
        state = trainer.init()
        for i, batch in enumerate(batches):
            state, losses = trainer.step(state, batch, jax.random.key(i))
        model = trainer.generator(state)

    Args:
        generator: the network that is wanted.
        discriminator: its judge.
        generator_losses: `(generator, discriminator, batch, key=key)` to the losses by name, `total` among them; an
            output with the generated `waveform`; and the real one.
        discriminator_losses: `(discriminator, real, generated)` to the judge's loss.
        generator_optimizer: `adamw()` by default.
        discriminator_optimizer: `adamw()` by default.
        before_judging: called with the judge before each of its steps, to change its statistics in place: the power
            iteration of spectral normalisation.
    """

    def __init__(
        self,
        generator: nnx.Module,
        discriminator: nnx.Module,
        generator_losses: Callable[..., tuple[Any, Any, jax.Array]],
        discriminator_losses: Callable[[Any, jax.Array, jax.Array], jax.Array],
        *,
        generator_optimizer: Any = None,
        discriminator_optimizer: Any = None,
        before_judging: Callable[[Any], None] | None = None,
    ):
        self.generator_optimizer = generator_optimizer or adamw()
        self.discriminator_optimizer = discriminator_optimizer or adamw()
        self._generator_losses, self._discriminator_losses = generator_losses, discriminator_losses
        self._before_judging = before_judging
        self._generator, *self._initial_generator = nnx.split(generator, nnx.Param, ...)
        self._discriminator, *self._initial_discriminator = nnx.split(discriminator, nnx.Param, ...)
        self.generator_step = jax.jit(self._generator_step)
        self.discriminator_step = jax.jit(self._discriminator_step)

    def init(self) -> AdversarialState:
        """The state before the first step."""
        (g, g_rest), (d, d_rest) = self._initial_generator, self._initial_discriminator
        optimizers = self.generator_optimizer.init(g), self.discriminator_optimizer.init(d)
        return AdversarialState(g, g_rest, d, d_rest, *optimizers)

    def generator(self, state: AdversarialState) -> Any:
        """The generator, as far as it is trained."""
        return nnx.merge(self._generator, state.generator, state.generator_statistics)

    def discriminator(self, state: AdversarialState) -> Any:
        """The judge, as far as it is trained."""
        return nnx.merge(self._discriminator, state.discriminator, state.discriminator_statistics)

    def _generator_step(
        self, state: AdversarialState, batch: Any, key: jax.Array
    ) -> tuple[AdversarialState, Any, jax.Array, jax.Array]:
        discriminator = self.discriminator(state)

        def loss_of(parameters: Any) -> tuple[jax.Array, tuple[Any, jax.Array, jax.Array]]:
            generator = nnx.merge(self._generator, parameters, state.generator_statistics)
            losses, output, real = self._generator_losses(generator, discriminator, batch, key=key)
            return losses["total"], (losses, real, output["waveform"])

        (_, (losses, real, generated)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.generator)
        updates, optimizer = self.generator_optimizer.update(gradients, state.generator_optimizer, state.generator)
        parameters = jax.tree.map(jnp.add, state.generator, updates)
        state = dataclasses.replace(state, generator=parameters, generator_optimizer=optimizer)
        return state, losses, real, generated

    def _discriminator_step(
        self, state: AdversarialState, real: jax.Array, generated: jax.Array
    ) -> tuple[AdversarialState, jax.Array]:
        statistics = state.discriminator_statistics
        if self._before_judging is not None:
            judge = self.discriminator(state)
            self._before_judging(judge)
            _, _, *changed = nnx.split(judge, nnx.Param, ...)
            statistics = changed[0]

        def loss_of(parameters: Any) -> jax.Array:
            return self._discriminator_losses(nnx.merge(self._discriminator, parameters, statistics), real, generated)

        loss, gradients = jax.value_and_grad(loss_of)(state.discriminator)
        updates, optimizer = self.discriminator_optimizer.update(
            gradients, state.discriminator_optimizer, state.discriminator
        )
        parameters = jax.tree.map(jnp.add, state.discriminator, updates)
        changes = {"discriminator": parameters, "discriminator_statistics": statistics}
        return dataclasses.replace(state, **changes, discriminator_optimizer=optimizer), loss

    def step(
        self, state: AdversarialState, batch: Any, key: jax.Array
    ) -> tuple[AdversarialState, dict[str, jax.Array]]:
        """A step of the generator, then one of the discriminator on the same segments; returns all losses by name."""
        state, losses, real, generated = self.generator_step(state, batch, key)
        state, judged = self.discriminator_step(state, real, generated)
        return state, {name: losses[name] for name in losses.keys()} | {"discriminator": judged}  # noqa: SIM118
