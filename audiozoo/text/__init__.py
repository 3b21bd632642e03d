"""Text in and out: tokenizers, normalisers and error rates."""

from audiozoo.text.metrics import ErrorRate, character_error_rate, word_error_rate
from audiozoo.text.normalizers import BasicTextNormalizer, EnglishTextNormalizer
from audiozoo.text.whisper_tokenizer import LANGUAGE_CODES, LANGUAGES, WhisperTokenizer, language_code

__all__ = [
    "LANGUAGES",
    "LANGUAGE_CODES",
    "BasicTextNormalizer",
    "EnglishTextNormalizer",
    "ErrorRate",
    "WhisperTokenizer",
    "character_error_rate",
    "language_code",
    "word_error_rate",
]
