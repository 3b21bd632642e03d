"""VITS without PyTorch: the search, the splines, synthesis in buckets and in pieces, a training step."""

from __future__ import annotations

import dataclasses
import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from audiozoo.decoding import synthesis
from audiozoo.errors import UsageError
from audiozoo.layers import alignment, splines
from audiozoo.layers.alignment import monotonic_alignment
from audiozoo.layers.splines import rational_quadratic_spline
from audiozoo.models import hifigan, vits
from audiozoo.models.vits import VitsConfig, VitsModel
from audiozoo.processors.vits import VitsProcessor, VitsTokenizer
from audiozoo.recipes import recipe, run
from audiozoo.recipes.objectives import Voice
from audiozoo.training.data import find_items
from tests import processes
from tests.models.alignment_search import brute_force_alignment, exhaustive_alignment
from tests.models.random_model import random_model
from tests.models.tiny_vits import CONFIG, PLAIN, build
from tests.shapes import enforce


@functools.cache
def synthesizer() -> synthesis.Synthesizer:
    return synthesis.Synthesizer(build())


# --- alignment -------------------------------------------------------------------------------------------------------

search = jax.jit(monotonic_alignment)


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_search_is_the_brute_force_one(seed, frames, symbols, ties):
    rng = np.random.default_rng(seed)
    symbols, (most_frames, most_symbols) = min(symbols, frames), (9, 9)
    counts = np.array([frames, most_frames, 7])
    times = np.array([symbols, most_symbols, 3])
    scores = rng.standard_normal((3, most_frames, most_symbols)).astype(np.float32)
    if ties:  # few different values: many alignments are equally good
        scores = np.round(scores)
    np.testing.assert_array_equal(search(scores, counts, times), brute_force_alignment(scores, counts, times))


def test_search_finds_the_best_of_all_alignments():
    scores = np.random.default_rng(0).standard_normal((1, 8, 4)).astype(np.float32)
    path = np.asarray(search(scores, np.array([8]), np.array([4])))[0]
    best, ways = exhaustive_alignment(scores[0].astype(np.float64))
    assert ways == 1
    np.testing.assert_allclose((path * scores[0]).sum(), best, rtol=1e-6)
    assert path.sum() == 8
    assert (np.diff(path.argmax(1)) >= 0).all()
    assert (np.diff(path.argmax(1)) <= 1).all()


def test_search_costs_one_compiled_loop_and_no_gradient():
    scores = jnp.ones((1, 6, 3))
    gradient = jax.grad(lambda s: jnp.sum(monotonic_alignment(s, jnp.array([6]), jnp.array([3])) * s))(scores)
    np.testing.assert_array_equal(gradient, search(scores, jnp.array([6]), jnp.array([3])))


def test_log_likelihoods_are_those_of_the_gaussians():
    rng = np.random.default_rng(0)
    z, means, deviations = rng.standard_normal((1, 5, 4)), rng.standard_normal((1, 3, 4)), rng.uniform(-1, 1, (1, 3, 4))
    expected = -0.5 * ((z[:, :, None] - means[:, None]) / np.exp(deviations[:, None])) ** 2
    expected = (expected - deviations[:, None] - 0.5 * np.log(2 * np.pi)).sum(-1)
    np.testing.assert_allclose(vits.log_likelihoods(*map(jnp.asarray, (z, means, deviations))), expected, rtol=1e-5)


# --- splines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("double_precision")
def test_spline_inverts_itself_and_knows_its_slope():
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.concatenate([rng.uniform(-6, 6, 200), [-5.0, 5.0, -7.0, 0.0]]))
    parameters = [jnp.asarray(2 * rng.standard_normal((204, n))) for n in (10, 10, 9)]
    run = jax.jit(lambda x, *p: rational_quadratic_spline(x, *p))
    back = jax.jit(lambda y, *p: rational_quadratic_spline(y, *p, reverse=True))
    y, log_slope = run(x, *parameters)
    again, negative = back(y, *parameters)
    np.testing.assert_allclose(again, x, atol=1e-9)
    np.testing.assert_allclose(negative, -log_slope, atol=1e-9)
    outside = np.abs(np.asarray(x)) > 5
    np.testing.assert_array_equal(y[outside], x[outside])
    slope = jax.vmap(jax.grad(lambda x, *p: rational_quadratic_spline(x, *p)[0]))(
        x[:200], *(p[:200] for p in parameters)
    )
    np.testing.assert_allclose(np.log(slope), log_slope[:200], atol=1e-9)


