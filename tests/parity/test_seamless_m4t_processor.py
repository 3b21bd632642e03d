"""SeamlessM4T's features and tokens against `transformers`."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
import transformers

from audiozoo.errors import AudioError, CheckpointError, SourceError, UsageError
from audiozoo.processors import write_json
from audiozoo.processors.seamless_m4t import SeamlessM4TFeatureExtractor, SeamlessM4TProcessor, SeamlessM4TTokenizer
from tests.parity import harness

LANGUAGES = ["__eng__", "__fra__", "__deu__"]
LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "  Où est   la bibliothèque ?\n",
    "ab",
    "ünïcode ﬁ½ 漢字 …",
    "a __deu__ b",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tokenizer trained on a few lines, saved by `transformers` with its feature extractor."""
    folder = tmp_path_factory.mktemp("seamless")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    trained.train_from_iterator(LINES[:3] * 4, trainer)
    import json

    model = json.loads(trained.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer = transformers.SeamlessM4TTokenizer(
        vocab=model["vocab"], merges=merges, additional_special_tokens=LANGUAGES, src_lang="eng", tgt_lang="fra"
    )
    tokenizer.save_pretrained(folder)
    transformers.SeamlessM4TFeatureExtractor().save_pretrained(folder)
    return folder


def test_tokens_and_texts(directory):
    theirs = transformers.SeamlessM4TTokenizer.from_pretrained(directory)
    ours = SeamlessM4TProcessor.from_directory(directory)
    assert set(ours.tokenizer.lang_code_to_id) == {"eng", "fra", "deu"}
    for language in ("eng", "__deu__"):
        wanted = theirs(LINES, src_lang=language, padding=True, return_tensors="np")
        found = ours(text=LINES, src_lang=language)
        np.testing.assert_array_equal(found["input_ids"], wanted["input_ids"])
        np.testing.assert_array_equal(found["attention_mask"], wanted["attention_mask"])
    theirs = transformers.SeamlessM4TTokenizer.from_pretrained(directory)
    both = ours(text=LINES[0], text_target=LINES[1], tgt_lang="deu")
    theirs.tgt_lang = "deu"
    labels = theirs(text_target=LINES[1], tgt_lang="deu")["input_ids"]
    np.testing.assert_array_equal(both["labels"][0], labels)
    wave = np.zeros(1600, np.float32)
    for given in ({"text": LINES[:2]}, {"audio": [wave, wave], "sampling_rate": 16_000}):
        labelled = ours(**given, text_target=["ab", LINES[1]], tgt_lang="deu")["labels"]
        np.testing.assert_array_equal(labelled[1], labels)
        assert (labelled[0, 4:] == -100).all()  # no padding is learnt
        assert (labelled[0, :4] >= 0).all()
    ids = found["input_ids"]
    for skip in (True, False):
        assert ours.batch_decode(ids, skip_special_tokens=skip) == theirs.batch_decode(ids, skip_special_tokens=skip)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece model as NLLB's, which begins with <unk>, <s> and </s>, in a directory as the hub has them."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text.txt").write_text("\n".join(LINES[:3] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=110,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    (folder / "hub").mkdir()
    (folder / "hub" / "sentencepiece.bpe.model").write_bytes((folder / "tokenizer.model").read_bytes())
    names = {0: "<pad>", 1: "<unk>", 2: "<s>", 3: "</s>", **{size + 1 + i: name for i, name in enumerate(LANGUAGES)}}
    added = {str(i): {"content": name, "special": True} for i, name in names.items()}
    config = {"added_tokens_decoder": added, "additional_special_tokens": LANGUAGES, "src_lang": "eng"}
    write_json(folder / "hub" / "tokenizer_config.json", config | {"tokenizer_class": "SeamlessM4TTokenizer"})
    transformers.SeamlessM4TFeatureExtractor().save_pretrained(folder / "hub")
    return folder


def test_sentencepiece_files(pieces, tmp_path):
    """Directories without a `tokenizer.json`, as the published ones are; and what is saved of one."""
    theirs = transformers.SeamlessM4TTokenizer.from_pretrained(pieces / "hub")
    ours = SeamlessM4TProcessor.from_directory(pieces / "hub")
    ours.save(tmp_path)
    saved = SeamlessM4TProcessor.from_directory(tmp_path)
    back = transformers.SeamlessM4TTokenizer.from_pretrained(tmp_path)
    assert len(ours.tokenizer) == len(theirs)
    lines = [LINES[0], LINES[2], "Où est la bibliothèque ?", "a __deu__ b", "Zwölf"]
    for language in ("eng", "deu"):
        wanted = theirs(lines, src_lang=language, padding=True, return_tensors="np")["input_ids"]
        np.testing.assert_array_equal(ours(text=lines, src_lang=language)["input_ids"], wanted)
        np.testing.assert_array_equal(saved(text=lines, src_lang=language)["input_ids"], wanted)
        np.testing.assert_array_equal(
            back(lines, src_lang=language, padding=True, return_tensors="np")["input_ids"], wanted
        )
    for skip in (True, False):
        assert ours.batch_decode(wanted, skip) == theirs.batch_decode(wanted, skip_special_tokens=skip)
    # Older files: the added tokens in a file of their own.
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"see added_tokens\.json"):
        SeamlessM4TTokenizer.from_directory(tmp_path)
    write_json(tmp_path / "added_tokens.json", {n: i for n, i in ours.tokenizer.special.items() if i > 3})
    assert SeamlessM4TTokenizer.from_directory(tmp_path).lang_code_to_id == ours.tokenizer.lang_code_to_id


