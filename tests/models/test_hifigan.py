"""HiFi-GAN without PyTorch: loading both kinds of files, padding, the processor's mistakes, a few steps of training."""

from __future__ import annotations

import dataclasses
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import audiozoo
from audiozoo.errors import AudioError, CheckpointError, SourceError, UsageError
from audiozoo.layers.weight_norm import fold_weight_norm
from audiozoo.models import hifigan
from audiozoo.models.hifigan import HifiGanConfig, HifiGanGenerator, SpeechT5HifiGan
from audiozoo.processors.hifigan import HifiGanProcessor
from audiozoo.recipes.objectives import Vocoder
from audiozoo.recipes.settings import Settings
from audiozoo.training.loop import Trainer
from audiozoo.training.parameters import Trainable
from tests.models.random_model import random_model
from tests.shapes import enforce

SMALL = HifiGanConfig(
    model_in_dim=20,
    sampling_rate=8000,
    upsample_initial_channel=16,
    upsample_rates=(8, 4),
    upsample_kernel_sizes=(16, 8),
    resblock="2",
    resblock_kernel_sizes=(3, 5),
    resblock_dilation_sizes=((1, 2), (2, 6)),
)


def small_generator() -> HifiGanGenerator:
    return random_model(lambda rngs: HifiGanGenerator(SMALL, rngs=rngs))


def test_each_item_as_by_itself_and_silent_after_its_end():
    model = small_generator()
    x = jax.random.normal(jax.random.key(0), (2, 12, 20))
    run = jax.jit(lambda m, x, n: m(x, lengths=n))
    both = run(model, x, jnp.asarray([12, 7]))
    alone = jax.jit(lambda m, x: m(x))(fold_weight_norm(model), x[1:, :7])
    np.testing.assert_allclose(both[1, : 7 * 32], alone[0], atol=1e-6)
    assert not np.any(both[1, 7 * 32 :])


