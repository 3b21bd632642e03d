"""The front ends of voices: MMS' directories, the authors' phonemes, Piper's maps, and what cannot be read."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from audiozoo.errors import CheckpointError, SourceError, UsageError
from audiozoo.processors import vits
from audiozoo.processors.vits import AUTHORS_SYMBOLS, PiperTokenizer, VitsProcessor, VitsTokenizer
from audiozoo.text import phonemes


def mms(directory, letters, training_files="train.ltr", **data):
    """What lies beside MMS' `G_100000.pth`."""
    (directory / "vocab.txt").write_text("\n".join(letters) + "\n", encoding="utf-8")
    config = {"data": {"training_files": training_files, "add_blank": True, **data}, "model": {}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_mms_voice_reads_characters(tmp_path):
    processor = VitsProcessor.from_directory(mms(tmp_path, "_ abcđ-"))
    inputs = processor(["A b!", "đ"])
    assert inputs["input_ids"].tolist() == [[0, 2, 0, 1, 0, 3, 0], [0, 5, 0, 0, 0, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1] * 7, [1] * 3 + [0] * 4]
    assert processor.decode(inputs["input_ids"][0]) == "a b"
    assert processor.sentences("Ab. c? !") == [("Ab.", [0, 2, 0, 3, 0]), ("c?", [0, 4, 0])]
    with pytest.raises(UsageError, match="no symbol that this voice knows"):
        processor.sentences("?!")


def test_mms_voice_that_reads_romanised_text(tmp_path, monkeypatch):
    processor = VitsProcessor.from_directory(mms(tmp_path, "_ abcdnur", "train.uroman"))
    assert processor.tokenizer.is_uroman
    vits._uroman.cache_clear()
    monkeypatch.setitem(sys.modules, "uroman", None)
    with pytest.raises(UsageError, match="pip install uroman"):
        processor("дубна")
    assert processor("bad run")["input_ids"].shape == (1, 15)
    vits._uroman.cache_clear()


def test_the_authors_voice_reads_phonemes(tmp_path):
    config = {"data": {"text_cleaners": ["english_cleaners2"], "add_blank": True, "n_speakers": 109}, "model": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = VitsProcessor.from_directory(tmp_path)
    assert len(AUTHORS_SYMBOLS) == 178
    ids = processor("həlˈoʊ.", is_phonemes=True)["input_ids"][0]
    assert ids.tolist()[1::2] == [AUTHORS_SYMBOLS.index(c) for c in "həlˈoʊ."]
    assert not np.any(ids[::2])
    if phonemes.available():
        assert processor("Hello.")["input_ids"][0].tolist() == ids.tolist()


def voice_file(directory, name="voice", **more):
    symbols = {"_": [0], "^": [1], "$": [2], " ": [3], ".": [4], "a": [5], "b": [6], "\u0303": [7], "oo": [8, 9]}
    config = {"phoneme_id_map": symbols, "phoneme_type": "text", "speaker_id_map": {"Ann": 0, "Bob": 1}, **more}
    (directory / f"{name}.onnx.json").write_text(json.dumps(config))
    return directory


def test_piper_voice(tmp_path):
    processor = VitsProcessor.from_directory(voice_file(tmp_path))
    assert processor.speakers == {"Ann": 0, "Bob": 1}
    # Unknown phonemes are skipped; ã is a and a tilde.
    assert processor("aβã.")["input_ids"][0].tolist() == [1, 0, 5, 0, 5, 0, 7, 0, 4, 0, 2]
    assert processor.symbol(6) == "b"
    assert [text for text, _ in processor.sentences("a b. b? a")] == ["a b.", "b?", "a"]
    assert processor.sentences("b a.", is_phonemes=True) == [("b a.", [1, 0, 6, 0, 3, 0, 5, 0, 4, 0, 2])]
    assert processor.batch_decode(processor("ab")["input_ids"]) == ["ab"]
    # Of phonemes that are known together the longest; they are so again after saving, and the default voice with them.
    clusters = {"vowel_clusters": [["o", "o"], ["b", "\u0303"], ["a", "o"]], "default_speaker_id": 1}
    VitsProcessor.from_directory(voice_file(tmp_path, **clusters)).save(tmp_path)
    processor = VitsProcessor.from_directory(tmp_path)
    assert processor("bbooa")["input_ids"][0].tolist() == [1, 0, 6, 0, 6, 0, 8, 9, 0, 5, 0, 2]
    assert (processor.default_speaker, processor.speakers["Bob"]) == (1, 1)


def test_where_a_sentence_ends(tmp_path):
    """A heading has no mark but a blank line; a text without any mark is cut before it is too long."""
    letters = VitsProcessor.from_directory(mms(tmp_path, "_ abc"))
    assert [text for text, _ in letters.sentences("a b\n\nb\nc. c")] == ["a b", "b\nc.", "c"]
    assert [text for text, _ in letters.sentences("a。b！c؟ a। b۔ c")] == ["a。", "b！", "c؟", "a।", "b۔", "c"]
    endless = " ".join(["abc"] * 400)
    parts = [text for text, _ in letters.sentences(endless)]
    assert " ".join(parts) == endless
    assert max(map(len, parts)) <= vits.LONGEST
    (tmp_path / "piper").mkdir()
    piper = VitsProcessor.from_directory(voice_file(tmp_path / "piper"))
    assert [text for text, _ in piper.sentences(f"a b\n\n{endless}")] == ["a b", *parts]
    if phonemes.available():
        # Whose marks are heard is as in Piper's texts.
        assert phonemes.sentences("One، two؟ one।two。one") == ["wˌʌn, tˈuː?", "wˌʌn", "tˈuː", "wˌʌn"]
        assert phonemes.sentences("One\n\nIt was late, \n\nso\nwe left") == ["wˌʌn", "ɪt wʌz lˈeɪt,", "sˌoʊ wiː lˈɛft"]


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(SourceError, match="no directory"):
        VitsProcessor.from_directory(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="symbols are not known"):
        VitsProcessor.from_directory(tmp_path)
    voice_file(tmp_path)
    voice_file(tmp_path, "other")
    with pytest.raises(CheckpointError, match=r"several voices \(other\.onnx\.json, voice\.onnx\.json\)"):
        VitsProcessor.from_directory(tmp_path)
    with pytest.raises(CheckpointError, match=r"no '\$'"):
        PiperTokenizer({"_": [0], "^": [1]})
    with pytest.raises(CheckpointError, match="'pinyin'"):
        PiperTokenizer({"_": [0], "^": [1], "$": [2]}, phoneme_type="pinyin")
    given = VitsProcessor(PiperTokenizer({"_": [0], "^": [1], "$": [2], "a": [3]}, phoneme_type="japanese"))
    assert given.sentences("a", is_phonemes=True) == [("a", [1, 0, 3, 0, 2])]
    for read in (given.sentences, given):
        with pytest.raises(UsageError, match="kind 'japanese', which audiozoo cannot make of a text"):
            read("a")
    (tmp_path / "broken.json").write_text('{"audio": {}}')
    with pytest.raises(CheckpointError, match="no phoneme_id_map"):
        PiperTokenizer.from_file(tmp_path / "broken.json")


def test_texts_that_cannot_be_said():
    processor = VitsProcessor(VitsTokenizer({"_": 0, "a": 1}, phonemize=False, pad_token="_", unk_token=None))
    for text, sentence in (
        ([], "no text"),
        (b"a", "not a bytes|not a int"),
        ([3], "not a int"),
        (["a", None], "NoneType"),
    ):
        with pytest.raises(UsageError, match=sentence):
            processor(text)
    with pytest.raises(UsageError, match="no symbol 'b'"):
        processor("b", normalize=False)
    with pytest.raises(UsageError, match="return_tensors"):
        processor("a", return_tensors="pt")


def test_without_espeak_the_sentence_says_what_to_install(monkeypatch):
    def missing():
        raise phonemes.PhonemizerMissingError("Turning text into phonemes needs espeak-ng: pip install espeakng-loader")

    monkeypatch.setattr(phonemes, "espeak", missing)
    assert not phonemes.available()
    processor = VitsProcessor(PiperTokenizer({"_": [0], "^": [1], "$": [2], "a": [3]}))
    with pytest.raises(phonemes.PhonemizerMissingError, match="pip install espeakng-loader"):
        processor.sentences("text")
    assert processor.sentences("a", is_phonemes=True) == [("a", [1, 0, 3, 0, 2])]


@pytest.mark.skipif(not phonemes.available(), reason="espeak-ng is not installed: pip install espeakng-loader")
def test_threads_take_turns_with_espeak():
    """Recordings are prepared for training by several."""
    texts = [f"This is sentence number {number}, and so on. Next, please!" for number in range(200)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(phonemes.sentences, texts)) == list(map(phonemes.sentences, texts))