def test_features(directory):
    theirs = transformers.SeamlessM4TFeatureExtractor.from_pretrained(directory)
    ours = SeamlessM4TFeatureExtractor.from_directory(directory)
    rng = np.random.default_rng(0)
    waves = [rng.uniform(-0.5, 0.5, n).astype(np.float32) for n in (16_000, 9_111, 5_280)]
    for batch in (waves, waves[:1], waves[1], waves[2]):
        wanted = theirs(batch, sampling_rate=16_000, return_tensors="np")
        found = ours(batch, 16_000)
        assert set(found) == set(wanted)
        harness.assert_close(found["input_features"], wanted["input_features"], kind="features")
        np.testing.assert_array_equal(found["attention_mask"], wanted["attention_mask"])
    waves.append(waves[0][:720])  # three frames, whose deviation is small: compared as they are
    raw = theirs(waves, sampling_rate=16_000, return_tensors="np", do_normalize_per_mel_bins=False)
    found = ours(waves, 16_000, do_normalize_per_mel_bins=False)
    harness.assert_close(found["input_features"], raw["input_features"], kind="features")
    assert np.isfinite(ours(np.zeros(16_000, np.float32), 16_000)["input_features"]).all()


def test_what_is_written_is_read(directory, tmp_path):
    SeamlessM4TProcessor.from_directory(directory).save(tmp_path)
    again = SeamlessM4TProcessor.from_directory(tmp_path)
    np.testing.assert_array_equal(
        again(text=LINES)["input_ids"], SeamlessM4TProcessor.from_directory(directory)(text=LINES)["input_ids"]
    )
    theirs = transformers.SeamlessM4TFeatureExtractor.from_pretrained(tmp_path)
    assert theirs.num_mel_bins == 80
    assert theirs.stride == 2


def test_mistakes_get_a_sentence(directory, tmp_path):
    processor = SeamlessM4TProcessor.from_directory(directory)
    good = np.zeros(16_000, np.float32)
    for call, kind, message in (
        (lambda: processor(good, 16_000, text="a"), UsageError, "not both"),
        (lambda: processor(), UsageError, "Give text"),
        (lambda: processor(text="a", src_lang="xyz"), UsageError, "no language 'xyz'; there are deu, eng, fra"),
        (lambda: processor(text=[]), UsageError, "one text, or a list"),
        (lambda: processor(good, 8_000), AudioError, "8000"),
        (lambda: processor(good[:0], 16_000), AudioError, "empty"),
        (lambda: processor(good[:500], 16_000), AudioError, "500"),
        (lambda: processor(good * np.nan, 16_000), AudioError, "finite"),
        (lambda: processor(np.zeros(16_000, np.int16), 16_000), AudioError, "int16"),
        (lambda: processor(np.zeros((16_000, 2), np.float32), 16_000), AudioError, "channels"),
        (lambda: SeamlessM4TTokenizer.from_directory(tmp_path), SourceError, r"no tokenizer\.json"),
        (lambda: SeamlessM4TFeatureExtractor.from_directory(tmp_path / "x"), SourceError, "no directory"),
    ):
        with pytest.raises(kind, match=message):
            call()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no tokenizer of the library"):
        SeamlessM4TTokenizer.from_directory(tmp_path)