def test_a_directory_of_hugging_face_goes_there_and_back(tmp_path):
    blocks = {"resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1,),)}
    config = HifiGanConfig.speecht5(model_in_dim=6, upsample_initial_channel=16, **blocks)
    model = random_model(lambda rngs: SpeechT5HifiGan(config, rngs=rngs))
    audiozoo.export(model, tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["architectures"] == ["SpeechT5HifiGan"]
    again = audiozoo.load(tmp_path / "theirs")
    assert isinstance(again, SpeechT5HifiGan)
    assert again.config == config
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    run = jax.jit(lambda m: m(x))
    assert run(model).shape == (5 * 256,)
    np.testing.assert_array_equal(run(again), run(model))
    processor = audiozoo.load_processor(tmp_path / "theirs")
    assert processor.centered
    assert processor.hop_size == 256
    with pytest.raises(CheckpointError, match="no HiFi-GAN but SpeechT5's"):
        audiozoo.export(small_generator(), tmp_path / "out")


def test_shapes_are_what_the_annotations_say(monkeypatch):
    assert enforce(monkeypatch, hifigan)
    x = jnp.zeros((2, 12, 20))
    assert jax.eval_shape(lambda m: m(x, lengths=jnp.asarray([12, 7])), small_generator()).shape == (2, 384)
    judge = random_model(
        lambda rngs: hifigan.HifiGanDiscriminator(
            periods=(3,), period_channels=(4,), scale_layers=((4, 5, 1, 1),), rngs=rngs
        )
    )
    scores, features = jax.eval_shape(lambda d: d(jnp.zeros((2, 200))), judge)
    assert [s.shape for s in scores] == [(2, 201), (2, 200), (2, 101), (2, 51)]
    assert features[1][0].shape == (2, 200, 4)
    with pytest.raises(Exception, match="spectrogram"):
        jax.eval_shape(lambda m: m(x[0]), small_generator())


def test_features_of_a_batch_and_mistakes(tmp_path):
    processor = HifiGanProcessor(sampling_rate=8000, num_mels=20, n_fft=128, hop_size=32, fmax=None)
    waveforms = [np.random.default_rng(0).standard_normal(n).astype(np.float32) * 0.1 for n in (640, 400)]
    inputs = processor(waveforms, sampling_rate=8000)
    assert inputs["spectrogram"].shape == (2, 20, 20)
    assert inputs["lengths"].tolist() == [20, 12]
    assert not np.any(inputs["spectrogram"][1, 12:])
    # The loss computes the same.
    own = hifigan.log_mel(jnp.asarray(waveforms[0])[None], 8000, n_fft=128, hop_length=32, num_mels=20)
    np.testing.assert_allclose(inputs["spectrogram"][0], own[0], atol=1e-3)
    for waveform, sentence in (([], "empty"), (np.full(10, 0.1), "too short"), (np.zeros((2, 640)) * np.nan, "NaN")):
        with pytest.raises(AudioError, match=sentence):
            processor(waveform, sampling_rate=8000)
    with pytest.raises(AudioError, match="16000 Hz"):
        processor(waveforms[0], sampling_rate=16_000)
    with pytest.raises(SourceError, match=r"no config\.json"):
        HifiGanProcessor.from_directory(tmp_path)
    with pytest.raises(CheckpointError, match="0 apart"):
        HifiGanProcessor(hop_size=0)
    with pytest.raises(UsageError, match="as many"):
        HifiGanConfig(upsample_rates=(2,))
    with pytest.raises(UsageError, match="as far to either side"):
        HifiGanConfig(upsample_rates=(8, 8, 2, 1))
    with pytest.raises(UsageError, match="resblock_dilation_sizes 3; they must be as many"):
        HifiGanConfig(resblock_kernel_sizes=(3,))
    with pytest.raises(UsageError, match="'3'"):
        HifiGanConfig(resblock="3")


def test_what_the_generators_loss_is_made_of(monkeypatch):
    """Three parts, weighted as in the paper; spectrograms of the sizes asked for, or frames as the generator has."""
    asked, x = [], jnp.asarray([[0.5, 2.0]])
    monkeypatch.setattr(hifigan, "log_mel", lambda wave, rate, **sizes: asked.append((rate, *sizes.values())) or wave)
    model = mock.Mock(config=SMALL, side_effect=lambda spectrogram: 2 * spectrogram)
    batch = hifigan.HifiGanBatch(x, x)
    losses, output, real = hifigan.generator_losses(model, lambda x: ([x], [(x,)]), batch, n_fft=64, num_mels=7)
    hifigan.generator_losses(model, lambda x: ([x], [(x,)]), batch, hop_length=16)
    assert asked == [(8000, 64, 32, 7)] * 2 + [(8000, 1024, 16, 80)] * 2
    assert (float(losses.adversarial), float(losses.features), float(losses.mel)) == (4.5, 2 * 1.25, 45 * 1.25)
    assert float(losses.total) == 4.5 + 47 * 1.25
    np.testing.assert_array_equal(output.waveform, 2 * x)
    np.testing.assert_array_equal(real, x)


@pytest.mark.slow
def test_a_few_steps_of_all_networks_lower_the_mel_loss():
    """Power iterations included; what is not a parameter is not changed by the optimisers."""
    time = np.arange(64 * 32) / 8000
    waveform = jnp.asarray(np.stack([0.5 * np.sin(2 * np.pi * f * time) for f in (440, 900)]), jnp.float32)
    judge = {"periods": (3,), "period_channels": (4,), "scale_layers": ((4, 15, 1, 1),)}
    config = dataclasses.replace(SMALL, resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 2),))
    model = random_model(lambda rngs: HifiGanGenerator(config, rngs=rngs))
    settings = Settings("a test", 40, 2, 2e-3, beta1=0.8, beta2=0.99)
    processor = HifiGanProcessor.with_hop(8000, 20, 32)
    trainer = Trainer(Vocoder(judge=judge).task(model, processor, settings, Trainable()))
    state, history = trainer.init(), []
    for _ in range(40):
        state, losses = trainer.step(state, {"waveform": waveform})
        assert all(np.isfinite(value) for value in losses.values()), losses
        history.append(float(losses["generator/mel"]))
    assert np.mean(history[-5:]) < 0.7 * np.mean(history[:5]), history
    layer = trainer.network(state, "judge").msd.discriminators[0].convs[0]
    for vector in (layer.u, layer.v):
        assert np.linalg.norm(vector[...]) == pytest.approx(1, abs=1e-5)
    # u and v have come to the largest singular value.
    largest = np.linalg.svd(np.asarray(layer.matrix()), compute_uv=False)[0]
    sigma = np.asarray(layer.u[...]) @ np.asarray(layer.matrix()) @ np.asarray(layer.v[...])
    assert sigma == pytest.approx(largest, rel=0.05)
