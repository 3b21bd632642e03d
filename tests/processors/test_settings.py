"""The settings of a feature extractor, as files have them."""

from __future__ import annotations

import json

import pytest
import sentencepiece
import tokenizers

import audiozoo
from audiozoo.errors import CheckpointError, UsageError
from audiozoo.models.encodec import EncodecConfig
from audiozoo.processors.audio_spectrogram_transformer import ASTFeatureExtractor
from audiozoo.processors.bark import BarkProcessor
from audiozoo.processors.clap import ClapFeatureExtractor
from audiozoo.processors.encodec import EncodecFeatureExtractor
from audiozoo.processors.musicgen import MusicgenMelodyFeatureExtractor
from audiozoo.processors.pop2piano import Pop2PianoTokenizer
from audiozoo.processors.seamless_m4t import SeamlessM4TFeatureExtractor, SeamlessM4TTokenizer
from audiozoo.processors.speech_to_text import Speech2TextFeatureExtractor
from audiozoo.processors.speech_to_text_2 import Speech2Text2Tokenizer
from audiozoo.processors.speecht5 import SpeechT5FeatureExtractor, SpeechT5Tokenizer
from audiozoo.processors.vits import VitsTokenizer
from audiozoo.processors.wav2vec2 import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor
from audiozoo.processors.whisper import WhisperFeatureExtractor
from audiozoo.text.roberta_tokenizer import RobertaTokenizer
from audiozoo.text.t5_tokenizer import T5Tokenizer
from audiozoo.text.whisper_tokenizer import WhisperTokenizer


def written(folder, settings):
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("cls", "wrong", "told"),
    [
        (Wav2Vec2FeatureExtractor, {"padding_value": "x"}, "has padding_value 'x', which is no float"),
        (Wav2Vec2FeatureExtractor, {"sampling_rate": True}, "has sampling_rate True, which is no int"),
        (SpeechT5FeatureExtractor, {"num_mel_bins": None}, "has num_mel_bins None, which is no int"),
        (ASTFeatureExtractor, {"mean": None}, "has mean None, which is no float"),
        (ASTFeatureExtractor, {"sampling_rate": 0}, "has sampling_rate 0; it must be at least 1"),
        (ClapFeatureExtractor, {"top_db": []}, r"has top_db \[\], which is no int \| None"),
        (EncodecFeatureExtractor, {"overlap": float("nan")}, r"has overlap nan, which is no float \| None"),
        (WhisperFeatureExtractor, {"chunk_length": 30.5}, "has chunk_length 30.5, which is no int"),
        (MusicgenMelodyFeatureExtractor, {"stem_indices": 3}, "has stem_indices 3, which is no tuple"),
        (MusicgenMelodyFeatureExtractor, {"stem_indices": ["x"]}, r"has stem_indices \['x'\], which is no tuple"),
        (WhisperFeatureExtractor, {"chunk_length": 0}, "has chunk_length 0; it must be at least 1"),
        (SeamlessM4TFeatureExtractor, {"stride": -2}, "has stride -2; it must be at least 1"),
        (
            EncodecFeatureExtractor,
            {"chunk_length_s": 1e308},
            "chunk_length_s=1e[+]308 is no length of a chunk at 24000",
        ),
        (EncodecFeatureExtractor, {"chunk_length_s": -1}, "chunk_length_s=-1 is no length"),
        (EncodecFeatureExtractor, {"chunk_length_s": 3601}, "chunk_length_s=3601 is no length of a chunk at 24000 Hz"),
        (WhisperFeatureExtractor, {"chunk_length": 3601}, "chunk_length=3601 is no length of a chunk at 16000 Hz"),
        (MusicgenMelodyFeatureExtractor, {"chunk_length": 3601}, "chunk_length=3601 is no length of a chunk at 32000"),
        (ClapFeatureExtractor, {"max_length_s": 3601}, "max_length_s=3601 is no length of a chunk at 48000 Hz"),
        (ASTFeatureExtractor, {"max_length": 10**12}, "has max_length 1000000000000; it .* and at most 1,000,000"),
        (Wav2Vec2FeatureExtractor, {"sampling_rate": 10**12}, "has sampling_rate 1000000000000; it must"),
        (EncodecFeatureExtractor, {"chunk_length_s": 1, "overlap": 1}, "overlap=1 must be a share of a chunk"),
        (Speech2TextFeatureExtractor, {"global_cmvn": "x"}, "has global_cmvn 'x', which is no Mapping"),
        (
            ASTFeatureExtractor,
            {"feature_extractor_type": "A"},
            "holds the settings of a A, not of a ASTFeatureExtractor",
        ),
    ],
)
def test_what_is_of_another_type_is_named(cls, wrong, told, tmp_path):
    with pytest.raises(CheckpointError, match=told):
        cls.from_directory(written(tmp_path, wrong))


def test_json_has_no_tuples_and_one_kind_of_number(tmp_path):
    melody = MusicgenMelodyFeatureExtractor.from_directory(written(tmp_path, {"stem_indices": [3, 2], "unknown": {}}))
    assert tuple(melody.stem_indices) == (3, 2)
    codec = EncodecFeatureExtractor.from_directory(written(tmp_path, {"chunk_length_s": 1, "overlap": None}))
    assert (codec.chunk_length, codec.chunk_stride) == (24_000, None)
    assert SpeechT5FeatureExtractor.from_directory(written(tmp_path, {"num_mel_bins": 40})).num_mel_bins == 40