def test_spline_has_finite_gradients_where_nothing_is_inside():
    def total(x, widths):
        y, log_slope = rational_quadratic_spline(x, widths, widths, widths[..., 1:], reverse=True)
        return jnp.sum(y) + jnp.sum(log_slope)

    gradients = jax.grad(total, argnums=(0, 1))(jnp.asarray([7.0, -9.0, 1e6]), jnp.ones((3, 10)))
    np.testing.assert_array_equal(gradients[0], 1.0)
    np.testing.assert_array_equal(gradients[1], 0.0)


# --- synthesis -------------------------------------------------------------------------------------------------------


def test_buckets_hold_their_lengths_and_waste_little():
    for length in range(1, 3000):
        size = synthesis.bucket(length)
        assert size >= length
        assert length <= 16 or size <= max(length * 1.125 + 1, length + 16)
    assert len({synthesis.bucket(n) for n in range(1, 4096)}) < 64


def test_synthesizer_is_the_call_without_padding():
    ids = np.random.default_rng(5).integers(0, 20, 40)
    key = jax.random.key(3)
    speech = synthesizer()(ids, 1, key=key)
    frames = speech.waveform.size // 8
    # The bucket's noise begins with what is drawn for this length alone.
    noise = jax.random.normal(jax.random.fold_in(key, 1), (1, frames, 8))
    whole = jax.jit(lambda m: m(ids[None], None, 1, key=key, prior_noise=noise))(build())
    assert int(whole.sequence_lengths[0]) == 8 * frames
    np.testing.assert_allclose(speech.waveform, whole.waveform[0], atol=1e-5)
    np.testing.assert_array_equal(speech.durations, np.asarray(whole.durations[0]) * 8)
    assert np.abs(speech.waveform).max() > 1e-3


@pytest.mark.parametrize("chunk", [7, 64])
def test_pieces_laid_end_to_end_are_the_whole(chunk):
    ids = np.random.default_rng(0).integers(0, 20, 12)
    options = {"noise_scale": 0.5, "key": jax.random.key(1), "durations": np.full(12, 9)}
    whole = synthesizer()(ids, 2, **options).waveform
    pieces = list(synthesizer().stream(ids, 2, chunk_frames=chunk, **options))
    assert len(pieces) == -(-108 // chunk)
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-6)


def test_receptive_field_is_no_wider_than_it_says():
    frames = 2 * CONFIG.decoder.receptive_frames() + 5
    z = jnp.zeros((1, frames, 8))
    middle = frames // 2
    decode = jax.jit(lambda m, z: m.decode(z, None, m.speaker_embedding(0)))
    changed = np.abs(np.asarray(decode(build(), z.at[0, middle].set(9.0)) - decode(build(), z))[0]) > 1e-7
    touched = np.flatnonzero(changed.reshape(frames, 8).any(axis=1))
    reach = CONFIG.decoder.receptive_frames()
    assert touched.min() >= middle - reach
    assert touched.max() <= middle + reach
    assert touched.max() - touched.min() >= reach


