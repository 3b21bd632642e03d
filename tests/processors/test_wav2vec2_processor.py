"""wav2vec 2.0's processor by itself: files, languages, what it refuses, and the way from sound to words."""

from __future__ import annotations

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from audiozoo.decoding import ctc
from audiozoo.errors import UsageError
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


def test_a_search_is_told_what_it_is_to_know(monkeypatch):
    """And how wide it is to be; one of what it may know is reason enough for one."""
    told = {}

    def beam_search(model, **options):
        search = Wav2Vec2Processor.beam_search(PROCESSOR, model, **options)
        told.update(options)
        return lambda logits, beam_width: told.update(beam_width=beam_width) or search(logits, beam_width=beam_width)

    monkeypatch.setattr(PROCESSOR, "beam_search", beam_search, raising=False)
    lexicon = {"AAB": ["Aab!"], "CA": ["ca?"]}
    model = ctc.NgramModel({("AAB",): (-1.0, 0.0)})
    weights = {"alpha": 0.6, "beta": 0.7, "hotword_weight": 0.8}
    for how in ({"lexicon": lexicon}, {"hotwords": ["CA"]}, {"language_model": model}, {"beam_width": 7}):
        told.clear()
        heard = ctc.transcribe_ctc(Spelled(), PROCESSOR, spoken(PATH), **how, **weights)
        assert {k: v for k, v in told.items() if k in weights} == weights
        assert told["beam_width"] == how.get("beam_width", 100)
        text = "Aab! ca?" if "lexicon" in how else "AAB CA"
        assert heard.text == " ".join(w["text"] for w in heard.words) == text
    silence = ctc.transcribe_ctc(Spelled(), PROCESSOR, spoken([0] * 4), beam_width=7)
    assert (silence.text, silence.words, silence.duration) == ("", [], (4 * 320 + 80) / 16_000)
    told.clear()
    ctc.transcribe_ctc(Spelled(), PROCESSOR, spoken(PATH), beam_width=1, **weights)
    assert not told, "a beam of one is no search"


def test_regions_of_speech(monkeypatch):
    """Each as if alone, at its own time; what is too short, and what says nothing, adds nothing."""
    parts = [spoken(PATH), spoken([0] * 20), spoken([5]), spoken([0, 7, 0, 0, 0])]
    edges = np.cumsum([0, *map(len, parts)])
    regions = list(itertools.pairwise(edges))
    monkeypatch.setattr(ctc, "spoken_samples", lambda audio, rate, vad: regions)
    heard = ctc.transcribe_ctc(Spelled(), PROCESSOR, np.concatenate(parts), vad={})
    assert heard.text == "AAB CA C"
    assert [c["text"] for c in heard.characters] == list("AABCAC")
    assert heard.characters[-1] == heard.words[-1]
    start = round(edges[3] / 16_000 + 0.02, 3)
    assert (heard.words[-1]["start"], heard.words[-1]["end"]) == (start, round(start + 0.02, 3))
    assert heard.duration == edges[-1] / 16_000


def test_any_token_may_be_padding_and_heads_may_have_columns_without_one(monkeypatch):
    vocabulary = {"A": 0, "|": 1, "B": 2, "<pad>": 3, "<s>": 4, "<unk>": 5}  # `</s>` behind it, and then one of no name
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(do_normalize=False), Wav2Vec2CTCTokenizer(vocabulary))
    wave = spoken([3, 0, 3, 0, 2, 1, 4, 5, 6, 7, 2, 3])
    heard = ctc.transcribe_ctc(Spelled(), processor, wave)
    assert heard.text == "AAB B"
    wave = spoken([3, 0, 3, 0, 2, 1, 3, 2, 3])
    named = Wav2Vec2Processor(processor.feature_extractor, Wav2Vec2CTCTokenizer(vocabulary | {"C": 6}))
    assert ctc.transcribe_ctc(Spelled(), named, wave, beam_width=9).text == "AAB B"
    few = Wav2Vec2CTCTokenizer({t: i for t, i in vocabulary.items() if i < 4}, bos_token=None, eos_token=None)
    words = ctc.align(Spelled(), Wav2Vec2Processor(processor.feature_extractor, few), wave, "aab b")
    assert [w["text"] for w in words] == ["aab", "b"]
    windows, alignment = [], ctc.forced_alignment
    monkeypatch.setattr(ctc, "forced_alignment", lambda *a, **o: windows.append(o.get("window")) or alignment(*a, **o))
    words = ctc.align(Spelled(), processor, wave, "aab b", window=12)
    assert [(w["text"], w["start"], w["end"]) for w in words] == [("aab", 0.02, 0.1), ("b", 0.14, 0.16)]
    assert windows == [12]


def test_languages_of_a_model_that_holds_one():
    processor = Wav2Vec2Processor(PROCESSOR.feature_extractor, Wav2Vec2CTCTokenizer(NESTED, target_lang="eng"))
    assert ctc.transcribe_ctc(Spelled(), processor, spoken(PATH), language="eng").text == "AAB CA"
    with pytest.raises(UsageError, match="load the adapters of fra into it"):
        ctc.transcribe_ctc(Spelled(), processor, spoken(PATH), language="fra")

    class One(Spelled):
        def speaking(self, language):
            assert language == "eng"
            return self

    one = One()
    one.config.languages = ("eng",)
    assert ctc.transcribe_ctc(one, processor, spoken(PATH)).text == "AAB CA"


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
    delimited = {"|" if token == "<unk>" else token: index for token, index in vocabulary.items()}
    spaced = Wav2Vec2Processor(processor.feature_extractor, Wav2Vec2CTCTokenizer(delimited, phonemes=True))
    assert [w["text"] for w in ctc.transcribe_ctc(Spelled(), spaced, spoken([4, 3, 5])).words] == ["n", "aɪ"]
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
