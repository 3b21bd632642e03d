"""wav2vec 2.0's processor by itself: files, languages, what it refuses, and the way from sound to words."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from audiozoo.decoding import ctc
from audiozoo.processors.wav2vec2 import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

VOCABULARY = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 6, "C": 7}
NESTED = {"eng": VOCABULARY, "fra": {"<pad>": 0, "|": 1, "É": 2}}


def test_normalisation():
    wave = (3.0 + 2.0 * np.random.default_rng(0).standard_normal(1000)).astype(np.float32)
    values = Wav2Vec2FeatureExtractor()(wave, 16_000)["input_values"]
    assert values.shape == (1, 1000)
    assert values.mean() == pytest.approx(0, abs=1e-5)
    assert values.std() == pytest.approx(1, abs=1e-4)
    np.testing.assert_array_equal(Wav2Vec2FeatureExtractor(do_normalize=False)(wave, 16_000)["input_values"][0], wave)


@pytest.mark.parametrize(
    ("wave", "rate", "message"),
    [
        (np.zeros(0, np.float32), 16_000, "empty"),
        (np.full(1000, np.nan, np.float32), 16_000, "NaN|finite"),
        (np.zeros(399, np.float32), 16_000, "400"),
        (np.zeros((1000, 2), np.float32), 16_000, "one channel"),
        (np.zeros(1000, np.int16), 16_000, "int"),
        (np.zeros(1000, np.float32), 8_000, "16000"),
    ],
)
def test_refuses(wave, rate, message):
    with pytest.raises(ValueError, match=message):
        Wav2Vec2FeatureExtractor()(wave, rate)


def test_fairseq_dictionaries(tmp_path):
    (tmp_path / "dict.ltr.txt").write_text("| 94802\nE 51860\nT 38431\n")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    processor = Wav2Vec2Processor.from_directory(tmp_path)
    assert processor.tokenizer.tokens() == ["<pad>", "<s>", "</s>", "<unk>", "|", "E", "T"]
    assert not processor.feature_extractor.do_normalize


def test_languages():
    with pytest.raises(ValueError, match="choose one: eng, fra"):
        Wav2Vec2CTCTokenizer(NESTED)
    tokenizer = Wav2Vec2CTCTokenizer(NESTED, target_lang="fra")
    assert tokenizer.decode([2, 2, 1, 2]) == "É É"
    assert tokenizer.word_ids("e\u0301|\u0301é") == [2, 2]  # composed or not
    assert PROCESSOR.tokenizer.word_ids("Äb|ç<s>") == [5, 6, 7]  # what is left of a letter without its accent
    with pytest.raises(ValueError, match="no vocabulary for 'deu'"):
        tokenizer.set_target_lang("deu")
    with pytest.raises(ValueError, match="not divided into languages"):
        Wav2Vec2CTCTokenizer(VOCABULARY).set_target_lang("eng")


def test_no_vocabulary(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    processor = Wav2Vec2Processor.from_directory(tmp_path)
    assert processor(np.zeros(500, np.float32), 16_000)["input_values"].shape == (1, 500)
    with pytest.raises(ValueError, match="no vocabulary"):
        processor.decode([1])


class Spelled(nnx.Module):
    """A stand-in for a recogniser: a frame's letter is the loudness of its first sample."""

    class Config:
        inputs_to_logits_ratio = 320
        feat_extract_norm = "layer"

    def __init__(self):
        self.config = self.Config()
        self.scale = nnx.Param(jnp.float32(1.0))

    @property
    def backbone(self):
        return self

    def frame_lengths(self, samples):
        return (samples - 400) // 320 + 1

    def __call__(self, values, mask=None):
        frames = self.frame_lengths(values.shape[1])
        first = values[:, jnp.arange(frames) * 320] * self.scale[...]
        return type("Output", (), {"logits": -20 * jnp.abs(first[..., None] - jnp.arange(8.0) / 10)})


def spoken(path):
    wave = np.zeros(320 * len(path) + 80, np.float32)
    wave[np.arange(len(path)) * 320] = np.asarray(path) / 10
    return wave


PROCESSOR = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(do_normalize=False), Wav2Vec2CTCTokenizer(VOCABULARY))
PATH = [0, 0, 5, 5, 0, 5, 6, 0, 0, 4, 4, 0, 7, 7, 7, 0, 5, 0]


@pytest.mark.parametrize("options", [{}, {"beam_width": 20}, {"chunk_length_s": 0.2, "stride_length_s": 0.04}])
def test_transcribe(options):
    result = ctc.transcribe_ctc(Spelled(), PROCESSOR, spoken(PATH), **options)
    assert result.text == "AAB CA"
    assert [(w["text"], w["start"], w["end"]) for w in result.words] == [("AAB", 0.04, 0.14), ("CA", 0.24, 0.34)]
    assert [c["text"] for c in result.characters] == list("AABCA")
    assert all(0.7 < w["score"] <= 1 for w in result.words)


