"""fairseq S2T's processor against `transformers`, on the same files; and silence, where the original fails."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import transformers

from audiozoo.errors import SourceError
from audiozoo.processors.speech_to_text import (
    Speech2TextFeatureExtractor,
    Speech2TextProcessor,
    Speech2TextTokenizer,
    utterance_cmvn,
)
from tests.tolerances import tolerance

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "der schnelle braune Fuchs",
    "ein Hund und a dog",
    "it is a fox , is it not ?",
]


def waves():
    rng = np.random.default_rng(0)
    time = np.arange(48_000) / 16_000
    tone = 0.3 * np.sin(2 * np.pi * (200 * time + 300 * time**2)) + 0.01 * rng.standard_normal(48_000)
    return [tone.astype(np.float32), 0.1 * rng.standard_normal(9_999).astype(np.float32), tone[:400].astype(np.float32)]


def close(ours, theirs):
    allowed = tolerance("features", "float32")
    np.testing.assert_allclose(ours, theirs, rtol=allowed.rtol, atol=allowed.atol)


def test_filterbanks():
    theirs = transformers.Speech2TextFeatureExtractor(do_ceptral_normalize=False)
    ours = Speech2TextFeatureExtractor(do_ceptral_normalize=False)
    for wave in waves():
        wanted = theirs(wave, sampling_rate=16_000, return_tensors="np")["input_features"]
        close(ours(wave, 16_000)["input_features"], wanted)


@pytest.mark.parametrize("normalize", [(True, True), (True, False), (False, True), (False, False)])
def test_normalisation(normalize):
    """The original's formula on the same frames; in float64, as it sums a thousand frames one by one in float32."""
    rng = np.random.default_rng(0)
    x = (15 + 3 * rng.standard_normal((900, 8))).astype(np.float32)
    wanted = transformers.Speech2TextFeatureExtractor.utterance_cmvn(x.astype(np.float64), 900, *normalize)
    close(utterance_cmvn(x, *normalize), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pad_to_multiple_of": 64},
        {"padding": "max_length", "max_length": 400},
        {"padding": "max_length", "max_length": 50, "truncation": True},
    ],
)
def test_batches(options, tmp_path):
    theirs = transformers.Speech2TextFeatureExtractor()
    theirs.save_pretrained(tmp_path)
    ours = Speech2TextFeatureExtractor.from_directory(tmp_path)
    batch, options = waves()[:2], {"padding": True} | options
    wanted = theirs(batch, sampling_rate=16_000, return_tensors="np", **options)
    found = ours(batch, 16_000, **options)
    assert set(found) == set(wanted)
    np.testing.assert_array_equal(found["attention_mask"], wanted["attention_mask"])
    # Both are rounded to float32 before they are normalised, the original once more in between: a few steps of 2^-20.
    np.testing.assert_allclose(found["input_features"], wanted["input_features"], atol=1e-4)
    ours.save(tmp_path / "ours")
    back = transformers.Speech2TextFeatureExtractor.from_pretrained(tmp_path / "ours")
    assert json.loads(back.to_json_string()) == json.loads(theirs.to_json_string())


def test_silence_survives():
    """The original divides by a standard deviation of zero: infinities or NaN, and so is all that the model makes."""
    silence = np.zeros(16_000, np.float32)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        theirs = transformers.Speech2TextFeatureExtractor()(silence, sampling_rate=16_000, return_tensors="np")
    assert not np.isfinite(theirs["input_features"]).any()
    ours = Speech2TextFeatureExtractor()(silence, 16_000)["input_features"]
    assert np.isfinite(ours).all()
    assert np.abs(ours).max() < 1e-3


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A SentencePiece model with the special tokens where fairseq has them, and a vocabulary that numbers it anew."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "text.txt").write_text("\n".join(TEXTS * 30))
    languages = [f"<lang:{code}>" for code in ("pt", "fr", "ru", "nl", "ro", "it", "es", "de")]
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "sentencepiece.bpe"), vocab_size=70,
        hard_vocab_limit=False, minloglevel=2, bos_id=0, pad_id=1, eos_id=2, unk_id=3,
        user_defined_symbols=",".join(languages),
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
    tokens = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    encoder = {token: index for index, token in enumerate(tokens[:-3])}  # three pieces are unknown
    (folder / "vocab.json").write_text(json.dumps(encoder))
    return folder


