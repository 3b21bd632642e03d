"""UniSpeech-SAT against `transformers` (eager): forwards. Published sizes, random weights."""

from __future__ import annotations

from benchmarks.wavlm import forwards

CASES = forwards(
    "unispeech_sat",
    "UniSpeechSatConfig",
    (("UniSpeechSatForXVector", "base", 1, 10, 8), ("UniSpeechSatForXVector", "base", 8, 5, 3)),
)
