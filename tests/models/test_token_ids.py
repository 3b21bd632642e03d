"""Ids that a model does not have are refused before anything is compiled; the last that it has is taken."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from audiozoo.errors import UsageError
from audiozoo.layers import Embed, abstract, check_ids
from audiozoo.layers.losses import cross_entropy
from audiozoo.models import bark, encodec, musicgen, seamless_m4t, speech_to_text, speecht5, whisper, xls_r

REFUSED = "is none of this model's: they are 0 to"


def test_a_table_takes_its_own_indices_only():
    table = Embed(5, 2, rngs=nnx.Rngs(0))
    assert np.array_equal(table(jnp.array([[0, 4]])), table.embedding[...][jnp.array([[0, 4]])])
    for wrong in (-1, 5):
        with pytest.raises(UsageError, match=f"The id {wrong} {REFUSED} 4"):
            table(jnp.array([[0, wrong]]))
    assert table(jnp.zeros((0, 3), jnp.int32)).shape == (0, 3, 2)


def test_a_label_is_one_of_the_classes():
    logits = jnp.zeros((1, 2, 5))
    assert np.isfinite(cross_entropy(logits, jnp.array([[4, -100]])))
    for wrong in (-1, 5):
        with pytest.raises(UsageError, match=f"The id {wrong} {REFUSED} 4"):
            cross_entropy(logits, jnp.array([[0, wrong]]))


def test_inside_a_program_nothing_is_known():
    table = Embed(5, 2, rngs=nnx.Rngs(0))
    assert np.isnan(jax.jit(lambda ids: table(ids))(jnp.array([5]))).all()


@pytest.mark.parametrize("wrong", [-1, 8])
def test_a_codebook_is_not_left_for_the_next(wrong):
    """Tables of several codebooks lie one behind the other."""
    codes = jnp.array([[[0, 7], [wrong, 7]]])
    config = encodec.EncodecConfig(codebook_size=8, hidden_size=4)
    quantizer = encodec.EncodecResidualVectorQuantizer(config, dtype=None, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert np.isfinite(quantizer.decode(codes % 8)).all()
    with pytest.raises(UsageError, match=f"The id {wrong} {REFUSED} 7"):
        quantizer.decode(codes)

    music = musicgen.MusicgenConfig(
        vocab_size=7, num_codebooks=2, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8
    )
    decoder = musicgen.MusicgenForCausalLM(music, rngs=nnx.Rngs(0)).model
    assert np.isfinite(decoder.embed(codes % 8)).all()  # 7 is the special token
    with pytest.raises(UsageError, match=f"The id {wrong} {REFUSED} 7"):
        decoder.embed(codes)


FEATURES = np.zeros((1, 80, 3000), np.float32)
CALLS = {
    "whisper": (
        whisper.WhisperForConditionalGeneration,
        whisper.WhisperConfig.tiny,
        lambda model, n: model.generate(FEATURES, decoder_input_ids=np.array([[n]])),
        lambda config: config.vocab_size,
    ),
    "speech_to_text": (
        speech_to_text.Speech2TextForConditionalGeneration,
        speech_to_text.Speech2TextConfig,
        lambda model, n: model.generate(FEATURES.transpose(0, 2, 1)[:, :40], decoder_input_ids=np.array([[n]])),
        lambda config: config.vocab_size,
    ),
    "xls_r": (
        xls_r.SpeechEncoderDecoderModel,
        xls_r.SpeechEncoderDecoderConfig.xls_r_300m,
        lambda model, n: model.generate(np.zeros((1, 16000), np.float32), decoder_input_ids=np.array([[n]])),
        lambda config: config.decoder.vocab_size,
    ),
    "speecht5": (
        speecht5.SpeechT5ForSpeechToText,
        speecht5.SpeechT5Config,
        lambda model, n: model.generate(np.zeros((1, 16000), np.float32), decoder_input_ids=np.array([[n]])),
        lambda config: config.vocab_size,
    ),
    "seamless_m4t": (
        seamless_m4t.SeamlessM4TForTextToText,
        seamless_m4t.SeamlessM4TConfig,
        lambda model, n: model.generate(np.array([[n]]), decoder_input_ids=np.array([[3]])),
        lambda config: config.vocab_size,
    ),
    "musicgen": (
        musicgen.MusicgenForConditionalGeneration,
        musicgen.MusicgenConfig,
        lambda model, n: model.generate_codes(np.array([[n]])),
        lambda config: config.text_encoder.vocab_size,
    ),
    "bark": (
        bark.BarkCoarseModel,
        bark.BarkSubModelConfig,
        lambda model, n: model.generate(np.array([[n]])),
        lambda config: config.input_vocab_size,
    ),
}


@pytest.mark.parametrize(("cls", "configured", "call", "entries"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("wrong", [-1, 0])
def test_generation_refuses_before_it_compiles(cls, configured, call, entries, wrong):
    """The models are shapes without arrays, so whatever went on to compile would fail in another way."""
    config = configured()
    wrong = wrong if wrong < 0 else entries(config)
    with pytest.raises(UsageError, match=f"The id {wrong} {REFUSED} {entries(config) - 1}"):
        call(abstract(lambda rngs: cls(config, rngs=rngs)), wrong)


def test_the_last_id_is_one():
    check_ids(np.array([0, 4]), 5)