def test_options_change_what_they_should():
    ids = np.arange(1, 11)
    speak = functools.partial(synthesizer(), ids, 0, key=jax.random.key(0))
    plain = speak()
    assert np.array_equal(plain.waveform, speak().waveform)
    assert not np.array_equal(plain.waveform, synthesizer()(ids, 0, key=jax.random.key(1)).waveform)
    assert speak(speaking_rate=0.125).waveform.size > 1.5 * plain.waveform.size
    still = [speak(noise_scale=0.0, noise_scale_duration=0.0, key=jax.random.key(k)).waveform for k in (0, 1)]
    assert np.array_equal(*still)
    assert speak(durations=np.full(10, 3)).waveform.size == 10 * 3 * 8
    other = synthesizer()(ids, 1, key=jax.random.key(0), durations=plain.durations // 8)
    assert not np.allclose(other.waveform, plain.waveform)


def test_a_converted_batch_is_its_items():
    """Each as long as it says; without noise about the posterior the same for every key."""
    x = np.abs(np.random.default_rng(0).standard_normal((2, 12, CONFIG.spectrogram_bins))).astype(np.float32)
    convert = jax.jit(lambda m, x, n, key: m.voice_conversion(x, 0, 2, lengths=n, noise_scale=0.0, key=key).waveform)
    both = convert(build(), x, jnp.asarray([12, 7]), jax.random.key(0))
    alone = convert(build(), x[1:, :7], jnp.asarray([7]), jax.random.key(1))
    np.testing.assert_allclose(both[1, : 7 * 8], alone[0], atol=1e-5)
    assert not np.any(both[1, 7 * 8 :])
    assert np.any(both[0, 7 * 8 :])


def test_speak_goes_sentence_by_sentence():
    sentences = [("one", [1, 4, 9]), ("two", [1, 4, 9])]
    spoken = list(synthesis.speak(synthesizer(), sentences, seed=1, noise_scale_duration=0.0))
    again = list(synthesis.speak(synthesizer(), sentences, seed=1, noise_scale_duration=0.0))
    assert [s.text for s in spoken] == ["one", "two"]
    assert all(np.array_equal(a.waveform, b.waveform) for a, b in zip(spoken, again, strict=True))
    assert not np.array_equal(spoken[0].waveform, spoken[1].waveform)  # each sentence has noise of its own
    half = synthesis.Synthesizer(jax.tree.map(lambda array: array.astype(jnp.bfloat16), build()))
    z, lengths = jnp.zeros((1, 16, 8), jnp.bfloat16), jnp.asarray([16])
    assert jax.eval_shape(half._piece, half._state, z, lengths, lengths * 0).dtype == jnp.float32


def test_mistakes_get_a_sentence():
    with pytest.raises(UsageError, match="no voice 3"):
        synthesizer()([1, 2], 3)
    with pytest.raises(UsageError, match="0 to 27"):
        synthesizer()([1, 28], 0)
    with pytest.raises(UsageError, match="at least one"):
        synthesizer()([], 0)
    with pytest.raises(UsageError, match="above 0"):
        synthesizer()([1], 0, speaking_rate=0.0)
    with pytest.raises(UsageError, match="2 durations for 1 symbols"):
        synthesizer()([1], 0, durations=[3, 3])
    with pytest.raises(UsageError, match="at least 1 frame"):
        next(synthesizer().stream([1], 0, chunk_frames=0))
    for options in ({"durations": [np.inf]}, {"durations": [1e7]}):
        with pytest.raises(UsageError, match="600 s at most"):
            synthesizer()([1], 0, **options)
    with pytest.raises(UsageError, match="Synthesizer"):
        jax.jit(lambda m, ids: m(ids))(build(), jnp.ones((1, 3), jnp.int32))
    for heads in (0, 3):
        with pytest.raises(UsageError, match=f"does not divide into {heads} heads"):
            build(dataclasses.replace(CONFIG, num_attention_heads=heads))
    with pytest.raises(UsageError, match="several voices"):
        VitsModel.voice_conversion(_Single(), None, 0, 1)  # type: ignore[arg-type]


class _Single:
    config = VitsConfig()


def test_shapes_are_what_the_annotations_say(monkeypatch):
    for module in (vits, hifigan, alignment, splines):
        assert enforce(monkeypatch, module)
    ids, mask = jnp.ones((2, 7), jnp.int32), jnp.ones((2, 7), jnp.int32)
    spoken = jax.eval_shape(lambda m: m(ids, mask, 1, prior_noise=jnp.zeros((2, 30, 8))), build())
    assert spoken.waveform.shape == (2, 240)
    assert spoken.durations.shape == (2, 7)
    spectrogram = jnp.zeros((2, 11, 33))
    converted = jax.eval_shape(lambda m: m.voice_conversion(spectrogram, 0, jnp.asarray([1, 2])), build())
    assert converted.waveform.shape == (2, 88)
    waves = {"waveform": jnp.zeros((2, 256)), "waveform_lengths": jnp.asarray([256, 200])}
    batch = vits.VitsBatch(input_ids=ids, attention_mask=mask, speaker_id=jnp.asarray([0, 1]), **waves)
    judge = random_model(
        lambda rngs: vits.VitsDiscriminator(periods=(2,), period_channels=(4,), scale_layers=((4, 5, 1, 1),), rngs=rngs)
    )
    key = jax.random.key(0)
    losses, output, real = jax.eval_shape(
        lambda m, d: vits.generator_losses(m, d, batch, segment_frames=16, key=key), build(), judge
    )
    assert losses.total.shape == ()
    assert output.waveform.shape == real.shape == (2, 128)
    with pytest.raises(Exception, match="latents"):
        jax.eval_shape(lambda m: m.decode(jnp.zeros((2, 8))), build())


SHARDED = """
import jax, numpy as np
from audiozoo import sharding
from tests.models.tiny_vits import PLAIN, build

@jax.jit
def say(model, ids, mask, speakers, seed):  # all noise comes from the seed, inside the program
    one, two = jax.random.split(jax.random.key(seed))
    return model(ids, mask, speakers, prior_noise=jax.random.normal(one, (4, 200, 8)), key=two)

rng = np.random.default_rng(0)
given = rng.integers(1, 28, (4, 9)), np.ones((4, 9)), np.array([0, 1, 2, 0])
alone = say(build(PLAIN), *given, 3)
mesh = sharding.make_mesh({"data": 4, "tensor": 2})
placed = (jax.device_put(x, sharding.batch_sharding(mesh)) for x in given)
together = say(sharding.shard(build(PLAIN), mesh), *placed, 3)
assert len(together.waveform.sharding.device_set) == 8
assert np.array_equal(alone.durations, together.durations)
assert float(np.abs(alone.waveform).max()) > 1e-3
assert float(np.abs(np.asarray(say(build(PLAIN), *given, 4).waveform) - np.asarray(alone.waveform)).max()) > 1e-3
print(float(np.abs(np.asarray(alone.waveform) - np.asarray(together.waveform)).max()))
"""


@pytest.mark.slow
def test_eight_devices_say_with_a_seed_what_one_says():
    assert float(processes.output("-c", SHARDED)) < 1e-5


# --- training --------------------------------------------------------------------------------------------------------


def test_the_last_frames_of_a_shorter_recording_are_its_own():
    lengths = 160, 157, 101
    batch = np.full((3, 160), 7.0, np.float32)
    alone = [np.random.default_rng(length).standard_normal((1, length)).astype(np.float32) for length in lengths]
    for row, wave in zip(batch, alone, strict=True):
        row[: wave.size] = wave
    given = vits.VitsBatch(waveform=jnp.asarray(batch), waveform_lengths=jnp.asarray(lengths))
    model = mock.Mock(config=CONFIG, training_forward=mock.Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        vits.generator_losses(model, None, given)
    together = model.training_forward.call_args.args[2]
    for row, wave in zip(together, alone, strict=True):
        single = vits.spectrogram_of(CONFIG, jnp.asarray(wave))[0]
        np.testing.assert_allclose(row[: wave.size // CONFIG.hop_length], single, rtol=1e-5, atol=1e-5)


def test_segments_lie_anywhere_inside():
    """Of 4, of 5 and of 12 frames the first of a segment of 4 is one of 1, of 2 and of 9."""
    model, keys = build(PLAIN), jax.random.split(jax.random.key(0), 300)
    ids, spectrogram = jnp.ones((3, 2), int), jnp.ones((3, 12, CONFIG.spectrogram_bins))

    def start(key):
        given = ids, ids, spectrogram, jnp.asarray([4, 5, 12]), jnp.zeros(3, int)
        return model.training_forward(*given, segment_frames=4, key=key).segment_starts

    starts = np.asarray(jax.jit(jax.vmap(start))(keys))
    assert [sorted(set(column)) for column in starts.T] == [[0], [0, 1], list(range(9))]


def test_what_the_generators_loss_is_made_of():
    """Segments of the recording beside what was decoded, and each part by its weight."""
    hop, starts = CONFIG.hop_length, jnp.asarray([0, 2])
    waveform = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16 * hop)), jnp.float32)
    batch = vits.VitsBatch(None, None, waveform, jnp.asarray([16 * hop, 11 * hop + 3]))
    decoded = vits.slices(0.5 * waveform, starts * hop, 8 * hop)
    made = vits.VitsTrainingOutput(decoded, starts, jnp.asarray(3.0), jnp.asarray(5.0))
    model = mock.Mock(config=CONFIG, training_forward=mock.Mock(return_value=made))
    losses, _, real = vits.generator_losses(
        model, lambda x: ([x], [(x[..., None],)]), batch, segment_frames=8, num_mels=6, mel_weight=2.0, kl_weight=0.5
    )
    np.testing.assert_array_equal(real, 2 * decoded)
    assert model.training_forward.call_args.args[3].tolist() == [16, 11]
    assert model.training_forward.call_args.kwargs == {"segment_frames": 8}
    parts = (losses.adversarial, losses.features, 2 * losses.mel, 3.0, 0.5 * 5.0)
    assert float(losses.total) == pytest.approx(float(sum(parts)), rel=1e-6)
    assert (float(losses.duration), float(losses.kl)) == (3.0, 5.0)


LETTERS = {symbol: index for index, symbol in enumerate("_ abcdefghijklmnopqrstuvwxyz")}
READINGS = {
    "nabucasa_en_US-kathleen.mp3": "author of the danger trail philip steels etc",
    "fsdd_0_jackson_0.wav": "zero",
}
# 16 kHz, frames of 256 samples, 513 bins and segments of 32 frames are the released voices' own; little else is.
SMALL = {
    "vocab_size": len(LETTERS),
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "ffn_dim": 64,
    "flow_size": 32,
    "upsample_initial_channel": 64,
    "resblock_kernel_sizes": (3,),
    "resblock_dilation_sizes": ((1, 2),),
    "depth_separable_num_layers": 1,
    "duration_predictor_num_flows": 1,
    "prior_encoder_num_flows": 1,
    "prior_encoder_num_wavenet_layers": 2,
    "posterior_encoder_num_wavenet_layers": 2,
    "decoder_weight_norm": True,
}
JUDGE = {"periods": (2,), "period_channels": (4, 8), "scale_layers": ((4, 15, 1, 1), (8, 41, 4, 4))}


@pytest.mark.slow
def test_steps_of_both_networks_lower_the_mel_loss_of_recordings(recordings, tmp_path):
    """The paper's spectrograms, segments and losses at 16 kHz, by the recipe; the networks alone are small."""
    lines = [json.dumps({"audio": str(recordings / name), "text": text}) for name, text in READINGS.items()]
    (tmp_path / "set.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = VitsConfig.piper_low(**SMALL)
    processor = VitsProcessor(VitsTokenizer(LETTERS, phonemize=False, pad_token="_", unk_token=None))
    row = dataclasses.replace(recipe("vits"), objective=Voice(judge=JUDGE))
    items, settings = find_items(tmp_path / "set.jsonl"), {"batch_size": 2, "learning_rate": 2e-3}
    model = VitsModel(config, rngs=nnx.Rngs(0))
    ready = run.build(row, items, model=model, processor=processor, settings=settings)
    trainer, batch = ready.trainer, ready.batches(items, buckets=1).batch(0)
    state = trainer.init()
    at_first, before = jax.tree.map(np.asarray, state.params), trainer.evaluate(state, [batch])
    for _ in range(30):
        state, losses = trainer.step(state, trainer.put(batch))
        assert all(np.isfinite(value) for value in losses.values()), losses
    after = trainer.evaluate(state, [batch])
    assert after["mel"] < 0.7 * before["mel"], (before, after)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), at_first, state.params)
    assert all(jax.tree.leaves(moved)), moved
