"""A small EnCodec of one's own: what it is compared with, and a minute of it."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import audiozoo
from audiozoo import codec
from audiozoo.audio import read
from audiozoo.errors import UsageError
from audiozoo.models.encodec import EncodecModel, frequency_loss, time_loss
from audiozoo.recipes import small_codec
from audiozoo.training.metrics import si_snr

TINY = dataclasses.replace(
    small_codec.CONFIG,
    num_filters=4,
    hidden_size=16,
    num_lstm_layers=1,
    codebook_size=64,
    target_bandwidths=(0.6, 1.2),
)


def tone(pitch: float, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * pitch * np.arange(round(16_000 * seconds)) / 16_000).astype(np.float32)


def test_samples_at_the_same_bitrate():
    """Few bits a sample at a low rate: what lies above half the rate is gone, below it each bit counts."""
    low, high = tone(100), tone(3000)

    def score(wave, bits, rate=1):
        return si_snr(wave, small_codec.pcm(wave, rate * bits, 16_000, bits))

    for bits, least, most in ((1, 2, 12), (4, 15, 26), (8, 38, 55)):
        assert least < score(low, bits) < most  # of 1,000 samples a second
    assert score(high, 4) < -20
    both = low + 0.3 * tone(900)
    scores = [score(both, bits, 4 / bits) for bits in range(1, 6)]
    best = si_snr(both, small_codec.best_pcm(both, 4, 16_000))
    assert best == max(scores) == scores[1]  # 2,000 samples of two bits


def test_recordings_are_held_out_whole():
    waves = {f"folder/{n}": tone(100 + n, 0.1) for n in range(6)} | {"owl": tone(50, 0.1)}
    learn, held = small_codec.divided(waves)
    assert (list(held), len(learn)) == (["owl"], 6)
    assert list(small_codec.divided(waves, ["3", "5"])[1]) == ["folder/3", "folder/5"]
    assert list(small_codec.divided(waves, ["none"])[1]) == ["folder/4"]
    with pytest.raises(UsageError, match="too few"):
        small_codec.divided({"a": tone(9)})
    batches = small_codec.crops(learn, 800, 3, seed=1)
    batch = next(batches)["input_values"]
    assert (batch.shape, batch.dtype) == ((3, 1, 800), np.float32)
    np.testing.assert_array_equal(batch, next(small_codec.crops(learn, 800, 3, seed=1))["input_values"])
    assert not np.array_equal(batch, next(batches)["input_values"])


@pytest.mark.slow
def test_the_command(tmp_path, recordings, monkeypatch, capsys):
    """One step: more comes back than from random weights, and the codec writes and reads files."""
    monkeypatch.setattr(small_codec, "CONFIG", TINY)
    arguments = ["--data", str(recordings), "--held-out", "nabucasa_en_US-kathleen", "--out", str(tmp_path / "codec")]
    assert small_codec.main([*arguments, "--minutes", "0.001"]) == 0
    told = capsys.readouterr().out
    assert "PCM at this rate" in told
    found = json.loads((tmp_path / "codec" / "curve.json").read_text())
    assert [point["step"] for point in found["curve"]] == [1]
    rows = {row["kbps"]: row for row in found["table"]}
    assert all(row["trained"] > row["untrained"] for row in rows.values()), rows
    model = audiozoo.load(tmp_path / "codec")
    assert audiozoo.load_processor(tmp_path / "codec").sampling_rate == 16_000
    wave = read(recordings / "nabucasa_en_US-kathleen.mp3")[None]
    content = codec.compress(model, wave, 1.2)
    assert len(content) < wave.shape[1] / 16_000 * 1200 / 8 + 100
    assert codec.decompress(content, model).shape == wave.shape


def losses(model, batches):
    """Both losses of the paper on some batches, at the full rate."""
    found = []
    for x in batches:
        codes = model.quantizer.encode(model.encoder(x.swapaxes(1, 2)), TINY.num_quantizers)
        y = model.decoder(model.quantizer.decode(codes)).swapaxes(1, 2)[..., : x.shape[-1]]
        found.append([float(time_loss(x, y)), float(frequency_loss(x, y, TINY.sampling_rate, exponents=(6, 8, 10)))])
    return np.mean(found, axis=0)


@pytest.mark.slow
def test_a_minute_of_training_lowers_the_losses(recordings):
    learn, held = small_codec.divided(small_codec.recordings([recordings]), ["nabucasa_en_US-kathleen"])
    result = small_codec.train(learn, held, steps=120, config=TINY, judge_every=60)
    assert [point["step"] for point in result.curve] == [1, 61, 120]
    crops = small_codec.crops(learn, 8000, 8, seed=5)
    batches = [jnp.asarray(next(crops)["input_values"]) for _ in range(6)]
    many = np.concatenate([next(small_codec.crops(learn, 8000, 64, seed=0))["input_values"]])
    start = small_codec.prepared(EncodecModel(TINY, rngs=nnx.Rngs(0)), jnp.asarray(many))
    before, after = losses(start, batches), losses(result.model, batches)
    assert (after < before).all(), (before, after)
    assert result.curve[-1]["si_snr"] > result.curve[0]["si_snr"], result.curve


@pytest.mark.slow
def test_the_first_codec_is_the_transform_that_its_layers_allow():
    """Of noise of fewer dimensions than the latent has, it brings back nearly all; codebooks stand for its latents."""
    rng = np.random.default_rng(0)
    parts = np.linalg.qr(rng.normal(size=(320, 8)))[0].T
    x = (0.05 * rng.normal(size=(16, 20, 8)) @ parts * 320**0.5).reshape(16, 1, 6400)
    model = small_codec.prepared(EncodecModel(TINY, rngs=nnx.Rngs(0)), jnp.asarray(x, jnp.float32))
    z = model.encoder(jnp.asarray(x, jnp.float32).swapaxes(1, 2))
    y = np.asarray(model.decoder(z)).swapaxes(1, 2)[..., : x.shape[-1]]
    codes = model.quantizer.encode(z, 4)
    rest = float(jnp.mean((z - model.quantizer.decode(codes)) ** 2) / jnp.mean(z**2))
    assert len(np.unique(codes[:, 0])) > 20
    assert rest < 0.3
    scores = [si_snr(wave[0, 2000:], back[0, 2000:]) for wave, back in zip(x, y, strict=True)]
    assert np.mean(scores) > 3, scores  # of one alone by 1 dB more or less, as k-means begins
