"""A voice's characters against `transformers.VitsTokenizer` on the same files, romanised ones included."""

from __future__ import annotations

import functools
import json
from unittest import mock

import numpy as np
import pytest
import transformers
from transformers.models.vits import tokenization_vits

from audiozoo.processors.vits import VitsProcessor, VitsTokenizer

LETTERS = "_ abcdefghijklmnopqrstuvwxyz'-0"
VOICES = {
    "letters": (LETTERS, {}),
    "no blanks": (LETTERS, {"add_blank": False}),
    "as it stands": ("abcdefXYZ |", {"normalize": False}),
    "with capitals": ("|abcXY deé", {}),
    "romanised": (LETTERS, {"is_uroman": True, "language": "kor"}),
    "Romanian": ("_ abcdefghilmnoprstuvzâăîşţ", {"language": "ron"}),
    "padding of its own": ("abc de", {"pad_token": "e", "unk_token": "b"}),
}
TEXTS = (
    "Hello, World! It's 10 o'clock - isn't it?",
    "",
    "  two   spaces ",
    "XYZabcé Xa",
    "이봐 무슨 일이야",
    "Ţară și țară, âăî",
    "Ünïcödé ß",
)


@pytest.fixture(scope="module", autouse=True)
def _one_romaniser():
    """The original reads its romaniser's tables anew for every text: seconds each time."""
    with mock.patch.object(tokenization_vits.ur, "Uroman", functools.cache(tokenization_vits.ur.Uroman)):
        yield


@pytest.fixture(params=VOICES, scope="module")
def both(request, tmp_path_factory):
    symbols, options = VOICES[request.param]
    directory = tmp_path_factory.mktemp("voice")
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    (directory / "written.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    theirs = transformers.VitsTokenizer(directory / "written.json", phonemize=False, **options)
    theirs.save_pretrained(directory)
    return theirs, VitsProcessor.from_directory(directory)


def test_the_same_ids(both):
    theirs, ours = both
    for text in TEXTS:
        for normalize in (None, True, False):
            kept = {} if normalize is None else {"normalize": normalize}
            expected = theirs(text, **kept)["input_ids"]
            found = ours(text, normalize=normalize)
            # An empty text is one masked symbol here, so that there is something to pad.
            assert found["input_ids"][0][found["attention_mask"][0] > 0].tolist() == expected, (text, normalize)


def test_a_batch_and_the_way_back(both):
    theirs, ours = both
    expected = theirs(list(TEXTS), padding=True, return_tensors="np")
    found = ours(list(TEXTS), return_tensors="np")
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    for row, mask in zip(found["input_ids"], found["attention_mask"], strict=True):
        kept = row[mask > 0]
        if not set(kept.tolist()) & set(theirs.all_special_ids):
            assert ours.decode(kept) == theirs.decode(kept)


def test_what_we_save_they_load(both, tmp_path):
    theirs, ours = both
    ours.tokenizer.save(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    mine = VitsTokenizer.from_directory(tmp_path)
    for text in TEXTS:
        expected = theirs(text)["input_ids"]
        assert again(text)["input_ids"] == expected
        assert mine.encode(mine.prepare(text)) == expected
