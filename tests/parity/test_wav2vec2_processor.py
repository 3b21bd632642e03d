"""The processor against `transformers`, on the same files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

import audiozoo
from audiozoo import cli
from audiozoo.decoding.ctc import collapse
from audiozoo.processors.wav2vec2 import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor
from tests.parity.speech_family import TINY
from tests.parity.test_wav2vec2 import SETTINGS, fairseq_names
from weights_conversion import alphabets
from weights_conversion.readers import Record

LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAOINSHRDLUMWCFGYPBVK'XJQZ"]
VOCABULARY = {token: index for index, token in enumerate(LETTERS)}
PHONEMES = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", "n", "s", "t", "ə", "l", "aɪ", "tʃ", "|"])}
NESTED = {
    "eng": {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "a": 5, "b": 6},
    "fra": {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "é": 5, "a": 6, "c": 7, "ch": 8},
}


def waves():
    rng = np.random.default_rng(0)
    return [0.3 + 0.1 * rng.standard_normal(n).astype(np.float32) for n in (4000, 2500, 3999)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 3000, "truncation": True},
        {"pad_to_multiple_of": 512},
        {"padding": "max_length", "max_length": 5000},
    ],
)
def test_features(normalize, options, tmp_path):
    theirs = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=True)
    theirs.save_pretrained(tmp_path)
    ours = Wav2Vec2FeatureExtractor.from_directory(tmp_path)
    options = {"padding": True} | options
    wanted = theirs(waves(), sampling_rate=16_000, return_tensors="np", **options)
    found = ours(waves(), sampling_rate=16_000, **options)
    assert set(found) == set(wanted)
    np.testing.assert_allclose(found["input_values"], wanted["input_values"], atol=1e-5)
    np.testing.assert_array_equal(found["attention_mask"], wanted["attention_mask"])
    ours.save(tmp_path / "ours")
    back = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "ours")
    assert (back.do_normalize, back.return_attention_mask) == (normalize, True)


def test_without_a_mask_each_waveform_is_normalised_by_itself():
    """The original takes the padding for sound when it returns no mask; we do not."""
    theirs = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)
    ours = Wav2Vec2FeatureExtractor(return_attention_mask=False)
    alone = theirs(waves()[1], sampling_rate=16_000, return_tensors="np")["input_values"][0]
    wanted = theirs(waves(), sampling_rate=16_000, padding=True, return_tensors="np")["input_values"][1, :2500]
    found = ours(waves(), sampling_rate=16_000)
    assert set(found) == {"input_values"}
    np.testing.assert_allclose(found["input_values"][1, :2500], alone, atol=1e-5)
    assert np.abs(wanted - alone).max() > 0.1


def tokenizers(tmp_path, vocabulary=VOCABULARY, phonemes=False, **options):
    (tmp_path / "raw.json").write_text(json.dumps(vocabulary))
    if phonemes:
        theirs = transformers.Wav2Vec2PhonemeCTCTokenizer(tmp_path / "raw.json", do_phonemize=False, **options)
    else:
        theirs = transformers.Wav2Vec2CTCTokenizer(tmp_path / "raw.json", **options)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, Wav2Vec2CTCTokenizer.from_directory(tmp_path / "theirs")


def paths(size: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [np.repeat(rng.integers(0, size, 30), rng.integers(1, 4, 30)) for _ in range(8)] + [np.zeros(5, int)]


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_decoding(tmp_path, lower, skip):
    theirs, ours = tokenizers(tmp_path, do_lower_case=lower)
    for path in paths(len(LETTERS)):
        assert ours.decode(path, skip_special_tokens=skip) == theirs.decode(path, skip_special_tokens=skip)
        assert ours.decode(path, group_tokens=False) == theirs.decode(path, group_tokens=False)
        wanted = theirs.decode(path, skip_special_tokens=skip, output_char_offsets=True, output_word_offsets=True)
        found = ours.decode(path, skip_special_tokens=skip, output_char_offsets=True, output_word_offsets=True)
        assert found.text == wanted.text
        assert found.char_offsets == wanted.char_offsets
        assert found.word_offsets == wanted.word_offsets
    batch = np.stack([p[:30] for p in paths(len(LETTERS))[:4]])
    assert ours.batch_decode(batch) == theirs.batch_decode(batch)


def test_spaces_before_marks(tmp_path):
    """`transformers` 4 wrote this setting into files."""
    marks = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abnst'.,?"])}
    theirs, ours = tokenizers(tmp_path, marks, clean_up_tokenization_spaces=True)
    for path in paths(len(marks)):
        assert ours.decode(path) == theirs.decode(path)
        assert ours.tokens_to_text([ours.decoder[s.text] for s in collapse(path)]) == theirs.decode(path)
    ours.save(tmp_path / "ours")
    assert Wav2Vec2CTCTokenizer.from_directory(tmp_path / "ours").decode([5, 4, 10, 4, 6, 4, 13]) == "a'b?"


@pytest.mark.parametrize("lower", [False, True])
def test_encoding(tmp_path, lower):
    theirs, ours = tokenizers(tmp_path, do_lower_case=lower)
    texts = ["HELLO WORLD", "it's a dog", "ÉTÉ 42", "A <unk> B", ""]
    for text in texts:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
    wanted = theirs(texts, padding=True)
    found = ours(texts, padding=True)
    assert found["input_ids"] == wanted["input_ids"]
    assert found["attention_mask"] == wanted["attention_mask"]


@pytest.mark.parametrize("keep", [True, False])
def test_phonemes(tmp_path, keep):
    theirs, ours = tokenizers(tmp_path, PHONEMES, phonemes=True, word_delimiter_token="|" if keep else None)
    assert ours.phonemes
    for path in paths(len(PHONEMES)):
        for options in ({}, {"filter_word_delimiter_token": False}):
            assert ours.decode(path, **options) == theirs.decode(path, **options)
        wanted = theirs.decode(path, output_char_offsets=True)
        found = ours.decode(path, output_char_offsets=True)
        assert (found.text, found.char_offsets) == (wanted.text, wanted.char_offsets)


def test_languages(tmp_path):
    theirs, ours = tokenizers(tmp_path, NESTED, target_lang="eng")
    for language in ("eng", "fra", "eng"):
        theirs.set_target_lang(language)
        ours.set_target_lang(language)
        for path in paths(len(NESTED[language]), seed=3):
            assert ours.decode(path) == theirs.decode(path)
        for text in ("abé", "a b", *(["chac"] if language == "fra" else [])):
            assert ours(text)["input_ids"] == theirs(text)["input_ids"], (language, text)
    # Back in English the original still knows the French "ch"; its index is outside the English vocabulary.
    assert theirs("chac")["input_ids"] == [8, 5, 3]
    assert ours("chac")["input_ids"] == [3, 3, 5, 3]


def test_a_processor_that_we_save_loads_there(tmp_path):
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(VOCABULARY))
    processor.save(tmp_path)
    theirs = transformers.Wav2Vec2Processor.from_pretrained(tmp_path)
    wanted = theirs(waves()[0], sampling_rate=16_000, text="HELLO")
    found = processor(waves()[0], sampling_rate=16_000, text="HELLO")
    np.testing.assert_allclose(found["input_values"][0], np.asarray(wanted["input_values"]).reshape(-1), atol=1e-5)
    assert found["labels"][0].tolist() == list(np.asarray(wanted["labels"]).reshape(-1))


# --- authors' files --------------------------------------------------------------------------------------------------


def fairseq_file(path, head, settings, cut="lm_head", **content):
    """A tiny model of `transformers` under fairseq's names."""
    config = transformers.Wav2Vec2Config(**(TINY | {"num_labels": 3, "vocab_size": 7}))
    state = fairseq_names(getattr(transformers, f"Wav2Vec2{head}")(config).state_dict(), False)
    heads = {"lm_head": "proj", "projector": "pooling_layer.linear", "classifier": "pooling_layer.projection"}
    renamed = {}
    for name, tensor in state.items():
        start, _, rest = name.partition(".")
        renamed[f"w2v_encoder.{heads[start]}.{rest}" if start in heads else f"w2v_encoder.w2v_model.{name}"] = tensor
    cfg = {"model": {"_name": "wav2vec_ctc", "w2v_args": {"model": SETTINGS}}, "task": settings}
    torch.save({"model": renamed, "cfg": cfg, **content}, path)
    return path