def test_a_score_is_a_mean_over_frames():
    path = [0, 5, 5.3, 0, 6, 0]  # the second frame of the A is less clear than the first
    a, also_a, b = (
        np.exp(-2 * abs(x - k)) / np.exp(-2 * np.abs(x - np.arange(8))).sum() for x, k in ((5, 5), (5.3, 5), (6, 6))
    )
    for heard in (ctc.transcribe_ctc(Spelled(), PROCESSOR, spoken(path), beam_width=n) for n in (None, 9)):
        assert [c["score"] for c in heard.characters] == pytest.approx([(a + also_a) / 2, b], abs=1e-4)
        assert heard.words[0]["score"] == pytest.approx((a + also_a + b) / 3, abs=1e-4)
    (word,) = ctc.align(Spelled(), PROCESSOR, spoken(path), "ab")
    assert word["score"] == pytest.approx((a + also_a + b) / 3, abs=1e-4)


def test_special_tokens_behind_the_vocabulary():
    """Where `vocab.json` lacks `<s>` and `</s>`, heads have a column for them, or not; the star is beyond them."""
    letters = {"<pad>": 0, "<unk>": 1, "|": 2, "A": 3, "B": 4, "C": 5}  # of eight columns
    for vocabulary, last, text in ((letters, [], "ab c"), (letters | {"D": 6, "E": 7}, [6, 0], "ab cd")):
        tokenizer = Wav2Vec2CTCTokenizer(vocabulary, do_lower_case=True)
        processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(do_normalize=False), tokenizer)
        path = [0, 3, 3, 0, 4, 2, 5, 0]
        found = ctc.transcribe_ctc(Spelled(), processor, spoken(path + last), beam_width=9)
        assert found.text == " ".join(w["text"] for w in found.words) == text
        assert "".join(c["text"] for c in found.characters) == text.replace(" ", "")
        assert ctc.transcribe_ctc(Spelled(), processor, spoken([*path, 6, 0])).text == text
        # Stars that nothing stands between, or nothing that the model knows, are one, which needs no blank.
        for stars in ("<star>", "<star> <star>", "<star> 1 <star>"):
            words = ctc.align(Spelled(), processor, spoken([3, 0, 7, 0, 5, 0]), f"a {stars} c")
            assert [(w["text"], w["start"], w["end"]) for w in words] == [("a", 0.0, 0.02), ("c", 0.08, 0.1)], stars


def test_phonemes_are_words():
    """Heard, spaced as in the text; and aligned, several characters a phoneme."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "n": 4, "aɪ": 5, "tʃ": 6, "ə": 7}
    tokenizer = Wav2Vec2CTCTokenizer(vocabulary, word_delimiter_token=None, phonemes=True)
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(do_normalize=False), tokenizer)
    path = [4, 4, 0, 5, 6, 6, 0, 7]
    result = ctc.transcribe_ctc(Spelled(), processor, spoken(path))
    assert result.text == "n aɪ tʃ ə" == result.segments()[0]["text"]
    assert [(w["text"], w["start"]) for w in result.words] == [("n", 0.0), ("aɪ", 0.06), ("tʃ", 0.08), ("ə", 0.14)]
    assert ctc.transcribe_ctc(Spelled(), processor, spoken(path), beam_width=9).text == "n aɪ tʃ ə"
    aligned = ctc.align(Spelled(), processor, spoken(path), "n aɪ tʃ ə")
    assert [(w["text"], w["start"]) for w in aligned] == [("n", 0.0), ("aɪ", 0.06), ("tʃ", 0.08), ("ə", 0.14)]


def test_texts_become_phonemes(tmp_path):
    """As in `transformers`, where the files do not say otherwise: by espeak-ng, without stress and punctuation."""
    vocabulary = {p: i for i, p in enumerate(["<pad>", "<s>", "</s>", "<unk>", "h", "ə", "l", "oʊ", "w", "ɜː", "d"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    kind = {"tokenizer_class": "Wav2Vec2PhonemeCTCTokenizer", "phonemizer_lang": "en-us", "word_delimiter_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind))
    tokenizer = Wav2Vec2CTCTokenizer.from_directory(tmp_path)
    assert tokenizer("Hello, world! It")["input_ids"] == [4, 5, 6, 7, 8, 9, 6, 10, 3, 3]
    assert tokenizer.word_ids("World!") == [8, 9, 6, 10]
    tokenizer.save(tmp_path / "again")
    assert Wav2Vec2CTCTokenizer.from_directory(tmp_path / "again").phonemizer_lang == "en-us"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind | {"do_phonemize": False}))
    assert Wav2Vec2CTCTokenizer.from_directory(tmp_path)("h ə l oʊ")["input_ids"] == [4, 5, 6, 7]


def test_align():
    words = ctc.align(Spelled(), PROCESSOR, spoken(PATH), "aab ca")
    assert [(w["text"], w["start"], w["end"]) for w in words] == [("aab", 0.04, 0.14), ("ca", 0.24, 0.34)]
    # The star before the first letter takes all of its frames but one.
    words = ctc.align(Spelled(), PROCESSOR, spoken(PATH), "ca", star=True)
    assert [(w["text"], w["start"], w["end"]) for w in words] == [("ca", 0.28, 0.34)]
    with pytest.raises(ValueError, match="no letter"):
        ctc.align(Spelled(), PROCESSOR, spoken(PATH), "123 !")
    with pytest.raises(ValueError, match="too few"):
        ctc.align(Spelled(), PROCESSOR, spoken(PATH), "abc" * 20)
