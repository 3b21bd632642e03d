"""UniSpeech against `transformers` (eager): forwards. Published size, random weights."""

from __future__ import annotations

from benchmarks.wavlm import forwards

CASES = forwards(
    "unispeech",
    "UniSpeechConfig",
    (("UniSpeechForCTC", "large", 1, 10, 4), ("UniSpeechForCTC", "large", 8, 5, 2)),
)
