"""Ids that a model does not have are refused before anything is compiled; the last that it has is taken."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from audiozoo.errors import UsageError
from audiozoo.layers import Embed, abstract, check_ids
from audiozoo.models import bark, musicgen, seamless_m4t, speech_to_text, speecht5, whisper

REFUSED = "is none of this model's: they are 0 to"


def test_a_table_takes_its_own_indices_only():
    table = Embed(5, 2, rngs=nnx.Rngs(0))
    assert np.array_equal(table(jnp.array([[0, 4]])), table.embedding[...][jnp.array([[0, 4]])])
    for wrong in (-1, 5):
        with pytest.raises(UsageError, match=f"The id {wrong} {REFUSED} 4"):
            table(jnp.array([[0, wrong]]))
    assert table(jnp.zeros((0, 3), jnp.int32)).shape == (0, 3, 2)


def test_inside_a_program_nothing_is_known():
    table = Embed(5, 2, rngs=nnx.Rngs(0))
    assert np.isnan(jax.jit(lambda ids: table(ids))(jnp.array([5]))).all()


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