@pytest.mark.parametrize("wrong", [{"chunk_length_s": float("inf")}, {"chunk_length_s": 0}, {"overlap": 1.5}])
def test_a_model_with_such_chunks_is_none_either(wrong):
    with pytest.raises(UsageError, match=r"is no length of a chunk|must be a share of a chunk"):
        EncodecConfig(**{"chunk_length_s": 1.0, "overlap": 0.01} | wrong)


LETTERS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "a": 5}


@pytest.mark.parametrize(
    ("cls", "wrong", "told"),
    [
        (Wav2Vec2CTCTokenizer, {"word_delimiter_token": 5}, r"has word_delimiter_token 5, which is no str \| None"),
        (Wav2Vec2CTCTokenizer, {"unk_token": {"content": 5}}, "has unk_token 5, which is no str"),
        (Wav2Vec2CTCTokenizer, {"replace_word_delimiter_char": None}, "char None, which is no str"),
        (VitsTokenizer, {"pad_token": ["a"]}, r"has pad_token \['a'\], which is no str \| None"),
        (VitsTokenizer, {"unk_token": {"content": 5}}, "has unk_token 5, which is no str"),
        (VitsTokenizer, {"add_blank": "no"}, "has add_blank 'no', which is no bool"),
    ],
)
def test_what_is_of_another_type_in_a_tokenizer_is_named(cls, wrong, told, tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(LETTERS))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(wrong))
    with pytest.raises(CheckpointError, match=told):
        cls.from_directory(tmp_path)


def test_what_is_of_another_type_in_a_tokenizer_of_notes_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"num_bars": 0}))
    with pytest.raises(CheckpointError, match="has num_bars 0; it must be at least 1"):
        Pop2PianoTokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("number", [1.5, "5", None, -1, True])
@pytest.mark.parametrize("cls", [Wav2Vec2CTCTokenizer, VitsTokenizer, Speech2Text2Tokenizer])
def test_what_cannot_be_the_number_of_a_token(cls, number, tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(LETTERS | {"a": number}))
    with pytest.raises(CheckpointError, match=f"vocab\\.json' gives the token 'a' the number {number!r}"):
        cls.from_directory(tmp_path)


def test_every_vocabulary_of_several_is_looked_at(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"eng": LETTERS, "fra": LETTERS | {"a": "5"}}))
    with pytest.raises(CheckpointError, match="gives the token 'a' the number '5'"):
        Wav2Vec2CTCTokenizer.from_directory(tmp_path, "eng")


ROBERTA = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5}


@pytest.mark.parametrize(
    ("cls", "tokenize"),
    [
        (RobertaTokenizer, lambda tokenizer: tokenizer("a b")),
        (T5Tokenizer, lambda tokenizer: tokenizer("a b")),
        (SeamlessM4TTokenizer, lambda tokenizer: tokenizer("a b")),
    ],
)
def test_what_a_tokenizer_has_no_token_for(cls, tokenize, tmp_path):
    """Its unknown token is not in its vocabulary, which the library says only when it needs it."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ROBERTA, merges=[], unk_token="<none>"))
    backend.add_special_tokens([*list(ROBERTA)[:5], "__eng__"])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="The checkpoint's tokenizer cannot read 'a b'"):
        tokenize(cls.from_directory(tmp_path))


def test_what_a_tokenizer_of_words_has_no_token_for(tmp_path):
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "a": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab=vocabulary, unk_token="<none>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="The checkpoint's tokenizer cannot read 'b'"):
        BarkProcessor.from_directory(tmp_path)("b")


def test_what_whisper_has_no_token_for(tmp_path):
    names = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>"]
    names += ["<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[], unk_token="<none>"))
    backend.add_special_tokens(names)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = WhisperTokenizer.from_directory(tmp_path)
    for encode in (tokenizer.encode, tokenizer.encode_ordinary):
        with pytest.raises(CheckpointError, match="The checkpoint's tokenizer cannot read 'b'"):
            encode("b")


def test_characters_without_padding(tmp_path):
    """SentencePiece gives the number of what is unknown for a token that it does not have."""
    (tmp_path / "lines.txt").write_text("a b c\n" * 10)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"), model_prefix=str(tmp_path / "spm_char"), vocab_size=7, model_type="char"
    )
    with pytest.raises(CheckpointError, match=r"spm_char\.model' has no <pad>"):
        SpeechT5Tokenizer.from_directory(tmp_path)


def test_files_of_which_no_processor_can_be_made(tmp_path):
    decoder = {"model_type": "speech_to_text_2"}
    config = {
        "architectures": ["SpeechEncoderDecoderModel"],
        "model_type": "speech-encoder-decoder",
        "decoder": decoder,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.json").write_text(json.dumps(LETTERS))
    (tmp_path / "merges.txt").write_text("a b\na\n")
    with pytest.raises(CheckpointError, match="No processor can be made of the settings in"):
        audiozoo.load_processor(written(tmp_path, {}))