@pytest.mark.parametrize("case", ["one language", "capitals", "small letters", "eight languages"])
def test_pieces_of_words(vocabulary, case, tmp_path):
    options = {
        "one language": {},
        "capitals": {"do_upper_case": True, "clean_up_tokenization_spaces": True},
        "small letters": {"do_lower_case": True},
        "eight languages": {"lang_codes": "mustc", "tgt_lang": "de"},
    }[case]
    theirs = transformers.Speech2TextTokenizer(
        str(vocabulary / "vocab.json"), str(vocabulary / "sentencepiece.bpe.model"), **options
    )
    theirs.save_pretrained(tmp_path)
    ours = Speech2TextTokenizer.from_directory(tmp_path)
    lines = [*TEXTS, "A Fox, zwölf!", "", "unknown </s> inside"]
    for line in lines:
        # The original has an option for small letters and does not heed it.
        wanted = theirs(line.lower() if case == "small letters" else line)["input_ids"]
        assert ours(line)["input_ids"] == wanted, line
        for skip in (True, False):
            assert ours.decode(wanted, skip) == theirs.decode(wanted, skip_special_tokens=skip), line
    lines = [line.lower() for line in TEXTS] if case == "small letters" else TEXTS
    batch, wanted = ours(TEXTS, padding=True), theirs(lines, padding=True)
    assert batch["input_ids"] == wanted["input_ids"]
    assert batch["attention_mask"] == wanted["attention_mask"]
    if case == "eight languages":
        assert ours.lang_code_to_id == theirs.lang_code_to_id
        ours.set_target_lang("fr")
        theirs.tgt_lang = "fr"
        assert ours("a dog")["input_ids"] == theirs("a dog")["input_ids"]
        with pytest.raises(ValueError, match="no language 'xx'"):
            ours.set_target_lang("xx")
    ours.save(tmp_path / "ours")
    back = transformers.Speech2TextTokenizer.from_pretrained(tmp_path / "ours")
    assert back(lines)["input_ids"] == ours(TEXTS)["input_ids"]


def test_the_processor(vocabulary, tmp_path):
    theirs = transformers.Speech2TextProcessor(
        transformers.Speech2TextFeatureExtractor(),
        transformers.Speech2TextTokenizer(
            str(vocabulary / "vocab.json"), str(vocabulary / "sentencepiece.bpe.model"), lang_codes="mustc"
        ),
    )
    theirs.save_pretrained(tmp_path)
    ours = Speech2TextProcessor.from_directory(tmp_path, "de")
    inputs = ours(waves()[1], 16_000, text=TEXTS[0])
    assert inputs["labels"][0].tolist() == ours(text=TEXTS[0])["input_ids"]
    assert inputs["labels"][0, 0] == ours.tokenizer.lang_code_to_id["de"]
    assert ours.batch_decode(inputs["labels"], skip_special_tokens=True) == [TEXTS[0]]
    # fairseq's own files: a dictionary in the order of its numbers, and the model beside it.
    encoder = json.loads((vocabulary / "vocab.json").read_text())
    folder = tmp_path / "fairseq"
    folder.mkdir()
    (folder / "spm_unigram.txt").write_text("".join(f"{token} 1\n" for token in list(encoder)[4:]))
    (folder / "spm_unigram.model").write_bytes((vocabulary / "sentencepiece.bpe.model").read_bytes())
    again = Speech2TextProcessor.from_directory(folder, "de")
    assert again(text=TEXTS)["input_ids"] == ours(text=TEXTS)["input_ids"]
    # Beside another one, its settings say which it is.
    (folder / "spm_other.txt").write_text("a 1\n")
    (folder / "spm_other.model").write_bytes((vocabulary / "sentencepiece.bpe.model").read_bytes())
    with pytest.raises(SourceError, match="several files"):
        Speech2TextProcessor.from_directory(folder)
    (folder / "config_st.yaml").write_text("vocab_filename: spm_unigram.txt\n")
    assert Speech2TextProcessor.from_directory(folder, "de")(text=TEXTS) == ours(text=TEXTS)
    # Other corpora have other languages, CoVoST such as zh-CN.
    with (folder / "spm_unigram.txt").open("a", encoding="utf-8") as file:
        file.write("\u2028 1 #fairseq:overwrite\n<lang:zh-CN> 1\n")
    chinese = Speech2TextTokenizer.from_directory(folder, "zh-CN")
    assert chinese(TEXTS[0])["input_ids"] == [len(encoder) + 1, *ours(text=TEXTS[0])["input_ids"][1:]]