def test_letters_of_fairseqs_files(tmp_path):
    """Beside the file, or in it; and what is exported has them, with how its waveforms are normalised."""
    beside = fairseq_file(tmp_path / "beside.pt", "ForCTC", {"normalize": False})
    with pytest.raises(ValueError, match=r"dict\.ltr\.txt"):
        audiozoo.load_processor(beside).decode([1])
    (tmp_path / "dict.ltr.txt").write_text("| 94802\nE 51860\nT 38431 #fairseq:overwrite\n")
    processor = audiozoo.load_processor(beside)
    assert processor.tokenizer.tokens() == ["<pad>", "<s>", "</s>", "<unk>", "|", "E", "T"]
    assert not processor.feature_extractor.do_normalize
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "aɪ", "n", "ə"]
    symbols = Record("fairseq.data.dictionary.Dictionary", state={"symbols": symbols})
    assert alphabets.symbols_of(symbols)[4:] == ["aɪ", "n", "ə"]
    assert Wav2Vec2CTCTokenizer.from_symbols(alphabets.symbols_of(symbols)[4:]).phonemes
    cli._convert(str(beside), tmp_path / "hub", None, "float32", False, to_hugging_face=True)
    theirs = transformers.Wav2Vec2Processor.from_pretrained(tmp_path / "hub")
    assert theirs.decode([4, 5, 5, 0, 5, 6]) == processor.decode([4, 5, 5, 0, 5, 6]) == "EET"
    assert not theirs.feature_extractor.do_normalize


def test_names_of_fairseqs_classes(tmp_path):
    """A classifier's names come from the dictionary beside it, whose lines are all its entries."""
    path = fairseq_file(tmp_path / "lid.pt", "ForSequenceClassification", {"normalize": True})
    with pytest.warns(UserWarning, match=r"names of its 3 classes.* list of them beside it: dict\.lang\.txt"):
        assert audiozoo.load(path).config.id2label == ("LABEL_0", "LABEL_1", "LABEL_2")
    (tmp_path / "dict.lang.txt").write_text("eng 3\nfra 2\ndeu 1\n")
    model, processor = audiozoo.load(path), audiozoo.load_processor(path)
    assert type(model).__name__ == "Wav2Vec2ForSequenceClassification"
    assert model.config.id2label == ("eng", "fra", "deu")
    assert processor.feature_extractor.do_normalize
    with pytest.raises(ValueError, match="no vocabulary"):
        processor.decode([1])
