"""Whisper's tokenizer on a real vocabulary, on a small one, and from every kind of file."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from audiozoo.errors import AudiozooError, CheckpointError, SourceError, UsageError
from audiozoo.text import LANGUAGE_CODES, LANGUAGES, WhisperTokenizer, language_code
from audiozoo.text.whisper_tokenizer import _LETTER_OF_BYTE, _unspell
from tests.text.vocabularies import SMALL_SPECIALS, TEXTS, real_directory, small_backend


@pytest.fixture(scope="module")
def real():
    return WhisperTokenizer.from_directory(real_directory())


@pytest.fixture(scope="module")
def bare():
    return WhisperTokenizer.from_vocabulary_list(real_directory() / "vocabulary.txt")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    backend = small_backend()
    backend.add_special_tokens(SMALL_SPECIALS)
    path = tmp_path_factory.mktemp("small") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture
def small(small_file):
    return WhisperTokenizer.from_tokenizer_file(small_file)


def sentence(error: pytest.ExceptionInfo[AudiozooError]) -> str:
    text = str(error.value)
    assert text.endswith((".", "?"))
    assert "\n" not in text
    return text


def test_the_ids_of_the_english_vocabulary(real):
    assert real.vocabulary_size == 51_864
    assert not real.multilingual
    assert (real.eot, real.sot, real.translate, real.transcribe) == (50_256, 50_257, 50_357, 50_358)
    assert (real.sot_lm, real.sot_prev, real.no_speech, real.no_timestamps) == (50_359, 50_360, 50_361, 50_362)
    assert real.timestamp_begin == 50_363
    assert real.language_token("English") == 50_258
    assert real.num_languages == 99
    assert real.language_token("hebrew") == real.convert_tokens_to_ids("<|iw|>")  # the old code, in this vocabulary
    assert real.all_language_codes[:4] == ("en", "zh", "de", "es")
    assert real.sot_sequence() == (real.sot,)
    assert real.encode("Hello world") == [50_257, 50_362, 15_496, 995, 50_256]
    assert real.convert_ids_to_tokens([995, 50_364]) == ["Ġworld", "<|0.02|>"]
    assert real.convert_tokens_to_ids(["Ġworld", "<|0.02|>", "<|30.00|>"]) == [995, 50_364, 51_863]


@given(st.text())
def test_any_text_survives_a_round_trip(real, text):
    assert real.decode(real.encode_ordinary(text)) == text


@given(st.lists(st.integers(0, 51_863), max_size=30), st.booleans())
def test_the_bare_vocabulary_list_decodes_alike(real, bare, ids, skip):
    assert bare.decode(ids, skip) == real.decode(ids, skip)
    assert bare.decode_with_timestamps(ids) == real.decode_with_timestamps(ids)


def test_a_bare_vocabulary_list_cannot_encode(bare):
    with pytest.raises(UsageError, match="can only decode") as error:
        bare.encode("hello")
    sentence(error)


@given(st.lists(st.integers(0, 51_863), max_size=30), st.sampled_from(["en", "ja"]))
def test_words_put_together_are_the_text(real, ids, language):
    words, groups = real.split_to_word_tokens(ids, language)
    spelled = [token for group in groups for token in group]
    assert spelled == ids[: len(spelled)]  # an incomplete character at the end belongs to no word
    assert "".join(words) == real.decode_with_timestamps(ids)[: len("".join(words))]


def test_words_begin_at_spaces_and_punctuation_stands_alone(real):
    ids = real.encode_ordinary(" Hello, wonderful naïve world! 你好")
    words, _ = real.split_to_word_tokens([*ids, real.eot])
    assert words == [" Hello", ",", " wonderful", " naïve", " world", "!", " 你好", "<|endoftext|>"]
    characters, groups = real.split_to_word_tokens(real.encode_ordinary("你好世界"), "chinese")
    assert characters == ["你", "好", "世", "界"]
    assert max(map(len, groups)) > 1


def test_what_is_not_spoken_is_suppressed(real):
    tokens = real.non_speech_tokens
    assert len(tokens) == 84
    spelled = {real.decode([token]) for token in tokens}
    assert {"(", " (", "[", " [", " -", " '", '"', "♪"} - spelled == {"♪"}
    assert not {"-", "'", ",", ".", "?", "!"} & spelled
    for symbol in "♪♫":
        assert real.encode_ordinary(symbol)[0] in tokens


def test_every_byte_has_a_letter_of_its_own():
    letters = {_LETTER_OF_BYTE[byte] for byte in range(256)}
    assert len(letters) == 256
    assert letters == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert _unspell("Ġ") == b" "


def test_languages():
    assert len(LANGUAGES) == 100
    assert list(LANGUAGES)[-1] == "yue"
    assert LANGUAGES["ht"] == "haitian creole"
    assert LANGUAGE_CODES["castilian"] == "es"
    for name in ("de", "German", "<|de|>", " GERMAN "):
        assert language_code(name) == "de"
    with pytest.raises(UsageError, match="no language 'germn'; did you mean 'german'") as error:
        language_code("germn")
    sentence(error)
    with pytest.raises(UsageError, match="no language '12345'") as error:
        language_code("12345")
    sentence(error)


def test_prefixes(small):
    sot, de, translate, silent = small.sot, small.language_token("de"), small.translate, small.no_timestamps
    assert small.sot_sequence() == (sot, small.language_token("en"), small.transcribe)
    assert small.sot_sequence("German", "translate") == (sot, de, translate)
    assert small.prefix_tokens == [sot, silent]
    assert small.get_decoder_prompt_ids(task="translate", language="german") == [(1, de), (2, translate), (3, silent)]
    assert small.prefix_tokens == [sot, de, translate, silent]
    assert small.get_decoder_prompt_ids(no_timestamps=False) == [(1, de), (2, translate)]
    assert small.encode("") == [sot, de, translate, small.eot]
    prompt = small.get_prompt_ids("  Hello ")
    assert prompt.dtype == np.int64
    assert prompt.tolist() == [small.sot_prev, *small.encode_ordinary(" Hello")]
    for call, words in [
        (lambda: small.language_token("welsh"), "no token for welsh"),
        (lambda: small.sot_sequence("en", "sing"), "no task 'sing'"),
        (lambda: small.set_prefix_tokens(task="sing"), "no task 'sing'"),
        (lambda: small.set_prefix_tokens(language="klingon"), "no language 'klingon'"),
        (lambda: small.get_prompt_ids("a <|en|> b"), "special token <|en|>".replace("|", r"\|")),
    ]:
        with pytest.raises(UsageError, match=words) as error:
            call()
        sentence(error)


def test_an_english_checkpoint_knows_one_language(real):
    assert real.sot_sequence("english", "transcribe") == (real.sot,)
    for language, task in [("de", None), ("en", "translate"), (None, "translate")]:
        with pytest.raises(UsageError, match="English-only") as error:
            real.sot_sequence(language, task)
        sentence(error)


def test_special_tokens_in_a_text_are_tokens_or_text(small):
    assert small.encode("<|en|>", add_special_tokens=False) == [small.language_token("en")]
    ordinary = small.encode_ordinary("<|en|>")
    assert max(ordinary) < small.eot
    assert small.decode(ordinary) == "<|en|>"


def test_skipping_special_tokens_drops_the_prompt(small):
    hello, past = small.encode_ordinary("hello"), small.encode_ordinary("past")
    stamp = small.timestamp_begin
    ids = [small.sot_prev, *past, small.sot, small.language_token("en"), stamp, *hello, stamp + 60, small.eot]
    assert small.decode(ids, skip_special_tokens=True) == "hello"
    assert small.decode(ids) == "<|startofprev|>past<|startoftranscript|><|en|>hello<|endoftext|>"
    assert small.decode(ids, True, decode_with_timestamps=True) == "<|0.00|>hello<|1.20|>"
    assert small.decode([small.sot_prev, *past], skip_special_tokens=True) == ""
    assert small.batch_decode([hello, past]) == ["hello", "past"]
    assert small.decode(np.array(hello)) == "hello"
    assert small.decode(hello[0]) == small.decode(hello[:1])


def test_timestamps_count_on_across_windows(small):
    word, stamp = small.encode_ordinary("a"), small.timestamp_begin
    # 0 a 2 | 2 a 28, cut there; the next window starts at 28 s: 0 a 5 is 28 … 33.
    pair = [stamp, *word, stamp + 100, stamp + 100, *word, stamp + 1_400, stamp + 1_400, stamp, *word, stamp + 250]
    decoded = small.decode(pair, output_offsets=True, decode_with_timestamps=True)
    assert [offset["timestamp"] for offset in decoded["offsets"]] == [(0.0, 2.0), (2.0, 28.0), (28.0, 33.0)]
    assert decoded["text"] == "<|0.00|>a<|2.00|><|2.00|>a<|28.00|><|28.00|>a<|33.00|>"
    # A window that ends in a single timestamp was 30 s long.
    single = [stamp, *word, stamp + 100, *word, stamp, *word, stamp + 250]
    assert small.decode(single, decode_with_timestamps=True) == "<|0.00|>a<|2.00|>a<|30.00|>a<|35.00|>"
    assert small.decode(word, output_offsets=True)["offsets"] == []


def test_broken_characters_become_replacement_characters(small):
    ids = [small.convert_tokens_to_ids(_LETTER_OF_BYTE[byte]) for byte in "é".encode()]
    assert small.decode(ids) == "é"
    assert small.decode(ids[:1]) == "\ufffd"
    assert small.split_tokens_on_unicode(ids) == (["é"], [ids])


def test_ids_that_are_none(small):
    for ids, words in [([-100], "negative"), ([0.5], "integers"), ([[1, 2], [3, 4]], "one sequence at a time")]:
        with pytest.raises(UsageError, match=words) as error:
            small.decode(ids)
        sentence(error)
    assert small.decode([10**6]) == ""
    assert small.decode([]) == ""


def test_calling_it_makes_model_inputs(small):
    one = small("hello")
    assert one["input_ids"] == small.encode("hello")
    assert one["attention_mask"] == [1] * len(one["input_ids"])
    two = small(["hello", "a"], padding=True)
    assert two["input_ids"].shape == two["attention_mask"].shape
    assert two["input_ids"][1, two["attention_mask"][1].sum() :].tolist() == [small.eot] * int(
        (two["attention_mask"][1] == 0).sum()
    )
    assert small(["hello", "a"])["input_ids"] == [small.encode("hello"), small.encode("a")]


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_saving_and_loading(small, tmp_path, form):
    small.set_prefix_tokens("de", "translate", True)
    small.save(tmp_path)
    if form == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
    assert not list(tmp_path.glob("*.tmp"))
    again = WhisperTokenizer.from_directory(tmp_path)
    assert (again.language, again.task, again.predict_timestamps) == ("de", "translate", True)
    assert again.prefix_tokens == small.prefix_tokens
    assert again.all_special_ids == small.all_special_ids
    for text in TEXTS:
        assert again.encode(text) == small.encode(text)
        assert again.decode(again.encode(text)) == small.decode(small.encode(text))
        assert again.normalize(text) == small.normalize(text)


def test_a_decode_only_tokenizer_saves_its_list(bare, tmp_path):
    bare.save(tmp_path)
    again = WhisperTokenizer.from_directory(tmp_path)
    assert again.decode([15_496, 995]) == "Hello world"


def write_tiktoken(path, backend):
    """The vocabulary of `backend` as OpenAI writes it: bytes and ranks."""
    tokens = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    path.write_text("".join(f"{base64.b64encode(_unspell(token)).decode()} {rank}\n" for token, rank in tokens))


def test_tiktoken_files_give_the_same_merges(tmp_path):
    backend = small_backend()
    write_tiktoken(tmp_path / "multilingual.tiktoken", backend)
    tokenizer = WhisperTokenizer.from_directory(tmp_path)
    assert tokenizer.num_languages == 99
    assert tokenizer.eot == backend.get_vocab_size()
    assert tokenizer.vocabulary_size == tokenizer.eot + 1 + 1 + 99 + 6 + 1_501
    for text in TEXTS:
        assert tokenizer.encode_ordinary(text) == backend.encode(text).ids
    large = WhisperTokenizer.from_tiktoken(str(tmp_path / "multilingual.tiktoken"), num_languages=100)
    assert large.all_language_codes[-1] == "yue"
    assert large.timestamp_begin == tokenizer.timestamp_begin + 1
    assert large.encode("<|1.00|>", add_special_tokens=False) == [large.timestamp_begin + 50]


def test_damaged_and_missing_files_get_one_sentence(small_file, tmp_path):
    def write(name, content):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    good = small_file.read_text()
    without_merges = json.loads(good)
    without_merges["added_tokens"] = []
    cases = [
        (lambda: WhisperTokenizer.from_directory(tmp_path / "nowhere"), SourceError, "no directory"),
        (lambda: WhisperTokenizer.from_directory(small_file.parent / ".."), SourceError, "no Whisper tokenizer"),
        (lambda: WhisperTokenizer.from_tokenizer_file(tmp_path / "no.json"), SourceError, "no file"),
        (lambda: WhisperTokenizer.from_tokenizer_file(write("a.json", good[:1000])), CheckpointError, "truncated"),
        (lambda: WhisperTokenizer.from_tokenizer_file(write("b.json", b"\xff\xfe\x00")), CheckpointError, "UTF-8"),
        (lambda: WhisperTokenizer.from_tokenizer_file(write("c.json", "{}")), CheckpointError, "tokenizers library"),
        (
            lambda: WhisperTokenizer.from_tokenizer_file(write("d.json", json.dumps(without_merges))),
            CheckpointError,
            "not one of Whisper's",
        ),
        (lambda: WhisperTokenizer.from_tiktoken(write("e.tiktoken", "QQ== 0\nnonsense\n")), CheckpointError, "line 2"),
        (lambda: WhisperTokenizer.from_tiktoken(write("f.tiktoken", "QQ== x\n")), CheckpointError, "line 1"),
        (lambda: WhisperTokenizer.from_vocabulary_list(write("g.json", "{}")), CheckpointError, "not a list"),
        (lambda: WhisperTokenizer.from_vocabulary_list(write("h.txt", "a\nb\n")), CheckpointError, "not one of"),
        (
            lambda: WhisperTokenizer.from_vocabulary_and_merges(write("v.json", '{"a": 0}'), write("m.txt", "a b c\n")),
            CheckpointError,
            "not a pair",
        ),
        (
            lambda: WhisperTokenizer.from_vocabulary_and_merges(write("v.json", '{"a": 0}'), write("m.txt", "a b\n")),
            CheckpointError,
            "do not fit",
        ),
    ]
    for call, kind, words in cases:
        with pytest.raises(kind, match=words) as error:
            call()
        sentence(error)
