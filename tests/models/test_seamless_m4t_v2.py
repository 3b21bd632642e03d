"""SeamlessM4T v2 without PyTorch: shapes, half precision, training, own checkpoints, memory and shards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import audiozoo
from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models import seamless_m4t, seamless_m4t_v2, speech_resynthesis
from audiozoo.models.seamless_m4t_v2 import SeamlessM4Tv2Config, SeamlessM4Tv2GenerationConfig, SeamlessM4Tv2Model
from audiozoo.models.speech_resynthesis import CodeHifiGanConfig
from tests.models.random_model import random_model
from tests.models.streaming import peak_of, write_checkpoint
from tests.shapes import enforce
from weights_conversion import seamless_m4t_v2 as conversion

ROOT = Path(__file__).resolve().parents[2]
VOICE = CodeHifiGanConfig(
    unit_hifi_gan_vocab_size=26,
    unit_embed_dim=8,
    vocoder_num_langs=3,
    lang_embed_dim=4,
    vocoder_num_spkrs=5,
    spkr_embed_dim=4,
    upsample_initial_channel=8,
    upsample_rates=(5, 2),
    upsample_kernel_sizes=(11, 4),
    resblock_kernel_sizes=(3,),
    resblock_dilation_sizes=((1, 3),),
)
TINY = SeamlessM4Tv2Config(
    vocab_size=40,
    t2u_vocab_size=30,
    char_vocab_size=20,
    hidden_size=16,
    encoder_layers=1,
    encoder_ffn_dim=16,
    encoder_attention_heads=2,
    decoder_layers=1,
    decoder_ffn_dim=16,
    decoder_attention_heads=2,
    feature_projection_input_dim=10,
    speech_encoder_layers=1,
    speech_encoder_attention_heads=2,
    speech_encoder_intermediate_size=16,
    conv_depthwise_kernel_size=5,
    t2u_encoder_layers=1,
    t2u_encoder_ffn_dim=16,
    t2u_encoder_attention_heads=2,
    t2u_decoder_layers=1,
    t2u_decoder_ffn_dim=16,
    t2u_decoder_attention_heads=2,
    t2u_variance_predictor_embed_dim=16,
    t2u_variance_predictor_hidden_dim=8,
    vocoder=VOICE,
)
LETTERS = "▁abcdefghij"
TABLES = SeamlessM4Tv2GenerationConfig(
    text_decoder_lang_to_code_id=(("eng", 30), ("spa", 31)),
    vocoder_lang_code_to_id=(("eng", 0), ("spa", 2)),
    char_to_id=tuple((letter, i) for i, letter in enumerate(LETTERS, start=4)),
    id_to_text=tuple((i, LETTERS[i % 11] + LETTERS[(3 * i) % 11]) for i in range(40)),
    options=(("max_new_tokens", 6),),
)


@pytest.fixture(scope="module")
def model():
    made = random_model(lambda rngs: SeamlessM4Tv2Model(TINY, rngs=rngs))
    made.generation_config = TABLES
    return made


def text() -> dict[str, jax.Array]:
    ids, mask = np.arange(4, 18).reshape(2, 7), np.ones((2, 7), int)
    ids[1, 5:], mask[1, 5:] = 0, 0
    return {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)}


def test_annotations_hold(model, monkeypatch):
    """Calls of text, speech and units, with what is public checking its shapes and dtypes."""
    modules = (seamless_m4t, seamless_m4t_v2, speech_resynthesis)
    checked = [name for module in modules for name in enforce(monkeypatch, module)]
    assert {"SeamlessM4TModel.__call__", "CodeHifiGan.decode", "characters", "run_lengths"} <= set(checked)
    ids = jnp.ones((2, 3), int)
    for x in (text(), {"input_features": jnp.zeros((2, 20, 10))}):
        jax.eval_shape(lambda m, x=x: m(**x, decoder_input_ids=ids).logits, model)
    output = model.generate(**text(), tgt_lang="eng", return_intermediate_token_ids=True)
    assert output.waveform.shape[0] == len(output.waveform_lengths) == 2
    assert np.isfinite(output.waveform).all()
    # Compiled by itself, with the number of units told.
    states, chars, counts = jnp.zeros((1, 3, 16)), jnp.ones((1, 4), int), jnp.array([[0, 2, 2]])
    told = audiozoo.jit(model.t2u_model).lower(states, chars, counts, frames=9, label_smoothing=0.1)
    assert told.out_info.last_hidden_state.shape == (1, 9, 30)
    assert audiozoo.jit(model.vocoder).lower(np.ones((1, 3), int), frames=7).out_info[0].shape == (1, 70)
    one = np.array([[5, 6]])
    loss = speech_resynthesis.duration_loss(model.vocoder, jnp.asarray(one))
    assert np.isfinite(float(loss))


@pytest.mark.slow
def test_directions(model):
    """Text and speech in, text and speech out; the shortest input; noise; voices that differ."""
    rng = np.random.default_rng(0)
    for source in (
        {"input_features": jnp.asarray(rng.standard_normal((1, 24, 10)), jnp.float32)},
        {"input_ids": jnp.array([[30, 3]])},
    ):
        tokens = model.generate(**source, tgt_lang="spa", generate_speech=False).sequences
        assert tokens[0, :2].tolist() == [3, 31]
        waveform, lengths = model.generate(**source, tgt_lang="spa")
        assert waveform.shape == (1, lengths[0])
        other, _ = model.generate(**source, tgt_lang="spa", speaker_id=4)
        assert (waveform != other).any()
        assert (np.abs(waveform) <= 1).all()
    # A text that ends at once is silence.
    silent = random_model(lambda rngs: SeamlessM4Tv2Model(TINY, rngs=rngs))
    silent.generation_config = TABLES
    rows = silent.text_decoder.embed_tokens.embedding[...]
    silent.text_decoder.layer_norm.scale[...] = jnp.zeros(16)
    silent.text_decoder.layer_norm.bias[...] = 100 * rows[3]
    waveform, lengths = silent.generate(input_ids=jnp.array([[30, 9, 3]]), tgt_lang="eng")
    assert lengths.tolist() == [0]
    assert not waveform.any()


def test_ends_of_texts():
    tokens = np.array([[3, 31, 5, 6, 7], [3, 31, 5, 3, 0]])
    assert seamless_m4t_v2.without_ends(tokens, 3, 0).tolist() == [[3, 31, 5, 6, 7], [3, 31, 5, 0, 0]]


@pytest.mark.slow
def test_half_precision(model):
    whole = audiozoo.jit(model)(**text(), decoder_input_ids=jnp.ones((2, 3), int))
    half = random_model(lambda rngs: SeamlessM4Tv2Model(TINY, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs))
    ours = audiozoo.jit(half)(**text(), decoder_input_ids=jnp.ones((2, 3), int))
    assert ours.logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.logits.astype(np.float32), whole.logits, atol=0.15)
    half.generation_config = TABLES
    waveform, _ = half.generate(**text(), tgt_lang="eng")
    assert waveform.dtype == np.float32
    assert np.isfinite(waveform).all()


@pytest.mark.slow
def test_training_lowers_the_losses(model):
    """Translation with smoothed labels, and units with their durations, by one optimiser."""
    graphdef, params = nnx.split(model)
    labels = jnp.array([[31, 5, 6, 7, 3], [31, 8, 9, 3, -100]])
    chars, counts = jnp.array([[5, 6, 7, 8]]), jnp.array([[0, 2, 2]])
    states = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 16)), jnp.float32)
    durations, units = jnp.array([[2, 1, 3, 2]]), jnp.array([[9, 9, 10, 11, 11, 11, 12, 12]])

    def loss(params, key):
        m, keys = nnx.merge(graphdef, params), jax.random.split(key)
        written = m(**text(), labels=labels, label_smoothing=0.2, key=keys[0]).loss
        spoken = m.t2u_model(states, chars, counts, durations=durations, labels=units, key=keys[1]).loss
        return written + spoken

    optimiser = optax.adam(1e-2)

    @jax.jit
    def step(params, state, key):
        value, gradient = jax.value_and_grad(loss)(params, key)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, values = optimiser.init(params), []
    for key in jax.random.split(jax.random.key(0), 30):
        params, state, value = step(params, state, key)
        values.append(float(value))
    assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5])


@pytest.mark.slow
def test_checkpoints_of_our_own(model, tmp_path):
    audiozoo.save(model, tmp_path / "native")
    back = audiozoo.load(tmp_path / "native")
    assert type(back) is SeamlessM4Tv2Model
    assert back.config == TINY
    assert back.generation_config == TABLES
    ids = {"decoder_input_ids": jnp.array([[3, 31, 5], [3, 31, 6]])}
    np.testing.assert_array_equal(
        audiozoo.jit(back)(**text(), **ids).logits, audiozoo.jit(model)(**text(), **ids).logits
    )
    audiozoo.export(model, tmp_path / "foreign")
    again = audiozoo.load(tmp_path / "foreign")
    assert again.config == TINY
    assert dict(again.generation_config.id_to_text) == dict(TABLES.id_to_text)
    for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (model, again)), strict=True):
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))
    voice = random_model(lambda rngs: seamless_m4t_v2.SeamlessM4Tv2CodeHifiGan(TINY, rngs=rngs))
    audiozoo.save(voice, tmp_path / "voice")
    units = np.array([[4, 9, 9, 20]])
    np.testing.assert_array_equal(audiozoo.load(tmp_path / "voice")(units, 1, 2)[0], voice(units, 1, 2)[0])
    (tmp_path / "foreign" / "config.json").write_text(json.dumps({"model_type": "seamless_m4t_v2", "hidden_size": "x"}))
    with pytest.raises(CheckpointError, match="hidden_size"):
        audiozoo.load(tmp_path / "foreign")
    (tmp_path / "some.pt").write_bytes(b"nothing")
    assert not conversion.recognise(tmp_path / "some.pt")
    with pytest.raises(SourceError, match="spm_char"):
        conversion.character_pieces(tmp_path)


# --- memory and shards -----------------------------------------------------------------------------------------------

# The large model's widths, with fewer of everything. With all tokens, and 12 blocks in the speech encoder and on either
# text side, 5.86 GB, the three peaks are 7.0, 6.2 and 7.1 GB.
SHALLOW = dataclasses.replace(
    SeamlessM4Tv2Config.large(),
    vocab_size=20_000,
    encoder_ffn_dim=2048,
    decoder_ffn_dim=2048,
    t2u_encoder_ffn_dim=2048,
    encoder_layers=1,
    decoder_layers=1,
    speech_encoder_layers=1,
    t2u_encoder_layers=1,
    t2u_decoder_layers=1,
)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from /proc")
def test_a_large_model_is_converted_tensor_by_tensor_and_restored_into_shards(tmp_path):
    size = write_checkpoint(tmp_path / "theirs", lambda rngs: SeamlessM4Tv2Model(SHALLOW, rngs=rngs), conversion)
    assert 4.5e8 < size < 9e8
    peaks = {
        "convert": peak_of(1, tmp_path / "theirs", tmp_path / "native"),
        "their file into shards": peak_of(8, tmp_path / "theirs"),
        "our file into shards": peak_of(8, tmp_path / "native"),
    }
    for name, peak in peaks.items():
        assert peak <= 1.3 * size + 0.5e9, f"{name}: {peak / 1e9:.2f} GB for {size / 1e9:.2f} GB"
