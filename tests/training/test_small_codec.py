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
from audiozoo.models.encodec import EncodecModel
from audiozoo.recipes import small_codec

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


def test_si_snr():
    target, noise = tone(100), tone(300)  # of whole periods: the one has nothing of the other
    for level, expected in ((1.0, 0), (0.1, 20), (10.0, -20)):
        assert small_codec.si_snr(3 * (target + level * noise) + 1, target) == pytest.approx(expected, abs=1e-4)
    assert small_codec.si_snr(noise, target) < -80
    assert small_codec.si_snr(-target, target) > 80


def test_samples_at_the_same_bitrate():
    """Few bits a sample at a low rate: what lies above half the rate is gone, below it each bit counts."""
    low, high = tone(100), tone(3000)

    def score(wave, bits, rate=1):
        return small_codec.si_snr(small_codec.pcm(wave, rate * bits, 16_000, bits), wave)

    for bits, least, most in ((1, 2, 12), (4, 15, 26), (8, 38, 55)):
        assert least < score(low, bits) < most  # of 1,000 samples a second
    assert score(high, 4) < -20
    both = low + 0.3 * tone(900)
    scores = [score(both, bits, 4 / bits) for bits in range(1, 6)]
    best = small_codec.si_snr(small_codec.best_pcm(both, 4, 16_000), both)
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
def test_a_minute_of_training(tmp_path, recordings, monkeypatch, capsys):
    """The whole command: the losses fall, more comes back than before, and the codec writes and reads files."""
    monkeypatch.setattr(small_codec, "CONFIG", TINY)
    arguments = ["--data", str(recordings), "--held-out", "nabucasa_en_US-kathleen", "--out", str(tmp_path / "codec")]
    assert small_codec.main([*arguments, "--minutes", "0.4"]) == 0
    told = capsys.readouterr().out
    assert "PCM at this rate" in told
    found = json.loads((tmp_path / "codec" / "curve.json").read_text())
    first, last = found["curve"][0], found["curve"][-1]
    assert last["step"] > 20
    assert last["frequency"] < 0.6 * first["frequency"]
    assert last["si_snr"] > first["si_snr"]
    rows = {row["kbps"]: row for row in found["table"]}
    assert all(row["trained"] > row["untrained"] + 10 for row in rows.values())
    model = audiozoo.load(tmp_path / "codec")
    assert audiozoo.load_processor(tmp_path / "codec").sampling_rate == 16_000
    wave = read(recordings / "nabucasa_en_US-kathleen.mp3")[None]
    content = codec.compress(model, wave, 1.2)
    assert len(content) < wave.shape[1] / 16_000 * 1200 / 8 + 100
    assert codec.decompress(content, model).shape == wave.shape


@pytest.mark.slow
def test_scales_and_codebooks_fit_the_first_batch():
    rng = np.random.default_rng(0)
    x = jnp.asarray(0.05 * rng.normal(size=(8, 1, 6400)), jnp.float32)
    model = small_codec.prepared(EncodecModel(TINY, rngs=nnx.Rngs(0)), x)
    z = model.encoder(x.swapaxes(1, 2))
    np.testing.assert_allclose(z.std(axis=(0, 1)), 1, atol=1e-3)
    codes = model.quantizer.encode(z, 4)
    assert len(np.unique(codes[:, 0])) > 40
    assert float(jnp.mean((z - model.quantizer.decode(codes)) ** 2)) < 0.7
    assert float(model.decoder(model.quantizer.decode(codes)).std()) == pytest.approx(0.05, rel=0.3)
